"""What a run of the workflow would do, how long it takes, and how much disk and memory: `haste plan`. No torch."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Collection, Sequence
from pathlib import Path

from rich.console import RenderableType

from haste.files import terminal, walk
from haste.files.units import duration, readable
from haste.networks import driver
from haste.networks.headers import MissingError
from haste.ops import cost
from haste.ops import memory as peaks
from haste.ops.pace import Pace
from haste.plan import memory
from haste.plan.machines import PUBLISHED, Machine
from haste.plan.names import Evaluation, State
from haste.plan.plan import Plan

RUN_COLUMNS = ("run", "training", "samples", "GPU-hours")


def print_plan(plan: Plan, machine: Machine | None = None, file: str | None = None) -> None:
    """Print jobs, time, disk and memory by rule, shared trunks, and settings that have no effect.

    Args:
        plan: of the configuration.
        machine: the GPUs that times and memory are of; None is this machine.
        file: of the configuration, for commands that are named; None is the usual one.

    Raises:
        ValueError: `Plan.check` refuses it; or, after everything is printed, data or weights are not there yet, or
            training does not fit into a GPU's memory.
    """
    missing = None
    try:
        plan.check()
    except MissingError as refusal:
        missing = refusal
    pace, limit = Pace.of_plan(plan, machine), machine.gpu.memory if machine else plan.config.runtime.gpu_memory_gb
    found, measured = cost.stages(plan, pace)
    total = _sum(found)
    console = terminal.console()
    console.print(*_stages(plan, [*found, total], machine, console.width), sep="\n")
    if machine:
        each = by_run(plan, pace)
        heads = [(name, name != "run") for name in RUN_COLUMNS]
        title, ends = f"each run on {pace.machine}", [len(each) - 2]
        console.print(*terminal.fitted(heads, each, console.width, title=title, sections=ends), sep="\n")
    needs, gpus = memory.needs(plan, machine.count if machine else None), bool(machine or limit or not _on_cpus(plan))
    for line in [
        *(_how(measured, machine) if total.left else []),
        *(_at_published(plan, machine) if total.left and machine else []),
        *_pictures(plan),
        *_flips(plan),
        *cost.shared_trunks(plan),
        *cost.price_of_forks(plan, pace),
        *cost.uncounted(plan),
        *cost.compressed(plan),
        *cost.unknown_targets(plan),
        *peaks.lines(needs, limit, f"haste memory -c {shlex.quote(file)}" if file else "haste memory", gpus),
        *emulated(plan, machine),
        *plan.changes,
        *plan.notes,
    ]:
        console.print(line, markup=False, highlight=False)
    if missing:
        console.print("A run is refused until this is there:")
        raise missing
    if limit:
        memory.check(needs, limit, f"that of an {machine.name}" if machine else "runtime.gpu_memory_gb")


def _sum(found: Sequence[cost.Stage]) -> cost.Stage:
    each = {key: sum(getattr(one, key) for one in found) for key in ("jobs", "left", "seconds", "megabytes")}
    gpu_seconds, unknown = sum(one.gpu_seconds for one in found), any(one.unknown for one in found)
    return cost.Stage("all", **each, gpu_seconds=gpu_seconds, unknown=unknown)


def _on_cpus(plan: Plan) -> bool:
    """Whether this machine would compute on its CPUs."""
    return plan.config.runtime.device == "cpu" or not driver.visible()


def _stages(plan: Plan, found: Sequence[cost.Stage], machine: Machine | None, width: int) -> list[RenderableType]:
    time = f"time on {machine}" if machine else "time, one after another"
    columns, rows = ("rule", "jobs", "left", time, *(["GPU-hours"] if machine else []), "disk"), []
    for stage in found:
        disk = readable(stage.megabytes * 1e6) if stage.megabytes else ""
        gpus = [f"{stage.gpu_seconds / 3600:,.1f}" if stage.gpu_seconds > 180 else ""] if machine else []
        cells = (stage.name, str(stage.jobs), str(stage.left), stage.time, *gpus, disk)
        rows.append(cells)
    heads, title = (
        [(name, name != "rule") for name in columns],
        f"{plan.config.name}: what a run of the workflow would do now",
    )
    return terminal.fitted(heads, rows, width, title=title, sections=[len(rows) - 2])


def _how(measured: bool, machine: Machine | None) -> list[str]:
    """Where the times come from."""
    if machine:
        peak = machine.gpu.peak
        said = (
            f"Times assume that {100 * machine.share:g} % of the peak of an {machine.name} is reached, "
            f"{peak('bf16') / 1e12:g} TFLOP/s in bf16 and {peak('fp32') / 1e12:g} in fp32, and that all GPUs are busy; "
            "--share gives another share, such as benchmarks/throughput.py measures. What was trained here on such GPUs"
            " goes on at the rate of its log, times their number."
        )
    elif measured:
        said = "Training times follow from rates measured here. Other times are computed."
    else:
        said = (
            "Training times are computed from operation counts and this machine's matrix products, not measured. Other "
            "times are computed."
        )
    return [
        f"{said} The totals leave out what cannot be estimated: preparing data, a small autoencoder, a teacher whose "
        "size is known only once it is loaded, a solver that chooses its own steps."
    ]


def _at_published(plan: Plan, machine: Machine) -> list[str]:
    """A line with the time at a speed that was reached by others, where another one is assumed."""
    if machine.share <= PUBLISHED:
        return []
    slower = dataclasses.replace(machine, share=PUBLISHED)
    total = _sum(cost.stages(plan, Pace.of_plan(plan, slower))[0])
    hours = total.gpu_seconds / 3600
    said = f"{duration(total.seconds)} and {hours:,.{hours < 10:d}f} GPU-hours"
    return [f"At {100 * PUBLISHED:g} %, the published speed of REPA's training on an H100, all of it takes {said}."]


def emulated(plan: Plan, machine: Machine | None) -> list[str]:
    """A line where training would be in half precision on CPUs or GPUs that only emulate it, or in fp32 on GPUs."""
    asked = {plan.trajectories[one.trajectory].recipe["training"]["precision"] for one in plan.jobs.to_train}
    if "bf16" in asked and machine and not machine.gpu.bf16:
        return [f"training.precision: bf16, which an {machine.name} only emulates: fp16 is what it computes fast."]
    if machine or not _on_cpus(plan):
        return [_slow(machine)] if "fp32" in asked else []
    half = sorted(asked & {"bf16", "fp16"})
    if not half or _computes_half():
        return []
    return [f"training.precision: {half[0]} is emulated on the CPUs here, and slower than fp32 there."]


def _slow(machine: Machine | None) -> str:
    half, speed = "bf16", ""
    if machine:
        half = "bf16" if machine.gpu.bf16 else "fp16"
        peaks = " against ".join(f"{machine.gpu.peak(kind) / 1e12:g}" for kind in ("fp32", half))
        speed = f" ({peaks} TFLOP/s on an {machine.name})"
    return (
        f"training.precision: fp32, in which GPUs are many times slower than in {half}{speed}. These are different "
        "runs: choose before the first step."
    )


def _computes_half() -> bool:
    """Whether the CPUs here have instructions for it."""
    about = Path("/proc/cpuinfo")
    return about.exists() and bool({"avx512_bf16", "amx_bf16", "bf16"} & set(about.read_text().split()))


def _pictures(plan: Plan) -> list[str]:
    return [
        f"{one.config.images.path}: {one.image_count:,} pictures; {walk.told(one.unused)}"
        for one in plan.image_sets
        if one.data.counted and one.unused
    ]


def _flips(plan: Plan) -> list[str]:
    """A line on the runs that mirror pictures, if some do."""
    rows = [run for run in plan.config.runs if plan.config.training_of(run).flip]
    if not rows:
        return []
    said = ", and captions stay as they are: left and right in them are then wrong" * (
        plan.config.condition.name == "captions"
    )
    whose = "all runs" if len(rows) == len(plan.config.runs) else ", ".join(rows)
    return [f"training.flip: in {whose} half of the pictures of a step are mirrored, with latents of their own{said}."]


def by_run(plan: Plan, pace: Pace) -> list[list[str]]:
    """`RUN_COLUMNS` of each run with all that it still takes, and the sum, in which shared trunks count once."""
    rows = {(row.run, row.seed): plan.label(row.run, row.seed) for row in plan.rows}
    states = {who: _states(plan, *who) for who in plan.pieces}
    drawn = {
        who: {row.evaluation.name: row.evaluation for row in plan.rows if (row.run, row.seed) == who} for who in rows
    }
    labels = {**{who: plan.label(*who) for who in plan.pieces}, **rows}
    each = [
        [label, *_cells(plan, pace, states.get(who, ()), drawn.get(who, {}).values())] for who, label in labels.items()
    ]
    once = {state for mine in states.values() for state in mine}
    return [*each, ["all, what runs share once", *_cells(plan, pace, once, plan.evaluations.values())]]


def _states(plan: Plan, run: str, seed: int) -> list[State]:
    """The states of a run that are still to be made."""
    last, left = plan.config.runs[run].milestones[-1], set(plan.jobs.to_train)
    every = (State(one.trajectory, step) for one in plan.pieces[run, seed] for step in plan.cuts[one.trajectory]
             if one.holds(step) and step <= last)  # fmt: skip
    return [state for state in every if state in left]


def _cells(plan: Plan, pace: Pace, states: Collection[State], drawn: Collection[Evaluation]) -> list[str]:
    training = sum(cost.training_seconds(plan, plan.segment(state), pace)[0] for state in states)
    mine = {one.name for one in drawn}
    shards = [one for one in plan.jobs.to_draw if one.name in mine]
    times = [cost.sampling_seconds(plan, one, pace) for one in shards]
    samples, unknown = sum(time or 0.0 for time in times), " + unknown" if None in times else ""
    hours = (training * pace.ranks + samples) / 3600
    words = [f"about {duration(one)}" if one else "" for one in (training, pace.wall(samples, 1))]
    return [words[0], f"{words[1]}{unknown}".removeprefix(" + "), f"{hours:,.1f}" if hours > 0.05 else ""]
