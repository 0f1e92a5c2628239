"""What of a report's figures a person should know, in words; pure functions of the figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from extractor.report.codec_trial import CodecTrial
from extractor.report.dropped_rows import DroppedRows
from extractor.report.job_figures import JobFigures
from extractor.report.sample_figures import SampleFigures
from extractor.report.state_figures import StateFigures
from extractor.terminal.progress import duration

GROWTH, ALIKE, NEAR_CONSTANT, FIRST_TOKEN = 10.0, 0.999, 0.5, 10.0
DROPPED, TRUNCATED, LEARNED = 0.2, 0.2, 0.05
LOWEST_SNR_DB = 25.0
FLOAT16_LARGEST = 65504.0

Level = Literal["wrong", "look", "note"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One sentence."""

    level: Level
    """``wrong``: do not train on it; ``look``: it may be meant, look at it; ``note``: good to know"""
    text: str


def state_findings(states: StateFigures, dtype: str) -> Iterator[Finding]:
    """What stands out of the states."""
    for layer in states.layers:
        name = f"layer {layer.layer}"
        if layer.nonfinite_tokens:
            yield _wrong(f"{name}: {layer.nonfinite_tokens:,} of {states.tokens:,} tokens have NaN or Inf")
        if layer.zero_tokens:
            yield _wrong(f"{name}: the states of {layer.zero_tokens:,} of {states.tokens:,} tokens are all zero")
        if layer.constant:
            yield _wrong(f"{name} is constant: every token has the same states, nothing can be learned from it")
        elif layer.near_constant >= NEAR_CONSTANT:
            share = f"{100 * layer.near_constant:.0f} %"
            yield _look(f"{name}: {share} of its channels are near-constant (they vary by less than 1 % of their size)")
        if layer.growth and layer.growth.times >= GROWTH:
            times, sample = layer.growth.times, layer.growth.sample_id
            yield _look(f"{name}: the norm grows {times:.0f}x within a sample (sample {sample}, first token left out)")
        if dtype == "float16" and layer.largest >= FLOAT16_LARGEST / 2:
            yield _look(f"{name}: values up to {layer.largest:,.0f}, and float16 ends at 65,504: bfloat16 has room")
    yield from _pair_findings(states)
    massive = [one for one in states.layers if one.norms[2] > 0 and one.first_norm >= FIRST_TOKEN * one.norms[2]]
    if massive:
        most = max(massive, key=lambda one: one.first_norm / one.norms[2])
        yield _note(
            f"the first token is massive in layer{'s' if len(massive) > 1 else ''} "
            f"{', '.join(str(one.layer) for one in massive)}: up to {most.first_norm / most.norms[2]:.0f}x the median "
            f"norm (layer {most.layer}, channel {most.first_channels[0].channel}), as trained LLMs have it"
        )


def _pair_findings(states: StateFigures) -> Iterator[Finding]:
    for one, other in states.identical:
        yield _wrong(f"layers {one} and {other} are identical, to the bit")
    ids = [layer.layer for layer in states.layers]
    for a, b in combinations(range(len(ids)), 2):
        alike = states.similarity[a][b]
        if alike is not None and alike >= ALIKE and (ids[a], ids[b]) not in states.identical:
            yield _look(f"layers {ids[a]} and {ids[b]} are nearly the same (similarity {alike:.4f})")


def sample_findings(samples: SampleFigures, dropped: Sequence[DroppedRows], rows: int) -> Iterator[Finding]:
    """What stands out of the samples; ``rows``: of the dataset."""
    left_out = sum(one.rows for one in dropped if one.reason != "by_weight")
    if rows and left_out >= DROPPED * rows:
        why = f"{dropped[0].rows:,} {dropped[0].reason}"
        yield _look(f"{left_out:,} of {rows:,} rows gave no sample ({100 * left_out / rows:.0f} %), most: {why}")
    if samples.samples and samples.at_max_length >= TRUNCATED * samples.samples:
        share = 100 * samples.at_max_length / samples.samples
        yield _look(f"{share:.0f} % of the samples end at --max-length {samples.max_length:,}: their ends are cut off")
    if samples.without_learned:
        yield _look(f"{samples.without_learned:,} samples have no learned token: a draft learns nothing from them")
    for source in samples.sources:
        of_it = f" of {source.name}" if len(samples.sources) > 1 else ""
        if source.samples and source.share < LEARNED:
            yield _look(
                f"{100 * source.share:.1f} % of the tokens{of_it} are learned: is the loss mask as you want it?"
            )
        if source.samples and source.learned == source.tokens:
            yield _look(f"every token{of_it} is learned, prompts too: is the loss mask as you want it?")
        if not source.samples and samples.samples:
            yield _look(f"no sample{of_it} is stored")
    if samples.quarantined:
        yield _look(f"{samples.quarantined:,} samples are quarantined: the target gave NaN or Inf for them")


def job_findings(job: JobFigures) -> Iterator[Finding]:
    """What stands out of the job."""
    if job.throughput and job.throughput.pauses:
        longest, count = job.throughput.pauses[0], len(job.throughput.pauses)
        yield _note(
            f"no shard was committed for {duration(longest.seconds)} at one time"
            + (f", and {count - 1:,} more pauses" if count > 1 else "")
        )
    if job.padding is not None and job.padding > 0.1:
        yield _look(f"{100 * job.padding:.0f} % of the computed tokens were padding: a larger --batch-tokens may help")


def codec_findings(trials: Sequence[CodecTrial], layer_ids: Sequence[int]) -> Iterator[Finding]:
    """What stands out of the codecs."""
    for trial in trials:
        for layer, worst in zip(layer_ids, trial.worst_db, strict=False):
            if worst < LOWEST_SNR_DB:
                yield _look(f"{trial.codec} would leave a token of layer {layer} an SNR of only {worst:.0f} dB")


def _wrong(text: str) -> Finding:
    return Finding(level="wrong", text=text)


def _look(text: str) -> Finding:
    return Finding(level="look", text=text)


def _note(text: str) -> Finding:
    return Finding(level="note", text=text)
