"""Filters of the images that a teacher sees."""

import torch
from torch import Tensor


def low_pass(images: Tensor, radius: float) -> Tensor:
    """Images with the spatial frequencies up to a radius, all directions alike; the others are removed.

    radius: share of the Nyquist frequency, in (0, 1]; radius S / 2 is then the largest number of cycles along a side of
    S pixels. Frequencies beyond the circle of radius 1, which only diagonal waves have, are always removed.

    HASTE feeds a teacher with low frequencies alone (arXiv 2505.16792, Figure 5) without naming a unit: this one is our
    choice. The image's mean stays. Values are not clamped: at edges they may leave the range of the image a little. The
    filter is linear and keeps constants, so that it does not matter whether images are normalised before or after it.

    (..., rows, columns) floating point, same shape and dtype. A real signal's spectrum is symmetric: half of it is
    computed, and the result is real.
    """
    rows, columns = images.shape[-2:]
    where = {"dtype": torch.float64, "device": images.device}
    y, x = 2 * torch.fft.fftfreq(rows, **where), 2 * torch.fft.rfftfreq(columns, **where)
    within = torch.hypot(y[:, None], x) <= radius * (1 + 1e-9)  # 0.29 is a little below 29 cycles of 100
    return torch.fft.irfft2(torch.fft.rfft2(images) * within, s=(rows, columns))
