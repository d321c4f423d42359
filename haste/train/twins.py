"""What trajectories share that differ only in what follows where a trigger fires: trained once, then copied.

Such *twins* have the same states up to the firing: where one stops a term at once, another releases it. A segment
begins by copying the latest state that a twin's folder shares with it, if its own folder has no later one. It then goes
on as from a state of its own.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from haste.files import artefact, journal, tensors
from haste.files.provenance import STATE_NAME
from haste.plan.names import Segment, State, Trajectory
from haste.train import state as states

log = logging.getLogger("haste.train")

LOG = "log.jsonl"


def adopt(folder: Path, trajectory: Trajectory, segment: Segment, newest: int) -> None:
    """Copy the latest state that a twin shares with a segment, under the segment's own name.

    Args:
        folder: of the trajectory, whose lock is held.
        trajectory: its recipe.
        segment: states after its start and up to its end are copied, and only while a trigger watches.
        newest: step of the newest state of its own.

    Raises:
        OSError: the disk is full.
    """
    if not any(term["trigger"] for term in segment.terms.values()):
        return
    for step, path, twin in sorted(_twins(folder, trajectory), reverse=True):
        if not max(newest, segment.start) < step <= segment.state.step:
            continue
        try:
            header, found = states.read(path, key=twin)
        except ValueError as error:
            log.warning("passing over a state that cannot be read: %s", error)
            continue
        if _is_shared(header, trajectory.recipe):
            own = folder / State(trajectory.name, step).file
            _copy_log(path.parent, folder, step)  # first, so that no state is without its log
            tensors.write(own, found, _renamed(header, trajectory, path))
            log.info("%s: shares its steps up to %d with %s, and goes on from there", trajectory.name, step, path)
            return


def _twins(folder: Path, trajectory: Trajectory) -> Iterator[tuple[int, Path, str]]:
    """Step, file and key of its trajectory, of every kept state of a twin."""
    for about in folder.parent.glob("*/trajectory.json"):
        try:
            made = artefact.read_json(about, "trajectory")
            if not trajectory.is_twin(made["recipe"]):
                continue
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # damaged: the next start of its training writes it again
        for path in about.parent.glob("step-*"):
            if match := STATE_NAME.match(path.name):
                yield int(match[1]), path, made["key"]


def _copy_log(source: Path, folder: Path, step: int) -> None:
    """Add the lines of a twin's log up to a step that a folder's own does not have. Their `seconds`, the work that they
    took, were spent there and stay there."""
    had = {line["step"] for line in journal.read(folder / LOG)}
    more = [line for line in journal.read(source / LOG, 0, step) if line["step"] not in had]
    with open(folder / LOG, "a") as file:
        file.writelines(json.dumps({k: v for k, v in line.items() if k != "seconds"}) + "\n" for line in more)


def _is_shared(header: Mapping[str, Any], recipe: Mapping[str, Any]) -> bool:
    """Whether no trigger fired before a state with another release than this recipe has."""
    records = header.get("triggers", {}).items()
    fired = {kind for kind, record in records if (record["stopped"] or header)["step"] < header["step"]}
    theirs, ours = (
        {kind: terms[kind].get("release") for kind in fired if kind in terms}
        for terms in (header["recipe"]["terms"], recipe["terms"])
    )
    return theirs == ours


def _renamed(header: Mapping[str, Any], trajectory: Trajectory, path: Path) -> dict[str, Any]:
    """A twin's header as that of a state of this trajectory."""
    own = {"key": trajectory.key, "trajectory": trajectory.name, "recipe": trajectory.recipe}
    records = {}
    for kind, record in header.get("triggers", {}).items():
        stopped = record["stopped"]
        if stopped and stopped["trajectory"] == header["trajectory"]:
            stopped = {**stopped, "trajectory": trajectory.name}
        records[kind] = {**record, "stopped": stopped}
    return {**header, **own, "copied": str(path), **({"triggers": records} if records else {})}
