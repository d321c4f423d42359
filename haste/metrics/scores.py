"""The metrics, each as three functions: `update` a statistic, `merge` two, and compute the `value`.

Any split of the images, merged, gives the result of one pass. A batch is a dictionary of numpy arrays, one row per
image: the detector's outputs by name, "labels" (N,), the requested classes, and "index" (N,), the images' positions in
their order (without it, rows follow those seen before; shards that will be merged need it). "meant" (N,) are the
classes that texts mean which the images were told in place of one, -1 where none is known.

The available metrics follow from the detector's outputs: "pool" (N, D) of any detector; "spatial" (N, 2023) and
"logits_unbiased" (N, 1008) of Inception alone, so that sFID and IS are never those of another network; "logits" (N, K)
of a classifier of the dataset's own classes, so that Inception's 1,008 are never read as labels.

A new metric is a function and a line in METRICS.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from haste import extensions
from haste.metrics import frechet, inception_score, kid, rows
from haste.metrics.frechet import checked_features
from haste.metrics.neighbours import precision_recall

Batch = Mapping[str, NDArray]
Numbers = TypeVar("Numbers", bound=Mapping[str, Any])
SCALE = 100.0  # of CLIP scores, as torchmetrics has them; Hessel et al. 2021 have 2.5
NEIGHBOURS = 10_000  # real images that ADM's precision and recall, and here KID, use


@dataclass(frozen=True)
class Metric:
    """One metric, or several that share their statistic.

    needs: names of the arrays that a batch must hold.
    update: (stats or None, batch) -> stats.
    merge: (stats, stats) -> stats, of disjoint sets of images.
    value: (stats of the samples, stats of the reference or None) -> name -> number.
    reference: whether `value` needs the statistic of real images.
    reference_rows: most real images in that statistic, evenly spaced; None is all.
    better: name -> "lower" or "higher", for values with a direction; an error bar, "NAME_std", has none.
    notes: arguments as `value`; remarks on the numbers, such as too few images, a sentence each.
    """

    needs: tuple[str, ...]
    update: Callable[[Any, Batch], Any]
    merge: Callable[[Any, Any], Any]
    value: Callable[[Any, Any], dict[str, float]]
    reference: bool
    better: Mapping[str, str]
    notes: Callable[[Any, Any], list[str]] = lambda stats, reference: []
    reference_rows: int | None = None


def finite(found: Numbers, of: str) -> Numbers:
    """Values of metrics by name, or None for one without, unchanged. Raises FloatingPointError if one is not finite."""
    if broken := [name for name, value in found.items() if value is not None and not math.isfinite(value)]:
        raise FloatingPointError(
            f"{of}: {broken[0]} is {found[broken[0]]}, expected a finite number: nothing is scored"
        )
    return found


@dataclass(frozen=True)
class Hits:
    """Number of images that a detector classified as their requested class, and number of all images; `unknown` more
    were told a text that means no class that is known."""

    right: int
    count: int
    unknown: int = 0


def hits(stats: Hits | None, logits: NDArray, labels: NDArray) -> Hits:
    """Count the rows of logits (N, K) whose largest entry is at the label (N,), added to the counts so far.

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
    return Hits(a.right + b.right, a.count + b.count, a.unknown + b.unknown)


def _told_hits(stats: Hits | None, logits: NDArray, meant: NDArray) -> Hits:
    logits, known = checked_features(logits, "logits"), meant >= 0
    more = hits(None, logits[known], meant[known]) if known.any() else Hits(0, 0)
    return merge_hits(stats or Hits(0, 0), Hits(more.right, more.count, int((~known).sum())))


def _left_out(stats: Hits) -> list[str]:
    every = stats.count + stats.unknown
    said = f"caption accuracy is of {stats.count:,} of {every:,} samples: the others' captions mean no known class"
    return [said] if stats.unknown else []


def class_accuracy(logits: NDArray, labels: NDArray) -> float:
    """Share in [0, 1] of the images whose largest logit (N, K) is at their label (N,)."""
    return _accuracy(hits(None, logits, labels))


def _accuracy(stats: Hits) -> float:
    return stats.right / stats.count


def _mean(stats: frechet.Moments) -> dict[str, float]:
    """The CLIP score, and its standard error over samples if there are two."""
    found = {"clip_score": float(stats.mean[0])}
    more = stats.count > 1
    return found | ({"clip_score_std": math.sqrt(stats.covariance[0, 0] / stats.count)} if more else {})


def _precision_recall(stats: rows.Rows, reference: rows.Rows) -> dict[str, float]:
    # A fake's radius needs every other fake, so no smaller statistic merges exactly: 50,000 of width 2,048 are 0.4 GB.
    precision, recall = precision_recall(reference.ordered, stats.ordered)
    return {"precision": precision, "recall": recall}


METRICS = extensions.Table(
    "metrics",
    {
        "frechet": Metric(
            needs=("pool",),
            update=lambda stats, batch: frechet.update(stats, batch["pool"]),
            merge=frechet.merge,
            value=lambda stats, reference: {"fd": frechet.frechet_distance(stats, reference)},
            reference=True,
            better={"fd": "lower"},
        ),
        "sfid": Metric(
            needs=("spatial",),
            update=lambda stats, batch: frechet.update(stats, batch["spatial"]),
            merge=frechet.merge,
            value=lambda stats, reference: {"sfid": frechet.frechet_distance(stats, reference)},
            reference=True,
            better={"sfid": "lower"},
        ),
        "inception_score": Metric(
            needs=("logits_unbiased",),
            update=lambda stats, batch: inception_score.update(stats, batch, "logits_unbiased"),
            merge=inception_score.merge,
            value=lambda stats, reference: inception_score.value(stats),
            reference=False,
            better={"is": "higher"},
            notes=lambda stats, reference: inception_score.notes(stats),
        ),
        "precision_recall": Metric(
            needs=("pool",),
            update=lambda stats, batch: rows.collect(stats, batch, "pool"),
            merge=rows.merge,
            value=_precision_recall,
            reference=True,
            better={"precision": "higher", "recall": "higher"},
            reference_rows=NEIGHBOURS,
        ),
        "kid": Metric(
            needs=("pool",),
            update=lambda stats, batch: rows.collect(stats, batch, "pool"),
            merge=rows.merge,
            value=lambda stats, reference: kid.value(reference.ordered, stats.ordered),
            reference=True,
            better={"kid": "lower"},
            reference_rows=NEIGHBOURS,
            notes=lambda stats, reference: kid.notes(len(reference.index), len(stats.index)),
        ),
        "clip_score": Metric(
            needs=("cosine",),
            update=lambda stats, batch: frechet.update(stats, SCALE * np.maximum(batch["cosine"], 0.0)[:, None]),
            merge=frechet.merge,
            value=lambda stats, reference: _mean(stats),
            reference=False,
            better={"clip_score": "higher"},
        ),
        "class_accuracy": Metric(
            needs=("logits", "labels"),
            update=lambda stats, batch: hits(stats, batch["logits"], batch["labels"]),
            merge=merge_hits,
            value=lambda stats, reference: {"class_accuracy": _accuracy(stats)},
            reference=False,
            better={"class_accuracy": "higher"},
        ),
        "caption_accuracy": Metric(
            needs=("logits", "meant"),
            update=lambda stats, batch: _told_hits(stats, batch["logits"], batch["meant"]),
            merge=merge_hits,
            value=lambda stats, reference: {"caption_accuracy": _accuracy(stats)} if stats.count else {},
            reference=False,
            better={"caption_accuracy": "higher"},
            notes=lambda stats, reference: _left_out(stats),
        ),
    },
)
