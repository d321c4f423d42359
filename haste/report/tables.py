"""What a report is made of, which of its scores may be compared, and its table as CSV, Markdown, HTML and plain text.

Scores are compared only within a `Comparison`: the same model, detector, reference, sample count and way of
sampling. Guided and unguided results never share a column, of whatever metric.
"""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from haste.artefact import canonical, replacing

NONE = "–"  # what a cell without a value shows


@dataclass(frozen=True)
class Row:
    """One score of one run. `stop` is "–" (no alignment), "never", or the step alignment stopped at."""

    run: str
    model: str
    method: str
    stop: str
    seed: int
    step: int
    score: Mapping[str, Any]  # a score file, parsed


@dataclass(frozen=True)
class Curve:
    """What a run logged, along its lineage, by step: step, loss (denoising), features and attention while aligned,
    images_per_s, ..."""

    run: str
    seed: int
    records: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Grid:
    """A PNG of samples, one column a class; `labels` names the columns along its rows."""

    run: str
    step: int
    image: Path
    labels: Sequence[str]


@dataclass(frozen=True)
class Part:
    """A network that the pipeline trained for itself (`part`: autoencoder, teacher, detector) and how good it is."""

    name: str
    part: str
    quality: Mapping[str, Any]
    provenance: Mapping[str, Any]


@dataclass(frozen=True)
class Stage:
    """A kind of job: how many ran, and their wall time in seconds, summed."""

    name: str
    jobs: int
    seconds: float


@dataclass(frozen=True)
class Report:
    """All that a page shows. `floor` is the score of real images against real ones."""

    name: str
    title: str
    description: str
    rows: Sequence[Row]
    floor: Mapping[str, Any] | None
    curves: Sequence[Curve]
    grids: Sequence[Grid]
    parts: Sequence[Part]
    stages: Sequence[Stage]
    provenance: Mapping[str, Any]
    config_text: str
    notes: Sequence[str] = ()


# ---------------------------------------------------------------------------------------------------------------------
# Columns and comparisons


@dataclass(frozen=True)
class Metric:
    """How a score is named and read. `lower` is None where neither direction is better."""

    label: str
    lower: bool | None
    names_detector: bool = False
    decimals: int = 3


METRICS = {
    "fd": Metric("FD", lower=True, names_detector=True, decimals=1),
    "sfid": Metric("sFID", lower=True, decimals=1),
    "kid": Metric("KID", lower=True, names_detector=True, decimals=4),
    "is": Metric("IS", lower=False, decimals=1),
    "precision": Metric("precision", lower=False),
    "recall": Metric("recall", lower=False),
    "class_accuracy": Metric("class accuracy", lower=False),
}
IDENTITY = ["run", "model", "method", "stop", "seed", "step"]
PROTOCOL = ["sampler", "NFE", "guidance", "labels", "samples"]
NUMBERS = ["seed", "step", "NFE", "samples"]
FLOOR_NAME = "real against real"


@dataclass(frozen=True)
class Column:
    """One metric under one detector and one guidance."""

    metric: str
    detector: str
    guidance: str

    @property
    def name(self) -> str:
        known = metric(self.metric)
        detector = f" ({self.detector})" if known.names_detector else ""
        return known.label + detector + ("" if self.guidance == "none" else f", w={self.guidance}")


@dataclass(frozen=True)
class Point:
    """A value in a comparison; `index` is the row's place in `ordered(report)`."""

    run: str
    method: str
    seed: int
    step: int
    value: float
    index: int


@dataclass
class Comparison:
    """Scores of one column that were measured in the same way on the same model, so that they may be compared."""

    column: Column
    model: str
    protocol: str
    points: list[Point] = field(default_factory=list)


def metric(key: str) -> Metric:
    """How to show a score; one that is not known keeps its name and is never marked as best."""
    return METRICS.get(key, Metric(key.replace("_", " "), lower=None))


