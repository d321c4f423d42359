"""Public networks by name, and what is known of them before they are loaded. No torch.

A new teacher needs only a line here; a new detector also needs the function that makes it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class Encoder:
    """A vision transformer that can be a teacher, and how images enter it.

    timm: its name in timm; patch: side of a patch in pixels; size: side of its input in pixels for images of 256 px (it
    scales with the images); depth, heads, width: its blocks, their heads, and the width of its tokens; norm: mean and
    std of each channel on the scale 0..1; final_norm: whether the features pass the last normalisation; resize_first:
    whether images are resized before they are normalised; on_hub: whether timm keeps its weights on the hub; by_file:
    whether timm has its architecture alone, so that its weights have to be given as its authors' file; overrides:
    differences from timm's architecture.
    """

    timm: str
    patch: int
    size: int
    depth: int
    heads: int
    width: int
    norm: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET
    final_norm: bool = True
    resize_first: bool = False
    on_hub: bool = True
    by_file: bool = False
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def tokens(self, resolution: int) -> int:
        """Patch tokens of an image of this side in pixels."""
        return (self.size // self.patch * resolution // 256) ** 2

    def side(self, name: str, resolution: int) -> int:
        """Side in pixels of its input for images of this side.

        Raises:
            ValueError: that is not a whole number of patches.
        """
        side, rest = divmod(self.size * resolution, 256)
        if rest or side % self.patch or not side:
            raise ValueError(
                f"teacher {name}: images of {resolution} px give an input of {self.size * resolution / 256:g} px, "
                f"which is not a whole number of patches of {self.patch} px"
            )
        return side

    def asked(self, called: str) -> str:
        """What is said where the file of one that is known `by_file` is not given."""
        return f"{called}: timm has no weights of it; give its authors' file as its `weights`"


def least_low_pass(side: int) -> float:
    """The smallest share of the Nyquist frequency, to four decimals, that leaves more of an image of `side` pixels than
    its mean."""
    return math.ceil(2e4 / side) / 1e4


SMALL, BASE, LARGE = (12, 6, 384), (12, 12, 768), (24, 16, 1024)  # blocks, heads, width
# Their authors' normalisation, with its source, is in the table of config/README.md.
# OpenAI trained CLIP with the sigmoid approximation of GELU; timm's plain variants use the exact one instead.
_clip = partial(Encoder, norm=CLIP, final_norm=False, resize_first=True, overrides={"act_layer": "quick_gelu"})

TEACHERS: dict[str, Encoder] = {
    "DINOv2-S": Encoder("vit_small_patch14_dinov2.lvd142m", 14, 224, *SMALL),
    "DINOv2-B": Encoder("vit_base_patch14_dinov2.lvd142m", 14, 224, *BASE),
    "DINOv2-L": Encoder("vit_large_patch14_dinov2.lvd142m", 14, 224, *LARGE),
    "DINOv2-g": Encoder("vit_giant_patch14_dinov2.lvd142m", 14, 224, 40, 24, 1536),
    "DINOv2-B-reg": Encoder("vit_base_patch14_reg4_dinov2.lvd142m", 14, 224, *BASE),
    "DINOv2-L-reg": Encoder("vit_large_patch14_reg4_dinov2.lvd142m", 14, 224, *LARGE),
    "DINOv3-B": Encoder("vit_base_patch16_dinov3.lvd1689m", 16, 256, *BASE),
    "DINOv3-L": Encoder("vit_large_patch16_dinov3.lvd1689m", 16, 256, *LARGE),
    "DINO-B": Encoder("vit_base_patch16_224.dino", 16, 256, *BASE),
    "MAE-L": Encoder("vit_large_patch16_224.mae", 16, 256, *LARGE, final_norm=False),
    "MoCov3-B": Encoder("vit_base_patch16_224", 16, 256, *BASE, on_hub=False, by_file=True),
    "MoCov3-L": Encoder("vit_large_patch16_224", 16, 256, *LARGE, on_hub=False, by_file=True),
    "I-JEPA-H": Encoder("vit_huge_patch14_gap_224.in1k_ijepa", 14, 224, 32, 16, 1280, on_hub=False),
    "CLIP-L": _clip("vit_large_patch14_clip_224.openai", 14, 224, *LARGE),
    "CLIP-B/16": _clip("vit_base_patch16_clip_224.openai", 16, 224, *BASE),
    "SigLIP-L": Encoder("vit_large_patch16_siglip_256.webli", 16, 256, *LARGE, norm=HALF),
    "SigLIP2-B": Encoder("vit_base_patch16_siglip_256.v2_webli", 16, 256, *BASE, norm=HALF),
    "SigLIP2-L": Encoder("vit_large_patch16_siglip_256.v2_webli", 16, 256, *LARGE, norm=HALF),
}


@dataclass(frozen=True)
class Judge:
    """A public detector: a network whose features scores compare.

    made_by: "module:function" that makes a `haste.metrics.detector.Detector` from a weights file, or from its own
    download if that is None; smallest: side in pixels of the smallest images that it reads; numbers: numbers that it
    returns per image; flops: floating-point operations per image, two per multiplication.
    """

    made_by: str
    smallest: int
    numbers: int
    flops: float


# Those of the Inception network, which share its weights file; files of statistics are by one of these.
INCEPTIONS = ("inception", "pytorch-fid")
DETECTORS: dict[str, Judge] = {
    "inception": Judge("haste.metrics.inception:inception", smallest=32, numbers=2048 + 2023 + 1008, flops=11.4e9),
    "pytorch-fid": Judge("haste.metrics.inception:pytorch_fid", smallest=1, numbers=2048, flops=11.4e9),
    "clip": Judge("haste.metrics.clip:clip", smallest=1, numbers=768 + 1, flops=162e9),
    "DINOv2-B": Judge("haste.metrics.dinov2:base", smallest=1, numbers=768, flops=46.4e9),
    "DINOv2-L": Judge("haste.metrics.dinov2:large", smallest=1, numbers=1024, flops=162e9),
}


#: Autoencoders by the prefix of their hub id: floating-point operations per pixel, for encoding and for decoding.
AUTOENCODERS = {"stabilityai/sd-vae-ft-": (4.16e6, 9.49e6)}

#: ADM's references: name -> side in pixels of ImageNet's images.
REFERENCES = {
    "VIRTUAL_imagenet64_labeled.npz": 64,
    "VIRTUAL_imagenet128_labeled.npz": 128,
    "VIRTUAL_imagenet256_labeled.npz": 256,
    "VIRTUAL_imagenet512.npz": 512,
}


def address(reference: str) -> str | None:
    """Where ADM's reference of this name can be loaded from; None for another file."""
    side = REFERENCES.get(reference)
    where = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet"
    return f"{where}/{side}/{reference}" if side else None
