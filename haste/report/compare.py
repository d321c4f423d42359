"""Which scores may be compared, and how they are summarised over seeds.

Scores are compared only within a `Comparison`: the same model, detector, reference, sample count and way of sampling.
Guided and unguided results never share a column.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from haste.config import Sampling, decides
from haste.files.artefact import canonical
from haste.report.content import Report, Row


@dataclass(frozen=True)
class Metric:
    """How a score is named and read. `lower`: whether lower is better; None if neither direction is."""

    label: str
    lower: bool | None
    names_detector: bool = False
    decimals: int = 3


METRICS = {
    "fd": Metric("FD", lower=True, names_detector=True, decimals=1),
    "sfid": Metric("sFID", lower=True, decimals=1),
    "kid": Metric("KID", lower=True, names_detector=True, decimals=1),
    "is": Metric("IS", lower=False, decimals=1),
    "precision": Metric("precision", lower=False),
    "recall": Metric("recall", lower=False),
    "clip_score": Metric("CLIP score", lower=False, names_detector=True, decimals=1),
    "class_accuracy": Metric("class accuracy", lower=False),
    "caption_accuracy": Metric("caption accuracy", lower=False),
}
OF_REAL = {"caption_accuracy": "class_accuracy"}  # what real images have in a metric's place
INCEPTION = "inception"  # the kind of detector whose Fréchet distance is called FID
PYTORCH_FID = "pytorch-fid"  # that of the other convention, which its column names
SAMPLERS = {  # their names in prose
    "euler": "Euler",
    "heun": "Heun",
    "euler-maruyama": "Euler–Maruyama",
    "ddpm": "DDPM",
    "ddim": "DDIM",
}
WEIGHTS = {"ema": "averaged", "model": "raw"}  # what samples are drawn from, in prose
FULL = "fp32"  # the precision of samples of which nothing else is said
ERROR = "_std"  # suffix of the name of a score's own error bar


@dataclass(frozen=True)
class Column:
    """One metric under one detector and one guidance."""

    metric: str
    detector: str
    guidance: str
    kind: str = ""
    crowded: bool = field(default=False, compare=False)  # whether another detector gives this metric too

    @property
    def inception(self) -> bool:
        """Whether it is by ADM's conventions."""
        return self.kind == INCEPTION

    @property
    def title(self) -> str:
        """Its name in a table whose lines state their guidance. FID is Inception's Fréchet distance and no other's."""
        if self.metric == "fd" and self.kind == PYTORCH_FID:
            return f"FID ({', '.join(dict.fromkeys([PYTORCH_FID, self.detector]))})"
        known, plain = metric(self.metric), self.inception and self.detector.lower() == INCEPTION
        label = "FID" if self.metric == "fd" and self.inception else known.label
        named = (known.names_detector and not plain) or (self.crowded and label != "FID")
        return label + (f" ({self.detector})" if named else "")

    @property
    def place(self) -> tuple[str, bool]:
        """Its column in a table: its title, and whether it is guided."""
        return self.title, self.guidance != "none"

    @property
    def name(self) -> str:
        """Its name where nothing else states the guidance."""
        return self.title + ("" if self.guidance == "none" else f", w={self.guidance}")


@dataclass(frozen=True)
class Point:
    """A value in a comparison; `line` is the index of its line in `lines(report)`."""

    run: str
    method: str
    seed: int
    step: int
    value: float
    line: int


@dataclass
class Comparison:
    """Scores of one column that were measured in the same way on the same model, so that they may be compared."""

    column: Column
    model: str
    protocol: str
    points: list[Point] = field(default_factory=list)
    noise: int | None = None  # the seed of the samples' noise, if some run was sampled with several


@dataclass(frozen=True)
class Summary:
    """Values over seeds: their mean, sample standard deviation (None for one), and the missing seeds."""

    values: Mapping[int, float]
    missing: Sequence[int]

    @property
    def mean(self) -> float:
        """The mean of the values so far."""
        return statistics.fmean(self.values.values())

    @property
    def spread(self) -> float | None:
        """The sample standard deviation (n - 1); None if a seed is missing or there is only one."""
        whole = len(self.values) > 1 and not self.missing
        return statistics.stdev(self.values.values()) if whole else None


