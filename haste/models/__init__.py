"""Denoising networks and the projectors that are trained with them."""

from haste import moved

__getattr__ = moved.names(__name__)
