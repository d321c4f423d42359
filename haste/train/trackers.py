"""TensorBoard and Weights & Biases: one run for each row of the table with one seed, across its trunk and its branches.

A row's points follow from files: the journals of the trajectories that it passes through, the scores of its milestones,
and where its terms stopped. What was not written before is written by training after each line of its journal, by the
jobs that score and report, and by `haste track`. A `written.json` says what was, so that no step is written twice or
lost, and that a row which is renamed keeps its run:

    results/NAME/tensorboard/ROW/    event files, written.json
    results/NAME/wandb/ROW/          W&B's own files, written.json

No torch. A new tracker is a class and a line in TRACKERS.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import yaml

from haste.config import terms_of
from haste.files import artefact, journal, locks
from haste.plan.inputs import check_tracker
from haste.plan.names import Evaluation, Judgement
from haste.plan.plan import Plan
from haste.train import stops

log = logging.getLogger("haste.track")

WRITTEN = "written.json"
LOOK = 60.0  # seconds between two looks for scores while a row trains
COLUMNS = {"fd": "FD", "sfid": "sFID", "is": "IS", "kid": "KID", "clip_score": "CLIP score"}
INCEPTION = ("inception", "pytorch-fid")  # by which a Fréchet distance is an FID
NOT_VALUES = ("step", "time", "alive")


@dataclasses.dataclass(frozen=True)
class Point:
    """Numbers and words of a row at a step; time: when they were made, in seconds since 1970."""

    step: int
    time: float
    values: Mapping[str, float] = dataclasses.field(default_factory=dict)
    words: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the table with one seed, as a tracker is told of it.

    name: as in the table; lineage: what decides its curve; settings: its own and the recipe of its last trajectory.
    """

    name: str
    run: str
    seed: int
    lineage: str
    settings: dict[str, Any]

    @property
    def folder(self) -> str:
        """The name of its folders: two rows never have the same."""
        plain = self.name.replace("/", "-").lstrip(".")
        return plain if plain == self.name else f"{plain}-{artefact.fingerprint(self.name, 6)}"


@dataclasses.dataclass(frozen=True)
class Mark:
    """A point that comes by itself: a score, or a stop. name: unique in a row; series: of marks whose steps ascend."""

    name: str
    step: int
    series: str
    point: Callable[[], Point]


class Tracker(Protocol):
    """A row's run at work. `local`: it needs no network, and `ordered`: steps of a value must ascend."""

    local: bool
    ordered: bool

    @staticmethod
    def keeps() -> bool:
        """Whether what earlier jobs wrote stays; otherwise each writes all from the beginning."""

    def __init__(self, folder: Path, row: Row, id: str) -> None: ...

    def write(self, points: Iterable[Point]) -> None:
        """Add points."""

    def close(self) -> None:
        """Finish for now."""


class TensorBoard:
    """Event files, by TensorBoard's own writer."""

    local, ordered = True, True

    @staticmethod
    def keeps() -> bool:
        """Later files add to earlier ones."""
        return True

    def __init__(self, folder: Path, row: Row, id: str) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.writer = EventFileWriter(str(folder))

    def write(self, points: Iterable[Point]) -> None:
        """Add points; they are on disk when this returns."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        for point in points:
            values = [Summary.Value(tag=tag, simple_value=value) for tag, value in point.values.items()]
            values += [_text(tag, words) for tag, words in point.words.items()]
            self.writer.add_event(Event(step=point.step, wall_time=point.time, summary=Summary(value=values)))
        self.writer.flush()

    def close(self) -> None:
        """Close the file."""
        self.writer.close()


def _text(tag: str, words: str) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto

    about = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
    return Summary.Value(tag=tag, metadata=about, tensor=TensorProto(dtype="DT_STRING", string_val=[words.encode()]))


class WeightsAndBiases:
    """A run of wandb, online or, with WANDB_MODE=offline, in its folder."""

    local, ordered = False, False

    @staticmethod
    def keeps() -> bool:
        """Offline each process has a folder of its own, and `wandb sync` replaces a run by what it sends last."""
        return os.environ.get("WANDB_MODE", "online") not in ("offline", "dryrun")

    def __init__(self, folder: Path, row: Row, id: str) -> None:
        check_tracker("wandb")
        import wandb

        about: dict[str, Any] = {"id": id, "name": row.name, "config": row.settings, "dir": str(folder)}
        self.run = wandb.init(**about, resume="allow", reinit="create_new")  # rows of one trunk are at work together
        self.run.define_metric("*", step_metric="step")  # scores come later than the steps after their milestone

    def write(self, points: Iterable[Point]) -> None:
        """Log points; words are in the run's summary."""
        for point in points:
            if point.values:
                self.run.log({"step": point.step, **point.values})
            for name, words in point.words.items():
                self.run.summary[name] = words

    def close(self) -> None:
        """Finish, so that the next job can resume the run."""
        self.run.finish()


TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


# -- a row's points ----------------------------------------------------------------------------------------------------


def rows(plan: Plan) -> list[Row]:
    """The rows of the table, each once for each of its seeds: trained here, then checkpoints from elsewhere."""
    found = []
    for run, seed in dict.fromkeys([*plan.pieces, *((row.run, row.seed) for row in plan.rows)]):
        own = plan.config.runs.get(run) or plan.config.evaluate[run]
        pieces = plan.pieces.get((run, seed), ())
        way: list[Any] = [[piece.trajectory, piece.low, piece.high] for piece in pieces]
        way = way or sorted({row.evaluation.state.trajectory for row in plan.rows if row.run == run})
        last = pieces[-1].trajectory if pieces else way[0] if way else None
        recipe = plan.trajectories[last].recipe if last else {}
        settings = {"row": own.model_dump(mode="json", exclude_none=True), "recipe": recipe}
        found.append(Row(plan.label(run, seed), run, seed, artefact.fingerprint(way), settings))
    return found


def logged(plan: Plan, run: str, seed: int) -> list[dict[str, Any]]:
    """The log of a run with one seed up to its last milestone, across the trajectories that it passes through."""
    last, found = plan.config.runs[run].milestones[-1], []
    for piece in plan.pieces[run, seed]:
        high = last if piece.high is None else min(last, piece.high)
        found += journal.read(Path(plan.root, "states", piece.trajectory, "log.jsonl"), piece.low, high)
    return found


def _of_line(line: Mapping[str, Any]) -> Point:
    values = {name: float(v) for name, v in line.items() if name not in NOT_VALUES and isinstance(v, int | float)}
    return Point(line["step"], float(line.get("time", 0.0)), values)


def _scores(plan: Plan, row: Row) -> Iterator[Mark]:
    """Those of a row that are there."""
    for one in plan.rows:
        if (one.run, one.seed) == (row.run, row.seed):
            way = one.evaluation.sampling_name
            for by in one.evaluation.judged:
                if os.path.exists(by.score):
                    series = f"{by.detector.name}, {way}"
                    point = functools.partial(_scored, by, one.step, series)
                    yield Mark(Path(by.score).stem, one.step, series, point)


def _scored(by: Judgement, step: int, series: str) -> Point:
    found = artefact.read_json(by.score, "score")
    artefact.check_entries(by.score, found, scores=dict)
    names = {**COLUMNS, **({"fd": "FID"} if by.detector.kind in INCEPTION else {})}
    there = {k: float(value) for k, value in found["scores"].items() if value is not None}
    values = {f"scores/{names.get(k, k)} ({series})": value for k, value in there.items()}
    return Point(step, os.stat(by.score).st_mtime, values)


@functools.cache
def _refused(row: str, name: str, reason: str) -> None:
    """Said once a process, for training looks again and again."""
    log.warning("%s: score %s is left out of runtime.trackers until it is made again: %s", row, name, reason)


def _stops(plan: Plan, row: Row, reached: int) -> Iterator[Mark]:
    """Where its terms stopped, as far as it was trained."""
    if row.run not in plan.config.runs:
        return
    stopped, stop = stops.along(plan, row.run, row.seed), plan.config.runs[row.run].stop
    told = {
        kind: (step, "as its row says")
        for kind in terms_of(plan.config, row.run)
        if isinstance(step := stop.of(kind), int)
    }
    told |= {kind: (one.step, f"by {one.trigger}: {one.reason}") for kind, one in stopped.items()}
    for kind, (step, why) in told.items():
        if step <= reached:
            words = {f"stop/{kind}": f"{kind} stops at step {step}, {why}"}
            point = functools.partial(Point, step, time.time(), {f"stop/{kind}": float(step)}, words)
            yield Mark(f"stop {kind} {step}", step, f"stop {kind}", point)


