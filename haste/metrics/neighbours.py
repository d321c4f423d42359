"""Improved precision and recall (Kynkäänniemi et al. 2019, Eq. 1 to 3): balls around images in feature space.

A float32 product finds candidate pairs, float64 decides. Every float32 distance is lowered by its largest possible
rounding error, so that it is a lower bound; only pairs that could matter by this bound are computed again in
float64. The results are those of float64 throughout, at half the time and less memory. The float32 part is in torch, on
a GPU if there is one; the float64 part is little work, in numpy on the CPU.

N and M points, D feature width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from haste.metrics.frechet import checked_features
from haste.metrics.progress import Progress

BLOCK = 2048  # points of a block of distances
SPARE = 4  # neighbours kept beyond the k-th, so that float64 can correct their order
SLACK = 1e-12  # relative to the squared norms: gaps to a sphere below float64's rounding error count as none
UNIT = 2.0**-24  # rounding unit of float32

Array = NDArray[np.float64]
Places = NDArray[np.int64]


@dataclass(frozen=True)
class _Points:
    """exact (N, D): float64, centred and scaled; norms (N,): squared; quick (N, D): float32, where products are."""

    exact: Array
    norms: Array
    quick: Tensor

    def __len__(self) -> int:
        return len(self.exact)

    @property
    def lowered(self) -> Tensor:
        """Squared norms (N,), float32, minus the largest rounding error of a float32 squared distance.

        The error of |a|^2 + |b|^2 - 2ab is at most (D + 10) u (|a|^2 + |b|^2): D u from the product in any order
        of summation (Higham 2002, Eq. 3.5), the rest from rounding inputs, norms and sums. 64 leaves a margin.
        """
        error = (self.exact.shape[1] + 64) * UNIT
        return torch.from_numpy((self.norms * (1 - error) - 1e-30).astype(np.float32)).to(self.quick.device)


def precision_recall(
    real: NDArray, fake: NDArray, k: int = 3, device: torch.device | str | None = None
) -> tuple[float, float]:
    """Precision and recall, each in [0, 1].

    Precision is the share of fakes (N, D) inside the ball of some real image, whose radius is the distance to its k-th
    nearest other real image; recall the share of reals (M, D) inside the ball of some fake. A point on the sphere is
    inside: a gap below 1e-12 of the squared norms (after moving the origin to the mean of the reals) counts as none.

    Args:
        real, fake: features, any float type.
        k: the radius is the distance to the k-th neighbour.
        device: where to compute the float32 products; None is the GPU if there is one.

    Raises:
        ValueError: k or fewer rows on a side, different widths, or values that are not finite.
    """
    real, fake = checked_features(real, "real features"), checked_features(fake, "fake features")
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"precision and recall: features of width {real.shape[1]} (real) and {fake.shape[1]} (fake)")
    for count in (len(real), len(fake)):
        _check_k(k, count)
    centre = real.mean(axis=0)
    real, fake = real - centre, fake - centre
    scale = _scale(max(np.abs(real).max(), np.abs(fake).max()))
    pairs = len(fake) * (len(fake) + BLOCK) / 2 + len(real) * (len(real) + BLOCK) / 2 + len(fake) * len(real)
    progress = Progress("precision and recall", pairs)
    with _full_precision():
        a, b = _points(fake, scale, device), _points(real, scale, device)
        return _shares(a, b, _squared_radii(a, k, progress), _squared_radii(b, k, progress), progress)


def radii(features: NDArray, k: int = 3, device: torch.device | str | None = None) -> NDArray[np.float64]:
    """Distance (N,) of each row of features (N, D) to its k-th nearest other row (itself excluded; duplicates count).

    Raises:
        ValueError: k < 1, or not more than k rows.
    """
    features = checked_features(features)
    _check_k(k, len(features))
    centred = features - features.mean(axis=0)
    scale = _scale(np.abs(centred).max())
    with _full_precision():
        points = _points(centred, scale, device)
        return np.sqrt(_squared_radii(points, k, Progress("radii", len(points) * (len(points) + BLOCK) / 2))) / scale


def _check_k(k: int, count: int) -> None:
    if not 1 <= k < count:
        raise ValueError(f"nearest neighbours: k = {k} needs more than {k} images, found {count}")


def _scale(largest: float) -> float:
    """A power of two that scales values to about 1 without rounding, so that no square overflows a float32."""
    return 2.0 ** -int(np.frexp(largest)[1]) if largest > 0 else 1.0


def _points(centred: NDArray[np.float64], scale: float, device: torch.device | str | None) -> _Points:
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    exact = centred * scale
    quick = torch.from_numpy(exact.astype(np.float32)).to(device)
    return _Points(exact, np.einsum("nd,nd->n", exact, exact), quick)


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """Full-precision float32 products: TF32 and bfloat16, which a process may have enabled, would break the bound."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _bounds(a: Tensor, a_norms: Tensor, b: Tensor, b_norms: Tensor) -> Tensor:
    """Lower bounds (N, M), float32, of the squared distances of rows (N, D) and (M, D)."""
    return torch.addmm(b_norms, a, b.T, alpha=-2).add_(a_norms[:, None])


def _distances(a: _Points, rows: Places, b: _Points) -> Array:
    """Squared distances (n, M) of some of the points a to all points b, by a product in float64, 0 or more."""
    found = a.exact[rows] @ b.exact.T
    found *= -2
    found += a.norms[rows][:, None]
    found += b.norms
    return found.clip(min=0, out=found)


def _blocks(rows: Places, size: int) -> Iterator[Places]:
    for low in range(0, len(rows), size):
        yield rows[low : low + size]


# ---- radii


