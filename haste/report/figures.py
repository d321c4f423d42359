"""Figures as inline SVG: scores over steps, losses over steps.

They do not name runs: a run's colour and dash are the same in every figure, and the page shows one legend.
Ink is `currentColor` without a background, so that a figure is readable in light mode, dark mode and print.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter

from haste.align.terms import kind_of
from haste.files import journal
from haste.report import papers
from haste.report.compare import (
    METRICS,
    Comparison,
    comparisons,
    curve,
    floor_value,
    lines,
    reconstructed_value,
    seeds_of,
)
from haste.report.content import Curve, Report, Trunk

# Okabe and Ito, "Color Universal Design" (2008), less black and yellow, which vanish in the dark or on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
# Curves of runs that share a trunk overlap: dashes let the line below show through, and distinguish runs in grey.
DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2), (1.5, 1.5), (6, 2, 1.5, 2))
INK = "#010203"  # placeholder for the text's colour until the SVG is written
TEXT: dict[Any, Any] = {"font.family": "sans-serif", "font.size": 9.5, "svg.fonttype": "none"}
SIZE = (4.4, 3.0)  # inches: small, so that the text is still readable when a phone shrinks the figure
WIDTH = 1.9  # of a line, in points
WIDE = 8.0  # ratio of the largest to the smallest value from which an axis is logarithmic
POINTS = 400  # most points of a line
LOSSES = {
    "loss": "denoising loss",
    "features": "feature alignment loss",
    "attention": "attention alignment loss",
    "images_per_s": "training images per second",
}
KNOWN = journal.NOT_LOSSES | {"denoising", *LOSSES}  # what else a log has are parts of the denoising loss


@dataclass(frozen=True)
class Style:
    """How a run is drawn: colour, dash pattern in points, and the steps at which its terms stop ("" is all terms)."""

    colour: str
    dash: tuple[float, ...]
    stops: Mapping[str, int]
    method: str
    trunk: Trunk | None = None

    @property
    def dash_array(self) -> str:
        """The pattern for a legend, in pixels, multiplied by the line's width as matplotlib does."""
        return " ".join(f"{WIDTH * length:g}" for length in self.dash) or "none"


Drawn = tuple[np.ndarray, np.ndarray, np.ndarray]  # steps, means, spreads
PRINTED = Style(INK, (1.5, 1.5), {}, "")  # what papers print


@dataclass(frozen=True)
class Panel:
    """A figure of the page. `svg` is an element that goes into HTML unchanged."""

    title: str
    protocol: str
    caption: str
    svg: str


