"""preview: rows as extract would store them, without the target's weights; and what becomes of the first thousand."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from cache_format.errors import InputError
from cache_format.layout.samples import Dropped
from extractor.config import ExtractOptions, PrepareOptions
from extractor.data.bad_row import BadRow, LeftOut
from extractor.data.dataset import RawRow, Rows, RowSource, open_source
from extractor.data.prepare import encoder, reason_to_drop, require_forms
from extractor.data.stretches import stretches
from extractor.job.report import bad_row_notes, dropped_note, noted_notes
from extractor.job.sources import reading_note
from extractor.target.load_target import TargetShape, load_config, load_tokenizer
from extractor.terminal.learned_text import Stretch, faint, painted, printable, rule

ROWS_COUNTED = 1000
SECONDS_COUNTING = 60.0
"""The counts are of fewer rows where these take longer."""

_LONGEST_STRETCH, _LONGEST_ROW, _CUT_OFF_SHOWN = 2000, 1000, 40
"""Characters shown of a stretch and of a bad row, and tokens of what is cut off, where several rows are shown."""
_PLACE = re.compile(r"(?:(?P<file>.+?)(?::| row ))?(?P<number>\d+)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class PreviewedSample:
    """One sample of a row."""

    input_ids: np.ndarray
    """int32 ``[T]``, whole"""
    loss_mask: np.ndarray
    """uint8 ``[T]``, whole"""
    stored: int
    """tokens that are stored; the others are cut off"""
    dropped: str | None
    """why it is not stored at all"""

    @property
    def learned(self) -> int:
        """Learned tokens among those that are stored."""
        return int(self.loss_mask[: self.stored].sum())

    @property
    def cut_off_learned(self) -> int:
        """Learned tokens that are cut off."""
        return int(self.loss_mask[self.stored :].sum())


@dataclass(frozen=True, kw_only=True)
class PreviewedRow:
    """One row of the data and what becomes of it."""

    place: str
    """file and row in it: ``train.jsonl row 17``"""
    raw: RawRow | None
    samples: list[PreviewedSample]
    dropped: str | None = None
    """why it gives no sample: ``empty``, ``bad_row`` or another reason that rows are counted under"""
    problem: str = ""
    """of a bad row, or one that says itself that it is not to be learned: why, in words"""
    reason: str = ""
    """of a bad row: the class of the problem"""
    notes: Sequence[str] = ()
    """what the row has and its samples have not, as :class:`~cache_format.layout.samples.Dropped` counts it"""


@dataclass(kw_only=True)
class Counts:
    """What becomes of the first rows."""

    rows: int = 0
    samples: int = 0
    tokens: int = 0
    loss_tokens: int = 0
    cut_samples: int = 0
    cut_tokens: int = 0
    cut_loss_tokens: int = 0
    dropped: Dropped = field(default_factory=Dropped)
    longest: int = 0
    """tokens of the longest sample, before it is cut or dropped"""

    def add(self, row: PreviewedRow) -> None:
        """Count one more row."""
        self.rows += 1
        self.dropped.noted.update(row.notes)
        if row.dropped == "bad_row":
            self.dropped.count_bad_row(row.reason, row.place)
        elif row.dropped:
            self.dropped[row.dropped] += 1
        for sample in row.samples:
            self.longest = max(self.longest, len(sample.input_ids))
            if sample.dropped:
                self.dropped[sample.dropped] += 1
                continue
            self.samples += 1
            self.tokens += sample.stored
            self.loss_tokens += sample.learned
            self.cut_samples += sample.stored < len(sample.input_ids)
            self.cut_tokens += len(sample.input_ids) - sample.stored
            self.cut_loss_tokens += sample.cut_off_learned


class Preview:
    """The data, opened and compared with tokenizer and options; nothing is written."""

    def __init__(self, options: ExtractOptions):
        """
        Raises:
            InputError: bad data, tokenizer or options, as for ``extract``.
        """
        target = options.target
        config = load_config(target.name, target.revision, target.trust_remote_code)
        self.options = replace(options.prepare, num_embeddings=TargetShape.from_config(config).vocab_size)
        self.tokenizer = load_tokenizer(target.name, target.revision, target.trust_remote_code, target.chat_template)
        self.source = open_source(options.data, options.prepare.limit)
        self.forms = require_forms(self.source, self.tokenizer, self.options)

    def first(self, count: int) -> Iterator[PreviewedRow]:
        """The first ``count`` rows."""
        rows = self.source.read(0, count)
        return (self._row(rows, at) for at in range(len(rows)))

    def at(self, place: str) -> PreviewedRow:
        """The row at ``place``: ``17`` (counted from 1 through all files), ``b.jsonl:17`` or ``b.jsonl row 17``.

        Raises:
            InputError: there is no such row.
        """
        number = _number_of(place, self.source)
        rows = self.source.read(number, number + 1)
        if not rows:
            how_many = "fewer" if self.source.num_rows is None else f"{self.source.num_rows:,}"
            raise InputError(f"--row {place}: {self.source.name} has {how_many} rows")
        return self._row(rows, 0)

    def counts(self) -> Counts:
        """Of the first thousand rows, or as many as are done in a minute."""
        counts, began = Counts(), time.monotonic()
        for row in self.first(ROWS_COUNTED):
            counts.add(row)
            if time.monotonic() - began > SECONDS_COUNTING:
                break
        return counts

    def text(self, sample: PreviewedSample, most: int | None = None) -> tuple[list[Stretch], list[Stretch]]:
        """As text: what is stored of a sample, and what is cut off, of which at most ``most`` tokens."""
        ids, mask, stored = sample.input_ids, sample.loss_mask, sample.stored
        stop = None if most is None else stored + most
        return stretches(self.tokenizer, ids, mask, 0, stored), stretches(self.tokenizer, ids, mask, stored, stop)

    def _row(self, rows: Rows, at: int) -> PreviewedRow:
        place, raw = rows.where(rows.first + at), rows.raw[at]
        try:
            encoded = encoder(self.tokenizer, self.options, rows.columns_of(rows.first + at))(raw)
        except LeftOut as why:
            return PreviewedRow(place=place, raw=raw, samples=[], dropped=why.reason, problem=str(why))
        except BadRow as problem:
            return PreviewedRow(
                place=place, raw=raw, samples=[], dropped="bad_row", problem=str(problem), reason=problem.reason
            )
        samples = [self._sample(ids, mask) for ids, mask in encoded]
        return PreviewedRow(
            place=place, raw=raw, samples=samples, dropped=None if samples else "empty", notes=encoded.notes
        )

    def _sample(self, ids: np.ndarray, mask: np.ndarray) -> PreviewedSample:
        dropped = reason_to_drop(ids, mask, self.options)
        stored = len(ids) if dropped == "too_long" else min(len(ids), self.options.max_length)
        return PreviewedSample(input_ids=ids, loss_mask=mask, stored=stored, dropped=dropped)


def _number_of(place: str, source: RowSource) -> int:
    """The row's number in the data, counted from 0."""
    match = _PLACE.fullmatch(place.strip())
    if match is None or int(match["number"]) < 1:
        raise InputError(f"--row {place}: write a number from 1, or FILE:NUMBER such as train.jsonl:17")
    number = int(match["number"]) - 1
    if match["file"] is None:
        return number
    places = source.read(0, 1).places
    starts = {label: first for first, label in places}
    if match["file"] not in starts:
        raise InputError(f"--row {place}: no file of that name in the data; it has {', '.join(starts)}")
    first = starts[match["file"]]
    stop = min((start for start in starts.values() if start > first), default=None)
    if stop is not None and first + number >= stop:
        raise InputError(f"--row {place}: {match['file']} has {stop - first:,} rows")
    return first + number


