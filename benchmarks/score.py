"""How long scores take from stored features, by metric, beside torch-fidelity and scipy's root on the same features.

    python benchmarks/score.py [--samples 50000] [--real 10000] [--threads 2] [--ours]

Random features of Inception's widths, in features stores on disk: the time does not depend on what they are. Wall and
CPU seconds are shown, for a shared machine stretches the first. `--ours` leaves out torch-fidelity, whose precision and
recall take long.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from haste.files.store import Store, join, write_shard
from haste.metrics.scores import METRICS
from haste.score import workflow

WIDTHS = {"pool": 2048, "spatial": 2023, "logits_unbiased": 1008}
ROWS = 1000
CHECKED = {"fd": "frechet_inception_distance", "kid": "kernel_inception_distance_mean", "is": "inception_score_mean"}
CHECKED |= {"precision": "precision", "recall": "recall"}


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        fake = features(Path(folder, "fake"), arguments.samples, seed=0)
        real = features(Path(folder, "real"), arguments.real, seed=1)
        clock = Clock()
        values = ours(clock, fake, real)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        report(arguments, clock, f"haste: all scores, peak memory {memory:.1f} GiB")
        if not arguments.ours:
            check(values, theirs(beside := Clock(), fake, real))
            report(arguments, beside, "torch-fidelity and scipy on the same features")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--real", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ours", action="store_true", help="leave out torch-fidelity")
    return parser.parse_args()


class Clock:
    """Wall and CPU seconds by what was done."""

    def __init__(self) -> None:
        self.spent: dict[str, tuple[float, float]] = {}

    def __call__(self, name: str, work: Callable[[], Any]) -> Any:
        """Do some work on the record, and return what comes of it."""
        wall, cpu = time.perf_counter(), time.process_time()
        found = work()
        self.spent[name] = (time.perf_counter() - wall, time.process_time() - cpu)
        return found


def features(folder: Path, count: int, seed: int) -> Store:
    """A features store (count rows) that looks like Inception's: 0 or more, with a decaying spectrum."""
    rng = np.random.default_rng(seed)
    scales = {name: np.linspace(1.0, 0.02, width) for name, width in WIDTHS.items()}

    def batches() -> Any:
        for low in range(0, count, ROWS):
            rows = min(ROWS, count - low)
            made = {n: rng.standard_normal((rows, w), np.float32) for n, w in WIDTHS.items()}
            made = {n: (np.abs(x) * scales[n] + 0.1 * seed).astype(np.float32) for n, x in made.items()}
            yield {**made, "label": np.zeros(rows, np.int64)}

    common: dict[str, Any] = {"kind": "features", "key": "k", "recipe": {}, "shards": 1, "provenance": {}}
    fields = {**{name: ((width,), "float32") for name, width in WIDTHS.items()}, "label": ((), "int64")}
    write_shard(folder, shard=0, total=count, fields=fields, batches=batches(), facts={"detector": "d"}, **common)
    join(folder, splits={}, **common)
    return Store.open(folder)


def ours(clock: Clock, fake: Store, real: Store) -> dict[str, float]:
    """All scores as the workflow takes them: what is read and gathered, then each metric."""
    mine = clock("read, gather", lambda: workflow.statistics(fake))
    theirs = clock("read, gather, real", lambda: workflow.reference_statistics(real))
    found: dict[str, float] = {}
    for name, stats in mine.items():
        metric, reference = METRICS[name], theirs.get(name)
        found |= clock(name, lambda metric=metric, stats=stats, reference=reference: metric.value(stats, reference))
    return found


def theirs(clock: Clock, fake: Store, real: Store) -> dict[str, float]:
    """torch-fidelity's functions, and scipy's square root of the product of two covariances, as FID is often taken."""
    from scipy.linalg import sqrtm
    from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc

    pool, logits = (torch.from_numpy(fake.read(n, np.arange(fake.count))) for n in ("pool", "logits_unbiased"))
    other = torch.from_numpy(real.read("pool", np.arange(real.count)))
    # In parts: at once, 50,000 samples take tens of gigabytes.
    quiet: dict[str, Any] = {"verbose": False, "save_cpu_ram": True}

    def sides() -> list[dict[str, np.ndarray]]:
        return [metric_fid.fid_features_to_statistics(x) for x in (pool, other)]

    mine, real_side = clock("moments", sides)
    splits = -(-fake.count // 5000)
    found = clock("frechet", lambda: metric_fid.fid_statistics_to_metric(mine, real_side, verbose=False))
    clock("scipy's square root alone", lambda: sqrtm(mine["sigma"] @ real_side["sigma"]))
    found |= clock("inception_score", lambda: metric_isc.isc_features_to_metric(logits, splits=splits, shuffle=False))
    found |= clock("kid", lambda: metric_kid.kid_features_to_metric(pool, other, kid_subset_size=1000, **quiet))
    found |= clock("precision_recall", lambda: metric_prc.prc_features_to_metric(pool, other, **quiet))
    return found


def check(mine: dict[str, float], other: dict[str, float]) -> None:
    """Both compute the same thing, or their times say nothing."""
    for name, called in CHECKED.items():
        assert np.isclose(mine[name], other[called], rtol=1e-3, atol=1e-4), (name, mine[name], other[called])


def report(arguments: argparse.Namespace, clock: Clock, title: str) -> None:
    """Print the times, and a line that says where they were taken."""
    table = Table(title=title)
    for column in ("part", "wall, s", "CPU, s"):
        table.add_column(column, justify="left" if column == "part" else "right")
    total = tuple(map(sum, zip(*clock.spent.values(), strict=True)))
    for name, (wall, cpu) in [*clock.spent.items(), ("all", total)]:
        table.add_row(name, f"{wall:.1f}", f"{cpu:.1f}", end_section=name == list(clock.spent)[-1])
    console = Console()
    console.print(table)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {arguments.threads} threads"
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    console.print(f"{arguments.samples:,} against {arguments.real:,}; {device}; torch {torch.__version__}; load {load}")


if __name__ == "__main__":
    main()
