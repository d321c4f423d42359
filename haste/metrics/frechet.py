"""Frechet distance between two sets of features, from moments that can be merged.

Heusel et al. 2017 (TTUR), Eq. 6: |mu - mu'|^2 + tr(S + S' - 2 (S S')^(1/2)), with covariances of ddof 1, in float64.

N images, D feature width.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Moments:
    """The moments of a set of features that a Frechet distance needs.

    count: number of images; mean: (D,) float64; scatter: (D, D) float64, the sum over images of the outer products of
    their deviations from the mean (so that the covariance is scatter / (count - 1)).
    """

    count: int
    mean: Array
    scatter: Array

    @classmethod
    def of_covariance(cls, count: int, mean: Array, covariance: Array) -> Moments:
        """Moments from a published mean (D,) and covariance (D, D) of ddof 1, such as ADM's reference files hold.

        Raises:
            ValueError: fewer than 2 images, wrong shapes, or a value that is not finite.
        """
        mean, covariance = (
            np.asarray(mean, np.float64),
            np.asarray(covariance, np.float64),
        )
        if mean.ndim != 1 or covariance.shape != (mean.size, mean.size):
            raise ValueError(f"moments: expected (D,) and (D, D), found {mean.shape} and {covariance.shape}")
        if count < 2 or not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise ValueError(f"moments: expected 2 images or more and finite values, found {count} images")
        return cls(count, mean, covariance * (count - 1))

    @property
    def covariance(self) -> Array:
        """(D, D), ddof 1. Raises ValueError for fewer than 2 images."""
        if self.count < 2:
            raise ValueError(f"a covariance needs 2 images or more, found {self.count}")
        return self.scatter / (self.count - 1)

    @functools.cached_property
    def spectrum(self) -> tuple[Array, Array]:
        """Eigenvalues (D,) of the covariance, ascending, and its eigenvectors (D, D), in columns."""
        values, vectors = np.linalg.eigh(self.covariance)
        return values, vectors


def checked_features(features: NDArray, name: str = "features") -> Array:
    """Features (N, D) of any float type as float64.

    Raises:
        ValueError: not two-dimensional, empty, or holding NaN or infinity.
    """
    found = np.asarray(features, np.float64)
    if found.ndim != 2 or 0 in found.shape:
        raise ValueError(f"{name}: expected an array (images, width), found shape {found.shape}")
    bad = np.flatnonzero(~np.isfinite(found).all(axis=1))
    if bad.size:
        raise ValueError(f"{name}: {bad.size} of {len(found)} rows hold NaN or infinity, the first is row {bad[0]}")
    return found


def update(stats: Moments | None, features: NDArray) -> Moments:
    """Moments of the images seen so far (`stats`, None for none) and of the features (N, D) of N more."""
    features = checked_features(features)
    mean = features.mean(axis=0)
    centred = features - mean
    more = Moments(len(features), mean, centred.T @ centred)
    return more if stats is None else merge(stats, more)


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of two disjoint sets together (Chan, Golub and LeVeque 1979, Eq. 2.1).

    Raises:
        ValueError: the two were made from features of different widths.
    """
    _check_widths(a, b)
    count = a.count + b.count
    step = b.mean - a.mean
    scatter = a.scatter + b.scatter + np.outer(step, step) * (a.count * b.count / count)
    return Moments(count, a.mean + step * (b.count / count), scatter)


def frechet_distance(a: Moments, b: Moments) -> float:
    """Frechet distance of two Gaussians with these moments, in squared units of the features; 0 or more.

    The square root of the product is never formed: with S = V L V^T and R = L^(1/2) V^T, S S' has the eigenvalues of
    the symmetric R S' R^T, and the trace is the sum of their roots. N images span N - 1 dimensions; the remaining
    eigenvalues, which are 0 except for rounding, are left out, because the root of a rounding error is not small. (A
    general matrix square root gives NaN there with some BLAS.)

    Raises:
        ValueError: fewer than 2 images on a side, or features of different widths.
    """
    _check_widths(a, b)
    cov_a, cov_b = a.covariance, b.covariance
    values, vectors = a.spectrum
    kept = _spanned(values, a.count - 1)
    half = vectors[:, kept] * np.sqrt(values[kept])
    product = half.T @ cov_b @ half
    found = np.linalg.eigvalsh((product + product.T) / 2)
    trace_root = np.sqrt(found[_spanned(found, b.count - 1)]).sum()
    gap = a.mean - b.mean
    distance = float(gap @ gap + np.trace(cov_a) + np.trace(cov_b) - 2 * trace_root)
    return 0.0 if distance < 0 else distance  # below 0 by rounding, but NaN stays NaN


def _spanned(values: NDArray[np.floating], rank: int) -> NDArray[np.bool_]:
    """Which eigenvalues (D,), ascending, are above 0, without those beyond the rank that are only rounding."""
    beyond = np.arange(values.size) < values.size - rank
    noise = 16 * values.size * np.finfo(np.float64).eps * max(0.0, values.max(initial=0.0))
    return (values > 0) & ~(beyond & (values < noise))


def _check_widths(a: Moments, b: Moments) -> None:
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"moments of features of width {a.mean.size} and {b.mean.size} cannot be put together")
