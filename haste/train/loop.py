"""Training, one segment at a time. Start reading here.

`train(plan, state)` makes a state. Calling it again continues: it looks for the newest valid state of the segment,
continues from there, and after a kill at any moment ends with the same bits. A step depends only on (recipe, step),
never on what the process did before. Each rank takes its rows of every batch.

`haste/train/inputs.py` opens what a segment is trained with, `haste/train/checkpoint.py` finds, restores and saves its
states, and `haste/train/readings.py` makes the readings of triggers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from haste.align.losses import TeacherTargets
from haste.config import Runtime
from haste.data.ahead import reading_threads
from haste.data.batches import Batch
from haste.files.journal import Journal
from haste.files.provenance import read_header
from haste.networks.devices import check_compiler, repeatable
from haste.plan.names import Segment, State
from haste.plan.plan import Plan
from haste.train import stops
from haste.train.checkpoint import Checkpoints
from haste.train.distributed import WARM_UPS, Agreement, Group, enough_memory, joined, wrap
from haste.train.gradient_angles import Angles
from haste.train.inputs import Inputs
from haste.train.readings import Watches
from haste.train.state import Learner
from haste.train.step import draws_negatives, total_loss, update
from haste.train.trackers import following
from haste.train.warm_start import warm_start

log = logging.getLogger("haste.train")


class Interrupted(Exception):  # noqa: N818 - not an error: it was requested
    """Training stopped on request after saving its last step; the same call continues from there."""

    agreed = True  # all ranks stop together

    def __init__(self, step: int, reason: int):
        super().__init__(f"interrupted after step {step}, which is saved")
        self.step, self.reason = step, reason


def train(plan: Plan, state: State, interrupted: Callable[[], int] | None = None) -> Path:
    """Make a state: begin, or continue from the newest valid state on its lineage.

    Runs alone, or as one of the ranks that RANK and WORLD_SIZE in the environment describe.

    Args:
        plan: the plan of the configuration.
        state: which state to make.
        interrupted: called after every step; returns 0 to continue, or a reason to stop. The largest reason of any
            rank applies to all of them; several ranks stop together one step later.

    Returns:
        The state's file.

    Raises:
        ValueError: another process is training this trajectory; or data, teacher or an earlier state differ from
            those that the previous states were made with.
        FloatingPointError: a loss is not finite; earlier states are kept.
        Interrupted: `interrupted` returned a reason.
    """
    runtime = plan.config.runtime
    torch.set_num_threads(runtime.threads)
    with joined(runtime.device) as group, enough_memory(), repeatable(group.device, runtime.deterministic):
        return _train(plan, state, group, interrupted)


def _train(plan: Plan, state: State, group: Group, interrupted: Callable[[], int] | None) -> Path:
    path, segment = Path(plan.path(state)), plan.segment(state)
    exists, before = group.broadcast(path.exists), segment.parent
    if before and not exists and not group.broadcast(Path(plan.path(before)).exists):
        _train(plan, before, group, interrupted)  # the workflow schedules this itself; a direct call need not
    checkpoints = Checkpoints(plan, segment, group)
    with checkpoints.locked():
        if not group.broadcast(path.exists):
            checkpoints.describe()
            checkpoints.adopt()
        if group.broadcast(path.exists):
            checkpoints.confirm()
            return path
        reached = None
        # Where a trigger stops or releases a term, or the released weight has fallen to 0, everything is opened anew
        # from the state there, as in any later start. So the result is bit for bit that of a run whose configuration
        # stops, or ramps down, at these steps.
        while reached != state.step:
            reached = _open(plan, segment, checkpoints, checkpoints.newest(reached)).run(interrupted)
            group.free()  # free teacher, projector and their moments before the remaining terms are opened
        group.wait()
    return path


def _open(plan: Plan, segment: Segment, checkpoints: Checkpoints, found: Path | None) -> Loop:
    """The loop of a segment from a state on, with the terms that are left, up to where the next one ends."""
    segment = stops.resumed(segment, read_header(found) if found else {})
    recipe, group = checkpoints.trajectory.recipe, checkpoints.group
    inputs, watches = Inputs(plan, segment, recipe, group), Watches(segment, group)
    learner = inputs.learner()
    begin = checkpoints.resume(found, learner, inputs, watches)
    if found is None and "warm_start" in recipe:
        warm_start(plan, segment.state.trajectory, learner)
    falls = [term["ramp"]["to"] for term in segment.terms.values() if term["ramp"]]
    return Loop(begin, min([segment.state.step, *falls]), inputs, learner, watches, checkpoints, plan.config.runtime)


@dataclasses.dataclass
class Loop:
    """The steps of a segment, and what a rank holds for them."""

    begin: int  # steps done before the first step
    end: int  # steps done after the last step
    inputs: Inputs  # what is trained with
    learner: Learner  # the trained parameters and their optimiser
    watches: Watches  # the triggers of the terms
    checkpoints: Checkpoints  # where states are found and saved
    runtime: Runtime  # settings that do not change the result

    def __post_init__(self) -> None:
        self.group, self.settings = self.inputs.group, self.inputs.settings
        self.rows = self.group.rows(self.settings["batch"], self.runtime.accumulate)
        objective, scale = self.inputs.objective(self.learner), self.learner.scaler.scale
        part = len(self.rows) // self.runtime.accumulate
        self.angles = Angles(objective, self.inputs, part=part, scale=scale, compiled=self.runtime.compile)
        if self.runtime.compile:
            check_compiler(self.group.device)
            self.learner.model.compile()
            for teacher in self.inputs.teachers.values():
                teacher.compile()
        self.objective = wrap(objective, self.group, self.runtime.compress_gradients)

    def run(self, interrupted: Callable[[], int] | None = None) -> int:
        """Train to the end, or until a trigger stops a term, and save the state there. Returns its step.

        Raises:
            FloatingPointError: a loss is not finite.
            Interrupted: see `train`.
        """
        name, aligning = self.checkpoints.trajectory.name, ", ".join(self.inputs.terms) or "nothing"
        log.info("%s: steps %d to %d, aligning %s", name, self.begin, self.end, aligning)
        self._warm_up()
        agreement, clock, steps = Agreement(self.group), Agreement(self.group), range(self.begin, self.end)
        with self._journal() as journal, self._tracked(journal):
            for batch in journal.timing(self._feed(steps)):
                journal.add(self._step(batch))
                done = batch.step + 1
                last = self.watches.read(done, self.angles) or done == self.end
                if last or done % self.runtime.log_every == 0:
                    journal.write(done, self.group.peak_memory_mb())
                journal.alive(done)
                reason = agreement.largest(interrupted()) if interrupted and done < self.end else 0
                due = bool(clock.largest(self.checkpoints.ask_to_save())) if self.checkpoints.timed else False
                self.checkpoints.check()
                if last or reason or due or self.checkpoints.is_due(done):
                    journal.check_finite(done)
                    self.checkpoints.save(self.learner, self.watches, done, wait=bool(reason), last=last)
                if last or reason:
                    agreement.settle()
                    clock.settle()
                if reason:
                    self.group.wait()  # no rank returns before the state is on disk
                    raise Interrupted(done, reason)
                if last:
                    break
        return done

    def _feed(self, steps: range) -> Iterator[Batch]:
        readers = reading_threads(self.runtime.loader_threads)
        return self.inputs.batches.ahead(steps, self.rows, self.group.device, readers=readers)

    def _journal(self) -> Journal:
        path = self.checkpoints.folder / "log.jsonl" if self.group.is_first else None
        may_skip = self.settings["precision"] == "fp16" or self.settings["nonfinite"] == "skip"
        return Journal(path, self.begin, self.end, self.settings["batch"], self.group.mean, may_skip)

    @contextlib.contextmanager
    def _tracked(self, journal: Journal) -> Iterator[None]:
        if not self.group.is_first or not self.runtime.trackers:
            yield
            return
        plan, name = self.checkpoints.plan, self.checkpoints.trajectory.name
        with following(plan, name, self.begin, self.end) as follow:
            journal.on_record = [follow]
            yield

    def _warm_up(self) -> None:
        """Run backward passes whose gradients are discarded: DDP rebuilds its buckets after the first one, so the first
        step after a restart would sum in a different order than the same step of an uninterrupted run."""
        if isinstance(self.objective, DistributedDataParallel):
            batch = self.inputs.batches(self.begin, self.rows).to(self.group.device)
            for _ in range(WARM_UPS):
                self._backward(batch)
                self.learner.optimizer.zero_grad(set_to_none=True)

    def _step(self, batch: Batch) -> dict[str, Tensor]:
        """Backward, update, and the triggers' averages. Returns the losses and the gradient's norm."""
        losses, settings = self._backward(batch), self.settings
        self.watches.add(batch.step, losses, batch.weights)
        skip = settings["nonfinite"] == "skip"
        return {**losses, "grad_norm": update(self.learner, clip=settings["clip"], ema=settings["ema"], skip=skip)}

    def _backward(self, batch: Batch) -> dict[str, Tensor]:
        """Gradients of the whole group's batch, scaled for fp16; returns this rank's mean of each loss term."""
        means: dict[str, Tensor] = {}
        microbatches = batch.microbatches(self.runtime.accumulate)
        targets: Iterable[dict[str, TeacherTargets]] = map(self.inputs.targets, microbatches)
        negatives, count = None, len(microbatches)
        if draws_negatives(self.inputs.terms):  # negatives come from all microbatches, so compute all targets first
            targets = list(targets)
            negatives = self.inputs.negatives(targets, self.rows, batch.step)
        for number, (microbatch, seen) in enumerate(zip(microbatches, targets, strict=True), start=1):
            wait = number < count and isinstance(self.objective, DistributedDataParallel)
            with self.objective.no_sync() if wait else contextlib.nullcontext():  # type: ignore[operator]
                with self.inputs.precision():
                    losses = self.objective(microbatch, seen, negatives)
                loss = total_loss(losses, self.inputs.terms, batch.step) / count
                self.learner.scaler.scale(loss).backward()
            for name, value in losses.items():
                means[name] = means.get(name, 0) + value.detach() / count
        return means
