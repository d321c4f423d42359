"""DiT: the diffusion transformer of Peebles and Xie (2023, arXiv 2212.09748) as it was published, with named taps."""

from __future__ import annotations

from typing import ClassVar

from haste.models.sit import SiT


class DiT(SiT):
    """Predicts the noise of x_k at step k, and channels that interpolate its variance (`haste.diffusion.ddpm.DDPM`).

    The transformer is SiT's, with 2C output channels and the step, 0 .. 999, as time: the names of parameters, their
    initialisation and the taps are the same.
    """

    process: ClassVar[str] = "ddpm"
    predictions: ClassVar[int] = 2
