"""What was read of an aligned term while it was trained, for replays and for the report. No torch.

A *source* is what a trigger read that could stop the term, or one that only watched, or a published table. A log is one
too: it has the losses of every step, as means over some, from which averages are computed again.
"""

from __future__ import annotations

import csv
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from haste import config
from haste.align import triggers
from haste.align.terms import kind_of
from haste.align.triggers import GradientAngle, Measure
from haste.config.keys import nearest
from haste.plan.plan import Plan
from haste.train import stops, trackers

log = logging.getLogger("haste.ops")

CSV_COLUMNS = ("model", "block", "iteration", "t", "cosine")  # of a table of published cosines
PLACE = ("trigger", "after", "every")  # settings that are not the trigger's own


@dataclass(frozen=True)
class Source:
    """What was read of one term.

    Attributes:
        term: its kind; of a published table the model and the block.
        found: by what: `stop`, `watch`, `log` or `published`.
        settings: of the trigger that read it, with its name, `after` and `every`; empty for a log.
        columns: by what was measured: step -> value.
        last: the last step of which it knows anything.
        lines: of a log: first step, last step, and the mean of each value over the steps after the first.
    """

    term: str
    found: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    columns: Mapping[Measure, Mapping[int, float]] = field(default_factory=dict)
    last: int = 0
    lines: Sequence[tuple[int, int, Mapping[str, float]]] = ()


def trigger_of(settings: Mapping[str, Any]) -> triggers.Trigger:
    """The trigger with these settings."""
    return triggers.made(settings["trigger"], {key: value for key, value in settings.items() if key not in PLACE})


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


def of_run(plan: Plan, run: str, seed: int) -> list[Source]:
    """What was read of a run with one seed up to its last milestone, then its log, by term.

    Raises:
        ValueError: the run aligns nothing.
    """
    terms = config.terms_of(plan.config, run)
    if not terms:
        raise ValueError(f"runs.{run}: aligns nothing that a trigger could stop; expected a run with an alignment")
    found = []
    for kind, record in stops.records(plan, run, seed):
        try:
            needs = trigger_of(record["trigger"]).needs.items()
            columns = {need: {reading["step"]: reading[name] for reading in record["readings"]} for name, need in needs}
        except (ValueError, KeyError) as error:  # of a package that is not installed any more, or damaged
            log.warning("%s: passing over readings of %s: %s", run, kind, error)
            continue
        last = max((reading["step"] for reading in record["readings"]), default=0)
        by = "watch" if "since" in record else "stop"
        found.append(Source(kind, by, record["trigger"], columns, last))
    lines = trackers.logged(plan, run, seed)
    return found + [one for kind, term in terms.items() if (one := _log(kind, term, lines)).lines]


def _log(kind: str, term: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> Source:
    by_angle = (
        kind_of(kind) == "features" and term.get("similarity", "cosine") == "cosine"
    )  # as in `haste.train.readings`
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
