"""Denoising networks and the projector heads that are trained beside them."""

from haste import moved

__getattr__ = moved.names(__name__)
