"""One training step: the losses and the update.

B batch, N student tokens, D student width, C latent channels.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from haste.align import schedule
from haste.align.losses import (
    Negatives,
    TeacherTargets,
    attention_loss,
    contrastive_loss,
    feature_loss,
    normalised_over_tokens,
    resize_tokens,
)
from haste.align.terms import kind_of, of_features
from haste.config import TERMS
from haste.data import order
from haste.data.batches import Batch
from haste.data.latents import draw
from haste.diffusion.process import Process
from haste.networks.devices import sent
from haste.networks.spec import each
from haste.train.distributed import Group
from haste.train.state import Learner

if TYPE_CHECKING:
    from haste.teachers.encoder import Teacher

Terms = Mapping[str, Mapping[str, Any]]


def taps_of(terms: Terms) -> set[str]:
    """Names of the student's taps that the active terms need; empty if none is active."""
    taps = {f"tokens.{term['depth']}" for term in of_features(terms).values()}
    if "attention" in terms:
        taps |= {f"attention.{layer}" for layer in terms["attention"]["student_layers"]}
    return taps


def bands_of(terms: Terms) -> dict[str, tuple[float, float]]:
    """Term -> the first and the last time at which a sample counts for it, for terms that ignore some times."""
    bands = {kind: (term.get("t_min", 0.0), term.get("t_max", 1.0)) for kind, term in terms.items()}
    return {kind: band for kind, band in bands.items() if band != (0.0, 1.0)}


def feature_target(features: Tensor, term: Mapping[str, Any]) -> Tensor:
    """What a feature term compares with, from its teacher's features (B, N, D): these, or normalised if it asks so."""
    return normalised_over_tokens(features, term["normalise_factor"]) if term.get("normalise") else features


def draws_negatives(terms: Terms) -> bool:
    """Whether a term draws negatives from tokens of the whole batch."""
    return terms.get("features", {}).get("negatives") == "batch"


def gather_negatives(
    features: Tensor, rows: range, terms: Terms, *, seed: int, step: int, size: int, group: Group
) -> tuple[Tensor, Tensor]:
    """Teacher features of some tokens of the whole batch: (M, D), and their indices, (M,) int64.

    The choice depends only on seed and step, so all ranks choose the same tokens. Each rank puts its own into a tensor
    of zeros; the sum over ranks contains all of them exactly.

    Args:
        features: (B, N, D) of this rank's rows, in order, as the teacher gives them.
        rows: this rank's rows of the whole batch.
        terms: the active terms.
        seed: of the run.
        step: steps done before this one.
        size: samples in the whole batch.
        group: the ranks.
    """
    features, tokens = feature_target(features, terms["features"]), features.shape[1]
    count = terms["features"]["negative_count"]
    places = sent(torch.from_numpy(order.choice(seed, "negatives", step, count, size * tokens)), features.device)
    row, token = places // tokens - rows.start, places % tokens
    mine = (row >= 0) & (row < len(rows))
    found = features.detach()[row.clamp(0, len(rows) - 1), token]
    return group.total(torch.where(mine[:, None], found, torch.zeros_like(found))), places


def teacher_targets(teachers: Mapping[str, Teacher], terms: Terms, images: Tensor | None) -> dict[str, TeacherTargets]:
    """Outputs of each teacher for the clean images, with one forward pass for all the terms it serves."""
    seen: dict[str, TeacherTargets] = {}
    if images is None:
        assert not teachers
        return seen
    for name, teacher in teachers.items():
        wants = {kind_of(which): term for which, term in terms.items() if term["teacher"] == name}  # one a kind
        layers = wants["attention"]["teacher_layers"] if "attention" in wants else ()
        layer = wants.get("features", {}).get("layer")
        seen[name] = teacher(images, features="features" in wants, layer=layer, attention=layers)
    return seen


