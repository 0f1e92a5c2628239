"""recode to a URL: shard by shard through a scratch folder, each file uploaded once it is made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cache_format.layout.manifest import CommandLine, Manifest, require_same_identity
from cache_format.layout.shard_layout import shard_name
from cache_format.reading.feature_cache import FeatureCache, only_cache
from cache_format.storage.lease import leased
from cache_format.storage.lock import writing
from cache_format.storage.own_folders import empty_but_for_lock
from cache_format.storage.store import Store
from cache_format.upkeep.recode import (
    RecodeReport,
    SourceRows,
    begin,
    chosen_codec,
    places_by_shard,
    recoded_manifest,
    report,
)
from cache_format.writing.make_shards import ShardMaker
from cache_format.writing.upload import Upload


def recode_to_store(
    cache: FeatureCache,
    url: str,
    scratch: Path,
    codec_name: str,
    *,
    threads: int,
    progress: Callable[[int], None] = lambda n: None,
    tell: Callable[[str], None] = lambda text: None,
    command: CommandLine | None = None,
) -> RecodeReport:
    """:func:`cache_format.upkeep.recode.recode` to ``url``; ``scratch`` holds no more than ``threads`` shards.

    Raises:
        DFlashCacheError: as there; what the store refuses too.
    """
    source = only_cache(cache)
    manifest = recoded_manifest(source.manifest, chosen_codec(source, codec_name), command)
    upload = Upload(Store(url), scratch)
    _check_place(upload, manifest)
    with writing(scratch, make=True), leased(upload.store, tell) as allowed:
        upload.require(allowed)
        # Once more: another recode may have come first.
        _check_place(upload, manifest)
        upload.pull()
        if upload.manifest() is None:
            begin(source, scratch, manifest)
            upload.commit(manifest)
        assert manifest.totals is not None
        numbers = range(manifest.totals.shards)
        before = [source.folder.size(shard_name(number)) or 0 for number in numbers]
        missing = [number for number in numbers if number not in upload.shards]
        progress(sum(before) - sum(before[number] for number in missing))
        schema = manifest.schema()
        rows = SourceRows(source, places_by_shard(source))
        maker = ShardMaker(scratch, schema, rows, lambda number: upload.commit_shard(schema, number))
        maker.make_all(missing, threads, lambda number: progress(before[number]))
        there = upload.manifest()
        sealed = there if there is not None and there.state == "complete" else upload.seal(manifest)
        empty_but_for_lock(scratch)
    return report(upload.store.url, sealed, len(missing), before, [upload.shards[number] for number in numbers])


def _check_place(upload: Upload, manifest: Manifest) -> None:
    """Refuse a place that is not this recode's own."""
    upload.refuse_foreign()
    stored = upload.manifest()
    if stored is not None:
        require_same_identity(upload.store.url, stored.identity, manifest.identity)
