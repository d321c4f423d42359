"""Detectors: frozen networks that turn images into features and logits.

B images, R resolution in pixels, F feature width, K classes.
A detector lies in a folder: `part.json` says what it is, `model.safetensors` holds its weights. A new kind of detector
is a class and a line in ARCHITECTURES.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from haste import artefact

DESCRIPTION, WEIGHTS = "part.json", "model.safetensors"


class SmallCNN(nn.Module):
    """A small classifier for small images, such as handwritten digits.

    Args:
        resolution: side of the images in pixels, a multiple of 4.
        width: channels of the first stage; the features have 4 x width.
        classes: number of classes.
    """

    def __init__(self, resolution: int, width: int, classes: int) -> None:
        super().__init__()
        if resolution < 8 or resolution % 4:
            raise ValueError(f"small CNN: expected a resolution of 8, 12, 16, ..., found {resolution}")
        self.resolution, self.classes, self.features = resolution, classes, 4 * width
        self.stages = nn.Sequential(
            _stage(3, width),
            nn.MaxPool2d(2),
            _stage(width, 2 * width),
            nn.MaxPool2d(2),
            _stage(2 * width, 2 * width),
        )
        self.widen = nn.Linear(2 * width * (resolution // 4) ** 2, self.features)
        self.head = nn.Linear(self.features, classes)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images uint8 NHWC (B, R, R, 3) -> {"pool": (B, F), "logits": (B, K)}, both float32."""
        # uint8 NHWC 0..255 -> float32 NCHW -1..1
        x = images.permute(0, 3, 1, 2).float() / 127.5 - 1
        pool = torch.relu(self.widen(self.stages(x).flatten(1)))
        return {"pool": pool, "logits": self.head(pool)}


def _stage(inner: int, outer: int) -> nn.Module:
    # Group normalisation: the features of an image must not depend on the images beside it, also in training.
    return nn.Sequential(nn.Conv2d(inner, outer, 3, padding=1), nn.GroupNorm(4, outer), nn.ReLU())


class Detector:
    """A frozen network with what the scores must say about it.

    name: as the configuration calls it; identity: sha256 of its weights; width: of the "pool" features;
    classes: of the "logits", None if it has none; resolution: of the images it reads, None for any;
    outputs: name -> width of everything that it gives; preprocessing: what is done to the images, in words;
    smallest: the least side in pixels of images of any size.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        name: str,
        identity: str,
        width: int,
        classes: int | None,
        resolution: int | None,
        outputs: Mapping[str, int] | None = None,
        preprocessing: str | None = None,
        smallest: int = 1,
    ) -> None:
        self.network = network.eval().requires_grad_(False)
        self.name, self.identity, self.width, self.classes = (
            name,
            identity,
            width,
            classes,
        )
        self.resolution, self.smallest = resolution, smallest
        own = {"pool": width} if classes is None else {"pool": width, "logits": classes}
        self.outputs = own if outputs is None else dict(outputs)
        size = "any size" if resolution is None else f"{resolution} x {resolution} px as they are"
        self.preprocessing = preprocessing or f"uint8 RGB, {size}, scaled to -1..1"

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Images uint8 NHWC (B, R, R, 3), 0..255 -> `outputs`, such as {"pool": (B, F), "logits": (B, K)}, float32.

        The network may be on another device than the images; what it gives is on theirs.

        Raises:
            ValueError: not such images, or of another resolution than the detector reads.
        """
        size = self.resolution
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"{self.name}: expected uint8 NHWC images, found {images.dtype} {tuple(images.shape)}")
        if size is not None and images.shape[1:3] != (size, size):
            raise ValueError(f"{self.name}: expected images of {size} x {size} px, found {tuple(images.shape[1:3])}")
        if size is None and min(images.shape[1:3]) < self.smallest:
            least, found = self.smallest, tuple(images.shape[1:3])
            raise ValueError(f"{self.name}: expected images of {least} x {least} px or more, found {found}")
        with torch.inference_mode():
            seen = self.network(images.to(next(self.network.parameters(), images).device))
        return {name: value.to(images.device) for name, value in seen.items()}


def _small_cnn(architecture: dict, name: str, identity: str) -> Detector:
    network = SmallCNN(architecture["resolution"], architecture["width"], architecture["classes"])
    return Detector(
        network,
        name=name,
        identity=identity,
        width=network.features,
        classes=network.classes,
        resolution=network.resolution,
    )


def _inception(weights: Path | str | None) -> Detector:
    from haste.metrics.inception import inception  # torch-fidelity is slow to import, and not everybody has it

    return inception(weights)


# Detectors of other people, by name: what they make of a weights file (None is their own download).
PUBLISHED: dict[str, Callable[[Path | str | None], Detector]] = {
    "inception": _inception,
}

ARCHITECTURES: dict[str, Callable[[dict, str, str], Detector]] = {
    "cnn": _small_cnn,
}


def published_detector(name: str, weights: Path | str | None = None, device: torch.device | str = "cpu") -> Detector:
    """A detector that others have trained, such as "inception".

    Args:
        name: a name in PUBLISHED.
        weights: its weights file; None is the detector's own download.
        device: where to compute.

    Raises:
        ValueError: an unknown name, or weights that are missing, truncated, foreign or cannot be downloaded.
    """
    if name not in PUBLISHED:
        raise ValueError(f"unknown detector {name!r}, not in {', '.join(sorted(PUBLISHED))}")
    detector = PUBLISHED[name](weights)
    detector.network.to(device)
    return detector


def load_detector(folder: Path | str, device: torch.device | str = "cpu") -> Detector:
    """Load a detector from its folder.

    Raises:
        ValueError: a file is missing, truncated or foreign, the weights are not those that `part.json` describes, or
            the kind of detector is unknown; the message names the file.
    """
    folder = Path(folder)
    part = artefact.read_json(folder / DESCRIPTION, "part")
    if part.get("part") != "detector":
        raise ValueError(f"{folder / DESCRIPTION}: expected a detector, found {part.get('part')!r}")
    architecture = part.get("architecture")
    if not isinstance(architecture, dict):
        raise ValueError(f"{folder}: part.json does not say what the network looks like (architecture)")
    if architecture.get("kind") not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise ValueError(
            f"{folder / DESCRIPTION}: unknown kind of detector {architecture.get('kind')!r}, not in {known}"
        )
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise ValueError(f"{weights}: expected the detector's weights, found no file")
    if (found := artefact.file_identity(weights)) != part["identity"]:
        raise ValueError(f"{weights}: expected the weights {part['identity'][:12]}, found {found[:12]}")
    detector = ARCHITECTURES[architecture["kind"]](architecture, part["name"], part["identity"])
    try:
        detector.network.load_state_dict(safetensors.torch.load_file(weights))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{weights}: these weights do not fit {architecture}: {error}") from error
    detector.network.to(device)
    return detector
