"""Accuracy of linear probes beside Fréchet distances (REPA, Tables 2 and 8, Figure 1): a column and a figure.

A probe is any measure of the kind `probe` with a value `accuracy` in 0..1. Papers print one accuracy a network: here it
is that of the best layer and t.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from haste.report import papers
from haste.report.compare import seeds_of
from haste.report.content import Measured, Report
from haste.report.figures import INK, Panel, draw_line, new_figure, styles, to_svg
from haste.report.finding import headline
from haste.report.formats import Cell, number_cell
from haste.report.measures import anchor

KIND, VALUE = "probe", "accuracy"
TITLE = "Acc."


@dataclass(frozen=True)
class Accuracy:
    """Accuracies in % of a run's probes at one step, by seed, and the first seed's place on the page."""

    values: Mapping[int, float]
    link: str

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(self.values.values())


def accuracies(report: Report) -> dict[tuple[str, int], Accuracy]:
    """The accuracy of every run and step that has one for all its seeds."""
    found: dict[tuple[str, int], list[Measured]] = {}
    for one in report.measures:
        if one.found["measure"] == KIND and VALUE in one.found["values"] and one.found["rows"]:
            found.setdefault((one.run, one.step), []).append(one)
    every = {
        place: Accuracy({one.seed: _best(one) for one in reversed(ones)}, anchor(report, ones[0]))
        for place, ones in found.items()
    }
    return {(run, step): one for (run, step), one in every.items() if {*seeds_of(report, run)} <= {*one.values}}


def _best(one: Measured) -> float:
    return 100 * max(row[VALUE] for row in one.found["rows"])


def cell(accuracy: Accuracy | None) -> Cell:
    """An accuracy in a table, with its spread over several seeds."""
    if accuracy is None:
        return number_cell(None, 1)
    values = list(accuracy.values.values())
    spread = statistics.stdev(values) if len(values) > 1 else None
    return number_cell(accuracy.mean, 1, spread=spread, link=accuracy.link)


def scatter(report: Report) -> Panel | None:
    """Distances against accuracies, a line a run through its steps; published pairs of the same models are rings.

    The distance is that of the headline. None if no run has both.
    """
    group, probed = headline(report), accuracies(report)
    if group is None:
        return None
    pairs: dict[str, dict[int, list[float]]] = {}
    for point in group.points:
        if (point.run, point.step) in probed:
            pairs.setdefault(point.run, {}).setdefault(point.step, []).append(point.value)
    if not pairs:
        return None
    title, drawn = group.column.name, styles(report)
    figure, axes = new_figure(title, "accuracy of the linear probe, %")
    said = []
    for run, steps in pairs.items():
        x = [probed[run, step].mean for step in sorted(steps)]
        y = [statistics.fmean(steps[step]) for step in sorted(steps)]
        draw_line(axes, drawn[run], x, y, marker="o")
        said.append(f"{run} {y[-1]:.3g} at {x[-1]:.3g} %")
    rings = _published(report, group.model) if group.column.inception and group.column.guidance == "none" else []
    axes.plot([x for x, _ in rings], [y for _, y in rings], "o", ms=5, mfc="none", mec=INK, alpha=0.6)
    caption = f"{title} against accuracy, the best of all layers and t; a line joins a run's steps." + (
        f" Rings: what papers print for {group.model}, {papers.SAMPLES:,} samples." if rings else ""
    )
    return Panel(title, group.protocol, caption, to_svg(figure, "accuracy", f"{caption} {'; '.join(said)}"))


def _published(report: Report, model: str) -> Sequence[tuple[float, float]]:
    """Accuracy in % and FID of published results of a model, at any method and step."""
    if report.benchmark is None or report.benchmark.data != "ImageNet":
        return []
    return [
        (float(one.accuracy), float(one.scores["fd"]))
        for one in papers.published()
        if one.accuracy and (one.resolution, one.model) == (report.benchmark.resolution, model)
    ]
