"""Detectors that look at images, and numbers computed from what they saw."""
