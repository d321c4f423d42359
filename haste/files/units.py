"""Human-readable bytes and seconds."""

from __future__ import annotations


def readable(count: float) -> str:
    """Human-readable bytes, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
