"""What an extraction says of itself: while it runs, and when it has ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cache_format.layout.samples import BadRows
from extractor.job.run_shards import RunStats
from extractor.terminal.progress import compact


@dataclass(frozen=True, kw_only=True)
class ExtractReport:
    """What ``extract`` did, for the screen and for ``--json``."""

    cache: str
    fingerprint: str
    samples: int
    tokens: int
    shards: int
    quarantined: int
    dropped: dict[str, int]
    bad_rows: dict[str, BadRows]
    run: RunStats
    """of this run alone; zeros where nothing was left to do"""
    complete: bool = True
    """False: this worker's share is done, others are still at theirs, or left theirs undone"""


def progress_note(stats: RunStats) -> str:
    """What a line of progress says beside the tokens."""
    seconds = max(stats.seconds, 1e-9)
    padding = 100 * (1 - stats.tokens / stats.padded_tokens) if stats.padded_tokens else 0.0
    return f"{compact(stats.tokens / seconds)} tok/s, {stats.bytes / seconds / 1e9:.2f} GB/s, pad {padding:.1f}%"


def dropped_note(dropped: Mapping[str, int]) -> str:
    """``3 bad_row, 12 too_long``."""
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(dropped.items()) if count) or "none"


_NOTED = {
    "rejected_side": "rejected sides of preference rows are left out; the chosen ones are taken",
    "reasoning_left_out": "learned turns whose reasoning the chat template does not write there; with --turns each or "
    "last it is learned where the template writes it in a last turn",
    "no_end_of_turn": "learned turns behind which the chat template writes no token that ends them, so that the draft "
    "does not learn where to stop",
}


def noted_notes(noted: Mapping[str, int]) -> list[str]:
    """A line for each thing that rows had and their samples have not."""
    return [f"note: {count:,} {_NOTED.get(name, name)}" for name, count in sorted(noted.items()) if count]


def bad_row_notes(bad_rows: Mapping[str, BadRows]) -> list[str]:
    """A line for each class of bad rows, the most frequent first, with the place of its first row."""
    ordered = sorted(bad_rows.items(), key=lambda item: (-item[1].rows, item[0]))
    return [f"{found.rows:,} x {reason} (first: {found.first})" for reason, found in ordered]
