"""Ask SLURM whether it would accept a workflow's jobs, before the first is submitted. No torch.

So mistakes in a profile are reported in the first seconds, and not hours later when the first job of a rule is due.
"""

from __future__ import annotations

import getpass
import re
import shlex
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from haste.cluster import slurm
from haste.networks import driver
from haste.plan import memory
from haste.plan.names import State
from haste.plan.plan import Plan

# SLURM's messages, and the keys of the profile that may cause them. These are permanent: submission would fail.
WRONG = {
    "invalid account": ("slurm_account", "slurm_partition"),
    "invalid partition": ("slurm_partition",),
    "invalid qos": ("qos",),
    "invalid feature": ("constraint",),
}
# These may change when other nodes are up.
DOUBTFUL = {
    "node configuration": ("gpus_per_node", "gpu", "mem_mb", "cpus_per_task", "tasks_per_node", "nodes", "constraint"),
    "node count": ("nodes",),
    "cpu count": ("cpus_per_task", "tasks_per_node"),
    "memory": ("mem_mb",),
    "time limit": ("runtime",),
}
FLAGS = {
    "slurm_account": "account",
    "slurm_partition": "partition",
    "qos": "qos",
    "constraint": "constraint",
    "runtime": "time",
    "mem_mb": "mem",
    "cpus_per_task": "cpus-per-task",
    "nodes": "nodes",
    "tasks_per_node": "ntasks-per-node",
    "gpus_per_node": "gpus-per-node",
    "gpu": "gpus",
}


def check(asked: Iterable[tuple[str, Mapping[str, Any]]]) -> Iterator[str]:
    """Warnings that SLURM would not accept jobs with such resources now, in words.

    Args:
        asked: each job's rule and its resources, named as in the profile. Equal ones are tested once.

    Raises:
        ValueError: there is no SLURM on this machine, or a job could never be submitted; the message names the keys of
            the profile.
    """
    if not shutil.which("sbatch"):
        raise ValueError(
            "The profile hands jobs to SLURM, but here is no sbatch. Start this on a login node of the cluster, or "
            "without --profile, with --cores all, to work on this machine alone"
        )
    rules: dict[tuple[str, ...], set[str]] = {}
    asked = list(asked)
    for rule, resources in asked:
        rules.setdefault(flags(resources), set()).add(rule)
    _check_accounts({str(account) for _, resources in asked if (account := resources.get("slurm_account"))})
    for given, named in rules.items():
        try:
            slurm.ask("sbatch", "--test-only", *given, "--wrap=true")
        except slurm.Unanswered as error:
            if not slurm.full(str(error)):  # later there is room
                yield _doubt(f"jobs of {', '.join(sorted(named))} ({' '.join(given)})", given, str(error))


def check_memory(plan: Plan, asked: Iterable[tuple[State, Mapping[str, Any]]]) -> None:
    """Refuse training that does not fit into a GPU's memory, where both are known (`haste.plan.memory`).

    Args:
        plan: of the configuration.
        asked: the state that each job makes, and the job's resources: those of a cluster, or of this machine.

    Raises:
        ValueError: what does not fit, and the settings that would.
    """
    runtime, found = plan.config.runtime, dict[tuple[float, str], dict[str, memory.Need]]()
    for state, resources in asked if runtime.device != "cpu" else ():
        ranks, own = runtime.processes, resources.get("gpu_memory_gb")
        if "nodes" in resources:
            ranks = resources["nodes"] * resources.get("tasks_per_node", 1) * bool(resources.get("gpus_per_node"))
        if (gigabytes := own or runtime.gpu_memory_gb) and ranks:
            way = memory.Way(ranks, runtime.accumulate, runtime.checkpoint_blocks)
            one = memory.need(plan, plan.segment(state), way)
            where = "gpu_memory_gb in the profile" if own else "runtime.gpu_memory_gb"
            found.setdefault((gigabytes, where), {})[one.key] = one
    for (gigabytes, where), needs in found.items():
        memory.check(needs.values(), gigabytes, where)


def check_gpus(plan: Plan, asked: Iterable[tuple[State, Mapping[str, Any]]]) -> None:
    """Refuse more ranks than this machine has GPUs, before hours of other jobs.

    Args:
        plan: of the configuration.
        asked: as for `check_memory`; training of which a cluster's nodes are told is no matter of this machine.

    Raises:
        ValueError: there are some GPUs, but not one for each rank.
    """
    ranks, there = plan.config.runtime.processes, len(driver.visible()) if plan.config.runtime.device != "cpu" else 0
    if 0 < there < ranks and any("nodes" not in resources for _, resources in asked):
        raise ValueError(
            f"runtime.processes is {ranks}, and each rank needs a GPU of its own, but {there} can be seen here "
            f"(nvidia-smi -L, {driver.VISIBLE}). Expected at most {there}, or runtime.device: cpu."
        )


def check_place(folder: Path | str) -> None:
    """Refuse a folder of results whose path SLURM would read as a pattern, in the names of jobs' logs.

    Raises:
        ValueError: there is a % in it.
    """
    if "%" in (path := str(Path(folder).absolute())):
        raise ValueError(f"results: {path} has a %, which SLURM replaces in the names of logs; rename that folder")


def too_many(asked: Iterable[tuple[str, Mapping[str, Any]]], array: int) -> str:
    """The limit because of which SLURM would not take all jobs at once, with all that is in the queue; empty if none.

    Args:
        asked: as in `check`.
        array: the largest array that SLURM takes.
    """
    asked = list(asked)
    for given in dict.fromkeys(flags(resources) for _, resources in asked):
        try:
            slurm.ask("sbatch", "--test-only", f"--array=1-{min(len(asked), array)}", *given, "--wrap=true")
        except slurm.Unanswered as error:
            if limit := slurm.full(str(error)):
                return limit
    return ""


def _check_accounts(named: set[str]) -> None:
    """Refuse an account that is not the user's: not every SLURM does, but Snakemake's executor does, job by job."""
    try:
        answer = (
            slurm.ask("sacctmgr", "-n", "-s", "list", "user", getpass.getuser(), "format=account%256") if named else ""
        )
    except slurm.Unanswered:  # then it cannot be checked
        return
    mine = {line.strip() for line in answer.splitlines() if line.strip()}
    asked = {account for text in named for account in re.split(r"[,\s]+", text) if account}
    lost = sorted(account for account in asked if account.lower() not in map(str.lower, mine))
    if mine and lost:
        raise ValueError(f"slurm_account in the profile: {', '.join(lost)} is none of yours: {', '.join(sorted(mine))}")


def flags(resources: Mapping[str, Any]) -> tuple[str, ...]:
    """The flags of sbatch for such resources, in the order of `FLAGS`."""
    given = {**resources}
    if given.get("gpu"):
        given.pop("gpus_per_node", None)
    found = [f"--{flag}={given[key]}" for key, flag in FLAGS.items() if given.get(key)]
    return (*found, *shlex.split(str(given.get("slurm_extra") or "")))


def _doubt(which: str, given: tuple[str, ...], said: str) -> str:
    words = " ".join(said.split())
    for what, about in WRONG.items():
        if what in words.lower():
            raise ValueError(f"SLURM would not take {which}: {words}. Look at {' and '.join(about)} in the profile")
    about = next((about for what, about in DOUBTFUL.items() if what in words.lower()), ())
    hint = ", ".join(key for key in about if any(flag.startswith(f"--{FLAGS[key]}=") for flag in given))
    return f"SLURM would not take {which} now: {words}." + (f" Look at {hint} in the profile." if hint else "")
