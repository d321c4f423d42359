"""The tables of a report: results without and with guidance, ablations, and published numbers beside measured ones.

A line of a table is one run at one step, over all its seeds. Guided and unguided results never share a column.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from haste.files.artefact import canonical
from haste.report import papers, probes
from haste.report.compare import (
    FULL,
    WEIGHTS,
    Column,
    Line,
    best,
    captions_text,
    columns,
    decimals,
    floor_value,
    guidance,
    guidance_text,
    labels_text,
    lines,
    metric,
    noise,
    precision_text,
    protocol_text,
    reconstructed_value,
    row_scores,
    several_noises,
)
from haste.report.content import NONE, Report, Row
from haste.report.formats import Cell, Entry, Head, Table, number_cell, text_cell
from haste.report.papers import COCO, SAMPLES, Published, comparable
from haste.report.times import hours_cell

PRECISION = "computed in"  # "precision" is a score
IDENTITY = ["run", "model", "method", "stop", "seed", "step"]
PROTOCOL = ["sampler", "NFE", "guidance", "labels", "captions", "decoder", "weights", PRECISION, "samples"]
NUMBERS = ["seed", "step", "samples"]
NOISE = "noise seed"  # a column that is shown if some run was sampled with several
FLOOR_NAME = "real against real"
RECONSTRUCTED_NAME = "real, reconstructed"
TITLES = {
    "stop": "termination step",
    "feature weight": "weight of the feature term",
    "attention weight": "weight of the attention term",
    "layers": "aligned layers",
    "teacher": "teacher",
    "timesteps": "distribution of training times",
    "feature similarity": "form of the feature loss",
    "feature head": "head of the feature term",
    "feature layer": "the teacher's layer that features follow",
    "feature normalise": "normalisation of the teacher's features",
}


def results(report: Report) -> pd.DataFrame:
    """One line per run, seed and step, then those of real images, with all digits: identity, scores, and sampling. A
    score with an error bar has another column for it. What training took is left out: equal results, equal files.

    Raises:
        ValueError: a row whose score is not a score; the message names run and step.
    """
    scored = columns(report)
    found = [_record(line, seed, scored) for line in lines(report) for seed in sorted(line.there)]
    if report.floors:
        values = {c.name: floor_value(report, c) for c in scored}
        found.append({"run": FLOOR_NAME, "samples": report.floors[0].get("samples"), **values})
    if report.reconstructed:
        values = {c.name: reconstructed_value(report, c) for c in scored}
        samples = report.reconstructed[0].get("samples")
        found.append({"run": RECONSTRUCTED_NAME, "samples": samples, **values})
    names = [
        name for c in scored for name in (c.name, f"{c.name} error") if name == c.name or any(map(_has(name), found))
    ]
    usual = {"captions": None, PRECISION: FULL}  # columns that are there only where some row has another value
    protocol = [n for n in PROTOCOL if n not in usual or any(record.get(n, usual[n]) != usual[n] for record in found)]
    how = [*protocol, *([NOISE] if several_noises(lines(report)) else [])]
    frame = pd.DataFrame(found, columns=pd.Index([*IDENTITY, *names, *how]))
    types = {name: "Int64" for name in [*NUMBERS, *how[len(protocol) :]]} | dict.fromkeys([*names, "NFE"], "float64")
    return frame.astype(types)


def _has(name: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda record: record.get(name) is not None


def hours_name(report: Report) -> str:
    """The heading of what training took."""
    return f"{report.unit}-hours"


def _record(line: Line, seed: int, scored: Sequence[Column]) -> dict[str, Any]:
    own = Line([row for row in line.rows if row.seed == seed], [seed])
    record: dict[str, Any] = {name: getattr(own.first, name) for name in IDENTITY}
    for column in scored:
        summary = own.summary(column)
        record |= {column.name: summary.mean if summary else None, f"{column.name} error": own.error(column)}
    return record | _protocol(own.first) | {NOISE: noise(own.first.score)}


def _protocol(row: Row) -> dict[str, Any]:
    sampling, samples = row.score.get("sampling") or {}, row.score.get("samples")
    said = {"sampler": sampling.get("sampler"), "NFE": row.score.get("nfe"), "guidance": guidance_text(row.score)}
    weights, told = WEIGHTS.get(sampling.get("weights", "ema")), captions_text(row.score)
    said |= {"labels": labels_text(row.score), "captions": told}
    said |= {"decoder": sampling.get("decoder"), "weights": weights, PRECISION: precision_text(row.score)}
    return said | {"samples": samples}


# ---------------------------------------------------------------------------------------------------------------------
# Results


def main_tables(report: Report) -> list[Table]:
    """The results without guidance, then those with guidance, if there are any."""
    parts = {
        guided: [(i, line) for i, line in enumerate(lines(report)) if (_weight(line) > 1) == guided]
        for guided in (False, True)
    }
    if not any(parts.values()) and report.floors:
        return [_main(report, [], "results", "Results")]
    titles = {False: ("results", "Results without guidance"), True: ("guided", "Results with guidance")}
    if not (parts[False] and parts[True]):
        titles = {False: ("results", "Results"), True: ("results", "Results with guidance")}
    return [_main(report, part, *titles[guided]) for guided, part in parts.items() if part]


def _weight(line: Line) -> float:
    return guidance(line.first.score)[0]


def _main(report: Report, part: Sequence[tuple[int, Line]], name: str, title: str) -> Table:
    kinds = _kinds(report, [line for _, line in part])
    frame = _Frame(report, [line for _, line in part], kinds, costs=True)
    entries, before = [], None
    for place, line in part:
        group = (line.first.model, line.first.step)
        entries.append(Entry(frame.cells(place, line), first=group != before))
        before = group
    if report.floors:
        entries.append(_floor(report, frame))
    if report.reconstructed:
        entries.append(_reconstructed(report, frame))
    return Table(name, title, frame.heads, entries, [*frame.notes, *_on_reconstructions(report)])


def _kinds(report: Report, part: Sequence[Line]) -> list[Column]:
    """The columns of some lines, one per metric and detector: the lines state their guidance."""
    there = {c for line in part for row in line.rows for c in row_scores(row)}
    found = [c for c in columns(report) if c in there or not part]
    return list({(c.metric, c.detector): c for c in found}.values())


class _Frame:
    """The columns that a set of lines needs: what all lines share is in a note instead of a column."""

    def __init__(
        self,
        report: Report,
        part: Sequence[Line],
        kinds: Sequence[Column],
        axis: str = "",
        beside: bool = False,
        costs: bool = False,
    ):
        self.kinds, self.axis, self.beside, self.benchmark = kinds, axis, beside, report.benchmark
        self.places, self.best = decimals(report), best(report)
        own = {(line.first.run, line.first.step) for line in part} if axis or beside else set()
        self.probed = {place: one for place, one in probes.accuracies(report).items() if place in own}
        said = [_protocol(line.first) for line in part]
        self.several = any(len(line.seeds) > 1 for line in part)
        seeds = {_seeds_text(line) for line in part}  # a note says so if all lines have the same
        self.guided = any(_weight(line) > 1 for line in part)
        hidden = {
            "model": len({line.first.model for line in part}) <= 1,
            "method": all(line.first.run.startswith(line.first.method) for line in part) and not beside,
            "stop": all(line.first.stop == NONE for line in part) or axis == "stop",
            "seeds": len(seeds) <= 1,
        }
        who = [n for n in ("run", "model", "method", "stop", "step") if not hidden.get(n, False)]
        self.who = [*([axis] if axis else []), *who, *(["w", "interval"] if self.guided else [])]
        self.whole = all(float(record["NFE"] or 0).is_integer() for record in said)
        kept = [
            n
            for n in PROTOCOL
            if (n != "guidance" and len({record[n] for record in said}) > 1) or (beside and n == "samples")
        ]
        drawn = [NOISE] if several_noises(part) else []
        self.hours = hours_name(report)
        taken = [self.hours] if costs and any(row.hours is not None for line in part for row in line.rows) else []
        self.how = [*kept, *drawn, *([] if hidden["seeds"] else ["seeds"]), *taken]
        self.notes = _notes(part, self.several, kinds)
        if taken:
            whose = " of one seed, in the mean" if self.several else ""
            self.notes.append(
                f"{self.hours[0].upper()}{self.hours[1:]}: of training alone{whose}, from its first step. A beginning "
                "that runs share counts in full for each of them; steps repeated after an interruption count once."
            )
        if self.probed:
            self.notes.append(f"{probes.TITLE}: accuracy of a linear probe in %, of the best layer and t.")

    @property
    def heads(self) -> list[Head]:
        """The headings."""
        who = [Head(n, number=n in ("step", "w")) for n in self.who]
        how = [Head(n, number=n in ("NFE", "samples", NOISE, self.hours)) for n in self.how]
        probed = [Head(probes.TITLE, number=True)] if self.probed else []
        return [*who, *(Head(c.title, number=True) for c in self.kinds), *probed, *how]

    def cells(self, place: int, line: Line) -> list[Cell]:
        """One line's cells; numbers link to `made-{place}`."""
        row, values = line.first, {**_protocol(line.first), "seeds": _seeds_text(line), NOISE: noise(line.first.score)}
        weight, low, high = guidance(row.score)
        values |= {"w": f"{weight:g}", "interval": f"[{low:g}, {high:g}]", **row.settings}
        values[self.hours] = line.hours
        who, how = (
            [self._word(n, values.get(n, getattr(row, n, None))) for n in names] for names in (self.who, self.how)
        )
        probed = [probes.cell(self.probed.get((row.run, row.step)))] if self.probed else []
        return [*who, *(self._score(place, line, column) for column in self.kinds), *probed, *how]

    def reported(self, one: Published) -> list[Cell]:
        """A published result's cells; what the paper does not state is a dash."""
        values: dict[str, Any] = {"run": one.source, "model": one.model, "method": one.method, "stop": one.stop}
        values |= {"step": one.step, "samples": SAMPLES if one.data != COCO else None, **one.settings}
        if one.guidance:
            weight, low, high = one.guidance
            values |= {"w": f"{weight:g}", "interval": f"[{low:g}, {high:g}]"}
        if one.drawn:
            values |= dict(zip(("sampler", "NFE"), one.drawn, strict=True))
        who, how = ([self._word(n, values.get(n)) for n in part] for part in (self.who, self.how))
        scores = [one.scores.get(c.metric) if comparable(c, self.benchmark) else None for c in self.kinds]
        scores += [one.accuracy or None] if self.probed else []
        return [*who, *(Cell(NONE) if s is None else Cell(s, float(s)) for s in scores), *how]

    def _word(self, name: str, value: Any) -> Cell:
        """A cell beside the scores. The mean NFE of an adaptive sampler is not an integer."""
        if name == self.hours and value is not None:
            return hours_cell(3600 * value)
        if name == "stop" and value is not None and value.isdigit():
            return Cell(f"{int(value):,}", int(value))
        if name == "stop" and value is not None:
            return text_cell(re.sub(r"\d+", lambda digits: f"{int(digits[0]):,}", value))
        mean = name == "NFE" and not self.whole and value is not None
        return number_cell(float(value), 1) if mean else text_cell(value)

    def _score(self, place: int, line: Line, kind: Column) -> Cell:
        column = replace(kind, guidance=guidance_text(line.first.score))
        found, places = line.summary(column), self.places[column.place]
        if found is None:
            return Cell(NONE)
        if found.missing:  # a mean over some seeds must not stand beside means over all
            text = "; ".join(f"{value:.{places}f}" for value in found.values.values())
            return Cell(text, link=f"made-{place}")
        spread = found.spread if len(line.seeds) > 1 else line.error(column)
        bold = (place, column) in self.best and not self.beside  # beside published numbers bold would claim too much
        return number_cell(found.mean, places, spread=spread, bold=bold, link=f"made-{place}")


