"""Scores: of the workflow's samples, from features stores (`workflow`), and of images from any source (`images`)."""

from haste import moved

__getattr__ = moved.names(__name__)
