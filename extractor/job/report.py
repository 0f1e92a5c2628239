"""What an extraction says of itself: while it runs, and when it has ended."""

from __future__ import annotations

from dataclasses import dataclass

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
    run: RunStats
    """of this run alone; zeros where nothing was left to do"""
    complete: bool = True
    """False: this worker's share is done, others are still at theirs, or left theirs undone"""


def progress_note(stats: RunStats) -> str:
    """What a line of progress says beside the tokens."""
    seconds = max(stats.seconds, 1e-9)
    return (
        f"{compact(stats.samples)} samples, {compact(stats.tokens / seconds)} tok/s, "
        f"{stats.bytes / seconds / 1e9:.2f} GB/s"
    )
