"""How alike two representations of the same images see them: CKNNA (Huh et al. 2024, arXiv 2405.07987).

Kernels are inner products K_ij = <x_i, x_j> and L_ij = <y_i, y_j> of rows that are clamped and have length 1. They
count where j is among i's k nearest in both: alpha(i, j). At most k entries of a row do, so no n x n matrix is kept:
candidates are searched for in float32, blocks of rows at once, and everything else is exact, in float64.

n images, D width, C candidates for neighbours.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]
Indices = NDArray[np.int64]

CLAMP = 0.95  # the quantile of |x| that features are clamped at
EPSILON = 1e-6
ROWS = 256  # of the kernel at once


@dataclasses.dataclass(frozen=True)
class Neighbours:
    """What the alignment of a representation needs.

    rows: (n, D) float64 of length 1; indices: (n, C) of each row's nearest others, nearest first; kernel: (n, C), their
    inner products with it.
    """

    rows: Array
    indices: Indices
    kernel: Array

    @classmethod
    def of(
        cls, features: NDArray[np.float32], candidates: int, *, clamp: float = CLAMP, device: torch.device | str = "cpu"
    ) -> Neighbours:
        """Clamp, normalise, and look for neighbours.

        Args:
            features: (n, D).
            candidates: C, how many neighbours are kept of each row; fewer if there are no more.
            clamp: entries are clamped to +- this quantile of |x| over the whole array, as an order statistic; 1 clamps
                nothing.
            device: where neighbours are searched for.
        """
        rows = normalised(features, clamp)
        exact = torch.from_numpy(rows).to(device)
        whole, count = exact.float(), min(candidates, len(rows) - 1)
        indices, kernel = np.empty((len(rows), count), np.int64), np.empty((len(rows), count))
        for low in range(0, len(rows), ROWS):
            some = slice(low, min(low + ROWS, len(rows)))
            block = whole[some] @ whole.T  # (ROWS, n)
            block[torch.arange(len(block)), torch.arange(some.start, some.stop)] = -math.inf  # j != i
            found = block.topk(count, dim=1).indices.sort(dim=1).values  # equally near ones by their numbers
            products = torch.einsum("rd,rcd->rc", exact[some], exact[found])
            order = products.argsort(dim=1, descending=True, stable=True)
            indices[some], kernel[some] = (part.gather(1, order).cpu().numpy() for part in (found, products))
        return cls(rows, indices, kernel)


def normalised(features: NDArray[np.float32], clamp: float = CLAMP) -> Array:
    """Rows clamped to +- a quantile of |x| over the whole array, then of length 1: (n, D) float64."""
    if clamp < 1:
        sizes, place = np.abs(features).reshape(-1), int(clamp * features.size)
        most = np.partition(sizes, place)[place]
        features = np.clip(features, -most, most)
    rows = features.astype(np.float64)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


@dataclasses.dataclass(frozen=True)
class _Masked:
    """Entries (i, j) of a kernel where alpha is 1, in order: code i n + j, and the value."""

    codes: Indices
    values: Array


def cknna(
    a: Neighbours, b: Neighbours, k: int, *, over_all: bool = False, kept: NDArray[np.bool_] | None = None
) -> float:
    """Align(K, L) / (sqrt(Align(K, K) Align(L, L)) + 1e-6).

    Args:
        a: of the same images as b.
        b: see a.
        k: number of neighbours.
        over_all: Align is the sum of alpha(i, j) (K_ij - mean_l K_il) (L_ij - mean_l L_il) / (n - 1)^2 with means over
            all images (REPA, arXiv 2410.06940, Eq. 23), and not the unbiased HSIC of the masked kernels alpha K and
            alpha L, as in the code of Huh et al.
        kept: (n,) the images that count; None for all. At least k of each one's candidates must be kept.
    """
    kept = np.ones(len(a.rows), dtype=bool) if kept is None else kept
    mine, theirs = (_nearest(one, k, kept) for one in (a, b))
    both, at_a, at_b = np.intersect1d(mine.codes, theirs.codes, assume_unique=True, return_indices=True)
    shared = _Masked(both, mine.values[at_a]), _Masked(both, theirs.values[at_b])
    if over_all:
        means = [one.rows @ one.rows[kept].mean(axis=0) for one in (a, b)]  # (n,): mean_l K_il
        pairs = [(shared[0], 0, shared[1], 1), (mine, 0, mine, 0), (theirs, 1, theirs, 1)]
        aligned = [_centred(one, means[i], two, means[j], int(kept.sum())) for one, i, two, j in pairs]
    else:
        aligned = [_hsic(one, two, kept) for one, two in (shared, (mine, mine), (theirs, theirs))]
    return aligned[0] / (float(np.sqrt(aligned[1] * aligned[2])) + EPSILON)


def _nearest(one: Neighbours, k: int, kept: NDArray[np.bool_]) -> _Masked:
    """The entries (i, j) where j is among the k nearest of i; only of images that are kept."""
    counts = kept[one.indices]
    near = counts & (counts.cumsum(axis=1) <= k) & kept[:, None]
    i, place = near.nonzero()
    codes = i * len(kept) + one.indices[i, place]
    order = np.argsort(codes)
    return _Masked(codes[order], one.kernel[i, place][order])


def _hsic(k: _Masked, l: _Masked, kept: NDArray[np.bool_]) -> float:  # noqa: E741 - the kernels' names
    """Unbiased HSIC (Song et al. 2012, JMLR 13, Eq. 5) of two kernels with entries at the same places, zero diagonals
    and, because i may be near j and not j near i, not symmetric."""
    n, m = len(kept), int(kept.sum())
    i, j = k.codes // n, k.codes % n
    back = np.minimum(np.searchsorted(k.codes, j * n + i), len(k.codes) - 1)  # of entry (j, i)
    mutual = k.codes[back] == j * n + i
    trace = float((k.values * l.values[back])[mutual].sum())  # tr(K L)
    columns, rows = np.bincount(j, k.values, n), np.bincount(i, l.values, n)
    sums = float(k.values.sum() * l.values.sum()) / ((m - 1) * (m - 2))
    return (trace + sums - 2 / (m - 2) * float(columns @ rows)) / (m * (m - 3))


def _centred(k: _Masked, means_k: Array, l: _Masked, means_l: Array, m: int) -> float:  # noqa: E741
    i = k.codes // len(means_k)
    return float(((k.values - means_k[i]) * (l.values - means_l[i])).sum()) / (m - 1) ** 2
