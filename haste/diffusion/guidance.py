"""Classifier-free guidance (Ho and Salimans 2022), on an interval of times (Kynkäänniemi et al. 2024)."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from haste.networks.spec import each

# Times come from grids computed in float64: 0.7 may arrive as 0.7000000000000001 and must still count as the end.
_TIME_ROUNDING = 1e-9


@dataclass(frozen=True)
class Guided:
    """A field of (x, t) that applies guidance on an interval of times; made by `guided`."""

    model_field: Callable[[Tensor, float, Any], Tensor]
    condition: Any
    null: Any
    scale: float
    interval: tuple[float, float]
    channels: int | None = None

    def active(self, t: float) -> bool:
        """Whether an evaluation at time t is guided; the interval includes its ends."""
        low, high = self.interval
        return self.scale > 1.0 and low - _TIME_ROUNDING <= t <= high + _TIME_ROUNDING

    def __call__(self, x: Tensor, t: float) -> Tensor:
        return self._evaluate(x, t, self.active(t))

    def freeze_guidance(self, t: float) -> Callable[[Tensor, float], Tensor]:
        """This field with guidance on or off as at time t, whatever time it is evaluated at."""
        active = self.active(t)
        return lambda x, time: self._evaluate(x, time, active)

    def held(self, t: float) -> Callable[[Tensor, float], Tensor]:
        """The old name of `freeze_guidance`."""
        warnings.warn(
            "velocity.held is velocity.freeze_guidance now; the old name will go", FutureWarning, stacklevel=2
        )
        return self.freeze_guidance(t)

    def row(self, i: int) -> "Guided":
        """This field for only sample i of the batch."""
        condition, null = (each(lambda piece: piece[i : i + 1], told) for told in (self.condition, self.null))
        return replace(self, condition=condition, null=null)

    @property
    def jumps(self) -> tuple[float, ...]:
        """The times between 0 and 1 at which guidance begins or ends."""
        return tuple(t for t in sorted(set(self.interval)) if 0.0 < t < 1.0) if self.scale > 1.0 else ()

    def _evaluate(self, x: Tensor, t: float, active: bool) -> Tensor:
        if not active:
            return self.model_field(x, t, self.condition)
        told = each(lambda own, none: torch.cat([own, none]), self.condition, self.null)
        both = self.model_field(torch.cat([x, x]), t, told).to(x.dtype)  # (2B, ...), in the state's precision
        conditional, unconditional = both.chunk(2)
        out = unconditional + self.scale * (conditional - unconditional)
        if self.channels is None:
            return out
        return torch.cat([out[:, : self.channels], conditional[:, self.channels :]], dim=1)


@dataclass(frozen=True)
class SideBySide:
    """A field of several batches, one behind the other, each guided in its own way. The network sees the rows of each
    by themselves, so that results have the bits that they would have without the others."""

    fields: Sequence[Any]  # `Guided`, or frozen ones
    rows: int  # of each batch

    def __call__(self, x: Tensor, t: float) -> Tensor:
        parts = zip(self.fields, x.split(self.rows), strict=True)
        return torch.cat([field(part, t) for field, part in parts])

    def freeze_guidance(self, t: float) -> "SideBySide":
        """See `haste.diffusion.samplers`."""
        return replace(self, fields=[field.freeze_guidance(t) for field in self.fields])

    def row(self, i: int) -> Guided:
        """See `haste.diffusion.samplers`."""
        return self.fields[i // self.rows].row(i % self.rows)

    @property
    def jumps(self) -> tuple[float, ...]:
        """Those of any of them, for a solver that steps all rows at once."""
        return tuple(sorted({t for field in self.fields for t in field.jumps}))


def guided(
    model_field: Callable[[Tensor, float, Any], Tensor],
    condition: Any,
    null: Any,
    scale: float,
    interval: tuple[float, float] = (0.0, 1.0),
    channels: int | None = None,
) -> Guided:
    """`model_field(x, t, condition)` as a field of (x, t): uncond + scale (cond - uncond) for low <= t <= high.

    A guided evaluation is one call on a doubled batch, conditional first; outside the interval, or with scale <= 1, it
    is one conditional call on the batch itself. x (B, ...), t a float in [0, 1]; `condition` and `null`, the null
    condition, are tensors with B rows, or mappings of such. For an SDE sampler this equals guiding the drift,
    which is affine in the velocity. With `channels`, only that many channels, the first ones, are guided; the others
    are conditional, as in DiT's and SiT's samplers with 3 of 4 latent channels. ValueError for an empty interval.
    """
    low, high = interval
    if low > high:
        raise ValueError(f"guidance interval [{low}, {high}] is empty: the first end must not exceed the second")
    return Guided(model_field, condition, null, scale, (low, high), channels)
