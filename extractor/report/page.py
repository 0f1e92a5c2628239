"""The report as one HTML page that loads nothing and runs no script but its own search.

Everything from a cache (text of rows, names, versions) goes through Jinja's autoescaping, and is made printable
before: control characters and right-to-left marks show as escapes. Beside that the page's own Content-Security-Policy
allows one script, by its hash: text that got through as markup would still not run.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from cache_format import __version__
from extractor.report import plots
from extractor.report.job_words import job_facts, verdict
from extractor.report.make_report import Report
from extractor.terminal.learned_text import printable
from extractor.terminal.progress import compact, size

MOST_POSITION_PLOTS = 12
"""Layers whose norms are plotted by place, spread evenly, the first and the last among them."""

LEAST_BINS = 4
"""Of a throughput that is worth a plot."""


def page(report: Report) -> str:
    """The whole file, UTF-8, below 2 MB."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=False, finalize=_shown, keep_trailing_newline=True
    )
    script, style = _own("page.js"), _own("page.css")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.from_string(_own("page.html")).render(
        report=report,
        version=__version__,
        script=Markup(script),
        style=Markup(style),
        script_hash=digest,
        facts=facts(report),
        sources=[
            (source, [Markup(plots.lengths(report.samples, source)), Markup(plots.learned_shares(source))])
            for source in report.samples.sources
        ],
        state_plots=[*map(Markup, _state_plots(report))],
        position_plots=[*map(Markup, _position_plots(report))],
        job_plots=[*map(Markup, _job_plots(report))],
        job_facts=job_facts(report.job, report.runs),
        verdict=verdict(report.verified) if report.verified else "",
        identity=[(name, _brief(value)) for name, value in sorted(report.identity.items())],
        short=_short,
        size=size,
    )


def facts(report: Report) -> list[tuple[str, str]]:
    """Name and value of the figures that stand on top."""
    samples, job = report.samples, report.job
    shown = [
        ("samples", f"{samples.samples:,}"),
        ("tokens", compact(samples.tokens)),
        ("learned", f"{100 * samples.learned / max(samples.tokens, 1):.0f} %"),
        ("shards", f"{job.shards:,} of {job.planned_shards:,}"),
        ("on disk", size(job.bytes)),
        ("median sample, tokens", f"{samples.length_quantiles[2]:,}"),
    ]
    if job.padding is not None:
        shown.append(("padding when it was made", f"{100 * job.padding:.1f} %"))
    if job.throughput is not None:
        shown.append(("tokens a second", compact(job.throughput.rate)))
    return shown


def _state_plots(report: Report) -> Iterator[str]:
    if report.states:
        yield plots.layer_norms(report.states)
        yield plots.similarity(report.states)
        yield plots.channel_sizes(report.states)


def _position_plots(report: Report) -> Iterator[str]:
    if report.states:
        count = len(report.states.layers)
        for layer in np.unique(np.linspace(0, count - 1, min(count, MOST_POSITION_PLOTS)).round().astype(int)):
            yield plots.position_norms(report.states, int(layer))


def _job_plots(report: Report) -> Iterator[str]:
    if report.job.throughput and len(report.job.throughput.rates) >= LEAST_BINS:
        yield plots.throughput(report.job.throughput)
    if report.job.shards:
        yield plots.shard_sizes(report.job)


def _own(name: str) -> str:
    return (files("extractor.report") / name).read_text("utf-8")


def _shown(value: Any) -> Any:
    """What the template writes: text with nothing in it that is not seen."""
    return value if isinstance(value, Markup) else printable(str(value))


def _brief(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 600 else f"{text[:600]} ... ({len(text):,} characters)"


def _short(x: float) -> str:
    return compact(x) if x >= 100 else f"{x:.3g}"
