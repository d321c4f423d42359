"""The contents of a cache of teacher targets, its size, and settings that would fit. No torch.

B bytes, N patch tokens, D width of the features, H heads, K head width, P principal components.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

from haste.align.terms import kind_of
from haste.files.units import readable

DTYPE = "float16"
BYTES = 2  # per number of DTYPE


@dataclasses.dataclass(frozen=True)
class Shape:
    """What determines the size of a teacher's targets: tokens N, width D and heads H."""

    tokens: int
    width: int
    heads: int
    depth: int


@dataclasses.dataclass(frozen=True)
class TargetSpec:
    """The targets of one teacher that the runs need: features, and queries and keys of the first heads of layers.

    layers: whose features, the last layer as None before others in order; attention: (layer, heads) pairs in order of
    layers. These are counted from 0.
    """

    layers: tuple[int | None, ...] = ()
    attention: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, kind: str, term: Mapping[str, Any]) -> TargetSpec:
        """The needs of one alignment term; kind: its name."""
        if kind_of(kind) == "features":
            return cls((term.get("layer"),))
        return cls(attention=tuple((layer, term["heads"]) for layer in sorted(set(term["teacher_layers"]))))

    @classmethod
    def read(cls, recipe: Mapping[str, Any]) -> TargetSpec:
        """The contents of a store, from its recipe."""
        pairs = sorted((int(layer), int(heads)) for layer, heads in (recipe.get("attention") or {}).items())
        last = [None] if recipe.get("features") else []
        return cls((*last, *recipe.get("layers", ())), tuple(pairs))

    def recipe(self) -> dict[str, Any]:
        """The entries of a store's recipe."""
        others = [layer for layer in self.layers if layer is not None]
        found = {"features": None in self.layers, "attention": {str(layer): heads for layer, heads in self.attention}}
        return {**found, "layers": others} if others else found

    def __or__(self, other: TargetSpec) -> TargetSpec:
        layers = dict(self.attention)
        for layer, heads in other.attention:
            layers[layer] = max(heads, layers.get(layer, 0))
        features = sorted({*self.layers, *other.layers}, key=lambda layer: -1 if layer is None else layer)
        return TargetSpec(tuple(features), tuple(sorted(layers.items())))

    def covers(self, other: TargetSpec) -> bool:
        """Whether a store with this content can be used where the other is needed."""
        return self | other == self

    @property
    def fields(self) -> list[str]:
        """The store's fields."""
        names = [f"{what}.{layer}" for layer, _ in self.attention for what in ("queries", "keys")]
        return [*map(features_of, self.layers), *names]

    def layout(self, shape: Shape, pca: int | None) -> dict[str, tuple[tuple[int, ...], str]]:
        """Field -> (shape of an image's row, dtype): features (N, D), or (N, P) with P = pca; queries, keys (H, N, K).

        Raises:
            ValueError: more heads are needed than the teacher has.
        """
        found: dict[str, tuple[int, ...]] = {
            features_of(layer): (shape.tokens, pca or shape.width) for layer in self.layers
        }
        for layer, heads in self.attention:
            if heads > shape.heads:
                raise ValueError(f"cache: {heads} heads of layer {layer} asked for, the teacher has {shape.heads}")
            for what in ("queries", "keys"):
                found[f"{what}.{layer}"] = (heads, shape.tokens, shape.width // shape.heads)
        return {name: (row, DTYPE) for name, row in found.items()}


def features_of(layer: int | None) -> str:
    """The field of a layer's features; None is the last layer."""
    return "features" if layer is None else f"features.{layer}"


def bytes_per_image(wanted: TargetSpec, shape: Shape, pca: int | None) -> int:
    """Bytes of one image's targets: N D numbers of features (N P with components), 2 N K per head and layer."""
    return BYTES * sum(math.prod(row) for row, _ in wanted.layout(shape, pca).values())


def flops_per_image(shape: Shape) -> float:
    """Floating-point operations of a teacher's forward pass: 2 per weight and token (12 D^2 weights per block), and
    attention."""
    return shape.depth * (24.0 * shape.width**2 * shape.tokens + 4.0 * shape.tokens**2 * shape.width)


def fitting(wanted: TargetSpec, shape: Shape, pca: int | None, images: int, room: int) -> Iterator[str]:
    """Settings of a teacher's targets that would fit into a number of bytes, largest first."""
    alone = TargetSpec(wanted.layers)
    if not wanted.layers:
        return
    if wanted.attention and (size := images * bytes_per_image(alone, shape, pca)) <= room:
        yield f"cache: features ({readable(size)})"
        return
    components = room // (images * shape.tokens * BYTES * len(wanted.layers))
    if components and components < (pca or shape.width):
        size = images * bytes_per_image(alone, shape, components)
        yield f"cache: features with pca: {components} or less ({readable(size)}; other results)"
