"""A trajectory's journal: the log of training, one JSON object per line. No torch."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, SupportsFloat, TypeVar

from haste.files.units import duration

log = logging.getLogger("haste.train")

Item = TypeVar("Item")
# Entries of a line of the log; all others are losses.
NOT_LOSSES = {"step", "images_per_s", "seconds", "time", "waiting", "memory_mb", "skipped", "grad_norm", "alive"}
ALIVE = 30.0  # seconds after which a line says how far it is, without losses
MOST_SKIPPED = 50  # a loss scale needs about twenty halvings to come down from its initial value


class Journal:
    """The trajectory's journal: one JSON line per `log_every` steps with the means since the previous line.

    Every rank keeps one; only rank 0 has a file.
    """

    def __init__(
        self,
        path: Path | None,
        begin: int,
        end: int,
        batch: int,
        mean: Callable[[list[float]], list[float]] = list,
        may_skip: bool = False,
    ):
        """
        Args:
            path: the file to append to, or None.
            begin: steps done before the first one.
            end: steps done after the last one.
            batch: images per step, over all ranks.
            mean: averages numbers over the ranks.
            may_skip: a step whose `grad_norm` is not finite is counted instead of an error: its update was skipped.
        """
        self.path, self.begin, self.end, self.batch = path, begin, end, batch
        self.mean, self.may_skip = mean, may_skip
        self.waiting: list[Mapping[str, SupportsFloat]] = []
        self.started = self.before = self.said = time.monotonic()
        self.file: IO[bytes] | None = None
        self.skipped = 0  # consecutive skipped steps, as far as lines show
        self.waited = 0.0  # seconds spent waiting for data since the last line
        self.on_record: list[Callable[[dict[str, Any]], None]] = []  # trackers, called with every record

    def __enter__(self) -> Journal:
        if self.path is not None:
            self.file = open(self.path, "a+b", buffering=0)  # a full disk raises at once, naming the file
            if self.file.tell():
                self.file.seek(-1, os.SEEK_END)
                if self.file.read(1) != b"\n":  # a kill in the middle of a line
                    self.file.write(b"\n")
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()

    def add(self, values: Mapping[str, SupportsFloat]) -> None:
        """Add a step's values; they are read from the device only when a line is written or a state saved."""
        self.waiting.append(values)

    def timing(self, feed: Iterable[Item]) -> Iterator[Item]:
        """The items of a feed, recording the time spent waiting for them."""
        items = iter(feed)
        while True:
            started = time.monotonic()
            try:
                item = next(items)
            except StopIteration:
                return
            self.waited += time.monotonic() - started
            yield item

    def alive(self, step: int) -> None:
        """Say how far it is after `step` steps, if nothing was said for ALIVE seconds: lines come by steps, and a step
        may take a minute. Nothing is read from the device for it, and ranks need not agree."""
        now = time.monotonic()
        if self.file is None or not self.waiting or now - self.said < ALIVE:
            return
        self.said, rate = now, len(self.waiting) * self.batch / (now - self.before)
        self._append(self.file, {"step": step, "images_per_s": rate, "time": time.time(), "alive": True})
        self._show(step, {}, rate)

    def check_finite(self, step: int) -> None:
        """Raise FloatingPointError if a value added since the last line is not finite."""
        first = step - len(self.waiting) + 1
        for at, values in enumerate(self.waiting, start=first):
            wrong = [name for name, value in values.items() if not math.isfinite(value)]
            if wrong and not (self.may_skip and "grad_norm" in wrong):
                raise FloatingPointError(
                    f"{' and '.join(wrong)} not finite at step {at}; the last good state is kept. The same command "
                    "goes on from it; where it fails again, lower training.lr, train in bf16 or fp32, or set "
                    "training.nonfinite: skip"
                )

    def write(self, step: int, memory_mb: float) -> None:
        """Write the line of this step and show it, with rate and time to go. All ranks must call it.

        Args:
            step: steps done.
            memory_mb: peak memory of this rank, for the record.
        """
        self.check_finite(step)
        count, names = len(self.waiting), list(self.waiting[0])
        steps = [[float(values[name]) for name in names] for values in self.waiting]
        good = [values for values in steps if all(map(math.isfinite, values))]
        self.skipped = 0 if good else self.skipped + count
        if self.skipped >= MOST_SKIPPED:
            raise FloatingPointError(
                f"the last {self.skipped} steps up to {step} were all skipped, their gradients not finite: "
                "nothing is learnt. The last good state is kept; lower training.lr, or train in bf16 or fp32"
            )
        sums = [sum(column) for column in zip(*good, strict=True)] or [0.0] * len(names)
        *sums, taken = self.mean([*sums, float(len(good))])
        self.waiting.clear()
        now = time.monotonic()
        seconds, self.before, self.said = now - self.before, now, now
        if self.file is None:
            return
        means = {name: total / taken for name, total in zip(names, sums, strict=True)} if taken else {}
        rate = count * self.batch / seconds
        record = {"step": step, **means, "images_per_s": rate, "seconds": seconds, "time": time.time()}
        record |= {"waiting": self.waited / seconds, "memory_mb": memory_mb}
        self.waited = 0.0
        if count > len(good):
            record["skipped"] = count - len(good)
        self._append(self.file, record)
        for track in self.on_record:
            track(record)
        self._show(step, means, rate)

    def _append(self, file: IO[bytes], record: Mapping[str, Any]) -> None:
        line = json.dumps(record).encode() + b"\n"
        try:
            if file.write(line) < len(line):  # a full disk takes what fits; readers skip the torn line
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise OSError(error.errno, os.strerror(error.errno or 0), str(self.path)) from error

    def _show(self, step: int, means: Mapping[str, float], rate: float) -> None:
        to_go = (time.monotonic() - self.started) / (step - self.begin) * (self.end - step)
        shown = "".join(f"  {name} {value:.4f}" for name, value in means.items())
        speed = f"{rate:.{1 if rate < 10 else 0}f} images/s"
        log.info("step %d/%d%s  %s  %s to go", step, self.end, shown, speed, duration(to_go))


def read(path: Path | str, low: int = 0, high: int | None = None, *, alive: bool = False) -> list[dict[str, Any]]:
    """The records of a journal with low < step <= high, in order of steps; the last line of a step counts. With `alive`
    also those that only say how far it was.

    An interrupted stretch is repeated from the last state, so steps can occur twice, and a line can be torn.
    """
    records = {}
    if not Path(path).exists():
        return []
    for line in Path(path).read_bytes().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            continue
        if (alive or "alive" not in record) and low < record["step"] and (high is None or record["step"] <= high):
            records[record["step"]] = record
    return [records[step] for step in sorted(records)]
