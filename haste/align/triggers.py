"""When to stop aligning, decided from readings during training: pure functions, so that logs can be replayed. No torch.

A trigger watches one alignment term. From a start step on (`after` in the configuration) training makes the readings
that it needs at regular intervals (`every`), and lets it decide after each: stop, or continue. A step is counted by the
optimiser steps before it, so a term that is stopped at step tau was aligned on the steps before tau.
"""

from __future__ import annotations

import difflib
import itertools
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from haste import extensions
from haste.align.terms import of_features

#: Kind of an alignment term -> its settings.
Terms = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Average:
    """A reading that costs next to nothing: the exponential average of a value that every step computes anyway.

    The average weights the steps that it saw by decay^age and is normalised, so that it is an average from its first
    step on.

    Attributes:
        of: `residual`, the residual of the watched term's loss: 1 - cosine of features compared by their angle, in
            [0, 2], otherwise the loss itself; or `denoising`, the denoising loss.
        decay: of the weights, per step, in [0, 1); 0 is the last step alone.
        steps: how many steps it must have seen before it is read.
    """

    of: str
    decay: float
    steps: int = 1


@dataclass(frozen=True)
class Angle:
    """A reading that needs passes of its own: the cosine between the gradients of the alignment loss and of the
    denoising loss with respect to the parameters of a block, or its standard error.

    Attributes:
        times: every image is passed at each of these t; the cosines are averaged over them.
        block: blocks, counted from 1, over which the cosines are averaged; none means `block_of` the terms.
        images: how many random training images, the same at every reading; all if there are fewer.
        shards: groups of images for the jackknife that gives the error.
        of: `alignment`, the weighted sum of all active terms; or `own`, the watched term alone.
        error: whether the reading is the standard error of that average instead of the average itself.
    """

    times: tuple[float, ...]
    block: tuple[int, ...] = ()
    images: int = 2048
    shards: int = 8
    of: str = "alignment"
    error: bool = False


#: What a trigger may request; training can measure each of them (`haste/train/readings.py`).
Measure = Average | Angle
AVERAGED = ("residual", "denoising")
ALIGNED = ("alignment", "own")


@dataclass(frozen=True)
class Reading:
    """The measurements after `step` steps, by the names that the trigger gave in `needs`."""

    step: int
    values: Mapping[str, float]


@dataclass(frozen=True)
class Decision:
    """Whether to stop the term now, and why or why not, in words for the log and the report."""

    stop: bool
    reason: str


