"""What a configuration's jobs cost on a cluster, by the cluster's own accounting. No torch.

The jobs of a configuration are known from files alone: every command of the workflow that runs inside a SLURM job
leaves a mark, `results/NAME/jobs/STAGE-NUMBER`, and training jobs leave their logs beside their states. The answer of
`sacct` about these numbers, every attempt with its end, is kept beside the report: accounting databases are purged,
and a report may be made where there is none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

from haste.cluster import slurm
from haste.files import artefact
from haste.plan.plan import Plan

log = logging.getLogger("haste.cluster")

PATIENCE = 60.0  # seconds that the report waits for all answers together
AT_ONCE = 500  # jobs per query: the length of a command line is limited
FIELDS = ("JobIDRaw", "State", "Start", "ElapsedRaw", "AllocCPUS", "AllocTRES", "TotalCPU", "TRESUsageInAve", "JobName")
DONE = "COMPLETED"
SEVERAL = "several stages"  # stage of a job in which a whole workflow ran


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One attempt at a job: a requeued job has several with the same number.

    start: as SLURM writes it; state: its first word, such as COMPLETED, PREEMPTED or CANCELLED; seconds: how long it
    held its nodes; cpus, gpus: allocated; cpu_seconds: CPU time used; gpu_share: mean utilisation of its GPUs, 0..1.
    None is a value that the site does not record.
    """

    job: str
    start: str
    stage: str
    state: str
    seconds: float
    cpus: int
    gpus: float
    cpu_seconds: float | None = None
    gpu_share: float | None = None


def mark(config_file: Path | str, stage: str) -> None:
    """Record that a stage of a workflow runs in the current SLURM job; does nothing outside of a job.

    Args:
        config_file: the resolved configuration that the workflow's jobs read, results/NAME/config.json.
        stage: the rule.
    """
    number, path = os.environ.get("SLURM_JOB_ID", ""), Path(config_file)
    if not number.isdigit() or path.name != "config.json":
        return
    with contextlib.suppress(OSError):  # accounting must not fail a job
        folder = path.parent / "jobs"
        folder.mkdir(exist_ok=True)
        (folder / f"{stage}-{number}").touch()


def jobs_of(plan: Plan) -> dict[str, str]:
    """The number of each job that worked for a plan -> its stage."""
    found: dict[str, str] = {}
    for path in Path(plan.folder, "jobs").glob("*-*"):
        stage, _, number = path.name.rpartition("-")
        found[number] = SEVERAL if found.get(number, stage) != stage else stage
    for trajectory in (name for name, steps in plan.cuts.items() if steps):
        for path in Path(plan.root, "states", trajectory, "jobs").glob("*"):
            if told := re.match(r"\d+(?=[-_])", path.name):
                found[told[0]] = "train"
    return found


def file_of(plan: Plan) -> Path:
    """The file of a plan's accounting."""
    return Path(plan.report).parent / "accounting.json"


def kept(plan: Plan) -> list[Attempt]:
    """The recorded attempts; none if there is no record, or its file cannot be read."""
    if not file_of(plan).exists():
        return []
    try:
        return _load(plan)
    except ValueError as error:
        log.warning("the resources that jobs took are not shown: %s", error)
        return []


def _load(plan: Plan) -> list[Attempt]:
    path = file_of(plan)
    found = artefact.read_json(path, "accounting")
    artefact.check_entries(path, found, attempts=list)
    try:
        return [Attempt(**attempt) for attempt in found["attempts"]]
    except TypeError as error:
        raise ValueError(f"{path}: damaged or edited: {error}") from error


def update(plan: Plan) -> None:
    """Query the accounting about all jobs whose end is not recorded, and keep the answer.

    Records that it no longer has stay unchanged; so do all of them if there is no accounting, or if it is slow.
    """
    try:
        before = _load(plan) if file_of(plan).exists() else []
    except ValueError as error:
        log.warning("%s; nothing is added to it", error)
        return
    owners, settled = jobs_of(plan), {attempt.job for attempt in before if attempt.state == DONE}
    open_ones = sorted(set(owners) - settled, key=int)
    if not open_ones or shutil.which("sacct") is None:
        return
    found = {(attempt.job, attempt.start): attempt for attempt in before}
    found |= {(attempt.job, attempt.start): attempt for attempt in _asked(open_ones, owners)}
    attempts = sorted(found.values(), key=lambda attempt: (int(attempt.job), attempt.start))
    if attempts != before:
        asked = datetime.now(UTC).isoformat(timespec="seconds")
        header = {"schema": artefact.SCHEMA, "kind": "accounting", "asked": asked}
        artefact.write_json(file_of(plan), {**header, "attempts": [dataclasses.asdict(one) for one in attempts]})


def _asked(numbers: Sequence[str], owners: Mapping[str, str]) -> Iterator[Attempt]:
    limit = time.monotonic() + PATIENCE
    for low in range(0, len(numbers), AT_ONCE):
        some = ",".join(numbers[low : low + AT_ONCE])
        command = ("sacct", "--duplicates", "--parsable2", "--noheader", f"--format={','.join(FIELDS)}", "--jobs", some)
        try:
            text = slurm.ask(*command, timeout=max(1.0, min(slurm.TIMEOUT, limit - time.monotonic())))
        except slurm.Unanswered as error:
            log.warning("the accounting does not answer, the report says what is on record (%s)", str(error)[:200])
            return
        yield from read(text, owners)


# -- reading what sacct says -------------------------------------------------------------------------------------------


