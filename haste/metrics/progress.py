"""How far a long metric is: a line of the log every now and then, with an estimate, which also reads well in a file."""

from __future__ import annotations

import logging
import time

log = logging.getLogger("haste.score")
PAUSE = 5.0  # seconds between two lines, at least


class Progress:
    """Work of a known amount, reported as it is done.

    Args:
        what: what is done, in words.
        total: how much there is, in any unit.
    """

    def __init__(self, what: str, total: float) -> None:
        self.what, self.total, self.done = what, total, 0.0
        self.started = self.shown = time.monotonic()

    def add(self, amount: float) -> None:
        """So much more is done. A line is logged if the last one is some time ago; work of a moment logs nothing."""
        self.done += amount
        now = time.monotonic()
        if now - self.shown >= PAUSE:
            self.shown = now
            left = round((now - self.started) * (self.total - self.done) / self.done)
            clock = f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
            log.info("%s: %.0f %%  %s to go", self.what, 100 * self.done / self.total, clock)