class Trigger(BaseModel):
    """The base class of the entries of TRIGGERS. Its fields are its parameters in the configuration, with or without
    defaults; their types and bounds are checked before anything runs."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @property
    def needs(self) -> Mapping[str, Measure]:
        """What to measure, by names that the trigger chooses. A reading has all of them, or is not made."""
        raise NotImplementedError

    @property
    def shown(self) -> Sequence[str]:
        """Which of them people are shown, in tables and figures."""
        return [name for name, need in self.needs.items() if not (isinstance(need, Angle) and need.error)]

    def decide(self, step: int, history: Sequence[Reading]) -> Decision:
        """Stop or continue: a function of its arguments alone.

        Args:
            step: steps done.
            history: all readings so far, at least one; the last one is from this step.
        """
        raise NotImplementedError


Decay = Annotated[float, Field(ge=0, lt=1)]


class Plateau(Trigger):
    """Stop when the term has stopped improving (RARE, arXiv 2609.34732).

    The fast average of the residual is compared with the slow one: while the residual falls, the fast one is below.
    Nothing is decided before the slow average has seen as many steps as its window, 1 / (1 - slow).

    Attributes:
        fast: decay of the fast average, per step.
        slow: decay of the slow average, per step.
        margin: the fraction of the slow average by which the fast one must be lower for the term to continue.
    """

    fast: Decay = 0.999
    slow: Decay = 0.99995
    margin: Annotated[float, Field(ge=0, le=1)] = 0.02

    @model_validator(mode="after")
    def _ordered(self) -> Plateau:
        if self.fast >= self.slow:
            raise ValueError(f"fast {self.fast} is not below slow {self.slow}: it must average over fewer steps")
        return self

    @property
    def needs(self) -> dict[str, Measure]:
        """The two averages."""
        seen = round(1 / (1 - self.slow))
        return {"fast": Average("residual", self.fast, seen), "slow": Average("residual", self.slow, seen)}

    def decide(self, step: int, history: Sequence[Reading]) -> Decision:
        """See `Trigger`."""
        fast, slow = (history[-1].values[name] for name in ("fast", "slow"))
        stop = fast >= (1 - self.margin) * slow
        better = 1 - fast / slow if slow else 0.0
        where = f"{abs(better):.2%} {'below' if better >= 0 else 'above'}"
        asked = f"{'not' if stop else 'and so'} more than {self.margin:.2%} below"
        return Decision(stop, f"the residual's fast average {fast:.4g} is {where} its slow one {slow:.4g}, {asked}")


Count = Annotated[int, Field(ge=1)]
Several = Annotated[int, Field(ge=2)]
Time = Annotated[float, Field(ge=0, le=1)]


class GradientAngle(Trigger):
    """Stop when alignment works against denoising (HASTE, arXiv 2505.16792): when the cosine between their gradients,
    averaged over times, is below a threshold.

    Attributes:
        threshold: the cosine below which the term stops.
        times: t at which the cosine is measured.
        block: the block, or the blocks to average over, counted from 1; None as in `Angle`.
        images: as in `Angle`.
        shards: as in `Angle`.
        of: as in `Angle`.
        patience: number of consecutive readings at which the cosine must be below.
        sure: number of standard errors by which it must be below.
    """

    threshold: Annotated[float, Field(le=1)] = -0.05
    times: Annotated[list[Time], Field(min_length=1)] = [0.02, 0.1, 0.5, 0.8]
    block: Count | Annotated[list[Count], Field(min_length=1)] | None = None
    images: Several = 2048
    shards: Several = 8
    of: Literal["alignment", "own"] = "alignment"
    patience: Count = 1
    sure: Annotated[float, Field(ge=0)] = 0.0

    @model_validator(mode="after")
    def _measurable(self) -> GradientAngle:
        for name, values in {"times": self.times, "block": self.block}.items():
            if isinstance(values, list) and len(set(values)) < len(values):
                raise ValueError(f"{name} {values} has a value more than once, expected each once")
        if self.shards > self.images:
            raise ValueError(f"shards {self.shards} are more than images {self.images}, expected at most as many")
        return self

    @property
    def needs(self) -> dict[str, Measure]:
        """The cosine at every t and their mean, each with its error: the mean's error is not the mean of the errors."""
        blocks = (self.block,) if isinstance(self.block, int) else tuple(self.block or ())
        whole = Angle(tuple(self.times), blocks, self.images, self.shards, self.of)
        found: dict[str, Measure] = {}
        for t in self.times:
            at = replace(whole, times=(t,))
            found |= {f"t={t}": at, f"t={t} error": replace(at, error=True)}
        return found | {"mean": whole, "error": replace(whole, error=True)}

    @property
    def shown(self) -> Sequence[str]:
        """The mean alone."""
        return ["mean"]

    def decide(self, step: int, history: Sequence[Reading]) -> Decision:
        """See `Trigger`."""
        below = 0
        for reading in reversed(history):
            if reading.values["mean"] + self.sure * reading.values["error"] >= self.threshold:
                break
            below += 1
        mean, error = (history[-1].values[name] for name in ("mean", "error"))
        around = f" ± {error:.4f}" if error else ""  # a published cosine has none
        where = f"{'' if below else 'not '}below {self.threshold:g}"
        surely = f" by {self.sure:g} standard errors" if self.sure else ""
        row = f", at {below} of {self.patience} readings in a row" if self.patience > 1 else ""
        return Decision(below >= self.patience, f"the gradients' cosine {mean:.4f}{around} is {where}{surely}{row}")


