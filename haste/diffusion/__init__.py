"""Noise paths, samplers as plain functions of a velocity, and classifier-free guidance."""