def read(text: str, owners: Mapping[str, str]) -> list[Attempt]:
    """The attempts in the output of `sacct --duplicates --parsable2`: a line per job, then a line per step of it.

    Args:
        text: its lines, with FIELDS.
        owners: number -> stage. Others are left out: for one job of an array, sacct may list all of them.
    """
    found: list[Attempt] = []
    steps: list[dict[str, str]] = []
    current: dict[str, str] | None = None
    for line in [*text.splitlines(), "end"]:
        values = line.split("|", len(FIELDS) - 1)
        record = dict(zip(FIELDS, values, strict=False))
        if len(values) == len(FIELDS) and "." in record["JobIDRaw"]:
            steps.append(record)
            continue
        if current is not None and (attempt := _attempt(current, steps, owners)):
            found.append(attempt)
        current, steps = (record if len(values) == len(FIELDS) else None), []
    return found


def _attempt(
    record: Mapping[str, str], steps: Sequence[Mapping[str, str]], owners: Mapping[str, str]
) -> Attempt | None:
    number, seconds = record["JobIDRaw"], _number(record["ElapsedRaw"])
    if number not in owners or not seconds or not record["State"]:
        return None  # pending, or cancelled before it started
    return Attempt(
        job=number,
        start=record["Start"],
        stage=owners[number],
        state=record["State"].split()[0].rstrip("+"),  # "CANCELLED by 0"
        seconds=seconds,
        cpus=int(_number(record["AllocCPUS"])),
        gpus=gpus_of(record["AllocTRES"]),
        cpu_seconds=duration(record["TotalCPU"]) or None,  # 0 at a site that does not measure it
        gpu_share=_gpu_share(steps),
    )


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def _tres(text: str) -> dict[str, str]:
    """`cpu=4,gres/gpu=2` by name."""
    return dict(part.split("=", 1) for part in text.split(",") if "=" in part)


def gpus_of(text: str) -> float:
    """GPUs in an AllocTRES such as `billing=8,cpu=8,gres/gpu=2,gres/gpu:a100=2,node=1`: the sum over kinds if a site
    records only kinds."""
    found = _tres(text)
    kinds = [_number(count) for name, count in found.items() if name.startswith("gres/gpu:")]
    return _number(found["gres/gpu"]) if "gres/gpu" in found else sum(kinds)


def _gpu_share(steps: Iterable[Mapping[str, str]]) -> float | None:
    """Mean utilisation over the steps that have one, weighted by their duration."""
    told = [(_tres(step["TRESUsageInAve"]).get("gres/gpuutil"), _number(step["ElapsedRaw"])) for step in steps]
    known = [(_number(share) / 100, seconds) for share, seconds in told if share is not None and seconds]
    whole = sum(seconds for _, seconds in known)
    return sum(share * seconds for share, seconds in known) / whole if whole else None


def duration(text: str) -> float:
    """Seconds of `[DD-[HH:]]MM:SS[.mmm]`; 0 for anything else."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+(?:\.\d+)?)", text.strip())
    if found is None:
        return 0.0
    days, hours, minutes, seconds = (float(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


# -- adding up ---------------------------------------------------------------------------------------------------------


def by_stage(attempts: Iterable[Attempt]) -> dict[str, Usage]:
    """The usage of each stage."""
    groups: dict[str, list[Attempt]] = {}
    for attempt in attempts:
        groups.setdefault(attempt.stage, []).append(attempt)
    return {stage: _usage(group) for stage, group in groups.items()}


def _usage(group: Sequence[Attempt]) -> Usage:
    ended: dict[str, int] = {}
    for one in group:
        ended[one.state] = ended.get(one.state, 0) + 1
    broken = [one for one in group if one.state not in (DONE, "RUNNING")]
    measured = [one for one in group if one.cpu_seconds is not None]
    watched = [one for one in group if one.gpu_share is not None and one.gpus]
    return Usage(
        jobs=len({one.job for one in group}),
        ended=ended,
        cpu_seconds=sum(one.seconds * one.cpus for one in group),
        gpu_seconds=sum(one.seconds * one.gpus for one in group),
        broken_cpu_seconds=sum(one.seconds * one.cpus for one in broken),
        broken_gpu_seconds=sum(one.seconds * one.gpus for one in broken),
        cpu_used=sum(one.cpu_seconds or 0.0 for one in measured),
        cpu_measured=sum(one.seconds * one.cpus for one in measured),
        gpu_used=sum((one.gpu_share or 0.0) * one.seconds * one.gpus for one in watched),
        gpu_measured=sum(one.seconds * one.gpus for one in watched),
    )


@dataclass(frozen=True)
class Usage:
    """The usage of a cluster by the jobs of a stage, summed over all their attempts.

    jobs: how many; ended: state -> attempts that ended in it; cpu_seconds, gpu_seconds: allocated resources times
    elapsed time; broken_*: the same for attempts that did not complete; cpu_used, gpu_used: used, in the same unit,
    where it was measured; cpu_measured, gpu_measured: allocated where usage was measured.
    """

    jobs: int
    ended: Mapping[str, int]
    cpu_seconds: float
    gpu_seconds: float
    broken_cpu_seconds: float
    broken_gpu_seconds: float
    cpu_used: float
    cpu_measured: float
    gpu_used: float
    gpu_measured: float

    @property
    def attempts(self) -> int:
        """Number of attempts."""
        return sum(self.ended.values())

    def __add__(self, other: Usage) -> Usage:
        """The sum of both."""
        ended = {name: self.ended.get(name, 0) + other.ended.get(name, 0) for name in {**self.ended, **other.ended}}
        names = [field.name for field in fields(self) if field.name != "ended"]
        return Usage(ended=ended, **{name: getattr(self, name) + getattr(other, name) for name in names})
