"""The metrics, each as three functions: `update` a statistic, `merge` two, and take the `value`.

Any split of the images, merged, gives what one pass gives. A batch is a dictionary of numpy arrays, one row an image,
under the names of the detector's outputs ("pool" (N, D), "logits" (N, K)) and "labels" (N,), the classes asked for.

A new metric is a function and a line in METRICS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from haste.metrics import frechet
from haste.metrics.frechet import checked_features

Array = NDArray[np.float64]
Batch = Mapping[str, NDArray]
ROWS = 1024  # rows of a block of distances: 1024 x 50,000 in float64 is 0.4 GB


@dataclass(frozen=True)
class Metric:
    """One metric, or several that share their statistic.

    needs: names of the arrays that a batch must hold.
    update: (stats or None, batch) -> stats.
    merge: (stats, stats) -> stats, of disjoint sets of images.
    value: (stats of the samples, stats of the reference or None) -> name -> number.
    reference: whether `value` asks for the statistic of real images.
    better: name -> "lower" or "higher".
    """

    needs: tuple[str, ...]
    update: Callable[[Any, Batch], Any]
    merge: Callable[[Any, Any], Any]
    value: Callable[[Any, Any], dict[str, float]]
    reference: bool
    better: Mapping[str, str]


# ---- precision and recall


def radii(features: NDArray, k: int = 3) -> Array:
    """Distance (N,) of each row of features (N, D) to its k-th nearest other row (itself excluded; twins count).

    Raises:
        ValueError: k < 1, or not more than k rows.
    """
    features = checked_features(features)
    if not 1 <= k < len(features):
        raise ValueError(f"nearest neighbours: k = {k} needs more than {k} images, found {len(features)}")
    found = np.empty(len(features))
    for start in range(0, len(features), ROWS):
        squared = squared_distances(features[start : start + ROWS], features)
        np.fill_diagonal(squared[:, start:], np.inf)
        found[start : start + ROWS] = np.partition(squared, k - 1, axis=1)[:, k - 1]
    return np.sqrt(found)


def squared_distances(a: Array, b: Array) -> Array:
    """Squared Euclidean distances (N, M) of rows (N, D) and (M, D), as |a|^2 + |b|^2 - 2ab in float64, 0 or more."""
    squared = (a * a).sum(1)[:, None] + (b * b).sum(1)[None, :] - 2 * (a @ b.T)
    return squared.clip(min=0)


def precision_recall(real: NDArray, fake: NDArray, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, Eq. 1 to 3), each in [0, 1].

    Precision is the share of fakes (N, D) inside the ball of some real image, whose radius is the distance to its k-th
    nearest other real image; recall the share of reals (M, D) inside the ball of some fake. A point on the sphere is
    inside. Distances are taken in blocks of rows, in float64, after moving the origin to the mean of the reals; a gap
    to the sphere below the rounding error of that (1e-12 of the squared norms) counts as none.

    Raises:
        ValueError: k or fewer rows on a side, different widths, or values that are not finite.
    """
    real, fake = (
        checked_features(real, "real features"),
        checked_features(fake, "fake features"),
    )
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"precision and recall: features of width {real.shape[1]} (real) and {fake.shape[1]} (fake)")
    centre = real.mean(axis=0)
    real, fake = real - centre, fake - centre
    return _covered(fake, real, radii(real, k)), _covered(real, fake, radii(fake, k))


def _covered(points: Array, centres: Array, radius: Array) -> float:
    """Share of the points (N, D) that lie in at least one ball: centres (M, D), radius (M,)."""
    inside = 0
    norms = (centres * centres).sum(1)
    for start in range(0, len(points), ROWS):
        block = points[start : start + ROWS]
        slack = 1e-12 * ((block * block).sum(1)[:, None] + norms)
        inside += int((squared_distances(block, centres) <= radius**2 + slack).any(axis=1).sum())
    return inside / len(points)


def collect(stats: NDArray | None, features: NDArray) -> NDArray:
    """Statistic of precision and recall: the features (N, D) themselves, float32.

    A fake's radius needs every other fake, so no smaller statistic merges exactly. 50,000 of width 2,048 are 0.4 GB.
    """
    features = checked_features(features).astype(np.float32)
    return features if stats is None else _rows_of(stats, features)


def _rows_of(a: NDArray, b: NDArray) -> NDArray:
    if a.shape[1:] != b.shape[1:]:
        raise ValueError(f"features of width {a.shape[1:]} and {b.shape[1:]} cannot be put together")
    return np.concatenate([a, b])


def _precision_recall(stats: NDArray, reference: NDArray) -> dict[str, float]:
    precision, recall = precision_recall(reference, stats)
    return {"precision": precision, "recall": recall}


# ---- accuracy of the class asked for


@dataclass(frozen=True)
class Hits:
    """How many images a detector read as the class they were asked to show, of how many."""

    right: int
    count: int


def hits(stats: Hits | None, logits: NDArray, labels: NDArray) -> Hits:
    """Count the rows of logits (N, K) whose largest entry is at the label (N,), onto the counts so far.

    Raises:
        ValueError: different numbers of rows, labels outside 0..K-1, or logits that are not finite.
    """
    logits, labels = checked_features(logits, "logits"), np.asarray(labels)
    if labels.shape != logits.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels: expected {len(logits)} integers, found {labels.dtype} of shape {labels.shape}")
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(f"labels: expected 0..{logits.shape[1] - 1}, found {labels.min()}..{labels.max()}")
    more = Hits(int((logits.argmax(axis=1) == labels).sum()), len(labels))
    return more if stats is None else merge_hits(stats, more)


def merge_hits(a: Hits, b: Hits) -> Hits:
    """Counts of two disjoint sets together."""
    return Hits(a.right + b.right, a.count + b.count)


def class_accuracy(logits: NDArray, labels: NDArray) -> float:
    """Share in [0, 1] of the images that a detector's logits (N, K) read as their labels (N,)."""
    return _accuracy(hits(None, logits, labels))


def _accuracy(stats: Hits) -> float:
    return stats.right / stats.count


METRICS: dict[str, Metric] = {
    "frechet": Metric(
        needs=("pool",),
        update=lambda stats, batch: frechet.update(stats, batch["pool"]),
        merge=frechet.merge,
        value=lambda stats, reference: {"fd": frechet.frechet_distance(stats, reference)},
        reference=True,
        better={"fd": "lower"},
    ),
    "precision_recall": Metric(
        needs=("pool",),
        update=lambda stats, batch: collect(stats, batch["pool"]),
        merge=_rows_of,
        value=_precision_recall,
        reference=True,
        better={"precision": "higher", "recall": "higher"},
    ),
    "class_accuracy": Metric(
        needs=("logits", "labels"),
        update=lambda stats, batch: hits(stats, batch["logits"], batch["labels"]),
        merge=merge_hits,
        value=lambda stats, reference: {"class_accuracy": _accuracy(stats)},
        reference=False,
        better={"class_accuracy": "higher"},
    ),
}
