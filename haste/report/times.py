"""The table of times: what each stage cost, here and on a cluster."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence

from haste.cluster.accounting import Usage
from haste.report.content import NONE, Stage
from haste.report.formats import Cell, Entry, Head, Table, text_cell


def time_table(stages: Sequence[Stage]) -> Table:
    """Jobs and wall time by stage and, if a cluster's accounting is recorded, their usage there."""
    known = [stage.usage for stage in stages if stage.usage]
    total = Stage("total", sum(s.jobs for s in stages), sum(s.seconds for s in stages), _sum(known))
    heads = [Head("stage"), Head("jobs", True), Head("time, summed", True), Head("share", True)]
    gpus = total.usage is not None and total.usage.gpu_seconds > 0
    heads += [Head(name, True) for name in _usage_heads(gpus)] if known else []
    entries = []
    for stage in [*stages, total]:
        share = stage.seconds / total.seconds if total.seconds else None
        cells = [text_cell(stage.name), text_cell(stage.jobs), duration_cell(stage.seconds), _percent_cell(share)]
        cells += _usage_cells(stage.usage, gpus) if known else []
        entries.append(Entry(cells, kind="floor" if stage is total else ""))
    return Table("time", "Time", heads, entries, _usage_notes(total.usage) if total.usage else [])


def _sum(usages: Sequence[Usage]) -> Usage | None:
    return functools.reduce(operator.add, usages) if usages else None


def _usage_heads(gpus: bool) -> list[str]:
    hours = ["GPU-hours", "GPU used"] if gpus else []
    return ["cluster jobs", "attempts", *hours, "CPU-hours", "CPU used"]


def _usage_cells(usage: Usage | None, gpus: bool) -> list[Cell]:
    """A stage's usage on the cluster; dashes if it is unknown."""
    if usage is None:
        return [Cell(NONE)] * len(_usage_heads(gpus))
    attempts = Cell(_attempts_text(usage), usage.attempts)
    of_gpus = [hours_cell(usage.gpu_seconds), _used_cell(usage.gpu_used, usage.gpu_measured)] if gpus else []
    of_cpus = [hours_cell(usage.cpu_seconds), _used_cell(usage.cpu_used, usage.cpu_measured)]
    return [text_cell(usage.jobs), attempts, *of_gpus, *of_cpus]


def _attempts_text(usage: Usage) -> str:
    """`7 (2 preempted)`."""
    others = [
        f"{count} {state.lower().replace('_', ' ')}" for state, count in usage.ended.items() if state != "COMPLETED"
    ]
    return f"{usage.attempts:,}" + (f" ({', '.join(sorted(others))})" if others else "")


def _usage_notes(usage: Usage) -> list[str]:
    notes = [
        "The columns from cluster jobs to CPU used are from the cluster's accounting, all attempts together. Hours are "
        "allocated resources times elapsed time; used is the share of them that was busy, a dash where the site does "
        "not measure it.",
        "On a cluster the summed time of training includes the queue, since the workflow waits for its jobs.",
    ]
    taken = (("GPU", usage.broken_gpu_seconds, usage.gpu_seconds), ("CPU", usage.broken_cpu_seconds, usage.cpu_seconds))
    broken = [f"{_hours(part)} of the {_hours(whole)} {unit}-hours" for unit, part, whole in taken if part]
    if broken:
        said = " and ".join(broken)
        notes.append(f"{said} went into attempts that did not complete; training continues from what they saved.")
    return notes


def _hours(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:,.1f}" if hours >= 1 else f"{hours:.2g}"


def hours_cell(seconds: float) -> Cell:
    """Hours, of seconds."""
    return Cell(_hours(seconds), seconds / 3600)


def _used_cell(used: float, measured: float) -> Cell:
    return _percent_cell(used / measured if measured else None)


def _percent_cell(share: float | None) -> Cell:
    return Cell(NONE if share is None else f"{100 * share:.0f} %", share)


def duration_cell(seconds: float | None) -> Cell:
    """A time in words, with its seconds."""
    return Cell(duration(seconds), seconds)


def duration(seconds: float | None) -> str:
    """`0.4 s`, `25 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds is None:
        return NONE
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{round(whole / 60) // 60} h {round(whole / 60) % 60:02d} min"
