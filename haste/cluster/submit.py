"""Hand a training job to SLURM through submitit. What is submitted is a description, never weights."""

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

SUBMITTING = 120.0  # seconds that sbatch may take

# What tells a job to end would kill a Python that is not yet up to listen, and who exits by itself is not requeued.
PYTHON = f"""sh -c 'trap "" TERM USR2; exec "$@"' sh {shlex.quote(sys.executable)}"""


class _Executor(SlurmExecutor):
    """submitit's own, whose sbatch may not take for ever."""

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
    """Submit the job that makes a state; its number.

    Raises:
        Unanswered: sbatch refused, and says why, or gave no answer.
    """
    from haste.cluster.inside import Work

    logging.getLogger("submitit").setLevel(logging.WARNING)
    # submitit counts time limits on its own account; ours is another protocol, which never asks it.
    executor = _Executor(folder=jobs.folder(plan, state), max_num_timeout=10**6, python=PYTHON)
    executor.update_parameters(**jobs.parameters(asked, jobs.name(plan, state)))
    work = Work(
        plan.config.model_dump_json(), str(state), str(Path(plan.root).resolve()), str(Path.cwd()), asked.stage_in
    )
    where = {name: value for name, value in os.environ.items() if name == "SLURM_CONF"}
    with clean_env():  # who waits may be in a job itself, whose variables are not for the new one
        os.environ.update(where)  # but where the cluster is stays true
        return str(executor.submit(work).job_id)
