"""A table and figures of any measure: its file says which columns tell where it looked, and which what it found.

A line of the table is a run at a step, at one place of all axes but the first one of numbers, x, whose places stand
side by side while they are few. A figure has x along the bottom and a line a run; where there are many places of
another axis of numbers it is a heat map of that against x, one a run, of the run's last step; many steps have a heat
map too. A measure may instead ask for steps along the bottom and the mean over all axes of numbers, or for no figure.
What the papers print of the same model is a run of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.ticker import EngFormatter, MaxNLocator

from haste.files.artefact import fingerprint
from haste.report import cosines, overhead
from haste.report.content import NONE, Measured, Report
from haste.report.figures import INK, PRINTED, Panel, Style, draw_band, draw_line, new_figure, styles, to_svg
from haste.report.formats import Cell, Entry, Head, Table, number_cell, text_cell, to_text

SIDE_BY_SIDE = 12  # places of x that have a column each
APART = 3  # places of a second axis of numbers that have a panel each; more are a heat map
FADED = 0.35  # opacity of the lines of earlier steps
DIGITS = 3  # of the largest value, at least
QUOTED = {
    cosines.MEASURE: "of all alignment terms together, on training, images and noise of their own",
    overhead.MEASURE: "on machines of their own. Their GFLOP is a multiplication with its addition, a GMAC",
}


@dataclass(frozen=True)
class Findings:
    """All that one measure found.

    Attributes:
        name: of the measure, in the configuration.
        ones: its files.
        frame: their rows, with `run`, `seed` and `step`.
        x: the first axis of numbers that has several places; "" without one.
        others: further axes of numbers that have several places.
        words: axes of words.
        values: column of a value -> the column of its standard error, or "".
        teachers: what was measured of teachers in place of networks: teacher -> column -> value.
    """

    name: str
    ones: Sequence[Measured]
    frame: pd.DataFrame
    x: str
    others: Sequence[str]
    words: Sequence[str]
    values: Mapping[str, str]
    teachers: Mapping[str, Mapping[str, float]]

    @classmethod
    def of(cls, name: str, ones: Sequence[Measured]) -> Findings:
        """From the files of one measure."""
        rows = [
            {**row, "run": one.run, "seed": one.seed, "step": one.step} for one in ones for row in one.found["rows"]
        ]
        axes, values = ones[0].found["axes"], ones[0].found["values"]
        columns = ["run", "seed", "step", *axes, *values, *filter(None, values.values())]
        frame = pd.DataFrame(rows, columns=pd.Index(columns))
        if over := ones[0].found.get("pooled"):
            axes = [axis for axis in axes if axis != over]
            frame, values = _pooled(frame, ["run", "seed", "step", *axes], values)
        numbers = [axis for axis in axes if pd.api.types.is_numeric_dtype(frame[axis])]
        several = [axis for axis in numbers if frame[axis].nunique() > 1]
        words = [axis for axis in axes if axis not in numbers]
        teachers = {name: row for one in ones for name, row in one.found.get("teachers", {}).items()}
        return cls(name, ones, frame, several[0] if several else "", several[1:], words, values, teachers)

    @property
    def is_drawn(self) -> bool:
        """Whether it may have figures."""
        return self.ones[0].found.get("along") != "nothing"

    @property
    def over_steps(self) -> bool:
        """Whether figures have steps along the bottom."""
        asked = self.ones[0].found.get("along") == "step" or not self.x
        return asked and len(self.steps) > 1

    @property
    def steps(self) -> list[int]:
        """All steps, in order."""
        return sorted(self.frame["step"].unique())

    def seeds(self, run: str, step: int) -> set[int]:
        """The seeds of which there is a file."""
        return {one.seed for one in self.ones if (one.run, one.step) == (run, step)}

    def groups(self, frame: pd.DataFrame, columns: Sequence[str]) -> Iterator[tuple[tuple[Any, ...], pd.DataFrame]]:
        """Rows by their places in some columns, in the order in which they come; all of them without columns."""
        if not columns:
            yield (), frame
            return
        for place, part in frame.groupby(list(columns), sort=False):
            yield place if isinstance(place, tuple) else (place,), part

    @property
    def slug(self) -> str:
        """The name as files and anchors have it, different for every name."""
        plain = "".join(c if c.isascii() and c.isalnum() else "-" for c in self.name)
        return f"measure-{plain}" if plain == self.name else f"measure-{plain}-{fingerprint(self.name, 4)}"


def _pooled(
    frame: pd.DataFrame, places: Sequence[str], values: Mapping[str, str]
) -> tuple[pd.DataFrame, dict[str, str]]:
    """Each value's mean over groups of images, and a column of its standard error, that of independent groups."""
    errors = {name: f"{name} error" for name in values}
    found = frame.groupby(list(places), sort=False)
    parts = [found[name].agg(["mean", "sem"]).set_axis([name, error], axis=1) for name, error in errors.items()]
    return pd.concat(parts, axis=1).fillna(0.0).reset_index(), errors


