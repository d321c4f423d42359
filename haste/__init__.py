"""HASTE: diffusion transformers trained with representation alignment that stops at the right moment."""

import sys

from haste import moved

__version__ = "0.1.0"

sys.meta_path.append(moved.Finder())
