"""Progress of a long metric: a line in the log now and then, with an estimate of the time left."""

from __future__ import annotations

import logging
import time

from haste.files.units import duration

log = logging.getLogger("haste.score")
PAUSE = 5.0  # seconds between two lines, at least


class Progress:
    """Work of a known amount, reported as it is done.

    Args:
        what: the work, in words.
        total: its amount, in any unit.
    """

    def __init__(self, what: str, total: float) -> None:
        self.what, self.total, self.done = what, total, 0.0
        self.started = self.shown = time.monotonic()

    def add(self, amount: float) -> None:
        """Add finished work. A line is logged if the last one is PAUSE ago; short work logs nothing."""
        self.done += amount
        now = time.monotonic()
        if now - self.shown >= PAUSE:
            self.shown = now
            left = duration((now - self.started) * (self.total - self.done) / self.done)
            log.info("%s: %.0f %%  %s to go", self.what, 100 * self.done / self.total, left)
