"""Kernel Inception Distance: the unbiased squared maximum mean discrepancy with a cubic kernel.

Binkowski et al. 2018, section 4 and Eq. 4 (unbiased estimator): k(x, y) = (x.y / D + 1)^3. Everything is computed in
float64, on a GPU if there is one.

N images, D feature width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from haste.files.progress import Progress
from haste.metrics.frechet import checked_features

Array = NDArray[np.float64]
SUBSETS, SIZE, SEED = 100, 1000, 2020  # torch-fidelity's
BLOCK = 4096


def kid(
    real: NDArray, fake: NDArray, *, subsets: int = SUBSETS, size: int = SIZE, seed: int = SEED
) -> tuple[float, float]:
    """Mean and standard deviation (ddof 0) of the distance over random subsets; can be slightly below 0.

    The subsets are drawn as in torch-fidelity with the fakes as its first input: from one legacy generator, without
    replacement, first of the fakes (N, D), then of the reals (M, D). So they follow from seed and order.

    Raises:
        ValueError: fewer than `size` images on a side, size < 2, subsets < 1, different widths, or values that are not
            finite.
    """
    real, fake = _checked(real, fake)
    least = min(len(real), len(fake))
    if subsets < 1 or not 2 <= size <= least:
        raise ValueError(
            f"KID: expected subsets of 2 to {least} images (the smaller side), found {subsets} subsets of {size}"
        )
    rng, progress = np.random.RandomState(seed), Progress("KID", subsets, unit="")
    found = []
    for _ in range(subsets):
        mine = fake[rng.choice(len(fake), size, replace=False)]
        theirs = real[rng.choice(len(real), size, replace=False)]
        found.append(_discrepancy(theirs, mine))
        progress.add(1)
    return float(np.mean(found)), float(np.std(found))


def kid_of_all(real: NDArray, fake: NDArray) -> float:
    """The distance over all pairs of images (N, D) and (M, D), independent of seed and order, in O((N + M)^2 D).

    Raises:
        ValueError: fewer than 2 images on a side, different widths, or values that are not finite.
    """
    real, fake = _checked(real, fake)
    if min(len(real), len(fake)) < 2:
        raise ValueError(f"KID: expected 2 images or more on each side, found {len(real)} real and {len(fake)} fake")
    return _discrepancy(real, fake)


def _checked(real: NDArray, fake: NDArray) -> tuple[Array, Array]:
    real, fake = checked_features(real, "real features"), checked_features(fake, "fake features")
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"KID: features of width {real.shape[1]} (real) and {fake.shape[1]} (fake)")
    return real, fake


def _discrepancy(real: Array, fake: Array) -> float:
    x, y = _placed(real), _placed(fake)
    n, m = len(x), len(y)
    return _within(x) / (n * (n - 1)) + _within(y) / (m * (m - 1)) - 2 * _between(x, y) / (n * m)


def _placed(features: Array) -> Array | Tensor:
    """The features as a tensor on a GPU, or the array itself without one; both have the same operators."""
    return torch.from_numpy(np.ascontiguousarray(features)).cuda() if torch.cuda.is_available() else features


def _kernel(x: Any, y: Any) -> Any:
    found = x @ y.T
    found /= x.shape[1]
    found += 1
    return found * found * found


def _within(x: Array | Tensor) -> float:
    """Sum of the kernel over pairs of different rows; each pair of blocks is computed once."""
    total = 0.0
    for low in range(0, len(x), BLOCK):
        block = x[low : low + BLOCK]
        own = _kernel(block, block)
        total += float(own.sum() - own.trace()) + 2 * _between(block, x[low + BLOCK :])
    return total


def _between(x: Array | Tensor, y: Array | Tensor) -> float:
    blocks = [(a, b) for a in range(0, len(x), BLOCK) for b in range(0, len(y), BLOCK)]
    return float(sum(float(_kernel(x[a : a + BLOCK], y[b : b + BLOCK]).sum()) for a, b in blocks))


def value(real: NDArray, fake: NDArray, seed: int = SEED) -> dict[str, float]:
    """{"kid": mean over subsets, "kid_std": standard deviation}; over all pairs, without std, if images are too few."""
    if min(len(real), len(fake)) <= SIZE:
        return {"kid": kid_of_all(real, fake)}
    mean, std = kid(real, fake, subsets=SUBSETS, size=SIZE, seed=seed)
    return {"kid": mean, "kid_std": std}


def notes(real: int, fake: int) -> list[str]:
    """How the distance of this many images was computed, if not in the usual way."""
    if min(real, fake) <= SIZE:
        return [f"KID: over all pairs; {min(real, fake):,} images are too few for {SUBSETS} subsets of {SIZE:,}"]
    return []
