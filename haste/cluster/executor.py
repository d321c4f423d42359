"""Snakemake's SLURM executor, and what is different here. No torch.

| what happens | Snakemake's executor | here |
|---|---|---|
| the queue takes no more jobs, or its controller is away | the job fails | it is submitted later |
| an array is refused, perhaps as larger than a limit | all its jobs fail | each is submitted by itself |
| jobs outlive a killed Snakemake | the next one submits the same beside them | it attaches to them |
| Ctrl-C while jobs are submitted | the rest is submitted after the others are cancelled | the rest is not submitted |

Its own methods are used, also those that are not documented: `tests/cluster/test_executor.py` notices a change.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from snakemake_executor_plugin_slurm import Executor
from snakemake_interface_executor_plugins.executors.base import SubmittedJobInfo

from haste.cluster import job as haste_jobs
from haste.cluster import queue, slurm
from haste.files import artefact
from haste.plan.plan import Plan

AWAY = "Unable to contact slurm controller"


class Patient(Executor):
    """The executor of a workflow that has begun; see `take_over`."""

    plan: Plan
    left: dict[str, tuple[str, str]]
    over: threading.Event
    inside: threading.local
    said: set[str]

    def run_jobs(self, jobs: Sequence[Any]) -> None:
        """Attach to the jobs that an earlier Snakemake submitted and that still live, and submit the others."""
        if self.left:
            with contextlib.suppress(slurm.Unanswered):
                there = slurm.live(haste_jobs.name_of_stages(self.plan))
                self.left = {output: found for output, found in self.left.items() if found[0] in there}
        super().run_jobs([job for job in jobs if not self._attached(job)])

    def _attached(self, job: Any) -> bool:
        number, log = self.left.pop(self._output(job), ("", ""))
        if not number:
            return False
        self.run_job_pre(job)
        self.logger.info(f"Attached to SLURM job {number}, which an earlier start submitted (log: {log}).")
        self.report_job_submission(SubmittedJobInfo(job, number, {"slurm_logfile": Path(log)}))
        return True

    def _output(self, job: Any) -> str:
        return os.path.relpath(job.output[0], self.plan.root)

    def report_job_submission(self, job_info: SubmittedJobInfo, register_job: bool = True) -> None:
        """Record a job that SLURM has taken."""
        log = str((job_info.aux or {}).get("slurm_logfile", ""))
        with contextlib.suppress(OSError):  # on a full disk a job is no less submitted
            queue.full(self.plan).unlink(missing_ok=True)
            with open(queue.record(self.plan), "a") as file:
                file.write(json.dumps([self._output(job_info.job), job_info.external_jobid, log]) + "\n")
        super().report_job_submission(job_info, register_job)

    # -- refusals --------------------------------------------------------------------------------------------------

    def run_array_jobs(self, jobs: Sequence[Any]) -> None:
        """Submit jobs as one array; called in a thread."""
        self.inside.array = True
        try:
            super().run_array_jobs(jobs)
        finally:
            self.inside.array = False

    def _report_job_error_threadsafe(self, job_info: SubmittedJobInfo, msg: str) -> None:
        """Submit a refused job later where that may help; called in a thread."""
        in_array = getattr(self.inside, "array", False)
        limit = slurm.full(msg) or (AWAY if AWAY in msg else "")
        if not (in_array or limit):
            super()._report_job_error_threadsafe(job_info, msg)
            return
        if limit:
            self._tell(limit)
            self.over.wait(self.workflow.executor_settings.init_seconds_before_status_checks)
        if not self.over.is_set():
            self._job_submission_executor.submit(self.run_job, job_info.job)

    def _tell(self, limit: str) -> None:
        words = f"SLURM takes no more jobs now ({limit}). The others are submitted when there is room."
        with contextlib.suppress(OSError):
            queue.full(self.plan).write_text(f"{words}\n")
        if limit not in self.said:
            self.logger.warning(words)
        self.said.add(limit)

    # -- the end ---------------------------------------------------------------------------------------------------

    def cancel(self) -> None:
        """Cancel all jobs; those that are not submitted yet never are."""
        self._submit_no_more()
        super().cancel()

    def shutdown(self) -> None:
        """End the executor."""
        self._submit_no_more()
        super().shutdown()

    def _submit_no_more(self) -> None:
        self.over.set()
        self._job_submission_executor.shutdown(wait=True, cancel_futures=True)


def take_over(executor: Executor, plan: Plan, left: Mapping[str, tuple[str, str]] | None, limit: str) -> None:
    """Have an executor that has submitted nothing yet behave as here.

    Args:
        executor: Snakemake's.
        plan: of the configuration.
        left: the jobs that an earlier Snakemake submitted and that live, as `queue.left` returns them.
        limit: the limit because of which SLURM will not take all jobs at once; then none are submitted as arrays.

    Raises:
        ValueError: it is not known which jobs live.
    """
    if left is None:
        raise ValueError(
            f"SLURM does not say whether jobs that an earlier start submitted ({queue.record(plan)}) still run, so "
            "none is submitted: there might be two. The same command tries again"
        )
    executor.__class__ = Patient
    executor.plan, executor.left, executor.said = plan, dict(left), set()
    executor.over, executor.inside = threading.Event(), threading.local()
    executor.run_uuid = "_".join(
        filter(None, (executor.workflow.executor_settings.jobname_prefix, haste_jobs.name_of_stages(plan)))
    )
    if limit:
        executor.array_jobs = set()  # the larger an array, the later it fits
        executor.logger.warning(f"SLURM will not take all jobs at once ({limit}): some are submitted later.")
    queue.full(plan).unlink(missing_ok=True)
    with artefact.replacing(queue.record(plan)) as aside:  # the others have ended
        aside.write_text("".join(json.dumps([output, *job]) + "\n" for output, job in left.items()))
