"""Statistics of one set of images by one detector: gathered in one pass, or read from a file, and written to one.

The file is an .npz laid out as ADM's references: `mu` (D,), `sigma` (D, D) of the pool features and `mu_s`, `sigma_s`
of the spatial ones, float64, ddof 1. ADM's hold images under `arr_0`; ours hold features of images under `pool`
instead, and their provenance under `haste`.

N images, D feature width.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from haste.files import artefact, npz
from haste.files.npz import BROKEN, SUFFIX, headers
from haste.metrics import rows
from haste.metrics.frechet import Moments
from haste.metrics.scores import METRICS
from haste.sampling.samples import Samples, open_samples
from haste.score.views import READ, Batch, View


@dataclasses.dataclass
class Side:
    """The statistics of one set of images by one detector.

    about: the images, JSON; detector: as `Detector.about`; stats: metric -> its statistic; kept: features by name, for
    error bars; absent: metric -> why there is no statistic.
    """

    about: dict[str, Any]
    detector: Mapping[str, Any]
    stats: dict[str, Any] = dataclasses.field(default_factory=dict)
    kept: dict[str, rows.Rows] = dataclasses.field(default_factory=dict)
    absent: dict[str, str] = dataclasses.field(default_factory=dict)


def gather(view: View, metrics: Collection[str], *, most: int | None = None, keep: Collection[str] = ()) -> Side:
    """The statistics of metrics (names in METRICS), in one pass over a view.

    Args:
        view: a detector's features.
        metrics: those whose outputs the detector lacks are left out, with the reason.
        most: most images that precision, recall and KID use, evenly spaced; None is all.
        keep: outputs whose features are kept unchanged.

    Raises:
        ValueError: features that are not finite, or images that cannot be read; the message says which.
    """
    side = Side({}, view.detector)
    for name in METRICS:
        if name in metrics and (lacking := set(METRICS[name].needs) - set(view.outputs)):
            side.absent[name] = f"{view.detector['name']} gives no {' and '.join(sorted(lacking))}"
    names = [name for name in METRICS if name in metrics and name not in side.absent]
    near = [name for name in names if METRICS[name].reference_rows]
    pooled = ("pool",) if near or "pool" in keep else ()
    chosen = _chosen(view.count, most)
    for batch in _blocks(view.batches()):
        try:
            for name in set(names) - set(near):
                side.stats[name] = METRICS[name].update(side.stats.get(name), batch)
            for name in (*pooled, *(name for name in keep if name != "pool" and name in view.outputs)):
                part = batch if chosen is None else {key: value[chosen[batch["index"]]] for key, value in batch.items()}
                if len(part["index"]):
                    side.kept[name] = rows.collect(side.kept.get(name), part, name)
        except ValueError as error:
            low, high = batch["index"][[0, -1]]
            raise ValueError(f"{view.facts()['path']}: images {low} to {high}: {error}") from error
    side.about = view.facts()
    return dataclasses.replace(side, stats=side.stats | {name: side.kept["pool"] for name in near})


def spaced(count: int, most: int | None) -> NDArray[np.int64]:
    """Rows (at most `most` of `count`, None for all), evenly spaced: the same ones whatever the number of shards."""
    return np.arange(count) if most is None or count <= most else np.arange(most) * count // most


def _chosen(count: int, most: int | None) -> NDArray[np.bool_] | None:
    """Which (N,) of `count` images are used; None is all."""
    if most is None or count <= most:
        return None
    found = np.zeros(count, dtype=bool)
    found[spaced(count, most)] = True
    return found


def _blocks(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same rows in blocks of READ: merging moments costs as much for ten images as for a thousand."""
    held: list[Batch] = []
    for batch in batches:
        held.append(batch)
        if sum(len(part["index"]) for part in held) >= READ:
            yield _joined(held)
            held = []
    if held:
        yield _joined(held)


def _joined(parts: list[Batch]) -> Batch:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


# ---- files


@dataclasses.dataclass(frozen=True)
class Reference:
    """What an .npz of statistics holds.

    moments: "pool" and "spatial", if present; samples: its images, if it has any; near: pool features of some of its
    images, if it has those; detector: the one that computed them, None if the file does not state it; about: the file,
    JSON.
    """

    path: Path
    moments: Mapping[str, Moments]
    samples: Samples | None
    near: rows.Rows | None
    detector: Mapping[str, Any] | None
    about: dict[str, Any]


