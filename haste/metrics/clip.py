"""The detector "clip": a CLIP of transformers, by which samples are compared with the words that they were told.

CLIP score of an image and its text: 100 max(cos(E_I, E_T), 0) of their embeddings, as torchmetrics has it; Hessel et
al. 2021 (Eq. 1) have 2.5 max(cos, 0).

B images of H x W pixels, S the side in pixels that the encoder reads, W width of the embeddings, L tokens of a text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from haste.files import artefact
from haste.metrics.detector import Detector
from haste.networks import hub, text
from haste.networks.registry import CLIP as NORM

BATCH = 64  # texts that are encoded at once


class Pictures(nn.Module):
    """A CLIP, called with images.

    Args:
        model: of transformers.
        side: S.
    """

    def __init__(self, model: nn.Module, side: int) -> None:
        super().__init__()
        self.model, self.side = model, side
        for name, values in zip(("mean", "std"), NORM, strict=True):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images uint8 NHWC (B, H, W, 3) -> {"pool": (B, W)} float32, the projected embeddings, not normalised."""
        mean, std, model = cast(Tensor, self.mean), cast(Tensor, self.std), cast(Any, self.model)
        # uint8 NHWC 0..255 -> float32 NCHW
        pixels = torch.from_numpy(np.stack([_seen(one, self.side) for one in images.cpu().numpy()]))
        x = (pixels.to(mean.device).permute(0, 3, 1, 2).float() / 255 - mean) / std
        return {"pool": model.visual_projection(model.vision_model(pixel_values=x).pooler_output)}


def _seen(image: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """An image (H, W, 3) as CLIP's authors show it: its short side S by Pillow's bicubic filter, its centre square."""
    height, width = image.shape[:2]
    short = min(height, width)
    size = (int(side * width / short), int(side * height / short))
    found = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)) if short != side else image
    left, top = (round((length - side) / 2) for length in size)  # halves to even, as torchvision cuts
    return found[top : top + side, left : left + side]


class Clip(Detector):
    """A detector that also reads words; `encoder` and `revision` say which (None: of no hub)."""

    def __init__(self, model: nn.Module, tokenizer: Any, side: int, encoder: str, revision: str | None, **more: Any):
        preprocessing = (
            f"uint8 RGB 0..255, short side to {side} px by Pillow's bicubic filter, centre square, / 255, less CLIP's "
            "mean, over its standard deviation"
        )
        super().__init__(Pictures(model, side), kind="clip", preprocessing=preprocessing, **more)
        self._tokenizer, self.encoder, self.revision = tokenizer, encoder, revision

    @property
    def about(self) -> dict[str, Any]:
        """See `Detector`."""
        return {**super().about, "encoder": self.encoder, "revision": self.revision}

    def cosines(self, pool: NDArray[np.float32], words: Sequence[str]) -> NDArray[np.float32]:
        """Cosines (B,) of images' embeddings (B, W) and their texts', which are cut after the L tokens that it reads.

        Raises:
            ValueError: an embedding of a text that is not finite.
        """
        parts = [self._told(list(words[low : low + BATCH])) for low in range(0, len(words), BATCH)]
        said, seen = np.concatenate(parts).astype(np.float64), pool.astype(np.float64)
        if len(broken := np.flatnonzero(~np.isfinite(said).all(axis=1))):
            raise ValueError(f"the embedding of {words[broken[0]][:80]!r} by {self.name} is not finite")
        found = (seen * said).sum(axis=1) / np.linalg.norm(seen, axis=1) / np.linalg.norm(said, axis=1)
        return found.astype(np.float32)

    @torch.inference_mode()
    def _told(self, words: list[str]) -> NDArray[np.float32]:
        model = cast(Any, self.network).model
        most = model.config.text_config.max_position_embeddings
        cut = self._tokenizer(words, padding="max_length", truncation=True, max_length=most, return_tensors="pt")
        given = {name: cut[name].to(model.device) for name in ("input_ids", "attention_mask")}
        return model.text_projection(model.text_model(**given).pooler_output).cpu().numpy()


def clip(where: Path | str | None = None) -> Clip:
    """The detector, on the CPU.

    Args:
        where: a folder as transformers writes it, a hub id, or `ID@REVISION`; None is `text.USUAL`.

    Raises:
        ValueError: not found, not a CLIP, damaged, or lacking weights.
    """
    encoder = str(where or text.USUAL)
    found = text.opened(hub.text_folder(encoder, "clip"))
    if found.kind != "clip":
        raise ValueError(f"{found.folder}: expected a CLIP of both halves, found {found.kind!r}")
    model, tokenizer = hub.from_transformers("CLIPModel", found.folder, "CLIP", found.files[0])
    revision = found.folder.name if re.fullmatch(r"[0-9a-f]{40}", found.folder.name) else None
    encoder = encoder if text.folder_named(encoder) else encoder.partition("@")[0]
    return Clip(
        model,
        tokenizer,
        model.config.vision_config.image_size,
        encoder,
        revision,
        name=Path(encoder).name,
        weights=artefact.fingerprint(found.identities(artefact.file_identity), length=64),
        outputs={"pool": model.config.projection_dim},
    )
