"""Scores of images: those that the workflow draws, from their features stores."""

from haste.score.workflow import floor, score, statistics, values

__all__ = ["floor", "score", "statistics", "values"]
