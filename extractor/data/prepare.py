"""Rows -> tokenised samples -> ``samples/``: filtered, counted, and committed part by part, in several processes.

A part comes from ``ROWS_PER_PART`` consecutive rows and depends on them alone: finished parts are kept by a restart,
and any number of processes, of any number of workers (see ``division.py``), writes the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
from transformers import AutoTokenizer

from cache_format.errors import CacheError, InputError
from cache_format.layout.samples import Dropped, PartInfo, Sample, part_path, read_part, write_part
from cache_format.storage.commit import make_folder
from extractor.config import PrepareOptions
from extractor.data.bad_row import BadRow, LeftOut, guarded
from extractor.data.chat_template import ChatTemplate
from extractor.data.column_paths import paths_among, with_paths
from extractor.data.conversation import Conversation, check_text, conversation_of, text_of
from extractor.data.dataset import RawRow, Rows, RowSource, parse_row
from extractor.data.division import ALL, Division
from extractor.data.forms import FORMATS, Form, form_of, named_for
from extractor.data.loss_mask import ConversationTokenizer, Encoded, Ids
from extractor.data.process_pool import results
from extractor.data.token_row import ids_of

ROWS_PER_PART = 4096
ROWS_WORTH_A_PROCESS = 4 * ROWS_PER_PART
"""A process takes seconds to start (imports, tokenizer); fewer rows are done sooner without it."""


def prepare_rows(rows: Rows, tokenizer: Any, options: PrepareOptions) -> tuple[list[Sample], Dropped]:
    """Samples of ``rows`` in their order, and how many rows were dropped for which reason.

    The reasons are ``empty``, ``too_long``, ``too_few_loss_tokens``, ``bad_row`` and those of LeftOut; bad rows are
    counted by what is wrong with them, too. Every row gives a sample or counts as dropped. Deterministic.

    Raises:
        InputError: options, columns and tokenizer do not fit, or (``on_bad_row="fail"``) a bad row, by file and row.
    """
    samples: list[Sample] = []
    dropped = Dropped()
    for number, raw in enumerate(rows.raw, rows.first):
        try:
            encoded = encoder(tokenizer, options, rows.columns_of(number))(raw)
        except LeftOut as why:
            dropped[why.reason] += 1
            continue
        except BadRow as problem:
            if options.on_bad_row == "fail":
                raise InputError(
                    f"{rows.where(number)}: {problem}. Mend the row, or leave such rows out with --on-bad-row skip"
                ) from problem
            dropped.count_bad_row(problem.reason, rows.where(number))
            continue
        dropped.noted.update(encoded.notes)
        if not encoded:
            dropped["empty"] += 1
        for ids, mask in encoded:
            reason = reason_to_drop(ids, mask, options)
            if reason:
                dropped[reason] += 1
            else:
                samples.append(Sample(ids[: options.max_length], mask[: options.max_length], number))
    return samples, dropped


def reason_to_drop(ids: np.ndarray, mask: np.ndarray, options: PrepareOptions) -> str | None:
    """Why a sample is left out: ``empty``, ``too_long`` or ``too_few_loss_tokens``; None: it is kept."""
    if not len(ids):
        return "empty"
    if len(ids) > options.max_length and options.too_long == "drop":
        return "too_long"
    learned = int(mask[: options.max_length].sum())
    return "too_few_loss_tokens" if learned < options.min_loss_tokens else None


def require_forms(source: RowSource, tokenizer: Any, options: PrepareOptions) -> list[Form]:
    """The form of each source, once all of them are known to fit options and tokenizer.

    Raises:
        InputError: one does not, or ``--columns`` names columns that none has.
    """
    for named, columns in zip(source.sources, source.column_sets, strict=True):
        try:
            encoder(tokenizer, options, columns)
        except InputError as error:
            raise InputError(f"{named.name}: {error}") from error
    forms = [form_of_source(columns, options) for columns in source.column_sets]
    wanted = [column for _, column in options.columns]
    if wanted and not any(set(wanted) <= set(form.columns.values()) for form in forms):
        found = "; ".join(", ".join(columns) for columns in source.column_sets)
        raise InputError(f"--columns names {' and '.join(wanted)}, which the data does not have; found: {found}")
    return forms


def form_of_source(columns: tuple[str, ...], options: PrepareOptions) -> Form:
    """The form of the rows of a source with these columns."""
    columns = (*columns, *_paths(columns, options))
    return form_of(columns, options.row_format, named_for(columns, dict(options.columns)))


def _paths(columns: tuple[str, ...], options: PrepareOptions) -> tuple[str, ...]:
    return paths_among((column for _, column in options.columns), columns)


@lru_cache(maxsize=64)
def encoder(tokenizer: Any, options: PrepareOptions, columns: tuple[str, ...]) -> Callable[[RawRow | None], Encoded]:
    """The function from a raw row to the ids and masks of its samples; kept for the next rows with the same arguments.

    They are whole: not cut to ``max_length``. The function raises BadRow, whatever is wrong with a row, and LeftOut.

    Raises:
        InputError: options, columns and tokenizer do not fit.
    """
    form = form_of_source(columns, options)
    loss_on = _loss_on(form, options.loss_on, columns)
    parsed = partial(_parsed, tokenizer, options.num_embeddings, _paths(columns, options))
    if form.row_format == "input_ids":
        return parsed(lambda row: [ids_of(form.renamed(row), len(tokenizer), loss_on, tokenizer.pad_token_id)])
    if form.row_format == "text":
        return parsed(lambda row: [_all_learned(_token_ids(tokenizer, text_of(row, form.column("text"))))])
    if "response" in FORMATS[form.row_format] and not tokenizer.chat_template:
        if tokenizer.eos_token_id is None:
            raise InputError("the tokenizer has neither a chat template nor an eos token to end a response with")
        return parsed(lambda row: [_prompt_response(tokenizer, conversation_of(row, form), loss_on)])
    to_samples = ConversationTokenizer(
        ChatTemplate(tokenizer, kwargs=options.template_kwargs, today=options.today),
        assistant_only=loss_on == "assistant",
        turns=options.turns,
        system_prompt=options.system_prompt,
    )

    def chosen_side(row: dict[str, Any]) -> Encoded:
        encoded = to_samples(conversation_of(row, form))
        if form.get(row, "rejected") is not None:
            encoded.notes.append("rejected_side")
        return encoded

    return parsed(chosen_side)


def _parsed(
    tokenizer: Any, num_embeddings: int | None, paths: tuple[str, ...], encode: Callable[[dict[str, Any]], list[Ids]]
) -> Callable[[RawRow | None], Encoded]:
    def encode_raw(raw: RawRow | None) -> Encoded:
        if raw is None:
            raise LeftOut("is left out by its source's weight", "by_weight")
        with guarded():
            row = parse_row(raw)
            encoded = encode(with_paths(row, paths)) if row is not None else []
            for ids, _ in encoded:
                if num_embeddings is not None and len(ids) and ids.max() >= num_embeddings:
                    _refuse_token(tokenizer, int(ids.max()), num_embeddings)
            return encoded if isinstance(encoded, Encoded) else Encoded(encoded)

    return encode_raw


def _refuse_token(tokenizer: Any, token: int, num_embeddings: int) -> NoReturn:
    written = tokenizer.convert_ids_to_tokens(token) if token < len(tokenizer) else None
    raise BadRow(
        f"the token {token}{f' ({written!r})' if written else ''} is beyond the target's embedding of "
        f"{num_embeddings:,} rows: do tokenizer and target belong together?",
        "a token is beyond the target's embedding",
    )


def _loss_on(form: Form, loss_on: str | None, columns: tuple[str, ...]) -> str:
    """What is learned of rows of this form.

    Raises:
        InputError: the format does not have what ``loss_on`` asks for.
    """
    if form.row_format == "input_ids":
        chosen = loss_on or "column"
        if chosen == "assistant":
            raise InputError("--loss-on assistant: rows of input_ids do not say which tokens are the assistant's")
        if chosen == "column" and not {"loss_mask", "labels"} & {*columns, *form.columns}:
            raise InputError(
                f"rows of input_ids need a column loss_mask or labels, or --loss-on all; found: {', '.join(columns)}"
            )
        return chosen
    if loss_on == "column":
        raise InputError(f"--loss-on column is for rows of input_ids, not for {form.row_format} rows")
    if form.row_format == "text" and loss_on != "all":
        raise InputError(
            f"rows of text (the column {form.column('text')}) do not say which tokens are the assistant's: use "
            "--loss-on all, or say what the columns are, such as --columns prompt=COLUMN,response=COLUMN; "
            f"found: {', '.join(columns)}"
        )
    return loss_on or "assistant"


def _token_ids(tokenizer: Any, text: str, *, special: bool = True) -> np.ndarray:
    return np.asarray(tokenizer(text, add_special_tokens=special)["input_ids"], np.int32)


def _all_learned(ids: np.ndarray) -> Ids:
    return ids, np.ones(len(ids), np.uint8)


def _prompt_response(tokenizer: Any, conversation: Conversation, loss_on: str) -> Ids:
    """Prompt, response and eos one after the other, for a tokenizer without chat template."""
    messages = conversation.messages
    if [message["role"] for message in messages] != ["user", "assistant"] or conversation.tools:
        raise BadRow("is more than a prompt and a response, and the tokenizer has no chat template to write it with")
    prompt = _token_ids(tokenizer, check_text(messages[0]["content"]))
    response = _token_ids(tokenizer, check_text(messages[1]["content"]), special=False)
    ids = np.concatenate([prompt, response, [tokenizer.eos_token_id]]).astype(np.int32)
    mask = np.ones(len(ids), np.uint8)
    if loss_on == "assistant":
        mask[: len(prompt)] = 0
    return ids, mask


def prepare(
    source: RowSource,
    tokenizer: Any,
    options: PrepareOptions,
    folder: Path,
    *,
    made_for: str = "",
    progress: Callable[[int, int | None, int], None] | None = None,
    num_workers: int | None = None,
    division: Division = ALL,
) -> int:
    """Write the prepared samples of ``source`` into ``folder``, keeping whole parts that are there already.

    The caller holds the cache's lock. A part that was made for something else is made anew.

    Args:
        source: rows; its limit is the one that counts.
        tokenizer: a transformers tokenizer, or a folder with one.
        options: as above.
        folder: created if missing.
        made_for: digest of all that decides the samples: source, tokenizer and options. Each part carries it.
        progress: called with (rows done, rows in all or None, samples kept) after every part.
        num_workers: processes; None: as many as there are cores, one for small data. Never changes a byte.
        division: what of it is this worker's. The one that leads comes back when every part is there, another one
            when its share is made or no longer wanted. A stream has no parts to divide: its leader makes them all.

    Returns:
        Number of parts there are (of a worker that does not lead: that it has made or found).

    Raises:
        InputError: as :func:`prepare_rows`.
        StorageError: a part cannot be written.
    """
    if isinstance(tokenizer, str | Path):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    leads = division.rank == 0
    if source.num_rows is None and not leads:
        return 0
    require_forms(source, tokenizer, options)
    make_folder(folder)
    parts = _Parts(folder, source, made_for, division)
    parts.look()
    if progress:
        progress(parts.rows, source.num_rows, parts.samples)
    if num_workers is None:
        missing = None if source.num_rows is None else source.num_rows - parts.rows
        num_workers = division.processes(missing, ROWS_WORTH_A_PROCESS)
    with closing(results(_write_rows, _How(tokenizer, options, made_for), parts.to_make(), num_workers)) as written:
        for number, rows, samples in written:
            division.made(number)
            parts.count(rows, samples)
            if progress:
                progress(parts.rows, source.num_rows, parts.samples)
    if leads:
        _remove_parts_from(folder, parts.number)
    return parts.number


class _Parts:
    """The parts in ``folder``: which are there, and which this worker has to make."""

    def __init__(self, folder: Path, source: RowSource, made_for: str, division: Division):
        self.number = self.rows = self.samples = 0
        """parts that are known to be there, the rows they cover, the samples in them"""
        self._folder, self._source, self._made_for, self._division = folder, source, made_for, division
        self._kept: set[int] = set()

    def count(self, rows: int, samples: int) -> None:
        """One more is there."""
        self.number, self.rows, self.samples = self.number + 1, self.rows + rows, self.samples + samples

    def look(self) -> None:
        """Keep what is whole of this worker's share, and remove the rest of it: what appears later is whole."""
        for path in sorted(self._folder.glob("samples-*.arrow")):
            digits = path.stem.removeprefix("samples-")
            number = int(digits) if digits.isascii() and digits.isdigit() else -1
            if number % self._division.world_size != self._division.rank and self._division.rank:
                continue
            if path == part_path(self._folder, max(number, 0)) and self._keep(number, thorough=True):
                self._kept.add(number)
            else:
                path.unlink(missing_ok=True)

    def to_make(self) -> Iterator[tuple[Path, int, Rows]]:
        """File, number and rows of each part that is not there when its turn comes."""
        num_rows = self._source.num_rows
        numbers = count() if num_rows is None else self._division.order(-(-num_rows // ROWS_PER_PART))
        for number in numbers:
            if number in self._kept:
                continue
            if not self._division.wanted():
                return
            brought = not part_path(self._folder, number).exists()
            self._division.bring(number)
            if self._keep(number, thorough=brought):
                continue
            rows = self._source.read(number * ROWS_PER_PART, (number + 1) * ROWS_PER_PART)
            if not rows:
                return
            yield part_path(self._folder, number), number, rows

    def _keep(self, number: int, *, thorough: bool) -> bool:
        """Count the part of this number if it is there, whole and made for the same.

        A shorter last part counts only where the number of rows is known. ``thorough``: look at every sample.
        """
        with suppress(CacheError):
            batch, info = read_part(part_path(self._folder, number))
            first, stop = number * ROWS_PER_PART, (number + 1) * ROWS_PER_PART
            if self._source.num_rows is not None:
                stop = min(stop, self._source.num_rows)
            same = (info.first_row, info.stop_row, info.made_for) == (first, stop, self._made_for)
            if same and first < stop and (not thorough or _digests_match(batch)):
                self.count(stop - first, batch.num_rows)
                return True
        return False


def _digests_match(batch: pa.RecordBatch) -> bool:
    ids, masks, digests = (batch.column(name) for name in ("input_ids", "loss_mask", "digest"))
    samples = (Sample(i.values.to_numpy(), m.values.to_numpy(), 0) for i, m in zip(ids, masks, strict=True))
    return [sample.digest() for sample in samples] == digests.to_pylist()


def _remove_parts_from(folder: Path, number: int) -> None:
    for path in folder.glob("samples-*.arrow"):
        if path.name >= part_path(folder, number).name:
            path.unlink()


@dataclass(frozen=True, slots=True)
class _How:
    """What every part is made with."""

    tokenizer: Any
    options: PrepareOptions
    made_for: str


def _write_rows(how: _How, path: Path, number: int, rows: Rows) -> tuple[int, int, int]:
    """Write one part; its number, rows and samples."""
    samples, dropped = prepare_rows(rows, how.tokenizer, how.options)
    write_part(path, samples, PartInfo.of(rows.first, rows.first + len(rows), dropped, how.made_for))
    return number, len(rows), len(samples)
