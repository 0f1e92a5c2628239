"""Make a report of a cache in a folder or at a URL: read some of it, and let the pure functions beside count."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from cache_format.codecs import States, codec_from_dict
from cache_format.errors import CacheError, DFlashCacheError, StorageError
from cache_format.layout.index import INDEX_NAME
from cache_format.layout.manifest import MANIFEST_NAME, DataInfo, Manifest
from cache_format.layout.samples import PartInfo, part_path, read_part
from cache_format.layout.shard_layout import finished_shards, shard_name
from cache_format.reading.feature_cache import FeatureCache, only_cache
from cache_format.reading.open_cache import OpenCache
from cache_format.storage.folder import LocalFolder, StoreFolder, open_folder
from cache_format.upkeep.verify import verify
from extractor.job.show import place, stored_tokenizer
from extractor.report.browsed_rows import BrowsedRow, browse, choose_rows
from extractor.report.chosen_samples import choose_samples
from extractor.report.codec_trial import MOST_BYTES, CodecTrial, try_codecs
from extractor.report.dropped_rows import DroppedRows, dropped_rows
from extractor.report.findings import (
    Finding,
    codec_findings,
    job_findings,
    sample_findings,
    state_findings,
)
from extractor.report.given_results import Given, Ran, Verified
from extractor.report.job_figures import JobFigures, padding, size_histogram, throughput, tokens_of
from extractor.report.read_states import read_states
from extractor.report.sample_figures import SampleFigures, sample_figures
from extractor.report.state_figures import SampleStates, StateFigures, Summing
from extractor.terminal.progress import Reporter, say

MOST_PARTS_AT_URL = 64
"""Of samples/, 20 MB each or so, that are fetched to say which rows samples came from."""

MOST_SHARDS_AT_URL = 1000
"""A cache at a URL with more is not verified: that reads each shard's head."""


@dataclass(frozen=True, kw_only=True)
class CodecSize:
    """What the shards take, or would take, with a codec."""

    codec: str
    is_used: bool
    token_bytes: float
    """of a token's states"""
    total_bytes: float
    """of the states of all planned tokens"""
    snr_db: list[float]
    """of each layer; empty with a lossless codec"""
    worst_db: list[float]
    """of the token where it is lowest; empty where it was not measured token by token"""


@dataclass(frozen=True, kw_only=True)
class Report:
    """All of it; for the terminal, the page and ``--json``."""

    cache: str
    state: str
    fingerprint: str
    target: str
    model_type: str
    target_layer_ids: list[int]
    num_hidden_layers: int
    hidden_size: int
    dtype: str
    codec: str
    data: str
    rows: int
    """of the dataset"""
    command: str
    """that began the cache; "" where the cache does not say"""
    identity: dict[str, Any]
    findings: list[Finding]
    samples: SampleFigures
    dropped: list[DroppedRows]
    states: StateFigures | None
    """None where no shard is finished, or none can be read"""
    looked_at_shards: list[int]
    """whose samples the states are of"""
    codecs: list[CodecSize]
    codecs_tried_on: int
    """tokens; 0: nothing was tried, the cache is lossy already"""
    job: JobFigures
    verified: Verified | None
    runs: list[Ran]
    browsed: list[BrowsedRow]
    no_text: str
    """why token ids stand for text; "" where they do not"""


def make_report(where: Path | str, samples: int, given: Given | None = None) -> Report:
    """Look at about ``samples`` samples of a cache, finished or not.

    Raises:
        CacheError: not a cache, or its manifest or tables are damaged. Damaged shards are findings.
        InputError: a collection of several caches.
    """
    cache = FeatureCache.open(where, allow_incomplete=True)
    opened, given = only_cache(cache), given or Given()
    manifest = opened.manifest
    assert manifest.data is not None
    assert manifest.totals is not None
    _require_possible(opened)
    chosen = choose_samples(cache.index, samples)
    looked = _look(cache, chosen)
    figures = sample_figures(cache.index, manifest)
    to_browse = choose_rows(cache.index.num_tokens, cache.index.num_loss_tokens, chosen)
    sources, parts = _rows_of(opened, {int(cache.index.sample_id[i]) for i in to_browse}, manifest.data)
    dropped = dropped_rows(manifest.data, parts)
    tokenizer, no_text = _tokenizer(cache)
    browsed = _browsed(opened, tokenizer, to_browse, sources, looked)
    job = _job_figures(opened)
    verified = given.verified or _verified(where, opened, job.shards)
    findings = [
        *looked.findings,
        *_whole(manifest, job, verified),
        *(state_findings(looked.states, manifest.dtype) if looked.states else ()),
        *sample_findings(figures, dropped, manifest.data.rows),
        *codec_findings(looked.trials, manifest.target_layer_ids),
        *job_findings(job),
    ]
    return Report(
        cache=opened.where,
        state=manifest.state,
        fingerprint=manifest.fingerprint,
        target=manifest.target.name,
        model_type=manifest.target.model_type,
        target_layer_ids=manifest.target_layer_ids,
        num_hidden_layers=manifest.target.num_hidden_layers,
        hidden_size=manifest.hidden_size,
        dtype=manifest.dtype,
        codec=manifest.codec["name"],
        data=manifest.data.name,
        rows=manifest.data.rows,
        command=manifest.command.shell() if manifest.command else "",
        identity=manifest.identity,
        findings=sorted(findings, key=lambda one: ("wrong", "look", "note").index(one.level)),
        samples=figures,
        dropped=dropped,
        states=looked.states,
        looked_at_shards=looked.shards,
        codecs=_codec_sizes(manifest, looked.trials),
        codecs_tried_on=looked.tried_on,
        job=job,
        verified=verified,
        runs=given.runs,
        browsed=browsed,
        no_text=no_text,
    )


