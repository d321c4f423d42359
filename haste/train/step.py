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
from haste.models.sit import SiT
from haste.train.state import Learner

if TYPE_CHECKING:
    from haste.teachers.encoder import Teacher, TeacherTargets

Terms = Mapping[str, Mapping[str, Any]]


def taps_of(terms: Terms) -> set[str]:
    """Names of the student's inner values that the active terms look at; none when none is active."""
    taps = set()
    if "features" in terms:
        taps.add(f"tokens.{terms['features']['depth']}")
    if "attention" in terms:
        taps |= {f"attention.{layer}" for layer in terms["attention"]["student_layers"]}
    return taps


def look(teachers: Mapping[str, Teacher], terms: Terms, images: Tensor) -> dict[str, TeacherTargets]:
    """What each teacher says of the clean images, asked once for all the terms that it serves."""
    seen = {}
    for name, teacher in teachers.items():
        wants = {kind: term for kind, term in terms.items() if term["teacher"] == name}
        layers = wants["attention"]["teacher_layers"] if "attention" in wants else ()
        seen[name] = teacher(images, features="features" in wants, attention=layers)
    return seen


def losses(
    model: SiT,
    projectors: nn.ModuleDict,
    batch: Batch,
    terms: Terms,
    targets: Mapping[str, TeacherTargets],
    *,
    path: str,
    scale: float,
    shift: float,
) -> dict[str, Tensor]:
    """The loss terms of one batch, unweighted: `denoising`, and `features` and `attention` where active.

    Args:
        model: called as (x_t, t, labels, taps).
        projectors: heads by term.
        batch: see `Batch`.
        terms: active alignment terms with their layers and weights.
        targets: `look` at the batch's images.
        path: name of the interpolant.
        scale: scaling factor of the latents; with `shift`, z = (mean + std n - shift) scale.
        shift: see `scale`.
    """
    z = draw(batch.moments, batch.draw, scale, shift)
    t = timestep_uniform(batch.t)
    x_t, velocity = interpolate(PATHS[path], z, batch.noise, t)
    predicted, taps = model(x_t, t, batch.labels, taps=taps_of(terms))
    # SiT Eq. 2 with the velocity as target; every sample has as many entries, so one mean serves.
    found = {"denoising": (predicted.float() - velocity).square().mean()}
    if "features" in terms:
        term = terms["features"]
        seen = targets[term["teacher"]]
        assert seen.features is not None
        tokens = resize_tokens(taps[f"tokens.{term['depth']}"], model.grid, seen.grid)
        found["features"] = feature_loss(projectors["features"](tokens), seen.features)
    if "attention" in terms:
        term = terms["attention"]
        found["attention"] = _attention(taps, model.grid, targets[term["teacher"]], term)
    return found


def _attention(taps: Mapping[str, Any], grid: tuple[int, int], seen: TeacherTargets, term: Mapping[str, Any]) -> Tensor:
    pairs = list(zip(term["student_layers"], term["teacher_layers"], strict=True))
    total = torch.zeros(())
    for student, teacher in pairs:
        q, k = (resize_tokens(x, grid, seen.grid) for x in taps[f"attention.{student}"])
        total = total + attention_loss(q, k, *seen.attention[teacher], heads=term["heads"])
    return total / len(pairs)


def total_loss(found: Mapping[str, Tensor], terms: Terms) -> Tensor:
    """L = L_denoising + sum of weight * L_term (HASTE, Eq. 7)."""
    total = found["denoising"]
    for kind, term in terms.items():
        total = total + term["weight"] * found[kind]
    return total


def update(learner: Learner, loss: Tensor, *, clip: float | None, ema: float) -> Tensor:
    """Backward, clip, optimise, average. Returns the gradient's norm before clipping."""
    loss.backward()
    parameters = list(learner.parameters().values())
    norm = nn.utils.clip_grad_norm_(parameters, clip if clip is not None else float("inf"))
    learner.optimizer.step()
    learner.optimizer.zero_grad(set_to_none=True)
    average(learner, ema)
    return norm


@torch.no_grad()
def average(learner: Learner, decay: float) -> None:
    """ema <- decay * ema + (1 - decay) * model, for all parameters at once."""
    into: list[Tensor] = list(learner.ema.parameters())
    torch._foreach_lerp_(into, [p.detach() for p in learner.model.parameters()], 1.0 - decay)
