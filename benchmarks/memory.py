"""The memory of a training step: measured without numbers, as `haste memory` does, beside the allocator's record.

    python benchmarks/memory.py [--models SiT-S/2 SiT-B/2] [--batch 8] [--precision fp32] [--without-a-step]

On a GPU the allocator is the GPU's, here the CPU's. --without-a-step measures without numbers alone, as on a GPU, which
that needs none for.
"""

from __future__ import annotations

import argparse
import time

import torch
from rich.console import Console
from rich.table import Table
from step import AUTOCAST, MODELS, TERMS, Variant, terms_of

from haste.plan.memory import Memory, Way
from haste.teachers.encoder import with_any_weights
from haste.train.memory import measured

TEACHER = "DINOv2-B"


def main() -> None:
    arguments = _arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = "cuda" if arguments.without_a_step else device.type
    torch.set_num_threads(2)
    table = Table(title=f"one step, batch {arguments.batch}, {arguments.precision}, as on a {kind}")
    for column in ("", "", "without numbers, MB", "processor s", "allocator, MB", "ratio", "most in 80 GB"):
        table.add_column(column, justify="right")
    half = AUTOCAST.get(arguments.precision) if device.type == "cuda" else None  # as in training
    teacher = with_any_weights(TEACHER).to(device, half)
    for model in arguments.models:
        for name, terms in list(TERMS.items())[:3]:
            started = time.process_time()
            memory = known(model, terms, arguments.precision, kind)
            spent, way = time.process_time() - started, Way(1, 1, False)
            peak = memory.peak(way, arguments.batch)
            cells = [f"{peak:,.0f}", f"{spent:.1f}", "", "", f"{memory.most(way, 80e3)}"]
            if not arguments.without_a_step:
                given = argparse.Namespace(**vars(arguments), model=model, compile=False)
                variant = Variant(name, given, teacher, device)
                variant.step()
                variant.step()
                cells[2:4] = [f"{variant.peak_memory():,.0f}", f"{peak / variant.peak_memory():.3f}"]
            table.add_row(model, name, *cells)
    Console(width=120).print(table)


def known(model: str, kinds: tuple[str, ...], precision: str, device: str) -> Memory:
    """What is known of steps with one batch on the device at a time, as the allocator meets them here."""
    terms = {kind: {**term, "teacher": "0", "cached": False} for kind, term in terms_of(model, kinds).items()}
    recipe = {
        "model": {**MODELS[model].decided, "input_size": 32, "channels": 4},
        "classes": 1000,
        "training": {"precision": precision},
        "resolution": 256,
        "terms": terms,
        "teachers": {"0": {"pretrained": TEACHER, "low_pass": None}} if terms else {},
    }
    found = measured(recipe, device, (4, 12) if device == "cpu" else (32, 128))
    lines = {(kept, checkpointed): (base, each) for kept, checkpointed, base, each in found["lines"]}
    return Memory(found["update_mb"], found["batch_mb"], 0, lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["SiT-S/2", "SiT-B/2"], choices=sorted(MODELS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--without-a-step", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