def guidance_text(score: Mapping[str, Any]) -> str:
    """`none` (also for w <= 1, which guides nothing), `1.5`, or `1.5 on [0, 0.7]`."""
    sampling = score.get("sampling") or {}
    weight = float(sampling.get("guidance") or 1.0)
    if weight <= 1.0:
        return "none"
    low, high = sampling.get("interval") or (0, 1)
    return f"{weight:g}" if (low, high) == (0, 1) else f"{weight:g} on [{low:g}, {high:g}]"


def ordered(report: Report) -> list[Row]:
    """The rows by step; within a step in the report's order, which is the configuration's."""
    return sorted(report.rows, key=lambda row: row.step)


def _scores(score: Mapping[str, Any], where: str) -> dict[Column, float]:
    """The finite values of a score file by column."""
    found, detector = score.get("scores"), (score.get("detector") or {}).get("name")
    if not isinstance(found, Mapping) or detector is None:
        raise ValueError(f"{where}: found keys {sorted(score)}, expected a score with 'scores' and 'detector'")
    guidance = guidance_text(score)
    values = {Column(key, detector, guidance): value for key, value in found.items() if value is not None}
    return {column: float(value) for column, value in values.items() if math.isfinite(value)}


def _row_scores(row: Row) -> dict[Column, float]:
    return _scores(row.score, f"run {row.run!r}, step {row.step}")


def floor_value(report: Report, column: Column) -> float | None:
    """What real images score against real ones; they know no guidance, so it stands under guided columns too."""
    if report.floor is None:
        return None
    found = {(c.metric, c.detector): value for c, value in _scores(report.floor, "the floor").items()}
    return found.get((column.metric, column.detector))


def columns(report: Report) -> list[Column]:
    """All columns of scores: unguided first, then by detector and guidance as they appear, metrics in a fixed order."""
    found = {column: None for row in ordered(report) for column in _row_scores(row)}
    if not found and report.floor is not None:
        found = dict.fromkeys(_scores(report.floor, "the floor"))
    blocks = list(dict.fromkeys((c.guidance, c.detector) for c in found))
    blocks.sort(key=lambda block: block[0] != "none")
    rank = {key: place for place, key in enumerate(METRICS)}
    return sorted(found, key=lambda c: (blocks.index((c.guidance, c.detector)), rank.get(c.metric, len(rank))))


def _protocol_key(score: Mapping[str, Any]) -> str:
    """Two scores may be compared where this is equal. The noise's seed may differ, and what the sampling is called; NFE
    follows from the sampler, and without guidance its interval says nothing."""
    sampling = {k: v for k, v in (score.get("sampling") or {}).items() if k not in ("seed", "name", "preset")}
    if sampling.get("guidance", 1.0) <= 1.0:
        sampling |= {"guidance": 1.0, "interval": None}
    return canonical([sampling, score.get("samples"), score.get("reference"), score.get("detector")])


def _protocol_text(score: Mapping[str, Any]) -> str:
    sampling, guidance = score.get("sampling") or {}, guidance_text(score)
    reference = (score.get("reference") or {}).get("images")
    words = [
        str(sampling["sampler"]) if "sampler" in sampling else None,
        f"{sampling['steps']} steps" if sampling.get("steps") else None,
        "no guidance" if guidance == "none" else f"guidance {guidance}",
        f"{sampling['labels']} labels" if "labels" in sampling else None,
        f"{score['samples']:,} samples" if score.get("samples") else None,
    ]
    text = ", ".join(word for word in words if word)
    return f"{text} against {reference:,} real images" if reference else text


def comparisons(report: Report) -> list[Comparison]:
    """Every set of scores that may be compared, in the order of the columns."""
    found: dict[tuple[Column, str, str], Comparison] = {}
    for index, row in enumerate(ordered(report)):
        for column, value in _row_scores(row).items():
            key = (column, row.model, _protocol_key(row.score))
            group = found.setdefault(key, Comparison(column, row.model, _protocol_text(row.score)))
            group.points.append(Point(row.run, row.method, row.seed, row.step, value, index))
    place = {column: i for i, column in enumerate(columns(report))}
    return sorted(found.values(), key=lambda group: place[group.column])


