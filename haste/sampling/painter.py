"""Samples of a state, such that image i depends only on (seed, i), and detectors' features of them.

B batch, C latent channels, h x w latent cells, R pixels per side.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from haste.config import Sampling, condition_in, process_in
from haste.data.condition import Condition, Rows
from haste.data.jobs import check_autoencoder, check_decoder
from haste.data.latents import Autoencoder, to_pixels
from haste.diffusion.guidance import Guided, SideBySide, guided
from haste.diffusion.process import Process
from haste.diffusion.samplers import SAMPLERS, Counted, Sampler
from haste.files.store import Store
from haste.models.denoiser import Denoiser
from haste.networks.devices import choose_device, computing
from haste.networks.spec import each
from haste.plan.names import State
from haste.plan.plan import Plan
from haste.sampling.noise import Noise
from haste.train.state import trained_model, weights_identity
from haste.train.warm_start import model_elsewhere

log = logging.getLogger("haste.sample")

DECODED_PIXELS = 2**20  # of the images that are decoded at once: 16 of 256 px, for each of which a decoder holds 0.2 GB


@dataclasses.dataclass(frozen=True)
class Painter:
    """Turns seeds into images: a model, its sampling settings, its process and condition, and the decoder."""

    model: Denoiser
    sampling: Sampling
    autoencoder: Autoencoder
    process: Process
    condition: Condition
    scale: float
    shift: float

    def __post_init__(self) -> None:
        # Else autocast would round t near 1 to steps of 0.004, which are as long as those of 250 steps of a sampler.
        if getattr(self.model, "can_precise_time", False):
            self.model.precise_time = True

    @property
    def inputs(self) -> dict[str, str]:
        """Identities of what decides the samples beside their settings."""
        own = {"weights": weights_identity(self.model), "autoencoder": self.autoencoder.identity}
        return {**own, **self.condition.identities}

    def paint(self, indices: range) -> tuple[np.ndarray, Any]:
        """Images (B, R, R, 3) uint8 and the condition of each: labels (B,) int64, or rows of another condition."""
        found = self.draw(indices)
        return found["image"], self.condition.told({name: found[name] for name in self.condition.fields})

    @torch.inference_mode()
    def draw(self, indices: range, told: Callable[[float], None] = lambda share: None) -> dict[str, np.ndarray]:
        """The images of `paint` as `image`, the rows of their condition by its fields (`label`), and `nfe`:
        the evaluations of each, (B,) int64.

        A guided evaluation counts once. `told` is called with the completed share of the work before every evaluation.

        Raises:
            FloatingPointError: latents or pixels of a sample are not finite; the message says of which.
        """
        (found,) = drawn_together([self], indices, told)
        if isinstance(found, FloatingPointError):
            raise found
        return found

    @torch.inference_mode()
    def decoded(self, z: Tensor, indices: range) -> np.ndarray:
        """Images (B, R, R, 3) uint8 of latents (B, C, h, w), some at a time. Raises as `draw`."""
        most = max(1, DECODED_PIXELS // (self.autoencoder.factor * self.model.input_size) ** 2)
        pieces = [slice(low, low + most) for low in range(0, len(z) or 1, most)]
        return np.concatenate([self._decoded(z[piece], indices[piece]) for piece in pieces])

    def _decoded(self, z: Tensor, indices: range) -> np.ndarray:
        """Pixels that are not finite would become black without a word."""
        with computing(self.sampling.decoder_precision, self.autoencoder.device):
            decoded = self.autoencoder.decode(z.float(), scale=self.scale, shift=self.shift).float()
        precisions = self.sampling.precision, self.sampling.decoder_precision
        for what, found, precision in zip(("latents", "pixels"), (z, decoded), precisions, strict=True):
            if len(broken := (~found.flatten(1).isfinite().all(dim=1)).nonzero()):
                wider = "" if precision == "fp32" else f"{precision} may be too narrow for it, else "
                raise FloatingPointError(
                    f"sample {indices[int(broken[0, 0])]}: its {what} are not finite, expected numbers: {wider}the "
                    "training diverged, or the weights are damaged: sample an earlier state."
                )
        return to_pixels(decoded, self.sampling.pixels).cpu().numpy()

    def field(self, condition: Any, null: Any) -> Guided:
        """The guided field of rows with these conditions."""
        sampling, (low, high) = self.sampling, map(self.process.place, self.sampling.interval)
        field = self.process.field(self.model)
        return guided(field, condition, null, sampling.guidance, (low, high), self._guided_channels())

    @property
    def sampler(self) -> Sampler:
        """The sampler by its name; raises ValueError if it is for another process."""
        found, name = SAMPLERS[self.sampling.sampler], self.sampling.sampler
        if found.process != self.model.process:
            raise ValueError(f"sampler {name}: is for {found.process}, expected one for {self.model.process}")
        return found

    def _guided_channels(self) -> int | None:
        """How many of the outputs are guided; None for all."""
        asked, channels = self.sampling.guided_channels, self.model.in_channels
        count = self.process.guided(channels) if asked == "all" else asked
        return None if count == self.process.outputs(channels) else count


Drawn = dict[str, np.ndarray]


@torch.inference_mode()
def drawn_together(
    painters: Sequence[Painter], indices: range, told: Callable[[float], None] = lambda share: None
) -> list[Drawn | FloatingPointError]:
    """The same samples of several painters, which differ only in how they are guided: what `Painter.draw` returns, or
    raises, of each. They share the noise; bits are those of each alone."""
    first = painters[0]
    rows = first.condition.sampled(first.sampling, indices)
    z, counts = latents(painters, indices, rows, told)
    found: list[Drawn | FloatingPointError] = []
    for painter, mine, number in zip(painters, z.chunk(len(painters)), counts.chunk(len(painters)), strict=True):
        try:
            found.append({"image": painter.decoded(mine, indices), **rows, "nfe": number.numpy()})
        except FloatingPointError as error:
            found.append(error)
    return found


@torch.inference_mode()
def latents(
    painters: Sequence[Painter], indices: range, rows: Rows, told: Callable[[float], None] = lambda share: None
) -> tuple[Tensor, Tensor]:
    """Latents of some painters, one behind the other, (P B, C, h, w) float64, at the model's scale, and the number of
    evaluations of each, (P B,) int64.

    Args:
        painters: P, which differ only in how they are guided.
        indices: which samples, B.
        rows: their conditions, as the condition's `sampled` returns them.
        told: as for `Painter.draw`.
    """
    if len(painters) > 1 and not _is_ours(painters[0]):
        alone = [
            latents([one], indices, rows, partial(_told, told, i, len(painters))) for i, one in enumerate(painters)
        ]
        return torch.cat([z for z, _ in alone]), torch.cat([counts for _, counts in alone])
    first, many = painters[0], len(painters)
    device, shape = next(first.model.parameters()).device, (first.model.in_channels, *2 * [first.model.input_size])
    condition, null = (
        each(lambda piece: torch.from_numpy(piece).to(device), form)
        for form in (first.condition.told(rows), first.condition.null(len(indices)))
    )
    fields = [painter.field(condition, null) for painter in painters]
    field = fields[0] if many == 1 else SideBySide(fields, len(indices))
    counts = torch.zeros(many * len(indices), dtype=torch.int64)
    sampling = first.sampling
    noise = Noise(sampling.seed, indices, shape, sampling.steps or 0, device, copies=many)
    with noise, computing(sampling.precision, device):
        found = first.process.sample(first.sampler, Counted(field, counts, told), noise.start, sampling, noise)
    return found, counts


def _is_ours(painter: Painter) -> bool:
    """Whether process and sampler are of this package. In those of another one a sample may depend on the other rows of
    its batch, or on the guidance in the settings: they see one set at a time."""
    made = type(painter.process), painter.sampler.run
    return all(str(getattr(one, "__module__", "")).startswith("haste.") for one in made)


def _told(told: Callable[[float], None], place: int, of: int, share: float) -> None:
    """Tell the share of the whole that a share of one of its equal parts is."""
    told((place + share) / of)


def painter_of(
    plan: Plan,
    state: State,
    sampling: Sampling,
    *,
    decoder: str | None = None,
    device: str | None = None,
) -> Painter:
    """The painter of a state's samples: model, decoder, and the scale of the model's latents.

    Args:
        plan: has the state.
        state: trained or imported.
        sampling: how samples are drawn.
        decoder: a folder or hub id in place of the plan's.
        device: torch's name of it, in place of the configuration's.

    Raises:
        ValueError: state, decoder or latents do not belong together.
    """
    device = device or str(choose_device(plan.config.runtime.device))
    trajectory, weights = plan.trajectories[state.trajectory], plan.weights(state, sampling)
    found = Autoencoder.load(decoder or plan.decoder, device=device)
    imported, condition = trajectory.name in plan.elsewhere, condition_in(trajectory.recipe)
    condition = condition.on(plan) if imported and sampling.prompts else condition.opened(plan)
    seams = process_in(trajectory.recipe), condition
    check_autoencoder(plan, found)
    if imported:
        model = model_elsewhere(plan, trajectory.name, weights).to(device)
        return Painter(model, sampling, found, *seams, found.scale, found.shift)
    model, header = trained_model(plan.path(state), key=trajectory.key, weights=weights)
    manifest = Store.of(plan.latents).manifest
    _check_same_inputs(plan, state, header, manifest["identity"], condition.identities)
    if decoder is None:
        check_decoder(plan, found, manifest["autoencoder"])
    return Painter(model.to(device), sampling, found, *seams, manifest["scale"], manifest["shift"])


def _check_same_inputs(
    plan: Plan, state: State, header: Mapping[str, Any], latents: str, others: Mapping[str, str]
) -> None:
    """Refuse latents, whose scale may be another, or a condition's inputs than those that the state was trained for."""
    trained = header["inputs"]
    if trained["latents"] != latents:
        raise ValueError(
            f"{plan.latents.folder}: holds latents {latents[:12]}, but the state was trained on "
            f"{trained['latents'][:12]}"
        )
    for name, identity in others.items():
        if (before := trained.get(name)) != identity:
            raise ValueError(
                f"{plan.path(state)}: was trained with {name} {str(before)[:12]}, but {name} is now {identity[:12]}; "
                "bring the earlier one back"
            )
