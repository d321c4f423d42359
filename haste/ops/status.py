"""What every run of a configuration is doing now, from its files alone. Nothing is locked and nothing written.

A run's progress is the newest line of its log or the newest state on disk. The lock files show which processes run, and
which of this machine were killed; one of another machine is known by its words alone.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import sleep
from typing import Any

from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from haste.cluster import queue as cluster_queue
from haste.cluster import slurm
from haste.cluster.slurm import Unanswered
from haste.files import journal, locks, terminal, units
from haste.files.units import readable
from haste.ops.watch import Job, jobs
from haste.plan.names import Evaluation, Piece, State
from haste.plan.plan import Plan
from haste.train import stops
from haste.train.stops import Stopped

ROOMS = ("states", "stores", "parts", "samples", "features", "scores", "measures")
MOST_NEXT = 8  # most lines about upcoming work
LEFT = ("run", "doing", "segment", "losses", "queue")
MOST_WORDS = 300  # characters of a line of a log, or of a command
FIRST_OUT = ("states", "waiting", "losses", "segment")  # in a narrow terminal
QUIET = 60.0  # seconds without a line after which the silence is shown

# The jobs in a cluster's queue that make a plan's states, such as "job 4711 PENDING (Priority)".
Queue = Callable[[Plan], Mapping[State, str]]


@dataclasses.dataclass(frozen=True)
class Line:
    """What one run with one seed is doing.

    step: steps done; last: steps of its last milestone; doing: in words; segment: its current or next segment, with
    the aligned terms and those that triggers have stopped; rate: steps per second; to_go: seconds up to `last`;
    losses: by term; waiting: share of the time spent waiting for data; age: seconds since the log's last line, or since
    whoever trains now began; size: bytes of its states; queued: its job in the cluster's queue. None is unknown.
    """

    run: str
    step: int
    last: int
    doing: str
    segment: str
    rate: float | None
    to_go: float | None
    losses: dict[str, float]
    waiting: float | None
    age: float | None
    size: int
    queued: str = ""


@dataclasses.dataclass(frozen=True)
class View:
    """The status of a configuration at one moment."""

    name: str
    workflow: str
    lines: list[Line]
    jobs: list[Job]
    next: list[str]
    notes: list[str]
    disk: dict[str, int]
    queue: list[str]


def slurm_queue(plan: Plan) -> dict[State, str]:
    """The training jobs in SLURM's queue; nothing on a machine without SLURM.

    Raises:
        Unanswered: SLURM exists and does not answer.
    """
    if shutil.which("squeue") is None:
        return {}
    told = {}
    for state, job in cluster_queue.training(plan).items():
        where = f" on {job.nodes}" if job.nodes else f" ({job.reason})" if job.reason else ""
        told[state] = f"job {job.id} {job.state}{where}"
    return told


def slurm_stages() -> list[str]:
    """Snakemake's jobs in SLURM's queue, a line per rule, of all configurations that run in this folder.

    Raises:
        Unanswered: SLURM exists and does not answer.
    """
    if shutil.which("squeue") is None:
        return []
    found = slurm.stages(os.getcwd())
    return [
        f"{rule}: {', '.join(f'{n} {state}' for state, n in sorted(found[rule].items()))}" for rule in sorted(found)
    ]


def snapshot(plan: Plan, queue: Queue = slurm_queue, stages: Callable[[], list[str]] = slurm_stages) -> View:
    """The current status of a configuration. Needs a new plan each time: a plan reads the disk once.

    Args:
        plan: of the configuration.
        queue: returns the training jobs in a cluster's queue.
        stages: returns the other jobs in it, in lines.
    """
    holder = locks.holder(Path(plan.folder, ".lock"))
    left = plan.jobs.to_train
    queued, others, notes = _ask(lambda: queue(plan), stages)
    return View(
        plan.config.name,
        _workflow(holder, bool(plan.jobs.left)),
        [*(_line(plan, *owner, queued) for owner in plan.pieces), *(_elsewhere(plan, n) for n in plan.config.evaluate)],
        jobs(plan, holder),
        upcoming(plan, left),
        [*notes, *_full(plan), *plan.notes],
        {room: size_of(Path(plan.root, room)) for room in ROOMS},
        others,
    )


def _workflow(holder: locks.Holder | None, left: bool) -> str:
    if holder and holder.at_work is not False:
        return f"at work{'' if holder.at_work else ', as its lock says'}: {holder.who[:MOST_WORDS]}"
    if left and holder:
        return f"gone without a message: {holder.who[:MOST_WORDS]}"
    return "not running" if left else "finished"


def _full(plan: Plan) -> list[str]:
    """Why jobs wait to be submitted."""
    try:
        return [cluster_queue.full(plan).read_text().strip()]
    except OSError:
        return []


def _ask(
    queue: Callable[[], Mapping[State, str]], stages: Callable[[], list[str]]
) -> tuple[Mapping[State, str], list[str], list[str]]:
    """The training jobs and the other jobs in the queue, or nothing and the reason."""
    try:
        return queue(), stages(), []
    except Unanswered as error:
        reason = str(error).splitlines()[0]
        return {}, [], [f"the cluster's queue does not answer, so jobs in it are not shown ({reason})"]


# -- runs --------------------------------------------------------------------------------------------------------------


def number(record: Mapping[str, Any], name: str) -> float | None:
    """A number of a record, or None: a log may be truncated, or written by another version."""
    value = record.get(name)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _line(plan: Plan, run: str, seed: int, queued: Mapping[State, str]) -> Line:
    last, pieces = plan.config.runs[run].milestones[-1], plan.pieces[run, seed]
    record: dict[str, Any] = {}
    step, place = 0, pieces[0]
    for piece in pieces:
        high = last if piece.high is None else min(last, piece.high)
        lines = journal.read(Path(plan.root, "states", piece.trajectory, "log.jsonl"), piece.low, high, alive=True)
        saved = [s for s in plan.on_disk(piece.trajectory) if piece.low < s <= high]
        reached = max([*saved, *(line["step"] for line in lines[-1:])], default=0)
        if reached > step:
            step, place = reached, piece
        full = next((line for line in reversed(lines) if "alive" not in line), record)
        record = full | (lines[-1] if lines else {})
    end, stopped = plan.state(run, last, seed), stops.along(plan, run, seed)
    finished = last in plan.on_disk(end.trajectory)
    ahead = next((p for p in pieces if p.holds(min(step + 1, last))), place)
    holder = None if finished else locks.holder(Path(plan.root, "states", ahead.trajectory, "lock"))
    rate, age = _rate(plan, run, record), number(record, "time")
    words = next((words for state, words in queued.items() if state.trajectory == ahead.trajectory), "")
    return Line(
        plan.label(run, seed),
        last if finished else step,
        last,
        _doing(plan, finished, step, holder, words),
        "; ".join([*([] if finished else [_segment(plan, ahead, step, stopped)]), *_stops(stopped)]),
        rate,
        None if finished or not rate else (last - step) / rate,
        {n: v for n in record if n not in journal.NOT_LOSSES and (v := number(record, n)) is not None},
        number(record, "waiting"),
        None if finished or age is None else max(0.0, time.time() - max(age, holder.since if holder else 0.0)),
        sum(size_of(Path(plan.root, "states", piece.trajectory)) for piece in pieces),
        words,
    )


def _elsewhere(plan: Plan, name: str) -> Line:
    """A checkpoint that was trained elsewhere: it is only scored."""
    mine = [row.evaluation for row in plan.rows if row.run == name]
    scored, step = sum(_scored(evaluation) for evaluation in mine), plan.config.evaluate[name].step
    doing = f"trained elsewhere, {scored} of {len(mine)} sets of samples scored"
    return Line(name, step, step, doing, "", None, None, {}, None, None, 0)


def _segment(plan: Plan, piece: Piece, step: int, stopped: Mapping[str, Stopped]) -> str:
    """The segment of a piece after some steps, up to the next requested state, and what is aligned on it."""
    ends = [end for end in plan.cuts[piece.trajectory] if end > step and piece.holds(end)]
    segment = plan.segment(State(piece.trajectory, min(ends, default=step + 1)))
    left = " and ".join(k for k in segment.terms if k not in stopped or step < stopped[k].ends) or "nothing"
    return f"{segment.start} to {segment.state.step}, aligning {left}"


def _stops(stopped: Mapping[str, Stopped]) -> list[str]:
    return [
        f"{kind} stopped at {one.step} by {one.trigger}"
        + (f", its weight falls to step {one.ends}" if one.ends > one.step else "")
        for kind, one in stopped.items()
    ]


def _rate(plan: Plan, run: str, record: Mapping[str, Any]) -> float | None:
    images = number(record, "images_per_s")
    return images / plan.config.training_of(run).batch if images else None


def _doing(plan: Plan, finished: bool, step: int, holder: locks.Holder | None, queued: str) -> str:
    if finished:
        return "finished"
    # The lock file of a job that was killed on a node remains.
    if " PENDING" in queued and not (holder and holder.at_work):
        return "waits in the queue"
    if holder is None:
        return "paused" if step else "not begun"
    if holder.at_work is False:
        return "died"
    whose = holder.configuration
    by = f", by the job of {whose}" if whose not in ("", plan.config.name) else ""
    return f"training{by}" if holder.at_work else f"training{by}, as its lock says"


def _scored(evaluation: Evaluation) -> bool:
    wanted = [judgement.score for judgement in evaluation.judged] or [evaluation.grid]
    return all(Path(path).exists() for path in wanted)


def upcoming(plan: Plan, left: Sequence[State]) -> list[str]:
    """The next states that can be trained (with a parent on disk, or none), then what is to be scored."""
    data = [
        made.manifest
        for made in (plan.images, plan.latents, plan.flipped, plan.text)
        if made and not Path(made.manifest).exists()
    ]
    found = [f"make {', '.join(data)}"] if data and left else []
    for state in left:
        segment, parent = plan.segment(state), plan.segment(state).parent
        ready = parent is None or parent.step in plan.on_disk(parent.trajectory)
        if ready and segment.after is None and segment.twin is None:
            aligned = ", ".join(stops.left(plan, segment)) or "nothing"
            found.append(f"train {state.trajectory} from step {segment.start} to {state.step}, aligning {aligned}")
    draws = [evaluation for evaluation in plan.evaluations.values() if not _scored(evaluation)]
    now = sum(Path(plan.path(evaluation.state)).exists() for evaluation in draws)
    if draws:
        found.append(f"sample and score {len(draws)} sets of samples, {now} of them of states on disk")
    if measures := [path for path in plan.measure_files if not Path(path).exists()]:
        found.append(f"make {len(measures)} measurements of states")
    return found


# -- disk --------------------------------------------------------------------------------------------------------------


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder; files may come and go meanwhile."""
    total, stack = 0, [folder]
    while stack:
        try:
            with os.scandir(stack.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        stack.append(Path(entry.path))
                    else:
                        total += entry.stat(follow_symlinks=False).st_size
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            continue
    return total


# -- showing -----------------------------------------------------------------------------------------------------------


def _table(view: View, width: int | None) -> list[RenderableType]:
    columns = ["run", "doing", "segment", "step", "steps/s", "to go", "losses", "waiting", "states"]
    queued = any(line.queued for line in view.lines)
    heads = [(column, column not in LEFT) for column in ([*columns, "queue"] if queued else columns)]
    rows = []
    for line in view.lines:
        doing = line.doing
        if line.doing.startswith("training") and line.age is not None and line.age > QUIET:
            doing += f", no word for {units.duration(line.age)}"
        losses = "  ".join(f"{name} {value:.4f}" for name, value in line.losses.items())
        waiting = "" if line.waiting is None else f"{100 * line.waiting:.0f} %"
        to_go = "" if line.to_go is None else units.duration(line.to_go)
        rate = "" if line.rate is None else f"{line.rate:.3g}"
        cells = [line.run, doing, line.segment, f"{line.step}/{line.last}", rate, to_go, losses, waiting]
        cells += [readable(line.size), *([line.queued] if queued else [])]
        rows.append(cells)
    title = f"{view.name}: the workflow is {view.workflow}"
    return terminal.fitted(heads, rows, width, title=title, first_out=FIRST_OUT)


ALONE = (
    "these run on although their Snakemake is gone. Leave them: the same command again waits for them and goes on with "
    "what they make. To end one, `kill` its process: training saves its step first"
)


def _job_line(job: Job) -> str:
    state, name = job.state, f"{job.name} (process {job.process})" if job.process else job.name
    time, words = units.duration(job.seconds), job.words[:MOST_WORDS]
    if job.process and ": waiting for " in words:
        return f"waits: {name}, {time}: {words}"
    if not job.process and state == "running" and job.seconds > QUIET:
        return f"running: {name}, no message for {time}: {words}"
    return f"{'runs on alone' if state == 'alone' else state}: {name}, {time} since its last message: {words}"


def _below(view: View) -> list[str]:
    lines = []
    for state in ("running", "alone", "failed", "died", "interrupted"):
        mine = [job for job in view.jobs if job.state == state]
        lines += [*map(_job_line, mine), *([f"note: {ALONE}"] if mine and state == "alone" else [])]
    shown = [*view.next[:MOST_NEXT], *([f"and {len(view.next) - MOST_NEXT} more"] if view.next[MOST_NEXT:] else [])]
    lines += [f"next: {words}" for words in shown] or ["next: nothing is left to train or to score"]
    sizes = ", ".join(f"{room} {readable(size)}" for room, size in view.disk.items() if size)
    lines += [f"in the queue: {words}" for words in view.queue]
    lines += [f"note: {words}" for words in view.notes]
    return [*lines, f"disk: {sizes or 'nothing yet'} (with all configurations in this results folder)"]


def rendered(view: View, width: int | None = None) -> Group:
    """The view as a rich renderable, for lines of so many characters."""
    return Group(*_table(view, width), *(Text(line) for line in _below(view)))


def show(make: Callable[[], Plan], watch: float | None = None) -> None:
    """Print the view, once, or repeatedly until Ctrl-C.

    Args:
        make: returns a new plan; the configuration may change meanwhile.
        watch: seconds between updates; None prints once.
    """
    console = terminal.console()
    if watch is None:
        view = snapshot(make())
        for part in _table(view, console.width):
            console.print(part)
        for line in _below(view):
            console.print(Text(line), soft_wrap=True)  # names stay whole
        return
    with Live(console=console, auto_refresh=False, screen=console.is_terminal) as live:
        while True:
            live.update(rendered(snapshot(make()), console.width), refresh=True)
            sleep(watch)
