"""Scores: of what the workflow draws, from features stores (`workflow`), and of images from anywhere (`images`)."""

from haste.score.images import Scorer, Scores, score_images
from haste.score.workflow import floor, score, statistics, values

__all__ = ["Scorer", "Scores", "floor", "score", "score_images", "statistics", "values"]