def _seeds_text(line: Line) -> str:
    if len(line.seeds) == 1:
        return str(line.seeds[0])
    if line.missing:
        return f"{len(line.there)} of {len(line.seeds)}: {', '.join(map(str, line.missing))} missing"
    return str(len(line.seeds))


def _notes(part: Sequence[Line], several: bool, kinds: Sequence[Column]) -> list[str]:
    guided = len({guidance_text(line.first.score) for line in part}) <= 1  # otherwise lines state their guidance
    notes, shared = [], {protocol_text(line.first.score, guided) for line in part}
    models = {line.first.model for line in part}
    if len(models) == 1 and (model := min(models)):
        notes.append(f"Model {model}.")
    for text in sorted(filter(None, shared)):
        whose = [line.first.run for line in part if protocol_text(line.first.score, guided) == text]
        runs = f"{', '.join(dict.fromkeys(whose))}: " if len(shared) > 1 else ""
        notes.append(f"{runs}{text if runs else text[0].upper() + text[1:]}.")
    if several:
        counts = sorted({len(line.seeds) for line in part if len(line.seeds) > 1})
        seeds = " or ".join(map(str, counts))
        notes.append(f"Mean ± sample standard deviation over {seeds} training seeds; the samples' noise is the same.")
    elif len(seeds_used := {line.first.seed for line in part}) == 1 and part:
        notes.append(f"One training seed per run ({min(seeds_used)}).")
    if any(line.error(c) is not None for line in part if len(line.seeds) == 1 for c in kinds):
        notes.append(
            "± with one seed: of IS and KID over splits or subsets of the samples, of CLIP score its standard error."
        )
    notes += _on_scores(part)
    if any(line.missing for line in part):
        notes.append("If a seed is missing, the values so far are listed one by one, without a mean.")
    return notes


