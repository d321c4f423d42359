"""How fast latents on disk become batches in one process: SD-VAE's shape, random order, noise and times included.

python benchmarks/data.py [--samples 20000] [--batch 256] [--steps 40] [--threads N]
python benchmarks/data.py --read 5 [--step 185] [--batch 32] [--steps 200]

With --read, every read takes so many milliseconds more, as on a network file system, and the pictures for a teacher are
read too. Steps of --step milliseconds then take the batches, and the table shows what share of their time they wait.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from haste.data.ahead import reading_threads
from haste.data.batches import Batches
from haste.data.condition import Labels
from haste.diffusion.interpolant import Interpolant
from haste.files import store

IMAGES = {"image": ((64, 64, 3), "uint8"), "label": ((), "int64")}  # smaller than 256 x 256: as many reads
LATENTS = {"moments": ((8, 32, 32), "float16"), "label": ((), "int64")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--threads", type=int, help="as runtime.loader_threads")
    parser.add_argument("--read", type=float, help="milliseconds")
    parser.add_argument("--step", type=float, default=185.0, help="milliseconds")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    slow = arguments.read is not None
    size, steps = arguments.batch or (32 if slow else 256), arguments.steps or (200 if slow else 40)
    with tempfile.TemporaryDirectory() as folder:
        images = _store(Path(folder, "images"), "images", arguments.samples, IMAGES, {}) if slow else None
        facts = {"images": images.identity if images else "none"}
        latents = _store(Path(folder, "latents"), "latents", arguments.samples, LATENTS, facts)
        how = {"condition": Labels(classes=1000), "class_dropout": 0.1, "process": Interpolant()}
        batches = Batches(latents, images, seed=0, size=size, **how)
        if slow:
            for threads in [arguments.threads] if arguments.threads else [1, reading_threads(None)]:
                _wait(batches, arguments, steps, threads)
        else:
            _rate(batches, steps, reading_threads(arguments.threads))


def _rate(batches: Batches, steps: int, threads: int) -> None:
    batches(0)
    started = time.perf_counter()
    for _ in batches.ahead(range(steps), readers=threads):
        pass
    rate = steps * batches.size / (time.perf_counter() - started)
    print(f"batches of {batches.size} latents of 8 x 32 x 32 fp16, {threads} reading threads: {rate:,.0f} images/s")


def _wait(batches: Batches, arguments: argparse.Namespace, steps: int, threads: int) -> None:
    """Steps that sleep take batches whose reads sleep; both leave Python to others, as a GPU and a disk do. A batch is
    freed off the clock: of a GPU's the host's memory was freed by the threads that made it."""
    pread = store._pread

    def late(*given: Any) -> None:
        time.sleep(arguments.read / 1e3)
        pread(*given)

    store._pread, waits = late, []
    started, worked = time.perf_counter(), time.process_time()
    feed = batches.ahead(range(steps), readers=threads)
    for _ in range(steps):
        asked = time.perf_counter()
        batch = next(feed)
        waits.append(time.perf_counter() - asked)
        time.sleep(arguments.step / 1e3)
        del batch
    whole, worked, store._pread = time.perf_counter() - started, time.process_time() - worked, pread
    print(
        f"{steps} steps of {arguments.step:g} ms, batches of {batches.size}, {arguments.read:g} ms more a read, "
        f"{threads} reading threads: {sum(waits) / whole:.2%} of the time waiting (for the first batch "
        f"{waits[0]:.2f} s, for the others {sum(waits[1:]) / whole:.2%}: {_spread(waits[1:])}), "
        f"{1e3 * worked / steps:.0f} ms of processor time a step"
    )


def _spread(waits: list[float]) -> str:
    half, most, nearly_all, longest = 1e3 * np.quantile(waits, [0.5, 0.9, 0.99, 1])
    return (
        f"half below {half:.2f} ms, 90 % below {most:.2f} ms, 99 % below {nearly_all:.2f} ms, all to {longest:.1f} ms"
    )


def _store(folder: Path, kind: str, samples: int, fields: dict[str, Any], facts: dict[str, Any]) -> store.Store:
    random = np.random.default_rng(0)
    common = {"kind": kind, "key": "benchmark", "recipe": {}, "shards": 1, "provenance": {}}

    def drawn(count: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        return random.integers(0, 256, (count, *shape)).astype(dtype)

    def batches() -> Iterator[dict[str, np.ndarray]]:
        for low in range(0, samples, 1000):
            count = min(1000, samples - low)
            yield {name: drawn(count, *field) for name, field in fields.items()}

    store.write_shard(folder, **common, shard=0, total=samples, fields=fields, batches=batches(), facts=facts)
    store.join(folder, **common, splits={"train": [0, samples]})
    return store.Store.open(folder)


if __name__ == "__main__":
    main()
