"""How far long work is: a line in the log every few seconds, with an estimate of the time left."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection, Iterator
from typing import TypeVar

from haste.files.units import duration

Item = TypeVar("Item")

log = logging.getLogger("haste")
PAUSE = 10.0  # seconds between two lines, at least


class Progress:
    """Work of a known amount, reported as it is done. Thread-safe.

    Args:
        what: the work, in words.
        total: its amount.
        unit: of the amount, in the plural, which also has a line at its end; without one a share is shown, and work of
            a moment says nothing.
    """

    def __init__(self, what: str, total: float, unit: str = "images") -> None:
        self.what, self.total, self.unit = what, total, unit
        self.done = self.kept = 0.0
        self.began = self.shown = time.monotonic()
        self._lock = threading.Lock()

    def add(self, amount: float, *, new: bool = True) -> None:
        """Count finished work; what was there before, not `new`, tells nothing of the rate."""
        with self._lock:
            self.done += amount
            self.kept += 0 if new else amount
            self._say(self.done, at_once=bool(self.unit) and self.done == self.total)

    def partly(self, amount: float) -> None:
        """Report work that is begun and will be added as a whole."""
        with self._lock:
            self._say(self.done + amount)

    def _say(self, done: float, at_once: bool = False) -> None:
        now = time.monotonic()
        if not at_once and now - self.shown < PAUSE:
            return
        self.shown = now
        rate = (done - self.kept) / max(now - self.began, 1e-9)
        to_go = duration((self.total - done) / rate) if rate else "?"
        kept = f" ({self.kept:.0f} kept from before)" if self.kept else ""
        words = f"{done:.0f}/{self.total:.0f} {self.unit}{kept}  {rate:.1f} {self.unit}/s"
        log.info("%s: %s  %s to go", self.what, words if self.unit else f"{100 * done / self.total:.0f} %", to_go)


def followed(what: str, items: Collection[Item]) -> Iterator[Item]:
    """The items, one after another, with the share that is done, if that takes a while."""
    watch = Progress(what, len(items), unit="")
    for item in items:
        yield item
        watch.add(1)
