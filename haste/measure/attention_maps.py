"""Attention maps of a network and of a teacher beside one another: where a token looks, by pair of layers and t.

A map is the softmax over keys of a token's scaled logits, image tokens only, as the attention loss compares it (HASTE,
arXiv 2505.16792, Eq. 5): the network's queries and keys are brought to the teacher's grid, and the first heads of both
sides are compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from haste.config import ALIGNED_HEADS, LABEL, MAPPINGS, Config, Positive, Share, taps_of, teacher_shape
from haste.measure.measure import Measure, Row, Split
from haste.measure.pictures import SIDES, Column, Picture
from haste.networks.spec import blocks

if TYPE_CHECKING:
    from torch import Tensor

    from haste.measure.subject import Subject

FRAME = np.array([213, 94, 0], np.uint8)  # around the token whose map is shown

Layer = Annotated[int, Field(ge=0)]


class AttentionMaps(Measure):
    """See the file. Images, latent draws and noise are the same for every network; the condition is the null one.

    `row` is the cross-entropy of the shown maps, the network's against the teacher's, and `loss` that of all tokens'
    maps, which is the attention loss: means over images and shown heads.

    Attributes:
        teacher: by its name in the configuration; None is the only one. Its identity is part of the result's name.
        pairs: layers of the network and of the teacher, both counted from 0; None are those published for the model.
        t: times of the noised images, in [0, 1].
        heads: how many of the first heads are compared; None are as many as both sides have, 12 at most.
        head: shows one of them, from 0; None shows their mean.
        query: the token whose map is shown, its number on the teacher's grid, rows first; None is the middle one.
        images: number of random images; a row of the picture each.
        split: see `haste.measure.measure.Split`.
    """

    needs: ClassVar = frozenset({"teacher", "decoder"})
    distinct: ClassVar = ("t", "pairs")
    axes: ClassVar = ("layers", "t")
    values: ClassVar = {"row": "", "loss": ""}

    weights: Literal["model", "ema"] = "ema"
    teacher: Annotated[str | None, LABEL] = None
    pairs: Annotated[list[Annotated[list[Layer], Field(min_length=2, max_length=2)]], Field(min_length=1)] | None = None
    t: Annotated[list[Share], Field(min_length=1)] = [0.5]  # noqa: RUF012
    heads: Positive | None = None
    head: Layer | None = None
    query: Layer | None = None
    images: Annotated[int, Field(ge=1, le=16)] = 4
    split: Split = "held_out"

    @model_validator(mode="after")
    def _one_of_the_heads(self) -> AttentionMaps:
        if self.heads is not None and self.head is not None and self.head >= self.heads:
            raise ValueError(f"head {self.head} is none of the first {self.heads}, which are counted from 0")
        return self

    @property
    def least(self) -> Mapping[str, tuple[str, int]]:
        """See `Measure`."""
        return {self.split: ("images", self.images)}

    def unfit(self, config: Config, model: str) -> list[str]:
        """See `Measure`."""
        found, taps = super().unfit(config, model), taps_of(config, model)
        if not (known := blocks(taps, "attention")):
            return [*found, f"pairs: {model} has no attention to show"]
        if self.pairs is None and model not in MAPPINGS:
            return [*found, f"pairs: {model} has no published ones, expected layers of it and of the teacher, from 0"]
        pairs, name = self.pairs_of(model), self.teacher or next(iter(config.teachers), None)
        if beyond := [mine for mine, _ in pairs if mine not in known]:
            return [*found, f"pairs: {model} has no layers {beyond}, expected some of {known[0]} to {known[-1]}"]
        shape = teacher_shape(config.teachers[name]) if name in config.teachers else None
        if shape is not None and (beyond := [theirs for _, theirs in pairs if theirs >= shape[0]]):
            found.append(f"pairs: teacher {name} has no layers {beyond}, expected some of 0 to {shape[0] - 1}")
        most = min([taps[f"attention.{mine}"].heads or 0 for mine, _ in pairs] + ([shape[1]] if shape else []))
        for key, least in {"heads": self.heads or 1, "head": (self.head or 0) + 1}.items():
            if least > most:
                found.append(f"{key}: {getattr(self, key)}, but {model} and its teacher have {most} heads together")
        return found

    def flops(self, terms: int, forward: float, teachers: float) -> float:
        """See `Measure`: a forward pass at every t."""
        return self.images * len(self.t) * forward

    def pairs_of(self, model: str) -> list[list[int]]:
        """The pairs of layers for a model of this name."""
        return self.pairs or [list(pair) for pair in zip(*MAPPINGS[model][1:], strict=True)]

    def run(self, subject: Subject) -> Iterator[Row]:
        """See `Measure`: every rank computes everything, which is little."""
        import torch

        from haste.align.losses import attention_loss, resize_tokens
        from haste.measure import passes

        chosen = subject.batches(self.split).reading_indices(self.images, self.split)
        teacher, images = passes.teacher_and_images(subject, subject.what.teacher or "", self.split)
        pairs, grid = self.pairs_of(self._model(subject)), teacher.grid
        shown = torch.from_numpy(images.read("image", chosen)).to(subject.group.device)
        subject.inputs.identities["teacher"] = teacher.identity
        theirs = teacher(shown, features=False, attention=sorted({layer for _, layer in pairs})).attention
        query = (grid[0] // 2) * grid[1] + grid[1] // 2 if self.query is None else self.query
        if query >= grid[0] * grid[1]:
            raise ValueError(f"query: {query}, but {subject.what.teacher} has tokens 0 to {grid[0] * grid[1] - 1}")
        framed = [_framed(one, query, grid) for one in subject.decoded(self.split, chosen)]
        asked = {f"attention.{mine}" for mine, _ in pairs}
        for t, taps in passes.tapped(subject, self.split, chosen, self.t, asked):
            columns: list[Column] = [("image\nloss", framed)]
            for mine, layer in pairs:
                name = f"attention.{mine}"
                own = (resize_tokens(x, subject.model.taps[name].grid, grid) for x in taps[name][:2])
                q_s, k_s, q_t, k_t = self._shown(*own, *theirs[layer])
                student, teachers = rows(q_s.double(), k_s.double(), q_t.double(), k_t.double(), query)  # (B, H, N)
                row, least = (-float((teachers.exp() * other).sum(-1).mean()) for other in (student, teachers))
                loss = float(attention_loss(q_s, k_s, q_t, k_t))
                columns.append((f"student {mine}\n{row:.3f}", _coloured(student, grid)))
                columns.append((f"teacher {layer}\n{least:.3f}", _coloured(teachers, grid)))
                yield {"layers": f"student {mine}, teacher {layer}", "t": t, "row": row, "loss": loss}
            alt = self._alt(t, query, [heading for heading, _ in columns[1:]])
            subject.pictures.append(Picture.of(f"t {t:g}", alt, columns))

    def _model(self, subject: Subject) -> str:
        config, run = subject.plan.config, subject.what.run
        return (config.runs.get(run) or config.evaluate[run]).model

    def _shown(self, *pair: Tensor) -> tuple[Tensor, ...]:
        """Of (q, k) of both sides, (B, H, N, K) each, the shown heads."""
        most = min(ALIGNED_HEADS if self.heads is None else self.heads, *(x.shape[1] for x in pair))
        if max(self.head or 0, (self.heads or 1) - 1) >= most:
            raise ValueError(f"heads {self.heads}, head {self.head}: expected some of 0 to {most - 1}")
        heads = slice(most) if self.head is None else slice(self.head, self.head + 1)
        return tuple(x[:, heads] for x in pair)

    def _alt(self, t: float, query: int, columns: Sequence[str]) -> str:
        what = "the mean over heads" if self.head is None else f"head {self.head}"
        maps = "; ".join(column.replace("\n", " with cross-entropy ") for column in columns)
        shown = f"Attention of token {query} of {self.images} images at t {t:g}, {what}, a row an image"
        return f"{shown}: the image, {maps}"


def rows(q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, query: int) -> tuple[Tensor, Tensor]:
    """The logarithms of two attention maps' rows of one token, (B, H, N) each, with logits K^(-1/2) q k^T.

    q_s, k_s (B, H, N, K_s) and q_t, k_t (B, H, N, K_t), without a map of all tokens.
    """
    logits = ((q[:, :, query, None] * q.shape[-1] ** -0.5 * k).sum(-1) for q, k in ((q_s, k_s), (q_t, k_t)))
    student, teacher = (x.log_softmax(dim=-1) for x in logits)
    return student, teacher


def _coloured(logarithms: Tensor, grid: tuple[int, int]) -> list[NDArray[np.uint8]]:
    """The mean over heads of maps (B, H, N) as colours, (h, w, 3) an image, whose largest value is the brightest."""
    from matplotlib import colormaps

    maps = logarithms.exp().mean(dim=1).cpu().numpy()  # (B, N)
    colours = colormaps["viridis"](maps / maps.max(axis=1, keepdims=True), bytes=True)[..., :3]
    return list(colours.reshape(len(maps), *grid, 3))


def _framed(image: NDArray[np.uint8], query: int, grid: tuple[int, int]) -> NDArray[np.uint8]:
    """An image (R, R, 3), enlarged if it is small, with a frame around a token."""
    image = image.repeat(-(-SIDES[0] // len(image)), axis=0).repeat(-(-SIDES[0] // len(image)), axis=1)
    wide, inside = len(image) // 32, np.zeros(image.shape[:2], bool)
    (top, bottom), (left, right) = (
        (len(image) * place // count, len(image) * (place + 1) // count)
        for place, count in zip(divmod(query, grid[1]), grid, strict=True)
    )
    inside[top:bottom, left:right] = True
    inside[top + wide : bottom - wide, left + wide : right - wide] = False
    return np.where(inside[..., None], FRAME, image)
