"""Images a second on one GPU: whole training steps as training takes them, nothing waited for in between.

    python benchmarks/throughput.py [--model SiT-XL/2] [--teacher DINOv2-B] [--batches 32 64 128 256] [--steps 30]
                                    [--precision bf16] [--eager] [--profile] [--device cuda] [--warm-up 5]

Random weights, latents and images, already on the device (`data.py` measures the feeding). One variant at a time, so
that the memory is its own. The share of the chip's peak counts the student's operations alone. --profile lists where
HASTE's time goes, by kernel.

A second table, of the first batch size, takes one idea at a time out of the loop, and then all of them: the shape of
published training loops. Its ratios are of the same run.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import time
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from step import TERMS, Variant, gigaflops, terms_of
from torch.profiler import ProfilerActivity, profile

from haste import config
from haste.data.batches import Batch
from haste.networks.devices import repeatable
from haste.networks.registry import TEACHERS
from haste.plan.machines import GPUS, gpu_of
from haste.teachers.encoder import Teacher, with_any_weights
from haste.train import step as training
from haste.train.state import Learner

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
    console.print(_ideas(arguments, teacher, device))
    if arguments.profile:
        print(where_time_goes("HASTE", arguments, arguments.batches[0], teacher, device))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="SiT-XL/2", choices=sorted(config.MAPPINGS))
    parser.add_argument("--teacher", default="DINOv2-B", choices=sorted(TEACHERS))
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16"])
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--device", default="cuda")
    return parser.parse_args()


@dataclasses.dataclass(frozen=True)
class Shape:
    """A loop, by what is different from `haste.train.loop`."""

    logits: bool = False  # the attention loss is made of the student's and the teacher's N x N maps
    keeps_teacher: bool = False  # it runs on after the stop
    eager_teacher: bool = False
    reads: bool = False  # each loss at every step
    plain_optimiser: bool = False  # not fused
    plain_average: bool = False  # one parameter after another
    any_kernels: bool = False  # as with runtime.deterministic: false


ALIGNED, STOPPED = "HASTE", "HASTE after the stop"
PEERS = Shape(**{field.name: True for field in dataclasses.fields(Shape)})
IDEAS = [
    ("attention loss without maps", ALIGNED, Shape(logits=True)),
    ("compiled teacher", ALIGNED, Shape(eager_teacher=True)),
    ("losses read when they are logged", ALIGNED, Shape(reads=True)),
    ("fused AdamW", ALIGNED, Shape(plain_optimiser=True)),
    ("average of all parameters at once", ALIGNED, Shape(plain_average=True)),
    ("deterministic kernels (their price)", ALIGNED, Shape(any_kernels=True)),
    ("no teacher after the stop", STOPPED, Shape(keeps_teacher=True)),
    ("all, while aligning", ALIGNED, PEERS),
    ("all, after the stop", STOPPED, PEERS),
]


def loss_of_maps(q_s, k_s, q_t, k_t, heads=None, logsumexp_s=None, weights=None):
    """Cross-entropy of attention maps as it is usually written."""
    q_s, k_s, q_t, k_t = (x[:, :heads].float() for x in (q_s, k_s, q_t, k_t))
    student, teacher = (q @ k.mT * q.shape[-1] ** -0.5 for q, k in ((q_s, k_s), (q_t, k_t)))
    return -(teacher.detach().softmax(-1) * student.log_softmax(-1)).sum(-1).mean()


@torch.no_grad()
def average_one_by_one(learner: Learner, decay: float) -> None:
    """As `haste.train.step.average`."""
    for into, now in zip(learner.ema.parameters(), learner.model.parameters(), strict=True):
        into.lerp_(now, 1.0 - decay)


class Loop:
    """Steps of one variant as `haste.train.loop` takes them, but for what a shape says."""

    def __init__(
        self,
        name: str,
        arguments: argparse.Namespace,
        size: int,
        teacher: Teacher,
        device: torch.device,
        shape: Shape = Shape(),
    ):
        given = {"batch": size, "compile": not arguments.eager}
        self.shape, teacher = shape, copy.copy(teacher)
        self.variant = one = Variant(name, argparse.Namespace(**{**vars(arguments), **given}), teacher, device)
        self.looks = one.terms or (terms_of(arguments.model, TERMS[ALIGNED]) if shape.keeps_teacher else {})
        self.batches = [one.batch(bool(self.looks)) for _ in range(AHEAD)]
        self.teachers = {"it": teacher} if self.looks else {}
        if not arguments.eager and not shape.eager_teacher:
            teacher.compile()
        if shape.logits:
            one.learner.model.own_logsumexp = False
        if shape.plain_optimiser:
            one.learner.optimizer = torch.optim.AdamW(one.learner.parameters().values(), 1e-4, fused=False)

    def run(self, steps: int) -> dict[str, torch.Tensor]:
        """So many steps. Returns the losses of the last."""
        one, found = self.variant, {}
        with contextlib.ExitStack() as stack:
            stack.enter_context(repeatable(one.device, not self.shape.any_kernels))
            if self.shape.logits:
                stack.enter_context(mock.patch.object(training, "attention_loss", loss_of_maps))
            if self.shape.plain_average:
                stack.enter_context(mock.patch.object(training, "average", average_one_by_one))
            for step in range(steps):
                found = self._step(self.batches[step % AHEAD], step)
        if one.device.type == "cuda":
            torch.cuda.synchronize()
        return found

    def _step(self, batch: Batch, step: int) -> dict[str, torch.Tensor]:
        one = self.variant
        with torch.autocast(one.device.type, one.autocast, enabled=one.autocast is not None):
            targets = training.teacher_targets(self.teachers, self.looks, batch.images)
            found = one.objective(batch, targets)
        training.total_loss(found, one.terms, step).backward()
        norm = training.update(one.learner, clip=1.0, ema=0.9999, skip=False)
        if self.shape.reads:
            for value in (*found.values(), norm):
                value.item()
        return found


def measure(
    name: str,
    arguments: argparse.Namespace,
    size: int,
    teacher: Teacher,
    device: torch.device,
    shape: Shape = Shape(),
) -> tuple[float, float, float]:
    """Images a second, peak memory in MB by the allocator (NaN on a CPU), and the student's GFLOP an image."""
    torch.compiler.reset()  # or code that was compiled for other sizes counts towards torch's limit for this one
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    loop = Loop(name, arguments, size, teacher, device, shape)
    loop.run(arguments.warm_up)
    started = time.perf_counter()
    loop.run(arguments.steps)
    rate = size * arguments.steps / (time.perf_counter() - started)
    memory = torch.cuda.max_memory_allocated() / 1e6 if device.type == "cuda" else float("nan")
    return rate, memory, gigaflops(Loop(name, _eager(arguments), 1, teacher, device).variant)[1]