def block_of(terms: Terms) -> int:
    """The block, counted from 1, with respect to whose parameters gradients are taken by default: the one whose
    (first teacher's) features are aligned or, if only attention is aligned, the last aligned one."""
    return next((term["depth"] for term in of_features(terms).values()), None) or reached(terms)


def reached(terms: Terms) -> int:
    """The last block whose parameters get a gradient from these terms, counted from 1."""
    depths = [term["depth"] for term in of_features(terms).values()]
    return max(depths + [layer + 1 for layer in terms.get("attention", {}).get("student_layers", ())])


def counting(terms: Terms, t: float, place: Callable[[float], float] = lambda t: t) -> Terms:
    """The alignment terms for which a sample at t counts; `place` gives the time nearest to one that a process has."""
    bounds = {kind: (term.get("t_min", 0.0), term.get("t_max", 1.0)) for kind, term in terms.items()}
    return {kind: terms[kind] for kind, (low, high) in bounds.items() if place(low) <= place(t) <= place(high)}


def faults(trigger: Trigger, kind: str, terms: Terms, blocks: int) -> list[str]:
    """What cannot be measured of a trigger's angles while these terms are active: the attribute of `Angle`, and why.

    Args:
        trigger: the trigger.
        kind: the watched term.
        terms: the active terms, including the watched one: their layers, `t_min` and `t_max`.
        blocks: number of the network's blocks; 0 if its parameters cannot be assigned to blocks.
    """
    found = []
    for angle in (measure for measure in trigger.needs.values() if isinstance(measure, Angle)):
        active = {kind: terms[kind]} if angle.of == "own" else terms
        for t, block in itertools.product(angle.times, angle.block or (block_of(active),)):
            counts = counting(active, t)
            if not blocks:
                found.append("block: gradients are taken by block, but the network has no list of its blocks")
            elif block > blocks:
                found.append(f"block: {block}, but the network has blocks 1 to {blocks}")
            elif not counts:
                found.append(
                    f"times: {t} is not from t_min to t_max of {' and '.join(active)}: nothing is aligned there"
                )
            elif block > (last := reached(counts)):
                found.append(
                    f"block: {block}, but at t={t} the loss of {' and '.join(counts)} reaches no block after {last}"
                )
    return list(dict.fromkeys(found))


#: Name in the configuration -> the trigger.
TRIGGERS: dict[str, type[Trigger]] = {"plateau": Plateau, "gradient-angle": GradientAngle}


def named(name: str) -> type[Trigger]:
    """The trigger of this name: a built-in one, or one of another package, which is imported.

    Raises:
        ValueError: there is no such name, or its module cannot be imported or holds no trigger.
    """
    if name in TRIGGERS:
        return TRIGGERS[name]
    known = sorted({*TRIGGERS, *extensions.names("triggers")})
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        raise ValueError(
            f"nothing is called {name!r}"
            + (f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}")
        )
    found = extensions.one("triggers", name, TRIGGERS)
    if not isinstance(found, type) or not issubclass(found, Trigger):
        raise ValueError(f"{name} is {found!r}, expected a class derived from haste.align.triggers.Trigger")
    return found


def made(name: str, parameters: Mapping[str, Any]) -> Trigger:
    """A trigger with its parameters.

    Raises:
        ValueError: as `named`; or unknown parameters, or needs that training cannot measure.
    """
    kind = named(name)
    who = _who(name, kind)
    for part in ("needs", "decide"):
        if getattr(kind, part, None) is getattr(Trigger, part):
            raise ValueError(f"{who} has no {part} of its own, expected one as haste.align.triggers.Trigger describes")
    with _blamed(who, "checking its parameters", but=ValueError):
        trigger = kind(**parameters)
    with _blamed(who, "needs"):
        needs = trigger.needs
    if not isinstance(needs, Mapping):
        raise ValueError(f"{who}: needs is {needs!r}, expected a mapping from names to what is measured")
    for key, measure in needs.items():
        _check_need(who, key, measure)
    return trigger


