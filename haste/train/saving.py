"""Saving in the background: a copy of the state in the host's memory is written while training goes on.

One save is in flight at a time. A kill during one leaves the save before; whoever needs the file waits for it.

Who ends training finishes the save in flight first, at the disk's full speed, and then writes the last state. Whoever
is killed meanwhile, since nobody knows here how long a grace is, has lost least that way: without the first file all
steps since the save before, without the second those of less than one save.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

log = logging.getLogger("haste.train")


class Background:
    """Writes what it is given, in a thread of its own. Only rank 0 needs one."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._now: Future[None] | None = None
        self._host: dict[str, Tensor] = {}  # kept for the next copy: page-locked memory is slow to get

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors as they are now, in the host's memory; of a GPU's in page-locked memory, at the bus's full speed.
        It waits for the save in flight, whose copies these overwrite.

        Raises:
            OSError: as `settle`.
        """
        self.settle()
        kept, self._host = self._host, {}
        for name, value in tensors.items():
            to = kept.get(name)
            if to is None or to.shape != value.shape or to.dtype != value.dtype:
                to = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
            self._host[name] = to.copy_(value, non_blocking=True)
        if any(value.is_cuda for value in tensors.values()):
            torch.cuda.synchronize()
        return dict(self._host)

    def start(self, write: Callable[[], None]) -> None:
        """Begin to write; `copy` and `settle` wait for it."""
        self._pool = self._pool or ThreadPoolExecutor(1, "saving")
        self._now = self._pool.submit(write)

    def check(self) -> None:
        """Raise what a save that has ended raised, without waiting for one in flight."""
        if self._now is not None and self._now.done():
            self.settle()

    def settle(self) -> None:
        """Wait for the save in flight.

        Raises:
            OSError: it could not be written, such as on a full disk; existing files stay as they were.
        """
        now, self._now = self._now, None
        if now is not None:
            now.result()

    def end(self, tensors: Mapping[str, Tensor], write: Callable[[Mapping[str, Tensor]], None]) -> None:
        """Finish the save in flight, and then write these tensors, which nobody changes any more, from this thread.

        Raises:
            OSError: they could not be written. If the save in flight fails, these may succeed: it is only logged.
        """
        self._finish()
        on_gpu = any(value.is_cuda for value in tensors.values())
        write(self.copy(tensors) if on_gpu and self._host else tensors)  # page-locked memory, if it is there
        self.close()

    def _finish(self) -> None:
        try:
            self.settle()
        except Exception as error:
            log.error("a save failed: %s", error)

    def close(self) -> None:
        """Wait for the save in flight and free the copies. If it fails, that is only logged: a later one follows, or
        what ends training is already on its way."""
        self._finish()
        if self._pool is not None:
            self._pool.shutdown()
        self._pool, self._host = None, {}