def findings(report: Report) -> list[Findings]:
    """What every measure found, in the order of the configuration; those that found nothing are left out."""
    found = []
    for name in dict.fromkeys(one.name for one in report.measures):
        ones = [one for one in report.measures if one.name == name]
        ones = [*itertools.chain.from_iterable(cosines.with_published(report, ones))]
        found.append(Findings.of(name, [*overhead.with_published(report, ones)]))
    return [one for one in found if len(one.frame)]


def anchor(report: Report, one: Measured) -> str:
    """The id of the place on the page that says how a file was made; "" for a published one."""
    return "" if one.printed is not None else f"made-measure-{report.measures.index(one)}"


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def measure_tables(report: Report, drawn: Sequence[bool] = (True, False)) -> list[Table]:
    """A table a measure; only of those that may have figures, or may not, if `drawn` says so."""
    return [
        _table(report.seeds, lambda one: anchor(report, one), found)
        for found in findings(report)
        if found.is_drawn in drawn
    ]


def _table(seeds_of: Mapping[str, Sequence[int]], link_of: Callable[[Measured], str], found: Findings) -> Table:
    frame, value = found.frame, next(iter(found.values))
    wide = bool(found.x) and len(found.values) == 1 and frame[found.x].nunique() <= SIDE_BY_SIDE
    across = sorted(frame[found.x].unique()) if wide else []
    keys = [*(["step"] if len(found.steps) > 1 else []), *found.words, *found.others]
    keys += [found.x] if found.x and not wide else []
    entries, before = [], None
    for (run, step), part in found.groups(frame, ["run", "step"]):
        ones = [one for one in found.ones if (one.run, one.step) == (run, step)]
        seeds, link = seeds_of.get(run, [ones[0].seed]), link_of(ones[0])
        for place, lines in found.groups(part, [key for key in keys if key != "step"]):
            where = {"step": step, **dict(zip([key for key in keys if key != "step"], place, strict=True))}
            cells = [text_cell(run), *(_place(where[key]) for key in keys)]
            cell = functools.partial(_cell, found, seeds=seeds, link=link, printed=ones[0].printed)
            if wide:
                cells += [cell(lines[lines[found.x] == x], value) for x in across]
            else:
                cells += [cell(lines, name) for name in found.values]
            entries.append(Entry(cells, "" if ones[0].printed is None else "published", first=run != before))
            before = run
    for teacher, row in found.teachers.items():  # the same at every place
        measured = [_of_teacher(found, row, name) for name in ([value] * len(across) if wide else found.values)]
        entries.append(Entry([text_cell(f"teacher {teacher}"), *(Cell(NONE) for _ in keys), *measured], first=True))
    values = [f"{found.x} {x:g}" for x in across] or list(found.values)
    heads = [Head("run"), *(Head(key, key not in found.words) for key in keys), *(Head(name, True) for name in values)]
    title = f"{found.name}: {value} at each {found.x}" if wide else found.name
    return Table(found.slug, title, heads, entries, _notes(found, value))