def _on_scores(part: Sequence[Line]) -> list[str]:
    """The scores' own notes, as sentences; one that is not of all lines names those that it is of."""
    said: dict[str, list[str]] = {}
    for line in part:
        for note in dict.fromkeys(note for row in line.rows for note in row.score.get("notes") or []):
            said.setdefault(note, []).append(f"{line.first.run} at step {line.first.step:,}")
    whose = {note: "" if len(who) == len(part) else f"{', '.join(dict.fromkeys(who))}: " for note, who in said.items()}
    return [f"{whose[note]}{note if whose[note] else note[0].upper() + note[1:]}".rstrip(".") + "." for note in said]


def _floor(report: Report, frame: _Frame) -> Entry:
    found = [floor_value(report, c) for c in frame.kinds]
    return _foot(frame, FLOOR_NAME, report.floors[0].get("samples"), found, "made-floor")


def _reconstructed(report: Report, frame: _Frame) -> Entry:
    found = [reconstructed_value(report, c) for c in frame.kinds]
    return _foot(frame, RECONSTRUCTED_NAME, report.reconstructed[0].get("samples"), found, "made-reconstructed")


def _foot(frame: _Frame, name: str, samples: int | None, found: Sequence[float | None], link: str) -> Entry:
    values = {frame.who[0]: name, "samples": samples}
    who, how = ([text_cell(values[n]) if values.get(n) else Cell("") for n in part] for part in (frame.who, frame.how))
    pairs = zip(found, frame.kinds, strict=True)
    scores = [number_cell(value, frame.places[c.place], link=link) for value, c in pairs]
    probed = [Cell("")] if frame.probed else []
    return Entry([*who, *scores, *probed, *how], kind="floor")


