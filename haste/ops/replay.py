"""When triggers with other settings would have stopped a term, from what was read while it was trained. No torch.

What a source (`haste/ops/sources.py`) does not have cannot be replayed, and is said.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import yaml
from pydantic import ValidationError

from haste import config
from haste.align import triggers
from haste.align.triggers import Angle, Average, Decision, Measure, Reading
from haste.ops.sources import Source, trigger_of

WHOSE = {"stop": "as run", "watch": "as watched", "published": "defaults"}


@dataclass(frozen=True)
class Outcome:
    """What a trigger would have decided.

    Attributes:
        source: from what.
        settings: of the trigger, with its name, `after` and `every`.
        whose: `as run` or `as watched` for those that it was read with, `defaults`, or `set`.
        history: the readings that it could have made, also behind the stop.
        step: the step at which it stops; None if it does not.
        decision: there or, if it does not stop, at the last reading.
        missing: why nothing can be said; empty if something can.
    """

    source: Source
    settings: Mapping[str, Any]
    whose: str
    history: Sequence[Reading] = ()
    step: int | None = None
    decision: Decision | None = None
    missing: str = ""

    @property
    def trigger(self) -> triggers.Trigger:
        """The trigger with these settings."""
        return trigger_of(self.settings)

    @property
    def shown(self) -> dict[str, float]:
        """The values of the reading where it stops, or of the last one, that tell most; empty without a reading."""
        at = next((one for one in self.history if one.step == self.step), self.history[-1] if self.history else None)
        return {} if at is None else {name: at.values[name] for name in self.trigger.shown}


def outcomes(found: Sequence[Source], asked: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Outcome]:
    """What triggers would have decided.

    Args:
        found: the sources.
        asked: trigger -> settings to replay it with, each on top of those that it was read with, as `grid` makes them.
            Empty: those that it was read with, and the defaults.

    Raises:
        ValueError: an unknown setting, or nothing can be replayed at all.
    """
    said: list[Outcome] = []
    for term in dict.fromkeys(one.term for one in found):
        read = [one for one in found if one.term == term and one.settings]
        log = next((one for one in found if one.term == term and one.found == "log"), Source(term, "log"))
        if not asked:
            said += [replayed(one, one.settings, WHOSE[one.found]) for one in read]
        for name in asked or triggers.TRIGGERS:
            own = [one for one in read if one.settings["trigger"] == name] or ([log] if asked or log.lines else [])
            for one, change in itertools.product(own, asked.get(name, [{}])):
                settings = completed({**_base(one, name, defaults=not asked), **change})
                if asked or settings != one.settings:
                    outcome = replayed(one, settings, "set" if change else "defaults")
                    again = replayed(log, settings, outcome.whose) if outcome.missing and log.lines else outcome
                    said.append(outcome if again.missing else again)
    if not any(one.history for one in said):
        why = "; ".join(dict.fromkeys(f"{one.source.term}: {one.missing}" for one in said)) or _NOTHING
        raise ValueError(f"nothing can be replayed: {why}")
    return said


_NOTHING = "no trigger has read anything, and there is no log; train the run, or a run with `watch`, first"
_NO_ANGLES = "a log has no angles between gradients; `watch: {trigger: gradient-angle}` records them"


def _base(source: Source, name: str, *, defaults: bool) -> dict[str, Any]:
    """The settings that a replay starts from: those that a source was read with or, where only the decision depends
    on them, the defaults."""
    if not source.settings:
        return {"trigger": name}
    if not defaults:
        return dict(source.settings)
    kept, trigger = dict(source.settings), trigger_of(source.settings)
    for key, one in type(trigger).model_fields.items():
        with contextlib.suppress(ValueError):  # the default does not go with what stays
            if not one.is_required() and trigger_of({**kept, key: one.default}).needs == trigger.needs:
                kept[key] = one.default
    return kept


def completed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a trigger, checked as those of a configuration.

    Raises:
        ValueError: an unknown or impossible one, in one line.
    """
    try:
        return config.Trigger.model_validate(dict(settings)).model_dump(mode="json", exclude={"release"})
    except ValidationError as error:
        said = "; ".join(config.explain(fault) for fault in error.errors())
        raise ValueError(f"{settings['trigger']}: {said.removeprefix('the configuration: ')}") from None


def replayed(source: Source, settings: Mapping[str, Any], whose: str) -> Outcome:
    """What a trigger with these settings would have decided."""
    outcome = Outcome(source, settings, whose)
    try:
        history = readings(source, settings)
    except ValueError as error:
        return replace(outcome, missing=str(error))
    name, trigger = settings["trigger"], trigger_of(settings)
    stop = triggers.replayed(name, trigger, history)
    step, decision = stop or (None, triggers.decided(name, trigger, history))
    return replace(outcome, history=history, step=step, decision=decision)