# -- writing -----------------------------------------------------------------------------------------------------------


class Written:
    """A row's run in one tracker: adds what it lacks. It holds the row's lock from its first point to its end."""

    def __init__(self, plan: Plan, row: Row, kind: str) -> None:
        self.plan, self.row, self.kind = plan, row, kind
        self.folder = Path(plan.folder, kind, row.folder)
        self._end = contextlib.ExitStack()
        self._tracker: Tracker | None = None
        self._has: dict[str, Any] = {}
        self._caught_up = False

    def add(self, records: Sequence[Mapping[str, Any]] = (), marks: bool = True) -> None:
        """Add what is not written yet: of the whole log the first time, then of these records of it, and scores and
        stops if asked. Does nothing while another process writes this row, which adds them."""
        if not self._has and not self._take():
            return
        has, points = self._has, list[Point]()
        if marks and TRACKERS[self.kind].ordered and self._comes_late():
            has = self._begin_again()
        new = not has["step"] and not has["marks"]
        lines = [line for line in (records if self._caught_up else self._log()) if line["step"] > has["step"]]
        points += map(_of_line, lines)
        has["step"] = max([has["step"], *(line["step"] for line in lines)])
        for mark, point in self._lacks() if marks or not self._caught_up else ():
            points.append(point)
            has["marks"][mark.name] = [mark.step, mark.series]
        self._caught_up = True
        if points:
            self._tracker = self._tracker or TRACKERS[self.kind](self.folder, self.row, has["id"])
            self._save(pending=True)  # who finds it so after a kill or a full disk writes the curve from its beginning
            self._tracker.write([self._about(), *points] if new else points)
            self._save(pending=False)

    def close(self) -> None:
        """Finish for now, and release the row."""
        with self._end:
            if self._tracker is not None:
                self._tracker.close()

    def _save(self, pending: bool) -> None:
        artefact.write_json(self.folder / WRITTEN, {**self._has, "pending": pending})

    def _log(self) -> list[dict[str, Any]]:
        return logged(self.plan, self.row.run, self.row.seed) if self.row.run in self.plan.config.runs else []

    def _take(self) -> bool:
        held = locks.attempt(self.folder / "lock")
        if held is None:
            return False
        self._end.enter_context(held)
        with contextlib.suppress(ValueError):  # none, or damaged: it begins again
            self._has = artefact.read_json(self.folder / WRITTEN, "tracked")
        keeps = TRACKERS[self.kind].keeps()
        if self._has.get("lineage") != self.row.lineage or (keeps and self._has.get("pending")):
            self._begin_again()
        elif not keeps:
            self._has |= {"step": 0, "marks": {}}
        return True

    def _begin_again(self) -> dict[str, Any]:
        """The row has another curve, a score that belongs before others, or points that may lack. Event files can be
        written again from the beginning; a run of W&B cannot, so it is left as it is and there is a new one."""
        if self._tracker is not None:
            self._tracker.close()
        (self.folder / WRITTEN).unlink(missing_ok=True)  # first: after a kill it does not speak of files that are gone
        for path in self.folder.glob("events.out.tfevents.*"):
            path.unlink()
        header = {"schema": artefact.SCHEMA, "kind": "tracked", "lineage": self.row.lineage}
        self._has = {**header, "id": uuid.uuid4().hex, "step": 0, "marks": {}}
        self._tracker, self._caught_up = None, False
        return self._has

    def _about(self) -> Point:
        settings = yaml.safe_dump(self.row.settings, sort_keys=False)
        return Point(0, time.time(), words={"settings": "".join(f"    {line}\n" for line in settings.splitlines())})

    def _lacks(self) -> list[tuple[Mark, Point]]:
        """Scores and stops that are not written, by their steps, without those whose files are damaged."""
        found = []
        for mark in [*_scores(self.plan, self.row), *_stops(self.plan, self.row, self._has["step"])]:
            if mark.name not in self._has["marks"]:
                try:
                    found.append((mark, mark.point()))
                except (ValueError, TypeError, OSError) as error:
                    _refused(self.row.name, mark.name, str(error))
        return sorted(found, key=lambda one: one[0].step)

    def _comes_late(self) -> bool:
        """Whether a score lacks whose step is before that of one in its series that is written."""
        last = dict[str, int]()
        for step, series in self._has["marks"].values():
            last[series] = max(step, last.get(series, 0))
        return any(mark.step < last.get(mark.series, 0) for mark, _ in self._lacks())


