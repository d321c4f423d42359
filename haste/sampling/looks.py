"""What the pixels alone say of images: black ones, copies, brightness. No torch.

N images of H x W pixels, uint8 RGB.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from haste.files.npz import read_npz
from haste.sampling.samples import open_samples

DARK = 1  # an image without a pixel above this is black
#: What is kept of every image, beside the pixels of a shard of samples: a digest, its largest value, its sum.
FIELDS: dict[str, tuple[tuple[int, ...], DTypeLike]] = {
    "digest": ((), np.uint64),
    "peak": ((), np.uint8),
    "total": ((), np.int64),
}

Looks = Mapping[str, NDArray[Any]]


def looks_of(images: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
    """`FIELDS` of images (N, H, W, 3), each (N,)."""
    images = np.ascontiguousarray(images)
    digests = [int.from_bytes(hashlib.blake2b(image.data, digest_size=8).digest(), "little") for image in images]
    flat = images.reshape(len(images), -1)
    return {
        "digest": np.array(digests, np.uint64),
        "peak": flat.max(axis=1, initial=0),
        "total": flat.sum(axis=1, dtype=np.int64),
    }


def facts(parts: Sequence[Looks], size: tuple[int, int]) -> dict[str, Any]:
    """JSON on images of this height and width: `images`, `copies` of another one, `black` ones, mean `brightness`."""
    whole = {name: np.concatenate([np.zeros(0, kind), *(p[name] for p in parts)]) for name, (_, kind) in FIELDS.items()}
    count = len(whole["digest"])
    return {
        "images": count,
        "copies": count - len(np.unique(whole["digest"])),
        "black": int((whole["peak"] <= DARK).sum()),
        "brightness": int(whole["total"].sum()) / max(1, count * size[0] * size[1] * 3),
    }


def facts_of_shards(files: Sequence[Path | str]) -> dict[str, Any]:
    """`facts` of shards of samples; nothing if one is not there any more. Shards that do not hold `FIELDS`, because
    they are older, are read whole, a batch at a time.

    Raises:
        ValueError: a shard cannot be read.
    """
    if not all(Path(path).exists() for path in files):
        return {}
    sets = [open_samples(path) for path in files]
    parts: list[Looks] = []
    for path, samples in zip(files, sets, strict=True):
        try:
            parts.append(read_npz(path, "samples", list(FIELDS)))
        except ValueError:
            parts.extend(looks_of(images) for images in samples.batches(64))
    return facts(parts, sets[0].size)