def readings(source: Source, settings: Mapping[str, Any]) -> list[Reading]:
    """The readings that a trigger would have made, at least one.

    Raises:
        ValueError: they cannot be had from the source; the message says why.
    """
    trigger, after, every = trigger_of(settings), settings["after"], settings["every"]
    if settings.get("sure") and source.found == "published":
        raise ValueError("the table has no standard errors, expected sure: 0")
    averages = any(isinstance(need, Average) for need in trigger.needs.values())
    first = triggers.first_reading(trigger, after, every)
    if source.found == "log":
        if not source.lines:
            raise ValueError(_NOTHING)
        columns = {name: _from_log(source, need, after) for name, need in trigger.needs.items()}
    else:
        if averages and after != source.settings["after"]:
            raise ValueError(f"its averages begin after step {source.settings['after']}, not {after}")
        columns = {name: _column(source, need) for name, need in trigger.needs.items()}
    steps = set.intersection(*(set(column) for column in columns.values()))
    chosen = [step for step in sorted(steps) if step >= first and (step - after) % every == 0]
    if not chosen:
        known = source.settings or {"after": 0, "every": max((high - low for low, high, _ in source.lines), default=1)}
        raise ValueError(
            f"the first reading would be after step {first}, then every {every}; the readings end at {source.last}, "
            f"every {known['every']} after {known['after']}"
        )
    return [Reading(step, {name: column[step] for name, column in columns.items()}) for step in chosen]


def _column(source: Source, need: Measure) -> Mapping[int, float]:
    """Step -> value of what was measured, or of a mean over times of which each was. The standard error of such a mean
    is at most the mean of theirs, which stands for it. A published table has no errors: 0 stands for them."""
    if need in source.columns:
        return source.columns[need]
    if isinstance(need, Angle) and need.error and source.found == "published":
        return dict.fromkeys(_column(source, replace(need, error=False)), 0.0)
    if isinstance(need, Angle) and len(need.times) > 1:
        parts = [_column(source, replace(need, times=(t,))) for t in need.times]
        steps = set.intersection(*(set(part) for part in parts))
        return {step: sum(part[step] for part in parts) / len(parts) for step in steps}
    raise ValueError(f"was not measured with these settings: {_words(need)}; it was {_words(*source.columns)}")


def _words(*measures: Measure) -> str:
    """What was measured, in the words of the settings."""
    averages = [f"{one.of} with decay {one.decay}" for one in measures if isinstance(one, Average)]
    angles = [one for one in measures if isinstance(one, Angle)]
    said = [f"an average of {' and '.join(averages)}"] if averages else []
    if angles:
        one, times = angles[0], sorted({t for angle in angles for t in angle.times})
        block = f"block {', '.join(map(str, one.block))}" if one.block else "the default block"
        said.append(
            f"the angle of {one.of} at t {', '.join(map(str, times))}, {block}, {one.images} images in "
            f"{one.shards} groups"
        )
    return " and ".join(said)


def _from_log(source: Source, need: Measure, after: int) -> Mapping[int, float]:
    """Step -> the exponential average at the end of every line: exact where every step has a line, else as if the steps
    of a line were equal to their mean."""
    if not isinstance(need, Average):
        raise ValueError(_NO_ANGLES)
    total, weight, found = 0.0, 0.0, {}
    for low, high, means in source.lines:
        if high <= after:
            continue
        old = need.decay ** (high - max(low, after))
        total, weight = old * total + (1 - old) * means[need.of], old * weight + (1 - old)
        found[high] = total / weight
    return found


def grid(texts: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Trigger -> settings, from words such as `plateau.margin=0.01,0.02`: every combination of the values given.

    Raises:
        ValueError: other words, or a trigger that is unknown.
    """
    axes: dict[str, dict[str, list[Any]]] = {}
    for text in texts:
        where, equals, values = text.partition("=")
        name, _, key = where.rpartition(".")
        try:
            parsed = yaml.safe_load(f"[{values}]")
        except yaml.YAMLError:
            parsed = None
        if not (name and key and equals and parsed):
            raise ValueError(f"--set {text}: expected TRIGGER.KEY=VALUE, or several values with commas between")
        triggers.named(name)
        if key in ("trigger", "release"):
            raise ValueError(
                f"--set {text}: {key} does not decide when a trigger stops a term; expected another setting"
            )
        axes.setdefault(name, {})[key] = [config.number(value) for value in parsed]
    return {name: list(_products(keys)) for name, keys in axes.items()}


def _products(keys: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*keys.values()):
        yield dict(zip(keys, values, strict=True))
