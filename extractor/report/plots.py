"""The report's plots as SVG text, one small picture each, so that a page lays them side by side or one below another.

matplotlib, and not altair, bokeh or plotly: its SVG is text of 10-30 KB a plot that any browser shows without a script,
where those three bring 0.8 to 4.5 MB of JavaScript that builds functions from strings. So the page can forbid every
script but its own search, which is what makes hostile text in a dataset harmless; it prints, and it stays readable
when their versions have moved on. What is lost are tooltips: the heat map has its numbers in its cells instead.

Colours are those of Okabe and Ito, and viridis for what has an order: both can be told apart by colour-blind people.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from extractor.report.job_figures import JobFigures, Throughput
from extractor.report.sample_figures import SampleFigures, SourceFigures
from extractor.report.state_figures import StateFigures
from extractor.terminal.progress import compact

BLUE, ORANGE, RED, GREY = "#0072B2", "#E69F00", "#D55E00", "#8A8A8A"
_WIDTH, _HEIGHT = 4.7, 3.0
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "dflash-cache",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.labelcolor": "#333333",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.8,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "text.color": "#222222",
    "legend.frameon": False,
    "legend.fontsize": 9,
}


def lengths(figures: SampleFigures, source: SourceFigures) -> str:
    """Samples of one source by their tokens, and by those that are learned."""
    with _drawn("samples by length", height=3.3) as (axes, done):
        edges = np.asarray(figures.length_edges)
        axes.stairs(source.lengths, edges, fill=True, color=BLUE, alpha=0.35, label="tokens")
        axes.stairs(source.learned_counts, edges, color=ORANGE, linewidth=1.8, label="learned tokens")
        if figures.max_length and figures.max_length <= edges[-1]:
            axes.axvline(figures.max_length, color=GREY, linestyle=":", linewidth=1.2)
        axes.set(xlabel="tokens of a sample", ylabel="samples", xlim=(0, edges[-1]))
        _whole(axes)
        _legend_below(axes)
    return done[0]


def learned_shares(source: SourceFigures) -> str:
    """Samples of one source by the share of their tokens that is learned."""
    with _drawn("samples by learned share", height=3.3) as (axes, done):
        counts = source.learned_shares
        axes.stairs(counts, np.linspace(0, 100, len(counts) + 1), fill=True, color=ORANGE, alpha=0.7)
        axes.axvline(100 * source.share, color="#333333", linestyle="--", linewidth=1.2)
        # Beside the line, on the side that has the room.
        right = source.share > 0.5
        axes.annotate(
            f"of all tokens: {100 * source.share:.0f} %",
            (100 * source.share, 1),
            xycoords=("data", "axes fraction"),
            xytext=(-5 if right else 5, -3),
            textcoords="offset points",
            ha="right" if right else "left",
            va="top",
            fontsize=9,
        )
        axes.set(xlabel="learned, % of a sample's tokens", ylabel="samples", xlim=(0, 100))
        axes.margins(y=0.2)
        _whole(axes)
    return done[0]


def layer_norms(states: StateFigures) -> str:
    """Norms of each layer, and of its first tokens."""
    with _drawn("norms by layer", height=3.3, width=max(_WIDTH, 0.42 * len(states.layers))) as (axes, done):
        at = np.arange(len(states.layers))
        low, quarter, middle, three, high = np.asarray([layer.norms for layer in states.layers]).T
        axes.vlines(at, low, high, color=BLUE, linewidth=1.5, label="5-95 % of tokens")
        axes.vlines(at, quarter, three, color=BLUE, linewidth=7, alpha=0.55, label="25-75 %")
        axes.plot(at, middle, "o", color="white", markeredgecolor=BLUE, markersize=5, label="median")
        first = [layer.first_norm for layer in states.layers]
        axes.plot(at, first, "D", color=RED, markersize=6, label="first token (median)")
        axes.set_xticks(at, [str(layer.layer) for layer in states.layers])
        axes.set(xlabel="target layer", ylabel="Euclidean norm")
        axes.set_xlim(-0.6, len(at) - 0.4)
        _log(axes, [*low, *high, *first])
        _legend_below(axes)
    return done[0]


def position_norms(states: StateFigures, layer: int) -> str:
    """Norms of one layer (its number among those captured) by the place in the sample; all layers on one scale."""
    found = states.positions
    with _drawn(f"layer {states.layers[layer].layer}", height=2.5) as (axes, done):
        at = np.arange(len(found.starts))
        axes.fill_between(at, found.low[layer], found.high[layer], color=BLUE, alpha=0.25, linewidth=0)
        axes.plot(at, found.medians[layer], "-", color=BLUE, linewidth=1.8)
        if found.starts[0] == 0:
            axes.plot(at[:1], found.medians[layer][:1], "D", color=RED, markersize=6)
        every = max(1, round(len(at) / 7))
        axes.set_xticks(at[::every], [compact(start) for start in found.starts[::every]])
        axes.set(xlabel="place in the sample, from 0 (ranges that double)", ylabel="norm")
        axes.set_ylim(*_limits([*np.ravel(found.low), *np.ravel(found.high)]))
        _log(axes, [*np.ravel(found.low), *np.ravel(found.high)])
    return done[0]


def channel_sizes(states: StateFigures) -> str:
    """Channels of each layer, largest first: outliers stand at the left."""
    many = len(states.layers) > 12
    first, last = states.layers[0].layer, states.layers[-1].layer
    title = f"channels by size (dark: layer {first}, light: {last})" if many else "channels by size"
    with _drawn(title, height=3.3) as (axes, done):
        colours = _ordered(len(states.layers))
        for layer, colour in zip(states.layers, colours, strict=True):
            axes.plot(states.ranks, layer.channel_sizes, color=colour, linewidth=1.6, label=f"{layer.layer}")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: compact(x)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set(xlabel="channel, largest first", ylabel="root mean square")
        _log(axes, [size for layer in states.layers for size in layer.channel_sizes])
        if not many:
            _legend_below(axes, columns=6, title="layer")
    return done[0]


def similarity(states: StateFigures) -> str:
    """How alike layers are, as a heat map with its numbers."""
    count = len(states.layers)
    ids = [str(layer.layer) for layer in states.layers]
    known = np.asarray([[np.nan if cosine is None else cosine for cosine in row] for row in states.similarity])
    lowest = -1 if (known < 0).any() else 0
    side = min(max(3.6, 0.36 * count), 6.4)
    with _drawn("similarity of layers", height=side * 0.86, width=max(_WIDTH, side)) as (axes, done):
        axes.set_facecolor("#DDDDDD")
        image = axes.imshow(known, cmap="viridis", vmin=lowest, vmax=1, interpolation="nearest")
        axes.grid(False)
        every = max(1, math.ceil(count / 24))
        axes.set_xticks(np.arange(count)[::every], ids[::every])
        axes.set_yticks(np.arange(count)[::every], ids[::every])
        axes.tick_params(length=0)
        axes.set(xlabel="target layer", ylabel="target layer")
        axes.spines[:].set_visible(False)
        if count <= 12:
            for (row, column), cosine in np.ndenumerate(known):
                light = np.isfinite(cosine) and (cosine - lowest) / (1 - lowest) < 0.55
                text = f"{cosine:.2f}" if np.isfinite(cosine) else "-"
                axes.text(
                    column, row, text, ha="center", va="center", fontsize=8.5, color="white" if light else "#111111"
                )
        axes.figure.colorbar(image, ax=axes, label="cosine, channel means taken away", shrink=0.9).outline.set_visible(
            False
        )
    return done[0]


def throughput(over_time: Throughput) -> str:
    """Tokens committed a second over time; pauses shaded."""
    unit, scale = next(
        (u, s)
        for u, s in (("days", 86400), ("hours", 3600), ("minutes", 60), ("seconds", 1))
        if over_time.seconds > 2 * s or s == 1
    )
    with _drawn("throughput") as (axes, done):
        edges = np.linspace(0, over_time.seconds / scale, len(over_time.rates) + 1)
        axes.stairs(over_time.rates, edges, fill=True, color=BLUE, alpha=0.6)
        for pause in over_time.pauses[:50]:
            axes.axvspan(pause.after / scale, (pause.after + pause.seconds) / scale, color=GREY, alpha=0.3, linewidth=0)
        axes.axhline(over_time.rate, color="#333333", linestyle="--", linewidth=1.2)
        axes.set(xlabel=f"{unit} since the first shard", ylabel="tokens a second", xlim=(0, edges[-1]))
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_ylim(0)
    return done[0]


def shard_sizes(job: JobFigures) -> str:
    """Shards by the size of their files."""
    unit, scale = next(
        (u, s)
        for u, s in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("B", 1))
        if job.size_edges[-1] >= s or s == 1
    )
    with _drawn("shards by size") as (axes, done):
        edges = np.asarray(job.size_edges) / scale
        axes.stairs(job.sizes, edges, fill=True, color=BLUE, alpha=0.6)
        axes.set(xlabel=f"size of the file, {unit}", ylabel="shards", xlim=(0, edges[-1] * 1.02))
        _whole(axes)
    return done[0]


# -- how they look ----------------------------------------------------------------------------------------------------


@contextmanager
def _drawn(title: str, width: float = _WIDTH, height: float = _HEIGHT) -> Iterator[tuple[Axes, list[str]]]:
    """Axes to draw into; the list has the SVG once the block is left."""
    done: list[str] = []
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots()
        axes.set_title(title, pad=8)
        yield axes, done
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    done.append(_inline(out.getvalue(), title, broad=width > _WIDTH))


def _inline(svg: str, title: str, *, broad: bool) -> str:
    """Without what a page does not need: the XML head, and ids that several plots would share.

    ``broad``: the page gives it a row of its own, and a narrow screen scrolls it.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[a-zA-Z]+[A-Za-z_]*_\d+"', "", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    kind = ' class="broad"' if broad else ""
    return svg.replace("<svg", f'<svg role="img" aria-label="{title}"{kind}', 1)


