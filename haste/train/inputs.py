"""The opened inputs of a segment: latents and images, teachers and their stored targets, and the losses on them.

This file is independent of the optimiser, of earlier steps and of what is saved. The loop trains with `Inputs`, and
measures of a state open the same inputs for the terms that they need.

B images of a microbatch, N teacher tokens, D teacher width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from haste.align.losses import TeacherTargets
from haste.config import condition_in, process_in
from haste.data.batches import Batch, Batches
from haste.files.store import Store
from haste.models.attention import logsumexp_works
from haste.networks.devices import AUTOCAST, computing
from haste.plan.names import Segment
from haste.plan.plan import Plan
from haste.teachers.targets import Cached, load_teacher
from haste.train.distributed import Group
from haste.train.state import Learner, new_learner
from haste.train.step import Objective, bands_of, gather_negatives, teacher_targets


class Inputs:
    """The opened inputs of a segment.

    Attributes:
        recipe: of the trajectory.
        terms: the active alignment terms, with their settings.
        group: the ranks.
        batches: the batch of every step.
        teachers: name -> teacher, on the device; only those that run online.
        identities: `latents`, `flipped latents`, `teacher of TERM`, `components of TERM`, and what the condition looks
            up -> identity. Keyed by term, because the name of a teacher is the configuration's own choice.
        sources: term -> source of its targets: `online`, or `cached` and the identity of the store.
    """

    def __init__(self, plan: Plan, segment: Segment, recipe: Mapping[str, Any], group: Group):
        """
        Args:
            plan: where stores and teachers are.
            segment: its terms, and which of them have cached targets.
            recipe: of the segment's trajectory; `seed`, `classes`, `model` and `training` are used.
            group: the ranks.

        Raises:
            ValueError: a store is missing or damaged, or made from other images or by another teacher than the others.
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
        self.identities = {"latents": self.batches.latents.identity, **self.batches.condition.identities}
        if self.batches.flipped:
            self.identities["flipped latents"] = self.batches.flipped.identity
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
        """Half precision on a GPU if the student uses it too; on a CPU autocast handles this."""
        if self.settings["precision"] == "fp64":
            return torch.float64
        return self.half if self.group.device.type == "cuda" else None

    def _batches(self, plan: Plan) -> Batches:
        images = Store.of(plan.images) if self.teachers else None  # after the last stop no images are needed
        targets = {name: (store, self.cached.fields[name]) for name, store in self.cached.stores.items()}
        condition = condition_in(self.recipe).opened(plan)
        more: dict[str, Any] = {"targets": targets, "bands": bands_of(self.terms)}
        if self.settings.get("flip"):
            assert plan.flipped
            more["flipped"] = Store.of(plan.flipped)
        return Batches.of(self.recipe, Store.of(plan.latents), images, condition, **more)

    @property
    def widths(self) -> dict[str, int]:
        """Teacher -> width of the features that a term is aligned with."""
        widths = {name: teacher.width for name, teacher in self.teachers.items()}
        return widths | {name: width for name in self.cached.stores if (width := self.cached.width(name))}

    def learner(self) -> Learner:
        """A learner before its first step, on the device. Its optimiser has allocated no moments yet."""
        learner = new_learner(self.recipe, self.terms, self.widths, self.group.device)
        learner.model.checkpoint_blocks = self.checkpoint_blocks
        learner.model.precise_time = self.settings.get("time_dtype") == "fp32"
        learner.model.own_logsumexp = self._logsumexp_works(learner)
        return learner

    def _logsumexp_works(self, learner: Learner) -> bool:
        """Whether the aligned attention layers can return the logsumexp of their logits on this machine."""
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
        """Context for the networks' forward pass: autocast in half precision, else nothing."""
        return computing(self.settings["precision"], self.group.device)

    def targets(self, batch: Batch) -> dict[str, TeacherTargets]:
        """Targets of each teacher for a batch's images, computed now or read with the batch."""
        with self.precision():
            seen = teacher_targets(self.teachers, self.online, batch.images)
            return self.cached.with_stored(seen, batch.targets)

    def negatives(self, seen: Sequence[Mapping[str, TeacherTargets]], rows: range, step: int) -> tuple[Tensor, Tensor]:
        """Tokens of the whole batch as negatives; see `gather_negatives`. A collective call: all ranks must make it.

        Args:
            seen: `targets` of this rank's microbatches, features (B, N, D) each.
            rows: this rank's rows of the whole batch.
            step: steps done before this one.
        """
        teacher = self.terms["features"]["teacher"]
        features = [found for targets in seen if (found := targets[teacher].features) is not None]
        where = {"seed": self.recipe["seed"], "step": step, "size": self.settings["batch"], "group": self.group}
        return gather_negatives(torch.cat(features), rows, self.terms, **where)
