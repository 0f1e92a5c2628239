"""What is known of the job and of its verification, as lines for the page and the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone

from extractor.report.given_results import Ran, Verified
from extractor.report.job_figures import JobFigures
from extractor.terminal.progress import compact, duration, size


def job_facts(job: JobFigures, runs: Sequence[Ran]) -> list[tuple[str, str]]:
    """Name and value, in order."""
    facts = [("shards", f"{job.shards:,} of {job.planned_shards:,}, {size(job.bytes)}")]
    if job.padding is not None:
        facts.append(("padding", f"{100 * job.padding:.1f} % of the computed tokens"))
    if job.throughput is None:
        facts.append(("throughput", f"not known: {job.why_no_throughput}"))
    else:
        began = datetime.fromtimestamp(job.throughput.began, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
        facts.append(("first shard", f"{began}, the last one {duration(job.throughput.seconds)} later"))
        rate = f"{compact(job.throughput.rate)} tokens a second, pauses left out"
        facts.append(("throughput", f"{rate} (by the times of the shard files, which a copy may have changed)"))
        pauses = [f"{duration(p.seconds)} after {duration(p.after)}" for p in job.throughput.pauses[:5]]
        more = len(job.throughput.pauses) - len(pauses)
        facts.append(("pauses", ", ".join(pauses) + (f" and {more:,} more" if more > 0 else "") or "none"))
    for number, run in enumerate(runs, 1):
        facts.append((f"run {number}" if len(runs) > 1 else "waits", _run(run)))
    if not runs:
        facts.append(("waits", "not known: give the report what `extract --json` printed (--with run.json)"))
    return facts


def _run(run: Ran) -> str:
    seconds = max(run.seconds, 1e-9)
    pad = 1 - run.tokens / max(run.padded_tokens, 1)
    return (
        f"{compact(run.tokens)} tokens in {duration(run.seconds)} ({compact(run.tokens / seconds)} tokens a second, "
        f"{100 * pad:.1f} % padding); the target waited {duration(run.seconds_waiting_for_disk)} for the disk "
        f"({100 * run.seconds_waiting_for_disk / seconds:.0f} %), and {duration(run.seconds_to_first_batch)} went by "
        f"before its first batch; writing took {duration(run.seconds_writing)} of the threads beside it"
    )


def verdict(verified: Verified) -> str:
    """``whole: quick check of 12 shards, just now``."""
    result = "whole" if verified.whole else f"{verified.num_problems:,} problems"
    when = "made for this report" if verified.now else f"as it was handed to this report, of {verified.cache}"
    more = "" if verified.depth != "quick" else "; only `dflash-cache verify` without --quick reads every byte"
    of = "" if verified.shards == verified.of_shards else f" of {verified.of_shards:,}"
    checked = f"{verified.shards:,}{of} shards, {verified.samples:,} samples"
    return f"{result}: {verified.depth} check of {checked}, {when}{more}"
