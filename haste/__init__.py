"""HASTE: diffusion transformers trained with representation alignment that stops at the right moment."""

__version__ = "0.1.0"
