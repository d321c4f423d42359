"""The interface of a measure, a diagnostic of a state other than its scores, and its result file. No torch.

A measure examines a trained or imported network and returns rows: some columns give the location
(a block, a t), the others the values measured there. The file names its columns, so that the report can show it
without further knowledge. The class is imported when a configuration names it, before anything runs, and imports torch
only where it computes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import model_validator

from haste.config import EVALUATION, Config, Seed, Strict
from haste.files import artefact
from haste.measure.pictures import Picture

if TYPE_CHECKING:
    from haste.measure.subject import Subject

KIND = "measure"

#: Which images are measured: those of `images.holdout`; of training; or of `evaluation`, a set of their own.
Split = Literal["held_out", "train", "evaluation"]

#: Column -> a location (a whole number, a number or a word), or a measured value (a number).
Row = Mapping[str, str | int | float]


class Measure(Strict):
    """The base class of the entries of MEASURES. Its fields are its keys in the configuration, beside `measure` and
    `alignment`; their types, bounds and defaults are pydantic's and checked before anything runs. All of them
    are part of the result's name; one that is added later is marked `LATER`.

    Attributes:
        needs: requirements besides the network and the images: `alignment`, for the losses against teachers, those of
            the row or else of the alignment that is named; `named alignment`, for those of the alignment that is named,
            the same for all rows, or else of the row; `teacher`, for the features of one, which a key `teacher` names;
            `classes`, for labels; `decoder`, for pictures.
        axes: location columns. Numbers are axes of the figure, words have a panel each.
        values: value columns -> the column of the standard error, "" if there is none.
        along: what figures are over: `step`; `nothing`, for no figures; "" for the first axis of numbers.
        once: whether it says the same of all states of a run; it is then taken of the last one alone.
        pooled: an axis of groups of images, over which the report shows the mean with its standard error; "" for none.
        distinct: keys that are lists, or may be, without a value twice.
        weights: which of a state's weights; a file with only one set gives that one.
        seed: of the choice of images, and of their noise.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    axes: ClassVar[tuple[str, ...]] = ()
    values: ClassVar[Mapping[str, str]] = {}
    pooled: ClassVar[str] = ""
    along: ClassVar[Literal["step", "nothing", ""]] = ""
    once: ClassVar[bool] = False

    distinct: ClassVar[tuple[str, ...]] = ()

    weights: Literal["model", "ema"] = "model"
    seed: Seed = 0

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        for name in self.distinct:
            values = getattr(self, name)
            if isinstance(values, list) and any(values.count(one) > 1 for one in values):
                raise ValueError(f"{name} {values} has a value more than once, expected each once")
        return self

    def faults(self, terms: Mapping[str, Mapping[str, Any]], blocks: int) -> list[str]:
        """What cannot be measured, before anything runs: each line begins with the key.

        Args:
            terms: the alignment terms to compare with, with their layers; none without an alignment in `needs`.
            blocks: number of the network's distinguishable blocks; 0 if there are none.
        """
        return []

    @property
    def least(self) -> Mapping[str, tuple[str, int]]:
        """The number of images that it cannot do without: `Split` -> the key that asks, number."""
        return {}

    @property
    def hidden(self) -> Mapping[str, Mapping[str, Any]]:
        """The hidden states that it reads: split -> what decides them, as `haste.measure.hidden.Hidden.look` says."""
        return {}

    def unfit(self, config: Config, model: str) -> list[str]:
        """What a configuration lacks for measuring one of its models: each line begins with the key."""
        held, found = config.images.holdout, []
        if (asked := self.least.get("held_out")) is not None and asked[1] > held:
            found.append(
                f"{asked[0]}: {asked[1]:,} images that are not trained on, but images.holdout keeps {held:,}; expected "
                "fewer here, in an entry of `measures`, or more there"
            )
        if EVALUATION in self.least and config.evaluation is None:
            found.append("split: evaluation, but there is no section `evaluation`; expected one, or split held_out")
        if "teacher" in self.needs and (name := getattr(self, "teacher", None)) not in config.teachers:
            known = ", ".join(config.teachers) or "teachers, which has none"
            if name is not None or len(config.teachers) != 1:
                found.append(f"teacher: {name or 'none is named'}, expected one of {known}")
        if "classes" in self.needs and (config.condition.name != "labels" or config.images.classes < 2):
            told = f"condition {config.condition.name} and images.classes {config.images.classes}"
            found.append(f"measure: needs classes to distinguish, found {told}; expected labels of 2 classes or more")
        return found

    def flops(self, terms: int, forward: float, teachers: float) -> float | None:
        """Operations of measuring one state, for `haste plan`; None if unknown. Not for hidden states.

        Args:
            terms: number of alignment terms to compare with.
            forward: operations of the network's forward pass on an image; a backward pass takes twice as many.
            teachers: operations of the teachers' forward passes on an image.
        """
        return None

    def run(self, subject: Subject) -> Iterable[Row]:
        """Measure. A collective call, with the same rows on all ranks. What cannot be measured for this network is
        left out and reported in `subject.notes`; pictures go to `subject.pictures`, and values of teachers that are
        measured in the same way to `subject.teachers`.

        Args:
            subject: the opened network, and what `needs` requests.
        """
        raise NotImplementedError(f"{type(self).__name__}.run")


