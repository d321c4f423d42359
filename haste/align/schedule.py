"""The weight of an alignment loss at a step: a pure function, so that a replayed log gives the same weights. No torch.

A step is counted by the optimiser steps before it. A term that stops at step tau is aligned on the steps before tau.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

#: Fraction of the way from a ramp's begin to the stop, in [0, 1] -> factor, from 1 to 0.
SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1.0 - x,
    "cosine": lambda x: 0.5 * (1.0 + math.cos(math.pi * x)),
}


def warmed(step: int, steps: int) -> float:
    """0 at step 0, growing linearly, 1 from step `steps` on."""
    return min(1.0, step / steps) if steps else 1.0


def ramped(step: int, begin: int, stop: int, shape: str) -> float:
    """1 up to step `begin`, falling by a shape of SHAPES, 0 from step `stop` on."""
    share = (step - begin) / (stop - begin)
    return SHAPES[shape](min(1.0, max(0.0, share)))


def released(release: Mapping[str, Any], fired: int) -> dict[str, Any]:
    """The ramp of a term that a trigger releases: the weight falls over a share of the steps done where it fired.

    Args:
        release: {"share": in (0, 1], "shape": name in SHAPES}.
        fired: steps done where the trigger fired.
    """
    return {"from": fired, "to": fired + max(1, round(release["share"] * fired)), "shape": release["shape"]}


def factor(step: int, term: Mapping[str, Any]) -> float:
    """The factor of a term's weight at a step.

    Args:
        step: steps done before this one.
        term: may have `warmup`, in steps, and `ramp`: {"from": step, "to": step, "shape": name}.
    """
    ramp = term.get("ramp")
    down = 1.0 if ramp is None else ramped(step, ramp["from"], ramp["to"], ramp["shape"])
    return warmed(step, term.get("warmup", 0)) * down
