"""Plots of the report as SVG text that follows the colours of the page around it.

Matplotlib draws them in marker colours, which `_svg` replaces by CSS variables: one drawing serves
a light page, a dark page and paper. Texts stay texts, in the font of the page.
"""

import hashlib
import html
import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from shine.metrics.summary import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NUM_STYLES = 6  # of runs and of texts: CSS variables --run-0.. and --text-0..
MARKERS = "os^Dv*"
# Dash patterns in points, so that no two neighbours are told apart by colour alone.
DASHES: tuple[tuple[float, ...], ...] = ((), (6, 2), (6, 2, 1.5, 2), (1.5, 1.5), (9, 2), (3, 1))

_COLORS = {
    "ink": "#010101",
    "muted": "#010102",
    "line": "#010103",
    "true": "#010104",
    "predicted": "#010105",
    **{f"run-{i}": f"#0102{i:02x}" for i in range(NUM_STYLES)},
    **{f"text-{i}": f"#0103{i:02x}" for i in range(NUM_STYLES)},
}
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "shine",
    "text.parse_math": False,
    "font.size": 10,
    "text.color": _COLORS["ink"],
    "axes.edgecolor": _COLORS["line"],
    "axes.labelcolor": _COLORS["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _COLORS["line"],
    "grid.linewidth": 0.5,
    "xtick.color": _COLORS["line"],
    "ytick.color": _COLORS["line"],
    "xtick.labelcolor": _COLORS["muted"],
    "ytick.labelcolor": _COLORS["muted"],
    "lines.linewidth": 1.6,
}


def interval_plot(
    series: Sequence[Sequence[Interval | None]],
    categories: Sequence[str],
    label: str,
    *,
    styles: Sequence[int],
) -> str:
    """Figures in percent with their intervals, one group per category, one marker per run.

    Args:
        series: per run, its figure in each category; None where there is none.
        categories: names under the groups.
        label: what the plot shows, for readers who do not see it.
        styles: per run, the number of its colour and marker.
    """

    def draw(axes: "Axes") -> None:
        step = 0.5 / max(len(series), 1)
        for run, figures in enumerate(series):
            shift = (run - (len(series) - 1) / 2) * step
            for place, figure in enumerate(figures):
                if figure is None:
                    continue
                value = 100 * figure["value"]
                look = styles[run]
                style: dict[str, Any] = {"color": _color("run", look), "marker": _marker(look)}
                if figure["low"] is not None and figure["high"] is not None:
                    ends = [100 * figure["low"], 100 * figure["high"]]
                    axes.plot([place + shift] * 2, ends, color=style["color"], linewidth=2)
                axes.plot([place + shift], [value], markersize=6, **style)
        axes.set_xticks(range(len(categories)), categories)
        axes.set_xlim(-0.6, len(categories) - 0.4)
        axes.grid(axis="x", visible=False)
        axes.tick_params(axis="x", labelcolor=_COLORS["ink"], length=0)
        axes.set_ylabel("percent")

    return _plot(draw, label)


def curve_plot(
    series: Sequence[tuple[Sequence[float], Sequence[float]]],
    label: str,
    *,
    styles: Sequence[int],
    best: Sequence[int | None],
    percent: bool = False,
) -> str:
    """One curve per run over epochs.

    Args:
        series: per run, epochs and values.
        label: what the plot shows, for readers who do not see it.
        styles: per run, the number of its colour and dashes.
        best: per run, the epoch to mark with a ring.
        percent: values are fractions, to be drawn in percent.
    """

    def draw(axes: "Axes") -> None:
        scale = 100 if percent else 1
        for run, (epochs, values) in enumerate(series):
            scaled = [scale * value for value in values]
            look = styles[run]
            few = {"marker": _marker(look), "markersize": 3} if len(scaled) < 3 else {}
            axes.plot(epochs, scaled, color=_color("run", look), linestyle=_line(look), **few)
            if (ring := best[run]) is not None and ring in epochs:
                at = list(epochs).index(ring)
                axes.plot(
                    [epochs[at]],
                    [scaled[at]],
                    marker="o",
                    markersize=7,
                    markerfacecolor="none",
                    color=_color("run", look),
                )
        axes.set_xlabel("epoch")
        axes.locator_params(axis="x", integer=True)
        axes.set_ylabel("percent" if percent else "loss")

    return _plot(draw, label)


