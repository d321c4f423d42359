"""A condition: the network's input besides x and t. No torch.

It has two forms, which only its own class interprets. *Rows* are stored in files: fields, each an array with
one row per sample. *Told* is the network's input y: an array with one row per sample, or a mapping of such.

Shapes: N samples, B samples of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from haste.config import Sampling, Strict
from haste.data import order
from haste.networks.spec import each

if TYPE_CHECKING:
    from haste.plan.plan import Plan

Rows = Mapping[str, NDArray[Any]]
Told = NDArray[Any] | Mapping[str, NDArray[Any]]
Fields = Mapping[str, tuple[Sequence[int], DTypeLike]]


class Condition:
    """The interface of every condition. It is constructed as `Class(classes=, **settings)`, with the images' number of
    classes, and holds no random state. A network names its condition (`haste.models.denoiser.Denoiser`).

    Attributes:
        Settings: the keys of `condition` beside `name`, each with a default; they are part of the latents' name.
        fields: field -> shape of a sample's row and its dtype.
        arguments: the network's constructor arguments, besides the size of its latents and its own settings.
    """

    Settings: ClassVar[type[Strict]] = Strict
    fields: Fields
    arguments: Mapping[str, Any]

    @property
    def stored(self) -> Fields:
        """The fields of what `rows` returns: those of samples, unless a class keeps something else beside latents."""
        return self.fields

    def opened(self, plan: Plan) -> Self:
        """The condition with what it looks up among a plan's artefacts: whoever trains or samples asks for it."""
        return self

    def on(self, plan: Plan) -> Self:
        """As `opened`, but for `words` and for samples of prompts, which need no image of the plan."""
        return self

    @property
    def identities(self) -> Mapping[str, str]:
        """Name -> identity of what it looks up, once `opened`; states keep them, and other ones are refused."""
        return {}

    def rows(self, said: Rows) -> Rows:
        """Rows of images, to be stored beside their latents.

        Args:
            said: the image store's arrays: `image` (N, R, R, 3) uint8, `label` (N,) int64.
        """
        raise NotImplementedError(f"{type(self).__name__}.rows")

    def told(self, rows: Rows) -> Told:
        """The network's input for rows."""
        raise NotImplementedError(f"{type(self).__name__}.told")

    def null(self, count: int) -> Told:
        """The null condition of `count` samples, with the shapes and dtypes of `told`."""
        raise NotImplementedError(f"{type(self).__name__}.null")

    def like(self, count: int) -> Told:
        """Anything with the shapes and dtypes of `told`, also before `opened`: for a network that is only looked at."""
        return self.null(count)

    def batch(self, rows: Rows, *, seed: int, step: int, visits: Sequence[int], dropout: float) -> Told:
        """The network's input in a training step: each sample's own condition or, for a share `dropout`, the null one.

        Args:
            rows: of the batch, or of a part of it, as they are beside the latents; and `index`, the images' places in
                the stores, (B,) int64.
            seed: of the run.
            step: steps done before this one.
            visits: the samples' positions in the batch.
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
        """Rows of samples to be drawn; those of sample i depend only on `sampling` (its seed, ...) and i."""
        raise NotImplementedError(f"{type(self).__name__}.sampled")

    def fault(self, rows: Rows) -> str:
        """What is wrong with rows in a store; empty if they can be used."""
        return ""

    def words(self, rows: Rows) -> list[str] | None:
        """The text of each sample; None for a condition without words."""
        return None

    def meant(self, rows: Rows) -> NDArray[np.int64] | None:
        """The class that the text of each sample means, (N,), -1 where none is known; None for a condition whose rows
        are no texts, or images without classes."""
        return None

    def columns(self, rows: Rows, most: int) -> tuple[NDArray[np.int64], list[Any]] | None:
        """The layout of a grid of samples: each sample's column, (N,), -1 for none, and the columns' titles.

        At most `most` columns; None if columns have no meaning.
        """
        return None


class Labels(Condition):
    """One of a number of classes, as an int64; one more is the null class. Without classes every label is 0, the null
    class."""

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
        """Classes drawn uniformly, or all or the chosen ones in turn."""
        if not self.classes:
            return {"label": np.zeros(len(indices), np.int64)}
        if sampling.labels != "random":
            turn = np.asarray(sampling.chosen or range(self.classes), np.int64)
            return {"label": turn[np.asarray(indices) % len(turn)]}
        drawn = order.uniforms(sampling.seed, "sample label", 0, indices)
        return {"label": np.minimum((drawn * self.classes).astype(np.int64), self.classes - 1)}

    def fault(self, rows: Rows) -> str:
        """Labels outside the classes."""
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
