"""What a segment is trained with, opened: latents and images, teachers and their stored targets, and losses of these.

Nothing here knows of an optimiser, of an earlier step or of what is saved: the loop trains with `Inputs`, and whoever
measures a state opens the same ones for the terms that he asks about.

B images of a microbatch, N teacher tokens, D teacher width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from haste.align.losses import TeacherTargets
from haste.config import process_in
from haste.data.batches import Batch, Batches
from haste.files.store import Store
from haste.models.attention import logsumexp_works
from haste.plan.names import Segment
from haste.plan.plan import Plan
from haste.teachers.targets import Cached, load_teacher
from haste.train.distributed import Group
from haste.train.state import Learner, new_learner
from haste.train.step import Objective, gather_negatives, t_min_of, teacher_targets

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Inputs:
    """The opened inputs of a segment.

    Attributes:
        recipe: what the trajectory is trained by.
        terms: the alignment terms that are active, with their settings.
        group: the processes.
        batches: what every step sees.
        teachers: name -> teacher, on the device; only those that are asked while training.
        identities: `latents`, `teacher of TERM`, `components of TERM` -> identity. By term: what a configuration calls
            a teacher is its own affair.
        sources: term -> where its targets come from: asked `online`, or `cached` and the identity of the store.
    """

    def __init__(self, plan: Plan, segment: Segment, recipe: Mapping[str, Any], group: Group):
        """
        Args:
            plan: where stores and teachers lie.
            segment: its terms, and which of them have their targets on disk.
            recipe: its `seed`, `classes`, `model` and `training` hold; that of the segment's trajectory.
            group: the processes.

        Raises:
            ValueError: a store is missing or damaged, or made from other images or by another teacher than the rest.
        """
        self.recipe, self.terms, self.group = recipe, segment.terms, group
        self.settings = recipe["training"]
        self.checkpoint_blocks = plan.config.runtime.checkpoint_blocks
        self.half = AUTOCAST.get(self.settings["precision"])
        self.teachers = {
            name: load_teacher(plan, name).to(group.device, self._teacher_dtype()) for name in segment.teachers
        }
        self.cached = Cached(plan, segment)
        self.online = {kind: term for kind, term in segment.terms.items() if kind not in segment.cached}
        self.batches = self._batches(plan)
        self.identities = {"latents": self.batches.latents.identity}
        self.sources = {}
        for kind, term in segment.terms.items():
            name = term["teacher"]
            if kind in self.online:
                self.identities[f"teacher of {kind}"] = self.teachers[name].identity
                self.sources[kind] = "online"
            else:
                self.identities |= self.cached.inputs(name, kind)
                self.sources[kind] = f"cached, {self.cached.stores[name].identity}"

    def _teacher_dtype(self) -> torch.dtype | None:
        """Half precision on a GPU where the student uses it too; on a CPU autocast does that."""
        if self.settings["precision"] == "fp64":
            return torch.float64
        return self.half if self.group.device.type == "cuda" else None

    def _batches(self, plan: Plan) -> Batches:
        images = Store.of(plan.images) if self.teachers else None  # after the last stop nobody looks at the images
        targets = {name: (store, self.cached.fields[name]) for name, store in self.cached.stores.items()}
        return Batches.of(self.recipe, Store.of(plan.latents), images, targets=targets, t_min=t_min_of(self.terms))

    def learner(self) -> Learner:
        """A learner before its first step, on the device. Its optimiser holds no moments, and so no memory, yet."""
        widths = {name: teacher.width for name, teacher in self.teachers.items()}
        widths |= {name: width for name in self.cached.stores if (width := self.cached.width(name))}
        learner = new_learner(self.recipe, self.terms, widths, self.group.device)
        learner.model.checkpoint_blocks = self.checkpoint_blocks
        learner.model.own_logsumexp = self._logsumexp_works(learner)
        return learner

    def _logsumexp_works(self, learner: Learner) -> bool:
        """Whether the attention that is aligned can give the logsumexp of its logits on this machine."""
        layers = self.terms["attention"]["student_layers"] if "attention" in self.terms else ()
        taps = [learner.model.taps[f"attention.{layer}"] for layer in layers]
        widths = {tap.width // tap.heads for tap in taps if tap.heads}
        return bool(taps) and all(logsumexp_works(str(self.group.device), self.half, width) for width in widths)

    def objective(self, learner: Learner) -> Objective:
        """The losses of a learner's model and projectors, for the latents of this segment."""
        manifest = self.batches.latents.manifest
        scaling = {"scale": manifest["scale"], "shift": manifest["shift"]}
        return Objective(learner, self.terms, process=process_in(self.recipe), **scaling)

    def precision(self) -> AbstractContextManager[Any]:
        """What networks compute in: autocast in half precision, else as their parameters are."""
        return torch.autocast(self.group.device.type, self.half) if self.half else contextlib.nullcontext()

    def targets(self, batch: Batch) -> dict[str, TeacherTargets]:
        """What each teacher says of a batch's images, asked now or read with the batch."""
        with self.precision():
            seen = teacher_targets(self.teachers, self.online, batch.images)
            return self.cached.with_stored(seen, batch.targets)

    def negatives(self, seen: Sequence[Mapping[str, TeacherTargets]], rows: range, step: int) -> tuple[Tensor, Tensor]:
        """Tokens of the whole batch that features are compared with; see `gather_negatives`. Everybody must call it.

        Args:
            seen: `targets` of this process's microbatches, features (B, N, D) each.
            rows: this process's rows of the whole batch.
            step: steps done before this one.
        """
        teacher = self.terms["features"]["teacher"]
        features = [found for targets in seen if (found := targets[teacher].features) is not None]
        where = {"seed": self.recipe["seed"], "step": step, "size": self.settings["batch"], "group": self.group}
        return gather_negatives(torch.cat(features), rows, self.terms, **where)
