"""Human-readable bytes and seconds."""

from __future__ import annotations

import itertools


def readable(count: float) -> str:
    """Human-readable bytes, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:  # which three digits do not round up
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB" if count < 999.5 else f"{count:,.0f} TB"


_SPANS = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))


def duration(seconds: float) -> str:
    """Seconds in one unit or, below ten of it, two, rounded: 14 d, 3 d 4 h, 1 h 5 min, 12 min, 45 s."""
    for (big, size), (small, part) in itertools.pairwise(_SPANS):
        count = round(seconds / part)
        if count * part >= 10 * size:
            return f"{round(seconds / size):,} {big}"
        if count * part >= size:
            whole, rest = divmod(count, size // part)
            return f"{whole} {big} {rest} {small}" if rest else f"{whole} {big}"
    return f"{max(0, round(seconds))} s"
