"""Time and memory of CKNNA with its standard error, of random features: of one layer and t, and of a teacher.

python benchmarks/cknna.py [--images 10000] [--width 1152] [--teacher 1536] [--threads 2]
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np
import torch

from haste.align.angle import jackknife
from haste.measure.representations import Neighbours, cknna


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=1152)
    parser.add_argument("--teacher", type=int, default=1536)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    random, started = np.random.default_rng(0), time.perf_counter()
    seen, took = [], []
    for width in (arguments.teacher, arguments.width):
        features = random.standard_normal((arguments.images, width), dtype=np.float32)
        seen.append(Neighbours.of(features, 44))
        took.append(time.perf_counter() - started)
    groups = np.arange(arguments.images) * 8 // arguments.images
    value = cknna(*seen, 10)
    error = jackknife(np.array([cknna(*seen, 10, kept=groups != one) for one in range(8)]))
    took.append(time.perf_counter() - started)
    steps = [after - before for before, after in zip([0.0, *took[:-1]], took, strict=True)]
    print(f"{arguments.images:,} images, widths {arguments.teacher} and {arguments.width}: {value:.4f} ± {error:.4f}")
    print(f"neighbours {steps[0]:.1f} s and {steps[1]:.1f} s, alignment and its error {steps[2]:.1f} s")
    print(f"peak memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")


if __name__ == "__main__":
    main()
