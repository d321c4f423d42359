"""Make a state by a job of the cluster: submit it, or attach to the existing one, and wait. No torch.

The only sign that the job is done is the state itself, which it writes atomically. Everything else may die and be
started again: the waiting process, Snakemake, the login node. A job's name follows from the state that it makes, so
the next waiting process finds it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from haste.cluster import job as jobs
from haste.cluster import slurm
from haste.cluster.job import Resources
from haste.files import locks
from haste.plan.names import State
from haste.plan.plan import Plan

log = logging.getLogger("haste.cluster")

GONE = 4  # queries in a row without a job before it counts as gone: after a node's death it vanishes for seconds
ASKED = 4  # queries without an answer before a submission is refused
SILENCE = 1800.0  # seconds without an answer after which waiting ends
HINTS = {
    "account": "slurm_account",
    "partition": "slurm_partition",
    "node configuration": "nodes, gpus_per_node, cpus_per_task, mem_mb or constraint",
    "node count": "nodes",
    "time limit": "runtime",
    "qos": "qos",
    "feature": "constraint",
}
# squeue's reasons of a job that will wait until limits are changed, and the key of the profile for it.
STUCK = {
    "PartitionNodeLimit": "nodes",
    "PartitionTimeLimit": "runtime",
    "WallDurationPerJob": "runtime",
    "PerJob": "nodes, gpus_per_node, cpus_per_task and mem_mb",
    "BadConstraints": "constraint",
    "InvalidAccount": "slurm_account",
    "AccountNotAllowed": "slurm_account",
    "InvalidQOS": "qos",
    "QOSNotAllowed": "qos",
}


class Detached(Exception):  # noqa: N818 - requested by the user
    """The waiting process was signalled to end. The job continues."""


class Waiter:
    """One state and the job that makes it."""

    def __init__(self, plan: Plan, state: State, asked: Resources, tell: Callable[[str], None] = log.info):
        self.plan, self.state, self.asked, self._tell = plan, state, asked, tell
        self.name, self.folder = jobs.name(plan, state), jobs.folder(plan, state)
        self.path = Path(plan.path(state))
        self.detach = threading.Event()
        self.job: str | None = None
        self.said = ""

    def make(self) -> Path:
        """Wait until the state exists.

        Raises:
            ValueError: the cluster or the job refuses, the job was cancelled, or attempts make no progress.
            Detached: INT, TERM or HUP was received; the job continues.
        """
        self._check_batch()
        with self._catching_signals():
            futile, before = 0, self.progress()
            while not self.done():
                ending = self._wait(self._submit_or_attach())
                if self.done():
                    break
                self._give_up_on(ending)
                reached, before = before, self.progress()
                futile = futile + 1 if before <= reached else 0
                self.tell(f"job {self.job} ended ({ending}) with step {before} saved")
                if futile >= jobs.FUTILE:
                    raise ValueError(
                        f"{self.state}: {jobs.FUTILE} attempts ended ({ending}) without getting beyond step {before}. "
                        f"Either they fail, or their {self.asked.runtime} minutes are over before a step is saved. "
                        f"Their log: {self._logs()}\n{self._last_words()}"
                    )
        return self.path

    def done(self) -> bool:
        """Whether the state exists and is the requested one.

        Raises:
            ValueError: another file is in its place.
        """
        with contextlib.suppress(OSError):
            os.listdir(self.path.parent)  # makes a network file system refresh its cache
        if not self.path.exists():
            return False
        header, key = _header(self.path), self.plan.trajectories[self.state.trajectory].key
        if header.get("key") != key:
            raise ValueError(f"{self.path}: expected a state of key {key}, found {header.get('key', 'a foreign file')}")
        return True

    def progress(self) -> int:
        """The newest saved step on the way to the state."""
        return jobs.progress(self.plan, self.state)

    def tell(self, words: str) -> None:
        """Report something, unless it was the last report."""
        if words != self.said:
            self.said = words
            self._tell(f"{self.state}: {words}")

    # -- submit or attach ------------------------------------------------------------------------------------------

    def _submit_or_attach(self) -> str:
        """The job that makes the state: an existing or a new one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        while True:
            with self._alone():
                found = [job for job in self._must_answer() if job.live]
                if found:
                    self.job = found[0].id
                    self.tell(f"attached to job {self.job} ({found[0].state})")
                    return self.job
                if self.done():  # it ended between two queries
                    return self.job or ""
                self.job = self._submit()
            if self.job:
                self.tell(f"submitted job {self.job}: {self.asked.described}")
                return self.job
            self._sleep(self.asked.poll_s)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Exclude other submissions for this trajectory. The kernel releases the lock when the process dies."""
        while (file := locks.attempt(self.folder / "submit.lock")) is None:
            self.tell("another process is submitting it; waiting for that")
            self._sleep(1)
        with file:
            yield

    def _must_answer(self) -> list[slurm.Job]:
        for attempt in range(ASKED):
            try:
                return slurm.queue([self.name])
            except slurm.Unanswered as error:
                reason = str(error)
                self.tell(f"SLURM does not say whether a job for it exists ({reason})")
            if attempt < ASKED - 1:
                self._sleep(min(5, self.asked.poll_s))
        raise ValueError(
            f"{self.state}: SLURM does not say whether a job for it exists ({reason}), so none is submitted: there "
            "might be two. The same command tries again."
        )

    def _submit(self) -> str | None:
        """The number of a new job; None if the queue takes no more jobs for now."""
        from haste.cluster.submit import submit

        try:
            return submit(self.plan, self.state, self.asked)
        except slurm.Unanswered as error:
            words = str(error)
        if limit := slurm.full(words):
            self.tell(f"SLURM takes no more jobs now ({limit}): its job is submitted when there is room")
            return None
        hint = next((keys for what, keys in HINTS.items() if what in words.lower()), None)
        where = f" Look at {hint} in the profile." if hint else ""
        raise ValueError(f"{self.state}: SLURM did not take the job ({self.asked.described}): {words}.{where}")

    # -- wait ------------------------------------------------------------------------------------------------------

    def _wait(self, number: str) -> str:
        """Wait until the job is over for good, or the state exists; returns how the job ended."""
        gone, heard = 0, time.monotonic()
        while gone < GONE and not self.done():
            try:
                found = [job for job in slurm.queue([self.name]) if job.live]
            except slurm.Unanswered as error:
                self._still_waiting(heard, str(error))
            else:
                heard = time.monotonic()
                gone = 0 if found else gone + 1
                if found:
                    self._follow(found[0])
            if not self.done():
                self._sleep(self.asked.poll_s)
        return slurm.ending(self.job or number) or "unknown"

    def _follow(self, job: slurm.Job) -> None:
        self.job = job.id
        if job.state == "PENDING" and job.reason == "BeginTime":
            slurm.start_now(job.id)
        where = f" on {job.nodes}" if job.nodes else f" ({job.reason})"
        self.tell(f"job {job.id} {job.state}{where}{_advice(job)}")

    def _still_waiting(self, heard: float, reason: str) -> None:
        self.tell(f"SLURM does not answer ({reason}); job {self.job} may go on, waiting")
        if time.monotonic() - heard > SILENCE:
            raise ValueError(
                f"{self.state}: no answer from SLURM for {SILENCE / 60:.0f} minutes ({reason}). Job {self.job} may go "
                "on; the same command attaches to it."
            )

    def _give_up_on(self, ending: str) -> None:
        """Raise if another attempt would be useless or unwanted."""
        refused = jobs.refusal(self.plan, self.state, self.job or "")
        if refused.exists():
            raise ValueError(f"{self.state}: job {self.job} refused: {refused.read_text().strip()}")
        if ending == "CANCELLED":
            raise ValueError(
                f"{self.state}: job {self.job} was cancelled, with step {self.progress()} saved. The same command "
                "submits another one, which goes on from there."
            )

    def _logs(self) -> str:
        return str(self.folder / f"{self.job}_0_log.out")

    def _last_words(self) -> str:
        try:
            return "\n".join(Path(self._logs()).read_text(errors="replace").splitlines()[-20:])
        except OSError:
            return "(it left none)"

    # -- signals ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _catching_signals(self) -> Iterator[None]:
        """INT, TERM and HUP are for the waiting process. They set a flag, which the next sleep checks."""
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before: dict[Any, Any] = {number: signal.signal(number, lambda *_: self.detach.set()) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _sleep(self, seconds: float) -> None:
        if self.detach.wait(seconds):
            about = f"job {self.job} goes on; the same command attaches to it, `scancel {self.job}` ends it"
            raise Detached(f"{self.state}: {about if self.job else 'no job was submitted'}")

    def _check_batch(self) -> None:
        batch = self.plan.trajectories[self.state.trajectory].recipe["training"]["batch"]
        parts = self.asked.processes * self.plan.config.runtime.accumulate
        if batch % parts:
            raise ValueError(
                f"{self.state}: a batch of {batch} cannot be cut into {self.asked.processes} processes (nodes * "
                f"tasks_per_node) times {self.plan.config.runtime.accumulate} accumulated parts"
            )


def _advice(job: slurm.Job) -> str:
    """What a user can do about a job that will not start by itself; empty for all others."""
    if job.state != "PENDING":
        return ""
    if "Held" in job.reason:
        return f" (held: `scontrol release {job.id}` lets it go on)"
    key = next((key for what, key in STUCK.items() if what in job.reason), None)
    advice = f": it will not start like this; look at {key} in the profile, `scancel {job.id}`, then the same command"
    return advice if key else ""


def _header(path: Path) -> dict[str, Any]:
    from haste.files import provenance

    return provenance.provenance_of(path)


def make(plan: Plan, state: State, asked: Resources, terminal: int | None = None) -> Path:
    """Make a state by a job of the cluster, and report progress in the log and on the user's terminal.

    Args:
        plan: the configuration's plan.
        state: the state to make.
        asked: the job's resources.
        terminal: a file descriptor of the user's terminal, if the log does not go there.
    """

    def tell(words: str) -> None:
        log.info("%s", words)
        if terminal is not None:
            with contextlib.suppress(OSError):
                os.write(terminal, f"{words}\n".encode())

    try:
        return Waiter(plan, state, asked, tell).make()
    except (Detached, ValueError) as end:
        if terminal is not None and isinstance(end, Detached):
            tell(str(end))
        raise