def _on_reconstructions(report: Report) -> list[str]:
    psnr = next((one["psnr"] for one in report.reconstructed if one.get("psnr") is not None), None)
    if psnr is None:
        return []
    back = f"real images as the autoencoder gives them back, with a PSNR of {psnr:.1f} dB"
    return [f"Real, reconstructed: {back}. A model of perfect latents would reach that."]


def arrows(report: Report) -> dict[str, bool | None]:
    """For every heading of a score, whether lower is better."""
    return {column.title: metric(column.metric).lower for column in columns(report)}


# ---------------------------------------------------------------------------------------------------------------------
# Published numbers


def published_tables(report: Report) -> list[Table]:
    """Measured scores beside those that the papers report for the same images, model, method, step and guidance:
    without guidance, then with it. No tables if nothing matches."""
    found = []
    for guided, name in ((False, "published"), (True, "published-guided")):
        table = [(i, line) for i, line in enumerate(lines(report)) if (_weight(line) > 1) == guided]
        part = [(i, line) for i, line in table if _papers(report, line)]
        if part:
            found.append(_published(report, part, name, "With guidance" if guided else "Without guidance"))
    return found


def _papers(report: Report, line: Line, axis: str = "") -> list[Published]:
    seen = any(comparable(column, report.benchmark) for row in line.rows for column in row_scores(row))
    return papers.beside(line.first, report.benchmark, axis) if seen else []


def _published(report: Report, part: Sequence[tuple[int, Line]], name: str, title: str) -> Table:
    kinds = [c for c in _kinds(report, [line for _, line in part]) if comparable(c, report.benchmark)]
    frame = _Frame(report, [line for _, line in part], kinds, beside=True)
    groups: dict[str, list[tuple[int, Line]]] = {}
    for place, line in part:
        row = line.first
        groups.setdefault(canonical([row.model, row.step, row.method, guidance(row.score)]), []).append((place, line))
    entries = []
    for group in groups.values():
        entries += [Entry(frame.cells(i, line), first=k == 0) for k, (i, line) in enumerate(group)]
        ones = {id(one): one for _, line in group for one in _papers(report, line)}
        entries += [Entry(frame.reported(one), kind="published") for one in ones.values()]
    return Table(name, title, frame.heads, entries, [*frame.notes, *_paper_notes(report, part)])