# ---------------------------------------------------------------------------------------------------------------------
# The table


def results(report: Report) -> pd.DataFrame:
    """One line a score, sorted by step, then the floor: who, the scores, and how they were sampled.

    Raises:
        ValueError: a row whose score is not a score; the message names run and step.
    """
    scored = columns(report)
    lines = [_line(row, scored) for row in ordered(report)]
    if report.floor is not None:
        values = {c.name: floor_value(report, c) for c in scored}
        lines.append({"run": FLOOR_NAME, "samples": report.floor.get("samples"), **values})
    names = [*IDENTITY, *(c.name for c in scored), *PROTOCOL]
    frame = pd.DataFrame(lines, columns=pd.Index(names))
    whole = {name: all(float(line.get(name) or 0).is_integer() for line in lines) for name in NUMBERS}
    types = {name: "Int64" if whole[name] else "float64" for name in NUMBERS} | {c.name: "float64" for c in scored}
    return frame.astype(types)


def _line(row: Row, scored: Sequence[Column]) -> dict[str, Any]:
    sampling, values = row.score.get("sampling") or {}, _row_scores(row)
    line: dict[str, Any] = {name: getattr(row, name) for name in IDENTITY}
    line |= {c.name: values.get(c) for c in scored}
    line |= {"sampler": sampling.get("sampler"), "NFE": row.score.get("nfe"), "guidance": guidance_text(row.score)}
    return line | {"labels": sampling.get("labels"), "samples": row.score.get("samples")}


@dataclass(frozen=True)
class _Block:
    """The scores of one guidance: column name -> line -> value (`values`) or text (`cells`).

    Lines are numbered as in `results`; the floor's, if any, comes last. `bold` holds (line, column name), `scored` the
    names of the columns that are scores.
    """

    values: Mapping[str, Mapping[int, Any]]
    cells: Mapping[str, Mapping[int, str]]
    bold: frozenset[tuple[int, str]]
    scored: frozenset[str]
    floor: int | None

    @property
    def lines(self) -> list[int]:
        """The lines' numbers, from the top."""
        return list(self.cells["run"])

    def right(self, name: str) -> bool:
        """Whether a column is of numbers, which are aligned to the right."""
        return name in self.scored or name in NUMBERS


def decimals(report: Report) -> dict[str, int]:
    """Decimals to show, by column name: one number for a whole column, and for the headline that quotes it.

    Distances get a second decimal where the smallest that a run reached is below 10.
    """
    scores = [_row_scores(row) for row in report.rows]
    shown = {}
    for column in columns(report):
        known = metric(column.metric)
        small = any(abs(found.get(column, math.inf)) < 10.0 for found in scores)
        shown[column.name] = known.decimals + (known.decimals == 1 and small)
    return shown


def _best(report: Report, places: Mapping[str, int]) -> frozenset[tuple[int, str]]:
    """The best of each comparison at each step, as (row, column name), ties as they are printed; none among equals."""
    best: set[tuple[int, str]] = set()
    for group in comparisons(report):
        lower, name = metric(group.column.metric).lower, group.column.name
        for step in {p.step for p in group.points}:
            shown = {p.index: round(p.value, places[name]) for p in group.points if p.step == step}
            if lower is None or len(set(shown.values())) < 2:
                continue
            winner = min(shown.values()) if lower else max(shown.values())
            best |= {(index, name) for index, value in shown.items() if value == winner}
    return frozenset(best)


def _blocks(report: Report) -> list[_Block]:
    """The table in parts that are printed one after the other: a guidance has columns of its own, so each is a part."""
    frame, scored = results(report), columns(report)
    places = decimals(report)
    bold = _best(report, places)
    # A model or a seed that all rows share is said once, beside the table.
    hidden = [name for name in ("model", "seed") if frame[name].nunique() <= 1]
    floor = len(report.rows) if report.floor is not None else None
    blocks = []
    for guidance in dict.fromkeys(c.guidance for c in scored):
        other = [c.name for c in scored if c.guidance != guidance]
        part = frame[(frame["guidance"] == guidance) | (frame.index == floor)].drop(columns=hidden + other)
        kept = [line for line in range(len(frame)) if line in part.index]
        values = {str(name): dict(zip(kept, part[name], strict=True)) for name in part.columns}
        cells = {name: {k: _cell(v, places.get(name)) for k, v in column.items()} for name, column in values.items()}
        names = frozenset(c.name for c in scored if c.guidance == guidance)
        blocks.append(_Block(values, cells, bold, names, floor))
    return blocks


