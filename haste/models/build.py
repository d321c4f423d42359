"""From a recipe to its network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from haste.config import architecture_named, condition_in, model_in
from haste.models.denoiser import Denoiser


def build_model(recipe: Mapping[str, Any]) -> Denoiser:
    """The model of a trajectory's recipe, with its parameters not yet initialised."""
    model, size = model_in(recipe), recipe["model"]
    shape = {"input_size": size["input_size"], "in_channels": size["channels"], **condition_in(recipe).arguments}
    return architecture_named(model.architecture)(**shape, **model.settings)
