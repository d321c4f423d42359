"""Detectors, which extract features from images, and metrics computed from these features."""
