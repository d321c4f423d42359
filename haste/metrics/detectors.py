"""Detectors: frozen networks whose outputs for images are scored. `open_detector` opens any of them.

B images, R resolution in pixels, F feature width, K classes.
A detector is either public, given by its name in PUBLISHED and its weights file, or trained here, given by its folder:
`part.json` describes it, `model.safetensors` holds its weights. A new detector is a file with a function that makes a
`Detector`, and a line in `haste.networks.registry.DETECTORS` (or, for a kind that is trained here, in ARCHITECTURES).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from haste import extensions
from haste.files import artefact
from haste.metrics.detector import Detector
from haste.networks import hub, text
from haste.networks.registry import DETECTORS, INCEPTIONS

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
    # Group normalisation: the features of an image must not depend on the rest of the batch, in training either.
    return nn.Sequential(nn.Conv2d(inner, outer, 3, padding=1), nn.GroupNorm(4, outer), nn.ReLU())


def _small_cnn(architecture: dict, name: str, weights: str) -> Detector:
    network = SmallCNN(architecture["resolution"], architecture["width"], architecture["classes"])
    outputs = {"pool": network.features, "logits": network.classes}
    if architecture.get("turns"):
        del outputs["logits"]  # they distinguish quarter turns, which are not classes of the dataset
    return Detector(
        network,
        kind="cnn",
        name=name,
        weights=weights,
        outputs=outputs,
        preprocessing=f"uint8 RGB, {network.resolution} x {network.resolution} px as they are, scaled to -1..1",
        resolution=network.resolution,
    )


def _lazily(where: str) -> Callable[[Path | str | None], Detector]:
    """A function that makes a detector, imported when called: its library is slow to import and may be missing."""
    return lambda weights: extensions.at(where)(weights)


# Public detectors by name: functions of a weights file (None is their own download).
PUBLISHED = extensions.Table("detectors", {name: _lazily(judge.made_by) for name, judge in DETECTORS.items()})


def weight_file(name: str, where: str | None = None) -> Path | None:
    """The weights file, or folder, of a published detector on this machine, downloaded if it is missing.

    Args:
        name: a name in PUBLISHED.
        where: of clip, another hub id than its usual one.

    Returns:
        The file; None for a detector of another package, which has loaded whatever it needs.

    Raises:
        ValueError: it is missing and cannot be downloaded.
    """
    if name in INCEPTIONS:
        from haste.metrics import inception

        return inception.weight_file()
    if name == "clip":
        return hub.text_folder(where or text.USUAL, "clip")
    from haste.metrics import dinov2

    if name in dinov2.TIMM:
        return dinov2.weight_file(name)
    PUBLISHED[name](None)
    return None


# Detectors that are trained here, by the kind in their part.json: (architecture, name, sha256 of the weights).
ARCHITECTURES: dict[str, Callable[[dict, str, str], Detector]] = {
    "cnn": _small_cnn,
}


def open_detector(
    what: Path | str,
    weights: Path | str | None = None,
    *,
    called: str | None = None,
    device: torch.device | str = "cpu",
) -> Detector:
    """Any detector, ready to be called with images.

    Args:
        what: a name in PUBLISHED, or the folder of a detector that was trained here.
        weights: a published detector's weights file, of clip its folder or hub id; None is its own download or its
            cached copy.
        called: its name in columns of scores; None is its own.
        device: where to compute.

    Raises:
        ValueError: an unknown name, or weights that are missing, truncated, foreign or cannot be downloaded; the
            message names the file.
    """
    if str(what) in PUBLISHED:
        detector = PUBLISHED[str(what)](weights)
    elif not Path(what).is_dir():
        raise ValueError(f"detector {str(what)!r}: neither a folder nor one of {', '.join(sorted(PUBLISHED))}")
    elif weights is not None:
        raise ValueError(f"{what}: a folder has weights of its own, found weights {weights} beside it")
    else:
        detector = _of_folder(Path(what))
    detector.name = called or detector.name
    return detector.to(device)


def _of_folder(folder: Path) -> Detector:
    part = artefact.read_json(folder / DESCRIPTION, "part")
    if part.get("part") != "detector":
        raise ValueError(f"{folder / DESCRIPTION}: expected a detector, found {part.get('part')!r}")
    artefact.check_entries(folder / DESCRIPTION, part, identity=str, name=str, architecture=dict)
    architecture = part["architecture"]
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
    try:
        detector = ARCHITECTURES[architecture["kind"]](architecture, part["name"], part["identity"])
    except (KeyError, TypeError, RuntimeError, OverflowError) as error:
        raise ValueError(
            f"{folder / DESCRIPTION}: damaged or edited: no network is like {architecture} ({error})"
        ) from error
    try:
        detector.network.load_state_dict(hub.finite(weights, safetensors.torch.load_file(weights)))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{weights}: these weights do not fit {architecture}: {error}") from error
    return detector