def _cell(value: Any, places: int | None) -> str:
    if pd.isna(value) or value == "":
        return NONE
    if places is not None:
        return f"{value:.{places}f}"
    if isinstance(value, float):  # evaluations that an adaptive sampler needed on average
        return f"{value:,.1f}"
    return value if isinstance(value, str) else f"{value:,}"


def to_csv(report: Report, path: Path | str) -> None:
    """Write the whole table with all digits."""
    with replacing(path) as aside:
        results(report).to_csv(aside, index=False)


def _markdown_escape(text: str) -> str:
    text = " ".join(text.split())  # a line break would end the row
    return "".join("\\" + c if c in "\\`*_|<>[]~$" else c for c in text)


def to_markdown(report: Report) -> str:
    """The table in GitHub's Markdown, the best of each step in bold, the floor last; a table for each guidance."""
    return "\n".join(_markdown(block) for block in _blocks(report))


def _markdown(block: _Block) -> str:
    names = list(block.cells)
    lines = [[_markdown_escape(name) for name in names], ["--:" if block.right(name) else ":--" for name in names]]
    for index in block.lines:
        shown = {name: _markdown_escape(block.cells[name][index]) for name in names}
        lines.append([f"**{shown[name]}**" if (index, name) in block.bold else shown[name] for name in names])
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def to_html(report: Report, anchor: str = "made") -> str:
    """The table as an HTML fragment: headers are buttons to sort by, the floor stands in the foot, a guidance a table.

    Scores link to `#{anchor}-{line}`, where the page says how line `line` was made (`#{anchor}-floor` for the floor).
    """
    return "\n".join(_html(block, anchor) for block in _blocks(report))


def _html(block: _Block, anchor: str) -> str:
    head = "".join(
        f'<th scope="col"{_aligned(block, name)}><button type="button">{_heading(name)}</button></th>'
        for name in block.cells
    )
    steps = list(block.cells["step"].values())
    firsts = [place == 0 or steps[place - 1] != step for place, step in enumerate(steps)]
    lines = {line: _html_line(block, line, anchor, first) for line, first in zip(block.lines, firsts, strict=True)}
    foot = "" if block.floor is None else lines.pop(block.floor)
    body, foot = "\n".join(lines.values()), f"<tfoot>{foot}</tfoot>" if foot else ""
    return f'<table class="results by-step"><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>{foot}</table>'


def _heading(name: str) -> str:
    # A heading may break between its words, but not at the hyphen of a detector's name.
    return " ".join(f'<span class="word">{escape(word)}</span>' for word in name.split())


def _aligned(block: _Block, name: str) -> str:
    return ' class="n"' if block.right(name) else ""


def _html_line(block: _Block, index: int, anchor: str, first: bool) -> str:
    made = "floor" if index == block.floor else str(index)
    cells = []
    for name in block.cells:
        shown, raw = escape(block.cells[name][index]), block.values[name][index]
        if name in block.scored and shown != NONE:
            shown = f'<a href="#{anchor}-{made}">{shown}</a>'
        if (index, name) in block.bold:
            shown = f"<strong>{shown}</strong>"
        opening, tag = ('th scope="row"', "th") if name == "run" else ("td", "td")
        value = "" if pd.isna(raw) else escape(str(raw))
        cells.append(f'<{opening}{_aligned(block, name)} data-v="{value}">{shown}</{tag}>')
    return f"<tr{' class=first' if first else ''}>{''.join(cells)}</tr>"