def _whole(axes: Axes) -> None:
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: compact(y)))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}" if x < 1e5 else compact(x)))
    if axes.get_ylim()[1] < 1:
        axes.set_ylim(0, 1)


def _limits(values: Sequence[float]) -> tuple[float, float]:
    positive = [value for value in values if value > 0] or [1.0]
    return min(positive) / 1.6, max(positive) * 1.6


def _log(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic scale with plain numbers, at 1, 2 and 5 of each power where there are few powers."""
    low, high = _limits(values)
    # First, so that matplotlib does not look for limits in zeros.
    axes.set_ylim(low, high)
    axes.set_yscale("log")
    many = high / low > 300
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if many else (1.0, 2.0, 5.0), numticks=8))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: compact(y) if y >= 1 else f"{y:g}"))


def _legend_below(axes: Axes, columns: int = 2, title: str | None = None) -> None:
    assert isinstance(axes.figure, Figure)
    axes.figure.legend(
        loc="outside lower center", ncols=columns, title=title, title_fontsize=9, columnspacing=1.2, handlelength=1.2
    )


def _ordered(count: int) -> list[tuple[float, float, float, float]]:
    """Colours from dark to light, without the lightest, which does not show on white."""
    return [matplotlib.colormaps["viridis"](x) for x in np.linspace(0, 0.85, count)]