def holds_statistics(path: Path) -> bool:
    """Whether a file is an .npz with statistics. Raises ValueError for an .npz that cannot be read."""
    return path.suffix == ".npz" and path.is_file() and "mu" in headers(path)


def read_reference(path: Path) -> Reference:
    """Read statistics: ADM's, ours, or any file with `mu` and `sigma`.

    Raises:
        ValueError: truncated, pickled, of inconsistent shapes, not finite, or not covariances.
    """
    names, moments = headers(path), dict[str, Moments]()
    header = _header(path) if "haste" in names else {}
    count = header.get("images")
    for output, suffix in SUFFIX.items():
        if f"mu{suffix}" in names:
            npz.check_moments(path, names, output, None if header else npz.WIDTHS[output])
            moments[output] = _moments(path, suffix, count)
    near = _near(path, moments["pool"].mean.size) if "pool" in names else None
    samples = open_samples(path) if "arr_0" in names else None
    about = {"path": str(path), "kind": "statistics", "identity": artefact.file_identity(path), "images": count}
    about |= {"holds": sorted(set(names) - {"haste"})}
    if samples is not None:
        about |= {"pictures": samples.count, "size": list(samples.size)}
    elif header:
        about |= {"size": header["source"].get("size"), "source": header["source"]}
    return Reference(path, moments, samples, near, header.get("detector"), about)


def _header(path: Path) -> dict[str, Any]:
    try:
        header = json.loads(str(_array(path, "haste")))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: damaged or edited: 'haste' is not JSON ({error})") from error
    artefact.check_header(path, header if isinstance(header, dict) else {}, "statistics")
    artefact.check_entries(path, header, source=dict, detector=dict)
    artefact.check_entries(path, header["detector"], identity=str, name=str, outputs=dict)
    if header.get("images") is not None:
        artefact.check_entries(path, header, images=int)
    return header


def _moments(path: Path, suffix: str, count: int | None) -> Moments:
    mu, sigma = f"mu{suffix}", f"sigma{suffix}"
    mean, covariance = (_array(path, name) for name in (mu, sigma))
    try:
        # ADM's files do not state the number of images; the distance only needs it to be of full rank.
        found = Moments.of_covariance(mean.size + 1 if count is None else count, mean, covariance)
    except ValueError as error:
        raise ValueError(f"{path}: {mu}, {sigma}: {error}") from error
    scale = float(np.abs(covariance).max())
    if np.abs(covariance - covariance.T).max() > 1e-6 * scale or covariance.diagonal().min() < -1e-6 * scale:
        raise ValueError(f"{path}: {sigma} is no covariance: it is not symmetric, or holds a negative variance")
    return found


def _near(path: Path, width: int) -> rows.Rows:
    pool = _array(path, "pool")
    if pool.ndim != 2 or pool.shape[1] != width:
        raise ValueError(f"{path}: pool is {pool.shape}, expected (N, {width})")
    return rows.collect(None, {"pool": pool}, "pool")


def _array(path: Path, name: str) -> NDArray:
    try:
        with np.load(path, allow_pickle=False) as file:
            return file[name]
    except ValueError as error:
        raise ValueError(f"{path}: {name} is pickled or broken, and is not read ({error})") from error
    except BROKEN as error:
        raise ValueError(f"{path}: {name} cannot be read, the file is truncated or damaged ({error})") from error


def write_reference(path: Path, side: Side) -> None:
    """Write a side's statistics, readable by `read_reference` and by other tools."""
    arrays: dict[str, NDArray] = {}
    for output, name in (("pool", "frechet"), ("spatial", "sfid")):
        if name in side.stats:
            moments = side.stats[name]
            arrays |= {f"mu{SUFFIX[output]}": moments.mean, f"sigma{SUFFIX[output]}": moments.covariance}
    if "frechet" not in side.stats:
        raise ValueError(f"{path}: statistics need the Frechet distance among the metrics")
    near = [stats for name, stats in side.stats.items() if METRICS[name].reference_rows]
    if near:
        arrays["pool"] = near[0].ordered
    # The number of images is unknown for statistics that do not state it.
    header = {"schema": artefact.SCHEMA, "kind": "statistics", "images": side.about.get("images")}
    header |= {"detector": dict(side.detector), "source": side.about, "provenance": artefact.provenance()}
    with artefact.replacing(path) as aside, contextlib.closing(open(aside, "wb")) as file:
        np.savez(file, allow_pickle=False, haste=np.array(artefact.canonical(header)), **arrays)
