"""HASTE: diffusion transformers trained with representation alignment that stops at the right moment.

`haste.load(FILE).draw(...)` draws from a checkpoint (`haste.sampling.drawing.load`).
"""

import importlib
import sys
from typing import Any

from haste import moved

__version__ = "0.1.0"

sys.meta_path.append(moved.Finder())


def __getattr__(name: str) -> Any:
    if name == "load":  # imported when it is asked for, because torch takes seconds
        return importlib.import_module("haste.sampling.drawing").load
    raise AttributeError(f"module 'haste' has no attribute {name!r}")