def _require_possible(cache: OpenCache) -> None:
    """An index of samples that can be; what its rows say of shards is compared when these are opened.

    Raises:
        CacheError: a length below 1, more learned tokens than tokens, or a shard that does not exist.
    """
    index, totals = cache.index, cache.manifest.totals
    assert totals is not None
    possible = (index.num_tokens >= 1) & (index.num_loss_tokens >= 0) & (index.num_loss_tokens <= index.num_tokens)
    possible &= (index.shard >= 0) & (index.shard < totals.shards)
    if not possible.all():
        problem = f"row {int(np.argmin(possible))} cannot be: `dflash-cache verify` says more"
        raise CacheError(f"{cache.where}/{INDEX_NAME}", problem)


def fingerprint_of(where: Path | str) -> str:
    """Of the cache's manifest.

    Raises:
        CacheError: not a cache, or its manifest is damaged.
    """
    folder = open_folder(where)
    folder.local(MANIFEST_NAME)
    return Manifest.read(folder.path).fingerprint


def to_dict(report: Report) -> dict[str, Any]:
    """For ``--json``: the figures; of the samples to browse only which they are."""
    content = asdict(report)
    content["browsed"] = [row.sample_id for row in report.browsed]
    return content


# -- states -----------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _Looked:
    """What looking at samples gave."""

    states: StateFigures | None
    shards: list[int]
    trials: list[CodecTrial]
    tried_on: int
    findings: list[Finding]
    unreadable: set[int]
    """shards"""


def _look(cache: FeatureCache, chosen: np.ndarray) -> _Looked:
    """At states of samples; a damaged shard is noted and passed over."""
    manifest = cache.manifest
    states = States(manifest.torch_dtype, len(manifest.target_layer_ids), manifest.hidden_size)
    summing = Summing(manifest.target_layer_ids, manifest.hidden_size)
    shards: set[int] = set()
    unreadable: dict[int, str] = {}
    tried: list[Tensor] = []
    tried_room = MOST_BYTES if codec_from_dict(manifest.codec).lossless else 0
    with Reporter("report", len(chosen), "samples") as reporter:
        for done, read in enumerate(read_states(cache, chosen), 1):
            if read.rows is None:
                unreadable[read.shard] = read.problem
                continue
            summing.add(SampleStates(read.sample_id, read.places, read.rows.unflatten(1, (states.layers, -1))))
            shards.add(read.shard)
            if tried_room > 0:
                tried.append(read.rows)
                tried_room -= read.rows.numel() * read.rows.itemsize
            reporter.update(done)
    return _Looked(
        states=summing.figures() if summing.samples else None,
        shards=sorted(shards),
        trials=try_codecs(torch.cat(tried), states) if tried else [],
        tried_on=sum(map(len, tried)),
        findings=[Finding(level="wrong", text=f"cannot be read: {why}") for why in unreadable.values()],
        unreadable=set(unreadable),
    )


def _codec_sizes(manifest: Manifest, trials: Sequence[CodecTrial]) -> list[CodecSize]:
    """Of codecs that were tried; of a lossy cache its own, as it was measured."""
    assert manifest.totals is not None
    raw = States(manifest.torch_dtype, len(manifest.target_layer_ids), manifest.hidden_size).row_bytes
    used = manifest.codec["name"]
    if not trials:
        codec, known = codec_from_dict(manifest.codec), manifest.measured
        ratio = known.ratio if known else codec.expected_ratio
        # Earlier caches have the mean over all tokens alone.
        snr_db, worst_db = (known.median_snr_db or known.snr_db, known.worst_snr_db) if known else ([], [])
        trials = [CodecTrial(codec=used, ratio=ratio, snr_db=snr_db, worst_db=worst_db)]
    return [
        CodecSize(
            codec=trial.codec,
            is_used=trial.codec == used,
            token_bytes=trial.ratio * raw,
            total_bytes=trial.ratio * raw * manifest.totals.tokens,
            snr_db=trial.snr_db,
            worst_db=trial.worst_db,
        )
        for trial in trials
    ]


# -- rows -------------------------------------------------------------------------------------------------------------


Part = tuple[PartInfo, np.ndarray]


