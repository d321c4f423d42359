"""How fast latents on disk become batches in one process: SD-VAE's shape, random order, noise and times included.

python benchmarks/data.py [--samples 20000] [--batch 256] [--steps 40]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from haste.data.batches import Batches
from haste.data.condition import Labels
from haste.diffusion.interpolant import Interpolant
from haste.files.store import Store, join, write_shard


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        batches = Batches(
            _store(Path(folder), arguments.samples),
            None,
            seed=0,
            size=arguments.batch,
            condition=Labels(classes=1000),
            class_dropout=0.1,
            process=Interpolant(),
        )
        batches(0)
        started = time.perf_counter()
        for _ in batches.ahead(range(arguments.steps)):
            pass
        rate = arguments.steps * arguments.batch / (time.perf_counter() - started)
    print(f"batches of {arguments.batch} from {arguments.samples} latents of 8 x 32 x 32 fp16: {rate:,.0f} images/s")


def _store(folder: Path, samples: int) -> Store:
    random = np.random.default_rng(0)
    common = {"kind": "latents", "key": "benchmark", "recipe": {}, "shards": 1, "provenance": {}}

    def batches():
        for low in range(0, samples, 1000):
            count = min(1000, samples - low)
            moments = random.random((count, 8, 32, 32), dtype=np.float32).astype(np.float16)
            yield {"moments": moments, "label": random.integers(0, 1000, count)}

    fields = {"moments": ((8, 32, 32), "float16"), "label": ((), "int64")}
    write_shard(folder, **common, shard=0, total=samples, fields=fields, batches=batches())
    join(folder, **common, splits={"train": [0, samples]})
    return Store.open(folder)


if __name__ == "__main__":
    main()
