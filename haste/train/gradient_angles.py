"""Cosines between the gradients of alignment and denoising, of any network, and during training without affecting it.

The losses are those of training, in its precision; during training they are of the raw weights, not of their
average. Images, latent draws and noise are the same at every reading, no label is dropped, and each image is used at
every requested time. `torch.autograd.grad` returns the gradients, so a parameter's `.grad` is not set and DDP's hooks
are not called.

M images, S groups of them, T times, L losses, P parameters of a block, W ranks.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from haste.align import angle as angles
from haste.align.losses import TeacherTargets
from haste.align.triggers import Angle, block_of, counting
from haste.data.batches import Batch
from haste.train.inputs import Inputs
from haste.train.step import Objective, draws_negatives, gather_negatives, weight_of

#: (The objective's terms of a batch, t) -> the losses whose gradients are compared.
Losses = Callable[[Mapping[str, Tensor], float], list[Tensor]]

CHUNK = 2**18  # parameters of a block whose inner products are taken at once, in float64


class Gradients:
    """Gradients of losses with respect to blocks of the network, as a table of their inner products."""

    def __init__(self, objective: Objective, inputs: Inputs, *, part: int, scale: Callable[[Tensor], Tensor]):
        """
        Args:
            objective: the losses, not wrapped.
            inputs: images, teachers and precision to measure with; each rank takes its share of the images.
            part: images per forward pass.
            scale: scales a loss, so that small gradients do not underflow in fp16. A cosine does not depend on it.
        """
        self.objective, self.inputs, self.part, self.scale = objective, inputs, part, scale
        self.batches, self.group = inputs.batches, inputs.group

    def products(
        self, losses: Losses, count: int, *, images: int, shards: int, times: Sequence[float], blocks: Sequence[int]
    ) -> NDArray[np.float64]:
        """Inner products of the groups' gradients of L losses, (T, blocks, L, S, L, S). A collective call.

        Args:
            losses: (the objective's terms of a batch, t) -> L losses, means over the batch.
            count: L, the number of losses.
            images: M, random training images, the same at every call; all of them if there are fewer.
            shards: S, groups of images; at most the number of images.
            times: each image is used at each of them.
            blocks: whose parameters the gradients are with respect to, counted from 1.
        """
        indices = self.batches.reading_indices(images)
        negatives = self._negatives(indices)
        parameters = [_parameters(self.objective, block) for block in blocks]
        groups = min(shards, len(indices))
        kept: list[list[Tensor]] = [[] for _ in blocks]  # by block and group: this rank's part of P, (T, L, P / W)
        for number in range(groups):
            rows = _share(range(len(indices)), number, groups)
            sums = self._sums(indices, rows, (losses, count), times, parameters, negatives)
            for mine, summed in zip(kept, sums, strict=True):
                own = _share(range(summed.shape[-1]), self.group.rank, self.group.size)
                mine.append(summed[..., own.start : own.stop].to(parameters[0][0].dtype, copy=True))
        found = torch.stack([_inner(mine) for mine in kept], dim=1)  # (T, blocks, L S, L S)
        products = self.group.total(found).cpu().numpy()
        return products.reshape(*products.shape[:2], count, groups, count, groups)

    def _sums(
        self,
        indices: NDArray[np.int64],
        rows: range,
        losses: tuple[Losses, int],
        times: Sequence[float],
        blocks: Sequence[Sequence[Tensor]],
        negatives: tuple[Tensor, Tensor] | None,
    ) -> list[Tensor]:
        """Gradients summed over a group of images and over ranks: for each block (T, L, P) float64."""
        parameters = [parameter for block in blocks for parameter in block]
        sizes = [sum(parameter.numel() for parameter in block) for block in blocks]
        compared, count = losses
        sums = torch.zeros(len(times), count, sum(sizes), dtype=torch.float64, device=self.group.device)
        for batch, seen in self._looked_at(indices, _share(rows, self.group.rank, self.group.size)):
            for place, t in enumerate(times):
                now = dataclasses.replace(batch, t=torch.full_like(batch.t, self.objective.process.place(t)))
                with self.inputs.precision():
                    found = self.objective(now, seen, negatives)
                mine = compared(found, t)
                for which in range(count):  # popping the last reference to a loss frees its graph
                    sums[place, which] += _gradient(self.scale(mine.pop(0) * len(batch.t)), parameters)
        return list(self.group.total(sums).split(sizes, dim=-1))

    def _looked_at(self, indices: NDArray[np.int64], rows: range) -> Iterator[tuple[Batch, dict[str, TeacherTargets]]]:
        """Some of the images in parts, with the teachers' targets of them."""
        for low in range(0, len(rows), self.part):
            batch = self.batches.measured(indices, rows[low : low + self.part]).to(self.group.device)
            yield batch, self.inputs.targets(batch)

    def _negatives(self, indices: NDArray[np.int64]) -> tuple[Tensor, Tensor] | None:
        """Negatives, if training takes them from its whole batch: tokens of the first images, as many as in a batch."""
        terms = self.objective.terms
        if not draws_negatives(terms):
            return None
        teacher, size = terms["features"]["teacher"], min(self.batches.size, len(indices))
        rows = _share(range(size), self.group.rank, self.group.size)
        looked = self._looked_at(indices, rows or range(1))  # a rank without rows still needs their width
        features = torch.cat([f for _, seen in looked if (f := seen[teacher].features) is not None])[: len(rows)]
        return gather_negatives(features, rows, terms, seed=self.batches.seed, step=0, size=size, group=self.group)


@dataclasses.dataclass(frozen=True)
class Pass:
    """What one pass over the images measures: these terms together, at each of the blocks and times."""

    done: int
    images: int
    shards: int
    terms: tuple[str, ...]
    times: tuple[float, ...]
    blocks: tuple[int, ...]


class Angles:
    """The angles that triggers request. A request that several of them make at one step is measured once."""

    def __init__(self, objective: Objective, inputs: Inputs, *, compiled: bool, **how: Any):
        """
        Args:
            objective: the losses, not wrapped.
            inputs: of training.
            compiled: whether the networks are compiled. Measuring runs them uncompiled: other batch sizes would cause
                recompilation, and training might then use the code compiled for these sizes.
            how: as `Gradients`.
        """
        self.objective, self.compiled = objective, compiled
        self.gradients = Gradients(objective, inputs, **how)
        self.known: dict[Pass, NDArray[np.float64]] = {}

    def values(self, done: int, kind: str, asked: Mapping[str, Angle]) -> dict[str, float]:
        """The angles that a trigger needs, by its names for them. A collective call.

        Args:
            done: steps done. Terms and weights are those of the last step.
            kind: the term that the trigger watches.
            asked: the requests, by name.
        """
        found, alike = {}, dict[tuple[int, int, str], dict[str, Angle]]()
        for name, one in asked.items():
            alike.setdefault((one.images, one.shards, one.of), {})[name] = one
        for (images, shards, of), mine in alike.items():
            terms = (kind,) if of == "own" else tuple(self.objective.terms)
            default = (block_of({name: self.objective.terms[name] for name in terms}),)
            times = sorted({t for one in mine.values() for t in one.times})
            blocks = sorted({block for one in mine.values() for block in one.block or default})
            products = self._once(Pass(done, images, shards, terms, tuple(times), tuple(blocks)))
            cosines, left_out = angles.cosines(products)  # (T, blocks) and (T, blocks, S)
            for name, one in mine.items():
                at = np.ix_([times.index(t) for t in one.times], [blocks.index(b) for b in one.block or default])
                error = one.error
                found[name] = angles.jackknife(left_out[at].mean(axis=(0, 1))) if error else float(cosines[at].mean())
        return found

    def _once(self, asked: Pass) -> NDArray[np.float64]:
        if asked not in self.known:
            self.known = {other: products for other, products in self.known.items() if other.done == asked.done}
            plainly = torch.compiler.set_stance("force_eager") if self.compiled else contextlib.nullcontext()
            with plainly:
                self.known[asked] = self._products(asked)
        return self.known[asked]

    def _products(self, asked: Pass) -> NDArray[np.float64]:
        """Inner products of the groups' gradients, (T, blocks, 2, S, 2, S): alignment first, denoising second."""

        def losses(found: Mapping[str, Tensor], t: float) -> list[Tensor]:
            """Alignment, with the weights of the last step and without terms that do not count at t; and denoising."""
            place = self.objective.process.place
            counts = counting({kind: self.objective.terms[kind] for kind in asked.terms}, t, place)
            weighed = [weight_of(term, asked.done - 1) * found[kind] for kind, term in counts.items()]
            return [torch.stack(weighed).sum(), found["denoising"]]

        images = {"images": asked.images, "shards": asked.shards}
        return self.gradients.products(losses, 2, times=asked.times, blocks=asked.blocks, **images)


def _share(whole: range, part: int, parts: int) -> range:
    """One of a number of nearly equal parts, whose sizes differ by at most one."""
    return whole[len(whole) * part // parts : len(whole) * (part + 1) // parts]


def _parameters(objective: Objective, block: int) -> list[Tensor]:
    return [p for p in objective.model.block_list[block - 1].parameters() if p.requires_grad]


def _gradient(loss: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """(P,), 0 where the loss does not depend on a parameter."""
    found = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in found])


def _inner(groups: Sequence[Tensor]) -> Tensor:
    """S tensors (T, L, P) -> their inner products, (T, L S, L S) float64, computed over pieces of P."""
    times, losses, size = groups[0].shape
    found = groups[0].new_zeros(times, losses * len(groups), losses * len(groups), dtype=torch.float64)
    for low in range(0, size, CHUNK):
        piece = torch.stack([one[..., low : low + CHUNK] for one in groups], dim=2).double().flatten(1, 2)
        found += piece @ piece.mT
    return found
