"""Data on disk and its order: stores of images and latents, and randomness as a function of position."""
