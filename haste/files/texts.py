"""The captions of an image store: texts of variable length, in a file beside its shards. No torch.

    folder/captions.jsonl: a line an image, in their order: a JSON list of its captions, UTF-8

The store's manifest has the file's sha256, and its numbers of images and of captions. The file is read as a whole: a
million images have some hundred megabytes of captions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from haste.files import artefact
from haste.files.store import MANIFEST, Made, check_key

FILE = "captions.jsonl"
ENTRY = "captions"  # of the manifest


def write(folder: Path | str, captions: Iterable[list[str]]) -> dict[str, Any]:
    """Write the captions of all images, in order; returns the manifest's entry on them."""
    lines = [json.dumps(texts, ensure_ascii=False).encode() + b"\n" for texts in captions]
    with artefact.replacing(Path(folder, FILE)) as aside:
        aside.write_bytes(b"".join(lines))
    count = sum(len(json.loads(line)) for line in lines)
    return {"images": len(lines), "count": count, "sha256": hashlib.sha256(b"".join(lines)).hexdigest()}


class Texts:
    """The captions of an image store, opened for reading.

    Attributes:
        splits: split -> its images.
        counts: (N,) int64, the captions of each image, at least one.
        first: (N,) int64, the captions of all images before each.
        sha256: identity of the texts.
    """

    def __init__(self, lines: list[bytes], sha256: str, splits: dict[str, range]):
        self._lines, self.sha256, self.splits = lines, sha256, splits
        self.counts = np.array([len(json.loads(line)) for line in lines], dtype=np.int64)
        self.first = np.concatenate([[0], np.cumsum(self.counts)[:-1]]).astype(np.int64)

    @classmethod
    def of(cls, images: Made) -> Texts:
        """Open those of a plan's image store; only its manifest has to be there besides.

        Raises:
            ValueError: missing or damaged, or images without captions.
        """
        folder = Path(images.folder)
        manifest = artefact.read_json(folder / MANIFEST, "store")
        check_key(folder / MANIFEST, manifest["key"], manifest["recipe"], images.key, images.recipe)
        if ENTRY not in manifest:
            raise ValueError(f"{folder}: images without captions, expected some with")
        path, entry = folder / FILE, manifest[ENTRY]
        if not path.is_file():
            raise ValueError(f"{path}: is missing, expected the captions of {entry['images']:,} images. {_CURE}")
        content = path.read_bytes()
        if (found := hashlib.sha256(content).hexdigest()) != entry["sha256"]:
            raise ValueError(f"{path}: damaged: its sha256 is {found[:12]}, expected {entry['sha256'][:12]}. {_CURE}")
        splits = {name: range(*bounds) for name, bounds in manifest["splits"].items()}
        return cls(content.split(b"\n")[:-1], entry["sha256"], splits)

    @property
    def count(self) -> int:
        """Number of captions."""
        return int(self.counts.sum())

    def of_image(self, image: int) -> list[str]:
        """The captions of an image, in order."""
        return json.loads(self._lines[image])

    def all(self) -> list[str]:
        """Every caption, image by image."""
        return [text for line in self._lines for text in json.loads(line)]


_CURE = "Remove the manifest: the workflow makes both again (`haste images --join`)"
