"""estimate: bytes, shards and tokens of a cache, from the data and the target's config; no weights are loaded."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cache_format.codecs import CODECS, BlockCodec, States, codec_named
from cache_format.codecs.dtypes import torch_dtype
from cache_format.errors import InputError
from cache_format.layout.samples import BadRows, Dropped
from cache_format.layout.shard_layout import ShardSchema, capture_tensors
from extractor.config import DEFAULT_BATCH_TOKENS, ExtractOptions
from extractor.data.dataset import open_source
from extractor.data.prepare import prepare_rows
from extractor.job.estimate_time import TimeEstimate, described, measured_rate, require_rate, time_estimate
from extractor.job.plan import Plan
from extractor.job.report import bad_row_notes, dropped_note
from extractor.job.run_shards import NUM_BUFFERS
from extractor.target.layer_ids import chosen_layer_ids
from extractor.target.load_target import TargetShape, load_config, load_tokenizer, resolve_device
from extractor.target.quantised import run_dtype
from extractor.terminal.progress import Reporter, say, size

MAX_ROWS = 10_000
"""Rows tokenised at most; more are estimated from this many, spread evenly."""

ROWS_AT_ONCE = 500


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a cache will hold. Exact where ``rows_read`` is all rows; else means over the rows read, scaled up."""

    rows: int | None
    """rows of the dataset; None where it is streamed and its length unknown"""
    rows_read: int
    samples: int
    tokens: int
    loss_tokens: int
    dropped: dict[str, int]
    """reason -> rows, among those read"""
    bad_rows: dict[str, BadRows]
    relative_error: float
    """95 % of the time the true number of tokens is within this fraction; 0 where exact"""
    target_layer_ids: list[int]
    token_bytes: int
    capture_bytes: int
    """of these, for --capture"""
    shards: int
    codec: str
    shard_bytes: int
    """with that codec"""
    codec_bytes: dict[str, int]
    """with each codec; zbits and quant depend on the states, so this is what bfloat16 ones usually take"""
    padding: float
    """share of computed tokens that is padding"""
    free_bytes: int
    host_bytes: int = 0
    """of memory that shards take on the host while they are made, beside the target's own and Python's"""
    time: TimeEstimate | None = None
    """None where no rate is known"""

    @property
    def fits(self) -> bool:
        """Whether the shards fit on the disk as it is now."""
        return self.shard_bytes <= self.free_bytes


def estimate(options: ExtractOptions, *, tokens_per_second: float | None = None, calibrate: bool = False) -> Estimate:
    """Tokenise up to 10,000 rows and work out what ``extract`` with the same options would write.

    How long that takes, too, at ``tokens_per_second``, or with ``calibrate`` at what the target, which is loaded for
    it, does on a few of its batches.

    Raises:
        InputError: bad data, target or options, as for ``extract``.
    """
    require_rate(tokens_per_second, calibrate)
    target = options.target
    config = load_config(target.name, target.revision, target.trust_remote_code)
    shape = TargetShape.from_config(config)
    layer_ids = chosen_layer_ids(target, shape.num_hidden_layers)
    dtype = run_dtype(target, config, resolve_device(target.device))
    tokenizer = load_tokenizer(target.name, target.revision, target.trust_remote_code, target.chat_template)
    source = open_source(options.data, options.prepare.limit)
    for note in filter(None, (one.note for one in source.sources)):
        say(note)

    prepare = replace(options.prepare, num_embeddings=shape.vocab_size)
    lengths: list[int] = []
    ids: list[np.ndarray] = []
    per_row: list[int] = []
    dropped = Dropped()
    loss_tokens = read = 0
    spans = _spans(source.num_rows)
    with Reporter("estimate", sum(stop - start for start, stop in spans), "rows") as reporter:
        for start, stop in spans:
            some = source.read(start, stop)
            samples, why = prepare_rows(some, tokenizer, prepare)
            lengths += [len(sample.input_ids) for sample in samples]
            ids += [sample.input_ids for sample in samples] if calibrate else []
            loss_tokens += sum(int(sample.loss_mask.sum()) for sample in samples)
            dropped.add(why)
            read += len(some)
            tokens = Counter[int]()
            for sample in samples:
                tokens[sample.source_row] += len(sample.input_ids)
            per_row += [*tokens.values(), *[0] * (len(some) - len(tokens))]
            reporter.update(read)
            if len(some) < stop - start:
                break
    if not lengths:
        why_none = "; ".join([dropped_note(dropped), *bad_row_notes(dropped.bad_rows)])
        raise InputError(f"{source.name}: none of the {read:,} rows read gives a sample; dropped: {why_none}")
    rows = source.num_rows if source.num_rows is not None else (read if read < MAX_ROWS else None)
    scale = 1.0 if rows is None else rows / read
    schema = ShardSchema(
        fingerprint="0" * 64,
        codec=codec_named(options.codec),
        states=States(torch_dtype(dtype), len(layer_ids), shape.hidden_size),
        captures=capture_tensors(options.capture, torch_dtype(dtype), shape.hidden_size),
        token_snr=True,
    )
    # Which samples share a batch does not change the sizes.
    plan_options = replace(options.plan, batch_tokens=options.plan.batch_tokens or DEFAULT_BATCH_TOKENS)
    plan = Plan(np.resize(np.asarray(lengths), round(len(lengths) * scale)), schema.raw.token_bytes, plan_options)
    names = dict.fromkeys([*CODECS, "quant:fine", options.codec])
    codec_bytes = {name: int(plan.shard_bytes(replace(schema, codec=codec_named(name))).sum()) for name in names}
    exact = rows is not None and read >= rows
    num_tokens = round(sum(lengths) * scale)
    rate = measured_rate(options, dtype, layer_ids, ids, plan) if calibrate else tokens_per_second
    seconds = None
    if rate is not None:
        written, devices = codec_bytes[options.codec], target.devices
        seconds = time_estimate(rate, num_tokens, written, devices=devices, measured=calibrate)
    return Estimate(
        rows=rows,
        rows_read=read,
        samples=round(len(lengths) * scale),
        tokens=num_tokens,
        loss_tokens=round(loss_tokens * scale),
        dropped=dict(dropped),
        bad_rows=dropped.bad_rows,
        relative_error=0.0 if exact else float(1.96 * np.std(per_row) / math.sqrt(read) / np.mean(per_row)),
        target_layer_ids=layer_ids,
        token_bytes=codec_bytes[options.codec] // max(num_tokens, 1),
        capture_bytes=sum(tensor.row_bytes for tensor in schema.captures),
        shards=len(plan),
        codec=options.codec,
        shard_bytes=codec_bytes[options.codec],
        codec_bytes=codec_bytes,
        padding=_padding(plan),
        free_bytes=shutil.disk_usage(_existing(options.out)).free,
        host_bytes=_buffers(schema, len(plan)) * int(plan.shard_bytes(schema.raw).max()),
        time=seconds,
    )


