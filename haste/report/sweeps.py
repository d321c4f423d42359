"""Figures of guidance sweeps (REPA, Tables 9 and 10): distances over the guidance scale and over its interval's end.

In both, a line joins results that differ in nothing but what is along the bottom. What papers print for the same model,
method and step is dotted; its scales and intervals need not be those measured here.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from haste.report import papers
from haste.report.compare import Line, columns, guidance, lines, protocol_text
from haste.report.content import Report, Row
from haste.report.figures import INK, PRINTED, Panel, Style, draw_line, new_figure, styles, to_svg

AXES = {"w": "guidance scale w", "interval": "upper end of the guidance interval"}
# A guidance (scale, low, high) -> what is along the bottom, and what all points of a line share, in words.
_PLACES = {
    "w": lambda w, low, high: (w, f"[{low:g}, {high:g}]"),
    "interval": lambda w, low, high: (high, f"w = {w:g}" + ("" if low == 0 else f", from {low:g}")),
}


@dataclass(frozen=True)
class _Point:
    """A distance at a guidance; `run` is "" for a published one."""

    run: str
    guidance: tuple[float, float, float]
    value: float


def guidance_panels(report: Report) -> list[Panel]:
    """A figure for each detector, model, step and way of sampling in which some run has several scales or intervals.

    Points are means over the seeds, where none is missing.
    """
    found, number, drawn = [], itertools.count(), styles(report)
    for (score, inception, model, step, protocol), part in _scenes(report).items():
        measured = [_Point(line.first.run, guidance(line.first.score), value) for line, value in part]
        printed = _printed(report, [line.first for line, _ in part]) if inception else []
        for kind in AXES:
            if curves := _curves(kind, measured):
                title = f"{score}, {model}, step {step:,}"
                name = f"sweep{next(number)}"
                found.append(_panel(kind, title, protocol, curves, _curves(kind, printed), drawn, name))
    return found


def _scenes(report: Report) -> dict[tuple[str, bool, str, int, str], list[tuple[Line, float]]]:
    """The guided distances by heading, whether it is FID, model, step, and way of sampling but for the guidance."""
    distances = [column for column in columns(report) if column.metric == "fd" and column.guidance != "none"]
    scenes: dict[tuple[str, bool, str, int, str], list[tuple[Line, float]]] = {}
    for line in lines(report):
        row = line.first
        for column in distances:
            summary = line.summary(column)
            if summary is not None and not summary.missing:
                scene = (column.title, column.inception, row.model, row.step, protocol_text(row.score, guided=False))
                scenes.setdefault(scene, []).append((line, summary.mean))
    return scenes


def _printed(report: Report, rows: Sequence[Row]) -> list[_Point]:
    """What papers print for the models, methods and step of some rows, at any guidance."""
    ones = {id(one): one for row in rows for one in papers.of_model(row, report.benchmark)}
    return [
        _Point(f"{one.method}, {one.source}", one.guidance, float(one.scores["fd"]))
        for one in ones.values()
        if one.step == rows[0].step and one.guidance and one.guidance[0] > 1
    ]


def _curves(kind: str, points: Sequence[_Point]) -> dict[tuple[str, str], dict[float, float]]:
    """(run, what its points share) -> place along the bottom -> distance; of at least two places."""
    found: dict[tuple[str, str], dict[float, float]] = {}
    for point in points:
        x, shared = _PLACES[kind](*point.guidance)
        found.setdefault((point.run, shared), {}).setdefault(x, point.value)
    return {key: dict(sorted(curve.items())) for key, curve in found.items() if len(curve) > 1}


def _panel(
    kind: str,
    title: str,
    protocol: str,
    curves: Mapping[tuple[str, str], Mapping[float, float]],
    printed: Mapping[tuple[str, str], Mapping[float, float]],
    drawn: Mapping[str, Style],
    name: str,
) -> Panel:
    figure, axes = new_figure(title.split(",")[0], AXES[kind])
    several, said = len({shared for _, shared in [*curves, *printed]}) > 1, []
    for place, ((run, shared), curve) in enumerate([*printed.items(), *curves.items()]):
        draw_line(axes, drawn.get(run, PRINTED), curve, curve.values(), marker="o")
        best = min(curve, key=lambda x: curve[x])
        said.append(f"{run}, {shared}: {curve[best]:.3g} at {best:g}")
        if several:  # what a line's points share, behind its end or before its beginning, so that fewer overlap
            at, shift, side = ((-1, 4, "left"), (0, -4, "right"))[place % 2]
            where = list(curve.items())[at]
            axes.annotate(
                shared, where, (shift, 0), "data", "offset points", ha=side, va="center", fontsize=8, color=INK
            )
    if several:
        axes.margins(x=0.2)
    caption = f"{title} over the {AXES[kind]}." + (f" Dotted: {_sources(printed)}." if printed else "")
    return Panel(title, protocol, caption, to_svg(figure, name, f"{caption} Lowest: {'; '.join(said)}"))


def _sources(printed: Mapping[tuple[str, str], Mapping[float, float]]) -> str:
    return "; ".join(dict.fromkeys(run for run, _ in printed))
