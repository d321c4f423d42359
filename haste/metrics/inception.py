"""The detectors "inception" and "pytorch-fid": the Inception v3 of 2015 in torch-fidelity's port, by two conventions.

They differ in what enters the network: "inception" resizes as TensorFlow 1 did, by which ADM's scores are defined;
"pytorch-fid" as that package does, by whose FID text-to-image models are compared. Their scores never share a column.

B images, H x W pixels.
Its weights file is torch-fidelity's (a state dict in torch's own format); it is read without running code from it.
"""

from __future__ import annotations

import io
import threading
import urllib.error
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from haste.files import artefact
from haste.metrics.detector import Detector
from haste.networks import hub, tensors
from haste.networks.weights import check_inception

POOL, SPATIAL, LOGITS = 2048, 17 * 17 * 7, 1008
SIDE = 299
CHANNELS = 7  # channels of Mixed_6d.branch1x1 that sFID reads
PREPROCESSING = (
    "uint8 RGB 0..255, bilinear to 299 x 299 px as TensorFlow 1 resizes (corners not aligned, no half-pixel centres, "
    "no antialiasing), (x - 128) / 128"
)


PREPROCESSING_PYTORCH = (
    "uint8 RGB / 255, bilinear to 299 x 299 px (half-pixel centres, corners not aligned, no antialiasing), 2 x - 1"
)


class Inception(nn.Module):
    """torch-fidelity's network (its `FeatureExtractorInceptionV3`), with the layer that sFID reads.

    Args:
        extractor: torch-fidelity's, which returns "2048".
    """

    def __init__(self, extractor: nn.Module) -> None:
        super().__init__()
        self.extractor = extractor

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images uint8 NHWC (B, H, W, 3) -> float32 {"pool": (B, 2048), "spatial": (B, 2023), "logits_unbiased":
        (B, 1008)}. Spatial is flattened as (17, 17, 7); the logits are the product with the weights, without bias."""
        seen, mine = list[Tensor](), threading.get_ident()

        def keep(_: nn.Module, __: Any, found: Tensor) -> None:
            if threading.get_ident() == mine:  # another thread may look at other images meanwhile
                seen.append(found[:, :CHANNELS])

        layer = self.extractor.get_submodule("Mixed_6d.branch1x1")  # convolution, normalisation, ReLU
        hook = layer.register_forward_hook(keep)
        try:
            (pool,) = self.extractor(images.permute(0, 3, 1, 2))
        finally:
            hook.remove()
        spatial = seen[0].permute(0, 2, 3, 1).flatten(1)
        # In float32 a product depends on how many rows it has; in float64, rounded, it does not.
        logits = functional.linear(pool.double(), self.extractor.get_parameter("fc.weight").double()).float()
        return {"pool": pool, "spatial": spatial, "logits_unbiased": logits}


class PytorchFID(nn.Module):
    """The same network up to its pooled features, with the preprocessing of pytorch-fid (its `InceptionV3`).

    Args:
        extractor: torch-fidelity's.
    """

    def __init__(self, extractor: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(layer for name, layer in extractor.named_children() if name != "fc"))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images uint8 NHWC (B, H, W, 3) -> float32 {"pool": (B, 2048)}."""
        # NHWC uint8 -> NCHW float32 in [0, 1] -> [-1, 1]
        pixels = images.permute(0, 3, 1, 2).float() / 255
        pixels = 2 * functional.interpolate(pixels, size=(SIDE, SIDE), mode="bilinear", align_corners=False) - 1
        return {"pool": self.layers(pixels).flatten(1)}


def inception(weights: Path | str | None = None) -> Detector:
    """The detector by ADM's convention, on the CPU.

    Args:
        weights: torch-fidelity's weights file; None takes it from torch's cache, downloading it if it is missing.

    Raises:
        ValueError: torch-fidelity is not installed; the weights are missing, truncated, foreign or not downloadable.
    """
    extractor, about = _extractor(weights)
    outputs = {"pool": POOL, "spatial": SPATIAL, "logits_unbiased": LOGITS}
    more: dict[str, Any] = {"outputs": outputs, "preprocessing": PREPROCESSING, "smallest": 32}
    return Detector(Inception(extractor), kind="inception", **about, **more)


def pytorch_fid(weights: Path | str | None = None) -> Detector:
    """The detector by pytorch-fid's convention, on the CPU. The weights file is the same. Arguments as `inception`."""
    extractor, about = _extractor(weights)
    more: dict[str, Any] = {"outputs": {"pool": POOL}, "preprocessing": PREPROCESSING_PYTORCH}
    return Detector(PytorchFID(extractor), kind="pytorch-fid", **about, **more)


def _extractor(weights: Path | str | None) -> tuple[nn.Module, dict[str, Any]]:
    """torch-fidelity's network, and the identity of its weights and whether these are the published ones."""
    try:
        from torch_fidelity import feature_extractor_inceptionv3 as port
    except ImportError as error:
        raise ValueError(f"the detector inception needs torch-fidelity, which cannot be imported: {error}") from error
    path = weight_file() if weights is None else Path(weights)
    # torch-fidelity unpickles whatever it is given, so it gets weights that have been read safely.
    buffer = io.BytesIO()
    torch.save(_read(path), buffer)
    buffer.seek(0)
    try:
        extractor = port.FeatureExtractorInceptionV3("inception", ["2048"], buffer)
    except RuntimeError as error:
        what = " ".join(str(error).split())[:300]
        raise ValueError(f"{path}: expected torch-fidelity's Inception v3, found other weights: {what}") from error
    identity = artefact.file_identity(path)
    # torch's convention: NAME-HASH.pth, with the first digits of the file's sha256
    return extractor, {"weights": identity, "published": identity.startswith(_hash_prefix(port.URL_INCEPTION_V3))}


def _hash_prefix(url: str) -> str:
    return url.rsplit("-", 1)[1].removesuffix(".pth")


def weight_file() -> Path:
    """torch-fidelity's file in torch's cache, where torch-fidelity itself would put it, downloaded if it is missing.

    Raises:
        ValueError: it cannot be downloaded.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3 as URL

    try:
        return hub.cached(URL, _hash_prefix(URL))
    except (OSError, RuntimeError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise ValueError(
            f"the weights of inception cannot be downloaded ({reason}): fetch {URL} where there is internet, and "
            f"pass the file or put it into {Path(torch.hub.get_dir(), 'checkpoints')}"
        ) from error


def _read(path: Path) -> dict[str, Any]:
    check_inception(path)
    return hub.finite(path, tensors.read(path, "the weights of inception"))
