"""A plan's jobs in the cluster's queue. No torch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from haste.cluster import job as jobs
from haste.cluster import slurm
from haste.plan.names import State
from haste.plan.plan import Plan


def training(plan: Plan) -> dict[State, slurm.Job]:
    """The live job of each planned state that has one.

    Raises:
        Unanswered: SLURM did not answer, or there is none.
    """
    names = {jobs.name(plan, state): state for state in plan.planned()}
    found: dict[State, slurm.Job] = {}
    for job in slurm.queue(list(names)):
        if job.live:
            found.setdefault(names[job.name], job)
    return found


def record(plan: Plan) -> Path:
    """The file that lists the submitted jobs of the stages: a line per job, [output, number, log]."""
    return Path(plan.folder, "submitted.jsonl")


def full(plan: Plan) -> Path:
    """The file that says why jobs of the stages wait to be submitted, as long as some do."""
    return Path(plan.folder, "queue-full.txt")


def left(plan: Plan) -> dict[str, tuple[str, str]] | None:
    """The jobs of the stages that an earlier Snakemake submitted and that live: output -> (number, log).

    None if SLURM does not say which of them do.
    """
    try:
        lines = [line for line in record(plan).read_text().splitlines() if line.endswith("]")]  # the last may be cut
    except FileNotFoundError:
        return {}
    if not lines or shutil.which("squeue") is None:
        return {}
    try:
        there = slurm.live(jobs.name_of_stages(plan))
    except slurm.Unanswered:
        return None
    return {output: (number, log) for output, number, log in map(json.loads, lines) if number in there}


def cancel(plan: Plan, name: str) -> list[str]:
    """End the training jobs of a run, or of one state; returns lines that say what was done.

    Raises:
        ValueError: no such run or state, or SLURM does not answer.
    """
    states = _states(plan, name)
    try:
        found = {state: job for state, job in training(plan).items() if state in states}
        if not found:
            return [f"{name}: no training job of it is in the queue"]
        slurm.cancel([job.id for job in found.values()])
    except slurm.Unanswered as error:
        raise ValueError(f"{name}: nothing is known to be cancelled, SLURM does not answer ({error})") from None
    return [_told(plan, state, job) for state, job in found.items()]


def _told(plan: Plan, state: State, job: slurm.Job) -> str:
    runs = ", ".join(run for run in plan.config.runs if state in _states(plan, run))
    return f"cancelled job {job.id}, which trained {state} (of {runs}); the same snakemake command goes on from there"


def _states(plan: Plan, name: str) -> set[State]:
    """The planned states that a run passes through, or the one state of that name."""
    if name not in plan.config.runs:
        if "/" not in name:
            raise ValueError(f"run {name!r}: not in this configuration, which has {', '.join(plan.config.runs)}")
        return {plan.parse(name)}
    last = plan.config.runs[name].milestones[-1]
    pieces = [piece for (run, _), found in plan.pieces.items() if run == name for piece in found]
    on_the_way = [state for state in plan.planned() if state.step <= last]
    return {s for s in on_the_way if any(p.trajectory == s.trajectory and p.holds(s.step) for p in pieces)}
