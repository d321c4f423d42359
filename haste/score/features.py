"""Detectors' features of samples and of real images, as features stores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from haste.data.condition import Condition
from haste.files import artefact
from haste.files.npz import SUFFIX, check_reference
from haste.files.store import Store, write_shard
from haste.metrics.clip import Clip
from haste.metrics.detector import Detector
from haste.sampling.samples import open_samples
from haste.sampling.shards import asked
from haste.score.sides import read_reference
from haste.score.workflow import MOMENTS


def feature_shard(
    detector: Detector,
    path: Path,
    *,
    folder: Path,
    key: str,
    recipe: dict,
    shard: int,
    shards: int,
    total: int,
    condition: Condition,
    batch: int = 256,
) -> None:
    """A detector's features of one shard of samples, as a shard of a features store. Where samples were told words, by
    CLIP also the `cosine` of each and its words, and by a classifier the class that these mean, `meant`.

    Args:
        detector: extracts the features.
        path: the .npz that `draw_shards` wrote.
        folder: the features store's.
        key: the features store's key.
        recipe: the features store's recipe.
        shard: which shard, from 0.
        shards: how many there are.
        total: samples in all shards.
        condition: of the samples.
        batch: batch size of the detector; changes results by float rounding only.

    Raises:
        ValueError: the samples are missing, truncated, or not as `draw_shards` writes them.
    """
    images = open_samples(path)
    rows, header = asked(path)
    said = condition.words(rows) if isinstance(detector, Clip) else None
    meant = condition.meant(rows) if detector.classes else None
    rows = rows if meant is None else {**rows, "meant": meant}
    told: dict[str, tuple[Sequence[int], DTypeLike]] = {} if said is None else {"cosine": ((), np.float32)}
    made = {name: value for name, value in header["inputs"].items() if name != "detector"}
    inputs = {**made, "detector": detector.identity}
    facts = {**inputs, "about": _about(detector)}

    def batches() -> Iterator[dict[str, np.ndarray]]:
        done = 0
        for pictures in images.batches(batch):
            mine = {name: row[done : done + len(pictures)] for name, row in rows.items()}
            seen = detector.arrays(pictures, path, done)
            if said is not None:
                assert isinstance(detector, Clip)
                mine["cosine"] = detector.cosines(seen["pool"], said[done : done + len(pictures)])
            yield seen | mine
            done += len(pictures)

    write_shard(
        folder,
        kind="features",
        key=key,
        recipe=recipe,
        shard=shard,
        shards=shards,
        total=total,
        fields=_outputs(detector) | told | {name: (row.shape[1:], row.dtype) for name, row in rows.items()},
        batches=batches(),
        provenance=artefact.provenance(key=key, recipe=recipe, inputs=inputs),
        facts=facts,
    )


def _about(detector: Detector) -> dict[str, Any]:
    # Not the configuration's name for it: another configuration that shares the store may use another name.
    return {**detector.about, "name": detector.kind}


def _outputs(detector: Detector) -> dict[str, tuple[Sequence[int], DTypeLike]]:
    return {name: ((width,), "float32") for name, width in detector.outputs.items()}


def reference_shard(
    images: Store, detector: Detector, *, folder: Path, key: str, recipe: dict, split: str = "train", batch: int = 256
) -> None:
    """Features of the real images of a split: the one-shard store that samples are compared with."""
    rows = images.range(split)

    def batches() -> Iterator[dict[str, np.ndarray]]:
        for low in range(0, len(rows), batch):
            chosen = rows[low : low + batch]
            found = detector.arrays(images.read("image", chosen), images.folder, chosen[0])
            yield found | {"label": images.read("label", chosen)}

    inputs = {"images": images.identity, "detector": detector.identity}
    common: dict[str, Any] = {"folder": folder, "key": key, "recipe": recipe}
    _write_reference(detector, batches(), len(rows), inputs, **common)


def reference_of_file(
    path: Path, detector: Detector, *, folder: Path, key: str, recipe: dict, batch: int = 256
) -> None:
    """As `reference_shard`, for a file of statistics: these, and features of the file's images, of which ADM's has some
    and pytorch-fid's none.

    Raises:
        ValueError: the file is missing, truncated, or not such a file, or has statistics by another detector.
    """
    check_reference(path, detector.kind)
    found = read_reference(path)
    if found.detector is not None and found.detector["identity"] != detector.identity:
        raise ValueError(
            f"{path}: statistics by {found.detector['name']} {found.detector['identity'][:12]}, expected "
            f"{detector.name} {detector.identity[:12]}"
        )
    images, moments = found.samples, found.moments
    arrays = {f"mu{SUFFIX[name]}": one.mean for name, one in moments.items()}
    arrays |= {f"sigma{SUFFIX[name]}": one.covariance for name, one in moments.items()}
    with artefact.replacing(folder / MOMENTS) as aside, open(aside, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]

    def batches() -> Iterator[dict[str, np.ndarray]]:
        done = 0
        for pictures in images.batches(batch) if images else ():
            # The file states no classes.
            yield detector.arrays(pictures, path, done) | {"label": np.full(len(pictures), -1)}
            done += len(pictures)

    inputs = {"detector": detector.identity, "file": found.about["identity"]}
    inputs |= {"images": images.identity()} if images else {}
    facts = {"file_name": path.name, "moments": artefact.file_identity(folder / MOMENTS)}
    common: dict[str, Any] = {"folder": folder, "key": key, "recipe": recipe}
    count = images.count if images else 0
    _write_reference(detector, batches(), count, inputs, facts=facts, **common)


def _write_reference(
    detector: Detector,
    batches: Iterator[dict[str, np.ndarray]],
    total: int,
    inputs: dict[str, str],
    *,
    folder: Path,
    key: str,
    recipe: dict,
    facts: dict[str, str] | None = None,
) -> None:
    """The single shard of a reference; `inputs` are identities, `facts` further entries about it."""
    write_shard(
        folder,
        kind="features",
        key=key,
        recipe=recipe,
        shard=0,
        shards=1,
        total=total,
        fields=_outputs(detector) | {"label": ((), np.int64)},
        batches=batches,
        provenance=artefact.provenance(key=key, recipe=recipe, inputs=inputs),
        facts={**inputs, "about": _about(detector), **(facts or {})},
    )