def _place(value: Any) -> Cell:
    """Where it was looked: a number with its digits, or a word."""
    return text_cell(value) if isinstance(value, str) else Cell(f"{value:,g}", value)


def _cell(
    found: Findings, lines: pd.DataFrame, name: str, *, seeds: Sequence[int], link: str, printed: int | None
) -> Cell:
    """One value: with its standard error, or the mean over several seeds with their spread, where none is missing. A
    published one is as printed."""
    values, places = list(lines[name].dropna()), _places(found.frame[name])
    if printed is not None:
        return Cell(f"{values[0]:.{printed}f}", values[0]) if values else number_cell(None, places)
    if len(values) < len(seeds) or not values:
        text = "; ".join(f"{value:.{places}f}" for value in values)
        return Cell(text, link=link) if text else number_cell(None, places)
    error = found.values[name]
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else float(lines[error].iloc[0]) if error else None
    return number_cell(float(np.mean(values)), places, spread=spread, link=link)


def _of_teacher(found: Findings, row: Mapping[str, float], name: str) -> Cell:
    return number_cell(row[name], _places(found.frame[name]), spread=row.get(found.values[name]))


def _places(values: pd.Series) -> int:
    largest = float(values.abs().max())
    return min(6, max(0, DIGITS - 1 - math.floor(math.log10(largest)))) if largest else 0


def _notes(found: Findings, value: str) -> list[str]:
    """What is the same for all lines, and what the files say that was left out."""
    first, constant = found.ones[0].found, found.frame.nunique()
    said = [f"{axis} {found.frame[axis].iloc[0]:g}" for axis in _numbers(found) if constant[axis] == 1]
    said += [
        f"{name} {_words(setting)}"
        for name, setting in first.get("settings", {}).items()
        if name not in first["axes"] and setting != []
    ]
    notes = [f"{first['measure']}: {', '.join(said)}."]
    if found.values[value]:
        several = any(len(found.seeds(one.run, one.step)) > 1 for one in found.ones)
        notes.append(f"± is {'the spread over seeds of training, or with one ' if several else ''}the standard error.")
    left: dict[str, list[str]] = {}
    if quoted := list(dict.fromkeys(one.run for one in found.ones if one.printed is not None)):
        notes.append(
            f"In italics, and dotted in figures: what papers print ({'; '.join(quoted)}), {QUOTED[first['measure']]}. "
            "They are no results of this code."
        )
    for one in found.ones:
        for note in one.found["notes"]:
            left.setdefault(note, []).append(f"{one.run} at step {one.step:,}")
    return notes + [f"{note[0].upper()}{note[1:]}: {', '.join(dict.fromkeys(where))}." for note, where in left.items()]


def _numbers(found: Findings) -> list[str]:
    return [axis for axis in found.ones[0].found["axes"] if axis in found.frame and axis not in found.words]


def _words(value: Any) -> str:
    return "as configured" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def measure_panels(report: Report) -> list[tuple[str, list[Panel]]]:
    """Name -> figures of every measure that has something to draw: more than one place, or more than one step."""
    every, drawn = findings(report), styles(report)
    drawn |= {one.run: PRINTED for found in every for one in found.ones if one.printed is not None}
    found = [(one.name, list(_panels(one, drawn))) for one in every]
    return [(name, panels) for name, panels in found if panels]


