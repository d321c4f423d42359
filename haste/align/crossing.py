"""From which step on a curve is below zero, and how sure: pure functions of curves over steps. No torch.

A curve is what alignment is good for, by step: positive while it helps, negative where it harms, as the loss of a run
that was stopped minus that of one that was not. Its noise comes from units, groups of images or seeds of training that
each give a whole curve, or every point has a standard error.

Two questions are asked in turn. Is there a crossing at all? Only if the curve is surely above zero at some step and
surely below at a later one, where "surely" is of all steps together. Then where? Between the last step at which it is
surely above and the next at which it is surely below, wherever the curve, a straight line from step to step, is not
surely other than zero. That the true curve bends between the steps is in no interval: more steps show it. Where there
is no crossing, one end may still be known: it lies behind a step at which alignment surely helps.

U units, K steps, B draws, T places between the steps.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

Array = NDArray[np.float64]

LEVEL = 0.95
DRAWS = 2000
FINE = 16  # places between two steps


@dataclass(frozen=True)
class Curve:
    """A noisy curve over steps.

    Attributes:
        steps: (K,), increasing.
        values: (U, K), a curve for each unit; their mean is the curve.
        by: what the units are: `images`, for the bootstrap over them, or `seeds`, for t-intervals.
        errors: (K,) standard errors of the only unit, in any correlation with one another; None for others. One unit
            without errors has unknown noise.
    """

    steps: Array
    values: Array
    by: Literal["images", "seeds"]
    errors: Array | None = None

    @property
    def mean(self) -> Array:
        """(K,)."""
        return self.values.mean(axis=0)

    @property
    def is_noisy(self) -> bool:
        """Whether anything is known of its noise."""
        return len(self.values) > 1 or self.errors is not None


@dataclass(frozen=True)
class Crossing:
    """Where a curve falls below zero; `step` is None if that cannot be told. `low` and `high` are the 95 % interval,
    None as far as it is not known. `reason` says what is known instead, or how the interval was found."""

    step: float | None
    low: float | None
    high: float | None
    reason: str

    def __str__(self) -> str:
        if self.step is None:
            return f"cannot tell: {self.reason}"
        known = "" if self.low is None or self.high is None else f"95 %: {self.low:,.0f} to {self.high:,.0f}; "
        return f"step {self.step:,.0f} ({known}{self.reason})"


def interval(curve: Curve, together: bool = False) -> tuple[Array, Array]:
    """Bounds of the 95 % interval of each step, or of all steps together; (K,) each, NaN if nothing is known of noise.

    Over images: percentiles of the bootstrap, expanded for few units (Hesterberg 2015, section 4.1). Over seeds:
    Student's t. With errors: the normal distribution.
    """
    return _bounds(curve, np.eye(curve.values.shape[1]), together)


def _bounds(curve: Curve, weights: Array, together: bool = False) -> tuple[Array, Array]:
    """As `interval`, for weighted means over steps; weights: (K, T), of which each column sums to 1."""
    at = curve.values @ weights  # (U, T)
    mean, units, tail = at.mean(axis=0), len(at), (1 - LEVEL) / 2
    each = tail / weights.shape[1] if together else tail  # Bonferroni
    if units == 1:
        if curve.errors is None:
            return np.full_like(mean, np.nan), np.full_like(mean, np.nan)
        half = -NormalDist().inv_cdf(each) * (curve.errors @ weights)  # an upper bound, whatever their correlation
        return mean - half, mean + half
    error = at.std(axis=0, ddof=1) / math.sqrt(units)
    if curve.by == "seeds":
        half = -float(stdtrit(units - 1, each)) * error
        return mean - half, mean + half
    spread = (at - mean).T @ _resampled(units) * _expansion(units, each)  # (T, B)
    if together:  # the largest deviation of all steps, in standard errors
        safe = np.where(error > 0, error, 1.0)
        half = float(np.quantile(np.abs(spread / safe[:, None]).max(axis=0), LEVEL)) * error
        return mean - half, mean + half
    low, high = np.quantile(spread, [tail, 1 - tail], axis=1)
    return mean + low, mean + high


@functools.lru_cache(maxsize=4)
def _resampled(units: int) -> Array:
    """Weights of the units in each draw of the bootstrap, (U, B); the same in every call."""
    counts = np.random.default_rng(0).multinomial(units, np.full(units, 1 / units), size=DRAWS)
    return np.ascontiguousarray(counts.T / units)


def _expansion(units: int, tail: float) -> float:
    """How much wider than the bootstrap's an interval of so few units must be."""
    return math.sqrt(units / (units - 1)) * float(stdtrit(units - 1, tail)) / NormalDist().inv_cdf(tail)


def crossing(curve: Curve) -> Crossing:
    """The step from which on the curve is below zero; see the top of the file."""
    if not len(curve.steps):
        return Crossing(None, None, None, "no step has all seeds yet")
    if not curve.is_noisy:
        return Crossing(None, None, None, "one seed, whose noise is not known")
    low, high = interval(curve, together=True)
    above, below = np.flatnonzero(low > 0), np.flatnonzero(high < 0)
    pair = [above[-1], *below[below > above[-1]][:1]] if len(above) else []
    if len(pair) < 2:
        return _bound(curve.steps, above, below)
    places, weights = _between(curve.steps, pair[0], pair[1])
    left, right = _bounds(curve, weights)
    ends = [
        _zero(places, curve.mean @ weights),
        _zero(places, left),
        places[-1] - _zero(places[-1] - places[::-1], -right[::-1]),
    ]
    return Crossing(ends[0], min(ends), max(ends), _how(curve))


def _zero(places: Array, values: Array) -> float:
    """Where values, on straight lines between places, first fall to zero; the first place if they begin below."""
    at = int(np.argmax(values <= 0))
    if at == 0:
        return float(places[0])
    share = values[at - 1] / (values[at - 1] - values[at])
    return float(places[at - 1] + share * (places[at] - places[at - 1]))


def _between(steps: Array, first: int, last: int) -> tuple[Array, Array]:
    """Places from one step to another, (T,), and the weights of the steps in each, (K, T)."""
    inner = range(first, last)
    pieces = [np.linspace(steps[k], steps[k + 1], FINE, endpoint=False) for k in inner]
    places = np.concatenate([*pieces, steps[last : last + 1]])
    return places, np.stack([np.interp(places, steps, one) for one in np.eye(len(steps))])


def _bound(steps: Array, above: NDArray[np.int64], below: NDArray[np.int64]) -> Crossing:
    """What is known of a curve without a crossing from above."""
    if len(above):
        last, dip = steps[above[-1]], f" after harming at step {steps[below[-1]]:,.0f}" if len(below) else ""
        said = f"alignment surely helps at step {last:,.0f}{dip}, and surely harms at no later step"
        return Crossing(None, float(last), None, said)
    if len(below):
        first = steps[below[0]]
        said = f"alignment surely harms at step {first:,.0f}, and surely helps at no earlier step"
        return Crossing(None, None, float(first), said)
    return Crossing(None, None, None, "at no step is the difference surely other than zero")


def _how(curve: Curve) -> str:
    if curve.errors is not None:
        return "by standard errors"
    if curve.by == "images":
        return f"paired bootstrap over {len(curve.values)} groups of images"
    return f"t-interval over {len(curve.values)} seeds"
