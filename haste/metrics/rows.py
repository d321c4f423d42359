"""The position of a batch's rows in the whole set, for statistics that depend on the order of the images.

N images, D feature width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from haste.metrics.frechet import checked_features

Places = NDArray[np.int64]


def places(batch: Mapping[str, NDArray], count: int, before: Places | None) -> Places:
    """Positions (N,) of a batch's rows in the order of the images: its "index" if it has one, else the next ones.

    Args:
        batch: may hold "index" (N,), integers from 0.
        count: rows of the batch.
        before: positions seen so far, None for none.

    Raises:
        ValueError: an index that is not one integer from 0 for each row, or a position that was seen before.
    """
    if "index" not in batch:
        start = 0 if before is None or not before.size else int(before.max()) + 1
        return np.arange(start, start + count, dtype=np.int64)
    found = np.asarray(batch["index"])
    if found.shape != (count,) or not np.issubdtype(found.dtype, np.integer) or (found < 0).any():
        raise ValueError(f"index: expected {count} integers from 0, found {found.dtype} of shape {found.shape}")
    return joined(np.zeros(0, np.int64) if before is None else before, found.astype(np.int64))[-count:]


def joined(a: Places, b: Places) -> Places:
    """The positions of two disjoint sets, concatenated.

    Raises:
        ValueError: a position is in both, or twice in one.
    """
    found = np.concatenate([a, b])
    ordered = np.sort(found)
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if twice.size:
        raise ValueError(
            f"{twice.size} images of these shards have the same place, the first is {twice[0]}: a shard that does not "
            'start at the first image must say where its rows lie ("index" in its batches)'
        )
    return found


@dataclass(frozen=True)
class Rows:
    """Features of images with their positions. Blocks are concatenated only on request: small updates stay cheap.

    index: positions (N,); blocks: features, float32, together (N, D).
    """

    index: Places
    blocks: tuple[NDArray[np.float32], ...]

    @property
    def ordered(self) -> NDArray[np.float32]:
        """Features (N, D) in the order of their positions."""
        order = np.argsort(self.index)
        whole = np.concatenate(self.blocks)
        return whole if (order[:-1] < order[1:]).all() else whole[order]


def collect(stats: Rows | None, batch: Mapping[str, NDArray], name: str) -> Rows:
    """Rows so far (None for none) and those of a batch, under `name` (N, D).

    Raises:
        ValueError: features that are not finite or of another width, or positions seen before.
    """
    features = checked_features(batch[name], name).astype(np.float32)
    more = Rows(places(batch, len(features), None if stats is None else stats.index), (features,))
    return more if stats is None else merge(stats, more)


def merge(a: Rows, b: Rows) -> Rows:
    """Rows of two disjoint sets. Raises ValueError for different widths or a position that is in both."""
    if a.blocks[0].shape[1:] != b.blocks[0].shape[1:]:
        raise ValueError(f"features of width {a.blocks[0].shape[1]} and {b.blocks[0].shape[1]} cannot be put together")
    return Rows(joined(a.index, b.index), a.blocks + b.blocks)
