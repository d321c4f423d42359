"""What 50,000 samples of 250 evaluations take, extrapolated from a few.

    python benchmarks/sampling.py [--samples 512] [--batch 64] [--steps 250] [--threads 1]
                                  [--device cuda] [--model SiT-XL/2] [--gpu-batch 256] [--size 32]

First what is not the network's: noise, sampler and files, with a network that returns zeros and a decoder that returns
a constant, in core-minutes: how busy the cores were, however many others share them. What the thread that draws does
not do is done beside it. Then, on a GPU, a real network of random weights and Stable Diffusion's decoder, in every
precision, compiled and not, after a warm-up; --device cpu runs it anywhere, at a toy's size to see that it works.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from haste import config
from haste.config import Sampling
from haste.data import order
from haste.data.condition import Labels
from haste.data.latents import Autoencoder
from haste.diffusion.interpolant import Interpolant
from haste.models.sit import SiT
from haste.sampling.compiled import compile_once
from haste.sampling.painter import Painter, latents
from haste.sampling.shards import Wanted, draw_shards

WHOLE, CHANNELS, FACTOR = 50_000, 4, 8
CONDITION = Labels(classes=1000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", default="SiT-XL/2", choices=sorted(n for n in config.MODELS if n.startswith("SiT")))
    parser.add_argument("--gpu-batch", type=int, default=256)
    parser.add_argument("--size", type=int, default=32, help="side of the latents")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console(width=120)
    console.print(beside_the_network(arguments))
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("sampling: no GPU here, no network measured")
        return
    console.print(with_a_network(arguments))


# ---------------------------------------------------------------------------------------------------------------------
# Without a network


class Zeros(nn.Module):
    """A network that costs nothing."""

    in_channels, process = CHANNELS, "interpolant"

    def __init__(self, size: int, batch: int):
        super().__init__()
        self.input_size, self.zeros = size, nn.Parameter(torch.zeros(batch, CHANNELS, size, size))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Any]]:
        return self.zeros[: len(x)], {}


class Constant:
    """A decoder that costs nothing."""

    factor, channels, identity, device, scale, shift = FACTOR, CHANNELS, "constant", torch.device("cpu"), 1.0, 0.0

    def __init__(self, size: int, batch: int):
        self.images = torch.zeros(batch, 3, FACTOR * size, FACTOR * size)

    def decode(self, z: Tensor, *, scale: float, shift: float) -> Tensor:
        return self.images[: len(z)]


def beside_the_network(arguments: argparse.Namespace) -> Table:
    """Processor time of all threads and of the one that draws."""
    samples, batch, size, steps = arguments.samples, arguments.batch, arguments.size, arguments.steps
    network, decoder = Zeros(size, batch), Constant(size, batch)
    sampling = Sampling(steps=steps, count=samples)
    painter = Painter(network, sampling, decoder, Interpolant(), CONDITION, 1.0, 0.0)  # type: ignore[arg-type]
    cuts = [range(low, min(low + batch, samples)) for low in range(0, samples, batch)]

    def noise() -> None:
        for rows, step in itertools.product(cuts, range(steps)):
            order.normals(0, "sample noise", step, rows, (CHANNELS, size, size))

    def sampled() -> None:
        for rows in cuts:
            latents([painter], rows, CONDITION.sampled(sampling, rows))

    def everything(sets: int = 1) -> None:
        with tempfile.TemporaryDirectory() as folder:
            wanted = [Wanted(painter, Path(folder, str(i), "shard.npz"), "", {}) for i in range(sets)]
            draw_shards(wanted, shard=0, shards=1, batch=batch, inputs={})

    painter.draw(range(2))
    table = Table(title=f"{samples} samples of {steps} evaluations at {size} x {size} x {CHANNELS}, batches of {batch}")
    for column in ["", f"core-minutes for {WHOLE:,}", "of these in the thread that draws"]:
        table.add_column(column, justify="right")
    beside = {"noise": noise, "noise and sampler": sampled, "with pixels and files": everything}
    for name, work in {**beside, "the same, of two sets in one job": lambda: everything(2)}.items():
        whole, own = (f"{seconds / samples * WHOLE / 60:.1f}" for seconds in _busy(work))
        table.add_row(name, whole, own)
    return table


def _busy(work: Callable[[], None]) -> tuple[float, float]:
    """Seconds of processor time, of all threads and of this one."""
    whole, own = time.process_time(), time.thread_time()
    work()
    return time.process_time() - whole, time.thread_time() - own


# ---------------------------------------------------------------------------------------------------------------------
# With a network


def with_a_network(arguments: argparse.Namespace) -> Table:
    """Images a second of each way, over batches, with their spread."""
    device = torch.device(arguments.device)
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    title = f"{arguments.model}, {arguments.steps} evaluations, and decoder, batches of {arguments.gpu_batch}"
    table = Table(title=f"{title}, {hardware}, torch {torch.__version__}")
    for column in [
        "precision",
        "compiled",
        "images/s",
        "from .. to",
        f"hours for {WHOLE:,}",
        "decoder alone, images/s",
    ]:
        table.add_column(column, justify="right")
    decoder = _random_decoder(device)
    for compiled, precision in itertools.product((False, True), ("fp32", "tf32", "bf16")):
        torch._dynamo.reset()
        rates, decoding = _measured(arguments, decoder, precision, compiled, device)
        mean = statistics.harmonic_mean(rates)
        spread = f"{min(rates):.3g} .. {max(rates):.3g}"
        cells = f"{mean:.3g}", spread, f"{WHOLE / mean / 3600:.2f}", f"{decoding:.3g}"
        table.add_row(precision, "yes" if compiled else "no", *cells)
    return table


def _measured(
    arguments: argparse.Namespace, decoder: Autoencoder, precision: str, compiled: bool, device: torch.device
) -> tuple[list[float], float]:
    """Images a second of each batch, decoded, and of the decoder alone; in bf16 both compute in it."""
    shape = {"input_size": arguments.size, "in_channels": CHANNELS, "classes": CONDITION.classes}
    network = SiT(**shape, **config.MODELS[arguments.model].model_dump(exclude={"architecture"}))
    network.to(device).eval().requires_grad_(False)
    if compiled:
        compile_once(network)
    half = "bf16" if precision == "bf16" else "fp32"
    settings = {"steps": arguments.steps, "count": arguments.samples, "precision": precision, "decoder_precision": half}
    sampling = Sampling.model_validate(settings)
    painter = Painter(network, sampling, decoder, Interpolant(), CONDITION, 1.0, 0.0)
    batch = arguments.gpu_batch
    shorter = sampling.model_copy(update={"steps": 2})
    Painter(network, shorter, decoder, Interpolant(), CONDITION, 1.0, 0.0).draw(range(batch))  # the warm-up
    rates = []
    for low in range(0, arguments.samples, batch):
        rows = range(low, min(low + batch, arguments.samples))
        rates.append(len(rows) / _seconds(lambda rows=rows: painter.draw(rows)))  # type: ignore[misc]
    z = torch.zeros(batch, CHANNELS, arguments.size, arguments.size, device=device)
    return rates, batch / _seconds(lambda: painter.decoded(z, range(batch)))


def _seconds(work: Callable[[], Any]) -> float:
    """Of work whose result is on the host, so that nothing is left to wait for."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _random_decoder(device: torch.device) -> Autoencoder:
    """Of the sizes of Stable Diffusion's."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    widths = (128, 256, 512, 512)
    made = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=widths,
        layers_per_block=2,
        latent_channels=CHANNELS,
    )
    return Autoencoder(made, made.config, "random", str(device))


if __name__ == "__main__":
    main()
