"""What a detector is: a frozen network whose outputs for images are scored.

B images, R resolution in pixels."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from haste.files import artefact
from haste.networks.devices import exact_convolutions


class Detector:
    """A frozen network with everything that scores must record about it.

    name: its name; kind: its name in PUBLISHED or in ARCHITECTURES; weights: sha256 of its weights file; published:
    whether these are known to be the weights behind published scores, None if that cannot be known; outputs: name ->
    width of each output; width: of the "pool" features; classes: number of the dataset's own classes that its "logits"
    distinguish, None if it has no such logits; preprocessing: of the images, in words; resolution: side in pixels of
    the images that it reads, None for any; smallest: the smallest side, if it reads any; copies: the same detector on
    other devices, to look at other images meanwhile.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        kind: str,
        weights: str,
        outputs: Mapping[str, int],
        preprocessing: str,
        name: str | None = None,
        resolution: int | None = None,
        smallest: int = 1,
        published: bool | None = None,
    ) -> None:
        assert "pool" in outputs, outputs
        self.network = network.eval().requires_grad_(False)
        self.kind, self.name, self.weights, self.published = kind, name or kind, weights, published
        self.outputs, self.preprocessing = dict(outputs), preprocessing
        self.resolution, self.smallest = resolution, smallest
        self.copies: list[Detector] = []

    @property
    def width(self) -> int:
        """Width of the "pool" features."""
        return self.outputs["pool"]

    @property
    def classes(self) -> int | None:
        """Number of classes of the dataset that the "logits" distinguish; None if it has no such logits."""
        return self.outputs.get("logits")

    @property
    def identity(self) -> str:
        """Hash of weights and preprocessing, not of the name: features of two identities are never compared."""
        what = {"kind": self.kind, "weights": self.weights, "preprocessing": self.preprocessing}
        return artefact.fingerprint({**what, "outputs": self.outputs}, length=64)

    @property
    def about(self) -> dict[str, Any]:
        """Everything above that determines whether two scores may be compared, for JSON."""
        return {
            "name": self.name,
            "kind": self.kind,
            "identity": self.identity,
            "weights": self.weights,
            "published": self.published,
            "preprocessing": self.preprocessing,
            "outputs": self.outputs,
        }

    def spread(self, devices: Sequence[str]) -> Detector:
        """Move the network to the first device, and copies of it to the others; returns itself."""
        self.to(devices[0])
        self.copies = [copy.copy(self) for _ in devices[1:]]
        for other, device in zip(self.copies, devices[1:], strict=True):
            other.network = copy.deepcopy(self.network).to(device)
        return self

    def to(self, device: torch.device | str) -> Detector:
        """Move the network to a device; returns itself."""
        self.network.to(device)
        return self

    def arrays(self, images: NDArray[np.uint8], of: Path | str, first: int = 0) -> dict[str, NDArray[np.float32]]:
        """`outputs` for images uint8 NHWC (B, R, R, 3), each (B, width), and every number finite.

        Raises:
            ValueError: as for a call; or features that are not finite: of the image `first` + its place, among `of`.
        """
        found = {name: value.numpy() for name, value in self(torch.from_numpy(images)).items()}
        for name, value in found.items():
            if len(broken := np.flatnonzero(~np.isfinite(value).all(axis=1))):
                which = f"{of}: image {first + int(broken[0])}"
                raise ValueError(f"{which}: its {name} by {self.name} is not finite, expected numbers")
        return found

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Images uint8 NHWC (B, R, R, 3), 0..255 -> `outputs`, such as {"pool": (B, F), "logits": (B, K)}, float32.

        The network may be on another device than the images; its outputs are on the images' device.

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
        with torch.inference_mode(), exact_convolutions():
            seen = self.network(images.to(next(self.network.parameters(), images).device))
        return {name: seen[name].to(images.device) for name in self.outputs}
