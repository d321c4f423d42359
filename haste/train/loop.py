"""Training, one segment at a time. Start reading here.

`train(plan, state)` makes a state, and the same call again continues: it looks for the newest valid state on the way,
goes on from there, and after a kill at any moment ends in the same bits. What a step does depends on (recipe, step)
alone, never on what the process did before. Several processes each take their rows of every batch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from haste.align.losses import TeacherTargets
from haste.data.batches import Batch, Batches
from haste.files import artefact
from haste.files.journal import Journal
from haste.files.provenance import STATE_NAME, read_header
from haste.files.store import Store
from haste.models.attention import logsumexp_works
from haste.plan.names import Segment, State
from haste.plan.plan import Plan
from haste.teachers.targets import Cached, load_teacher
from haste.train import state as states
from haste.train import stops
from haste.train.distributed import (
    WARM_UPS,
    Agreement,
    Group,
    enough_memory,
    joined,
    wrap,
)
from haste.train.gradient_angles import Angles
from haste.train.readings import Watch
from haste.train.step import (
    Objective,
    draws_negatives,
    gather_negatives,
    t_min_of,
    teacher_targets,
    times_of,
    total_loss,
    update,
)
from haste.train.trackers import open_tracker

log = logging.getLogger("haste.train")

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Interrupted(Exception):  # noqa: N818 - no error: it was asked for
    """Training was asked to stop and did, its last step saved; the same call goes on from there."""

    def __init__(self, step: int, reason: int):
        super().__init__(f"interrupted after step {step}, which is saved")
        self.step, self.reason = step, reason


def train(plan: Plan, state: State, interrupted: Callable[[], int] | None = None) -> Path:
    """Make a state: begin, or continue from the newest valid state on its lineage.

    Alone, or as one of the processes that RANK and WORLD_SIZE in the environment tell of.

    Args:
        plan: what the configuration asks for.
        state: which state to make.
        interrupted: asked after every step; what it says is 0 to go on, or a reason to stop. The largest reason that
            any process has holds for all of them; where there are several, they stop together one step later.

    Returns:
        The state's file.

    Raises:
        ValueError: somebody else is training this trajectory; or data, teacher or an earlier state is not what the
            states before were made with.
        FloatingPointError: a loss is not finite; the states before are kept.
        Interrupted: `interrupted` gave a reason.
    """
    torch.set_num_threads(plan.config.runtime.threads)
    with joined(plan.config.runtime.device) as group, enough_memory():
        return _train(plan, state, group, interrupted)


def _train(plan: Plan, state: State, group: Group, interrupted: Callable[[], int] | None) -> Path:
    path, trajectory = Path(plan.path(state)), plan.trajectories[state.trajectory]
    segment = plan.segment(state)
    exists = group.broadcast_from_first(path.exists)
    before = segment.parent
    if before and not exists and not group.broadcast_from_first(Path(plan.path(before)).exists):
        _train(plan, before, group, interrupted)  # the workflow orders this; a person need not
    lock = artefact.holding(path.parent / "lock", f"trajectory {state.trajectory}")
    with lock if group.first else contextlib.nullcontext():
        if group.first:
            artefact.sweep(path.parent)
            artefact.sweep(path.parent / "rolling")
        if group.broadcast_from_first(path.exists):
            header, _ = states.read(path, key=trajectory.key, prefixes=("none",))
            log.info("%s: already trained (%s)", state, header["provenance"]["made"])
            if group.first:
                stops.write(path.parent, header)
                _forget(_rolling(segment, path.parent))
            return path
        if group.first:
            artefact.write_json(path.parent / "trajectory.json", _description(trajectory))
        _to_the_end(plan, segment, group, interrupted)
        group.wait()
    return path


def _to_the_end(plan: Plan, segment: Segment, group: Group, interrupted: Callable[[], int] | None) -> None:
    """Train a segment. Where a trigger stops a term, all is built anew from the state there, as any later start would:
    what follows is that of a run which stops at this step by its configuration, to the bit."""
    end, reached = segment.state.step, -1
    while reached < end:
        found = group.broadcast_from_first(lambda: _newest(plan, segment))
        header = None if found is None else read_header(found)
        if reached >= 0 and (header is None or header["step"] != reached):
            raise ValueError(
                f"{found}: found as the newest state, expected that of step {reached}, which was just saved"
            )
        reached = _Training(plan, _left(segment, header), found, group, interrupted).run()
        group.free()  # teacher, projector and their moments go before what stays is built


def _left(segment: Segment, header: Mapping[str, Any] | None) -> Segment:
    """A segment without the terms that a trigger had stopped before a state was saved."""
    stopped = {kind for kind, record in _triggers(header).items() if record["stopped"] is not None}
    terms = {kind: term for kind, term in segment.terms.items() if kind not in stopped}
    return dataclasses.replace(segment, terms=terms, cached=tuple(kind for kind in segment.cached if kind in terms))


def _triggers(header: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """What a state says of triggers: nothing where none watched, and in states that are older than triggers."""
    return (header or {}).get("triggers", {})


def _newest(plan: Plan, segment: Segment) -> Path | None:
    """The newest state on the way that can be read, else the one that the segment starts from."""
    folder, key = Path(plan.path(segment.state)).parent, plan.trajectories[segment.state.trajectory].key
    found = _between(segment, folder) + _between(segment, folder / "rolling")
    for _, path in sorted(found, reverse=True):
        try:
            states.read(path, key=key)
        except ValueError as error:
            log.warning("passing over a state that cannot be read: %s", error)
            continue
        return path
    return Path(plan.path(segment.parent)) if segment.parent else None


def _description(trajectory: Any) -> dict[str, Any]:
    header = {"schema": artefact.SCHEMA, "kind": "trajectory", "key": trajectory.key, "recipe": trajectory.recipe}
    return {**header, "provenance": artefact.provenance(key=trajectory.key)}


def _between(segment: Segment, folder: Path) -> list[tuple[int, Path]]:
    """Step and file of the states in a folder that lie on a segment's way, newest first."""
    names = [STATE_NAME.match(path.name) for path in folder.glob("step-*")]
    steps = sorted((int(match[1]) for match in names if match), reverse=True)
    way = range(segment.start + 1, segment.state.step + 1)
    return [(step, folder / State(segment.state.trajectory, step).file) for step in steps if step in way]


