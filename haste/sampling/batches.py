"""Batches of samples, kept until their shard is complete, so that a kill costs only the current batch.

    SAMPLES/.batches/START.npz          START the index of a batch's first sample
    SAMPLES/.batches/shard-I-of-N.npz   a second name (hard link) of a finished shard, which takes no space

Readers of samples look only for finished shards. A batch gets its name when it is complete, and records its source: a
batch from other weights is drawn again. A finished shard keeps its second name until its score exists, because
Snakemake removes a job's outputs before it reruns the job, and sampling is the most expensive step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from haste.files import artefact
from haste.files.npz import read_npz

log = logging.getLogger("haste.data")

_NAME = re.compile(r"(\d{9,})\.npz$")
_SOURCE = "drawn_from"

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Kept:
    """The batches of one set of samples: their folder, see `folder_of`, and identities of what they are drawn from."""

    folder: Path
    source: Mapping[str, str]


def drawn(
    sets: Sequence[Kept], indices: range, size: int, draw: Callable[[range, list[int]], Sequence[Arrays | None]]
) -> Iterator[tuple[int, Arrays, Callable[[], None] | None]]:
    """The batches of a range of samples of some sets: the set's place, its batch, and what keeps it if it was drawn
    now; kept ones are read. Each set has its batches in order; what several lack is drawn together.

    Args:
        sets: of each of which all these samples are wanted.
        indices: the samples, from the first to the last.
        size: samples per batch. Kept batches may have another size; new ones fill the gaps between them.
        draw: (range, places of sets) -> for each of these sets arrays with one row per sample, or None if it is given
            up: it has no further batches.
    """
    starts, lows = [_starts(one.folder, indices) for one in sets], [indices.start] * len(sets)
    while (low := min(lows, default=indices.stop)) < indices.stop:
        lacking = list[int]()
        for place in [place for place, reached in enumerate(lows) if reached == low]:
            one, there = sets[place], low in starts[place]
            kept = _read(_path(one.folder, low), one.source, indices.stop - low) if there else None
            if kept is None:
                lacking.append(place)
            else:
                yield place, kept, None
                lows[place] += _length(kept)
        if lacking:
            # The others, who are ahead, are met where they are.
            beyond = [*lows, *(start for place in lacking for start in starts[place])]
            rows = range(low, min(low + size, indices.stop, *(start for start in beyond if start > low)))
            for place, found in zip(lacking, draw(rows, lacking), strict=True):
                lows[place] = indices.stop if found is None else rows.stop
                if found is not None:
                    one = sets[place]
                    yield place, found, partial(_keep_batch, _path(one.folder, low), found, one.source)


def _keep_batch(path: Path, found: Arrays, source: Mapping[str, str]) -> None:
    # Another process that drew the same shard may finish first and remove the folder: nothing is lost by that.
    with contextlib.suppress(FileNotFoundError), artefact.replacing(path) as aside, open(aside, "wb") as file:
        np.savez(file, **found, **{_SOURCE: np.array(artefact.canonical(dict(source)))})  # type: ignore[arg-type]


def folder_of(samples: Path) -> Path:
    """Where the batches of a folder of samples are kept, for all its shards."""
    return samples / ".batches"


def keep(shard: Path, folder: Path) -> None:
    """Give a finished shard its second name, under which `again` finds it."""
    name = folder / shard.name
    with contextlib.suppress(OSError):  # a file system without hard links: it would be drawn again, with the same bits
        folder.mkdir(exist_ok=True)
        name.unlink(missing_ok=True)
        os.link(shard, name)


def again(shard: Path, folder: Path, wanted: Callable[[Path], bool]) -> bool:
    """Whether a finished shard exists under its own name or its second one; if so, it has its own name afterwards.

    Args:
        shard: its own name.
        folder: where its second name would be; see `folder_of`.
        wanted: whether a file holds what would be drawn now.
    """
    second = folder / shard.name
    for path in (shard, second):
        if path.exists() and _whole(path) and wanted(path):
            if path is second:
                with artefact.replacing(shard) as aside:
                    os.link(second, aside)
            return True
    return False


def _whole(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except (OSError, zipfile.BadZipFile) as error:
        log.warning("%s: cannot be read and is drawn again (%s)", path, error)
        return False


def forget(folder: Path, indices: range) -> None:
    """Remove the batches that begin in a range of samples, whose shard is complete."""
    for start in _starts(folder, indices):
        _path(folder, start).unlink(missing_ok=True)


def close(folder: Path) -> None:
    """Remove the folder of kept batches, once all shards are complete."""
    shutil.rmtree(folder, ignore_errors=True)


def check_made(files: Sequence[str], what: str, state: object) -> None:
    """Refuse shards of a state's samples, or of their features, that nobody made; raises ValueError."""
    if gone := [path for path in files if not Path(path).exists()]:
        raise ValueError(
            f"{gone[0]}: this shard is missing, expected {what} from the job that draws these samples. Its log, or "
            f"that of other samples of {state}, may say why; the same snakemake command draws them"
        )


def mean_nfe(files: Sequence[str | Path]) -> float | None:
    """Function evaluations per sample, counted during sampling, averaged over shards; None if one is not known.

    Raises:
        ValueError: a shard cannot be read.
    """
    counts = []
    for path in files:
        try:
            found = _counts(path)
        except FileNotFoundError:  # samples may have been removed when their features are scored
            return None
        if "nfe" not in found:
            return None
        counts.append(found["nfe"])
    mean = float(np.concatenate(counts).mean())
    return int(mean) if mean.is_integer() else mean


def _counts(path: str | Path) -> Arrays:
    try:
        return read_npz(path, "samples", ["nfe"])  # the images beside it may be gigabytes
    except ValueError:
        return read_npz(path, "samples")  # report what is wrong with it, or accept samples that have no counts


def _path(folder: Path, start: int) -> Path:
    return folder / f"{start:09d}.npz"


def _starts(folder: Path, indices: range) -> list[int]:
    names = [_NAME.match(path.name) for path in folder.glob("*.npz")]
    return sorted(start for match in names if match and (start := int(match[1])) in indices)


def _length(found: Arrays) -> int:
    return len(next(iter(found.values())))


def _read(path: Path, source: Mapping[str, str], most: int) -> Arrays | None:
    """A kept batch; None if it cannot be read, is of another source, or extends beyond `most` samples."""
    try:
        found = read_npz(path, "a batch of samples")
    except (OSError, ValueError) as error:
        log.warning("%s: cannot be read and is drawn again (%s)", path, error)
        return None
    if str(found.pop(_SOURCE, "")) != artefact.canonical(dict(source)) or not 0 < _length(found) <= most:
        return None
    return found
