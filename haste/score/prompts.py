"""What images from anywhere were told, a line of a file each, for their CLIP score."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from haste.files import artefact
from haste.metrics.clip import Clip
from haste.score.views import Batch, View


class Prompts:
    """The lines of a text file in UTF-8: an image's prompt each, in the images' order; the last one may lack its end.

    Raises:
        ValueError: the file is missing, or no text.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            content = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: expected prompts, a line of UTF-8 for each image ({error})") from error
        # Only line feeds end a line: prompts may have any other separator of Unicode in them.
        self.words = [line.removesuffix("\r") for line in content.removesuffix("\n").split("\n")]

    @property
    def about(self) -> dict[str, Any]:
        """The file, JSON."""
        return {"prompts": str(self.path), "sha256": artefact.file_identity(self.path)}

    def check(self, samples: Path | str, count: int) -> None:
        """Raises ValueError for another number of images."""
        if count != len(self.words):
            raise ValueError(f"{self.path}: {len(self.words):,} prompts, but {samples} holds {count:,} images")

    def beside(self, view: View, detector: Clip) -> View:
        """A view whose batches also have `cosine` (B,), of each image and its prompt."""

        def batches() -> Iterator[Batch]:
            for batch in view.batches():
                words = [self.words[row] for row in batch["index"]]
                yield {**batch, "cosine": detector.cosines(batch["pool"], words)}

        return replace(view, outputs={**view.outputs, "cosine": 1}, batches=batches)