def check_rows(measure: Measure, rows: Iterable[Row], of: str) -> list[dict[str, Any]]:
    """The checked rows of a measure.

    Args:
        measure: whose rows these are.
        rows: as `run` returns them.
        of: what was measured, for messages.

    Raises:
        ValueError: a row without one of the columns, or with another.
        FloatingPointError: a number is not finite; the message says which, and where.
    """
    return [
        _checked(
            measure,
            row,
            [*measure.axes, *_columns(measure.values)],
            of,
            [f"{name} {row.get(name)}" for name in measure.axes],
        )
        for row in rows
    ]


def check_teachers(measure: Measure, teachers: Mapping[str, Row], of: str) -> dict[str, dict[str, Any]]:
    """The checked values that were measured of teachers, by their names; raises as `check_rows`."""
    columns = _columns(measure.values)
    return {name: _checked(measure, row, columns, of, [f"teacher {name}"]) for name, row in teachers.items()}


def _columns(values: Mapping[str, str]) -> list[str]:
    return [*values, *(error for error in values.values() if error)]


def _checked(measure: Measure, row: Row, columns: list[str], of: str, where: list[str]) -> dict[str, Any]:
    if set(row) != set(columns):
        raise ValueError(f"{of}: {type(measure).__name__} gave a row of {sorted(row)}, expected {sorted(columns)}")
    broken = [name for name, value in row.items() if not isinstance(value, str) and not math.isfinite(value)]
    if broken:
        place = ", ".join(where)
        raise FloatingPointError(f"{of}: {broken[0]} at {place} is {row[broken[0]]}, expected a finite number")
    return {name: row[name] for name in columns}


def read(path: Path | str) -> dict[str, Any]:
    """The checked result file of a measure.

    Raises:
        ValueError: missing, damaged, or not such a file.
    """
    found = artefact.read_json(path, KIND)
    artefact.check_entries(path, found, measure=str, axes=list, values=dict, rows=list, notes=list, provenance=dict)
    values = _columns(found["values"])
    places = {f"row {number}": (row, [*found["axes"], *values]) for number, row in enumerate(found["rows"])}
    places |= {f"teacher {name}": (row, values) for name, row in found.get("teachers", {}).items()}
    for place, (row, columns) in places.items():
        if not isinstance(row, dict) or set(row) != set(columns):
            raise ValueError(f"{path}: damaged or edited: {place} is not one of {', '.join(sorted(columns))}")
    for entry in found.get("pictures", []):
        Picture.read(path, entry)
    return found