def _rows_of(cache: OpenCache, wanted: set[int], data: DataInfo) -> tuple[dict[int, str], list[Part]]:
    """sample_id -> place of its row, for those wanted; and parts that dropped something, as far as they were read."""
    sources: dict[int, str] = {}
    dropping: list[Part] = []
    first = 0
    with suppress(CacheError, StorageError):
        for info, batch in _parts(cache):
            rows = batch.column("source_row").to_numpy()
            for sample_id in [one for one in wanted if first <= one < first + len(rows)]:
                sources[sample_id] = place(data, int(rows[sample_id - first]))
            if sum(info.dropped.values()) and len(dropping) < 256:
                dropping.append((info, rows.copy()))
            first += len(rows)
    return sources, dropping


def _parts(cache: OpenCache) -> Iterator[tuple[PartInfo, pa.RecordBatch]]:
    assert cache.manifest.totals is not None
    most = None if isinstance(cache.folder, LocalFolder) else MOST_PARTS_AT_URL
    for number in islice(range(cache.manifest.totals.parts), most):
        batch, info = read_part(cache.folder.local(part_path(Path("samples"), number).as_posix()))
        yield info, batch


def _tokenizer(cache: FeatureCache) -> tuple[Any, str]:
    try:
        return stored_tokenizer(cache), ""
    except DFlashCacheError as error:
        return None, str(error)


def _browsed(
    cache: OpenCache, tokenizer: Any, samples: Sequence[int], sources: dict[int, str], looked: _Looked
) -> list[BrowsedRow]:
    readable = [i for i in samples if int(cache.index.shard[i]) not in looked.unreadable]
    with Reporter("report", len(readable), "texts") as reporter:
        done = iter(range(1, len(readable) + 1))
        try:
            return browse(cache, tokenizer, readable, sources, lambda: reporter.update(next(done)))
        except (CacheError, StorageError) as error:
            looked.findings.append(Finding(level="wrong", text=f"cannot be read: {error}"))
            return []


# -- job --------------------------------------------------------------------------------------------------------------


def _job_figures(cache: OpenCache) -> JobFigures:
    manifest, index = cache.manifest, cache.index
    assert manifest.totals is not None
    finished = [n for n in finished_shards(cache.folder.names("shards")) if n < manifest.totals.shards]
    sizes = np.asarray([cache.folder.size(shard_name(number)) or 0 for number in finished], np.int64)
    times, why = _commit_times(cache, finished)
    over_time = None if times is None else throughput(times, tokens_of(index, finished))
    edges, counts = size_histogram(sizes)
    batch_tokens = manifest.identity.get("batch_tokens")
    return JobFigures(
        shards=len(finished),
        planned_shards=manifest.totals.shards,
        bytes=int(sizes.sum()),
        size_edges=edges,
        sizes=counts,
        padding=padding(index, batch_tokens) if isinstance(batch_tokens, int) and len(index) else None,
        throughput=over_time,
        why_no_throughput=why or ("" if over_time else f"too few shards ({len(finished):,}), or all of one moment"),
        created_with=manifest.created_with,
    )


def _commit_times(cache: OpenCache, shards: Sequence[int]) -> tuple[np.ndarray | None, str]:
    names = [shard_name(number) for number in shards]
    if isinstance(cache.folder, LocalFolder):
        return np.asarray([cache.folder.local(name).stat().st_mtime for name in names]), ""
    assert isinstance(cache.folder, StoreFolder)
    times = cache.folder.store.times()
    if not set(names) <= set(times):
        return None, "the store does not say when files were uploaded"
    return np.asarray([times[name] for name in names]), ""


def _verified(where: Path | str, cache: OpenCache, shards: int) -> Verified | None:
    """A quick verification, unless that takes long."""
    if not isinstance(cache.folder, LocalFolder) and shards > MOST_SHARDS_AT_URL:
        return None
    say("report: a quick check of the manifest, tables and shard headers")
    found = verify(where, quick=True)
    return Verified(
        cache=found.cache,
        depth=found.depth,
        whole=found.whole,
        shards=found.shards,
        of_shards=found.of_shards,
        samples=found.samples,
        problems=[str(problem) for problem in found.problems[:20]],
        num_problems=len(found.problems),
        now=True,
    )


def _whole(manifest: Manifest, job: JobFigures, verified: Verified | None) -> Iterator[Finding]:
    if manifest.state != "complete":
        yield Finding(
            level="wrong",
            text=f"unfinished: {job.shards:,} of {job.planned_shards:,} shards; all figures are of what is there",
        )
    elif verified is None:
        yield Finding(level="look", text="not verified: `dflash-cache verify` reads every byte")
    elif verified.shards < verified.of_shards:
        part = f"{verified.shards:,} of {verified.of_shards:,} shards"
        yield Finding(level="look", text=f"verified in part: {part}")
    unfinished = manifest.state != "complete" and verified is not None and verified.num_problems == 1
    if verified is not None and not verified.whole and not unfinished:
        yield Finding(
            level="wrong", text=f"verify found {verified.num_problems:,} problems, the first: {verified.problems[0]}"
        )
