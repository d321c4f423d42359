"""When triggers with other settings would have stopped a term, from what was read while it was trained. No torch.

A *source* is what was read of one term: by a trigger that could stop it, by one that only watched, or in a published
table. A log is one too: it has the losses of every step, as means over some, from which averages are computed again.
What a source does not have cannot be replayed, and is said.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from haste import config
from haste.align import triggers
from haste.align.triggers import Angle, Average, Decision, GradientAngle, Measure, Reading
from haste.config.keys import nearest
from haste.files import journal
from haste.plan.plan import Plan
from haste.train import stops

CSV_COLUMNS = ("model", "block", "iteration", "t", "cosine")  # of a table of published cosines
PLACE = ("trigger", "after", "every")  # settings that are not the trigger's own
WHOSE = {"stop": "as run", "watch": "as watched", "published": "defaults"}


@dataclass(frozen=True)
class Source:
    """What was read of one term.

    Attributes:
        term: its kind; of a published table the model and the block.
        found: by what: `stop`, `watch`, `log` or `published`.
        settings: of the trigger that read it, with its name, `after` and `every`; empty for a log.
        columns: by what was measured: step -> value.
        since: steps before the first one that its averages have seen.
        last: the last step of which it knows anything.
        lines: of a log: first step, last step, and the mean of each value over the steps after the first.
    """

    term: str
    found: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    columns: Mapping[Measure, Mapping[int, float]] = field(default_factory=dict)
    since: int = 0
    last: int = 0
    lines: Sequence[tuple[int, int, Mapping[str, float]]] = ()


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


def trigger_of(settings: Mapping[str, Any]) -> triggers.Trigger:
    """The trigger with these settings."""
    return triggers.made(settings["trigger"], {key: value for key, value in settings.items() if key not in PLACE})


# -- what was read -----------------------------------------------------------------------------------------------------


def seed_of(plan: Plan, run: str, asked: int | None) -> int:
    """The seed of a run that is asked for, or its first.

    Raises:
        ValueError: there is no such run, or seed.
    """
    if run not in plan.config.runs:
        raise ValueError(f"runs: nothing is called {run!r}{nearest(run, plan.config.runs)}")
    seeds = plan.config.runs[run].all_seeds
    if asked is not None and asked not in seeds:
        raise ValueError(f"--seed {asked}: {run} has {', '.join(map(str, seeds))}")
    return seeds[0] if asked is None else asked


def sources(plan: Plan, run: str, seed: int) -> list[Source]:
    """What was read of a run with one seed up to its last milestone, then its log, by term.

    Raises:
        ValueError: the run aligns nothing.
    """
    terms = config.terms_of(plan.config, run)
    if not terms:
        raise ValueError(f"runs.{run}: aligns nothing that a trigger could stop; expected a run with an alignment")
    found = []
    for kind, record in stops.records(plan, run, seed):
        columns = {
            measure: {reading["step"]: reading[name] for reading in record["readings"]}
            for name, measure in trigger_of(record["trigger"]).needs.items()
        }
        last = max((reading["step"] for reading in record["readings"]), default=0)
        by = "watch" if "since" in record else "stop"
        found.append(
            Source(kind, by, record["trigger"], columns, record.get("since", record["trigger"]["after"]), last)
        )
    lines = logged(plan, run, seed)
    return found + [one for kind, term in terms.items() if (one := _log(kind, term, lines)).lines]


def logged(plan: Plan, run: str, seed: int) -> list[dict[str, Any]]:
    """The log of a run with one seed up to its last milestone, across the trajectories that it passes through."""
    last, found = plan.config.runs[run].milestones[-1], []
    for piece in plan.pieces[run, seed]:
        high = last if piece.high is None else min(last, piece.high)
        found += journal.read(Path(plan.root, "states", piece.trajectory, "log.jsonl"), piece.low, high)
    return found


def _log(kind: str, term: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> Source:
    by_angle = kind == "features" and term.get("similarity", "cosine") == "cosine"  # as in `haste.train.readings`
    found, before = [], 0
    for line in lines:
        if kind in line and "denoising" in line:
            left = line[kind] + (1.0 if by_angle else 0.0)
            found.append((before, line["step"], {"residual": left, "denoising": line["denoising"]}))
        before = line["step"]
    return Source(kind, "log", lines=found, last=found[-1][1] if found else 0)


def published(path: Path | str, model: str | None = None) -> list[Source]:
    """Cosines of a table with the columns `model`, `block`, `iteration`, `t` and `cosine`, a source for each block. A
    mean over t that the table prints is not read.

    Args:
        path: a CSV file.
        model: only this one's; None if the table has a single one.

    Raises:
        ValueError: another table, or it does not have the model.
    """
    cells: dict[tuple[str, str], dict[float, dict[int, float]]] = {}
    try:
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                column = cells.setdefault((row["model"], row["block"]), {})
                if row["t"] != "mean":
                    column.setdefault(float(row["t"]), {})[int(row["iteration"])] = float(row["cosine"])
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected a CSV table with {', '.join(CSV_COLUMNS)}; {error!r}") from error
    models = sorted({name for name, _ in cells})
    if model not in models and not (model is None and len(models) == 1):
        raise ValueError(f"{path}: --model {model or 'is not given'}: expected one of {', '.join(models) or 'no rows'}")
    chosen = {who: found for who, found in cells.items() if model in (None, who[0])}
    return [_published(f"{name}, block {block}", found) for (name, block), found in chosen.items()]


def _published(what: str, found: Mapping[float, Mapping[int, float]]) -> Source:
    """Its settings are the defaults with the nearest of the times that there are."""
    near = dict.fromkeys(min(found, key=lambda t: abs(t - wanted)) for wanted in GradientAngle().times)
    settings = {"trigger": "gradient-angle", "after": 0, "every": 1}
    settings |= GradientAngle(times=list(near)).model_dump(mode="json")
    columns = {GradientAngle(times=[t]).needs["mean"]: column for t, column in found.items()}
    return Source(what, "published", settings, columns, last=max(max(column) for column in found.values()))


# -- what would have been decided --------------------------------------------------------------------------------------


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
    since = source.since if after == source.settings.get("after") else after
    first = triggers.first_reading(trigger, after, every, since)
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
            f"the first reading would be after step {first}, then every {every}; what there is ends at {source.last}, "
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


def _from_log(source: Source, need: Measure, after: int) -> dict[int, float]:
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
        axes.setdefault(name, {})[key] = [config.number(value) for value in parsed]
    return {name: list(_products(keys)) for name, keys in axes.items()}


def _products(keys: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*keys.values()):
        yield dict(zip(keys, values, strict=True))
