"""When to stop aligning, decided by what is seen while training: pure functions, so that a log replays. No torch.

A trigger watches one alignment term. Training makes the readings that the trigger needs, from a step on and every so
many steps (`after` and `every` of the configuration), and asks it after each: stop, or go on. A step is counted by the
optimiser steps before it, so a term that is stopped at step tau was aligned on the steps before tau.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

#: Keys that all triggers have: which one, the step before which it sees nothing, and the steps between readings.
COMMON = ("trigger", "after", "every")


@dataclass(frozen=True)
class Average:
    """A reading that costs next to nothing: the exponential average of something that every step computes anyway.

    The average weighs the steps that it saw by decay^age and is normalised, so that it is one from its first step on.

    Attributes:
        of: `residual`, what is left of the watched term's loss: 1 - cosine of features compared by their angle, in
            [0, 2], else the loss itself; or `denoising`, the denoising loss.
        decay: of the weights, a step, in [0, 1); 0 is the last step alone.
        steps: how many steps it must have seen before it is read.
    """

    of: str
    decay: float
    steps: int = 1


#: What a reading may ask for; training knows how to measure each of them (`haste/train/readings.py`).
Measure = Average
AVERAGED = ("residual", "denoising")


@dataclass(frozen=True)
class Reading:
    """What was measured after `step` steps, by the names that the trigger gave in `needs`."""

    step: int
    values: Mapping[str, float]


@dataclass(frozen=True)
class Decision:
    """Whether to stop the term now, and why or why not, in words for the log and the report."""

    stop: bool
    reason: str


class Trigger(Protocol):
    """What an entry of TRIGGERS makes of the parameters in the configuration."""

    @property
    def needs(self) -> Mapping[str, Measure]:
        """What to measure, by names of the trigger's own choice. A reading has all of them, or is not made."""
        ...

    def decide(self, step: int, history: Sequence[Reading]) -> Decision:
        """Stop or go on.

        Args:
            step: steps done.
            history: all readings so far, at least one; the last one is of this step.
        """
        ...


@dataclass(frozen=True)
class Plateau:
    """Stop when the term has stopped improving (RARE, arXiv 2609.34732).

    The fast average of the residual is compared with the slow one: while the residual falls, the fast one is below.
    Nothing is decided before the slow average has seen as many steps as it looks back on, 1 / (1 - slow).

    Attributes:
        fast: decay of the fast average, a step.
        slow: decay of the slow average, a step.
        margin: the share of the slow average by which the fast one must be lower for the term to go on.
    """

    fast: float = 0.999
    slow: float = 0.99995
    margin: float = 0.02

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
        found = f"the residual's fast average {fast:.4g} is {better:.2%} below its slow one {slow:.4g}"
        return Decision(stop, f"{found}, {'less' if stop else 'more'} than {self.margin:.2%}")


#: Name in the configuration -> what makes the trigger of its own parameters.
TRIGGERS: dict[str, Callable[..., Trigger]] = {"plateau": Plateau}


def made(settings: Mapping[str, Any]) -> Trigger:
    """The trigger of a term's `stop` in the configuration.

    Args:
        settings: `trigger`, `after`, `every`, and the trigger's own parameters.

    Raises:
        ValueError: no such trigger, or not its parameters; says which it takes.
    """
    name, own = settings["trigger"], {key: value for key, value in settings.items() if key not in COMMON}
    if name not in TRIGGERS:
        raise ValueError(f"trigger: nothing is called {name!r}; known: {', '.join(sorted(TRIGGERS))}")
    try:
        inspect.signature(TRIGGERS[name]).bind(**own)
    except TypeError as error:
        takes = ", ".join(inspect.signature(TRIGGERS[name]).parameters) or "none"
        raise ValueError(f"trigger {name!r}: {error}; found {own}, expected its parameters: {takes}") from None
    trigger = TRIGGERS[name](**own)
    for key, measure in trigger.needs.items():
        if not isinstance(measure, Average) or measure.of not in AVERAGED:
            raise ValueError(
                f"trigger {name!r} needs {key} = {measure!r}, expected an Average of {' or '.join(AVERAGED)}"
            )
    return trigger


def decided(name: str, trigger: Trigger, history: Sequence[Reading]) -> Decision:
    """What a trigger decides after the last of its readings.

    Raises:
        ValueError: it says something else than a decision.
    """
    found = trigger.decide(history[-1].step, history)
    if not isinstance(found, Decision):
        raise ValueError(f"trigger {name!r}: decide returned {found!r}, expected a Decision")
    return found


def replayed(name: str, trigger: Trigger, history: Sequence[Reading]) -> tuple[int, Decision] | None:
    """Step and decision at which a trigger stops the term, given all readings of a run; None if it never does."""
    for count in range(1, len(history) + 1):
        decision = decided(name, trigger, history[:count])
        if decision.stop:
            return history[count - 1].step, decision
    return None
