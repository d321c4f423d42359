"""What can be measured of a state beside its scores: the contract of a measure, and the file that one leaves. No torch.

A measure looks at a network as training or somebody else left it, and says what it finds in rows: some columns say
where it looked (a block, a t), the others what it found there. Its file names its columns, so whatever shows it needs
to know nothing else of it. The class is imported when a configuration names it, before anything runs: it imports torch
only where it computes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from haste.config import Seed, Strict
from haste.files import artefact

if TYPE_CHECKING:
    from haste.measure.subject import Subject

KIND = "measure"

#: Column -> where it was looked (a whole number, a number or a word), or what was found there (a number).
Row = Mapping[str, str | int | float]


class Measure(Strict):
    """What an entry of MEASURES is derived from. Its fields are its keys in the configuration, beside `measure` and
    `alignment`: their types, bounds and defaults are those of pydantic and checked before anything runs. All of them
    are part of the result's name; one that came later is marked `LATER`.

    Attributes:
        needs: what must be there beside the network and the images: `alignment`, for the losses against teachers.
        axes: columns that say where it was looked. Numbers are axes of the figure, words have a panel each.
        values: columns of what was found -> the column of its standard error, "" where it has none.
        weights: which of a state's weights; a file with one set alone gives that.
        seed: of the choice of images, and of their noise.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    axes: ClassVar[tuple[str, ...]] = ()
    values: ClassVar[Mapping[str, str]] = {}

    weights: Literal["model", "ema"] = "model"
    seed: Seed = 0

    def faults(self, terms: Mapping[str, Mapping[str, Any]], blocks: int) -> list[str]:
        """What of it no job could measure, before anything runs: each line begins with the key.

        Args:
            terms: the alignment terms to compare with, with their layers; none without `alignment` in `needs`.
            blocks: of the network, as far as they can be told apart; 0 where they cannot.
        """
        return []

    def flops(self, terms: int, forward: float, teachers: float) -> float | None:
        """Operations of measuring one state, for `haste plan`; None where nobody counted them.

        Args:
            terms: how many alignment terms it compares with.
            forward: operations of the network's forward pass on an image; a backward pass takes twice as many.
            teachers: of the teachers' on an image.
        """
        return None

    def run(self, subject: Subject) -> Iterable[Row]:
        """Measure. Every process calls it, all get the same rows. What cannot be measured of this network is left out
        and told in `subject.notes`.

        Args:
            subject: the network, opened, and what was asked for by `needs`.
        """
        raise NotImplementedError(f"{type(self).__name__}.run")


def check_rows(measure: Measure, rows: Iterable[Row], of: str) -> list[dict[str, Any]]:
    """The rows of a measure, with the columns that it has.

    Args:
        measure: whose rows these are.
        rows: as `run` gives them.
        of: what was measured, for messages.

    Raises:
        ValueError: a row without one of the columns, or with another.
        FloatingPointError: a number is not finite; says which, and where.
    """
    errors = [error for error in measure.values.values() if error]
    columns, found = [*measure.axes, *measure.values, *errors], [dict(row) for row in rows]
    for row in found:
        if set(row) != set(columns):
            raise ValueError(f"{of}: {type(measure).__name__} gave a row of {sorted(row)}, expected {sorted(columns)}")
        broken = [name for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
        if broken:
            where = ", ".join(f"{name} {row[name]}" for name in measure.axes)
            raise FloatingPointError(f"{of}: {broken[0]} at {where} is {row[broken[0]]}, expected a finite number")
    return [{name: row[name] for name in columns} for row in found]


def read(path: Path | str) -> dict[str, Any]:
    """What a measure found: its file, checked.

    Raises:
        ValueError: missing, damaged, or no such file.
    """
    found = artefact.read_json(path, KIND)
    artefact.check_entries(path, found, measure=str, axes=list, values=dict, rows=list, notes=list, provenance=dict)
    columns = {*found["axes"], *found["values"], *filter(None, found["values"].values())}
    for number, row in enumerate(found["rows"]):
        if not isinstance(row, dict) or set(row) != columns:
            raise ValueError(f"{path}: damaged or edited: row {number} is not one of {', '.join(sorted(columns))}")
    return found
