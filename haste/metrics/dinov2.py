"""The detectors "DINOv2-B" and "DINOv2-L": class tokens of DINOv2, whose Frechet distance is FD-DINOv2.

Stein et al. 2023 ("Exposing flaws of generative model evaluation metrics"): ViT-L/14, images resized to 224 px, the
class token after the last norm. DINOv2's authors resample their position embedding without antialiasing and with an
offset; so does this file, since published distances use such features.

B images, H x W pixels, D width (768 and 1,024), S = 224 px, a grid of 16 x 16 patches of 14 px.
Weights are timm's file or the authors'.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from haste.files import artefact
from haste.metrics.detector import Detector
from haste.networks import hub

TIMM = {"DINOv2-B": "vit_base_patch14_dinov2.lvd142m", "DINOv2-L": "vit_large_patch14_dinov2.lvd142m"}
SIDE, PATCH, OFFSET = 224, 14, 0.1
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
PREPROCESSING = (
    "uint8 RGB 0..255, bicubic with antialiasing to 224 x 224 px in uint8 as Pillow resizes, / 255, less ImageNet's "
    "mean, over its standard deviation; positions resampled to 16 x 16 as DINOv2's authors do"
)


class ClassToken(nn.Module):
    """A vision transformer of DINOv2 that reads uint8 images and returns its class token.

    Args:
        transformer: timm's, for inputs of 224 px.
    """

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images uint8 NHWC (B, H, W, 3) -> {"pool": (B, D)} float32, after the last norm."""
        mean, std = cast(Tensor, self.mean), cast(Tensor, self.std)
        # uint8 NHWC 0..255 -> float32 NCHW 0..1
        x = resized(images).to(mean.device).permute(0, 3, 1, 2).float() / 255
        tokens = cast(Any, self.transformer).forward_features((x - mean) / std)
        return {"pool": tokens[:, 0]}


def resized(images: Tensor) -> Tensor:
    """Images uint8 NHWC (B, H, W, 3) at 224 x 224 px, on the CPU: Pillow's bicubic filter, whose result is uint8 too.

    torch's antialiased resize of uint8 images differs from it in one pixel of 200.
    """
    pictures = images.cpu().numpy()
    if pictures.shape[1:3] == (SIDE, SIDE):
        return torch.from_numpy(pictures)
    found = [np.asarray(Image.fromarray(one).resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for one in pictures]
    return torch.from_numpy(np.stack(found))


def dinov2(name: str, weights: Path | str | None = None) -> Detector:
    """The detector, on the CPU.

    Args:
        name: a name in TIMM.
        weights: its weights file; None takes it from the hub's cache, downloading it if it is missing.

    Raises:
        ValueError: the weights are missing, truncated, foreign or cannot be downloaded.
    """
    path = weight_file(name) if weights is None else Path(weights)
    transformer = hub.timm_transformer(TIMM[name], path, f"detector {name}")
    positions = with_grid(cast(Tensor, transformer.pos_embed).detach(), SIDE // PATCH)
    transformer.set_input_size((SIDE, SIDE))
    transformer.pos_embed = nn.Parameter(positions)
    return Detector(
        ClassToken(transformer),
        kind=name,
        weights=artefact.file_identity(path),
        outputs={"pool": transformer.embed_dim},
        preprocessing=PREPROCESSING,
    )


def weight_file(name: str) -> Path:
    """The weights of a detector in the hub's cache, downloaded if they are missing.

    Raises:
        ValueError: they are missing and cannot be downloaded.
    """
    return hub.timm_weights(TIMM[name], f"detector {name}")


def with_grid(positions: Tensor, side: int) -> Tensor:
    """A position embedding (1, 1 + M * M, D) for a grid of side x side patches: (1, 1 + side * side, D).

    Resampled as DINOv2's authors do: bicubic, not antialiased, for a grid of side + 0.1 of which `side` are used.
    """
    own, patches = positions[:, :1], positions[:, 1:]
    before = round(patches.shape[1] ** 0.5)
    if before == side:
        return positions
    # 1 (M M) D -> 1 D M M
    grid = patches.unflatten(1, (before, before)).permute(0, 3, 1, 2)
    scale = (side + OFFSET) / before
    found = functional.interpolate(grid, scale_factor=(scale, scale), mode="bicubic", antialias=False)
    assert found.shape[-2:] == (side, side), found.shape
    return torch.cat([own, found.flatten(2).mT], dim=1)


base, large = functools.partial(dinov2, "DINOv2-B"), functools.partial(dinov2, "DINOv2-L")
