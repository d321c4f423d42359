"""Images a second on one GPU: whole training steps as training takes them, nothing waited for in between.

    python benchmarks/throughput.py [--model SiT-XL/2] [--teacher DINOv2-B] [--batches 32 64 128 256] [--steps 30]
                                    [--precision bf16] [--eager] [--profile] [--device cuda]

Random weights, latents and images, already on the device (`data.py` measures the feeding). One variant at a time, so
that the memory is its own. The share of the chip's peak counts the student's operations alone. --profile lists where
HASTE's time goes, by kernel.
"""

from __future__ import annotations

import argparse
import time

import torch
from rich.console import Console
from rich.table import Table
from step import TERMS, Variant, gigaflops
from torch.profiler import ProfilerActivity, profile

from haste import config
from haste.networks.registry import TEACHERS
from haste.teachers.encoder import Teacher, with_any_weights
from haste.train.step import teacher_targets, total_loss, update

PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # dense bf16 operations a second, by the makers' data sheets
WARM_UP = 5
AHEAD = 4  # batches that take turns


def main() -> None:
    arguments = _arguments()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("throughput: no GPU here, nothing measured")
        return
    device = torch.device(arguments.device)
    teacher = with_any_weights(arguments.teacher).to(device, torch.bfloat16 if arguments.precision == "bf16" else None)
    table = _table(arguments, device)
    console = Console(width=150)
    for size in arguments.batches:
        vanilla = None
        for name in TERMS:
            try:
                rate, memory, work = measure(name, arguments, size, teacher, device)
            except torch.OutOfMemoryError:
                table.add_row(name, str(size), "out of memory")
                continue
            vanilla = rate if name == "vanilla" else vanilla
            table.add_row(name, str(size), *_cells(rate, vanilla, memory, work, _peak(device)))
    console.print(table)
    if arguments.profile:
        print(where_time_goes("HASTE", arguments, arguments.batches[0], teacher, device))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="SiT-XL/2", choices=sorted(config.MAPPINGS))
    parser.add_argument("--teacher", default="DINOv2-B", choices=sorted(TEACHERS))
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16"])
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--device", default="cuda")
    return parser.parse_args()


class Loop:
    """Steps of one variant as `haste.train.loop` takes them."""

    def __init__(self, name: str, arguments: argparse.Namespace, size: int, teacher: Teacher, device: torch.device):
        given = {"batch": size, "compile": not arguments.eager}
        self.variant = Variant(name, argparse.Namespace(**{**vars(arguments), **given}), teacher, device)
        self.batches = [self.variant.batch() for _ in range(AHEAD)]
        if not arguments.eager:
            for each in self.variant.teachers.values():
                each.network.compile()

    def run(self, steps: int) -> None:
        """So many steps."""
        one = self.variant
        for step in range(steps):
            batch = self.batches[step % AHEAD]
            with torch.autocast(one.device.type, one.autocast, enabled=one.autocast is not None):
                targets = teacher_targets(one.teachers, one.terms, batch.images)
                found = one.objective(batch, targets)
            total_loss(found, one.terms, step).backward()
            update(one.learner, clip=1.0, ema=0.9999, skip=False)
        if one.device.type == "cuda":
            torch.cuda.synchronize()


def measure(
    name: str, arguments: argparse.Namespace, size: int, teacher: Teacher, device: torch.device
) -> tuple[float, float, float]:
    """Images a second, peak memory in MB by the allocator (NaN on a CPU), and the student's GFLOP an image."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    loop = Loop(name, arguments, size, teacher, device)
    loop.run(WARM_UP)
    started = time.perf_counter()
    loop.run(arguments.steps)
    rate = size * arguments.steps / (time.perf_counter() - started)
    memory = torch.cuda.max_memory_allocated() / 1e6 if device.type == "cuda" else float("nan")
    return rate, memory, gigaflops(Loop(name, _eager(arguments), 1, teacher, device).variant)[1]


def _eager(arguments: argparse.Namespace) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(arguments), "eager": True})


def where_time_goes(name: str, arguments: argparse.Namespace, size: int, teacher: Teacher, device: torch.device) -> str:
    """A table of the kernels that take longest in three steps."""
    loop = Loop(name, arguments, size, teacher, device)
    loop.run(WARM_UP)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as record:
        loop.run(3)
    by = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return record.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=70)


def _peak(device: torch.device) -> float | None:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for chip, peak in PEAKS.items() if chip in name), None)


def _table(arguments: argparse.Namespace, device: torch.device) -> Table:
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    how = "eager" if arguments.eager else "compiled"
    title = (
        f"{arguments.model} + {arguments.teacher}, {arguments.precision}, {how}, {hardware}, torch {torch.__version__}"
    )
    table = Table(title=title)
    for column in ["", "batch", "images/s", "of vanilla", "peak, MB", "student, GFLOP/image", "share of bf16 peak"]:
        table.add_column(column, justify="right")
    return table


def _cells(rate: float, vanilla: float | None, memory: float, work: float, peak: float | None) -> list[str]:
    ratio = f"{rate / vanilla:.3f}" if vanilla else "-"
    share = f"{rate * work * 1e9 / peak:.1%}" if peak else "-"
    return [f"{rate:.1f}", ratio, f"{memory:.0f}", f"{work:.1f}", share]


if __name__ == "__main__":
    main()