@dataclass(frozen=True)
class Line:
    """One run at one step, sampled in one way: the scores of all its seeds and by all detectors."""

    rows: Sequence[Row]
    seeds: Sequence[int]  # of the configuration, scored or not

    @property
    def first(self) -> Row:
        """A row, for what all its rows share: run, model, method, stop, step, way of sampling."""
        return self.rows[0]

    @property
    def there(self) -> list[int]:
        """The seeds that have scores."""
        return list(dict.fromkeys(row.seed for row in self.rows))

    @property
    def missing(self) -> list[int]:
        """The seeds that have none yet."""
        return [seed for seed in self.seeds if seed not in self.there]

    @property
    def hours(self) -> float | None:
        """What training took, in the mean over seeds; None if a seed says nothing."""
        found = {row.seed: row.hours for row in self.rows}.values()
        known = [one for one in found if one is not None]
        return statistics.fmean(known) if known and len(known) == len(found) else None

    def summary(self, column: Column) -> Summary | None:
        """One column over the seeds; None if none has a value."""
        values = {row.seed: found[column] for row in self.rows if column in (found := row_scores(row))}
        return Summary(values, [s for s in self.seeds if s not in values]) if values else None

    def error(self, column: Column) -> float | None:
        """The error bar of a column's only score (over splits or subsets of its samples), if it has one."""
        rows = [row for row in self.rows if column in row_scores(row)]
        found = [float(row.score["scores"].get(column.metric + ERROR) or math.nan) for row in rows]
        return found[0] if len(found) == 1 and math.isfinite(found[0]) else None


def metric(key: str) -> Metric:
    """How to show a score; an unknown one keeps its name and is never marked as best."""
    return METRICS.get(key, Metric(key.replace("_", " "), lower=None))


def guidance_text(score: Mapping[str, Any]) -> str:
    """`none` (also for w <= 1, which guides nothing), `1.5`, or `1.5 on [0, 0.7]`."""
    weight, low, high = guidance(score)
    if weight <= 1.0:
        return "none"
    return f"{weight:g}" if (low, high) == (0, 1) else f"{weight:g} on [{low:g}, {high:g}]"


def guidance(score: Mapping[str, Any]) -> tuple[float, float, float]:
    """The guidance scale and the interval of t on which it acts; (1, 0, 1) is no guidance."""
    sampling = score.get("sampling") or {}
    weight = float(sampling.get("guidance") or 1.0)
    low, high = sampling.get("interval") or (0, 1)
    return (weight, float(low), float(high)) if weight > 1 else (1.0, 0.0, 1.0)


def detector_name(score: Mapping[str, Any]) -> str | None:
    """The name of the detector that made a score."""
    return (score.get("detector") or {}).get("name")


def detector_kind(score: Mapping[str, Any]) -> str:
    """The kind of the detector that made a score, whatever the configuration calls it."""
    detector = score.get("detector") or {}
    return str(detector.get("kind", detector.get("name")))


def lines(report: Report) -> list[Line]:
    """The lines of the table: by model in the report's order, then by step; within a step in the report's order."""
    models = list(dict.fromkeys(row.model for row in report.rows))
    found: dict[str, list[Row]] = {}
    for row in sorted(report.rows, key=lambda row: (models.index(row.model), row.step)):
        found.setdefault(canonical([_drawn(row), noise(row.score)]), []).append(row)
    return [Line(rows, report.seeds.get(rows[0].run) or _seeds(rows)) for rows in found.values()]


def _seeds(rows: Sequence[Row]) -> list[int]:
    return list(dict.fromkeys(row.seed for row in rows))


def _scores(score: Mapping[str, Any], where: str) -> dict[Column, float]:
    """The finite values of a score file by column."""
    found, detector = score.get("scores"), detector_name(score)
    if not isinstance(found, Mapping) or detector is None:
        raise ValueError(f"{where}: found keys {sorted(score)}, expected a score with 'scores' and 'detector'")
    guided, kind = guidance_text(score), detector_kind(score)
    kept = {key: value for key, value in found.items() if value is not None and not _error_bar(key, found)}
    values = {Column(key, detector, guided, kind): value for key, value in kept.items()}
    return {column: float(value) for column, value in values.items() if math.isfinite(value)}


def _error_bar(key: str, scores: Mapping[str, Any]) -> bool:
    return key.endswith(ERROR) and key.removesuffix(ERROR) in scores


