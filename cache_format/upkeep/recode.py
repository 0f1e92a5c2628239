"""recode: a complete cache -> the same cache with another codec, shard by shard, without the target.

The copy has the same samples in the same shards, so it is the cache that ``extract --codec`` with the other options
as they were would have made: the same fingerprint and the same bytes of every shard. So the same ``extract`` command
can mend it. From fp8 only quant is made; the identity then says so, and extract refuses it.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cache_format.codecs import CalibrationShare, Codec, Fp8Codec, QuantCodec, codec_named
from cache_format.codecs.dtypes import DTYPES
from cache_format.errors import CacheError, InputError
from cache_format.layout.index import INDEX_NAME, SHARDS_NAME
from cache_format.layout.manifest import (
    CODEC_BEFORE,
    MANIFEST_NAME,
    STATISTICS,
    CommandLine,
    Manifest,
    codec_identity,
    require_same_identity,
)
from cache_format.layout.shard_layout import shard_name
from cache_format.reading.feature_cache import FeatureCache, only_cache
from cache_format.reading.open_cache import OpenCache
from cache_format.storage.commit import committed, make_folder
from cache_format.storage.file_info import file_info
from cache_format.storage.host_memory import host_memory
from cache_format.storage.lock import writing
from cache_format.storage.own_folders import begin_folders, refuse_foreign
from cache_format.storage.paths import inside
from cache_format.writing.make_shards import ShardMaker, ShardRows, is_done, require_room
from cache_format.writing.seal import seal

_COPY_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True)
class RecodeReport:
    """What :func:`recode` did."""

    cache: str
    codec: str
    shards: int
    """made by this run"""
    done_shards: int
    """found done"""
    bytes_before: int
    """of all shards"""
    bytes: int
    ratio: float
    """of what stands for hidden_states, to its bytes with the raw codec"""
    snr_db: list[float]
    """of each captured layer over all tokens together; empty with a lossless codec"""
    median_snr_db: list[float]
    """the same of the median token"""
    worst_snr_db: list[float]
    """the same of the worst token"""


def recode(
    cache: FeatureCache,
    out: Path,
    codec_name: str,
    *,
    threads: int,
    progress: Callable[[int], None] = lambda n: None,
    command: CommandLine | None = None,
) -> RecodeReport:
    """Write ``cache`` into folder ``out`` with another codec, or go on where an earlier run stopped.

    Each sample's checksum is checked as it is read if ``cache`` was opened with ``verify="sample"``.

    Args:
        cache: complete, and of a lossless codec; or of fp8, for quant.
        out: new, or begun by the same recode.
        codec_name: as ``--codec`` takes it, such as ``zbits`` or ``quant:fine``.
        threads: shards that are worked on at a time; each takes memory for two shards.
        progress: called with the source bytes of each shard that is done.
        command: that asked for it, for the manifest.

    Raises:
        InputError: nothing to do, a lossy source, an ``out`` that cannot be used, or too little space.
        MismatchError: ``out`` is of another cache or codec.
        CacheError: ``cache`` is damaged.
        StorageError: the operating system refused; finished shards stay.
    """
    source = only_cache(cache)
    codec = chosen_codec(source, codec_name)
    manifest = recoded_manifest(source.manifest, codec, command)
    _check_out(source, out, manifest)
    make_folder(out)
    with writing(out):
        # Once more: another recode may have come first.
        _check_out(source, out, manifest)
        begin(source, out, manifest)
        schema, places = manifest.schema(), places_by_shard(source)
        missing = [n for n in range(len(places)) if not is_done(out, schema, n, source.index.sample_id[places[n]])]
        require_room(out, schema, [source.index.num_tokens[places[number]] for number in missing])
        before = [source.folder.size(shard_name(number)) or 0 for number in range(len(places))]
        progress(sum(before) - sum(before[number] for number in missing))
        maker = ShardMaker(out, schema, SourceRows(source, places))
        maker.make_all(missing, threads, lambda number: progress(before[number]))
        sealed = Manifest.read(out)
        sealed = sealed if sealed.state == "complete" else seal(out, sealed)
    after = [_size(out / shard_name(number)) for number in range(len(places))]
    return report(str(out), sealed, len(missing), before, after)


def report(where: str, sealed: Manifest, made: int, before: Sequence[int], after: Sequence[int]) -> RecodeReport:
    """Of a cache that is now complete; ``before`` and ``after``: bytes of each shard."""
    assert sealed.measured is not None
    return RecodeReport(
        cache=where,
        codec=sealed.codec["name"],
        shards=made,
        done_shards=len(before) - made,
        bytes_before=sum(before),
        bytes=sum(after),
        ratio=sealed.measured.ratio,
        snr_db=sealed.measured.snr_db,
        median_snr_db=sealed.measured.median_snr_db,
        worst_snr_db=sealed.measured.worst_snr_db,
    )


class SourceRows:
    """The rows of a shard as ``source`` has them, in memory that each thread uses again."""

    def __init__(self, source: OpenCache, places: Sequence[np.ndarray]):
        """``places``: :func:`places_by_shard` of the source."""
        self._source, self._places = source, places
        self._tensors = source.manifest.schema().raw.token_tensors
        self._thread = threading.local()

    def __call__(self, number: int) -> ShardRows:
        """Read and decode those of shard ``number``."""
        places, index = self._places[number], self._source.index
        if len(places):
            # One row of all samples, one after the other: the tensors of a shard.
            batch = self._source.gather([places], allocate=self._batch_memory).decoded()
            raw = {tensor.name: getattr(batch, tensor.name)[0] for tensor in self._tensors}
        else:
            raw = {tensor.name: torch.empty(tensor.shape(0), dtype=DTYPES[tensor.dtype]) for tensor in self._tensors}
        return ShardRows(index.sample_id[places], index.num_tokens[places].astype(np.int64), raw)

    def _batch_memory(self, num_bytes: int) -> torch.Tensor:
        memory: torch.Tensor | None = getattr(self._thread, "memory", None)
        if memory is None or len(memory) < num_bytes:
            memory = self._thread.memory = host_memory(num_bytes)
        return memory[:num_bytes]


def chosen_codec(source: OpenCache, codec_name: str) -> Codec:
    """The codec of the copy; what it has to know of the states is read from ``source``.

    Raises:
        InputError: unknown, the one that ``source`` has, or ``source`` is lossy (but fp8 for quant) or not complete.
    """
    have = codec_named(source.manifest.codec["name"])
    try:
        codec = codec_named(codec_name)
    except ValueError as error:
        raise InputError(f"--codec: {error}") from None
    if source.manifest.state != "complete":
        raise InputError(f"{source.where}: only a complete cache can be recoded; finish it with its extract command")
    if codec.name == have.name:
        raise InputError(f"{source.where}: its codec is {have.name} already")
    if not (have.lossless or (have.name, codec.name) == (Fp8Codec.name, QuantCodec.name)):
        raise InputError(
            f"{source.where}: its codec {have.name} has rounded the states; recode the cache that it was made from, "
            "or extract again with --codec"
        )
    states = source.manifest.schema().states
    return codec if codec.is_calibrated else codec.calibrated(_calibration_rows(source), states)


def _calibration_rows(source: OpenCache) -> torch.Tensor:
    """What extract would calibrate with: see :class:`CalibrationShare`."""
    places = places_by_shard(source)
    share, found = CalibrationShare.of(len(places)), []
    for of_shard in places[: share.shards]:
        ends = np.cumsum(source.index.num_tokens[of_shard], dtype=np.int64)
        wanted = of_shard[: int(np.searchsorted(ends, share.rows)) + 1]
        if len(wanted):
            batch = source.gather([wanted], allocate=host_memory).decoded()
            found.append(batch.hidden_states[0, : share.rows])
    return torch.cat(found) if found else torch.empty(0, source.manifest.width, dtype=source.manifest.torch_dtype)


def recoded_manifest(source: Manifest, codec: Codec, command: CommandLine | None) -> Manifest:
    """Of the copy, before its shards are made; state extracting."""
    files = {name: info for name, info in source.files.items() if name not in (INDEX_NAME, SHARDS_NAME)}
    kept = {name: value for name, value in source.identity.items() if name != STATISTICS}
    before = codec_named(source.codec["name"])
    rounded = {} if before.lossless else {CODEC_BEFORE: before.name}
    identity = {**kept, **codec_identity(codec), **rounded}
    changes: dict[str, Any] = {"codec": codec.to_dict(), "quarantined": [], "measured": None, "command": command}
    changes["token_snr"] = not codec.lossless
    return source.extracting(identity, files=files, **changes)


def _check_out(source: OpenCache, out: Path, manifest: Manifest) -> None:
    """Refuse an ``out`` that is not this recode's own."""
    if out.resolve().is_relative_to(source.path.resolve()) or source.path.resolve().is_relative_to(out.resolve()):
        raise InputError(f"{out}: choose an OUT beside the cache, not inside it or around it")
    refuse_foreign(out, "a cache", MANIFEST_NAME, {"shards", *(name.split("/")[0] for name in manifest.files)})
    stored = Manifest.find(out)
    if stored is not None:
        require_same_identity(out, stored.identity, manifest.identity)
        if stored.state == "preparing":
            raise InputError(f"{out}: an extract command has begun it; finish it with that, or choose another OUT")


