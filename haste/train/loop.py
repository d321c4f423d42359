"""Training, one segment at a time. Start reading here.

`train(plan, state)` makes a state, and the same call again continues: it looks for the newest valid state on the way,
goes on from there, and after a kill at any moment ends in the same bits. What a step does depends on (recipe, step)
alone, never on what the process did before.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from haste import artefact
from haste.data.batches import Batches
from haste.data.store import Store
from haste.journal import Journal
from haste.plan import STATE_NAME, Plan, Segment, State
from haste.train import state as states
from haste.train.step import look, losses, total_loss, update

if TYPE_CHECKING:
    from haste.teachers.encoder import Teacher

log = logging.getLogger("haste.train")


def train(plan: Plan, state: State) -> Path:
    """Make a state: begin, or continue from the newest valid state on its lineage.

    Returns:
        The state's file.

    Raises:
        ValueError: somebody else is training this trajectory; or data, teacher or an earlier state is not what the
            states before were made with.
        FloatingPointError: a loss is not finite; the states before are kept.
    """
    path, trajectory = Path(plan.path(state)), plan.trajectories[state.trajectory]
    segment = plan.segment(state)
    if segment.parent and not path.exists() and not Path(plan.path(segment.parent)).exists():
        train(plan, segment.parent)  # the workflow orders this; a person need not
    with artefact.holding(path.parent / "lock", f"trajectory {state.trajectory}"):
        artefact.sweep(path.parent)
        artefact.sweep(path.parent / "rolling")
        if path.exists():
            header = states.read_header(path)
            states.read(path, key=trajectory.key, prefixes=("none",))
            log.info("%s: already trained (%s)", state, header["provenance"]["made"])
            return path
        artefact.write_json(path.parent / "trajectory.json", _description(plan, trajectory))
        _Training(plan, segment).run()
    return path


def _description(plan: Plan, trajectory: Any) -> dict[str, Any]:
    header = {"schema": artefact.SCHEMA, "kind": "trajectory", "key": trajectory.key, "recipe": trajectory.recipe}
    return {**header, "provenance": artefact.provenance(key=trajectory.key)}


class _Training:
    """What one segment's training holds while it runs."""

    def __init__(self, plan: Plan, segment: Segment):
        self.plan, self.segment = plan, segment
        self.trajectory = plan.trajectories[segment.state.trajectory]
        self.recipe, self.runtime = self.trajectory.recipe, plan.config.runtime
        self.folder = Path(plan.path(segment.state)).parent
        torch.set_num_threads(self.runtime.threads)
        self.teachers = {name: _teacher(plan, name) for name in segment.teachers}
        self.batches = self._batches()
        self.inputs = {"latents": self.batches.latents.identity}
        self.inputs |= {f"teacher {name}": teacher.identity for name, teacher in self.teachers.items()}
        widths = {name: teacher.width for name, teacher in self.teachers.items()}
        self.learner = states.new_learner(self.recipe, segment.terms, widths)

    def _batches(self) -> Batches:
        plan = self.plan
        latents = Store.open(plan.latents.folder, kind="latents", key=plan.latents.key, recipe=plan.latents.recipe)
        images = None
        if self.teachers:  # after the last stop nobody looks at the images
            images = Store.open(plan.images.folder, kind="images", key=plan.images.key, recipe=plan.images.recipe)
        settings = self.recipe["training"]
        return Batches(
            latents,
            images,
            seed=self.recipe["seed"],
            size=settings["batch"],
            null_class=self.recipe["classes"],
            class_dropout=settings["class_dropout"],
        )

    def run(self) -> None:
        """From the newest valid state to the segment's end."""
        begin, end = self._resume(), self.segment.state.step
        log.info(
            "%s: steps %d to %d, aligning %s",
            self.trajectory.name,
            begin,
            end,
            ", ".join(self.segment.terms) or "nothing",
        )
        with Journal(self.folder / "log.jsonl", begin, end, self.recipe["training"]["batch"]) as journal:
            for batch in self.batches.ahead(range(begin, end)):
                journal.add(self._step(batch))
                done = batch.step + 1
                if done % self.runtime.log_every == 0 or done == end:
                    journal.write(done)
                if done < end:
                    self._save_on_the_way(done, journal)
        self._save(Path(self.plan.path(self.segment.state)), end)
        for old in self._rolling():
            old.unlink(missing_ok=True)

    def _step(self, batch: Any) -> dict[str, torch.Tensor]:
        settings, manifest = self.recipe["training"], self.batches.latents.manifest
        targets = look(self.teachers, self.segment.terms, batch.images) if self.teachers else {}
        found = losses(
            self.learner.model,
            self.learner.projectors,
            batch,
            self.segment.terms,
            targets,
            path=settings["path"],
            scale=manifest["scale"],
            shift=manifest["shift"],
        )
        loss = total_loss(found, self.segment.terms)
        norm = update(self.learner, loss, clip=settings["clip"], ema=settings["ema"])
        return {**{name: value.detach() for name, value in found.items()}, "grad_norm": norm}

    # -- states ----------------------------------------------------------------------------------------------------

    def _save_on_the_way(self, done: int, journal: Journal) -> None:
        kept = self.runtime.keep_every and done % self.runtime.keep_every == 0
        if not kept and done % self.runtime.save_every:
            return
        journal.check_finite(done)
        name = State(self.trajectory.name, done).file
        self._save(self.folder / name if kept else self.folder / "rolling" / name, done)
        for old in self._rolling()[2:]:
            old.unlink(missing_ok=True)

    def _save(self, path: Path, step: int) -> None:
        header = {"key": self.trajectory.key, "trajectory": self.trajectory.name, "recipe": self.recipe, "step": step}
        provenance = artefact.provenance(key=self.trajectory.key, inputs=self.inputs)
        states.save(path, self.learner, {**header, "inputs": self.inputs, "provenance": provenance})

    def _rolling(self) -> list[Path]:
        """Rolling states of this segment, newest first. Those of other stretches of the trajectory are not ours."""
        found = self._between(self.folder / "rolling")
        return [path for _, path in sorted(found, reverse=True)]

    def _between(self, folder: Path) -> list[tuple[int, Path]]:
        names = [STATE_NAME.match(path.name) for path in folder.glob("step-*")]
        steps = [int(match[1]) for match in names if match]
        span = range(self.segment.start + 1, self.segment.state.step + 1)
        return [(step, folder / State(self.trajectory.name, step).file) for step in steps if step in span]

    def _resume(self) -> int:
        """Load the newest valid state on the way and return its step; 0 if training begins."""
        for step, path in sorted(self._between(self.folder) + self._between(self.folder / "rolling"), reverse=True):
            try:
                header, tensors = states.read(path, key=self.trajectory.key)
            except ValueError as error:
                log.warning("passing over a state that cannot be read: %s", error)
                continue
            self._restore(header, tensors, path)
            return step
        parent = self.segment.parent
        if parent is None:
            return 0
        path = Path(self.plan.path(parent))
        self._restore(*states.read(path, key=self.plan.trajectories[parent.trajectory].key), path)
        return parent.step

    def _restore(self, header: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], path: Path) -> None:
        for name, identity in self.inputs.items():
            found = header["inputs"].get(name, identity)
            if found != identity:
                raise ValueError(
                    f"{path}: was trained with {name} {found[:12]}, but {name} is now {identity[:12]}. "
                    "Bring the earlier one back, or remove this trajectory's states to train them anew."
                )
        if header["provenance"]["code"] != artefact.code_version():
            log.warning("%s was made by other code (%s)", path, header["provenance"]["code"])
        states.restore(self.learner, tensors, path)


def _teacher(plan: Plan, name: str) -> Teacher:
    from haste.teachers.encoder import Teacher  # after the last stop not even timm is imported

    part = plan.teachers[name]
    if part is not None:
        return Teacher.load(part.folder)
    spec = plan.config.teachers[name].pretrained
    assert spec is not None
    return Teacher.load(spec.name, resolution=plan.config.images.resolution, weights=spec.weights)
