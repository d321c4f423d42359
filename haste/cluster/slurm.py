"""What SLURM says. Every question has a time limit, and no answer is never taken for "there is no job". No torch."""

from __future__ import annotations

import dataclasses
import re
import subprocess
from collections.abc import Sequence

TIMEOUT = 30.0  # seconds that a busy controller may take
# What squeue calls a job that holds, or may still get, a node.
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


class Unanswered(Exception):  # noqa: N818 - nothing is known to be wrong
    """SLURM did not answer, so nothing is known."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A job as squeue shows it. `nodes` is empty and `reason` says why while it waits."""

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
    """What a command of SLURM prints.

    Raises:
        Unanswered: the command is not there, failed, or took longer than `timeout` seconds.
    """
    try:
        # In a session of its own: Ctrl-C is for who waits, not for a question on its way.
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, start_new_session=True)
    except subprocess.TimeoutExpired:
        raise Unanswered(f"{command[0]} gave no answer in {timeout:.0f} s") from None
    except OSError as error:
        raise Unanswered(f"{command[0]}: {error.strerror}") from None
    if done.returncode:
        raise Unanswered((done.stderr or done.stdout).strip() or f"{command[0]} failed ({done.returncode})")
    return done.stdout


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


def stages(folder: str) -> dict[str, dict[str, int]]:
    """What of the user's live jobs Snakemake submitted from a folder: rule -> state -> how many.

    Snakemake's executor gives all jobs of one start a name that nobody else knows, and the rule as a comment.

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
    """How a job that left the queue ended, such as COMPLETED or CANCELLED; None if nobody can say (any more).

    The controller forgets jobs after minutes, but what accounting says may be late, and it is more often away.
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
    """Skip the two minutes that SLURM lets a requeued job wait. What does not work is not missed."""
    try:
        ask("scontrol", "update", f"jobid={job}", "StartTime=now")
    except Unanswered:
        return


def requeue(job: str) -> None:
    """Put a running job back into the queue; its processes are then told to end.

    Raises:
        Unanswered: SLURM did not take it.
    """
    ask("scontrol", "requeue", job)


def cancel(jobs: Sequence[str]) -> None:
    """End jobs for good.

    Raises:
        Unanswered: SLURM did not take it.
    """
    ask("scancel", *jobs)
