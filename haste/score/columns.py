"""From the statistics of two sides to numbers in named columns, with error bars."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from haste.metrics import kid
from haste.metrics.scores import METRICS, finite
from haste.metrics.uncertainty import frechet_error
from haste.score.sides import Side

log = logging.getLogger("haste.score")

# A value as METRICS names it -> (its metric, the name of its column), in the order of a table.
VALUES = {
    "fd": ("frechet", "FD"),
    "sfid": ("sfid", "sFID"),
    "is": ("inception_score", "IS"),
    "precision": ("precision_recall", "precision"),
    "recall": ("precision_recall", "recall"),
    "kid": ("kid", "KID"),
    "clip_score": ("clip_score", "CLIP score"),
}
TYPED = {"fid": "fd", "clip": "clip_score", **{name: name for name in VALUES}}  # what users type -> a name in VALUES
OVER_SPLITS, OVER_SUBSETS = "standard deviation over splits", "standard deviation over subsets"
OF_SAMPLES = "standard error of so many samples"
BARS = {"is": OVER_SPLITS, "kid": OVER_SUBSETS, "clip_score": OF_SAMPLES}  # of those that come with the value
FEATURES = {"fd": "pool", "sfid": "spatial"}


@dataclasses.dataclass(frozen=True)
class Score:
    """A number in a table. value; error: its error bar, None if it has none; what: the kind of error bar; better:
    "lower" or "higher"."""

    value: float
    error: float | None
    what: str | None
    better: str


@dataclasses.dataclass(frozen=True)
class Found:
    """columns: name -> score; absent: name -> why there is none; notes: remarks that belong to the scores."""

    columns: dict[str, Score] = dataclasses.field(default_factory=dict)
    absent: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)


def typed(names: Sequence[str]) -> list[str]:
    """Names in VALUES for names that users type. Raises ValueError for an unknown one."""
    unknown = [name for name in names if name.lower() not in TYPED]
    if unknown or not names:
        raise ValueError(f"metrics: found {', '.join(unknown) or 'none'}, expected of {', '.join(TYPED)}")
    return list(dict.fromkeys(TYPED[name.lower()] for name in names))


def column(value: str, detector: Mapping[str, Any]) -> str:
    """The name of a column. FID is Inception's alone, and names the convention unless it is ADM's; other columns carry
    their detector's name."""
    name = VALUES[value][1]
    if detector.get("kind") == "inception":
        return "FID" if value == "fd" else name
    if value == "fd" and detector.get("kind") == "pytorch-fid":
        name = "FID"
    return f"{name} ({detector['name']})"


def compare(side: Side, real: Side | None, wanted: Collection[str], *, strict: bool, seed: int = kid.SEED) -> Found:
    """The scores of one side against another.

    Args:
        side: the samples.
        real: the reference, by the same detector; None for scores that need none.
        wanted: names in VALUES.
        strict: whether a score that cannot be computed is an error.
        seed: of KID's subsets.

    Raises:
        ValueError: `strict`, and a score cannot be computed; the message says why.
        FloatingPointError: a score or its error bar is not finite.
    """
    found = Found()
    for name, metric in METRICS.items():
        mine = [value for value in wanted if VALUES[value][0] == name]
        if not mine:
            continue
        why = _missing(name, side, real)
        if why is None:
            log.info("%s", ", ".join(column(value, side.detector) for value in mine))
            try:
                numbers = _numbers(name, side, real, seed)
            except ValueError as refusal:  # such as too few images: the other scores may still be possible
                why = str(refusal)
        if why is not None:
            if strict:
                raise ValueError(f"{', '.join(column(value, side.detector) for value in mine)}: {why}")
            found.absent.update({column(value, side.detector): why for value in mine})
            continue
        for value in mine:
            error, what = _error(value, numbers, side, real)
            finite({f"error of {value}": error}, str(side.about.get("path", "the samples")))
            found.columns[column(value, side.detector)] = Score(numbers[value], error, what, metric.better[value])
        found.notes.extend(metric.notes(side.stats[name], None if real is None else real.stats.get(name)))
    return dataclasses.replace(found, columns=_ordered(found.columns, side.detector))


def refuse(detector: Mapping[str, Any], real: Side | None, wanted: Collection[str]) -> None:
    """Raise ValueError for a score that cannot be computed for any samples, before their features are extracted."""
    for value in wanted:
        metric = METRICS[VALUES[value][0]]
        lacking = set(metric.needs) - set(detector["outputs"])
        why = f"{detector['name']} gives no {' and '.join(sorted(lacking))}" if lacking else None
        if metric.reference:
            why = why or ("needs a reference" if real is None else real.absent.get(VALUES[value][0]))
        if why is not None:
            raise ValueError(f"{column(value, detector)}: {why}")


def _ordered(columns: dict[str, Score], detector: Mapping[str, Any]) -> dict[str, Score]:
    names = [column(value, detector) for value in VALUES]
    return {name: columns[name] for name in names if name in columns}


def _missing(name: str, side: Side, real: Side | None) -> str | None:
    """Why a metric cannot be computed; None if it can."""
    if not METRICS[name].reference:
        return side.absent.get(name)
    if real is None:
        return "needs a reference"
    return side.absent.get(name) or real.absent.get(name)


def _numbers(name: str, side: Side, real: Side | None, seed: int) -> dict[str, float]:
    stats, reference = side.stats[name], real.stats[name] if real is not None and METRICS[name].reference else None
    if name == "kid":  # the one metric with a seed
        found = kid.value(reference.ordered, stats.ordered, seed=seed)  # type: ignore[union-attr]
    else:
        found = METRICS[name].value(stats, reference)
    return finite(found, str(side.about.get("path", "the samples")))


def _error(value: str, numbers: Mapping[str, float], side: Side, real: Side | None) -> tuple[float | None, str | None]:
    """An error bar, and its kind."""
    if value in BARS:
        error = numbers.get(f"{value}_std")
        return error, None if error is None else BARS[value]
    if value in FEATURES and FEATURES[value] in side.kept:
        assert real is not None
        name = VALUES[value][0]
        error = frechet_error(side.stats[name], real.stats[name], side.kept[FEATURES[value]].blocks)
        return error, None if error is None else OF_SAMPLES
    if value == "precision":  # a share of independent samples, the reference's balls held fixed
        share, count = numbers[value], len(side.stats["precision_recall"].index)
        error = math.sqrt(share * (1 - share) / count) if 0 < share < 1 else None
        return error, None if error is None else OF_SAMPLES
    return None, None  # recall: the balls are centred on the samples, so resampling would change them
