"""Denoising networks and the projector heads that are trained beside them."""

from haste.models.denoiser import Denoiser
from haste.models.heads import Projector
from haste.models.layers import AttentionTap
from haste.models.sit import SiT
from haste.network import Tap

__all__ = ["AttentionTap", "Denoiser", "Projector", "SiT", "Tap"]
