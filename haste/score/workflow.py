"""Scores: features of samples against features of real images."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from haste import artefact
from haste.data.store import Store
from haste.metrics.scores import METRICS

READ = 4096  # rows read at once
SHOWN = ("frechet", "precision_recall", "class_accuracy")  # what the workflow's table has


def statistics(features: Store, rows: np.ndarray | None = None, metrics: Sequence[str] = SHOWN) -> dict[str, Any]:
    """The statistics of metrics over the rows of a features store, in one pass.

    Args:
        features: a store with `pool` (D,), `label` and, for a classifier, `logits` (K,).
        rows: which rows; None is all.
        metrics: names in METRICS; those that the store has not the outputs for are left out.
    """
    rows = np.arange(features.count) if rows is None else rows
    needed = {"pool": "pool", "logits": "logits", "labels": "label"}
    stats: dict[str, Any] = {}
    for low in range(0, len(rows), READ):
        chosen = rows[low : low + READ]
        batch = {name: features.read(field, chosen) for name, field in needed.items() if field in features.fields}
        for name in metrics:
            metric = METRICS[name]
            if set(metric.needs) <= set(batch):
                stats[name] = metric.update(stats.get(name), batch)
    return stats


def values(samples: dict[str, Any], reference: dict[str, Any]) -> dict[str, float]:
    """The value of every metric that both sides have a statistic for."""
    found: dict[str, float] = {}
    for name, stats in samples.items():
        metric = METRICS[name]
        found |= metric.value(stats, reference[name] if metric.reference else None)
    return found


def score(features: Store, reference: Store, *, detector: str, about: dict[str, Any], key: str, path: Path) -> dict:
    """Score samples against real images and write the JSON that the table is made of.

    Args:
        features: the samples' features.
        reference: the real images' features.
        detector: the detector's name; the scores' columns carry it.
        about: what else decides comparability: state, sampling, NFE.
        key: the score's key.
        path: where to write.

    Raises:
        ValueError: the two sides were seen by different detectors.
    """
    started = time.monotonic()
    _check_detectors(features, reference)
    found = values(statistics(features), statistics(reference))
    inputs = {"features": features.identity, "reference": reference.identity}
    result = {
        "schema": artefact.SCHEMA,
        "kind": "score",
        "key": key,
        **about,
        "detector": {"name": detector, "identity": features.manifest["detector"]},
        "samples": features.count,
        "reference": {"images": reference.count, "identity": reference.identity},
        "scores": found,
        "provenance": artefact.provenance(key=key, inputs=inputs, seconds=time.monotonic() - started),
    }
    artefact.write_json(path, result)
    return result


def floor(reference: Store, *, detector: str, held_out_accuracy: float, key: str, path: Path) -> dict:
    """Real against real: the even rows of the reference against the odd ones. What no model can be asked to beat.

    Half as many images on each side as the reference has, so its distance is, if anything, too large. The class
    accuracy is that on held-out images: the detector was trained on the reference.
    """
    started = time.monotonic()
    even, odd = np.arange(0, reference.count, 2), np.arange(1, reference.count, 2)
    found = values(statistics(reference, even), statistics(reference, odd))
    found["class_accuracy"] = held_out_accuracy
    result = {
        "schema": artefact.SCHEMA,
        "kind": "score",
        "floor": True,
        "key": key,
        "detector": {"name": detector, "identity": reference.manifest["detector"]},
        "samples": len(even),
        "reference": {"images": len(odd), "identity": reference.identity},
        "scores": found,
        "provenance": artefact.provenance(
            key=key, inputs={"reference": reference.identity}, seconds=time.monotonic() - started
        ),
    }
    artefact.write_json(path, result)
    return result


def _check_detectors(features: Store, reference: Store) -> None:
    seen, real = features.manifest["detector"], reference.manifest["detector"]
    if seen != real:
        raise ValueError(
            f"{features.folder}: seen by detector {seen[:12]}, but the reference {reference.folder} by {real[:12]}: "
            "their scores would compare nothing"
        )
