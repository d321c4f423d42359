"""When to stop a run, as forks, gradient angles and losses that are there say: `haste suggest-stop`. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from haste import config
from haste.align import crossing, firing, triggers
from haste.align.crossing import Crossing
from haste.align.firing import Firing
from haste.align.triggers import GradientAngle, Reading
from haste.config.keys import nearest
from haste.files.artefact import canonical
from haste.ops import replay, sources
from haste.plan.plan import Plan
from haste.report import forks, gather
from haste.report.formats import Cell, Entry, Head, Table, text_cell, to_text
from haste.train import stops

TOGETHER = "alignment"  # all terms together, as the gradient cosine has them


@dataclass(frozen=True)
class Suggestion:
    """What one source says: where it would stop, with the 95 % interval as far as it is known."""

    by: str
    found: Crossing


def suggestions(plan: Plan, run: str) -> list[Suggestion]:
    """What each source that is there says of when to stop a run.

    Raises:
        ValueError: no such run, it aligns nothing, or nothing of it is there.
    """
    if run not in plan.config.runs:
        raise ValueError(f"runs: nothing is called {run!r}{nearest(run, plan.config.runs)}")
    if not config.terms_of(plan.config, run):
        raise ValueError(f"runs.{run}: aligns nothing that could be stopped; expected a run with an alignment")
    found = [*_forks(plan, run), *_angles(plan, run), *_readings(plan, run), *_losses(plan, run)]
    if not found:
        raise ValueError(
            f"runs.{run}: nothing says yet when to stop it; train it, with a trigger under `watch`, or have the "
            "workflow make `forks` of it, or the measure gradient-cosine"
        )
    return found


def _forks(plan: Plan, run: str) -> Iterator[Suggestion]:
    for fork in gather.forks(plan):
        for effect in forks.effects(fork) if fork.run == run else ():
            if not effect.t and len(effect.curve.steps):
                yield Suggestion(f"fork {fork.name}, {effect.title}", crossing.crossing(effect.curve))


def _angles(plan: Plan, run: str) -> Iterator[Suggestion]:
    """From the gradient cosines at milestones, on average over t and blocks, by the trigger with its defaults."""
    ones = [one for one in gather.measured(plan)[0] if one.run == run and one.found["measure"] == "gradient-cosine"]
    for name in dict.fromkeys(one.name for one in ones):
        rows = [
            {**row, "step": one.step, "seed": one.seed} for one in ones if one.name == name for row in one.found["rows"]
        ]
        frame = pd.DataFrame(rows)
        if frame.empty:
            continue
        term = TOGETHER if TOGETHER in set(frame["term"]) else frame["term"].iloc[0]
        mean = frame[frame["term"] == term].groupby(["seed", "step"])[["cosine", "error"]].mean()
        said = [
            firing.fired(GradientAngle(), [_reading(row) for row in part.reset_index().to_dict("records")])
            for _, part in mean.rename(columns={"cosine": "mean"}).groupby("seed")
        ]
        by = f"{name}, cosine of {term} below {GradientAngle().threshold:g}"
        yield Suggestion(by, _of_seeds(plan, run, len(said), firing.agreed(said)))


def _reading(row: Mapping[Any, Any]) -> Reading:
    return Reading(row["step"], {name: value for name, value in row.items() if name != "step"})


# -- what training recorded --------------------------------------------------------------------------------------------


def _readings(plan: Plan, run: str) -> Iterator[Suggestion]:
    """From the readings of triggers in each seed's newest state, whether they stopped it or only watched. Terms of
    which a trigger says the same share a line."""
    records: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for seed in plan.config.runs[run].all_seeds:
        for kind, record in stops.records(plan, run, seed):
            if record["readings"]:
                records.setdefault((kind, canonical(record["trigger"])), []).append(record)
    found: dict[tuple[str, str, Crossing], list[str]] = {}
    for (kind, settings), mine in records.items():
        said = _of_seeds(plan, run, len(mine), firing.agreed([_fired(record) for record in mine]))
        found.setdefault((mine[0]["trigger"]["trigger"], settings, said), []).append(kind)
    for (name, _, said), kinds in found.items():
        yield Suggestion(f"readings of {name} on {' and '.join(sorted(kinds))}", said)


def _fired(record: Mapping[str, Any]) -> Firing:
    """What a trigger with its recorded settings does."""
    name, trigger = record["trigger"]["trigger"], sources.trigger_of(record["trigger"])
    readings = [_reading(one) for one in record["readings"]]
    if isinstance(trigger, GradientAngle):
        return firing.fired(trigger, readings)
    stop = triggers.replayed(name, trigger, readings)
    return Firing(stop and stop[0])


def _losses(plan: Plan, run: str) -> Iterator[Suggestion]:
    """From the logged alignment losses, by a plateau with its default settings, as `haste replay` has it."""
    settings, logs = replay.completed({"trigger": "plateau"}), dict[str, list[sources.Source]]()
    for seed in plan.config.runs[run].all_seeds:
        for one in sources.of_run(plan, run, seed):
            if one.found == "log":
                logs.setdefault(one.term, []).append(one)
    for kind, mine in logs.items():
        said = [replay.replayed(one, settings, "defaults") for one in mine]
        missing = next((one.missing for one in said if one.missing), "")
        found = Crossing(None, None, None, missing) if missing else firing.agreed([Firing(one.step) for one in said])
        yield Suggestion(f"plateau of the logged {kind} loss", _of_seeds(plan, run, len(mine), found))


def _of_seeds(plan: Plan, run: str, count: int, said: Crossing) -> Crossing:
    """With a word where not every seed of the run is there."""
    every = len(plan.config.runs[run].all_seeds)
    return said if count == every else replace(said, reason=f"{said.reason}; {count} of {every} seeds are there")


# -- words -------------------------------------------------------------------------------------------------------------


def text(plan: Plan, run: str, width: int | None = None) -> str:
    """What each source says, for a terminal; raises as `suggestions`."""
    found = suggestions(plan, run)
    heads = [Head("by"), *(Head(name, True) for name in ("stop at step", "from", "to")), Head("how")]
    entries = [
        Entry(
            [
                text_cell(one.by),
                Cell("cannot tell") if one.found.step is None else text_cell(round(one.found.step)),
                *(text_cell(None if end is None else round(end)) for end in (one.found.low, one.found.high)),
                text_cell(one.found.reason),
            ]
        )
        for one in found
    ]
    return to_text(
        [Table("suggested", "", heads, entries, ["From, to: the 95 % interval, as far as it is known."])],
        f"When to stop {run}",
        width,
    )
