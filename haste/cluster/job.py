"""The resources and the name of a training job on a cluster. No torch."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from haste.files.artefact import fingerprint
from haste.files.provenance import STATE_NAME
from haste.plan.names import State
from haste.plan.plan import Plan

FUTILE = 2  # attempts without progress after which there is no further one


@dataclasses.dataclass(frozen=True)
class Resources:
    """Resources of one training job, named as in the Snakemake profile, where each is explained."""

    nodes: int = 1
    tasks_per_node: int = 1  # ranks, one per GPU
    gpus_per_node: int = 0
    cpus_per_task: int = 1
    mem_mb: int | None = None  # per node
    runtime: int = 60  # minutes
    slurm_account: str | None = None
    slurm_partition: str | None = None
    qos: str | None = None
    constraint: str | None = None
    slurm_extra: str | None = None
    signal_s: int = 120  # seconds before the time limit at which SLURM sends its signal
    poll_s: int = 20  # seconds between two queries of the queue
    gpu_memory_gb: int | None = None  # of each GPU: what will not fit is refused before it is submitted
    stage_in: str = "false"  # whether, or where on the node, stores are copied before training reads them

    @property
    def processes(self) -> int:
        """Ranks of the whole job."""
        return self.nodes * self.tasks_per_node

    @property
    def described(self) -> str:
        """The requested resources, in words."""
        what = f"{self.nodes} node(s) with {self.tasks_per_node} process(es) and {self.gpus_per_node} GPU(s) each"
        return f"{what}, {self.runtime} minutes, partition {self.slurm_partition or 'default'}"


KEYS = {field.name: field for field in dataclasses.fields(Resources)}


def resources(settings: Iterable[str]) -> Resources:
    """Resources from KEY=VALUE texts.

    Raises:
        ValueError: an unknown key, or a value that is not a number where one is expected.
    """
    found: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if key not in KEYS or not equals:
            raise ValueError(f"resource {setting!r}: expected KEY=VALUE with one of {', '.join(KEYS)}")
        found[key] = _number(key, value) if "int" in str(KEYS[key].type) else value
    asked = Resources(**found)
    if asked.gpus_per_node and asked.gpus_per_node < asked.tasks_per_node:
        raise ValueError(
            f"resources: {asked.tasks_per_node} processes a node and {asked.gpus_per_node} GPUs: each needs its own"
        )
    if asked.stage_in.lower() not in ("true", "false") and not asked.stage_in.startswith(("/", "$")):
        raise ValueError(
            f"resource stage_in={asked.stage_in}: expected true, false, or a folder such as /scratch/$USER"
        )
    if asked.runtime * 60 <= asked.signal_s:
        raise ValueError(f"resources: signal_s is {asked.signal_s}, but the job has {asked.runtime} minutes in all")
    return asked


def _number(key: str, value: str) -> int:
    least = 0 if key == "gpus_per_node" else 1
    if not value.isdigit() or int(value) < least:
        raise ValueError(f"resource {key}={value}: expected a whole number, at least {least}")
    return int(value)


def name(plan: Plan, state: State) -> str:
    """The name of the job that makes a state: it follows from the state and the results folder alone.

    So any process that waits for a state finds its job, and two results folders of one user stay apart.
    """
    return f"haste-{state.trajectory}-{state.step}-{fingerprint(str(Path(plan.root).resolve()), 8)}"


def name_of_stages(plan: Plan) -> str:
    """The name of the jobs of all other stages, the same at every start: it follows from configuration and folder."""
    return f"haste-{plan.config.name}-{fingerprint(str(Path(plan.root).resolve()), 8)}"


def folder(plan: Plan, state: State) -> Path:
    """The folder of the logs of a trajectory's jobs."""
    return Path(plan.path(state)).resolve().parent / "jobs"


def refusal(plan: Plan, state: State, job: str) -> Path:
    """The file in which a job records why no attempt can succeed."""
    return folder(plan, state) / f"{job}-refused.txt"


def starts(plan: Plan, state: State, job: str) -> Path:
    """The file in which each attempt of a job records the step from which it continues."""
    return folder(plan, state) / f"{job}-starts.txt"


def progress(plan: Plan, state: State) -> int:
    """The newest saved step of a state's trajectory up to that state; 0 before the first."""
    place = Path(plan.path(state)).parent
    names = [STATE_NAME.match(path.name) for path in [*place.glob("step-*"), *place.glob("rolling/step-*")]]
    return max((step for match in names if match and (step := int(match[1])) <= state.step), default=0)


def parameters(asked: Resources, called: str) -> dict[str, Any]:
    """The parameters for submitit."""
    known = {
        "partition": asked.slurm_partition,
        "account": asked.slurm_account,
        "qos": asked.qos,
        "constraint": asked.constraint,
        "mem": f"{asked.mem_mb}MB" if asked.mem_mb else None,
        "gpus_per_node": asked.gpus_per_node or None,
    }
    return {
        "job_name": called,
        "time": asked.runtime,
        "nodes": asked.nodes,
        "ntasks_per_node": asked.tasks_per_node,
        "cpus_per_task": asked.cpus_per_task,
        "signal_delay_s": asked.signal_s,
        # Two jobs of one name and user never run at the same time, even if file systems have no locks.
        "dependency": "singleton",
        # The signal is named: submitit takes another one from SUBMITIT_PREEMPT_SIGNAL, and then nothing would be saved.
        "additional_parameters": {
            "requeue": True,
            "signal": f"USR2@{asked.signal_s}",
            **_extra(asked.slurm_extra or ""),
        },
        # When one rank dies, kill the others, which would wait for it forever.
        "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={asked.cpus_per_task}"],
        "stderr_to_stdout": True,
        **{key: value for key, value in known.items() if value is not None},
    }


def _extra(flags: str) -> dict[str, Any]:
    """`--key=value --flag` in submitit's form."""
    found: dict[str, Any] = {}
    for flag in shlex.split(flags):
        key, equals, value = flag.removeprefix("--").partition("=")
        if not flag.startswith("--") or not key:
            raise ValueError(f"slurm_extra {flag!r}: expected flags of the form --key=value or --key")
        found[key] = value if equals else True
    return found
