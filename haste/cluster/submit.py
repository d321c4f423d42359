"""Submit a training job to SLURM through submitit: a description of the work, never weights."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from submitit.core import core
from submitit.core.utils import FailedSubmissionError
from submitit.helpers import clean_env
from submitit.slurm.slurm import SlurmExecutor

from haste.cluster import job as jobs
from haste.cluster import slurm
from haste.cluster.job import Resources
from haste.plan.names import State
from haste.plan.plan import Plan

SUBMITTING = 180.0  # seconds that sbatch may take: while the cluster has no room for a job, it tries for 120 by itself

# The signal to end would kill a Python that has no handlers yet, and a job that exits by itself is not requeued.
PYTHON = f"""sh -c 'trap "" TERM USR2; exec "$@"' sh {shlex.quote(sys.executable)}"""


class _Executor(SlurmExecutor):
    """submitit's executor with a time limit for sbatch."""

    def _submit_command(self, command: str) -> core.Job[Any]:
        file = Path(self.folder) / "submitted.sh"
        file.write_text(self._make_submission_file_text(command, ""))
        said = slurm.ask("sbatch", str(file), timeout=SUBMITTING)
        try:
            number = self._get_job_id_from_submission_command(said)
        except FailedSubmissionError:
            raise slurm.Unanswered(f"sbatch said {said.strip()!r}, expected a job's number") from None
        file.replace(file.with_name(f"{number}_submitted.sh"))
        return self.job_class(folder=self.folder, job_id=number, tasks=list(range(self._num_tasks())))


def submit(plan: Plan, state: State, asked: Resources) -> str:
    """Submit the job that makes a state; returns its number.

    Raises:
        Unanswered: sbatch refused, with the reason, or did not answer.
    """
    from haste.cluster.inside import Work

    logging.getLogger("submitit").setLevel(logging.WARNING)
    # submitit counts time limits itself; our own protocol does not use its count.
    executor = _Executor(folder=jobs.folder(plan, state), max_num_timeout=10**6, python=PYTHON)
    executor.update_parameters(**jobs.parameters(asked, jobs.name(plan, state)))
    work = Work(
        plan.config.model_dump_json(), str(state), str(Path(plan.root).resolve()), str(Path.cwd()), asked.stage_in
    )
    where = {name: value for name, value in os.environ.items() if name == "SLURM_CONF"}
    with clean_env():  # the waiting process may be in a job itself, whose variables must not reach the new one
        os.environ.update(where)  # except those that say where the cluster is
        return str(executor.submit(work).job_id)