def _check_need(who: str, key: Any, measure: Any) -> None:
    if not isinstance(key, str) or key == "step":  # every reading has its own `step`
        raise ValueError(f"{who} needs {key!r}, expected a name, and another than 'step'")
    check = {Average: _wrong_in_average, Angle: _wrong_in_angle}.get(type(measure))
    if wrong := check(measure) if check else "an Average or an Angle":
        raise ValueError(f"{who} needs {key} = {measure!r}, expected {wrong}")


def _wrong_in_average(measure: Any) -> str:
    """What was expected instead of a measure that is not possible; empty if it is."""
    if measure.of not in AVERAGED:
        return f"an Average of {' or '.join(AVERAGED)}"
    if not isinstance(measure.decay, int | float) or not 0 <= measure.decay < 1:
        return "a decay of at least 0 and below 1"
    return "steps to be a whole number of at least 1" if not _whole(measure.steps, 1) else ""


def _wrong_in_angle(measure: Any) -> str:
    """As `_wrong_in_average`."""
    times, blocks = measure.times, measure.block
    if not isinstance(times, tuple) or not times or not all(isinstance(t, int | float) and 0 <= t <= 1 for t in times):
        return "a tuple of times from 0 to 1"
    if not isinstance(blocks, tuple) or not all(_whole(block, 1) for block in blocks):
        return "block to be a tuple of whole numbers of at least 1"
    if not _whole(measure.shards, 2) or not _whole(measure.images, measure.shards):
        return "at least 2 shards, and as many images"
    return f"an Angle of {' or '.join(ALIGNED)}" if measure.of not in ALIGNED else ""


def _whole(value: Any, least: int) -> bool:
    return type(value) is int and value >= least


def _who(name: str, kind: type[Trigger]) -> str:
    return f"trigger {name!r}" + ("" if TRIGGERS.get(name) is kind else f" ({kind.__module__}:{kind.__qualname__})")


@contextmanager
def _blamed(who: str, part: str, but: tuple[type[Exception], ...] | type[Exception] = ()) -> Iterator[None]:
    """An error raised by a trigger's own code, in one line with the place, for its author to fix."""
    try:
        yield
    except but:
        raise
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{who}: {part} failed with {what} ({place.filename}, line {place.lineno})") from error


def first_reading(trigger: Trigger, after: int, every: int, since: int | None = None) -> int:
    """The first step that has a reading, out of `after` + `every`, `after` + 2 `every`, ...

    Args:
        trigger: the trigger.
        after: steps before the first one that it may see.
        every: steps between readings.
        since: steps before the first one that it sees, if later than `after`.
    """
    needed = max([1, *(measure.steps for measure in trigger.needs.values() if isinstance(measure, Average))])
    return after + -(-(needed + max(after, since or 0) - after) // every) * every


def decided(name: str, trigger: Trigger, history: Sequence[Reading]) -> Decision:
    """A trigger's decision after the last of its readings.

    Raises:
        ValueError: it fails, or returns something other than a decision.
    """
    who, step = _who(name, type(trigger)), history[-1].step
    with _blamed(who, f"decide after step {step}"):
        found = trigger.decide(step, history)
    if not isinstance(found, Decision):
        raise ValueError(f"{who}: decide returned {found!r}, expected a Decision")
    return found


def replayed(name: str, trigger: Trigger, history: Sequence[Reading]) -> tuple[int, Decision] | None:
    """The step and decision at which a trigger stops the term, given all readings of a run; None if it never does."""
    for count in range(1, len(history) + 1):
        decision = decided(name, trigger, history[:count])
        if decision.stop:
            return history[count - 1].step, decision
    return None