def _panels(found: Findings, drawn: Mapping[str, Style]) -> Iterator[Panel]:
    if not found.is_drawn:
        return
    number, frame = itertools.count(), found.frame
    crowded = [axis for axis in found.others if frame[axis].nunique() > APART]
    last = frame[frame["step"] == frame.groupby("run")["step"].transform("max")]
    printed = {one.run for one in found.ones if one.printed is not None}

    def maps(value: str, part: pd.DataFrame, y: str, x: str) -> Iterator[Panel]:
        """A heat map of each run that has several places of both axes, and of each place of all others."""
        others = [axis for axis in (*found.words, *found.others) if axis not in (x, y)]
        for (run, *place), lines in found.groups(part, ["run", *others]):
            if min(lines[x].nunique(), lines[y].nunique()) > 1:
                title = ", ".join([value, run, *_where(found, others, place)])
                yield _heat_map(found, value, (x, y), lines, title, f"{found.slug}-{next(number)}")

    for value in found.values:
        if found.over_steps:
            for place, part in found.groups(frame, found.words):
                title = ", ".join([*([value] if len(found.values) > 1 or not place else []), *place])
                yield _lines(found, value, _averaged(found, value, part), title, drawn, f"{found.slug}-{next(number)}")
        elif found.x:
            yield from maps(value, last, crowded[0], found.x) if crowded else ()
            apart = [*found.words, *found.others]
            for place, part in found.groups(frame, apart):
                if not crowded or printed & {*part["run"]}:  # papers print one block, which is no map but a line
                    title = ", ".join([value, *_where(found, apart, place)])
                    yield _lines(found, value, part, title, drawn, f"{found.slug}-{next(number)}")
        if found.x and not found.over_steps and len(found.steps) > APART:
            yield from maps(value, frame, crowded[0] if crowded else found.x, "step")


def _where(found: Findings, axes: Sequence[str], place: Sequence[Any]) -> list[str]:
    return [f"{name} {at:g}" if name in found.others else str(at) for name, at in zip(axes, place, strict=True)]


def _averaged(found: Findings, value: str, part: pd.DataFrame) -> pd.DataFrame:
    """A line a run, seed and step: the mean over all axes of numbers. Its error is at most the mean of theirs."""
    columns = list(filter(None, (value, found.values[value])))
    return part.groupby(["run", "seed", "step"], sort=False)[columns].mean().reset_index()


def _lines(found: Findings, value: str, part: pd.DataFrame, title: str, drawn: Mapping[str, Style], name: str) -> Panel:
    """A line a run over x, earlier steps fainter; or over steps, where there is no x."""
    x, error = "step" if found.over_steps else found.x, found.values[value]
    figure, axes = new_figure(title, x)
    if x != "step" and pd.api.types.is_integer_dtype(part[x]):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if part[value].min() < 0 < part[value].max():
        axes.axhline(0, color=INK, lw=0.8, alpha=0.5)
    ends = []
    for (run, *step), lines in found.groups(part, ["run", *([] if found.over_steps else ["step"])]):
        last = not step or step[0] == found.frame.loc[found.frame["run"] == run, "step"].max()
        by_x = lines.groupby(x)
        mean, several = by_x[value].mean(), by_x[value].count().max() > 1
        spread = by_x[value].std(ddof=1).fillna(0) if several else by_x[error].mean().fillna(0) if error else 0 * mean
        if last:
            draw_band(axes, drawn[run], mean.index, mean, spread)
            ends.append(f"{run} {mean.iloc[-1]:.3g} at {x} {mean.index[-1]:g}")
        draw_line(axes, drawn[run], mean.index, mean, marker="o", alpha=1.0 if last else FADED)
    for teacher, row in found.teachers.items():
        ends.append(f"teacher {teacher} {row[value]:.3g}")
        axes.axhline(row[value], color=INK, lw=1.1, dashes=(8, 4), alpha=0.7)
        axes.annotate(teacher, (1, row[value]), xycoords=("axes fraction", "data"), ha="right", va="bottom", color=INK)
    faint = "Faint: earlier steps." if not found.over_steps and len(found.steps) > 1 else ""
    if found.over_steps and found.x:
        faint = f"The mean over {found.x}."
    if found.teachers:
        faint = f"Dashed: teachers, of the clean images. {faint}".strip()
    if dotted := [one.run for one in found.ones if one.printed is not None and one.run in set(part["run"])]:
        faint = f"Dotted: {'; '.join(dict.fromkeys(dotted))}. {faint}".strip()
    return Panel(title, "", faint, to_svg(figure, name, f"{title} over {x}: {'; '.join(ends)}"))


