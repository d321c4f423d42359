"""Samples of a state, drawn such that image i depends on (seed, i) alone, and what detectors see in them.

B batch, C latent channels, h x w latent cells, R pixels a side.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from haste.config import Sampling, process_in
from haste.data import order
from haste.data.jobs import check_autoencoder
from haste.data.latents import Autoencoder, to_pixels
from haste.diffusion.guidance import guided
from haste.diffusion.process import Process
from haste.diffusion.samplers import SAMPLERS, Counted, Sampler
from haste.files.store import Store
from haste.models.denoiser import Denoiser
from haste.networks.devices import choose_device
from haste.plan.names import Evaluation
from haste.plan.plan import Plan
from haste.train.state import ema_model
from haste.train.warm_start import model_elsewhere

log = logging.getLogger("haste.sample")


@dataclasses.dataclass(frozen=True)
class Painter:
    """What turns seeds into images: a model, how it is sampled, and the decoder."""

    model: Denoiser
    sampling: Sampling
    autoencoder: Autoencoder
    process: Process
    scale: float
    shift: float

    def labels(self, indices: range) -> np.ndarray:
        """The class asked of each image, (B,) int64."""
        classes = self.model.null_class
        if not classes:  # a model without labels knows the null class alone, which is 0
            return np.zeros(len(indices), dtype=np.int64)
        if self.sampling.labels == "balanced":
            return np.asarray(indices, dtype=np.int64) % classes
        drawn = order.uniforms(self.sampling.seed, "sample label", 0, indices)
        return np.minimum((drawn * classes).astype(np.int64), classes - 1)

    def paint(self, indices: range) -> tuple[np.ndarray, np.ndarray]:
        """Images (B, R, R, 3) uint8 and their labels (B,) int64."""
        found = self.draw(indices)
        return found["image"], found["label"]

    @torch.inference_mode()
    def draw(self, indices: range, told: Callable[[float], None] = lambda share: None) -> dict[str, np.ndarray]:
        """Images as `paint` gives them, under `image`, their `label`, and `nfe`: evaluations of each, (B,) int64.

        A guided evaluation counts once. `told` hears the share of the work that is done, before every evaluation.
        """
        sampling, seed = self.sampling, self.sampling.seed
        shape = (self.model.in_channels, self.model.input_size, self.model.input_size)
        labels, device = self.labels(indices), next(self.model.parameters()).device
        counts = torch.zeros(len(indices), dtype=torch.int64)
        field = guided(
            self.process.field(self.model),
            torch.from_numpy(labels).to(device),
            self.model.null_class,
            sampling.guidance,
            (self.process.place(sampling.interval[0]), self.process.place(sampling.interval[1])),
            self._guided_channels(),
        )

        def normals(purpose: str, step: int) -> Tensor:
            return torch.from_numpy(order.normals(seed, purpose, step, indices, shape)).to(device)

        x, noise = normals("sample start", 0), lambda i: normals("sample noise", i)
        x = self.process.sample(self._sampler(), Counted(field, counts, told), x, sampling, noise)
        decoded = self.autoencoder.decode(x.float(), scale=self.scale, shift=self.shift)
        image = to_pixels(decoded, sampling.pixels).cpu().numpy()
        return {"image": image, "label": labels, "nfe": counts.numpy()}

    def _sampler(self) -> Sampler:
        found, name = SAMPLERS[self.sampling.sampler], self.sampling.sampler
        if found.process != self.model.process:
            raise ValueError(f"sampler {name}: is for {found.process}, expected one for {self.model.process}")
        return found

    def _guided_channels(self) -> int | None:
        """How many of the outputs guidance extrapolates; None for all."""
        asked, channels = self.sampling.guided_channels, self.model.in_channels
        count = self.process.guided(channels) if asked == "all" else asked
        return None if count == self.process.outputs(channels) else count


def painter_of(plan: Plan, evaluation: Evaluation) -> Painter:
    """What draws an evaluation's samples: its model and decoder, and the scale of the model's latents.

    Raises:
        ValueError: state, decoder or latents are not those that belong together.
    """
    device = choose_device(plan.config.runtime.device)
    trajectory = plan.trajectories[evaluation.state.trajectory]
    decoder = Autoencoder.load(plan.decoder, device=str(device))
    process = process_in(trajectory.recipe)
    if trajectory.name in plan.elsewhere:
        check_autoencoder(plan, decoder)
        model = model_elsewhere(plan, trajectory.name).to(device)
        return Painter(model, evaluation.sampling, decoder, process, decoder.scale, decoder.shift)
    model, header = ema_model(plan.path(evaluation.state), key=trajectory.key)
    manifest = Store.of(plan.latents).manifest
    _check_same_latents(plan, header, manifest, decoder)
    return Painter(model.to(device), evaluation.sampling, decoder, process, manifest["scale"], manifest["shift"])


def _check_same_latents(plan: Plan, header: dict[str, Any], manifest: dict[str, Any], decoder: Autoencoder) -> None:
    """A state is sampled with the latents' scale and the decoder that it was trained for, or not at all."""
    trained, found = header["inputs"]["latents"], manifest["identity"]
    if trained != found:
        raise ValueError(
            f"{plan.latents.folder}: holds latents {found[:12]}, but the state was trained on {trained[:12]}"
        )
    if plan.decoder == plan.encoder and decoder.identity != manifest["autoencoder"]:
        raise ValueError(
            f"{plan.decoder}: its weights are {decoder.identity[:12]}, but the latents were encoded with "
            f"{manifest['autoencoder'][:12]}"
        )