def row_scores(row: Row) -> dict[Column, float]:
    """The finite scores of a row by column.

    Raises:
        ValueError: its score is not a score; the message names run and step.
    """
    return _scores(row.score, f"run {row.run!r}, step {row.step}")


def floor_of(report: Report, column: Column) -> Mapping[str, Any] | None:
    """The score of real images against real ones by a column's detector."""
    return next((floor for floor in report.floors if detector_name(floor) == column.detector), None)


def floor_value(report: Report, column: Column) -> float | None:
    """The score of real images against real ones; it has no guidance, so guided columns show it too."""
    return _of_real(report.floors, column)


def reconstructed_value(report: Report, column: Column) -> float | None:
    """The score of decoded latents of real images against real ones; it has no guidance either."""
    return _of_real(report.reconstructed, column)


def _of_real(scores: Sequence[Mapping[str, Any]], column: Column) -> float | None:
    found = next((one for one in scores if detector_name(one) == column.detector), None)
    values = {} if found is None else {c.metric: value for c, value in _scores(found, "of real images").items()}
    return values.get(OF_REAL.get(column.metric, column.metric))


def columns(report: Report) -> list[Column]:
    """All columns of scores: unguided first, then by detector and guidance as they appear, metrics in a fixed order."""
    found = {column: None for line in lines(report) for row in line.rows for column in row_scores(row)}
    if not found:
        found = {column: None for floor in report.floors for column in _scores(floor, "the floor")}
    givers: dict[str, set[str]] = {}
    for column in found:
        givers.setdefault(column.metric, set()).add(column.detector)
    found = {replace(c, crowded=len(givers[c.metric]) > 1): None for c in found}
    blocks = list(dict.fromkeys((c.guidance, c.detector) for c in found))
    blocks.sort(key=lambda block: block[0] != "none")
    rank = {key: place for place, key in enumerate(METRICS)}
    return sorted(found, key=lambda c: (blocks.index((c.guidance, c.detector)), rank.get(c.metric, len(rank))))


def _sampling(score: Mapping[str, Any]) -> dict[str, Any]:
    """How samples were drawn, except for the noise seed and the name of the sampling. NFE follows from the sampler, and
    without guidance the interval has no effect. Keys that older scores lack are left out at their defaults. With
    captions, the noise seed stays: it chooses the texts."""
    left = ("name",) if captions_text(score) else ("name", "seed")
    sampling = {k: v for k, v in decides(Sampling, score.get("sampling") or {}).items() if k not in left}
    return sampling if guidance(score)[0] > 1.0 else sampling | {"guidance": 1.0, "interval": None}


def noise(score: Mapping[str, Any]) -> int | None:
    """The seed of the samples' noise."""
    return (score.get("sampling") or {}).get("seed")


def captions_text(score: Mapping[str, Any]) -> str | None:
    """Whose captions samples are told, and the seed that draws one of each image; None if they are told none."""
    sampling = score.get("sampling") or {}
    if "split" not in sampling or "labels" in sampling or sampling.get("prompts"):
        return None
    images = "held-out" if sampling["split"] == "held_out" else "training"
    return f"{images} images, seed {noise(score)}"


def precision_text(score: Mapping[str, Any]) -> str:
    """The precision that samples are computed in: `fp32`, `bf16`, or `bf16, decoder fp16`."""
    sampling = score.get("sampling") or {}
    decoder = sampling.get("decoder_precision", FULL)
    return sampling.get("precision", FULL) + (f", decoder {decoder}" if decoder != FULL else "")


def several_noises(part: Sequence[Line]) -> bool:
    """Whether some run was sampled in one way with several noise seeds, so that only these distinguish its scores."""
    found: dict[str, set[int | None]] = {}
    for line in part:
        found.setdefault(_drawn(line.first), set()).add(noise(line.first.score))
    return any(len(seeds) > 1 for seeds in found.values())


def _drawn(row: Row) -> str:
    """What was sampled and how, except for the noise seed."""
    return canonical([row.run, row.model, row.step, _sampling(row.score), row.score.get("samples")])


def _protocol_key(score: Mapping[str, Any]) -> str:
    """Two scores may be compared if this is equal."""
    return canonical([_sampling(score), score.get("samples"), score.get("reference"), score.get("detector")])


