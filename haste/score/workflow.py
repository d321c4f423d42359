"""Scores: features of samples against features of real images."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from haste.files import artefact
from haste.files.store import Store
from haste.metrics.frechet import Moments
from haste.metrics.scores import METRICS, finite
from haste.metrics.uncertainty import frechet_error
from haste.plan.names import MOST_COMPARED
from haste.score.columns import VALUES
from haste.score.comparable import of_images
from haste.score.sides import Side, read_reference, spaced, write_reference

log = logging.getLogger("haste.score")

READ = 4096  # rows read at once
MOMENTS = "moments.npz"  # beside the features of real images: their means and covariances, or those of a reference file
OF_MOMENTS = ("frechet", "sfid")  # the metrics that these are the statistics of
FLOOR = MOST_COMPARED  # most real images on each side of the floor


def statistics(features: Store, rows: np.ndarray | None = None, metrics: Sequence[str] | None = None) -> dict[str, Any]:
    """The statistics of metrics over the rows of a features store, in one pass.

    Args:
        features: a store of a detector's outputs and `label`.
        rows: which rows, in the samples' order, on which some metrics depend; None is all.
        metrics: names in METRICS, None for all; those whose outputs the store lacks are left out.
    """
    rows = np.arange(features.count) if rows is None else rows
    fields = {"labels" if name == "label" else name: name for name in features.fields}
    metrics = list(METRICS) if metrics is None else metrics
    chosen = [name for name in metrics if set(METRICS[name].needs) <= set(fields)]
    needed = {need for name in chosen for need in METRICS[name].needs}
    stats: dict[str, Any] = {}
    for low in range(0, len(rows), READ):
        some = rows[low : low + READ]
        batch = {name: features.read(fields[name], some) for name in needed}
        batch["index"] = np.arange(low, low + len(some))  # so that a row's split does not depend on the batches
        for name in chosen:
            stats[name] = METRICS[name].update(stats.get(name), batch)
    return stats


def reference_statistics(
    features: Store, rows: np.ndarray | None = None, metrics: Sequence[str] | None = None
) -> dict[str, Any]:
    """As `statistics`, for the real images that samples are compared with, each on as many rows as the metric uses."""
    rows = np.arange(features.count) if rows is None else rows
    stats: dict[str, Any] = {}
    metrics = list(METRICS) if metrics is None else metrics
    for most in {METRICS[name].reference_rows for name in metrics}:
        mine = [n for n in metrics if METRICS[n].reference and METRICS[n].reference_rows == most]
        stats |= statistics(features, rows[spaced(len(rows), most)], mine)
    return stats


def values(samples: dict[str, Any], reference: dict[str, Any]) -> dict[str, float]:
    """The value of every metric that both sides have a statistic for. FloatingPointError if one is not finite."""
    found: dict[str, float] = {}
    for name, stats in samples.items():
        if _is_scored(name, reference):
            real = reference.get(name) if METRICS[name].reference else None
            found |= finite(METRICS[name].value(stats, real), "the samples")
    return found


def _is_scored(name: str, reference: dict[str, Any]) -> bool:
    return not METRICS[name].reference or name in reference


def real_statistics(reference: Store) -> tuple[dict[str, Any], dict[str, Any]]:
    """The statistics that samples are compared with, and their description in JSON.

    A reference file's own means and covariances, which are of more images than it holds, replace those of
    its images; precision, recall and KID use the images.

    Raises:
        ValueError: the file's statistics are missing, or not those that the features were stored with.
    """
    # pytorch-fid's files do not say of how many images they are.
    about, facts = {"images": reference.count or None, "identity": reference.identity}, reference.manifest
    path = reference.folder / MOMENTS
    if "moments" not in facts:
        moments: Mapping[str, Moments] = kept_moments(reference)
    elif not path.is_file() or artefact.file_identity(path) != facts["moments"]:
        raise ValueError(f"{path}: missing, or not what was stored with {reference.folder}; remove that folder")
    else:
        moments = read_reference(path).moments
        about |= {"file": facts["file_name"], "sha256": facts["file"]}
    own = {name: moments[METRICS[name].needs[0]] for name in OF_MOMENTS if METRICS[name].needs[0] in moments}
    return reference_statistics(reference, metrics=[name for name in METRICS if name not in OF_MOMENTS]) | own, about


def kept_moments(reference: Store) -> dict[str, Moments]:
    """The moments of all real images by output, kept beside their features: ImageNet's 21 GB are read once, not once
    a score. Computed where there is no such file, or one of other features.
    """
    path = reference.folder / MOMENTS
    try:
        found = read_reference(path) if path.exists() else None
        if found is not None and (found.about.get("source") or {}).get("identity") == reference.identity:
            return dict(found.moments)
    except ValueError as error:
        log.warning("%s; it is computed again", error)
    stats = reference_statistics(reference, metrics=OF_MOMENTS)
    about = {"path": str(reference.folder), "images": reference.count, "identity": reference.identity}
    side = Side(about, {"outputs": {}, **about_detector("reference", reference)}, stats)
    with contextlib.suppress(OSError):  # a folder that is not ours to write to
        write_reference(path, side)
        return dict(read_reference(path).moments)
    return {METRICS[name].needs[0]: one for name, one in stats.items()}


def notes(samples: dict[str, Any], reference: dict[str, Any]) -> list[str]:
    """Remarks on these values, a sentence each."""
    scored = {name: stats for name, stats in samples.items() if _is_scored(name, reference)}
    found = [METRICS[name].notes(stats, reference.get(name)) for name, stats in scored.items()]
    return list(dict.fromkeys(sentence for sentences in found for sentence in sentences))


def score(
    features: Store,
    reference: Store,
    *,
    detector: str,
    about: dict[str, Any],
    key: str,
    path: Path,
    pixels: Mapping[str, Any] | None = None,
) -> dict:
    """Score samples against real images and write the JSON from which the table is made.

    Args:
        features: the samples' features.
        reference: the real images' features.
        detector: the detector's name, which the scores' columns carry.
        about: what else determines comparability: state, sampling, NFE.
        key: the score's key.
        path: where to write.
        pixels: `haste.sampling.looks.facts` of the samples, for remarks.

    Raises:
        ValueError: the features of the two sides are by different detectors.
        FloatingPointError: a score is not finite.
    """
    started = time.monotonic()
    check_detector(features.folder, features.manifest["detector"], reference)
    mine, (real, against) = statistics(features), real_statistics(reference)
    found = values(mine, real)
    inputs = {"features": features.identity, "reference": reference.identity}
    result = {
        "schema": artefact.SCHEMA,
        "kind": "score",
        "key": key,
        **about,
        "detector": about_detector(detector, features),
        "samples": features.count,
        "reference": against,
        "scores": found,
        "errors": finite(_errors(features, mine, real), "the samples"),
        "notes": [*of_images(pixels or {}), *_notes_on(features, against, mine, real), *notes(mine, real)],
        "provenance": artefact.provenance(key=key, inputs=inputs, seconds=time.monotonic() - started),
    }
    artefact.write_json(path, result)
    return result


def _errors(features: Store, mine: dict[str, Any], real: dict[str, Any]) -> dict[str, float | None]:
    """The standard error of the Fréchet distance due to the number of samples; None of too few to know it."""
    if "frechet" not in mine or "frechet" not in real:
        return {}
    starts, name = range(0, features.count, READ), METRICS["frechet"].needs[0]
    blocks = (features.read(name, np.arange(low, min(low + READ, features.count))) for low in starts)
    return {"fd": frechet_error(mine["frechet"], real["frechet"], blocks)}


def floor(reference: Store, *, detector: str, held_out_accuracy: float | None, key: str, path: Path) -> dict:
    """Real against real: the even rows of the reference against the odd ones, the best that a model can be expected
    to reach.

    Each side has half of the reference's images, so the distance is, if anything, too large; for a large reference,
    FLOOR images per side, evenly spaced. The class accuracy is that on held-out images, because the detector was
    trained on the reference; None if it does not classify them.
    """
    started = time.monotonic()
    rows = spaced(reference.count, 2 * FLOOR)
    even, odd = rows[0::2], rows[1::2]
    mine, real = statistics(reference, even), reference_statistics(reference, odd)
    found = values(mine, real)
    found |= {} if held_out_accuracy is None else {"class_accuracy": held_out_accuracy}
    result = {
        "schema": artefact.SCHEMA,
        "kind": "score",
        "floor": True,
        "key": key,
        "detector": about_detector(detector, reference),
        "samples": len(even),
        "reference": {"images": len(odd), "identity": reference.identity},
        "scores": found,
        "notes": notes(mine, real),
        "provenance": artefact.provenance(
            key=key, inputs={"reference": reference.identity}, seconds=time.monotonic() - started
        ),
    }
    artefact.write_json(path, result)
    return result


def _notes_on(
    features: Store, against: Mapping[str, Any], mine: Mapping[str, Any], real: Mapping[str, Any]
) -> list[str]:
    """Remarks on detector and reference, and on the scores for which this has too little."""
    found, about = [], features.manifest.get("about", {})
    if about.get("published") is False:
        found.append(f"{about['name']}: these are not the weights that published scores were made with")
    if (file := against.get("file")) is None:
        return found
    of_moments = " and ".join(_columns([name for name in OF_MOMENTS if name in mine and name in real]))
    images = ", of images that the file does not name"
    if against["images"] is not None:
        images = f", precision, recall and KID against its {against['images']:,} images"
    elif "sfid" not in real:
        found.append(f"nothing in {file} says how its mu and sigma were made; they are taken to be by this detector")
    found.append(f"{of_moments} against the statistics in {file}{images}")
    lacking = [name for name in mine if METRICS[name].reference and name not in real]
    for names, why in (({"sfid"}, "mu_s and sigma_s"), ({*lacking} - {"sfid"}, "images")):
        if left := _columns([name for name in lacking if name in names]):
            found.append(f"{', '.join(left)}: left out, because the reference {file} holds no {why}")
    return found


def _columns(metrics: Sequence[str]) -> list[str]:
    return ["FID" if name == "FD" else name for metric, name in VALUES.values() if metric in metrics]


def about_detector(name: str, features: Store) -> dict[str, Any]:
    return {**features.manifest.get("about", {}), "name": name, "identity": features.manifest["detector"]}


def check_detector(where: Path, seen: str, reference: Store) -> None:
    """Refuse features by another detector (its identity) than those of the reference; raises ValueError."""
    real = reference.manifest["detector"]
    if seen != real:
        raise ValueError(
            f"{where}: features by detector {seen[:12]}, but those of the reference {reference.folder} by "
            f"{real[:12]}: they cannot be compared"
        )
