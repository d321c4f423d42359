"""A sign of life in the log of a job that is silent: it may load 100 GB, or take the root of a large matrix."""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import sys
import threading
import time
from collections.abc import Iterator

from haste.files.units import duration

log = logging.getLogger("haste")
QUIET, WAITING = 30.0, 600.0  # seconds without a word, of a process that computes and of one that waits
BUSY = 0.01  # of a core


@contextlib.contextmanager
def beating() -> Iterator[None]:
    """Say in the log that this process is alive, and whether it computes, when nobody wrote to it for a while. Where
    words go to a terminal or a pipe, nothing is said."""
    ended = threading.Event()
    with contextlib.suppress(OSError, ValueError):
        words = sys.stderr.fileno()
        if stat.S_ISREG(os.fstat(words).st_mode):
            threading.Thread(target=_beat, args=(words, ended), name="pulse", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _beat(words: int, ended: threading.Event) -> None:
    began = since = time.monotonic()
    last, used = 0, time.process_time()  # by this machine's clock: that of the log's disk may be another
    while not ended.wait(QUIET / 3):
        now, stamp = time.monotonic(), os.fstat(words).st_mtime_ns
        if stamp != last:
            last, since, used = stamp, now, time.process_time()
        silent, spent = now - since, time.process_time() - used
        if silent >= QUIET and spent >= BUSY * silent:
            log.info("at work for %s, computes for %s of %s", *map(duration, (now - began, spent, silent)))
        elif silent >= WAITING:  # or its ranks compute
            log.info("at work for %s, silent for %s", duration(now - began), duration(silent))
