"""A condition: what a sample is told beside x and t. No torch.

It has two forms, and nobody but its own class looks into either. *Rows* are what files keep: fields, each an array with
a row a sample. *Told* is what a network gets as y: an array with a row a sample, or a mapping of such.

Shapes: N samples, B samples of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from haste.config import Sampling, Strict
from haste.data import order
from haste.networks.spec import each

Rows = Mapping[str, NDArray[Any]]
Told = NDArray[Any] | Mapping[str, NDArray[Any]]


class Condition:
    """What every condition offers. It is made as `Class(classes=, **settings)`, with the number of the images' classes,
    and holds no random state. A network says by name which one it understands (`haste.models.denoiser.Denoiser`).

    Attributes:
        Settings: the keys of `condition` beside `name`, each with a default; they are part of the latents' name.
        fields: field -> shape of a sample's row and its dtype.
        arguments: what a network is made with, beside the size of its latents and its own settings.
    """

    Settings: ClassVar[type[Strict]] = Strict
    fields: Mapping[str, tuple[Sequence[int], DTypeLike]]
    arguments: Mapping[str, Any]

    def rows(self, said: Rows) -> Rows:
        """Rows of pictures, to be kept beside their latents.

        Args:
            said: what the image store has of them: `image` (N, R, R, 3) uint8, `label` (N,) int64.
        """
        raise NotImplementedError(f"{type(self).__name__}.rows")

    def told(self, rows: Rows) -> Told:
        """What a network gets of rows."""
        raise NotImplementedError(f"{type(self).__name__}.told")

    def null(self, count: int) -> Told:
        """What it gets of `count` samples that are told nothing, of the shapes and dtypes of `told`."""
        raise NotImplementedError(f"{type(self).__name__}.null")

    def batch(self, rows: Rows, *, seed: int, step: int, visits: Sequence[int], dropout: float) -> Told:
        """What a training step tells: each sample's own, or, for a share `dropout` of them, nothing.

        Args:
            rows: of the batch, or of a part of it.
            seed: the run's.
            step: steps done before this one.
            visits: the samples' places in the batch.
            dropout: in [0, 1).
        """
        told = self.told(rows)
        if not dropout:
            return told
        dropped = order.uniforms(seed, "class dropout", step, visits) < dropout

        def replaced(own: NDArray[Any], none: NDArray[Any]) -> NDArray[Any]:
            return np.where(dropped.reshape(-1, *[1] * (own.ndim - 1)), none, own)

        return each(replaced, told, self.null(len(dropped)))

    def sampled(self, sampling: Sampling, indices: range) -> Rows:
        """Rows of samples to be drawn; those of sample i follow from `sampling` (its seed, ...) and i alone."""
        raise NotImplementedError(f"{type(self).__name__}.sampled")

    def fault(self, rows: Rows) -> str:
        """What is wrong with rows that a store holds; nothing where they can be used."""
        return ""

    def columns(self, rows: Rows, most: int) -> tuple[NDArray[np.int64], list[Any]] | None:
        """How a picture of samples is laid out: each sample's column, (N,), -1 for none, and the columns' titles.

        At most `most` columns; None where they would mean nothing.
        """
        return None


class Labels(Condition):
    """One of so many classes, as an int64; one more stands for none. Without classes every label is 0, which is it."""

    def __init__(self, *, classes: int):
        self.classes = classes
        self.fields, self.arguments = {"label": ((), np.int64)}, {"classes": classes}

    def rows(self, said: Rows) -> Rows:
        """See `Condition`."""
        return {"label": said["label"]}

    def told(self, rows: Rows) -> NDArray[np.int64]:
        """(N,) int64 in 0 .. classes - 1."""
        return rows["label"]

    def null(self, count: int) -> NDArray[np.int64]:
        """(count,) int64, all `classes`."""
        return np.full(count, self.classes, np.int64)

    def sampled(self, sampling: Sampling, indices: range) -> Rows:
        """Classes drawn uniformly, or in turn."""
        if not self.classes:
            return {"label": np.zeros(len(indices), np.int64)}
        if sampling.labels == "balanced":
            return {"label": np.asarray(indices, dtype=np.int64) % self.classes}
        drawn = order.uniforms(sampling.seed, "sample label", 0, indices)
        return {"label": np.minimum((drawn * self.classes).astype(np.int64), self.classes - 1)}

    def fault(self, rows: Rows) -> str:
        """Labels that are no classes."""
        labels, most = rows["label"], max(0, self.classes - 1)
        if len(labels) and not (labels.min() >= 0 and labels.max() <= most):
            return f"labels {labels.min()}..{labels.max()}, expected 0..{most}"
        return ""

    def columns(self, rows: Rows, most: int) -> tuple[NDArray[np.int64], list[int]] | None:
        """The first classes that have samples."""
        if not self.classes:
            return None
        titles, column = np.unique(rows["label"], return_inverse=True)
        return np.where(column < most, column, -1), titles[:most].tolist()
