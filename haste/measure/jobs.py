"""The functions behind the rule on measures, for a plan, and behind `haste measure`."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from haste import config as configuration
from haste import extensions
from haste.config import MEASURES, Config
from haste.files import artefact, locks
from haste.measure.measure import KIND, check_rows, check_teachers, read
from haste.measure.subject import opened
from haste.plan.measures import Measurement
from haste.plan.names import Artefact
from haste.plan.plan import Plan
from haste.train.distributed import Group, enough_memory, joined
from haste.train.named import file_named, put_row, run_through, state_named


def measure(plan: Plan, what: Measurement, keep: bool, json: Path | None = None) -> dict[str, Any] | None:
    """Take a measure, or read its existing result.

    Args:
        plan: with the paths of all files.
        what: the measure of a state.
        keep: whether to write the result to its path in the plan.
        json: another file to write it to.

    Returns:
        The result, on rank 0; None on others.

    Raises:
        ValueError: an input is missing or damaged, or `haste.measure.measure.check_rows` refuses the rows.
        FloatingPointError: a number is not finite.
    """
    with joined(plan.config.runtime.device) as group:  # whether it is there is one answer for all ranks
        there = contextlib.nullcontext(not group.broadcast(Path(what.file).exists))
        with locks.making(what.file, ask=group.broadcast) if keep else there as todo:
            found = _measured(plan, what, keep, group) if todo else read(what.file) if group.is_first else None
            if found is not None and keep and todo:
                artefact.write_json(what.file, found)
    if found is not None and json is not None:
        artefact.write_json(json, found)
    return found


def _measured(plan: Plan, what: Measurement, keep: bool, group: Group) -> dict[str, Any] | None:
    started, spec = time.monotonic(), plan.config.measures[what.label]
    kind = spec.made
    torch.set_num_threads(plan.config.runtime.threads)
    with enough_memory(), _kept(plan, what, keep, group) as what:
        subject, state = opened(plan, what, kind.weights, kind.seed, group)
        rows = check_rows(kind, kind.run(subject), f"{what.label} of {state['file']}")
        teachers = check_teachers(kind, subject.teachers, what.label)
    if not group.is_first:
        return None
    seconds = time.monotonic() - started
    made = artefact.provenance(key=what.key, recipe=what.recipe, inputs=subject.inputs.identities, seconds=seconds)
    header = {"schema": artefact.SCHEMA, "kind": KIND, "key": what.key, "measure": spec.measure}
    how = {name: value for name in ("pooled", "along") if (value := getattr(kind, name))}
    columns = {"axes": list(kind.axes), "values": dict(kind.values), **how}
    settings = kind.model_dump(mode="json") | ({"teacher": what.teacher} if what.teacher else {})
    about = {"settings": settings, "terms": what.recipe["terms"], "state": state}
    more = {"teachers": teachers, "pictures": [one.entry for one in subject.pictures]}
    columns |= {"rows": rows, **{name: entries for name, entries in more.items() if entries}}
    return {**header, **about, **columns, "notes": subject.notes, "provenance": made}


@contextlib.contextmanager
def _kept(plan: Plan, what: Measurement, keep: bool, group: Group) -> Iterator[Measurement]:
    """The measurement; hidden states of one that is not kept lie in a folder that goes with it."""
    if keep or not what.hidden:
        yield what
        return
    aside = group.broadcast(lambda: artefact.aside_of(Path(plan.root, "measures", "hidden")))

    def moved(stores: Mapping[str, Artefact], room: str) -> dict[str, Artefact]:
        return {split: dataclasses.replace(one, folder=str(aside / room / split)) for split, one in stores.items()}

    try:
        seen = {name: moved(stores, f"seen-{number}") for number, (name, stores) in enumerate(what.seen.items())}
        yield dataclasses.replace(what, hidden=moved(what.hidden, "hidden"), seen=seen)
    finally:
        if group.is_first:
            shutil.rmtree(aside, ignore_errors=True)
            with contextlib.suppress(OSError):  # others measure
                aside.parent.rmdir()


# -- `haste measure` ---------------------------------------------------------------------------------------------------


def asked(
    config: Config,
    name: str,
    file: str,
    *,
    model: str | None = None,
    layout: str | None = None,
    alignment: str | None = None,
) -> tuple[Plan, Measurement, bool]:
    """Resolve the arguments of `haste measure NAME FILE`.

    Args:
        config: the configuration.
        name: one of its measures, or any known measure, with default settings.
        file: a state as TRAJECTORY/STEP or by its file; a checkpoint, by its file or an id of the hub's; or a
            measurement by its name.
        model: a checkpoint's model; None uses a row that names the checkpoint, or else its weights.
        layout: whose checkpoint it is; None as `model`, or else detects it from the content.
        alignment: what to compare with if the row has none.

    Returns:
        A plan that contains it, the measurement, and whether the configuration itself requests it.

    Raises:
        ValueError: no such measure, state or file; or the measure does not fit it.
    """
    plan = Plan(config)
    if file in plan.measurements and plan.measurements[file].label == name:
        return plan, plan.measurements[file], True
    file = file_named(plan.data.outside, file)
    raw = config.model_dump(mode="json") | {"forks": {}}  # their branches are rows already
    _put_measure(raw, name, alignment)
    state = state_named(plan, file)
    if state is None:
        kind, row = "evaluate", put_row(raw, plan, file, model, layout)
    else:
        kind, row = "runs", run_through(plan, state)
    for every in (*raw["runs"].values(), *raw["evaluate"].values()):  # an alignment for one row need not fit others
        every["measures"] = []
    raw[kind][row]["measures"] = [name]
    with_it = Plan(configuration.resolve(raw))
    if state is None:
        state = next(one.evaluation.state for one in with_it.rows if one.run == row)
    found = with_it.measurement(row, state, name)
    return with_it, found, found.name in plan.measurements


def _put_measure(raw: dict[str, Any], name: str, alignment: str | None) -> None:
    if name not in raw["measures"]:
        known = sorted({*raw["measures"], *MEASURES, *extensions.names("measures")})
        if name not in known:
            raise ValueError(f"measure {name!r}: expected one of the configuration or of {', '.join(known)}")
        raw["measures"][name] = {"measure": name}
    if alignment is not None:
        raw["measures"][name] = {**raw["measures"][name], "alignment": alignment}