def _rolling(segment: Segment, folder: Path) -> list[Path]:
    """Rolling states of a segment, newest first. Those of other stretches of the trajectory are not its own."""
    return [path for _, path in _between(segment, folder / "rolling")]


def _forget(paths: list[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


class _Training:
    """What one segment's training holds while it runs, up to its end or to where a trigger stops a term."""

    def __init__(
        self,
        plan: Plan,
        segment: Segment,
        found: Path | None,
        group: Group,
        interrupted: Callable[[], int] | None,
    ):
        """
        Args:
            plan: what the configuration asks for.
            segment: the job, with the terms that are left.
            found: the state to go on from; None begins.
            group: the processes.
            interrupted: see `train`.
        """
        self.plan, self.segment, self.group, self.interrupted = plan, segment, group, interrupted
        self.found = found
        self.trajectory = plan.trajectories[segment.state.trajectory]
        self.recipe, self.runtime = self.trajectory.recipe, plan.config.runtime
        self.settings = self.recipe["training"]
        self.folder = Path(plan.path(segment.state)).parent
        self.watches = {kind: Watch(kind, term, group) for kind, term in segment.terms.items() if term["trigger"]}
        self.stopped: dict[str, Any] = {}  # records of triggers that have stopped their term
        self.changes: list[str] = []  # what was done in another way further back, equal but for rounding
        parts = group.rows(self.settings["batch"], self.runtime.accumulate)
        self.own_rows = range(parts[0].start, parts[-1].stop)
        self.teachers = {
            name: load_teacher(plan, name).to(group.device, self._teacher_dtype()) for name in segment.teachers
        }
        self.cached = Cached(plan, segment)
        self.online = {kind: term for kind, term in segment.terms.items() if kind not in segment.cached}
        self.batches = self._batches()
        self.inputs = {"latents": self.batches.latents.identity}
        for kind, term in segment.terms.items():  # by term: what a configuration calls a teacher is its own affair
            name = term["teacher"]
            own = kind in self.online
            self.inputs |= (
                {f"teacher of {kind}": self.teachers[name].identity} if own else self.cached.inputs(name, kind)
            )
        widths = {name: teacher.width for name, teacher in self.teachers.items()}
        widths |= {name: width for name in segment.targets if (width := self.cached.width(name))}
        self.learner = states.new_learner(self.recipe, segment.terms, widths, group.device)
        model = self.learner.model
        model.checkpoint_blocks = self.runtime.checkpoint_blocks
        model.own_logsumexp = self._logsumexp_works()
        manifest = self.batches.latents.manifest
        self.objective = Objective(
            self.learner,
            segment.terms,
            path=self.settings["path"],
            scale=manifest["scale"],
            shift=manifest["shift"],
        )
        self.angles = self._angles(len(parts[0]))
        if self.runtime.compile:
            for network in (self.learner.model, *(teacher.network for teacher in self.teachers.values())):
                network.compile()

    def _angles(self, part: int) -> Angles:
        """What triggers ask for of angles, by the losses as they are trained, so many images at once."""
        return Angles(
            self.objective,
            self.batches,
            self.group,
            part=part,
            teacher_targets=self._targets,
            precision=self._precision,
            scale=self.learner.scaler.scale,  # type: ignore[arg-type]
            compiled=self.runtime.compile,
        )

    def _logsumexp_works(self) -> bool:
        """Whether the attention that is aligned can give the logsumexp of its logits on this machine."""
        half, device = AUTOCAST.get(self.settings["precision"]), str(self.group.device)
        attention = self.segment.terms.get("attention")
        layers = attention["student_layers"] if attention else ()
        taps = [self.learner.model.taps[f"attention.{layer}"] for layer in layers]
        widths = {tap.width // tap.heads for tap in taps if tap.heads}
        return bool(taps) and all(logsumexp_works(device, half, width) for width in widths)

    def _teacher_dtype(self) -> torch.dtype | None:
        """Half precision on a GPU where the student uses it too; on a CPU autocast does that."""
        if self.settings["precision"] == "fp64":
            return torch.float64
        return AUTOCAST.get(self.settings["precision"]) if self.group.device.type == "cuda" else None

    def _batches(self) -> Batches:
        plan = self.plan
        latents = Store.of(plan.latents)
        images = None
        if self.teachers:  # after the last stop nobody looks at the images
            images = Store.of(plan.images)
        return Batches(
            latents,
            images,
            seed=self.recipe["seed"],
            size=self.settings["batch"],
            null_class=self.recipe["classes"],
            class_dropout=self.settings["class_dropout"],
            targets={name: (store, self.cached.fields[name]) for name, store in self.cached.stores.items()},
            timesteps=times_of(self.settings),
            t_min=t_min_of(self.segment.terms),
        )

    def run(self) -> int:
        """To the segment's end, or to where a trigger stops a term, whose state is saved then. Returns the step."""
        begin, end = self._resume(), self.segment.state.step
        aligning = ", ".join(self.segment.terms) or "nothing"
        log.info("%s: steps %d to %d, aligning %s", self.trajectory.name, begin, end, aligning)
        own = self.own_rows
        self.wrapped = wrap(self.objective, self.group)
        self._warm_up(self.batches(begin, own).to(self.group.device))
        agreement = Agreement(self.group)
        with self._journal(begin, end) as journal:
            for batch in journal.timing(self.batches.ahead(range(begin, end), own, self.group.device)):
                journal.add(self._step(batch))
                done = batch.step + 1
                due = [watch for watch in self.watches.values() if watch.is_due(done)]
                stops = [watch.read(done, self.trajectory.name, self.angles) for watch in due]
                if done % self.runtime.log_every == 0 or done == end or any(stops):
                    journal.write(done, self.group.peak_memory_mb())
                if done < end:
                    reason = agreement.largest(self.interrupted()) if self.interrupted else 0
                    self._save_on_the_way(done, journal, now=bool(reason), keep=any(stops))
                    if reason or any(stops):
                        agreement.settle()
                    if reason:
                        self.group.wait()  # nobody is done before the state is on disk
                        raise Interrupted(done, reason)
                    if any(stops):
                        return done
        agreement.settle()
        self._save(Path(self.plan.path(self.segment.state)), end)
        if self.group.first:
            _forget(_rolling(self.segment, self.folder))
        return end

    def _journal(self, begin: int, end: int) -> Journal:
        path = self.folder / "log.jsonl" if self.group.first else None
        may_skip = self.settings["precision"] == "fp16" or self.settings["nonfinite"] == "skip"
        journal = Journal(path, begin, end, self.settings["batch"], self.group.mean, may_skip)
        if self.group.first:
            about = {"name": self.trajectory.name, "config": self.recipe, "begin": begin}
            journal.on_record = [open_tracker(kind, self.folder, **about) for kind in self.runtime.trackers]
        return journal

    def _warm_up(self, batch: Batch) -> None:
        """Backward twice for nothing: DDP orders its reductions anew after the first backward, so the first step after
        a restart would add up in another order than the same step of an undisturbed run."""
        if isinstance(self.wrapped, DistributedDataParallel):
            for _ in range(WARM_UPS):
                self._backward(batch)
                self.learner.optimizer.zero_grad(set_to_none=True)

    def _step(self, batch: Batch) -> dict[str, Tensor]:
        found = self._backward(batch)
        for kind, watch in self.watches.items():
            watch.add(found, batch.weights.get(kind))
        settings = self.settings
        norm = update(self.learner, clip=settings["clip"], ema=settings["ema"], skip=settings["nonfinite"] == "skip")
        return {**found, "grad_norm": norm}

    def _backward(self, batch: Batch) -> dict[str, Tensor]:
        """Gradients of the whole group's batch, scaled for fp16; returns this process's mean of each loss term."""
        sums: dict[str, Tensor] = {}
        parts = batch.parts(self.runtime.accumulate)
        seen: Iterable[dict[str, TeacherTargets]] = map(self._targets, parts)
        negatives = None
        if draws_negatives(self.segment.terms):  # tokens of all parts are compared with: all are looked at first
            seen = list(seen)
            negatives = self._negatives(seen, batch.step)
        for number, (part, targets) in enumerate(zip(parts, seen, strict=True), start=1):
            wait = number < len(parts) and isinstance(self.wrapped, DistributedDataParallel)
            with self.wrapped.no_sync() if wait else contextlib.nullcontext():  # type: ignore[operator]
                with self._precision():
                    found = self.wrapped(part, targets, negatives)
                loss = total_loss(found, self.segment.terms, batch.step) / len(parts)
                self.learner.scaler.scale(loss).backward()
            for name, value in found.items():
                sums[name] = sums.get(name, 0) + value.detach() / len(parts)
        return sums

    def _targets(self, part: Batch) -> dict[str, TeacherTargets]:
        with self._precision():
            seen = teacher_targets(self.teachers, self.online, part.images)
            return self.cached.with_stored(seen, part.targets)

    def _negatives(self, seen: list[dict[str, TeacherTargets]], step: int) -> tuple[Tensor, Tensor]:
        teacher = self.segment.terms["features"]["teacher"]
        features = [targets[teacher].features for targets in seen]
        return gather_negatives(
            torch.cat([found for found in features if found is not None]),
            self.own_rows,
            self.segment.terms,
            seed=self.recipe["seed"],
            step=step,
            size=self.settings["batch"],
            group=self.group,
        )

    def _precision(self) -> Any:
        dtype = AUTOCAST.get(self.settings["precision"])
        return torch.autocast(self.group.device.type, dtype) if dtype else contextlib.nullcontext()

    # -- states ----------------------------------------------------------------------------------------------------

    def _save_on_the_way(self, done: int, journal: Journal, now: bool, keep: bool) -> None:
        kept = keep or (self.runtime.keep_every and done % self.runtime.keep_every == 0)
        if not kept and not now and done % self.runtime.save_every:
            return
        journal.check_finite(done)
        name = State(self.trajectory.name, done).file
        self._save(self.folder / name if kept else self.folder / "rolling" / name, done)
        if self.group.first:
            _forget(_rolling(self.segment, self.folder)[2:])

    def _save(self, path: Path, step: int) -> None:
        """Everybody must call it; the first process writes."""
        watching = {kind: watch for kind, watch in self.watches.items() if watch.stopped is None}
        averages = {f"readings/{kind}": watch.gathered() for kind, watch in watching.items()}
        if not self.group.first:
            return
        header = {"key": self.trajectory.key, "trajectory": self.trajectory.name, "recipe": self.recipe, "step": step}
        provenance = artefact.provenance(key=self.trajectory.key, inputs=self.inputs)
        provenance |= {"processes": self.group.size, "accumulate": self.runtime.accumulate}
        provenance |= {"targets": self._sources(), "changes": self.changes}
        header |= {"inputs": self.inputs, "provenance": provenance}
        if records := {**self.stopped, **{kind: watch.record() for kind, watch in self.watches.items()}}:
            header["triggers"] = records
        states.save(path, self.learner, header, averages)
        stops.write(self.folder, header)

    def _sources(self) -> dict[str, str]:
        """Term -> where its targets come from: asked `online`, or the identity of the store that they are read from."""
        stores = self.cached.stores
        return {
            kind: "online" if kind in self.online else f"cached, {stores[term['teacher']].identity}"
            for kind, term in self.segment.terms.items()
        }

    def _resume(self) -> int:
        """Load the state to go on from and return its step; 0 if training begins."""
        path = self.found
        if path is None:
            if "warm_start" in self.recipe:
                from haste.train.warm_start import warm_start  # which knows about training, and few runs need it

                warm_start(self.plan, self.trajectory.name, self.learner)
            return 0
        own = path.parent == self.folder or path.parent.parent == self.folder
        parent = self.segment.parent
        key = self.trajectory.key if own or parent is None else self.plan.trajectories[parent.trajectory].key
        header, tensors = states.read(path, key=key)
        self._restore(header, tensors, path)
        self._go_on_watching(header, tensors, path)
        if own and self.group.first:
            stops.write(self.folder, header)
        return header["step"]

    def _go_on_watching(self, header: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> None:
        """Triggers continue where they were; a new one begins at its own first step."""
        self.stopped = {kind: r for kind, r in _triggers(header).items() if kind not in self.watches}
        for kind, watch in self.watches.items():
            if kind in _triggers(header):
                watch.go_on(_triggers(header)[kind], tensors.get(f"readings/{kind}"), path)
            elif header["step"] != watch.after:
                raise ValueError(
                    f"{path}: has no readings of {kind}, which is watched from step {watch.after} on; expected them, "
                    "or the state of that step"
                )

    def _restore(self, header: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> None:
        for name, identity in self.inputs.items():
            found = header["inputs"].get(name, "none")
            if found != identity:
                raise ValueError(
                    f"{path}: was trained with {name} {found[:12]}, but {name} is now {identity[:12]}. "
                    "Bring the earlier one back, or remove this trajectory's states to train them anew."
                )
        self.inputs = {**header["inputs"], **self.inputs}  # which teacher it once had stays on record
        made = header["provenance"]
        if made["code"] != artefact.code_version():
            log.warning("%s was made by other code (%s)", path, made["code"])
        if made.get("processes", 1) != self.group.size:
            log.warning("%s was made by %d processes, going on with %d", path, made["processes"], self.group.size)
        self._note_changes(header, path)
        states.restore(self.learner, tensors, path)

    def _note_changes(self, header: Mapping[str, Any], path: Path) -> None:
        """Put on record, for good, that from a step on targets come from elsewhere: equal but for their rounding."""
        made = header["provenance"]
        self.changes = list(made.get("changes", []))
        for kind, now in self._sources().items():
            first = "online" if f"teacher of {kind}" in header["inputs"] else now
            if (was := made.get("targets", {}).get(kind, first)) != now:
                was, now = (source[:20] for source in (was, now))
                self.changes.append(f"step {header['step']}: targets of {kind}: {was} before, {now} from here on")
                log.warning("%s: its targets of %s were %s, going on with %s", path, kind, was, now)
