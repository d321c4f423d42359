"""Where a trigger of gradient angles fires, and how sure that is: pure functions of readings with errors. No torch.

A trigger fires once, so the first dip below its threshold counts, whether or not the cosine rises again. Bands that
hold the true cosines of all readings at once bracket what it would do of these: on a lower curve it never fires later.
So where it fires on the lower ends is the earliest place, and where it fires on the upper ends the latest, with its
patience and its margin, and whatever the curve looks like. Between two readings nothing is known: the interval begins
at the reading before the earliest place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np

from haste.align import triggers
from haste.align.crossing import LEVEL, Crossing, Curve, interval
from haste.align.triggers import GradientAngle, Reading

NAME = "gradient-angle"


@dataclass(frozen=True)
class Firing:
    """What a trigger does on the readings of one seed.

    Attributes:
        step: where it fires; None if it does not.
        low: up to where it surely does not; None if noise is not known.
        high: by where it surely does; None if it may never, or if noise is not known.
        what: the reading that tells most, in words.
    """

    step: float | None
    low: float | None = None
    high: float | None = None
    what: str = ""


def fired(trigger: GradientAngle, readings: Sequence[Reading]) -> Firing:
    """What a trigger does on readings of `mean`, each with a standard `error`, in any correlation with one another."""
    width = NormalDist().inv_cdf(1 - (1 - LEVEL) / 2 / len(readings))  # Bonferroni
    early, here, late = (_step(trigger, readings, sign * width) for sign in (-1, 0, 1))
    steps = [reading.step for reading in readings]
    before = steps[-1] if early is None else max((step for step in steps if step < early), default=0)
    tells = next((one for one in readings if one.step == here), min(readings, key=lambda one: one.values["mean"]))
    what = f"the cosine is {tells.values['mean']:.3f} ± {tells.values['error']:.3f} at step {tells.step:,}"
    later = [one for one in readings if here is not None and one.step > here]
    again = [one.step for one in later if one.values["mean"] - width * one.values["error"] > trigger.threshold]
    back = f", and surely above {trigger.threshold:g} again at {again[0]:,}" if again else ""
    return Firing(here, before, late, what + back)


def _step(trigger: GradientAngle, readings: Sequence[Reading], widths: float) -> int | None:
    """Where it fires if every cosine is so many errors higher."""
    moved = [
        replace(one, values={**one.values, "mean": one.values["mean"] + widths * one.values["error"]})
        for one in readings
    ]
    found = triggers.replayed(NAME, trigger, moved)
    return found and found[0]


def agreed(firings: Sequence[Firing]) -> Crossing:
    """What the firings of all seeds say together: the mean over them, if with each it surely fires."""
    if len(firings) == 1:
        return _alone(firings[0])
    steps, count = [one.step for one in firings if one.step is not None], len(firings)
    at = f"at {', '.join(f'{step:,}' for step in steps)}"
    if len(steps) < count:
        said = f"it fires with {len(steps)} of {count} seeds, {at}" if steps else f"it fires with none of {count} seeds"
        return Crossing(None, None, None, said)
    unsure = sum(one.low is not None and one.high is None for one in firings)
    if unsure:
        return Crossing(None, None, None, f"it fires with all {count} seeds, {at}, but not surely with {unsure}")
    low = _bounds([step if one.low is None else one.low for step, one in zip(steps, firings, strict=True)])[0]
    high = _bounds([step if one.high is None else one.high for step, one in zip(steps, firings, strict=True)])[1]
    return Crossing(float(np.mean(steps)), max(0.0, low), high, f"t-interval over {count} seeds, {at}")


def _alone(one: Firing) -> Crossing:
    if one.step is None:
        return Crossing(None, one.low, None, f"it does not fire{': ' if one.what else ''}{one.what}")
    if one.low is None:
        return Crossing(one.step, None, None, "one seed, whose noise is not known")
    if one.high is None:
        return Crossing(None, one.low, None, f"it fires at step {one.step:,}, but not surely: {one.what}")
    return Crossing(one.step, one.low, one.high, f"by standard errors: {one.what}")


def _bounds(steps: Sequence[float]) -> tuple[float, float]:
    (low,), (high,) = interval(Curve(np.zeros(1), np.array(steps, dtype=float)[:, None], "seeds"))
    return float(low), float(high)