def begin(source: OpenCache, out: Path, manifest: Manifest) -> None:
    """Clear what a killed run left; copy samples/ and target/, then write the manifest, unless they are there."""
    folders = [name.rpartition("/")[0] for name in manifest.files]
    begin_folders(out, ["shards", *(name for name in folders if name)])
    if (out / MANIFEST_NAME).exists():
        return
    for name, info in manifest.files.items():
        if not (out / name).exists() or file_info(out / name) != info:
            with open(source.folder.local(name), "rb") as file, committed(inside(out, name)) as copy:
                shutil.copyfileobj(file, copy, _COPY_BYTES)
        if file_info(out / name) != info:
            raise CacheError(
                f"{source.where}/{name}", "does not match its checksum; run `dflash-cache verify` on its cache"
            )
    manifest.write(out)


def places_by_shard(source: OpenCache) -> list[np.ndarray]:
    """For each shard the places of its samples in the source's index, in the order of its rows."""
    assert source.manifest.totals is not None
    order = np.lexsort((source.index.row_start, source.index.shard))
    bounds = np.searchsorted(source.index.shard[order], np.arange(source.manifest.totals.shards + 1))
    return [order[low:high] for low, high in pairwise(bounds)]


def _size(path: Path) -> int:
    return path.stat().st_size
