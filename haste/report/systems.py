"""Whole systems side by side, as in the papers' last tables: each at the end of its training, sampled as its authors
chose. There is one table without guidance and one with it."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from haste.report.compare import Column, Line, columns, decimals, guidance, guidance_text, lines
from haste.report.content import NONE, Report
from haste.report.formats import Cell, Entry, Head, Table, number_cell, text_cell
from haste.report.papers import BATCH, CALLED, COCO, COCO_IMAGES, IMAGENET, SAMPLES, SCORES, comparable, lines_of

# (the images, their side in pixels, whether the systems are guided) -> file. That of COCO has some that are not.
FILES = {
    (IMAGENET, 256, False): "imagenet256_system_no_cfg.csv",
    (IMAGENET, 256, True): "imagenet256_system.csv",
    (IMAGENET, 512, True): "imagenet512.csv",
    (COCO, 256, True): "coco256.csv",
}
EPOCH = {IMAGENET: 1_281_167, COCO: COCO_IMAGES}  # training images


@dataclass(frozen=True)
class System:
    """A published system. `epochs` is empty if the source does not state it; `scores` are as printed."""

    name: str
    epochs: str
    guidance: str
    scores: Mapping[str, str]
    source: str


@functools.cache
def published(data: str, resolution: int, guided: bool) -> tuple[System, ...]:
    """The systems of one of the papers' tables, in its order, trained on all images; none if there is no such table."""
    name = FILES.get((data, resolution, guided))
    if name is None:
        return ()
    every = (None, "", str(EPOCH[data]))
    return tuple(_read(line, data, guided) for line in lines_of(name) if line.get("train_images") in every)


def _read(line: Mapping[str, str], data: str, guided: bool) -> System:
    method, steps = line.get("method"), line.get("iteration")
    system = CALLED.get(line["model"], line["model"]) + (f" + {method}" if method and method != "vanilla" else "")
    system += f", {line['sampler']} {line['nfe']}" if data == COCO and line["sampler"] else ""
    epochs = line.get("epochs") or (f"{_epochs(int(steps), int(BATCH), data):.0f}" if steps else "")
    schedule = {"yes": "interval or schedule", "no": "constant"}.get(line.get("cfg_schedule", ""), "")
    scores = {metric: line[name] for metric, name in SCORES.items() if line.get(name)}
    return System(system, epochs, (line.get("cfg_scale") or schedule) if guided else "", scores, line["source"])


def _epochs(steps: int, batch: int, data: str) -> float:
    return steps * batch / EPOCH[data]


def system_tables(report: Report) -> list[Table]:
    """Each run's last step beside the systems that papers report for these images: without guidance, then with it.

    Guided lines that differ only in their guidance are all listed. None for other images than those of the papers, for
    a part of them, or if no run has a score of their kind.
    """
    if report.benchmark is None or report.benchmark.images not in (None, EPOCH[report.benchmark.data]):
        return []
    found = []
    for guided, name in ((False, "published-systems"), (True, "published-systems-guided")):
        systems = published(report.benchmark.data, report.benchmark.resolution, guided)
        ours = _last(report, guided)
        if systems and ours:
            found.append(_table(report, ours, systems, name, guided))
    return found


def _last(report: Report, guided: bool) -> list[tuple[int, Line]]:
    """The lines of every run's last step at which all its seeds have an FID, with their indices."""
    table = [
        (place, line)
        for place, line in enumerate(lines(report))
        if (guidance(line.first.score)[0] > 1) == guided
        and any(_value(line, c) is not None for c in _comparable(report) if c.metric == "fd")
    ]
    ends: dict[str, int] = {}
    for _, line in table:
        ends[line.first.run] = max(line.first.step, ends.get(line.first.run, 0))
    return [(place, line) for place, line in table if line.first.step == ends[line.first.run]]


def _comparable(report: Report) -> list[Column]:
    return [column for column in columns(report) if comparable(column, report.benchmark)]


def _table(
    report: Report, ours: Sequence[tuple[int, Line]], systems: Sequence[System], name: str, guided: bool
) -> Table:
    said = {m for system in systems for m in system.scores} | {"fd"}
    shown: dict[str, Column] = {}
    for column in _comparable(report):
        if column.metric in said and any(_value(line, column) is not None for _, line in ours):
            shown.setdefault(column.metric, column)
    heads = [Head("system"), Head("epochs", number=True), *([Head("guidance")] if guided else [])]
    heads += [*(Head(c.title, number=True) for c in shown.values()), Head("samples", number=True), Head("source")]
    entries = [_measured(report, place, line, list(shown.values()), guided) for place, line in ours]
    assert report.benchmark is not None
    data = report.benchmark.data
    entries += [_reported(system, list(shown), guided, None if data == COCO else SAMPLES) for system in systems]
    title = "Systems, with guidance" if guided else "Systems, without guidance"
    return Table(name, title, heads, entries, _notes(ours, data))


def _value(line: Line, column: Column) -> float | None:
    """The mean over the seeds at the line's own guidance; None while a seed is missing."""
    own = Column(column.metric, column.detector, guidance_text(line.first.score), column.kind)
    found = line.summary(own)
    return None if found is None or found.missing else found.mean


def _measured(report: Report, place: int, line: Line, shown: Sequence[Column], guided: bool) -> Entry:
    row, digits = line.first, decimals(report)
    batch = row.settings.get("batch")
    assert report.benchmark is not None
    epochs = number_cell(_epochs(row.step, int(batch), report.benchmark.data), 0) if batch else Cell(NONE)
    scores = [number_cell(_value(line, c), digits[c.place], link=f"made-{place}") for c in shown]
    how = [text_cell(guidance_text(row.score))] if guided else []
    samples, source = text_cell(row.score.get("samples")), text_cell(f"here, step {row.step:,}")
    return Entry([text_cell(row.run), epochs, *how, *scores, samples, source])


def _reported(system: System, shown: Sequence[str], guided: bool, samples: int | None) -> Entry:
    how = [text_cell(system.guidance or None)] if guided else []
    numbers = [system.scores.get(metric) for metric in shown]
    scores = [Cell(NONE) if text is None else Cell(text, float(text)) for text in numbers]
    epochs = Cell(system.epochs, float(system.epochs)) if system.epochs else Cell(NONE)
    return Entry(
        [text_cell(system.name), epochs, *how, *scores, text_cell(samples), text_cell(system.source)], "published"
    )


def _notes(ours: Sequence[tuple[int, Line]], data: str) -> list[str]:
    notes = [
        "In italics: numbers that the papers report; they are no results of this code. An epoch is "
        f"{EPOCH[data]:,} images. Systems differ in model size, sampler and guidance, each as its authors chose."
    ]
    counts = {line.first.score.get("samples") for _, line in ours}
    if counts != {SAMPLES} and data == IMAGENET:
        said = " and ".join(f"{count:,}" for count in sorted(count or 0 for count in counts))
        notes.append(f"Measured here on {said} samples: comparable with published numbers only at {SAMPLES:,}.")
    return notes
