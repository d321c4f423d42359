"""When alignment stops. Triggers are pure: a log replays into the same decisions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Decision:
    """stop: whether alignment is off from `step` on; reason: one line for the log and the report."""

    stop: bool
    reason: str
    step: int


@dataclass(frozen=True)
class FixedStop:
    """Stops at a step named in advance (HASTE): steps 0 .. `step` - 1 are aligned, later ones are not."""

    step: int

    def __post_init__(self) -> None:
        if self.step < 0:
            raise ValueError(f"stopping step {self.step}: expected 0 or more")

    def decide(self, step: int, history: Sequence[Mapping[str, Any]] = ()) -> Decision:
        """Decision before step `step`, which is the number of optimiser steps already made.

        `history`, the readings so far, is what triggers driven by data look at; this one does not.
        """
        if step >= self.step:
            return Decision(True, f"fixed stop at step {self.step}", step)
        return Decision(False, f"fixed stop at step {self.step} not reached", step)
