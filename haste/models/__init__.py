"""Denoising networks and the projector heads that are trained beside them."""

from haste.models.heads import Projector
from haste.models.sit import SiT

__all__ = ["Projector", "SiT"]
