"""Latents: the frozen autoencoder, the store of its posterior for every image, and decoding.

Shapes: B batch, C latent channels, f downsampling factor, H = W image side, h = w = H / f latent side.
The store holds the posterior's mean and std (2C, h, w), unscaled; a training step draws z = mean + std n and maps it
to the diffusion model's scale, (z - shift) * scale. Decoding undoes scale and shift.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from haste.data.condition import Condition
from haste.files import artefact
from haste.files.store import Store, shard_range, write_shard
from haste.networks import autoencoder, hub
from haste.networks.weights import why_not

KIND = "latents"
ENCODED_PIXELS = 2**22  # of the images that are encoded at once: 64 of 256 px


def fetch(where: str | Path) -> Path:
    """The folder of an autoencoder in diffusers' layout: `where` itself, or the hub's cache after a download.

    Only the configuration and safetensors files are downloaded, so nothing can execute code.

    Raises:
        ValueError: neither a folder nor a hub id that can be reached or is cached.
    """
    if (folder := autoencoder.folder_named(where)) is not None:
        return folder
    from huggingface_hub import snapshot_download  # a network client, only for hub ids

    try:
        ask = partial(snapshot_download, str(where), allow_patterns=autoencoder.PATTERNS)
        return hub.from_hub(ask, autoencoder.has_weights)
    except (OSError, ValueError) as error:  # the hub's own errors derive from these
        raise ValueError(
            f"autoencoder {where}: neither a folder nor in this machine's cache of the hub, and could not be fetched "
            f"({why_not(error)}). {autoencoder.HINT}."
        ) from error


class Autoencoder:
    """A frozen diffusers AutoencoderKL, in float32. Make one with `Autoencoder.load`.

    Attributes:
        model: the network.
        channels: C, latent channels.
        factor: f, pixels per latent cell along one side.
        scale: factor of latents for the diffusion model.
        shift: subtracted before scaling.
        identity: sha256 of the weights.
        device: where it computes.
    """

    def __init__(self, model: torch.nn.Module, config: Mapping[str, Any], identity: str, device: str) -> None:
        self.model: Any = model.to(device).eval().requires_grad_(False)
        self.device = torch.device(device)
        self.channels = int(config["latent_channels"])
        self.factor = 2 ** (len(config["block_out_channels"]) - 1)
        self.scale = float(config["scaling_factor"])
        self.shift = float(config.get("shift_factor") or 0.0)
        self.identity = identity

    @classmethod
    def load(cls, where: str | Path, *, device: str = "cpu") -> Autoencoder:
        """Load from a folder in diffusers' layout (config.json, safetensors; also a pipeline's) or by hub id.

        Args:
            where: folder, or a hub id such as "stabilityai/sd-vae-ft-mse".
            device: torch's name of the device to compute on.

        Raises:
            ValueError: not found, another kind of model, weights that do not fit their configuration, or a hub
                that cannot be reached.
        """
        # 5 s to import, so only here, and from the module itself instead of the package.
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
        from safetensors import SafetensorError

        found = autoencoder.opened(fetch(where))
        files = found.files
        identity = _files_identity(files)
        if (beside := found.folder / "part.json").is_file():  # trained here
            expected = str(artefact.read_json(beside, "part").get("identity"))
            if identity != expected:
                raise ValueError(f"{files[0]}: expected the weights {expected[:12]}, found {identity[:12]}")
        try:
            loaded: Any = AutoencoderKL.from_pretrained(
                str(found.folder),
                variant=found.variant,
                use_safetensors=True,
                local_files_only=True,
                low_cpu_mem_usage=False,
                torch_dtype=torch.float32,
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError, TypeError, KeyError, SafetensorError) as error:
            raise ValueError(f"{files[0]}: cannot be loaded as an AutoencoderKL ({error})") from error
        model, info = loaded
        # diffusers only warns, and leaves missing weights random.
        wrong = {name: sorted(map(str, found))[:4] for name, found in info.items() if found}
        if wrong:
            raise ValueError(f"{files[0]}: the weights do not fit {autoencoder.CONFIG}: {wrong}")
        hub.finite(Path(files[0]), model.state_dict())
        return cls(model, model.config, identity, device)

    @torch.no_grad()
    def moments(self, images: torch.Tensor | np.ndarray) -> torch.Tensor:
        """Mean and std of the posterior, unscaled.

        Args:
            images: (B, H, W, 3) uint8, H and W multiples of `factor`.

        Returns:
            (B, 2C, H/f, W/f) float32 on the autoencoder's device: means, then standard deviations.
        """
        pixels = torch.as_tensor(images).to(self.device)
        assert pixels.dtype == torch.uint8 and pixels.ndim == 4 and pixels.shape[3] == 3, "expected NHWC uint8"
        most = max(1, ENCODED_PIXELS // (pixels.shape[1] * pixels.shape[2]))
        return torch.cat([self._encoded(some) for some in pixels.split(most)])

    def _encoded(self, pixels: torch.Tensor) -> torch.Tensor:
        # NHWC uint8 -> NCHW float32 in [-1, 1]
        posterior = self.model.encode(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1).latent_dist
        return torch.cat([posterior.mean, posterior.std], dim=1)

    @torch.no_grad()
    def decode(self, z: torch.Tensor, scale: float | None = None, shift: float | None = None) -> torch.Tensor:
        """Decode latents at the diffusion model's scale.

        Args:
            z: (B, C, h, w), any float dtype.
            scale: the latents' scale; None: this autoencoder's own.
            shift: the latents' shift; None: this autoencoder's own.

        Returns:
            (B, 3, h f, w f) float32, nominally in [-1, 1], not clipped.
        """
        scale, shift = self.scale if scale is None else scale, self.shift if shift is None else shift
        latents = z.to(self.device, torch.float32) / scale + shift
        return self.model.decode(latents).sample


def _files_identity(files: list[Path]) -> str:
    parts = [artefact.file_identity(path) for path in files]
    return parts[0] if len(parts) == 1 else hashlib.sha256("".join(parts).encode()).hexdigest()


def draw(
    moments: torch.Tensor, noise: torch.Tensor, scale: float | torch.Tensor, shift: float | torch.Tensor
) -> torch.Tensor:
    """A latent drawn from its posterior, at the diffusion model's scale: (mean + std noise - shift) scale.

    Args:
        moments: (B, 2C, h, w) mean and std, any float dtype.
        noise: (B, C, h, w) standard normal.
        scale: the autoencoder's scale.
        shift: the autoencoder's shift.

    Returns:
        (B, C, h, w) float32.
    """
    mean, std = moments.float().chunk(2, dim=1)
    return (mean + std * noise.float() - shift) * scale


def to_pixels(x: torch.Tensor, rounding: Literal["truncate", "round"] = "truncate") -> torch.Tensor:
    """Images in [-1, 1] as pixels.

    Args:
        x: (B, 3, H, W) float; values outside [-1, 1] are clipped.
        rounding: "truncate" is clamp(255 (x + 1) / 2), cut to an integer (REPA, HASTE); "round" is
            clamp(127.5 x + 128), cut to an integer (DiT, SiT).

    Returns:
        (B, H, W, 3) uint8.

    Raises:
        ValueError: no such rounding.
    """
    if rounding not in ("truncate", "round"):
        raise ValueError(f"pixel rounding {rounding!r}: expected 'truncate' or 'round'")
    levels = 255 * (x.float() + 1) / 2 if rounding == "truncate" else 127.5 * x.float() + 128
    return levels.clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def encode_shard(
    folder: Path | str,
    images: Store,
    autoencoder: Autoencoder,
    *,
    key: str,
    recipe: Mapping[str, Any],
    shard: int,
    shards: int,
    provenance: Mapping[str, Any],
    condition: Condition,
    batch: int = 64,
    dtype: str = "float16",
    flipped: bool = False,
) -> Path:
    """Write one shard of a latents store: moments (2C, h, w) and the condition's fields, samples in the images' order.

    Mirrored images have latents of their own: no encoder is exactly equivariant, so mirrored latents are others.

    The content depends on the batch size only by float rounding; a store made with another number of shards may
    therefore differ in its last bits, and then has another identity.

    Args:
        folder: the latents store's folder.
        images: an open store with image (R, R, 3) uint8 and the other fields of each image.
        autoencoder: the encoder.
        key: hash of the recipe.
        recipe: how the store is made, JSON.
        shard: which shard, from 0.
        shards: the number of shards.
        provenance: how this shard is made, JSON.
        condition: its rows are stored beside the latents.
        batch: images per forward pass.
        dtype: of the stored moments.
        flipped: encode every image mirrored, left to right.

    Raises:
        ValueError: a resolution that the factor does not divide, or moments that are not finite in `dtype`.
    """
    facts, rows = _facts(images, autoencoder), shard_range(images.count, shard, shards)
    side = facts["size"]
    return write_shard(
        folder,
        kind=KIND,
        key=key,
        recipe=recipe,
        shard=shard,
        shards=shards,
        total=images.count,
        fields={"moments": ((2 * autoencoder.channels, side, side), dtype), **condition.stored},
        batches=_encode(images, autoencoder, condition, rows, batch, dtype, flipped),
        provenance=provenance,
        facts=facts,
    )


def _facts(images: Store, autoencoder: Autoencoder) -> dict[str, Any]:
    resolution, factor = images.fields["image"][0][0], autoencoder.factor
    if resolution % factor:
        raise ValueError(f"{images.folder}: images of {resolution} pixels, expected a multiple of {factor}")
    return {
        "classes": images.manifest["classes"],
        "images": images.identity,
        "autoencoder": autoencoder.identity,
        "channels": autoencoder.channels,
        "scale": autoencoder.scale,
        "shift": autoencoder.shift,
        "factor": factor,
        "size": resolution // factor,
    }


def _encode(
    images: Store,
    autoencoder: Autoencoder,
    condition: Condition,
    samples: range,
    batch: int,
    dtype: str,
    flipped: bool,
) -> Iterator[dict[str, np.ndarray]]:
    for low in range(0, len(samples), batch):
        rows = samples[low : low + batch]
        said = {name: images.read(name, rows) for name in images.fields}
        seen = np.ascontiguousarray(said["image"][:, :, ::-1]) if flipped else said["image"]  # (B, R, R, 3)
        with np.errstate(over="ignore"):  # an overflow is found and reported below
            moments = autoencoder.moments(seen).cpu().numpy().astype(dtype)
        broken = np.flatnonzero(~np.isfinite(moments).all(axis=(1, 2, 3)))
        if len(broken):
            cure = "; autoencoder.dtype: float32 holds larger ones" if np.dtype(dtype) == np.float16 else ""
            raise ValueError(
                f"{images.folder}: latents of image {rows[int(broken[0])]} are not finite in {dtype}{cure}"
            )
        yield {"moments": moments, **condition.rows(said)}
