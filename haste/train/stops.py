"""Where triggers stopped alignment: `termination.json` in a trajectory's folder, and what it says of a run. No torch.

A state's header holds, in `triggers`, what each trigger has read and decided so far. The file repeats the record of a
stop, for people and for the report. It is written after the state at the stop; if it is missing, a later start writes
it again. Until then readers also use the newest state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from haste.align import schedule
from haste.align.triggers import Reading
from haste.files import artefact
from haste.files.provenance import STATE_NAME, provenance_of, read_header
from haste.plan.names import Piece, Segment
from haste.plan.plan import Plan

FILE, KIND = "termination.json", "termination"


@dataclasses.dataclass(frozen=True)
class Stopped:
    """What stopped a term: after how many steps, by which trigger, and why in words; `ends` is the step from which its
    weight is 0, later than `step` if it was released."""

    step: int
    trigger: str
    reason: str
    ends: int = 0


def write(folder: Path, header: Mapping[str, Any]) -> None:
    """Write the file if a state's header has a stop on its own trajectory that the file does not have.

    Args:
        folder: of the trajectory.
        header: of a state.
    """
    own = _own(header)
    if not own or _terms(folder) == own:
        return
    made = artefact.provenance(key=header["key"], recipe=header["recipe"], inputs=header["inputs"])
    about = {"schema": artefact.SCHEMA, "kind": KIND, "key": header["key"], "trajectory": header["trajectory"]}
    artefact.write_json(folder / FILE, {**about, "terms": own, "provenance": made})


def _own(header: Mapping[str, Any]) -> dict[str, Any]:
    """The stops on a state's own trajectory, from its header."""
    return {
        kind: {
            **record["stopped"],
            "trigger": record["trigger"],
            "seconds": record["seconds"],
            "readings": record["readings"],
        }
        for kind, record in header.get("triggers", {}).items()
        if record["stopped"] is not None and record["stopped"]["trajectory"] == header["trajectory"]
    }


def _terms(folder: Path) -> dict[str, Any]:
    """Contents of the file, by term; empty if it is missing or damaged, which the next start of training repairs."""
    try:
        return _checked(folder / FILE, artefact.read_json(folder / FILE, KIND)["terms"])
    except (ValueError, KeyError):
        return {}


def _checked(path: Path, terms: Any) -> dict[str, Any]:
    artefact.check_entries(path, {"terms": terms}, terms=dict)
    for term in terms.values():
        artefact.check_entries(path, term, step=int, trigger=dict, reason=str)
    return terms


def _in_newest_state(folder: Path) -> dict[str, Any]:
    """Stops in the newest readable state, by term: a state records all stops before it."""
    for path in _newest_first(folder):
        try:
            return _checked(path, _own(provenance_of(path)))
        except (ValueError, KeyError, TypeError, AttributeError, OSError):  # damaged, or removed meanwhile
            continue
    return {}


def _newest_first(folder: Path, low: int = 0, high: int | None = None) -> list[Path]:
    """The states in a folder with low < step <= high, also those that may go."""
    paths = [*folder.glob("step-*"), *folder.glob("rolling/step-*")]
    steps = {path: int(match[1]) for path in paths if (match := STATE_NAME.match(path.name))}
    there = [path for path, step in steps.items() if low < step and (high is None or step <= high)]
    return sorted(there, key=steps.__getitem__, reverse=True)


def records(plan: Plan, run: str, seed: int) -> list[tuple[str, dict[str, Any]]]:
    """Every trigger's record in the newest readable state of a run with one seed, up to its last milestone: the term,
    then the record as states hold it, first those that could stop the term, then those that only watched (they have
    `since`). Of a term that is not in a state, the record that the stop left beside the states."""
    last, header, beside = plan.config.runs[run].milestones[-1], dict[str, Any](), dict[str, Any]()
    for piece in reversed(plan.pieces[run, seed]):
        folder = Path(plan.root, "states", piece.trajectory)
        for path in _newest_first(folder, piece.low, last if piece.high is None else min(last, piece.high)):
            try:
                header = header or read_header(path)
            except ValueError:
                continue
        beside = {kind: term for kind, term in _terms(folder).items() if piece.low < term["step"] <= last} | beside
    asked = {**beside, **header.get("triggers", {})}
    return [*asked.items(), *((record["term"], record) for record in header.get("watched", {}).values())]


def read(folder: Path) -> dict[str, Stopped]:
    """Term -> what stopped it on a trajectory, from the file and the newest state; empty if nothing was stopped."""
    terms = _in_newest_state(folder) | _terms(folder)
    return {
        kind: Stopped(term["step"], str(term["trigger"].get("trigger")), term["reason"]) for kind, term in terms.items()
    }


def history(state: Path | str) -> dict[str, list[Reading]]:
    """Term -> all readings of its trigger in a state, for `haste.align.triggers.replayed`.

    Raises:
        ValueError: not a state.
    """
    records = provenance_of(Path(state)).get("triggers", {})
    return {
        kind: [
            Reading(r["step"], {name: value for name, value in r.items() if name != "step"}) for r in record["readings"]
        ]
        for kind, record in records.items()
    }


def along(plan: Plan, run: str, seed: int) -> dict[str, Stopped]:
    """Term -> what stopped it in a run with one seed, up to its last milestone."""
    return _up_to(plan, plan.pieces[run, seed], plan.config.runs[run].milestones[-1])


def left(plan: Plan, segment: Segment) -> list[str]:
    """The terms still active where a segment starts, as far as is known now."""
    stopped = _up_to(plan, segment.pieces, segment.start)
    return [kind for kind in segment.terms if kind not in stopped or segment.start < stopped[kind].ends]


def resumed(segment: Segment, header: Mapping[str, Any]) -> Segment:
    """A segment's terms as a state with this header leaves them: those that triggers stopped are gone, those that
    triggers released fall until their ramp ends."""
    stopped = {k: r["stopped"]["step"] for k, r in header.get("triggers", {}).items() if r["stopped"] is not None}
    terms = {}
    for kind, term in segment.terms.items():
        if kind not in stopped:
            terms[kind] = term
        elif (ramp := _ramp(term, stopped[kind])) and header["step"] < ramp["to"]:
            terms[kind] = {**term, "trigger": None, "ramp": ramp}
    return dataclasses.replace(segment, terms=terms, cached=tuple(kind for kind in segment.cached if kind in terms))


def _ramp(term: Mapping[str, Any], fired: int) -> dict[str, Any] | None:
    return schedule.released(term["release"], fired) if term.get("release") else None


def _up_to(plan: Plan, pieces: Iterable[Piece], last: int) -> dict[str, Stopped]:
    found = dict[str, Stopped]()
    for piece in pieces:
        terms = plan.trajectories[piece.trajectory].recipe["terms"]
        if not any("trigger" in term for term in terms.values()):
            continue  # and its states need not be opened
        high = last if piece.high is None else min(last, piece.high)
        for kind, one in read(Path(plan.root, "states", piece.trajectory)).items():
            if piece.low <= one.step <= high:
                ramp = _ramp(terms.get(kind, {}), one.step)
                found[kind] = dataclasses.replace(one, ends=ramp["to"] if ramp else one.step)
    return found