class Objective(nn.Module):
    """Model and projectors in one module, so that a wrapper (DDP, a compiler) sees one forward pass."""

    def __init__(self, learner: Learner, terms: Terms, *, process: Process, scale: float, shift: float):
        """
        Args:
            learner: whose model and projectors are used.
            terms: active alignment terms with their layers and weights.
            process: what the network predicts, and the loss of the prediction.
            scale: scaling factor of the latents; with `shift`, z = (mean + std n - shift) scale.
            shift: see `scale`.
        """
        super().__init__()
        self.model, self.projectors = learner.model, learner.projectors
        self.terms, self.taps = terms, taps_of(terms)
        self.process, self.scale, self.shift = process, scale, shift

    def forward(
        self,
        batch: Batch,
        targets: Mapping[str, TeacherTargets],
        negatives: tuple[Tensor, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """The unweighted loss terms: `denoising`, the active alignment terms by name, and the other losses of the
        process, which are only logged.

        Args:
            batch: see `Batch`.
            targets: `teacher_targets` of the batch's images, or the stored ones.
            negatives: `gather_negatives`, if the features are compared with tokens of the whole batch.
        """
        predicted, taps, truth = self.predicted(batch, batch.t)
        found = self._denoising(self.process.losses(predicted, *truth))
        for name, term in of_features(self.terms).items():
            found[name] = self._features(name, taps, targets[term["teacher"]], batch, negatives)
        if "attention" in self.terms:
            seen = targets[self.terms["attention"]["teacher"]]
            found["attention"] = self.attention(taps, seen, batch.weights.get("attention"))
        return found

    def denoising(self, batch: Batch, t: Tensor) -> Tensor:
        """The denoising loss of each sample of a batch, (B,) float64, at times t (B,) in [0, 1] instead of its own."""
        predicted, _, truth = self.predicted(batch, t)
        each_one = zip(*(piece.split(1) for piece in (predicted, *truth)), strict=True)  # a process gives means
        return torch.stack([self._denoising(self.process.losses(*one))["denoising"].double() for one in each_one])

    def predicted(self, batch: Batch, t: Tensor) -> tuple[Tensor, Mapping[str, Any], tuple[Tensor, Tensor, Tensor]]:
        """The network's output at x_t, at times t (B,) in [0, 1], in float32 or float64; its taps; and latents, noise
        and times."""
        dtype = next(self.model.parameters()).dtype
        z = draw(batch.moments, batch.draw, self.scale, self.shift).to(dtype)
        noise, t = batch.noise.to(dtype), t.to(dtype)
        x_t = self.process.noised(z, noise, t)
        told = each(lambda piece: piece.to(dtype) if piece.is_floating_point() else piece, batch.condition)
        predicted, taps = self.model(x_t, self.process.time(t), told, taps=self.taps)
        return predicted.to(torch.promote_types(predicted.dtype, torch.float32)), taps, (z, noise, t)

    def _denoising(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The process's losses; only `denoising` is trained."""
        if "denoising" not in parts or not TERMS.keys().isdisjoint(map(kind_of, parts)):
            found = f"{type(self.process).__name__}: its losses are {', '.join(parts) or 'none'}"
            raise ValueError(f"{found}; expected denoising, and not {', '.join(TERMS)}")
        return {name: value if name == "denoising" else value.detach() for name, value in parts.items()}

    def _features(
        self,
        name: str,
        taps: Mapping[str, Any],
        seen: TeacherTargets,
        batch: Batch,
        negatives: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        term, weights = self.terms[name], batch.weights.get(name)
        assert seen.features is not None
        tokens, target = self.tokens(name, taps, seen), feature_target(seen.features, term)
        projected = self.projectors[name](tokens, seen.grid)
        if term.get("similarity", "cosine") == "cosine":
            return feature_loss(projected, target, weights)
        others = None
        if negatives is not None:
            assert batch.rows is not None
            others = Negatives(*negatives, rows=batch.rows)
        return contrastive_loss(projected, target, term["temperature"], others, weights)

    def tokens(self, name: str, taps: Mapping[str, Any], seen: TeacherTargets) -> Tensor:
        """The tokens that a term aligns with features, (B, N, D) on the teacher's grid, before the projector."""
        tap = f"tokens.{self.terms[name]['depth']}"
        return resize_tokens(taps[tap], self.model.taps[tap].grid, seen.grid)

    def attention(self, taps: Mapping[str, Any], seen: TeacherTargets, weights: Tensor | None = None) -> Tensor:
        """The attention loss, the mean over its pairs of layers."""
        term, values = self.terms["attention"], []
        for student, teacher in zip(term["student_layers"], term["teacher_layers"], strict=True):
            tap, grid = taps[f"attention.{student}"], self.model.taps[f"attention.{student}"].grid
            q, k = (resize_tokens(x, grid, seen.grid) for x in (tap.q, tap.k))
            logsumexp = tap.logsumexp if grid == seen.grid else None  # of these logits, not of resized ones
            pair = (q, k, *seen.attention[teacher])
            values.append(attention_loss(*pair, heads=term["heads"], logsumexp_s=logsumexp, weights=weights))
        return torch.stack(values).mean()


def weight_of(term: Mapping[str, Any], step: int) -> float:
    """A term's weight after `step` steps."""
    return term["weight"] * schedule.factor(step, term)


def total_loss(found: Mapping[str, Tensor], terms: Terms, step: int) -> Tensor:
    """L = L_denoising + sum of weight * L_term (HASTE, Eq. 7), with the weights after `step` steps."""
    total = found["denoising"]
    for kind, term in terms.items():
        total = total + weight_of(term, step) * found[kind]
    return total


def update(learner: Learner, *, clip: float | None, ema: float, skip: bool) -> Tensor:
    """Clip the gradients, step the optimiser, update the average. Does not wait for the GPU.

    Returns the gradient's norm before clipping.

    Args:
        learner: holds the gradients, multiplied by its scaler's scale.
        clip: largest norm of all gradients together; None for no limit.
        ema: decay of the average.
        skip: leave the parameters unchanged in a step whose gradient is not finite. (fp16 always does; its scaler then
            lowers the scale.)
    """
    learner.scaler.unscale_(learner.optimizer)
    parameters = list(learner.parameters().values())
    norm = nn.utils.clip_grad_norm_(parameters, clip if clip is not None else float("inf"))
    if skip and not learner.scaler.is_enabled():
        # The fused optimiser's own flag, intended for scalers; it is read on the device.
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


def __getattr__(name: str) -> Any:
    if name == "look":
        warnings.warn("haste.train.step.look is teacher_targets now; the old name will go", FutureWarning, stacklevel=2)
        return teacher_targets
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
