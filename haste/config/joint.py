"""What is known of an MM-DiT before it is built: its keys and their defaults, the published model's; taps and cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import model_validator

from haste.config.keys import Positive, Rate, Strict
from haste.networks import joint
from haste.networks.spec import Facts

DEPTH, HEAD_WIDTH = 24, 32  # as published: as many heads as blocks


class JointSettings(Strict):
    """The keys of `models.NAME`; width and heads follow from the depth, if they are not given."""

    depth: Positive = DEPTH
    width: Positive = HEAD_WIDTH * DEPTH
    heads: Positive = DEPTH
    patch_size: Positive = 2
    mlp_ratio: Rate = 4.0
    qk_norm: Literal["none", "rms"] = "none"

    @model_validator(mode="before")
    @classmethod
    def _by_depth(cls, given: dict[str, Any]) -> dict[str, Any]:
        depth = given.get("depth", DEPTH)
        sizes = {"width": HEAD_WIDTH * depth, "heads": depth} if isinstance(depth, int) else {}
        return {**sizes, **given}

    @model_validator(mode="after")
    def _divides(self) -> JointSettings:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}")
        if self.width % 4:
            raise ValueError(f"width {self.width} is not divisible by 4, which the position embedding needs")
        return self


class Joint:
    """The base of `haste.models.mmdit.MMDiT`: that part of a `haste.models.denoiser.Denoiser` that needs no torch."""

    Settings: ClassVar[Any] = JointSettings
    process: ClassVar[str] = "interpolant"
    condition: ClassVar[str] = "captions"
    can_checkpoint: ClassVar[bool] = True
    can_precise_time: ClassVar[bool] = True

    @classmethod
    def facts(
        cls, settings: Mapping[str, Any], *, process: Any, condition: Any, input_size: int, in_channels: int
    ) -> Facts:
        """See `Denoiser`: by formulas, nothing is built, and the process is not asked.

        Raises:
            ValueError: patches that do not tile the latents.
        """
        if input_size % settings["patch_size"]:
            raise ValueError(f"input_size {input_size} is not a multiple of patch_size {settings['patch_size']}")
        size = {**settings, **condition.arguments, "input_size": input_size, "in_channels": in_channels}
        return joint.facts(size)