def _squared_radii(points: _Points, k: int, progress: Progress) -> Array:
    """Squared distance (N,) of each point to its k-th nearest other."""
    bounds, who = _near(points, min(k + SPARE, len(points) - 1), progress)
    found = _kth(points, np.arange(len(points)), who, k)
    if who.shape[1] == len(points) - 1:
        return found
    # Whatever was not kept is at least as far as the largest bound that was; duplicates are at 0.
    unsure = np.flatnonzero(found > bounds[:, -1].clip(min=0))
    for rows in _blocks(unsure, 256):
        far = _distances(points, rows, points)
        far[np.arange(len(rows)), rows] = np.inf
        found[rows] = _kth(points, rows, np.argpartition(far, who.shape[1] - 1, axis=1)[:, : who.shape[1]], k)
    return found


def _kth(points: _Points, rows: Places, who: Places, k: int) -> Array:
    """Squared distance (n,), by differences, of the points `rows` to the k-th nearest of their `who` (n, M)."""
    found = np.empty(len(rows))
    # Eight points and their neighbours fit a processor's cache.
    for some in _blocks(np.arange(len(rows)), 8):
        gaps = points.exact[who[some]]
        gaps -= points.exact[rows[some], None]
        found[some] = np.partition(np.einsum("nkd,nkd->nk", gaps, gaps), k - 1, axis=1)[:, k - 1]
    return found


def _near(points: _Points, keep: int, progress: Progress) -> tuple[NDArray[np.float32], Places]:
    """The lowest bounds (N, keep), ascending, and their points (N, keep). A pair of blocks serves both its sides."""
    count, norms = len(points), points.lowered
    bounds = torch.full((count, keep), torch.inf, device=norms.device)
    who = torch.zeros((count, keep), dtype=torch.long, device=norms.device)
    spans = [slice(low, min(low + BLOCK, count)) for low in range(0, count, BLOCK)]
    for i, mine in enumerate(spans):
        for theirs in spans[i:]:
            found = _bounds(points.quick[mine], norms[mine], points.quick[theirs], norms[theirs])
            if mine is theirs:
                _keep_lowest(bounds, who, mine, found.fill_diagonal_(torch.inf), theirs.start)
            else:
                _keep_lowest(bounds, who, mine, found, theirs.start)
                _keep_lowest(bounds, who, theirs, found.T.contiguous(), mine.start)
            progress.add(found.numel())
    return bounds.cpu().numpy(), who.cpu().numpy()


def _keep_lowest(bounds: Tensor, who: Tensor, mine: slice, found: Tensor, start: int) -> None:
    """Merge the lowest of bounds (n, M), to points from number `start` on, into those kept for the rows `mine`."""
    values, places = found.topk(min(bounds.shape[1], found.shape[1]), dim=1, largest=False)
    both, whose = torch.cat([bounds[mine], values], 1), torch.cat([who[mine], places + start], 1)
    bounds[mine], order = both.topk(bounds.shape[1], dim=1, largest=False, sorted=True)
    who[mine] = whose.gather(1, order)


# ---- who is inside


def _shares(
    fake: _Points, real: _Points, fake_radii: Array, real_radii: Array, progress: Progress
) -> tuple[float, float]:
    """Share of the fakes inside a real's ball, and of the reals inside a fake's; each distance is computed once."""
    norms, others = fake.lowered, real.lowered
    # Squared radii are rounded up, so that no ball loses a point to it.
    fake_balls, real_balls = (
        torch.from_numpy((radii * (1 + 4 * UNIT)).astype(np.float32)).to(norms.device)
        for radii in (fake_radii, real_radii)
    )
    best, where = torch.full_like(others, torch.inf), torch.zeros_like(others, dtype=torch.long)
    inside = 0
    for low in range(0, len(fake), BLOCK):
        rows = slice(low, low + BLOCK)
        bounds = _bounds(fake.quick[rows], norms[rows], real.quick, others)
        depth, centre = (bounds - real_balls).min(1)
        inside += int(_inside(fake, np.arange(len(fake))[rows], real, real_radii, depth, centre).sum())
        depth, centre = bounds.sub_(fake_balls[rows][:, None]).min(0)
        deeper = depth < best
        best[deeper], where[deeper] = depth[deeper], centre[deeper] + low
        progress.add(bounds.numel())
    covered = int(_inside(real, np.arange(len(real)), fake, fake_radii, best, where).sum())
    return inside / len(fake), covered / len(real)


def _inside(
    points: _Points, rows: Places, centres: _Points, radii: Array, depth: Tensor, centre: Tensor
) -> NDArray[np.bool_]:
    """Which of the points `rows` (n,) are inside a ball, in float64: bool (n,).

    radii: squared, of all centres. depth: the lowest bound minus the squared radius (n,); above 0, no ball holds the
    point. centre: the ball where that is (n,), which is tested first. The few points outside it are tested against
    every ball.
    """
    maybe, likeliest = np.flatnonzero((depth <= 0).cpu().numpy()), centre.cpu().numpy()
    found = np.zeros(len(rows), dtype=bool)
    for some in _blocks(maybe, 32):
        mine, theirs = rows[some], likeliest[some]
        gaps = points.exact[mine] - centres.exact[theirs]
        slack = SLACK * (points.norms[mine] + centres.norms[theirs])
        found[some] = np.einsum("nd,nd->n", gaps, gaps) <= radii[theirs] + slack
    for some in _blocks(maybe[~found[maybe]], 512):
        slack = SLACK * (points.norms[rows[some]][:, None] + centres.norms)
        found[some] = (_distances(points, rows[some], centres) <= radii + slack).any(1)
    return found
