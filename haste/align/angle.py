"""The cosine between two gradients and its standard error, from sums over groups of images.

The cosine of two gradients needs only their inner products, and the cosine of all images except one group needs only
the inner products of the groups' sums. So a block of any size is passed as a small table. S groups of images.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def combined(products: Array, weights: Array) -> Array:
    """Inner products of weighted sums of gradients, from those of the gradients.

    Args:
        products: (..., L, S, L, S), of the groups' sums of L gradients.
        weights: (K, L), or (..., K, L) where they differ.

    Returns:
        (..., K, S, K, S).
    """
    return np.einsum("...kl,...lsmr,...nm->...ksnr", weights, products, weights)


def cosines(products: Array) -> tuple[Array, Array]:
    """<a, d> / (|a| |d|) (as in HASTE's Tables 1 and 2) over all images, and with each group left out.

    Args:
        products: (..., 2, S, 2, S), inner products of the groups' sums: those of gradient a first, those of d second.

    Returns:
        (...) and (..., S); NaN where a gradient is 0.
    """
    whole = products.sum(axis=(-3, -1))[..., None]  # (..., 2, 2, 1)
    rows = np.moveaxis(products.sum(axis=-1), -2, -1)  # (..., 2, 2, S): a group's sum with the whole
    columns = products.sum(axis=-3)  # (..., 2, 2, S): the whole with a group's sum
    own = np.diagonal(products, axis1=-3, axis2=-1)  # (..., 2, 2, S)
    return _cosine(whole)[..., 0], _cosine(whole - rows - columns + own)


def _cosine(products: Array) -> Array:
    """(..., 2, 2, S) -> (..., S)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return products[..., 0, 1, :] / np.sqrt(products[..., 0, 0, :] * products[..., 1, 1, :])


def jackknife(left_out: Array) -> float:
    """Standard error from the leave-one-group-out values (S,) (Efron and Tibshirani 1993, Eq. 11.5).

    The groups count as equally large: their sizes differ by one image at most.
    """
    groups = len(left_out)
    return math.sqrt((groups - 1) / groups * float(np.square(left_out - left_out.mean()).sum()))
