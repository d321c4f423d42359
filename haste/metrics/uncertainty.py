"""The standard error of a Frechet distance due to the finite number of samples, in one more pass.

The bootstrap would compute the distance a hundred times, with an eigen-decomposition each. To first order it equals
the infinitesimal jackknife (Jaeckel 1972; Efron 1982, chapter 6): the spread of the samples' influences on the
distance. With samples of mean m and covariance S and a reference of m' and S', the distance has the derivatives
2 (m - m') and I - T, where T = S^(-1/2) (S^(1/2) S' S^(1/2))^(1/2) S^(-1/2) is the map that carries one Gaussian to the
other. So a sample x, with y = x - m, has the influence 2 (m - m') . y + |y|^2 - y T y, minus its mean over the samples.

The reference is held fixed, and the bias of a distance of few samples (always upwards) is not included.
N images, D feature width, R rank of the samples' covariance.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from haste.metrics.frechet import Moments

Array = NDArray[np.float64]
LEAST = 2  # samples per dimension; with fewer, every sample is an outlier in some direction


@dataclass(frozen=True)
class Influence:
    """The influence of a sample of features x (D,) on a Frechet distance, to first order and up to a constant.

    centre, slope: (D,) float64; root: (D, R) float32, such that y T y = |root^T y|^2.
    """

    centre: Array
    slope: Array
    root: NDArray[np.float32]

    def __call__(self, features: NDArray) -> Array:
        """Features (N, D) -> influences (N,), float64."""
        # float32 suffices for an error bar.
        gaps = (features - self.centre).astype(np.float32)
        spread = np.einsum("nd,nd->n", gaps, gaps) - np.square(gaps @ self.root).sum(axis=1)
        return gaps @ self.slope + spread.astype(np.float64)


def influence(samples: Moments, reference: Moments) -> Influence:
    """The influence of samples with these moments on their distance to a reference."""
    values, vectors = samples.spectrum
    kept = values > values.max() * values.size * np.finfo(np.float64).eps
    scale = np.sqrt(values[kept])
    half = vectors[:, kept] * scale
    product = half.T @ reference.covariance @ half
    found, axes = np.linalg.eigh((product + product.T) / 2)
    root = (vectors[:, kept] / scale) @ (axes * found.clip(min=0) ** 0.25)
    return Influence(samples.mean, 2 * (samples.mean - reference.mean), root.astype(np.float32))


def frechet_error(samples: Moments, reference: Moments, blocks: Iterable[NDArray]) -> float | None:
    """Standard error of the Frechet distance of samples to a reference, in the distance's units.

    Args:
        samples: moments of all samples.
        reference: moments of the reference.
        blocks: the samples' features (N, D) in any number of pieces, in any order.

    Returns:
        None for fewer than 2 samples per dimension.
    """
    if samples.count < LEAST * samples.mean.size:
        return None
    add = influence(samples, reference)
    count, mean, scatter = 0, 0.0, 0.0
    for block in blocks:
        found = add(block)
        more, centre = len(found), float(found.mean())
        step, total = centre - mean, count + more
        # Chan, Golub and LeVeque 1979, Eq. 2.1
        scatter += float(((found - centre) ** 2).sum()) + step * step * count * more / total
        mean, count = mean + step * more / total, total
    assert count == samples.count, (count, samples.count)
    return math.sqrt(scatter / (count - 1) / count)
