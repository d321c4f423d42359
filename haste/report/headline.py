"""The figure of the first screen: the distances that the headline quotes, over steps or, at a single step, by run."""

from __future__ import annotations

from haste.report import figures
from haste.report.content import Report
from haste.report.figures import INK, WIDTH, Panel
from haste.report.finding import headline, headline_runs


def headline_panel(report: Report) -> Panel | None:
    """None before there is a distance."""
    group = headline(report)
    if group is None:
        return None
    if len({p.step for p in group.points}) > 1:
        return figures.score_panel(report, group, figures.styles(report), "headline")
    drawn, runs = figures.styles(report), headline_runs(report)
    figure, axes = figures.new_figure("", group.column.name)
    for place, (run, (found, noise)) in enumerate(runs.items()):
        spread = None if noise is None else 2 * noise[0]
        axes.errorbar(found.mean, place, xerr=spread, color=drawn[run].colour, fmt="o", ms=5, lw=WIDTH)
    axes.set_yticks(range(len(runs)), list(runs), parse_math=False)
    axes.invert_yaxis()
    axes.margins(y=0.5 / max(1, len(runs)))
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=INK, alpha=0.12, lw=0.7)
    bars = "Bars: twice the standard error. " if any(noise for _, noise in runs.values()) else ""
    caption = bars + figures.foot_lines(report, group, axes, upright=True)
    said = "; ".join(f"{run} {found.mean:.3g}" for run, (found, _) in runs.items())
    return Panel(
        group.column.name,
        group.protocol,
        caption.strip(),
        figures.to_svg(figure, "headline", f"{group.column.name}: {said}"),
    )