def _heat_map(
    found: Findings, value: str, axes_of: tuple[str, str], part: pd.DataFrame, title: str, name: str
) -> Panel:
    """One run's values, x along the bottom and y upwards, averaged over all other axes. Colours mean the same in all
    maps of a value; they are around 0 where signs differ."""
    x, y = axes_of
    table = part.pivot_table(index=y, columns=x, values=value, aggfunc="mean")
    figure, axes = new_figure(y, x)
    beside = {teacher: row[value] for teacher, row in found.teachers.items()}
    both = [*found.frame[value].dropna(), *beside.values()]
    most, signed = max(map(abs, both)) or 1.0, min(both) < 0
    low, colours = (-most, "PuOr") if signed else (0.0, "viridis")
    drawn = axes.pcolormesh(np.ma.masked_invalid(table.to_numpy()), vmin=low, vmax=most, cmap=colours)
    for ticks, labels, put in (
        (np.arange(table.shape[1]) + 0.5, table.columns, axes.set_xticks),
        (np.arange(table.shape[0]) + 0.5, table.index, axes.set_yticks),
    ):
        every = max(1, math.ceil(len(labels) / 10))
        put(ticks[::every], [_tick(str(labels.name), float(label)) for label in labels[::every]])
    axes.grid(visible=False)
    bar = figure.colorbar(drawn, ax=axes)
    bar.ax.tick_params(colors=INK)
    bar.outline.set_edgecolor(INK)  # type: ignore[operator]
    for colour, width in (("white", 3.5), (INK, 1.5)) if beside else ():  # to be seen on every colour
        bar.ax.hlines(list(beside.values()), 0, 1, color=colour, lw=width)
    bar.ax.set_ylabel(value + (f"; lines: {', '.join(beside)}" if beside else ""), color=INK, parse_math=False)
    top = float(np.nanmax(table.to_numpy()))
    spoken = f"{title} by {x} and {y}: from {float(np.nanmin(table.to_numpy())):.3g} to {top:.3g}"
    when = f"step {int(part['step'].iloc[0]):,}"
    if x == "step":
        when = "over steps" if y == found.x else f"over steps, the mean over {found.x}"
    said = ", ".join(f"{teacher} {at:.3g}" for teacher, at in beside.items())
    caption = f"{title}, {when}." + (f" Lines on the scale: teachers, of the clean images: {said}." if said else "")
    return Panel(title, "", caption, to_svg(figure, name, spoken))


def _tick(axis: str, at: float) -> str:
    return EngFormatter(sep="")(at) if axis == "step" else f"{at:g}"


# ---------------------------------------------------------------------------------------------------------------------
# A terminal


def terminal(name: str, run: str, found: Mapping[str, Any], width: int | None = None) -> str:
    """What one file says, for a terminal. The run's column is left out: the title says which state it is."""
    one = Measured(name, run, 0, found["state"]["step"], found)
    if not found["rows"]:
        return f"{name} of {run}: nothing could be measured\n" + "".join(f"  {note}\n" for note in found["notes"])
    table = _table({}, lambda _: "", Findings.of(name, [one]))
    entries = [dataclasses.replace(entry, cells=entry.cells[1:]) for entry in table.entries]
    table = dataclasses.replace(table, heads=table.heads[1:], entries=entries)
    state = f"{run} ({found['state']['trajectory']}), step {one.step:,}"
    return to_text([table], f"{name} of {state}", width)
