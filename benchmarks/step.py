"""Where the time of a training step goes: vanilla, REPA, HASTE, and HASTE after its stop, interleaved in one process.

    python benchmarks/step.py [--model SiT-B/2] [--teacher DINOv2-B] [--batch 8] [--rounds 5] [--pairs 0]
                              [--precision fp32]

Random weights and images: the time does not depend on them. Ratios within one run are what counts. Every round times
each variant once; the table shows each part's shortest time over the rounds, since on a shared machine noise only adds.
With --pairs, vanilla and HASTE after its stop then take turns, so that slow spells of the machine meet both.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from haste import config
from haste.data.batches import Batch
from haste.diffusion.interpolant import Interpolant
from haste.measure.steps import cpu_peak_megabytes
from haste.models.attention import logsumexp_works
from haste.teachers.encoder import TEACHERS, Teacher, with_any_weights
from haste.train.state import Learner, new_learner, restore, tensors_of
from haste.train.step import Objective, average, teacher_targets, total_loss

PARTS = ["data", "teacher", "forward", "losses", "backward", "optimiser", "average"]
FLOPS = ["teacher, GFLOP/image", "student, GFLOP/image"]
# SiT-S is in no table that is reproduced here.
MODELS = {**config.MODELS, "SiT-S/2": config.Model(depth=12, width=384, heads=6, patch_size=2)}
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def main() -> None:
    arguments = _arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(arguments.threads)
    half = AUTOCAST.get(arguments.precision) if device.type == "cuda" else None  # as in training
    teacher = with_any_weights(arguments.teacher).to(device, half)
    variants = {name: Variant(name, arguments, teacher, device) for name in TERMS}
    for variant in variants.values():
        variant.step()  # warm up
    # As training does at the stop: the same numbers, without projector, taps and teacher.
    restore(variants["HASTE after the stop"].learner, tensors_of(variants["HASTE"].learner), "HASTE")
    times: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    for _ in range(arguments.rounds):
        for name, variant in variants.items():
            times[name].append(variant.step())
    report(times, variants, arguments, device)
    if arguments.pairs:
        compare(variants["vanilla"], variants["HASTE after the stop"], arguments.pairs)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="SiT-B/2", choices=sorted(config.MAPPINGS))
    parser.add_argument("--teacher", default="DINOv2-B", choices=sorted(TEACHERS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=0, help="turns of vanilla and HASTE after the stop")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", default="fp32", choices=["fp32", *AUTOCAST])
    parser.add_argument("--compile", action="store_true")
    return parser.parse_args()


def terms_of(model: str, kinds: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    depth, students, teachers = config.MAPPINGS.get(model, config.MAPPINGS["SiT-B/2"])  # SiT-S has as many blocks
    found: dict[str, dict[str, Any]] = {
        "features": {"teacher": "it", "depth": depth, "weight": 0.5, "hidden": 2048},
        "attention": {
            "teacher": "it",
            "student_layers": students,
            "teacher_layers": teachers,
            "heads": min(config.ALIGNED_HEADS, MODELS[model].heads),
            "weight": 0.5,
        },
    }
    return {kind: found[kind] for kind in kinds}


TERMS: dict[str, tuple[str, ...]] = {
    "vanilla": (),
    "REPA": ("features",),
    "HASTE": ("features", "attention"),
    "HASTE after the stop": (),
}


class Variant:
    """A learner with its objective, and a step of it taken apart."""

    def __init__(self, name: str, arguments: argparse.Namespace, teacher: Teacher, device: torch.device):
        self.device, self.size = device, arguments.batch
        self.autocast = AUTOCAST.get(arguments.precision)
        terms = terms_of(arguments.model, TERMS[name])
        size = MODELS[arguments.model].model_dump()
        training = config.Training(precision=arguments.precision).model_dump()
        recipe = {
            "model": {**size, "input_size": 32, "channels": 4},
            "classes": 1000,
            "seed": 0,
            "training": training,
        }
        self.teachers = {"it": teacher} if terms else {}
        self.terms = terms
        self.learner = self._learner(name, recipe, terms, teacher)
        self.objective = Objective(self.learner, terms, process=Interpolant(), scale=0.18215, shift=0.0)
        model = self.learner.model
        model.own_logsumexp = "attention" in terms and logsumexp_works(str(device), self.autocast, model.head_width)
        if arguments.compile:
            model.compile()

    def _learner(self, name: str, recipe: dict, terms: dict, teacher: Teacher) -> Learner:
        return new_learner(recipe, terms, {"it": teacher.width}, self.device)

    def batch(self, looked_at: bool = False) -> Batch:
        """Random latents of the real shapes, and images only where a teacher looks."""
        shape, seen = (self.size, 4, 32, 32), self.terms or looked_at
        return Batch(
            step=0,
            moments=torch.rand(self.size, 8, 32, 32),
            draw=torch.randn(shape),
            noise=torch.randn(shape),
            t=torch.rand(self.size),
            condition=torch.randint(0, 1000, (self.size,)),
            images=torch.randint(0, 256, (self.size, 256, 256, 3), dtype=torch.uint8) if seen else None,
        ).to(self.device)

    def step(self) -> dict[str, float]:
        """Seconds of each part of one step."""
        spent: dict[str, float] = {}
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            others = torch.cuda.memory_allocated() - sum(value.nbytes for value in held(self))

        def timed(name: str, work: Callable[[], Any]) -> Any:
            started = time.perf_counter()
            result = work()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - started
            return result

        batch = timed("data", self.batch)
        with torch.autocast(self.device.type, self.autocast) if self.autocast else nullcontext():
            targets = timed("teacher", lambda: teacher_targets(self.teachers, self.terms, batch.images))
            found = timed("forward", lambda: self._forward(batch, targets, spent))
        spent["forward"] -= spent.get("losses", 0.0)
        timed("backward", lambda: total_loss(found, self.terms, step=0).backward())
        timed("optimiser", self._optimise)
        timed("average", lambda: average(self.learner, 0.9999))
        if self.device.type == "cuda":
            self.memory = (torch.cuda.max_memory_allocated() - others) / 1e6
        return spent

    def _forward(self, batch: Batch, targets: Any, spent: dict[str, float]) -> dict[str, torch.Tensor]:
        """The objective, with the time inside the two alignment losses (projector not included) on record."""
        from haste.train import step

        kept = step.attention_loss, step.feature_loss

        def watch(loss: Callable[..., Any]) -> Callable[..., Any]:
            def watched(*given: Any, **more: Any) -> Any:
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                started = time.perf_counter()
                result = loss(*given, **more)
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                spent["losses"] = spent.get("losses", 0.0) + time.perf_counter() - started
                return result

            return watched

        step.attention_loss, step.feature_loss = watch(kept[0]), watch(kept[1])
        try:
            return self.objective(batch, targets)
        finally:
            step.attention_loss, step.feature_loss = kept

    def _optimise(self) -> None:
        parameters = list(self.learner.parameters().values())
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        self.learner.optimizer.step()
        self.learner.optimizer.zero_grad(set_to_none=True)

    def peak_memory(self) -> float:
        """MB at the height of a step, by the allocator: weights, averages, moments and teacher included."""
        return self.memory if self.device.type == "cuda" else cpu_peak_megabytes(self.step, held(self))


def held(variant: Variant) -> list[torch.Tensor]:
    """What is in memory between steps."""
    kept = [*variant.learner.model.parameters(), *variant.learner.ema.parameters()]
    kept += variant.learner.projectors.parameters()
    kept += [value for moments in variant.learner.optimizer.state.values() for value in moments.values()]
    return kept + [p for teacher in variant.teachers.values() for p in teacher.network.parameters()]


def gigaflops(variant: Variant) -> tuple[float, float]:
    """GFLOP an image: of the teacher, and of the student with its projector, forward and backward."""
    batch, half = variant.batch(), variant.autocast
    with torch.autocast(variant.device.type, half, enabled=half is not None):
        with FlopCounterMode(display=False) as teacher:
            targets = teacher_targets(variant.teachers, variant.terms, batch.images)
        with FlopCounterMode(display=False) as student:
            total_loss(variant.objective(batch, targets), variant.terms, step=0).backward()
    variant.learner.optimizer.zero_grad(set_to_none=True)
    return teacher.get_total_flops() / variant.size / 1e9, student.get_total_flops() / variant.size / 1e9


def report(
    times: dict[str, list[dict[str, float]]], variants: dict[str, Variant], arguments: Any, device: torch.device
) -> None:
    """The shortest time of each part over the rounds, and each variant's sum of them as a ratio of vanilla's."""
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {arguments.threads} threads"
    title = f"{arguments.model} + {arguments.teacher}, batch {arguments.batch}, {arguments.precision}, {hardware}"
    table = Table(title=title)
    for column in [
        "",
        *(f"{part}, s" for part in PARTS),
        "step, s",
        "step / vanilla",
        "losses / step",
        "peak, MB",
        *FLOPS,
    ]:
        table.add_column(column, justify="right")
    best = {name: {part: min(one.get(part, 0.0) for one in rounds) for part in PARTS} for name, rounds in times.items()}
    totals = {name: sum(parts.values()) for name, parts in best.items()}
    for name, parts in best.items():
        cells = [f"{parts[part]:.3f}" for part in PARTS]
        memory, work = variants[name].peak_memory(), gigaflops(variants[name])
        tail = [f"{memory:.0f}", *(f"{value:.1f}" for value in work)]
        ratio, share = totals[name] / totals["vanilla"], parts["losses"] / totals[name]
        table.add_row(name, *cells, f"{totals[name]:.3f}", f"{ratio:.3f}", f"{share:.1%}", *tail)
    console = Console(width=190)
    console.print(table)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    console.print(f"rounds {arguments.rounds}, torch {torch.__version__}, process peak {peak:.0f} MB")


def compare(one: Variant, other: Variant, pairs: int) -> None:
    """The median, over pairs of neighbouring steps, of the second variant's time as a ratio of the first's.

    The two take turns at going first. Processor time leaves out what the machine gave to others meanwhile.
    """
    wall, processor = [], []
    for pair in range(pairs):
        spent = {}
        for variant in (one, other) if pair % 2 == 0 else (other, one):
            began = time.perf_counter(), time.process_time()
            variant.step()
            spent[variant] = time.perf_counter() - began[0], time.process_time() - began[1]
        wall.append(spent[other][0] / spent[one][0])
        processor.append(spent[other][1] / spent[one][1])
    for name, ratios in {"wall time": wall, "processor time": processor}.items():
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(
            f"HASTE after the stop / vanilla, {pairs} pairs, {name}: {middle:.3f} (quartiles {low:.3f} to {high:.3f})"
        )


if __name__ == "__main__":
    main()
