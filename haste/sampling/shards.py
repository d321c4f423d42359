"""Samples in shards: drawn in batches, kept until the shard is complete, written as ADM's .npz."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from haste.files import artefact
from haste.files.npz import ADM
from haste.files.progress import Progress
from haste.files.store import shard_range
from haste.sampling import batches, looks
from haste.sampling.painter import Painter, drawn_together, log

_REST = ("arr_0", "nfe", "haste", *looks.FIELDS)  # arrays in such a file besides the fields of the condition


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A shard that is wanted of one set of samples: what draws them, the .npz to write, the set's key and recipe, and
    what else the record says."""

    painter: Painter
    path: Path
    key: str
    recipe: dict[str, Any]
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def draw_shards(
    sets: Sequence[Wanted], *, shard: int, shards: int, batch: int, inputs: dict[str, str]
) -> dict[Path, Exception]:
    """Draw one shard of some sets of samples, which differ only in how they are guided, each into ADM's .npz: `arr_0`
    uint8 NHWC, `arr_1` labels, and the provenance record as `haste`. For a condition other than labels, its fields have
    their own names.

    Images are written while the next batch is drawn, so memory holds two batches of them for each set. Batches are
    kept: after a kill the same call draws only what is missing, with the same bits, and nothing of a complete shard.
    `haste.sampling.batches.forget` removes them. Besides ADM's arrays the .npz has `nfe`, a sample's evaluations, and
    `haste.sampling.looks.FIELDS`.

    Args:
        sets: one or more.
        shard: which shard, from 0.
        shards: the number of shards.
        batch: images per batch; changes results only by float rounding.
        inputs: identities of what the samples are made by, to be recorded.

    Returns:
        By path, why a set was given up: its samples are not finite, or its file cannot be written (OSError when it is
        begun). The others are drawn nevertheless. In each record `seconds` is an equal share of the time of all,
        whatever a set's guidance costs.
    """
    started, name, failed = time.monotonic(), f"samples, shard {shard} of {shards}", dict[Path, Exception]()
    todo = [one for one in sets if not _is_there(one, inputs, name)]
    if not todo:
        return failed
    indices = shard_range(todo[0].painter.sampling.count, shard, shards)

    def draw(rows: range, places: Sequence[int]) -> list[dict[str, np.ndarray] | None]:
        size, painters = len(rows) * len(places), [todo[place].painter for place in places]
        found = drawn_together(painters, rows, lambda share: watch.partly(share * size))
        failed.update(
            {todo[i].path: one for i, one in zip(places, found, strict=True) if isinstance(one, FloatingPointError)}
        )
        return [None if isinstance(one, FloatingPointError) else one for one in found]

    with contextlib.ExitStack() as opened, ThreadPoolExecutor(1, thread_name_prefix="writing") as thread:
        files = [*_begun(todo, len(indices), opened, failed)]
        todo = [file.wanted for file in files]
        watch = Progress(name if len(todo) == 1 else f"{name}, of {len(todo)} sets", len(todo) * len(indices))
        kept = [batches.Kept(batches.folder_of(one.path.parent), inputs) for one in todo]
        writing = [thread.submit(lambda: None) for _ in todo]
        for place, found, keep in batches.drawn(kept, indices, batch, draw):
            writing[place].result()
            writing[place] = thread.submit(files[place].write, found, keep)
            watch.add(len(found["nfe"]), new=keep is not None)
        for future in writing:
            future.result()
        for file in files:
            if file.wanted.path not in failed:
                file.finish(inputs, (time.monotonic() - started) / len(todo))
    return failed


def _begun(
    todo: Sequence[Wanted], count: int, opened: contextlib.ExitStack, failed: dict[Path, Exception]
) -> Iterator[_File]:
    """The files of these sets; those that cannot be begun are put into `failed`."""
    for one in todo:
        try:
            yield opened.enter_context(_File(one, count))
        except OSError as error:
            failed[one.path] = error


class _File:
    """A shard's .npz while it is written; one that is not finished leaves nothing behind."""

    def __init__(self, wanted: Wanted, count: int):
        painter = wanted.painter
        self.wanted, self.count = wanted, count
        self.fields = {**painter.condition.fields, "nfe": ((), np.int64), **looks.FIELDS}
        self._made: list[Mapping[str, np.ndarray]] = [
            {name: np.zeros((0, *row), kind) for name, (row, kind) in self.fields.items()}
        ]

    def __enter__(self) -> _File:
        side = self.wanted.painter.autoencoder.factor * self.wanted.painter.model.input_size
        shape = {"descr": "|u1", "fortran_order": False, "shape": (self.count, side, side, 3)}
        with contextlib.ExitStack() as opened:  # one that fails half way leaves nothing behind either
            aside = opened.enter_context(artefact.replacing(self.wanted.path))
            self._archive = opened.enter_context(zipfile.ZipFile(aside, "w"))
            self._images = self._archive.open("arr_0.npy", "w", force_zip64=True)
            opened.callback(self._images.close)
            np.lib.format.write_array_header_1_0(self._images, shape)
            self._opened = opened.pop_all()
        return self

    def write(self, found: Mapping[str, np.ndarray], keep: Callable[[], None] | None) -> None:
        """Write a batch's images, after `keep` if it was drawn now."""
        if keep is not None:
            keep()
        self._images.write(np.ascontiguousarray(found["image"]).data)
        rows = {name: found[name] for name in found if name != "image"}
        self._made.append({**rows, **looks.looks_of(found["image"])})

    def finish(self, inputs: dict[str, str], seconds: float) -> None:
        """Write everything else, and give the file its name."""
        self._images.close()
        rest = {ADM.get(name, name): np.concatenate([found[name] for found in self._made]) for name in self.fields}
        nfe = float(rest["nfe"].mean()) if self.count else None
        header = {**self.wanted.painter.condition.arguments, "schema": artefact.SCHEMA, "kind": "samples", "nfe": nfe}
        made = artefact.provenance(key=self.wanted.key, recipe=self.wanted.recipe, inputs=inputs, seconds=seconds)
        header |= {**self.wanted.facts, **made}
        rest["haste"] = np.array(artefact.canonical(header))
        for entry, array in rest.items():
            with self._archive.open(f"{entry}.npy", "w") as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
        self._opened.close()
        batches.keep(self.wanted.path, batches.folder_of(self.wanted.path.parent))

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._opened.__exit__(*(kind, error, trace) if kind else (EOFError, EOFError(), None))


def _is_there(one: Wanted, inputs: dict[str, str], name: str) -> bool:
    there = batches.again(one.path, batches.folder_of(one.path.parent), lambda file: _is_of(file, one.key, inputs))
    if there:
        log.info("%s: drawn before, %s", name, one.path)
    return there


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
        ValueError: missing, truncated, or not as `draw_shards` writes it.
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