# -- for a person -----------------------------------------------------------------------------------------------------


def describe_row(preview: Preview, row: PreviewedRow, colour: bool, *, whole: bool) -> str:
    """A row for a person; ``whole``: nothing is left out."""
    if row.dropped == "bad_row":
        counts_as = [] if row.problem == row.reason else [f"counts as: {row.reason}"]
        why = printable("\n".join([row.problem, *counts_as]))
        return "\n".join([rule(f"{row.place}: bad row", colour), why, faint(_raw(row.raw, whole), colour)])
    if row.dropped:
        lines = [rule(f"{row.place}: dropped: {row.dropped}", colour), printable(row.problem)]
        return "\n".join(filter(None, [*lines, faint(_raw(row.raw, whole), colour)]))
    shown = []
    for number, sample in enumerate(row.samples, 1):
        which = f", sample {number} of {len(row.samples)}" if len(row.samples) > 1 else ""
        shown.append(rule(f"{row.place}{which}: {_figures(sample, preview.options)}", colour))
        stored, cut_off = preview.text(sample, None if whole else _CUT_OFF_SHOWN)
        shown.append(painted(stored, colour, None if whole else _LONGEST_STRETCH).rstrip("\n"))
        if cut_off:
            more = f"{len(sample.input_ids) - sample.stored:,} more tokens, {sample.cut_off_learned:,} of them learned"
            shown.append(rule(f"cut here (--max-length {preview.options.max_length}): {more}", colour))
            goes_on = " ..." if sample.stored + _CUT_OFF_SHOWN < len(sample.input_ids) and not whole else ""
            shown.append(faint(painted(cut_off, False).rstrip("\n") + goes_on, colour))
    return "\n".join(shown)


