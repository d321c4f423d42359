"""The small networks that the pipeline trains itself: an autoencoder, a teacher and a detector for small images.

Training takes seconds on one CPU thread. The output is a folder, written atomically: the weights in the layout of the
library that reads them, and `part.json`, which records what the part is, how it was made and how good it is.

Everything follows from the seed: initialisation, the order of images, and noise, whatever the caller drew before.

M images, R their resolution, B batch. Images are uint8 NHWC (M, R, R, 3), 0..255.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from haste.files import artefact
from haste.files.progress import PAUSE
from haste.metrics.detectors import SmallCNN

log = logging.getLogger(__name__)

EVALUATION_BATCH = 256
MOST_LATENTS = 2**27  # entries of the latents whose standard deviation is computed, which takes 5 GB
NORM = (0.5, 0.5, 0.5)  # mean and std per channel that map 0..1 to -1..1


# ---- training


def fit(
    network: nn.Module,
    loss: Callable[[Tensor, torch.Generator], Tensor],
    count: int,
    *,
    seed: int,
    steps: int,
    batch: int,
    lr: float,
    name: str,
    weight_decay: float = 0.01,
) -> None:
    """Train a network in place with AdamW, a short warm-up and a cosine decay to zero.

    Args:
        network: left in evaluation mode.
        loss: (indices (B,) of the batch's images, generator for its noise) -> scalar.
        count: number of images; each is used once before any is used again.
        seed: of the order and the noise.
        steps, batch, lr: number of steps, images per step, highest learning rate.
        name: for the log and for errors.
        weight_decay: AdamW's, times the learning rate.

    Raises:
        ValueError: the loss, or a weight at the end, is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=weight_decay)
    warmup = max(1, min(50, steps // 10))
    shown = time.monotonic()
    network.train()
    for step, indices in enumerate(_batches(count, steps, batch, generator)):
        rate = lr * min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimiser.param_groups:
            group["lr"] = rate
        value = loss(indices, generator)
        if not torch.isfinite(value):
            raise ValueError(
                f"{name}: the loss is {value.item()} at step {step} of {steps}; expected a lower lr than {lr}"
            )
        optimiser.zero_grad(set_to_none=True)
        value.backward()
        optimiser.step()
        if time.monotonic() - shown >= PAUSE or step + 1 == steps:
            shown = time.monotonic()
            log.info("%s: step %d of %d, loss %.4f", name, step + 1, steps, value.item())
    if broken := [key for key, weight in network.named_parameters() if not weight.isfinite().all()]:
        raise ValueError(f"{name}: {broken[0]} is not finite after step {steps}; expected a lower lr than {lr}")
    network.eval()


def _batches(count: int, steps: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices (B,) of each step: consecutive random permutations of 0..count-1, cut into batches."""
    stream = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        while len(stream) < batch:
            stream = torch.cat([stream, torch.randperm(count, generator=generator)])
        yield stream[:batch]
        stream = stream[batch:]


@contextmanager
def initialising(seed: int) -> Iterator[None]:
    """Libraries initialise from torch's global generator: seed it for the block, and restore it afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


# ---- the three parts


def train_autoencoder(
    images: NDArray[np.uint8],
    held_out: NDArray[np.uint8],
    *,
    out: Path,
    seed: int,
    steps: int,
    batch: int,
    lr: float,
    channels: int = 4,
    width: int = 32,
    factor: int = 2,
    kl_weight: float = 1e-4,
    name: str = "autoencoder",
    key: str | None = None,
    recipe: Any = None,
) -> dict[str, float]:
    """Train a small diffusers AutoencoderKL: mean squared error plus `kl_weight` times the KL term (Kingma & Welling).

    Args:
        images, held_out: uint8 NHWC (M, R, R, 3), to train on and to measure on.
        out: the folder to write, in diffusers' layout; an older one is replaced.
        seed, steps, batch, lr: of the training.
        channels: of the latents; width: of the first stage; factor: downsampling, a power of 2 (1 for none).
        kl_weight: of the KL divergence, averaged over the latents' entries.
        name, key, recipe: recorded in `part.json`.

    Returns:
        Quality on `held_out`, decoded from the latents' means: "reconstruction_mse" with pixels in -1..1, "psnr" in dB.

    Raises:
        ValueError: unsuitable images or factor, or a loss that is not finite.
    """
    start = time.monotonic()
    pixels, unseen = checked(images, f"{name}: images"), checked(held_out, f"{name}: held-out images")
    side = pixels.shape[1]
    if factor < 1 or factor & (factor - 1) or side % factor:
        raise ValueError(f"{name}: factor {factor} is not a power of 2 that divides {side} px")
    with initialising(seed):
        network = _autoencoder(side, channels, width, factor)
    loss = _autoencoder_loss(network, pixels, kl_weight)
    fit(network, loss, len(pixels), seed=seed, steps=steps, batch=batch, lr=lr, name=name)
    # Latents enter the diffusion with unit variance: over all entries, draws included (Rombach et al. 2022, App. G).
    some = pixels[:: -(-len(pixels) * channels * (side // factor) ** 2 // MOST_LATENTS)]
    network.register_to_config(scaling_factor=1 / _latent_std(network, some))
    mse = _reconstruction_mse(network, unseen)
    quality = {"reconstruction_mse": mse, "psnr": 10 * math.log10(4 / mse)}  # peak to peak is 2, and 2^2 = 4
    architecture = {"kind": "AutoencoderKL", "channels": channels, "factor": factor, "width": width}
    with artefact.replacing(out) as folder:
        with artefact.saving_tensors(out):
            network.save_pretrained(folder)
        weights = folder / "diffusion_pytorch_model.safetensors"
        describe(folder, weights, "autoencoder", name, key, recipe, architecture, quality, start)
    return quality


def _autoencoder(resolution: int, channels: int, width: int, factor: int) -> Any:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL  # 5 s to import, only needed here

    levels = factor.bit_length()
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(width * min(2**level, 4) for level in range(levels)),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=8,
        sample_size=resolution,
        mid_block_add_attention=False,
    )


def _autoencoder_loss(network: Any, images: Tensor, kl_weight: float) -> Callable[[Tensor, torch.Generator], Tensor]:
    def loss(indices: Tensor, generator: torch.Generator) -> Tensor:
        x = unit(images[indices])
        posterior = network.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        rebuilt = network.decode(posterior.mean + posterior.std * noise).sample
        divergence = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        return functional.mse_loss(rebuilt, x) + kl_weight * divergence

    return loss


def train_teacher(
    images: NDArray[np.uint8],
    labels: NDArray[np.integer],
    held_out: NDArray[np.uint8],
    held_out_labels: NDArray[np.integer],
    *,
    out: Path,
    seed: int,
    steps: int,
    batch: int,
    lr: float,
    depth: int = 6,
    width: int = 64,
    heads: int = 4,
    patch: int = 4,
    name: str = "teacher",
    key: str | None = None,
    recipe: Any = None,
) -> dict[str, float]:
    """Train a small timm VisionTransformer to classify, as a teacher for alignment.

    Its classifier reads the mean of the patch tokens, so that these tokens, the alignment targets, encode the classes.

    Args:
        images, held_out: uint8 NHWC (M, R, R, 3); labels, held_out_labels: (M,) integers 0..classes-1.
        out: the folder to write; an older one is replaced.
        seed, steps, batch, lr: of the training.
        depth, width, heads, patch: of the transformer; patch in pixels.
        name, key, recipe: recorded in `part.json`.

    Returns:
        Quality: "accuracy" on `held_out`, in [0, 1].

    Raises:
        ValueError: unsuitable images, labels or patch, or a loss that is not finite.
    """
    start = time.monotonic()
    resolution = images.shape[1]
    if resolution % patch or width % heads:
        raise ValueError(f"{name}: patch {patch} must divide {resolution} px, and {heads} heads the width {width}")
    classes = _classes(labels, held_out_labels)
    kwargs = transformer_kwargs(resolution, classes, depth=depth, width=width, heads=heads, patch=patch)
    network = vision_transformer(seed, kwargs)
    # Strong weight decay: 1,500 images are few for a transformer, and this gains 2 points on unseen digits.
    training = {"seed": seed, "steps": steps, "batch": batch, "lr": lr, "name": name, "weight_decay": 0.2}
    known, unseen = _labelled(images, labels), _labelled(held_out, held_out_labels)
    quality = _train_classifier(network, lambda shown: network(unit(shown)), known, unseen, training)
    architecture = {"kind": "VisionTransformer", "kwargs": kwargs, "mean": NORM, "std": NORM}
    _write(out, network, "teacher", name, key, recipe, architecture, quality, start)
    return quality


def transformer_kwargs(
    resolution: int, classes: int, *, depth: int, width: int, heads: int, patch: int
) -> dict[str, Any]:
    """The arguments of timm's VisionTransformer for a small teacher; resolution and patch in pixels."""
    size = {"img_size": resolution, "patch_size": patch, "embed_dim": width, "depth": depth, "num_heads": heads}
    return {**size, "num_classes": classes, "global_pool": "avg", "fc_norm": False, "qk_norm": True}


def vision_transformer(seed: int, kwargs: dict[str, Any]) -> nn.Module:
    """A small timm VisionTransformer of `transformer_kwargs`, initialised from a seed."""
    from timm.models.vision_transformer import VisionTransformer

    with initialising(seed):
        network = VisionTransformer(**kwargs)
        # timm initialises positions with 0.02, too small compared with the patches to be learned in some hundred steps.
        nn.init.normal_(network.get_parameter("pos_embed"), std=0.5)
    return network


def train_detector(
    images: NDArray[np.uint8],
    labels: NDArray[np.integer],
    held_out: NDArray[np.uint8],
    held_out_labels: NDArray[np.integer],
    *,
    out: Path,
    seed: int,
    steps: int,
    batch: int,
    lr: float,
    width: int = 16,
    turns: bool = False,
    name: str = "detector",
    key: str | None = None,
    recipe: Any = None,
) -> dict[str, float]:
    """Train a SmallCNN to classify, as the detector of the scores.

    Args and errors as in `train_teacher`; width: channels of the first stage, a multiple of 4; turns: the labels are
    `quarter_turns`, so the detector's logits are not meaningful for samples.

    Returns:
        Quality: "accuracy" on `held_out`, in [0, 1] ("turn_accuracy" of turns).
    """
    start = time.monotonic()
    classes = _classes(labels, held_out_labels)
    with initialising(seed):
        network = SmallCNN(images.shape[1], width, classes)
    training = {"seed": seed, "steps": steps, "batch": batch, "lr": lr, "name": name}
    known, unseen = _labelled(images, labels), _labelled(held_out, held_out_labels)
    quality = _train_classifier(network, lambda shown: network(shown)["logits"], known, unseen, training, shift=1)
    architecture = {
        "kind": "cnn",
        "resolution": images.shape[1],
        "width": width,
        "classes": classes,
        **({"turns": True} if turns else {}),
    }
    quality = {"turn_accuracy": quality["accuracy"]} if turns else quality
    _write(out, network, "detector", name, key, recipe, architecture, quality, start)
    return quality


def quarter_turns(images: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images without labels as a classification task: image i turned by i mod 4 quarter turns, its label.

    Predicting the rotation requires the content of the image (Gidaris et al. 2018, "Unsupervised representation
    learning by predicting image rotations").

    Args:
        images: uint8 NHWC (M, R, R, 3).

    Returns:
        Images (M, R, R, 3), and labels (M,) 0..3.
    """
    turns = np.arange(len(images)) % 4
    turned = np.stack([np.rot90(image, int(turn)) for image, turn in zip(images, turns, strict=True)])
    return turned, turns.astype(np.int64)


# ---- shared by the parts

Labelled = tuple[Tensor, Tensor]  # images uint8 NHWC (M, R, R, 3), labels int64 (M,)


def _train_classifier(
    network: nn.Module,
    logits: Callable[[Tensor], Tensor],
    known: Labelled,
    unseen: Labelled,
    training: dict[str, Any],
    shift: int = 0,
) -> dict[str, float]:
    """Train by cross-entropy, and return the accuracy on unseen images.

    logits: uint8 NHWC (B, R, R, 3) -> (B, classes); training: arguments of `fit`; shift: of the images, in pixels.
    """
    images, labels = known

    def loss(indices: Tensor, generator: torch.Generator) -> Tensor:
        return functional.cross_entropy(logits(_shifted(images[indices], shift, generator)), labels[indices])

    fit(network, loss, len(images), **training)
    with torch.inference_mode():
        right = sum(
            int((logits(shown).argmax(1) == wanted).sum())
            for shown, wanted in zip(
                unseen[0].split(EVALUATION_BATCH),
                unseen[1].split(EVALUATION_BATCH),
                strict=True,
            )
        )
    return {"accuracy": right / len(unseen[1])}


def _shifted(images: Tensor, by: int, generator: torch.Generator) -> Tensor:
    """Each image shifted by -`by` to `by` pixels along each axis, its border repeated."""
    size = images.shape[1]
    steps = torch.randint(-by, by + 1, (2, len(images), 1), generator=generator)
    rows, columns = (torch.arange(size) + steps).clamp(0, size - 1)  # each (B, R)
    return images[torch.arange(len(images))[:, None, None], rows[:, :, None], columns[:, None, :]]


def _reconstruction_mse(network: Any, pixels: Tensor) -> float:
    """Mean squared error over all entries of images in -1..1, decoded from the latents' means."""
    total = 0.0
    with torch.inference_mode():
        for shown in pixels.split(EVALUATION_BATCH):
            x = unit(shown)
            rebuilt = network.decode(network.encode(x).latent_dist.mean).sample
            total += float((rebuilt - x).double().square().sum())
    return total / pixels.numel()


def _latent_std(network: Any, pixels: Tensor) -> float:
    """Standard deviation over all entries of latents drawn for these images: of the means, plus the draws' own."""
    with torch.inference_mode():
        posteriors = [network.encode(unit(shown)).latent_dist for shown in pixels.split(EVALUATION_BATCH)]
    means = torch.cat([posterior.mean for posterior in posteriors]).double()
    variances = torch.cat([posterior.var for posterior in posteriors]).double()
    return math.sqrt(float(means.var(correction=0) + variances.mean()))


def unit(images: Tensor) -> Tensor:
    """uint8 NHWC 0..255 -> float32 NCHW -1..1."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def checked(images: NDArray, what: str) -> Tensor:
    """Images as a tensor; raises ValueError for anything else."""
    shape = images.shape
    if images.dtype != np.uint8 or images.ndim != 4 or shape[3] != 3 or shape[1] != shape[2] or not len(images):
        raise ValueError(f"{what}: expected uint8 (M, R, R, 3), found {images.dtype} {shape}")
    return torch.from_numpy(np.ascontiguousarray(images))


def _labelled(images: NDArray, labels: NDArray) -> Labelled:
    found = checked(images, "images")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"labels: expected one for each of {len(images)} images, found shape {labels.shape}")
    return found, torch.from_numpy(np.asarray(labels, np.int64))


def _classes(labels: NDArray, held_out_labels: NDArray) -> int:
    """Number of classes, from the training labels."""
    classes = int(labels.max()) + 1
    if labels.min() < 0 or held_out_labels.min() < 0 or held_out_labels.max() >= classes:
        raise ValueError(
            f"labels: expected 0..{classes - 1}, found {held_out_labels.min()}..{held_out_labels.max()} held out"
        )
    return classes


def _write(out: Path, network: nn.Module, part: str, *description: Any) -> None:
    with artefact.replacing(out) as folder:
        folder.mkdir()
        weights = folder / "model.safetensors"
        with artefact.saving_tensors(weights):
            safetensors.torch.save_file(
                {name: value.contiguous() for name, value in network.state_dict().items()},
                weights,
            )
        describe(folder, weights, part, *description)


def describe(
    folder: Path,
    weights: Path,
    part: str,
    name: str,
    key: str | None,
    recipe: Any,
    architecture: dict[str, Any],
    quality: dict[str, float],
    start: float,
) -> None:
    """Write `part.json`: what a part is, the identity of its file of weights, and the seconds since `start`."""
    description = {
        "schema": artefact.SCHEMA,
        "kind": "part",
        "part": part,
        "name": name,
        "key": key,
        "recipe": recipe,
        "architecture": architecture,
        "quality": quality,
        "identity": artefact.file_identity(weights),
        "provenance": artefact.provenance(key=key, recipe=recipe, seconds=time.monotonic() - start),
    }
    artefact.write_json(folder / "part.json", description)
