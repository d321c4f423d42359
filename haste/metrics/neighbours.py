"""Improved precision and recall (Kynkäänniemi et al. 2019, Eq. 1 to 3): balls around images in feature space.

Squared distances come from matrix products in float64, one block of rows at a time, on a GPU if there is one. The
distances that become radii are recomputed from differences, so that duplicates are exactly 0 apart.

N and M points, D feature width.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from haste.files.progress import Progress
from haste.metrics.frechet import checked_features

BLOCK = 1024  # points of a block of distances
SLACK = 1e-12  # of the squared norms: a gap to a sphere below float64's rounding error counts as 0


def precision_recall(
    real: NDArray, fake: NDArray, k: int = 3, device: torch.device | str | None = None
) -> tuple[float, float]:
    """Precision and recall, each in [0, 1].

    Precision is the share of fakes (N, D) inside the ball of some real image, whose radius is the distance to its k-th
    nearest other real image; recall is the share of reals (M, D) inside the ball of some fake. A point on the sphere is
    inside: a gap below 1e-12 of the squared norms (after moving the origin to the mean of the reals) counts as 0.

    Args:
        real, fake: features, any float type.
        k: which neighbour's distance is the radius.
        device: where to compute the products; None is the GPU if there is one.

    Raises:
        ValueError: k or fewer rows on a side, different widths, or values that are not finite.
    """
    real, fake = checked_features(real, "real features"), checked_features(fake, "fake features")
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"precision and recall: features of width {real.shape[1]} (real) and {fake.shape[1]} (fake)")
    for count in (len(real), len(fake)):
        _check_k(k, count)
    centre = real.mean(axis=0)
    a, b = _points(fake - centre, device), _points(real - centre, device)
    progress = Progress("precision and recall", len(a) ** 2 + len(b) ** 2 + len(a) * len(b), unit="")
    fake_radii, real_radii = _squared_radii(a, k, progress), _squared_radii(b, k, progress)
    inside, covered = 0, torch.zeros(len(b), dtype=torch.bool, device=b.device)
    for rows in _blocks(a):
        found = _distances(a[rows], b, 1 - SLACK)
        inside += int((found <= real_radii).any(1).sum())
        covered |= (found <= fake_radii[rows, None]).any(0)
        progress.add(found.numel())
    return inside / len(a), int(covered.sum()) / len(b)


def radii(features: NDArray, k: int = 3, device: torch.device | str | None = None) -> NDArray[np.float64]:
    """Distance (N,) of each row of features (N, D) to its k-th nearest other row (not itself; duplicates count).

    Raises:
        ValueError: k < 1, or not more than k rows.
    """
    features = checked_features(features)
    _check_k(k, len(features))
    points = _points(features - features.mean(axis=0), device)
    return _squared_radii(points, k, Progress("radii", len(points) ** 2, unit="")).sqrt().cpu().numpy()


def _check_k(k: int, count: int) -> None:
    if not 1 <= k < count:
        raise ValueError(f"nearest neighbours: k = {k} needs more than {k} images, found {count}")


def _points(centred: NDArray[np.float64], device: torch.device | str | None) -> Tensor:
    return torch.from_numpy(centred).to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _blocks(points: Tensor) -> Iterator[slice]:
    for low in range(0, len(points), BLOCK):
        yield slice(low, low + BLOCK)


def _distances(a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """Squared distances (N, M) of rows (N, D) and (M, D), with their squared norms multiplied by `scale`."""
    mine, theirs = (scale * torch.linalg.vecdot(x, x) for x in (a, b))
    return torch.addmm(theirs, a, b.T, alpha=-2).add_(mine[:, None])


def _squared_radii(points: Tensor, k: int, progress: Progress) -> Tensor:
    """Squared distance (N,) of each point to its k-th nearest other. A pair of blocks serves both directions."""
    far = torch.full((len(points), k), torch.inf, dtype=points.dtype, device=points.device)
    who = torch.zeros_like(far, dtype=torch.long)

    def keep(rows: slice, found: Tensor, start: int) -> None:
        values, places = found.topk(min(k, found.shape[1]), dim=1, largest=False)
        both, whose = torch.cat([far[rows], values], 1), torch.cat([who[rows], places + start], 1)
        far[rows], order = both.topk(k, dim=1, largest=False)
        who[rows] = whose.gather(1, order)

    for mine in _blocks(points):
        for theirs in _blocks(points):
            if theirs.start < mine.start:
                continue
            found = _distances(points[mine], points[theirs])
            if mine == theirs:
                keep(mine, found.fill_diagonal_(torch.inf), mine.start)
            else:
                keep(mine, found, theirs.start)
                keep(theirs, found.T.contiguous(), mine.start)
            progress.add(found.numel() * (1 if mine == theirs else 2))
    return torch.cat([(points[who[rows]] - points[rows, None]).square().sum(2).amax(1) for rows in _blocks(points)])