def describe(result: Estimate) -> str:
    """``result`` for a person."""
    about = "" if result.relative_error == 0 else f" (+- {100 * result.relative_error:.1f} %, 95 % of the time)"
    rows = f"{result.rows:,}" if result.rows is not None else "unknown (streamed)"
    captures = f", {result.capture_bytes:,} B of them for --capture" if result.capture_bytes else ""
    lines = [
        ("rows", f"{rows}; {result.rows_read:,} read, dropped of these: {dropped_note(result.dropped)}"),
        *(("bad rows", note) for note in bad_row_notes(result.bad_rows)),
        ("target_layer_ids", ", ".join(map(str, result.target_layer_ids))),
        ("samples", f"{result.samples:,}"),
        ("tokens", f"{result.tokens:,}{about}; {result.loss_tokens:,} learned"),
        ("shards", f"{result.shards:,}"),
        (
            "size of shards",
            f"{size(result.shard_bytes)} with codec {result.codec} ({result.token_bytes:,} B a token{captures})",
        ),
        *_by_codec(result),
        ("padding", f"{100 * result.padding:.1f} % of the tokens computed; none of it is stored"),
        ("free on the disk", size(result.free_bytes)),
        (
            "memory",
            f"{size(result.host_bytes)} of the host for shards being made, beside target and Python",
        ),
        *(described(result.time) if result.time else ()),
    ]
    if result.rows is None:
        lines.append(
            ("note", f"the length of a stream is unknown: these are the figures of its first {result.rows_read:,} rows")
        )
    if not result.fits:
        lines.append(("WARNING", f"too big for the disk by {size(result.shard_bytes - result.free_bytes)}"))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def _by_codec(result: Estimate) -> list[tuple[str, str]]:
    """What each other codec would save of what is raw, or cost."""
    raw, lines = result.codec_bytes["raw"], []
    for name, num_bytes in result.codec_bytes.items():
        if name != result.codec:
            saved = f", saves {100 * (1 - num_bytes / raw):.0f} %" if name != "raw" else ""
            lines.append((f"--codec {name}", f"{_about(name)}{size(num_bytes)}{saved}"))
    return lines


def _buffers(schema: ShardSchema, shards: int) -> int:
    """Of a whole shard, in each worker; see run_shards.py."""
    return min(NUM_BUFFERS, shards) + (NUM_BUFFERS - 1 if schema.has_blocks else 0)


def _about(codec: str) -> str:
    return "about " if isinstance(codec_named(codec), BlockCodec) else ""


def _spans(num_rows: int | None) -> list[tuple[int, int]]:
    """Runs of rows to read: all of them, or runs spread evenly, or the first ones of a stream."""
    wanted = MAX_ROWS if num_rows is None else min(MAX_ROWS, num_rows)
    count = math.ceil(wanted / ROWS_AT_ONCE)
    if num_rows is None or num_rows <= MAX_ROWS:
        return [(i * ROWS_AT_ONCE, min((i + 1) * ROWS_AT_ONCE, wanted)) for i in range(count)]
    return [(at, at + ROWS_AT_ONCE) for at in np.linspace(0, num_rows - ROWS_AT_ONCE, count).astype(int).tolist()]


def _padding(plan: Plan) -> float:
    shards = [plan.shard(number) for number in np.unique(np.linspace(0, len(plan) - 1, 200).astype(int)).tolist()]
    return 1 - sum(shard.tokens for shard in shards) / sum(shard.padded_tokens for shard in shards)


def _existing(path: Path) -> Path:
    """``path`` or its nearest parent that exists."""
    path = path.absolute()
    return path if path.exists() else _existing(path.parent)
