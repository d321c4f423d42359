"""One training step: the losses, and what follows from them.

B batch, N student tokens, D student width, C latent channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from haste.align.losses import attention_loss, feature_loss, resize_tokens
from haste.data.batches import Batch
from haste.data.latents import draw
from haste.diffusion.paths import PATHS, interpolate, timestep_uniform
from haste.train.state import Learner

if TYPE_CHECKING:
    from haste.teachers.encoder import Teacher
    from haste.teachers.targets import TeacherTargets

Terms = Mapping[str, Mapping[str, Any]]


def taps_of(terms: Terms) -> set[str]:
    """Names of the student's inner values that the active terms look at; none when none is active."""
    taps = set()
    if "features" in terms:
        taps.add(f"tokens.{terms['features']['depth']}")
    if "attention" in terms:
        taps |= {f"attention.{layer}" for layer in terms["attention"]["student_layers"]}
    return taps


def look(teachers: Mapping[str, Teacher], terms: Terms, images: Tensor | None) -> dict[str, TeacherTargets]:
    """What each teacher says of the clean images, asked once for all of these terms that it serves."""
    seen: dict[str, TeacherTargets] = {}
    if images is None:
        assert not teachers
        return seen
    for name, teacher in teachers.items():
        wants = {kind: term for kind, term in terms.items() if term["teacher"] == name}
        layers = wants["attention"]["teacher_layers"] if "attention" in wants else ()
        seen[name] = teacher(images, features="features" in wants, attention=layers)
    return seen


class Objective(nn.Module):
    """Model and projectors under one roof, so that whatever wraps them (DDP, a compiler) sees one forward."""

    def __init__(self, learner: Learner, terms: Terms, *, path: str, scale: float, shift: float):
        """
        Args:
            learner: whose model and projectors are used.
            terms: active alignment terms with their layers and weights.
            path: name of the interpolant.
            scale: scaling factor of the latents; with `shift`, z = (mean + std n - shift) scale.
            shift: see `scale`.
        """
        super().__init__()
        self.model, self.projectors = learner.model, learner.projectors
        self.terms, self.taps = terms, taps_of(terms)
        self.path, self.scale, self.shift = PATHS[path], scale, shift

    def forward(self, batch: Batch, targets: Mapping[str, TeacherTargets]) -> dict[str, Tensor]:
        """The loss terms, unweighted: `denoising`, and `features` and `attention` where active.

        Args:
            batch: see `Batch`.
            targets: `look` at the batch's images, or what lies on disk of them.
        """
        dtype = next(self.model.parameters()).dtype
        z = draw(batch.moments, batch.draw, self.scale, self.shift).to(dtype)
        t = timestep_uniform(batch.t).to(dtype)
        x_t, velocity = interpolate(self.path, z, batch.noise.to(dtype), t)
        predicted, taps = self.model(x_t, t, batch.labels, taps=self.taps)
        # SiT Eq. 2 with the velocity as target; every sample has as many entries, so one mean serves.
        error = predicted.to(torch.promote_types(predicted.dtype, torch.float32)) - velocity
        found = {"denoising": error.square().mean()}
        if "features" in self.terms:
            seen = targets[self.terms["features"]["teacher"]]
            assert seen.features is not None
            tokens = resize_tokens(taps[f"tokens.{self.terms['features']['depth']}"], self.model.grid, seen.grid)
            found["features"] = feature_loss(self.projectors["features"](tokens), seen.features)
        if "attention" in self.terms:
            found["attention"] = self._attention(taps, targets[self.terms["attention"]["teacher"]])
        return found

    def _attention(self, taps: Mapping[str, Any], seen: TeacherTargets) -> Tensor:
        term, values = self.terms["attention"], []
        for student, teacher in zip(term["student_layers"], term["teacher_layers"], strict=True):
            tap = taps[f"attention.{student}"]
            q, k = (resize_tokens(x, self.model.grid, seen.grid) for x in (tap.q, tap.k))
            logsumexp = tap.logsumexp if self.model.grid == seen.grid else None  # of these logits, not of resized ones
            pair = (q, k, *seen.attention[teacher])
            values.append(attention_loss(*pair, heads=term["heads"], logsumexp_s=logsumexp))
        return torch.stack(values).mean()


def total_loss(found: Mapping[str, Tensor], terms: Terms) -> Tensor:
    """L = L_denoising + sum of weight * L_term (HASTE, Eq. 7)."""
    total = found["denoising"]
    for kind, term in terms.items():
        total = total + term["weight"] * found[kind]
    return total


def update(learner: Learner, *, clip: float | None, ema: float, skip: bool) -> Tensor:
    """Clip the gradients, optimise, average. Returns the gradient's norm before clipping. Nothing waits for a GPU.

    Args:
        learner: holds the gradients, multiplied by its scaler's scale.
        clip: largest norm of all gradients together; None for any.
        ema: decay of the average.
        skip: leave the parameters alone in a step whose gradient is not finite. (fp16 always does: its scaler then
            lowers the scale.)
    """
    learner.scaler.unscale_(learner.optimizer)
    parameters = list(learner.parameters().values())
    norm = nn.utils.clip_grad_norm_(parameters, clip if clip is not None else float("inf"))
    if skip and not learner.scaler.is_enabled():
        # The fused optimiser's own switch, meant for scalers: it is read on the device.
        learner.optimizer.grad_scale, learner.optimizer.found_inf = None, (~norm.isfinite()).float()  # type: ignore
    learner.scaler.step(learner.optimizer)
    learner.scaler.update()
    learner.optimizer.zero_grad(set_to_none=True)
    average(learner, ema)
    return norm


@torch.no_grad()
def average(learner: Learner, decay: float) -> None:
    """ema <- decay * ema + (1 - decay) * model, for all parameters at once."""
    into: list[Tensor] = list(learner.ema.parameters())
    torch._foreach_lerp_(into, [p.detach() for p in learner.model.parameters()], 1.0 - decay)