def saliency_plot(
    curves: Sequence[Sequence[float]],
    label: str,
    *,
    clip_seconds: float,
    duration_seconds: float,
    moments: Sequence[Sequence[float]],
    predicted: Sequence[float],
    limits: tuple[float, float],
) -> str:
    """Saliency of several texts over the time of one video, with its moments on two lanes below.

    Args:
        curves: logit per clip; the first is the query's and is drawn strongest.
        label: what the plot shows, for readers who do not see it.
        clip_seconds: length of a clip.
        duration_seconds: length of the video.
        moments: annotated `[start, end]` in seconds.
        predicted: first predicted `[start, end]` in seconds.
        limits: of the saliency axis, so that plots side by side compare.
    """
    low, high = limits
    lane = (high - low or 1.0) * 0.09

    def draw(axes: "Axes") -> None:
        for start, end in moments:
            axes.axvspan(start, end, color=_COLORS["true"], alpha=0.16, linewidth=0)
        for text, curve in reversed(list(enumerate(curves))):
            centers = [(clip + 0.5) * clip_seconds for clip in range(len(curve))]
            axes.plot(
                centers,
                curve,
                color=_color("text", text),
                linestyle=_line(text),
                linewidth=2.4 if text == 0 else 1.3,
            )
        lanes = low - 2.2 * lane, low - 3.6 * lane
        bars = [(start, end - start) for start, end in moments]
        axes.broken_barh(bars, (lanes[0], lane), color=_COLORS["true"])
        start, end = predicted
        axes.broken_barh([(start, end - start)], (lanes[1], lane), color=_COLORS["predicted"])
        axes.set_ylim(low - 4.4 * lane, high + lane)
        ticks = [tick for tick in axes.get_yticks() if low <= tick <= high]
        names = [f"{tick:g}" for tick in ticks]
        axes.set_yticks([*ticks, *(y + lane / 2 for y in lanes)], [*names, "true", "found"])
        axes.set_xlim(0, duration_seconds)
        axes.set_xlabel("seconds")
        axes.set_ylabel("saliency (logit)")

    return _plot(draw, label, width=5.4, height=3.0)


def _plot(draw: Any, label: str, *, width: float = 4.1, height: float = 2.4) -> str:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):  # pyright: ignore[reportArgumentType]
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.add_subplot())
        return _svg(figure, label)


def _svg(figure: "Figure", label: str) -> str:
    """The figure as an `svg` element that may stand beside others in one page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    view = re.search(r'viewBox="[^"]*"', text)
    assert view is not None
    body = text[text.index(">") + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", body, flags=re.S)
    # A style sheet inside one drawing would apply to the whole page; the page has its own rule.
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", body, flags=re.S)
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    prefix = f"f{hashlib.sha256((label + body).encode()).hexdigest()[:8]}-"
    body = re.sub(r'\bid="', f'id="{prefix}', body)
    body = re.sub(r'(?:xlink:)?href="#', f'href="#{prefix}', body)
    body = body.replace("url(#", f"url(#{prefix}")
    body = re.sub(r"(font: [\d.]+px) [^;\"]*", r"\1 var(--font)", body)
    for name, color in _COLORS.items():
        body = body.replace(color, f"var(--{name})")
    body = re.sub(r"\n\s*", "\n", body)
    return f'<svg role="img" aria-label="{html.escape(label)}" {view[0]}>{body}'


def _color(kind: str, index: int) -> str:
    return _COLORS[f"{kind}-{index % NUM_STYLES}"]


def _marker(run: int) -> str:
    return MARKERS[run % NUM_STYLES]


def _line(index: int) -> Any:
    """Line style of a run or a text."""
    return (0, DASHES[index % NUM_STYLES]) if DASHES[index % NUM_STYLES] else "-"
