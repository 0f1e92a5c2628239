"""The report for a terminal: what the page shows, in some forty lines."""

from __future__ import annotations

from collections.abc import Sequence

from extractor.report.job_words import job_facts, verdict
from extractor.report.make_report import Report
from extractor.terminal.learned_text import one_line, rule
from extractor.terminal.progress import compact, size

_BARS = " ▁▂▃▄▅▆▇█"


def describe(report: Report, colour: bool) -> str:
    """``report`` for a person; nothing of it moves a terminal's cursor."""
    blocks = [
        ("", _head(report)),
        ("what to look at", _findings(report)),
        ("samples", _samples(report)),
        ("states", _states(report)),
        ("job", _job(report)),
    ]
    return "\n".join(
        line
        for title, lines in blocks
        for line in ([rule(title, colour)] if title else []) + [one_line(line) for line in lines]
    )


def bars(counts: Sequence[int]) -> str:
    """A histogram in one line: ``▁▃█▂``; a count that is not 0 shows."""
    most = max([1, *counts])
    return "".join(_BARS[0 if not count else max(1, round(count / most * (len(_BARS) - 1)))] for count in counts)


def _head(report: Report) -> list[str]:
    layers = ", ".join(map(str, report.target_layer_ids))
    return [
        f"{report.cache}: {report.state}",
        f"{report.target} ({report.model_type}), layers {layers} of {report.num_hidden_layers}, "
        f"{report.hidden_size} wide, {report.dtype}, codec {report.codec}",
    ]


def _findings(report: Report) -> list[str]:
    return [f"{finding.level + ':':<7}{finding.text}" for finding in report.findings] or ["nothing stands out"]


def _job(report: Report) -> list[str]:
    made_by = [("made by", report.command)] if report.command else []
    facts = [
        *made_by,
        *job_facts(report.job, report.runs),
        ("verified", verdict(report.verified) if report.verified else "no"),
    ]
    return [f"{name:<12}{value}" for name, value in facts]


def _samples(report: Report) -> list[str]:
    samples = report.samples
    shortest, low, middle, high, longest = samples.length_quantiles
    lines = [
        f"{samples.samples:,} samples, {samples.tokens:,} tokens, "
        f"{samples.learned:,} learned ({100 * samples.learned / max(samples.tokens, 1):.0f} %)",
        f"tokens a sample: {shortest:,} to {longest:,}, median {middle:,}, 90 % between {low:,} and {high:,}",
    ]
    for source in samples.sources:
        if len(samples.sources) > 1:
            lines.append(f"{source.name}: {source.samples:,} samples, {100 * source.share:.0f} % learned")
        lines.append(f"  tokens  |{bars(source.lengths)}| 0 to {longest:,}")
        lines.append(f"  learned |{bars(source.learned_counts)}| 0 to {longest:,}")
        lines.append(f"  share   |{bars(source.learned_shares)}| 0 to 100 %")
    if samples.max_length:
        lines.append(f"at --max-length {samples.max_length:,} ({samples.too_long}): {samples.at_max_length:,} samples")
    lines.append(f"rows that gave no sample: {sum(one.rows for one in report.dropped):,} of {report.rows:,}")
    for one in report.dropped:
        such_as = f", {'such as' if one.certain else 'perhaps'} {one.examples[0]}" if one.examples else ""
        lines.append(f"  {one.rows:,} {one.reason}{such_as}")
    return lines


def _states(report: Report) -> list[str]:
    states = report.states
    if states is None:
        return ["no shard is finished, or none can be read"]
    lines = [
        f"of {states.tokens:,} tokens of {states.samples:,} samples out of {len(report.looked_at_shards):,} of "
        f"{report.job.shards:,} shards; first tokens apart",
        f"{'layer':>6}{'median':>9}{'5-95 %':>16}{'first token':>16}{'constant':>10}{'like next':>11}  largest channel",
    ]
    for number, layer in enumerate(states.layers):
        times = layer.first_norm / layer.norms[2] if layer.norms[2] > 0 else 0.0
        alike = states.similarity[number][number + 1] if number + 1 < len(states.layers) else None
        top = layer.top_channels[0]
        lines.append(
            f"{layer.layer:>6}{_short(layer.norms[2]):>9}"
            f"{f'{_short(layer.norms[0])}-{_short(layer.norms[4])}':>16}"
            f"{f'{_short(layer.first_norm)} ({_short(times)}x)':>16}{100 * layer.near_constant:>8.1f} %"
            f"{'-' if alike is None else f'{alike:.2f}':>11}  {top.channel} ({_short(top.times)}x)"
        )
    for codec in report.codecs:
        snr = ""
        if codec.snr_db:
            snr = f", SNR {min(codec.snr_db):.1f} to {max(codec.snr_db):.1f} dB"
            snr += f", worst token {min(codec.worst_db):.1f}" if codec.worst_db else ""
        used = " (in use)" if codec.is_used else ""
        lines.append(f"codec {codec.codec}{used}: {codec.token_bytes:,.0f} B a token, {size(codec.total_bytes)}{snr}")
    return lines


def _short(x: float) -> str:
    return compact(x) if x >= 100 else f"{x:.3g}"
