"""Scores: of what the workflow draws, from features stores (`workflow`), and of images from anywhere (`images`)."""

from haste import moved

__getattr__ = moved.names(__name__)
