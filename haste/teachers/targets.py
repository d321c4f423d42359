"""What a teacher says of images, wherever it comes from: asked now, or read from disk."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TeacherTargets:
    """What a student is aligned with.

    features: (B, N, D), or None if not asked for; attention: layer -> (queries, keys), each (B, H, N, K) as they enter
    the scaled dot product (after their normalisation if there is one, before the scale); grid: (h, w), h x w = N.
    """

    features: Tensor | None
    attention: dict[int, tuple[Tensor, Tensor]]
    grid: tuple[int, int]