def _paper_notes(report: Report, part: Sequence[tuple[int, Line]]) -> list[str]:
    counts = {line.first.score.get("samples") for _, line in part}
    assert report.benchmark is not None
    data, coco = report.benchmark.data, report.benchmark.data == COCO
    of, known = f"for {papers.SAMPLES:,} samples against ADM's reference", "classes"
    if coco:
        of, known = "by U-ViT's protocol, of 40,000 or 50,000 samples; the sources differ", "pictures to validate"
    notes = [
        f"In italics: numbers that the papers report for {data} at {report.benchmark.resolution} px, with their "
        f"source; they are no results of this code. They are {of}. A dash: the paper does not "
        f"state it. Settings that it does not state may differ. These images are taken to be {data} because of their "
        f"number of {known} alone."
    ]
    if coco:
        notes.append("REPA's code draws from the raw weights, HASTE's from the averaged ones; their tables do not say.")
    elif counts != {papers.SAMPLES}:
        said = " and ".join(f"{count:,}" for count in sorted(count or 0 for count in counts))
        notes.append(f"Measured here on {said} samples: comparable with published numbers only at {papers.SAMPLES:,}.")
    ways = {(line.first.run, way) for _, line in part if (way := papers.other_sampler(line.first))}
    if ways:
        said = "; ".join(f"{run} with {way}" for run, way in sorted(ways))
        notes.append(
            f"The papers draw SiT with 250 steps of Euler–Maruyama, and DiT with 250 of DDPM. Drawn here: {said}."
        )
    return notes


# ---------------------------------------------------------------------------------------------------------------------
# Ablations


def ablations(report: Report) -> list[Table]:
    """A table for each setting that differs between runs which agree in all else: stop, weights, layers, teacher, ...

    Lines are grouped by model and step; vanilla training with the same settings comes first in its group.
    """
    table = list(enumerate(lines(report)))
    axes = ["stop", *dict.fromkeys(axis for _, line in table for axis in line.first.settings)]
    found = []
    for axis in axes:
        groups = list(_groups(table, axis))
        if groups:
            found.append(_ablation(report, axis, groups))
    return found


def _ablation(report: Report, axis: str, groups: Sequence[Sequence[tuple[int, Line]]]) -> Table:
    part = [line for group in groups for _, line in group]
    frame = _Frame(report, part, _kinds(report, part), axis)
    entries = []
    for group in groups:
        entries += [Entry(frame.cells(i, line), first=k == 0) for k, (i, line) in enumerate(group)]
        ones = {id(one): one for _, line in group for one in _papers(report, line, axis)}
        entries += [Entry(frame.reported(one), kind="published") for one in ones.values()]
    title = TITLES.get(axis, axis)
    return Table(f"ablation-{axis.replace(' ', '-')}", f"By {title}", frame.heads, entries, frame.notes)


def _groups(table: Sequence[tuple[int, Line]], axis: str) -> Iterator[list[tuple[int, Line]]]:
    """Groups of lines that differ in one setting alone, with at least two different states each."""
    found: dict[str, list[tuple[int, Line]]] = {}
    for place, line in table:
        if axis_value(line.first, axis) not in (None, NONE):
            found.setdefault(canonical(_others(line.first, axis)), []).append((place, line))
    for group in found.values():
        states = {canonical(line.first.score.get("state") or line.first.run) for _, line in group}
        if len(states) > 1 and len({axis_value(line.first, axis) for _, line in group}) > 1:
            group.sort(key=lambda item: _order(axis_value(item[1].first, axis)))
            yield [*_baseline(table, group[0][1].first, axis), *group]


def axis_value(row: Row, axis: str) -> str | None:
    """A row's value on an ablation's axis; None if it has none."""
    return row.stop if axis == "stop" else row.settings.get(axis)


def _order(value: str | None) -> tuple[float, str]:
    value = value or ""
    step = re.match(r"\d+(?= by | to )", value)  # where a trigger stopped
    try:
        return float(step[0] if step else value), value if step else ""
    except ValueError:
        return float("inf"), value


def _others(row: Row, axis: str) -> list[Any]:
    settings = {k: v for k, v in row.settings.items() if k != axis}
    return [_scene(row), row.method, "" if axis == "stop" else row.stop, settings]


def _scene(row: Row) -> list[Any]:
    """What two rows must agree in to be compared at all: model, step, and sampling."""
    said = _protocol(row)
    return [row.model, row.step, *(said[name] for name in sorted(said))]


def _baseline(table: Sequence[tuple[int, Line]], row: Row, axis: str) -> list[tuple[int, Line]]:
    """Vanilla training with the same settings as an ablated row, except those of its alignment."""
    return [
        (place, line)
        for place, line in table
        if line.first.method == "vanilla"
        and line.first.settings  # unknown for rows of `evaluate`
        and row.method != "vanilla"
        and axis_value(line.first, axis) in (None, NONE)
        and _scene(line.first) == _scene(row)
        and all(row.settings.get(k) == v for k, v in line.first.settings.items())
    ][:1]
