"""A trajectory's journal: what training logged, one JSON line at a time. No torch."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, SupportsFloat

log = logging.getLogger("haste.train")


class Journal:
    """The trajectory's journal: one JSON line per `log_every` steps with the means since the line before."""

    def __init__(self, path: Path, begin: int, end: int, batch: int):
        self.path, self.begin, self.end, self.batch = path, begin, end, batch
        self.waiting: list[Mapping[str, SupportsFloat]] = []
        self.started = self.before = time.monotonic()

    def __enter__(self) -> Journal:
        self.file = open(self.path, "a+b")
        if self.file.tell():
            self.file.seek(-1, os.SEEK_END)
            if self.file.read(1) != b"\n":  # a kill in the middle of a line
                self.file.write(b"\n")
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def add(self, values: Mapping[str, SupportsFloat]) -> None:
        """Take a step's values; they are looked at only when a line is written."""
        self.waiting.append(values)

    def check_finite(self, step: int) -> None:
        """Raise FloatingPointError if a value since the last line is not finite."""
        first = step - len(self.waiting) + 1
        for at, values in enumerate(self.waiting, start=first):
            wrong = [name for name, value in values.items() if not math.isfinite(value)]
            if wrong:
                raise FloatingPointError(
                    f"{self.path.parent.name}: {' and '.join(wrong)} not finite at step {at}; "
                    "the last good state is kept, and the same command goes on from it"
                )

    def write(self, step: int) -> None:
        """Write the line of this step and show it, with rate and time to go."""
        self.check_finite(step)
        now, count = time.monotonic(), len(self.waiting)
        means = {n: sum(float(values[n]) for values in self.waiting) / count for n in self.waiting[0]}
        seconds, self.before = now - self.before, now
        record = {
            "step": step,
            **means,
            "images_per_s": count * self.batch / seconds,
            "seconds": seconds,
            "time": time.time(),
        }
        self.file.write(json.dumps(record).encode() + b"\n")
        self.file.flush()
        self.waiting.clear()
        to_go = (now - self.started) / (step - self.begin) * (self.end - step)
        shown = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
        log.info("step %d/%d  %s  %.0f images/s  %s to go", step, self.end, shown, record["images_per_s"], clock(to_go))


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


def read(path: Path | str, low: int = 0, high: int | None = None) -> list[dict[str, Any]]:
    """The records of a journal with low < step <= high, in order of steps; the last line of a step counts.

    A stretch that was interrupted is repeated from the state before, so steps can come twice, and a line can be torn.
    """
    records = {}
    if not Path(path).exists():
        return []
    for line in Path(path).read_bytes().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if low < record["step"] and (high is None or record["step"] <= high):
            records[record["step"]] = record
    return [records[step] for step in sorted(records)]
