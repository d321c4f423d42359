"""Inception Score, from sums that can be merged.

Salimans et al. 2016, section 4: exp of the mean over images of KL(p(y|x) || p(y)). Its usual form, which is that of
ADM's evaluator, takes splits of 5,000 images in their order and the mean over the splits; a remainder is a split of its
own. The probabilities are the softmax of Inception's 1,008 logits without their bias.

N images, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from haste.metrics import rows
from haste.metrics.frechet import checked_features

SPLIT = 5000


@dataclass(frozen=True)
class Split:
    """Sums over a split's images: count, of sum_y p log p, and of p (K,); float64."""

    count: int
    information: float
    mass: NDArray[np.float64]

    @property
    def score(self) -> float:
        """exp(mean KL) of the split: mean of p log p, minus q log q of the mean q."""
        mean = self.mass / self.count
        certain = mean > 0
        entropy = (mean[certain] * np.log(mean[certain])).sum()
        return float(np.exp(self.information / self.count - entropy))


@dataclass(frozen=True)
class Splits:
    """The statistic: the splits by their number, and the positions (N,) of their images."""

    index: rows.Places
    splits: Mapping[int, Split]


def update(stats: Splits | None, batch: Mapping[str, NDArray], name: str) -> Splits:
    """Splits so far (None for none) and the images of a batch: logits under `name` (N, K), any float type.

    If a batch has no "index" (N,), its rows follow those seen so far.

    Raises:
        ValueError: logits that are not finite or of another width, or images counted twice.
    """
    logits = checked_features(batch[name], name)
    where = rows.places(batch, len(logits), None if stats is None else stats.index)
    log_p = logits - logits.max(axis=1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))
    p = np.exp(log_p)
    information = (p * log_p).sum(axis=1)
    numbers = where // SPLIT
    found = {
        int(number): Split(int(mine.sum()), float(information[mine].sum()), p[mine].sum(axis=0))
        for number in np.unique(numbers)
        for mine in [numbers == number]
    }
    more = Splits(where, found)
    return more if stats is None else merge(stats, more)


def merge(a: Splits, b: Splits) -> Splits:
    """Splits of two disjoint sets. Raises ValueError for different widths or a place that is in both."""
    widths = {split.mass.size for side in (a, b) for split in side.splits.values()}
    if len(widths) > 1:
        raise ValueError(f"logits of {' and '.join(map(str, sorted(widths)))} classes cannot be put together")
    found = dict(a.splits)
    for number, more in b.splits.items():
        one = found.get(number)
        found[number] = more if one is None else _both(one, more)
    return Splits(rows.joined(a.index, b.index), found)


def _both(a: Split, b: Split) -> Split:
    return Split(a.count + b.count, a.information + b.information, a.mass + b.mass)


def value(stats: Splits) -> dict[str, float]:
    """{"is": mean over the splits, in 1..K, "is_std": standard deviation over them (ddof 0), absent for one split}."""
    found = [stats.splits[number].score for number in sorted(stats.splits)]
    spread = {"is_std": float(np.std(found))} if len(found) > 1 else {}
    return {"is": float(np.mean(found)), **spread}


def notes(stats: Splits) -> list[str]:
    """Why this score is not comparable with published ones, which use 50,000 images."""
    counts = [stats.splits[number].count for number in sorted(stats.splits)]
    if len(counts) == 1 and counts[0] < SPLIT:
        return [f"IS: {counts[0]:,} images make one split of their own, not splits of {SPLIT:,}; fewer score lower"]
    short = [count for count in counts if count != SPLIT]
    if short:
        return [f"IS: {len(counts)} splits of {SPLIT:,} but for {len(short)} of {short[-1]:,}, which weigh the same"]
    return []