def _ideas(arguments: argparse.Namespace, teacher: Teacher, device: torch.device) -> Table:
    """What the loop gains by each of its ideas: the same steps with and without it."""
    table, size, whole = Table(title=f"with and without, batch {arguments.batches[0]}"), arguments.batches[0], {}
    for column in ["idea", "images/s with", "without", "with / without", "peak with, MB", "without, MB"]:
        table.add_column(column, justify="left" if column == "idea" else "right")
    for idea, name, shape in IDEAS:
        try:
            if name not in whole:
                whole[name] = measure(name, arguments, size, teacher, device)
            (rate, memory, _), (plain, larger, _) = whole[name], measure(name, arguments, size, teacher, device, shape)
        except torch.OutOfMemoryError:
            table.add_row(idea, "out of memory")
            continue
        table.add_row(idea, f"{rate:.1f}", f"{plain:.1f}", f"{rate / plain:.3f}", f"{memory:.0f}", f"{larger:.0f}")
    return table


def _eager(arguments: argparse.Namespace) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(arguments), "eager": True})


def where_time_goes(name: str, arguments: argparse.Namespace, size: int, teacher: Teacher, device: torch.device) -> str:
    """A table of the kernels that take longest in three steps."""
    loop = Loop(name, arguments, size, teacher, device)
    loop.run(arguments.warm_up)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as record:
        loop.run(3)
    by = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return record.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=70)


def _peak(device: torch.device) -> float | None:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return GPUS[known].peak("bf16") if (known := gpu_of(name)) else None


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