class Trackers:
    """The runs of some rows. A service that cannot be reached is asked no more: what lacks is written another time.
    In training that holds for every tracker, whatever went wrong."""

    def __init__(self, plan: Plan, of: Iterable[Row], local: bool = False, training: bool = False) -> None:
        self._down, self._training = set[str](), training
        kinds = [kind for kind in plan.config.runtime.trackers if TRACKERS[kind].local or not local]
        of = of if kinds else ()
        self.runs = [Written(plan, row, kind) for row in of for kind in kinds if _adopt(plan, row, kind)]

    def add(self, run: Written, *what: Any) -> None:
        """Have a run add what it lacks; arguments as of `Written.add`.

        Raises:
            ValueError: the library of its tracker is missing. Not in training.
            OSError: the disk is full. Not in training.
        """
        if run.kind not in self._down:
            with self._tolerated(run):
                run.add(*what)

    def end(self, run: Written) -> None:
        """Finish a run for now."""
        with self._tolerated(run):
            run.close()

    @contextlib.contextmanager
    def _tolerated(self, run: Written) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not self._training and (TRACKERS[run.kind].local or isinstance(error, ValueError)):
                raise
            self._down.add(run.kind)
            said = f"runtime.trackers: {run.kind} cannot be written to ({type(error).__name__}: {error})"
            log.warning("%s: %s. The next job or `haste track` writes what is missing", run.row.name, said)


def update(plan: Plan, of: Evaluation | None = None, local: bool = False) -> None:
    """Write everything that the configuration's trackers do not have yet; raises as `Trackers.add`.

    Args:
        plan: of the configuration.
        of: only of the rows with these samples.
        local: only trackers that need no network.
    """
    mine = {(row.run, row.seed) for row in plan.rows if of is None or row.evaluation.name == of.name}
    trackers = Trackers(plan, [row for row in rows(plan) if of is None or (row.run, row.seed) in mine], local)
    for run in trackers.runs:
        try:
            trackers.add(run)
        finally:
            trackers.end(run)


@contextlib.contextmanager
def following(plan: Plan, trajectory: str, begin: int, end: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that adds the records of a trajectory's journal to every row that passes through their steps.

    Args:
        plan: of the configuration whose job trains.
        trajectory: that is trained.
        begin: steps done before the first one.
        end: steps done after the last one.
    """

    def passes(row: Row, step: int, to: int) -> bool:
        if row.run not in plan.config.runs or step > plan.config.runs[row.run].milestones[-1]:
            return False
        mine = (piece for piece in plan.pieces[row.run, row.seed] if piece.trajectory == trajectory)
        return any(piece.low < to and (piece.high is None or step <= piece.high) for piece in mine)

    mine = [row for row in rows(plan) if passes(row, begin + 1, end)]
    looked, trackers = time.monotonic(), Trackers(plan, mine, training=True)

    def follow(record: dict[str, Any]) -> None:
        nonlocal looked
        now, step = time.monotonic(), record["step"]
        due = now - looked >= LOOK or step == end
        looked = now if due else looked
        for run in trackers.runs:
            if passes(run.row, step, step):
                trackers.add(run, [record], due)

    try:
        yield follow
    finally:
        for run in trackers.runs:
            trackers.end(run)


def _adopt(plan: Plan, row: Row, kind: str) -> bool:
    """Give a row that was renamed the folder that it had under its name before. Returns False while another process
    writes there: then the row is written another time."""
    if (own := Path(plan.folder, kind, row.folder)).exists():
        return True
    names = {one.folder for one in rows(plan)}
    for path in sorted(own.parent.glob(f"*/{WRITTEN}")):
        with contextlib.suppress(ValueError, OSError):
            if path.parent.name not in names and artefact.read_json(path, "tracked").get("lineage") == row.lineage:
                if (held := locks.attempt(path.parent / "lock")) is None:
                    return False
                with held:
                    path.parent.rename(own)
                log.info("%s: goes on in what %s has of %s", row.name, own.parent.name, path.parent.name)
                break
    return True
