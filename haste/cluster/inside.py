"""What runs on every rank of a training job, and how it ends when SLURM signals it.

| signal | why | what happens |
|---|---|---|
| USR2 | the time limit is near | stop within two steps, save, requeue, wait to be ended |
| TERM | preempted, or cancelled | stop within two steps, save, wait to be ended |

They wait because SLURM does not requeue a job that exits as FAILED. An interrupted job never returns a value: submitit
would keep it as the result, even for the next attempt.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path

from haste import config
from haste.cluster import job as jobs
from haste.cluster import slurm, staging
from haste.files import artefact, locks
from haste.plan.names import State
from haste.plan.plan import Plan

log = logging.getLogger("haste.cluster")

TIME_LIMIT, ENDING = 1, 2  # reasons to stop, the stronger one larger
LINGER = 900.0  # seconds until a process that was signalled to end, and that SLURM does not end, exits by itself
ORPHAN = 300.0  # seconds that the last attempt's process on a lost node may still hold its lock


@dataclasses.dataclass
class Interruption:
    """Signals set a flag; the step boundary acts on it."""

    reason: int = 0

    def listen(self) -> None:
        """Replace submitit's own handlers."""
        signal.signal(signal.SIGUSR2, lambda *_: self.raise_to(TIME_LIMIT))
        signal.signal(signal.SIGTERM, lambda *_: self.raise_to(ENDING))

    def raise_to(self, reason: int) -> None:
        """Set a reason to stop, unless there is a stronger one."""
        self.reason = max(self.reason, reason)


@dataclasses.dataclass(frozen=True)
class Work:
    """The description of a training job, pickled by submitit and called on each rank.

    Args:
        resolved: the configuration as JSON.
        state: TRAJECTORY/STEP.
        root: the results folder, absolute.
        folder: where the command was given; paths in the configuration are relative to it.
        stage_in: whether, and where, stores are copied to the node's own disk; as `haste.cluster.staging.staged`.
    """

    resolved: str
    state: str
    root: str
    folder: str
    stage_in: str = "false"

    def __call__(self) -> str:
        """Train, and return the state's path. Does not return when interrupted."""
        interruption = Interruption()
        interruption.listen()
        os.chdir(self.folder)
        rank = _join_ranks()
        plan = Plan(config.resolve({**json.loads(self.resolved), "results": self.root}))
        state = plan.parse(self.state)
        _log_to(plan, state, rank)
        refused = jobs.refusal(plan, state, os.environ["SLURM_JOB_ID"])
        refused.unlink(missing_ok=True)  # of an earlier attempt
        try:
            return self._train(plan, state, rank, interruption)
        except locks.InUse as held:  # by the job of another configuration: later it is free
            log.info("%s; back into the queue", held)
            if rank == 0:
                _requeue()
            time.sleep(LINGER)
            raise
        except (ValueError, FloatingPointError) as refusal:
            _refuse(refused, str(refusal))
            raise
        except OSError as error:
            if error.errno in artefact.FULL:
                _refuse(
                    refused, f"{error}. The last good state is kept: make room, and the same command goes on from it"
                )
            raise

    def _train(self, plan: Plan, state: State, rank: int, interruption: Interruption) -> str:
        from haste.train.loop import Interrupted, train

        if rank == 0:
            _wait_for_the_last_attempt(plan, state)
            _refuse_if_futile(plan, state)
        copies = staging.staged(plan, state, self.stage_in, interrupted=lambda: interruption.reason > 0)
        try:
            with copies as near:
                return str(train(near, state, interrupted=lambda: interruption.reason))
        except Interrupted as stop:
            log.info(
                "step %d is saved; %s", stop.step, "back into the queue" if stop.reason == TIME_LIMIT else "ending"
            )
            if rank == 0 and stop.reason == TIME_LIMIT:
                _requeue()
            time.sleep(LINGER)
            raise RuntimeError(f"signalled to end, but this process was not ended within {LINGER:.0f} s") from None


def _refuse(refused: Path, words: str) -> None:
    """Record a refusal: another attempt would end the same way, so the waiting process reports it at once."""
    log.error("refused: %s", words)
    try:
        with artefact.replacing(refused) as aside:
            aside.write_text(f"{words}\n")
    except OSError as error:  # the disk is full; after two attempts without progress there is no further one
        log.error("the waiting process cannot be notified: %s", error)


def _join_ranks() -> int:
    """Export what torch.distributed reads; this process's rank."""
    from submitit.helpers import TorchDistributedEnvironment

    # The port follows from the job's number, so it is the same on all ranks and after a requeue.
    found = TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    return found.rank


def _log_to(plan: Plan, state: State, rank: int) -> None:
    """Log to the job's output, and on rank 0 also to a file of this attempt."""
    number, attempt = os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_RESTART_COUNT", "0")
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
    if rank == 0:
        handlers.append(logging.FileHandler(jobs.folder(plan, state) / f"{number}-attempt-{attempt}.log"))
    form = f"%(asctime)s %(name)s: {'' if rank == 0 else f'process {rank}: '}%(message)s"
    level = logging.INFO if rank == 0 else logging.WARNING
    logging.basicConfig(level=level, format=form, datefmt="%H:%M:%S", handlers=handlers, force=True)
    log.info("job %s, attempt %s, on %s", number, attempt, os.environ.get("SLURM_JOB_NODELIST", "?"))


def _wait_for_the_last_attempt(plan: Plan, state: State) -> None:
    """Wait for the lock: a node that SLURM has lost may still train and hold it."""
    limit, lock = time.monotonic() + ORPHAN, Path(plan.path(state)).parent / "lock"
    while True:
        try:
            locks.acquire(lock, f"trajectory {state.trajectory}").close()
            return
        except ValueError as held:
            if time.monotonic() > limit:
                raise
            log.info("%s", held)
        time.sleep(2)


def _refuse_if_futile(plan: Plan, state: State) -> None:
    """Refuse a job that SLURM requeues again and again before anything is saved: it would burn hours without end."""
    number = os.environ["SLURM_JOB_ID"]
    record, now = jobs.starts(plan, state, number), jobs.progress(plan, state)
    with open(record, "a") as file:
        file.write(f"{now}\n")
    last = record.read_text().split()[-1 - jobs.FUTILE :]
    if last == [str(now)] * (jobs.FUTILE + 1):
        raise ValueError(
            f"it was put back into the queue {jobs.FUTILE} times without getting beyond step {now}: it was "
            "preempted, its node failed, or somebody requeued it, before a step was saved. A smaller "
            f"runtime.save_every (now {plan.config.runtime.save_every}), a partition with a longer grace time or other "
            "nodes help. The same command tries again"
        )


def _requeue() -> None:
    for _ in range(5):
        try:
            return slurm.requeue(os.environ["SLURM_JOB_ID"])
        except slurm.Unanswered as error:
            log.warning("not requeued: %s", error)
            time.sleep(5)
