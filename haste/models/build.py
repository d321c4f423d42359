"""From a recipe to its network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from haste.config import architecture_named, model_in, shape_in
from haste.models.denoiser import Denoiser


def build_model(recipe: Mapping[str, Any]) -> Denoiser:
    """The model of a trajectory's recipe, its parameters not yet initialised to anything in particular."""
    model = model_in(recipe)
    return architecture_named(model.architecture)(**shape_in(recipe), **model.settings)
