"""The noise of samples: a function of seed, step and sample alone, so that it can be drawn before it is needed.

B samples, C latent channels, h x w latent cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from haste.data import order


class Noise:
    """Standard normals (B, C, h, w) float32 of some samples; those of the next step are drawn in a thread meanwhile.

    To be used in a `with`, which ends the thread. A GPU is never waited for: it copies from pinned memory.
    """

    def __init__(
        self, seed: int, indices: range, shape: Sequence[int], steps: int, device: torch.device, copies: int = 1
    ):
        """
        Args:
            seed: of the samples.
            indices: which samples.
            shape: (C, h, w).
            steps: of the sampler, which uses at most those of steps 0 .. steps - 2.
            device: where they are needed.
            copies: of the whole, one behind the other: of sets of samples that are drawn side by side. Drawn once.
        """
        self.seed, self.indices, self.shape, self.steps, self.device = seed, indices, tuple(shape), steps, device
        self.copies = copies
        self._ahead: dict[int, Future[Tensor]] = {}

    def __enter__(self) -> Noise:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="noise")
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    @property
    def start(self) -> Tensor:
        """That which sampling starts from, at t = 1."""
        return self._copied(self._drawn("sample start", 0))

    def __call__(self, step: int) -> Tensor:
        """That of a step, counted from 0."""
        found = self._ahead.get(step) or self._thread.submit(self._drawn, "sample noise", step)
        following = range(step + 1, min(step + 2, self.steps - 1))
        self._ahead = {one: self._thread.submit(self._drawn, "sample noise", one) for one in following}
        return self._copied(found.result())

    def _copied(self, drawn: Tensor) -> Tensor:
        """(copies B, C, h, w) on the device."""
        there = drawn.to(self.device, non_blocking=True)
        return torch.cat([there] * self.copies) if self.copies > 1 else there

    def _drawn(self, purpose: str, step: int) -> Tensor:
        drawn = torch.from_numpy(order.normals(self.seed, purpose, step, self.indices, self.shape))
        return drawn.pin_memory() if self.device.type == "cuda" else drawn
