"""A SLURM of scripts, and training jobs inside it: processes with the environment that srun would give them."""

import multiprocessing
import os
from pathlib import Path

import pytest
import torch

from haste.cluster import inside, waiter
from haste.cluster import job as jobs
from haste.cluster.inside import Work

FORK = multiprocessing.get_context("fork")


class Cluster:
    """squeue, sacct, scontrol, sbatch, srun and scancel on PATH; each runs a script over files in one folder."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir(parents=True)
        monkeypatch.setenv("PATH", f"{self.bin}:{os.environ['PATH']}")
        for name in ("squeue", "sacct", "scontrol", "srun", "scancel", "sbatch"):
            self.says(name, "exit 0")

    def says(self, name: str, script: str) -> None:
        """What a command does from now on; every call is on record with its arguments."""
        path = self.bin / f".{name}"
        path.write_text(f'#!/bin/bash\ncd {self.folder}\necho "$@" >> {name}.calls\n{script}\n')
        path.chmod(0o755)
        path.replace(self.bin / name)

    def shows(self, *lines: str) -> None:
        """What squeue shows from now on."""
        self.says("squeue", "\n".join(f"echo '{line}'" for line in lines) or "true")

    def calls(self, name: str) -> list[str]:
        path = self.folder / f"{name}.calls"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    for quick, seconds in (("GONE", 2), ("ASKED", 2)):
        monkeypatch.setattr(waiter, quick, seconds)
    return Cluster(tmp_path / "cluster", monkeypatch)


def _process(work, rank, size, number, errors):
    os.environ.update(SUBMITIT_EXECUTOR="slurm", SLURM_JOB_ID=str(number), SLURM_JOB_NODELIST="localhost")
    os.environ.update(SLURM_NTASKS=str(size), SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank))
    torch.set_num_threads(1)
    try:
        work()
    except BaseException as error:
        errors.put((rank, repr(error)))
        raise


class Job:
    """A training job in processes of this machine, under the very code that runs inside a job of SLURM."""

    def __init__(self, plan, state, number=12, size=1, **settings):
        self.errors = FORK.Queue()
        jobs.folder(plan, state).mkdir(parents=True, exist_ok=True)
        work = Work(
            plan.config.model_dump_json(), str(state), str(Path(plan.root).resolve()), str(Path.cwd()), **settings
        )
        arguments = [(work, rank, size, number, self.errors) for rank in range(size)]
        self.processes = [FORK.Process(target=_process, args=given) for given in arguments]
        for process in self.processes:
            process.start()

    def ended(self):
        """Exit codes of its processes."""
        for process in self.processes:
            process.join(120)
        return [process.exitcode for process in self.processes]


@pytest.fixture
def start_job(monkeypatch):
    """A function that starts a training job; none outlives its test."""
    monkeypatch.setattr(inside, "LINGER", 0)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    begun = []

    def start(plan, state, **settings):
        begun.append(Job(plan, state, **settings))
        return begun[-1]

    yield start
    for process in (process for job in begun for process in job.processes):
        process.kill()
        process.join()
