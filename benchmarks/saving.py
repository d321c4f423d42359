"""How long training waits for a save on a slow disk, and who is told to end until the last state is there.

python benchmarks/saving.py [--parameters 130e6] [--disk 100] [--saves 3]

The disk is this machine's, slowed down to so many MB/s after each write. Two ways take turns in one run: each save
waits until the state is on disk, or it is written in the background. In the middle of one in the background training is
told to end: that save is finished, and then the last state is written.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from haste.files import tensors as files
from haste.train import saving


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=130e6, help="of the network (SiT-B/2)")
    parser.add_argument("--disk", type=float, default=100.0, help="MB/s")
    parser.add_argument("--saves", type=int, default=3)
    arguments = parser.parse_args()
    # Weights, their average and two moments of AdamW.
    state = {f"{name}/{i}": torch.randn(int(arguments.parameters / 16)) for name in "abcd" for i in range(16)}
    size = sum(value.nbytes for value in state.values()) / 1e6
    waits: dict[str, list[float]] = {"waiting": [], "in the background": [], "the copy alone": []}
    waits |= {"told to end in its middle, until it is whole": [], "and until the last state is": []}
    whole: list[float] = []
    with tempfile.TemporaryDirectory() as folder:

        def write(tensors: Mapping[str, torch.Tensor]) -> None:
            started = time.perf_counter()
            files.write(Path(folder) / "state", tensors, {})
            time.sleep(max(0.0, size / arguments.disk - (time.perf_counter() - started)))
            whole.append(time.perf_counter())

        for _ in range(arguments.saves):
            started = time.perf_counter()
            write(state)
            waits["waiting"].append(time.perf_counter() - started)
            background = saving.Background()
            background.copy(state)  # as in every save but the first, memory for the copy is there
            started = time.perf_counter()
            tensors = background.copy(state)
            waits["the copy alone"].append(time.perf_counter() - started)
            background.start(partial(write, tensors))
            waits["in the background"].append(time.perf_counter() - started)
            time.sleep(waits["waiting"][-1] / 2)
            started = time.perf_counter()
            background.end(state, write)
            waits["told to end in its middle, until it is whole"].append(whole[-2] - started)
            waits["and until the last state is"].append(whole[-1] - started)
    print(f"{size:,.0f} MB, a disk of {arguments.disk:g} MB/s, {arguments.saves} saves")
    once = sum(waits["waiting"])
    for name, found in waits.items():
        print(f"{name:>45}: {min(found):.2f} to {max(found):.2f} s, {sum(found) / once:.2f} of one that waits")


if __name__ == "__main__":
    main()