def _figures(sample: PreviewedSample, options: PrepareOptions) -> str:
    tokens, share = len(sample.input_ids), 100 * sample.learned / max(sample.stored, 1)
    cut = f", cut to {sample.stored:,}" if sample.stored < tokens else ""
    figures = f"{tokens:,} tokens{cut}, {sample.learned:,} learned ({share:.0f} %)"
    return f"dropped: {sample.dropped}, {figures}" if sample.dropped else figures


def describe_counts(counts: Counts, preview: Preview) -> str:
    """``counts`` for a person."""
    share = 100 * counts.loss_tokens / max(counts.tokens, 1)
    lines = [
        *(
            f"{source.name}: {reading_note(form.row_format, form.columns, form.unused(columns))}"
            for source, form, columns in zip(
                preview.source.sources, preview.forms, preview.source.column_sets, strict=True
            )
        ),
        f"first {counts.rows:,} rows of {preview.source.name}: {counts.samples:,} samples",
        f"tokens: {counts.tokens:,}, {counts.loss_tokens:,} learned ({share:.0f} %); longest sample {counts.longest:,}",
        f"dropped rows: {dropped_note(counts.dropped)}",
        *(f"bad rows: {note}" for note in bad_row_notes(counts.dropped.bad_rows)),
        *noted_notes(counts.dropped.noted),
    ]
    if counts.cut_samples:
        lines.append(
            f"cut to --max-length {preview.options.max_length}: {counts.cut_samples:,} samples; "
            f"{counts.cut_tokens:,} tokens are cut off, {counts.cut_loss_tokens:,} of them learned"
        )
    if counts.dropped["bad_row"] and preview.options.on_bad_row == "fail":
        lines.append("extract stops at the first bad row; --on-bad-row skip leaves such rows out")
    return printable("\n".join(lines))


def _raw(row: RawRow | None, whole: bool) -> str:
    if row is None:
        return ""
    if isinstance(row, bytes):
        text = row.decode(errors="backslashreplace").strip()
    else:
        try:
            text = json.dumps(row, ensure_ascii=False, default=str)
        except (RecursionError, ValueError):
            text = "(nested too deep to be shown)"
    return _start(text, None if whole else _LONGEST_ROW)


def _start(text: str, most: int | None) -> str:
    return printable(text if most is None or len(text) <= most else f"{text[:most]} ...")


# -- for a program ----------------------------------------------------------------------------------------------------


def row_to_dict(preview: Preview, row: PreviewedRow) -> dict[str, Any]:
    """A row for ``--json``."""
    return {
        "row": row.place,
        "dropped": row.dropped,
        "problem": row.problem,
        "reason": row.reason,
        "samples": [
            {
                "tokens": len(sample.input_ids),
                "stored": 0 if sample.dropped else sample.stored,
                "learned": sample.learned,
                "cut_off_learned": sample.cut_off_learned,
                "dropped": sample.dropped,
                "text": [asdict(stretch) for stretch in preview.text(sample, 0)[0]],
                "input_ids": sample.input_ids[: sample.stored].tolist(),
                "loss_mask": sample.loss_mask[: sample.stored].tolist(),
            }
            for sample in row.samples
        ],
    }


def counts_to_dict(counts: Counts) -> dict[str, Any]:
    """``counts`` for ``--json``."""
    numbers = {name: value for name, value in vars(counts).items() if name != "dropped"}
    bad_rows = {reason: asdict(found) for reason, found in counts.dropped.bad_rows.items()}
    return {**numbers, "dropped": dict(counts.dropped), "bad_rows": bad_rows}