def labels_text(score: Mapping[str, Any]) -> str | None:
    """How samples got their classes, or the chosen ones by their names."""
    labels = (score.get("sampling") or {}).get("labels")
    return ", ".join(map(str, labels)) if isinstance(labels, list) else labels


def protocol_text(score: Mapping[str, Any], guided: bool = True) -> str:
    """How a score was measured, in words, with or without its guidance."""
    sampling, scale = score.get("sampling") or {}, guidance_text(score)
    sampler, told = sampling.get("sampler"), captions_text(score)
    reference = (score.get("reference") or {}).get("images")
    words = [
        SAMPLERS.get(str(sampler), sampler),
        f"{sampling['steps']} steps" if sampling.get("steps") else None,
        ("no guidance" if scale == "none" else f"guidance {scale}") if guided else None,
        f"{told_labels} labels" if (told_labels := labels_text(score)) else None,
        f"captions of {told}" if told else None,
        f"decoder {sampling['decoder']}" if sampling.get("decoder") else None,
        f"{WEIGHTS['model']} weights" if sampling.get("weights") == "model" else None,
        f"computed in {how}" if (how := precision_text(score)) != FULL else None,
        f"{score['samples']:,} samples" if score.get("samples") else None,
    ]
    text = ", ".join(word for word in words if word)
    return f"{text} against {reference:,} real images" if reference else text


def comparisons(report: Report) -> list[Comparison]:
    """Every set of scores that may be compared, in the order of the columns."""
    order, table = {column: i for i, column in enumerate(columns(report))}, lines(report)
    named, apart = {column: column for column in order}, several_noises(table)
    found: dict[tuple[Column, str, str, int | None], Comparison] = {}
    for place, line in enumerate(table):
        seed = noise(line.first.score) if apart else None
        for row in line.rows:
            said = protocol_text(row.score) + (f", noise of seed {seed}" if apart else "")
            for column, value in row_scores(row).items():
                key = (column, row.model, _protocol_key(row.score), seed)
                group = found.setdefault(key, Comparison(named[column], row.model, said, noise=seed))
                group.points.append(Point(row.run, row.method, row.seed, row.step, value, place))
    return sorted(found.values(), key=lambda group: order[group.column])


def curve(group: Comparison, run: str, seeds: Sequence[int]) -> list[tuple[int, Summary]]:
    """A run's values in a comparison by step, over its seeds."""
    steps: dict[int, dict[int, float]] = {}
    for point in group.points:
        if point.run == run:
            steps.setdefault(point.step, {})[point.seed] = point.value
    return [(step, Summary(v, [s for s in seeds if s not in v])) for step, v in sorted(steps.items())]


def seeds_of(report: Report, run: str) -> list[int]:
    """The seeds of a run in the configuration; if it states none, those that have scores."""
    return list(report.seeds.get(run) or _seeds([row for row in report.rows if row.run == run]))


def decimals(report: Report) -> dict[tuple[str, bool], int]:
    """Decimals to show, by a column's place: the same for a whole column and for the headline that quotes it.

    Distances get one decimal, and one more for each power of ten by which the smallest value is below 10.
    """
    scores = [row_scores(row) for row in report.rows]
    shown: dict[tuple[str, bool], int] = {}
    for column in columns(report):
        known = metric(column.metric)
        least = min((abs(v) for found in scores if (v := found.get(column))), default=math.inf)
        more = min(max(0, 1 - math.floor(math.log10(least))), 4) if known.decimals == 1 and least < 10 else 0
        places = known.decimals + more
        shown[column.place] = max(places, shown.get(column.place, 0))
    return shown


def best(report: Report) -> frozenset[tuple[int, Column]]:
    """The best of each comparison at each step, as (line, column). Values that print alike tie; if all tie, none is
    best. A line with a missing seed is left out."""
    table, places, winners = lines(report), decimals(report), set()
    for group in comparisons(report):
        lower, digits = metric(group.column.metric).lower, places[group.column.place]
        for step in {p.step for p in group.points}:
            found = {p.line: table[p.line].summary(group.column) for p in group.points if p.step == step}
            shown = {i: round(s.mean, digits) for i, s in found.items() if s is not None and not s.missing}
            if lower is None or len(set(shown.values())) < 2:
                continue
            winner = min(shown.values()) if lower else max(shown.values())
            winners |= {(place, group.column) for place, value in shown.items() if value == winner}
    return frozenset(winners)