def styles(report: Report) -> dict[str, Style]:
    """The style of every run, in the order in which runs appear."""
    known = {row.run: row for row in report.rows}
    found = {}
    shown = [row.run for row in report.rows] + [one.run for one in report.curves]
    shown += [one.run for one in report.measures] + [one.run for one in report.read]
    for place, run in enumerate(dict.fromkeys(shown)):
        row = known.get(run)
        stops = _stops(row.stop if row else "")
        dash = DASHES[(place + place // len(PALETTE)) % len(DASHES)]
        colour = PALETTE[place % len(PALETTE)]
        found[run] = Style(colour, dash, stops, row.method if row else "", report.trunks.get(run))
    return found


def _stops(text: str) -> dict[str, int]:
    """Steps from a table's text: `300`, `features 100, attention 200`, `never`, or `300 by plateau`.

    Seeds that stop at different steps, `300 to 400`, have no single step, nor if only some of them stop.
    """
    found = re.findall(r"(?:^|(features(?:-\d+)?|attention) )(\d+)(?=$|,| by )(?! by \S+ in \d)", text)
    return {kind: int(step) for kind, step in found}


def score_panels(report: Report, besides: Comparison | None = None) -> list[Panel]:
    """Scores over steps, one figure per set of scores that may be compared. With several seeds a line is the mean,
    with a band of one sample standard deviation, at steps where no seed is missing.

    Scores of a single step are only in the table; those of `besides` are shown elsewhere.
    """
    drawn = styles(report)
    groups = [g for g in comparisons(report) if g.column.metric in METRICS and len({p.step for p in g.points}) > 1]
    return [score_panel(report, g, drawn, f"score{i}") for i, g in enumerate(groups) if g != besides]


def score_panel(report: Report, group: Comparison, drawn: Mapping[str, Style], name: str) -> Panel:
    """One set of scores over steps; `name` begins the ids in its SVG."""
    floor, again = floor_value(report, group.column), reconstructed_value(report, group.column)
    models = {row.model for row in report.rows}
    title = group.column.name + (f", {group.model}" if len(models) > 1 else "")
    figure, axes = new_figure(title)
    ends, whole = dict[str, tuple[float, int]](), dict[str, Drawn]()
    values = [p.value for p in group.points] + [value for value in (floor, again) if value is not None]
    rings = _printed(report, group)
    for run, pairs in rings.items():
        axes.plot(*zip(*pairs, strict=True), "o", ms=6, mfc="none", mec=drawn[run].colour)
        values += [value for _, value in pairs]
    for run in dict.fromkeys(p.run for p in group.points):
        points = [(s, found) for s, found in curve(group, run, seeds_of(report, run)) if not found.missing]
        if points:
            parts = np.array([(s, found.mean, found.spread or 0.0) for s, found in points], dtype=float)
            whole[run] = parts[:, 0], parts[:, 1], parts[:, 2]
            ends[run] = (points[-1][1].mean, points[-1][0])
    for run, line in whole.items():
        steps, means, spread, own = _forked(line, drawn[run].trunk, whole, logarithmic=_wide(values))
        draw_band(axes, drawn[run], steps, means, spread)
        draw_line(axes, drawn[run], steps, means)
        draw_dots(axes, drawn[run], steps[own:], means[own:])
    _scale(axes, values)
    _mark_stops(axes, [drawn[run] for run in ends])
    dashed = foot_lines(report, group, axes)
    caption = dashed + ("Rings: what papers print for the same model and method." if rings else "")
    return Panel(title, group.protocol, caption.strip(), to_svg(figure, name, _spoken(title, ends, floor)))


def _forked(
    line: Drawn, trunk: Trunk | None, others: Mapping[str, Drawn], logarithmic: bool = False, dense: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """The part of a run's line that is its own: it begins with its first point that the run whose states it shares
    before lacks or, where that is after the fork or lines are dense, on the other's line where it leaves that. Also
    the number of points in front that were not measured."""
    steps, values, spread = line
    if trunk is None or trunk.run not in others:
        return steps, values, spread, 0
    theirs, at = others[trunk.run], trunk.step
    before = steps <= at
    same = before & np.isin(steps, theirs[0])
    shared = np.interp(steps, theirs[0], theirs[1])
    if not theirs[0][0] <= at <= theirs[0][-1] or not np.allclose(values[same], shared[same], rtol=1e-3):
        return steps, values, spread, 0
    if not dense and (before & ~same).any():
        first = int(np.argmax(before & ~same))
        return steps[first:], values[first:], spread[first:], 0
    height = np.exp(np.interp(at, theirs[0], np.log(theirs[1]))) if logarithmic else np.interp(at, *theirs[:2])
    start = [np.array([one]) for one in (at, height, np.interp(at, theirs[0], theirs[2]))]
    own = (np.concatenate([one, part[~before]]) for one, part in zip(start, line, strict=True))
    return *own, 1  # type: ignore[return-value]


def foot_lines(report: Report, group: Comparison, axes: Axes, upright: bool = False) -> str:
    """Draw what real images, and these as the autoencoder gives them back, measure; returns the words for a caption."""
    said, draw = [], axes.axvline if upright else axes.axhline
    ways = ("dashed", "real images against real ones", (8, 4), floor_value), (
        "dotted", "decoded latents of real images", (1.5, 2.5), reconstructed_value
    )  # fmt: skip
    for look, of, dash, value_of in ways:
        if (value := value_of(report, group.column)) is not None:
            draw(value, color=INK, lw=1.1, dashes=dash, alpha=0.7)
            said.append(f"{look}: {of}, {value:.3g}")
    text = "; ".join(said)
    return f"{text[:1].upper()}{text[1:]}. " if text else ""


def _printed(report: Report, group: Comparison) -> dict[str, list[tuple[int, float]]]:
    """Run -> (step, score) as papers print them, between the first and the last step that is drawn."""
    if not papers.comparable(group.column, report.benchmark):
        return {}
    steps, found = [p.step for p in group.points], {}
    table = lines(report)
    for run, row in {p.run: table[p.line].first for p in group.points}.items():
        ones = papers.along(row, report.benchmark, max(steps))
        pairs = [(one.step, one.scores.get(group.column.metric)) for one in ones]
        found[run] = [(step, float(text)) for step, text in pairs if text and step >= min(steps)]
    return {run: pairs for run, pairs in found.items() if pairs}


def _spoken(title: str, ends: Mapping[str, tuple[float, int]], floor: float | None) -> str:
    """A figure's text for screen readers: the last value of every line."""
    said = [f"{run} {value:.3g} at step {step:,}" for run, (value, step) in ends.items()]
    return f"{title} over training steps: {'; '.join(said)}" + ("" if floor is None else f"; floor {floor:.3g}")


def loss_panels(report: Report) -> list[Panel]:
    """Smoothed training curves, one figure per quantity that some run logged; parts of the denoising loss come last."""
    drawn, titles = styles(report), dict(LOSSES)
    for record in (record for one in report.curves for record in one.records):
        titles |= {key: _title(key) for key in record if key not in KNOWN and key not in titles}
    panels = [_loss_panel(report.curves, key, title, drawn) for key, title in titles.items()]
    return [panel for panel in panels if panel is not None]


def _title(key: str) -> str:
    kind = kind_of(key)
    return f"{LOSSES[kind]} ({key})" if kind in LOSSES and kind != key else f"{key}, of the denoising loss"


def _loss_panel(curves: Sequence[Curve], key: str, title: str, drawn: Mapping[str, Style]) -> Panel | None:
    lines = {run: averaged([c for c in curves if c.run == run], key) for run in dict.fromkeys(c.run for c in curves)}
    lines = {run: line for run, line in lines.items() if len(line[1])}
    if not lines:
        return None
    figure, axes = new_figure(title)
    for run, line in lines.items():
        steps, values, spread, _ = _forked(line, drawn[run].trunk, lines, dense=True)
        draw_band(axes, drawn[run], steps, values, spread)
        draw_line(axes, drawn[run], steps, values)
    _scale(axes, np.concatenate([values for _, values, _ in lines.values()]))
    _mark_stops(axes, [drawn[run] for run in lines], key if kind_of(key) in ("features", "attention") else "")
    ends = "; ".join(f"{run} {values[-1]:.3g} at step {steps[-1]:,.0f}" for run, (steps, values, _) in lines.items())
    return Panel(title, "", "", to_svg(figure, f"log-{key}", f"{title} over training steps: {ends}"))


def averaged(curves: Sequence[Curve], key: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps, mean and sample standard deviation of one logged quantity over a run's seeds, each smoothed separately.

    Seeds that logged other steps are interpolated at the first seed's, as far as all of them reach.
    """
    found = [line for line in (series(one, key) for one in curves) if len(line[0])]
    if not found:
        return np.empty(0), np.empty(0), np.empty(0)
    low, high = max(steps[0] for steps, _ in found), min(steps[-1] for steps, _ in found)
    steps = found[0][0][(found[0][0] >= low) & (found[0][0] <= high)]
    values = np.stack([np.interp(steps, own, v) for own, v in found])
    return steps, values.mean(axis=0), values.std(axis=0, ddof=1) if len(found) > 1 else np.zeros(len(steps))


def series(curve: Curve, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and smoothed values of one logged quantity; records without it, or with NaN, are left out.

    Many records are averaged into `POINTS` bins; losses are then smoothed with a half-life of a fiftieth of the line
    (exponentially weighted, bias-corrected, causal: a line never shows an effect before its cause). The
    speed jumps where alignment stops; a running median keeps the jump, which a mean would turn into a ramp.
    """
    records = [r for r in curve.records if r.get(key) is not None and math.isfinite(r[key])]
    if not records:
        return np.empty(0), np.empty(0)
    pairs = np.array([(r["step"], r[key]) for r in records], dtype=np.float64)
    bins = np.array([part.mean(axis=0) for part in np.array_split(pairs, min(POINTS, len(pairs)))])
    values, window = pd.Series(bins[:, 1]), len(bins) / 50
    if key == "images_per_s":
        return bins[:, 0], values.rolling(2 * int(window) + 1, center=True, min_periods=1).median().to_numpy()
    return bins[:, 0], values.ewm(halflife=window).mean().to_numpy()


# ---------------------------------------------------------------------------------------------------------------------
# Drawing


def new_figure(title: str, x: str = "step") -> tuple[Figure, Axes]:
    """An empty figure with ink on its axes: `title` along y, `x` along x, steps in thousands."""
    with matplotlib.rc_context(TEXT):
        figure = Figure(figsize=SIZE, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
    dress(axes, title, x)
    return figure, axes


def dress(axes: Axes, title: str, x: str = "step") -> None:
    """Ink on axes, as `new_figure` has it."""
    axes.set_xlabel(x, color=INK, parse_math=False)
    axes.set_ylabel(title, color=INK, parse_math=False)  # a detector's name may hold a $
    if x == "step":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(which="both", colors=INK)
    axes.grid(axis="y", color=INK, alpha=0.12, lw=0.7)
    axes.margins(x=0.03)


def draw_line(
    axes: Axes, style: Style, steps: Iterable[float], values: Iterable[float], marker: str = "", alpha: float = 1.0
) -> None:
    """A run's line."""
    (line,) = axes.plot(list(steps), list(values), color=style.colour, lw=WIDTH, marker=marker, ms=4, alpha=alpha)
    if style.dash:
        line.set_dashes(style.dash)


def draw_dots(axes: Axes, style: Style, steps: Iterable[float], values: Iterable[float]) -> None:
    """A run's measured points."""
    axes.plot(list(steps), list(values), "o", color=style.colour, ms=4)


def draw_band(
    axes: Axes, style: Style, steps: Iterable[float], values: Iterable[float], spread: Iterable[float]
) -> None:
    """A band of one standard deviation around a line, if there is any spread."""
    x, middle, half = (np.asarray(list(part), dtype=float) for part in (steps, values, spread))
    if half.any():
        axes.fill_between(x, middle - half, middle + half, color=style.colour, alpha=0.18, lw=0)


def _wide(values: Iterable[float]) -> bool:
    """Whether values span so wide a range that their axis is logarithmic."""
    array = np.asarray(list(values))
    return array.min() > 0 and array.max() / array.min() >= WIDE


def _scale(axes: Axes, values: Iterable[float]) -> None:
    """A logarithmic axis if the values span a wide range; otherwise a linear one."""
    if not _wide(values):
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _mark_stops(axes: Axes, runs: Iterable[Style], term: str = "") -> None:
    """A vertical line where a run's alignment stops, with the step beside it if there are few. The figure of one
    term shows only that term's stops."""
    low, high = axes.get_xlim()
    found = [
        (step, s) for s in reversed(list(runs)) for kind, step in s.stops.items() if not (term and kind) or kind == term
    ]
    stops = {step: style for step, style in found if low <= step <= high}
    for stop, style in stops.items():
        axes.axvline(stop, color=style.colour, lw=1.1, dashes=(1.5, 2.5))
        if len(stops) <= 3:  # above the axes, where no line passes
            side = "right" if stop > low + 0.8 * (high - low) else "center"
            place = axes.get_xaxis_transform()
            axes.text(stop, 1.01, f"stop {stop:,}", transform=place, ha=side, va="bottom", fontsize=8, color=INK)


def to_svg(figure: Figure, name: str, spoken: str) -> str:
    """The figure as an <svg> element: text stays text, ids are unique within the page, no link leads outside."""
    buffer = io.StringIO()
    settings: dict[Any, Any] = TEXT | {"svg.hashsalt": name}
    with matplotlib.rc_context(settings):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    body = svg[svg.index(">") + 1 :]
    width, height = (72 * inches for inches in SIZE)
    edits: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
        (r"font-family:[^;\"]*;?|font: *([\d.]+px)[^;\"]*", lambda m: f"font-size: {m[1]}" if m[1] else ""),
        (r"xlink:href", "href"),
        (r'\bid="', f'id="{name}-'),
        (r'href="#|url\(#', lambda m: f"{m[0]}{name}-"),
        (INK, "currentColor"),
    ]
    for pattern, replacement in edits:
        body = re.sub(pattern, replacement, body)
    label = escape(spoken, quote=True)
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{label}">{body}'
