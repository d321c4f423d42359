"""Samples in shards: drawn in batches, kept until the shard is complete, written as ADM's .npz."""

from __future__ import annotations

import json
import time
import zipfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from haste.files import artefact
from haste.files.npz import ADM
from haste.files.progress import Progress
from haste.files.store import shard_range
from haste.sampling import batches, looks
from haste.sampling.painter import Painter, log

_REST = ("arr_0", "nfe", "haste", *looks.FIELDS)  # arrays in such a file besides the fields of the condition


def draw_shard(
    painter: Painter,
    *,
    path: Path,
    key: str,
    recipe: dict,
    shard: int,
    shards: int,
    batch: int,
    inputs: dict[str, str],
    facts: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Draw one shard into ADM's .npz: `arr_0` uint8 NHWC, `arr_1` labels, and the provenance record as `haste`. For a
    condition other than labels, its fields have their own names.

    Images are written while the next batch is drawn, so memory holds two batches of them. Batches are kept: after a
    kill the same call draws only what is missing, with the same bits, and nothing if the shard is complete.
    `haste.sampling.batches.forget` removes them. Besides ADM's arrays the .npz has `nfe`, a sample's evaluations, and
    `haste.sampling.looks.FIELDS`.

    Args:
        painter: draws the samples.
        path: the .npz to write.
        key: the samples' key.
        recipe: the samples' recipe.
        shard: which shard, from 0.
        shards: the number of shards.
        batch: images per batch; changes results only by float rounding.
        inputs: identities of what the samples are made by, to be recorded.
        facts: what else the record says.
    """
    started, indices = time.monotonic(), shard_range(painter.sampling.count, shard, shards)
    name, aside = f"samples, shard {shard} of {shards}", batches.folder_of(path.parent)
    if batches.again(path, aside, lambda file: _is_of(file, key, inputs)):
        log.info("%s: drawn before, %s", name, path)
        return
    watch = Progress(name, len(indices))
    fields = {**painter.condition.fields, "nfe": ((), np.int64), **looks.FIELDS}
    side = painter.autoencoder.factor * painter.model.input_size
    made: list[Mapping[str, np.ndarray]] = [{name: np.zeros((0, *row), kind) for name, (row, kind) in fields.items()}]

    def draw(rows: range) -> dict[str, np.ndarray]:
        return painter.draw(rows, lambda share: watch.partly(share * len(rows)))

    def write(found: Mapping[str, np.ndarray], keep: Callable[[], None] | None) -> None:
        if keep is not None:
            keep()
        file.write(np.ascontiguousarray(found["image"]).data)
        made.append({**{name: found[name] for name in found if name != "image"}, **looks.looks_of(found["image"])})

    with artefact.replacing(path) as part, zipfile.ZipFile(part, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            shape = {"descr": "|u1", "fortran_order": False, "shape": (len(indices), side, side, 3)}
            np.lib.format.write_array_header_1_0(file, shape)
            with ThreadPoolExecutor(1, thread_name_prefix="writing") as thread:
                writing = thread.submit(lambda: None)
                for found, keep in batches.drawn(aside, indices, batch, inputs, draw):
                    writing.result()
                    writing = thread.submit(write, found, keep)
                    watch.add(len(found["nfe"]), new=keep is not None)
                writing.result()
        rest = {ADM.get(name, name): np.concatenate([found[name] for found in made]) for name in fields}
        nfe = float(rest["nfe"].mean()) if len(indices) else None
        header = {**painter.condition.arguments, "schema": artefact.SCHEMA, "kind": "samples", "nfe": nfe, **facts}
        header |= artefact.provenance(key=key, recipe=recipe, inputs=inputs, seconds=time.monotonic() - started)
        rest["haste"] = np.array(artefact.canonical(header))
        for entry, array in rest.items():
            with archive.open(f"{entry}.npy", "w") as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
    batches.keep(path, aside)


def _is_of(path: Path, key: str, inputs: dict[str, str]) -> bool:
    """Whether a finished shard has this recipe and was drawn from the same weights."""
    try:
        header = asked(path)[1]
        return (header["key"], header["inputs"]) == (key, inputs)
    except (ValueError, KeyError) as error:
        log.warning("%s: is drawn again (%s)", path, error)
        return False


def asked(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The requested arrays of a shard's samples, the rows of their condition, and the provenance record.

    Raises:
        ValueError: missing, truncated, or not as `draw_shard` writes it.
    """
    names = {entry: field for field, entry in ADM.items()}
    try:
        with np.load(path, allow_pickle=False) as file:
            rows = {names.get(entry, entry): file[entry] for entry in file.files if entry not in _REST}
            header = json.loads(str(file["haste"]))
        if not rows:
            raise ValueError("it has no conditions of its samples")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: expected samples with their labels and record, found others ({error})") from error
    artefact.check_header(path, header, "samples")
    return rows, header