def to_text(report: Report, width: int = 100) -> str:
    """The table for a terminal, a table for each guidance. How the scores were sampled stands once, below."""
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(Text(report.title))
    for block in _blocks(report):
        console.print(_terminal(block))
    for line in dict.fromkeys(group.protocol for group in comparisons(report)):
        console.print(Text(f"  {line}"))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def _terminal(block: _Block) -> Table:
    shared = [name for name in PROTOCOL if len({t for k, t in block.cells[name].items() if k != block.floor}) <= 1]
    names = [name for name in block.cells if name not in shared]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in names:
        number = block.right(name)  # these are never cut; names fold where the terminal is narrow
        table.add_column(
            Text("\n".join(name.split())), justify="right" if number else "left", no_wrap=number, overflow="fold"
        )
    for index in block.lines:
        if index == block.floor:
            table.add_section()
        # Text, not str: a run may be called "[red]", which rich would take for a colour.
        table.add_row(*(Text(block.cells[n][index], "bold" if (index, n) in block.bold else "") for n in names))
    return table


# ---------------------------------------------------------------------------------------------------------------------
# The finding


def headline(report: Report) -> Comparison | None:
    """The comparison that the headline speaks of: of Fréchet distances, the one with most runs; unguided if equal."""
    distances = [group for group in comparisons(report) if group.column.metric == "fd"]
    return max(distances, key=lambda group: len({p.run for p in group.points}), default=None)


def _headline_step(group: Comparison) -> int:
    """The last step that most runs have reached."""
    return max({p.step for p in group.points}, key=lambda s: (len({p.run for p in group.points if p.step == s}), s))


def finding(report: Report) -> str:
    """One sentence with the numbers that the report is about, best first. It states values; it does not judge them."""
    group = headline(report)
    if group is None:
        return "No scores yet."
    step = _headline_step(group)
    runs: dict[str, list[Point]] = {}
    for point in group.points:
        if point.step == step:
            runs.setdefault(point.run, []).append(point)
    means = {run: statistics.fmean(p.value for p in points) for run, points in runs.items()}
    best, *others = sorted(means, key=lambda run: means[run])
    places, names = decimals(report)[group.column.name], _names(runs)
    guided = "" if group.column.guidance == "none" else f" at w={group.column.guidance}"
    of = f", the best of {len(runs)} runs," if len(runs) > 4 else ""
    shown = [r for i, r in enumerate(others) if i < 3 or runs[r][0].method == "vanilla"]
    rest = "".join(f", {names[run]} {_spread(runs[run], places)}" for run in shown)
    return f"At step {step:,} {names[best]}{of} reaches FD {_spread(runs[best], places)}{guided}{rest}."


def _names(runs: Mapping[str, Sequence[Point]]) -> dict[str, str]:
    """A run is called by its method where that tells it from the others."""
    methods = [points[0].method for points in runs.values()]
    return {run: p[0].method if methods.count(p[0].method) == 1 else run for run, p in runs.items()}


def _spread(points: Sequence[Point], places: int) -> str:
    """`52.1`, or over several seeds `52.1 ± 1.3`: mean and standard deviation (n - 1)."""
    values = [p.value for p in points]
    spread = f" ± {statistics.stdev(values):.{places}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{places}f}{spread}"


def context(report: Report) -> str:
    """How the headline's numbers are to be read: what was measured, on how much, over how many seeds, and the floor."""
    group = headline(report)
    if group is None:
        return ""
    seeds = len({p.seed for p in group.points})
    trained = "one seed a run" if seeds == 1 else f"± is the standard deviation over {seeds} seeds"
    text = f"Fréchet distance on {group.column.detector} features, lower is better ({group.protocol}; {trained})."
    floor = floor_value(report, group.column)
    if floor is None or report.floor is None:
        return text
    sizes = [report.floor.get("samples"), (report.floor.get("reference") or {}).get("images")]
    counts = f"{sizes[0]:,} against {sizes[1]:,}" if all(sizes) else "in two halves"
    places = decimals(report)[group.column.name]
    return f"{text} Real images against real ones ({counts}) measure {floor:.{places}f}."
