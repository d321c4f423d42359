"""Which jobs of a workflow run, failed or died, by their logs and by the processes that write these. No torch."""

from __future__ import annotations

import dataclasses
import os
import re
import time
from pathlib import Path

from haste.files import locks
from haste.plan.plan import Plan

TAIL = 20_000  # bytes read from the end of a log
SUBMITTED = "submitted.jsonl"  # in a configuration's folder: its jobs are on a cluster's nodes


@dataclasses.dataclass(frozen=True)
class Job:
    """A job by its log.

    state: `running`; `alone`, running though its Snakemake is gone; `failed`; `died`, its process is gone without a
    word; `interrupted`, by whoever stopped the workflow. seconds: since its last word; words: that; process: its number
    on this machine, 0 if it is not here.
    """

    name: str
    state: str
    seconds: float
    words: str = ""
    process: int = 0


def jobs(plan: Plan, workflow: locks.Holder | None) -> list[Job]:
    """The jobs that are at work, and those that are still to be done and have begun before, newest first.

    What nothing asks for any more, or another configuration made meanwhile, is in neither.

    Args:
        plan: of the configuration.
        workflow: who holds its lock.
    """
    now, found, folder = time.time(), list[Job](), Path(plan.folder)
    at_work, left = writers(folder / "logs"), {job.log: job for of in plan.jobs.left.values() for job in of}
    for log in folder.glob("logs/*.log"):
        process, bench = at_work.get(log.resolve(), 0), folder / "benchmarks" / f"{log.stem}.tsv"
        try:
            written = log.stat().st_mtime
            if not process and (log.stem not in left or (bench.exists() and bench.stat().st_mtime >= written)):
                continue
            words, failed = last_words(log)
        except OSError:  # removed meanwhile: a job starts again
            continue
        if process:
            state = "running" if workflow and workflow.at_work is not False else "alone"
        else:
            state = "failed" if failed else _ended(workflow, written, (folder / SUBMITTED).exists())
        if state != "interrupted" or not os.path.exists(left[log.stem].makes[0]):  # a report has no benchmark
            found.append(Job(log.stem, state, max(0.0, now - written), words, process))
    return sorted(found, key=lambda job: job.seconds)


def _ended(workflow: locks.Holder | None, written: float, on_nodes: bool) -> str:
    """What is known of a job that no process of this machine does, by when its log was written."""
    if workflow is None or written < workflow.since:
        return "interrupted"
    if workflow.at_work is None or on_nodes:  # others cannot be seen from here
        return "interrupted" if workflow.at_work is False else "running"
    return "died"


def writers(folder: Path) -> dict[Path, int]:
    """Log in a folder -> the process of this machine that it is the standard output of; the first of several."""
    within, found, parents = folder.resolve(), dict[int, Path](), dict[int, int]()
    for place in Path("/proc").glob("[0-9]*"):
        try:
            log = Path(os.readlink(place / "fd" / "1"))
            if log.parent == within:
                found[int(place.name)] = log
                parents[int(place.name)] = int((place / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):  # another user's, or it has just ended
            continue
    return {log: process for process, log in found.items() if found.get(parents.get(process, 0)) != log}


def last_words(log: Path) -> tuple[str, bool]:
    """The last line of a log, and whether it says that the job failed."""
    with open(log, "rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - TAIL))
        lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    refused = [line for line in lines if re.match(r"haste [\w-]+: ", line)]
    crashed = any(line.startswith("Traceback (most recent call last)") for line in lines)
    return (refused or lines or [""])[-1], bool(refused or crashed)
