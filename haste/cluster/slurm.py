"""Queries of SLURM. Each has a time limit, and a missing answer is never taken for "there is no job". No torch."""

from __future__ import annotations

import dataclasses
import re
import subprocess
from collections.abc import Sequence

TIMEOUT = 30.0  # seconds that a busy controller may take
# squeue's states of a job that holds a node or may still get one.
LIVE = {
    "PENDING",
    "CONFIGURING",
    "RUNNING",
    "SUSPENDED",
    "STOPPED",
    "RESIZING",
    "SIGNALING",
    "STAGE_OUT",
    "COMPLETING",
    "REQUEUED",
    "REQUEUE_FED",
    "REQUEUE_HOLD",
    "SPECIAL_EXIT",
}


class Unanswered(Exception):  # noqa: N818 - not necessarily an error
    """SLURM did not answer, so nothing is known."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A job as squeue shows it. While it waits, `nodes` is empty and `reason` says why."""

    id: str
    name: str
    state: str
    nodes: str
    reason: str

    @property
    def live(self) -> bool:
        """Whether it runs or may still run."""
        return self.state in LIVE


def ask(*command: str, timeout: float = TIMEOUT) -> str:
    """The output of a SLURM command.

    Raises:
        Unanswered: the command does not exist, failed, or took longer than `timeout` seconds.
    """
    try:
        # In a session of its own: Ctrl-C is meant for the waiting process, not for a running query.
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, start_new_session=True)
    except subprocess.TimeoutExpired:
        raise Unanswered(f"{command[0]} gave no answer in {timeout:.0f} s") from None
    except OSError as error:
        raise Unanswered(f"{command[0]}: {error.strerror}") from None
    if done.returncode:
        raise Unanswered((done.stderr or done.stdout).strip() or f"{command[0]} failed ({done.returncode})")
    return done.stdout


def full(words: str) -> str:
    """Why SLURM takes no further job for now; empty if sbatch refused it for another reason.

    Args:
        words: what sbatch said, such as "error: AssocMaxSubmitJobLimit".
    """
    if named := re.search(r"\b(?:Assoc|QOS)\w+Limit\b", words):  # others, such as QOSMaxCpuPerJobLimit, are for good
        return named[0] if "Submit" in named[0] else ""
    # An older SLURM names no limit. The rest is MaxJobCount, of the whole cluster.
    found = re.search(r"job submit limit|queue full|create job record, try again|Resource temporarily", words)
    return found[0] if found else ""


def queue(names: Sequence[str]) -> list[Job]:
    """The jobs of these names that SLURM still remembers, live ones first, newest first.

    Raises:
        Unanswered: nothing is known.
    """
    if not names:
        return []
    text = ask("squeue", "--noheader", "--states=all", "--name", ",".join(names), "--format", "%A|%T|%N|%r|%j")
    jobs = []
    for line in filter(None, map(str.strip, text.splitlines())):
        fields = line.split("|", 4)
        if len(fields) < 5:
            raise Unanswered(f"squeue said {line!r}, expected five fields")
        number, state, nodes, reason, name = fields
        if name in names:
            jobs.append(Job(number, name, state, nodes, reason))
    return sorted(jobs, key=lambda job: (not job.live, -int(job.id)))


def live(name: str) -> set[str]:
    """The numbers of the user's live jobs of a name, also after a prefix, such as "4711", or "4712_3" for one of an
    array.

    Raises:
        Unanswered: nothing is known.
    """
    lines = ask("squeue", "--me", "--array", "--noheader", "--format", "%i|%T|%j").splitlines()
    found = (line.strip().split("|", 2) for line in lines if line.count("|") >= 2)
    return {number for number, state, called in found if state in LIVE and called.endswith(name)}


def stages(folder: str) -> dict[str, dict[str, int]]:
    """The user's live jobs that Snakemake submitted from a folder: rule -> state -> how many.

    Snakemake's executor gives all jobs the same name, and the rule as a comment.

    Raises:
        Unanswered: nothing is known.
    """
    found: dict[str, dict[str, int]] = {}
    for line in ask("squeue", "--me", "--array", "--noheader", "--format", "%T|%Z|%k").splitlines():
        state, _, rest = line.strip().partition("|")
        place, _, comment = rest.partition("|")
        if place == folder and (rule := re.match(r"rule_(.+?)(?=_wildcards_|$)", comment)):
            counts = found.setdefault(rule[1], {})
            counts[state] = counts.get(state, 0) + 1
    return found


def ending(job: str) -> str | None:
    """How a job that left the queue ended, such as COMPLETED or CANCELLED; None if that is not known (any more).

    The controller forgets jobs after minutes, but the accounting lags behind and is more often unavailable.
    """
    for read in (_from_controller, _from_accounting):
        try:
            state = read(job)
        except Unanswered:
            continue
        if state and state not in LIVE:
            return state
    return None


def _from_accounting(job: str) -> str | None:
    lines = ask("sacct", "-X", "--noheader", "--parsable2", "--format=State", "-j", job).split("\n")
    return lines[0].split()[0] if lines[0].strip() else None  # "CANCELLED by 1000"


def _from_controller(job: str) -> str | None:
    words = ask("scontrol", "--oneliner", "show", "job", job).split()
    return next((word.removeprefix("JobState=") for word in words if word.startswith("JobState=")), None)


def start_now(job: str) -> None:
    """Skip the two minutes that SLURM lets a requeued job wait. A failure is harmless and ignored."""
    try:
        ask("scontrol", "update", f"jobid={job}", "StartTime=now")
    except Unanswered:
        return


def requeue(job: str) -> None:
    """Requeue a running job; its processes are then signalled to end.

    Raises:
        Unanswered: SLURM did not accept it.
    """
    ask("scontrol", "requeue", job)


def cancel(jobs: Sequence[str]) -> None:
    """Cancel jobs.

    Raises:
        Unanswered: SLURM did not accept it.
    """
    ask("scancel", *jobs)
