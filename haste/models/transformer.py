"""What the transformers over patches of an image share: SiT, DiT and MM-DiT.

Shapes: B batch, C channels, N tokens, D model width, H heads, p patch size.
"""

from collections.abc import Collection
from typing import ClassVar

import torch
from torch import Tensor

from haste.models.denoiser import Denoiser
from haste.models.layers import PatchEmbedding, TimestepEmbedding, sincos_positions
from haste.networks.spec import sit_taps


class Transformer(Denoiser):
    """Patches of p x p cells become tokens with fixed positions, and all of every block can be tapped.

    ValueError if the patches do not tile the image or the heads do not divide the width.
    """

    can_checkpoint = can_precise_time = True
    predictions: ClassVar[int] = 1  # output channels for each channel of the latents
    pos_embed: Tensor

    def __init__(
        self,
        *,
        input_size: int,
        in_channels: int,
        patch_size: int,
        depth: int,
        width: int,
        heads: int,
        classes: int = 0,
    ):
        super().__init__(input_size=input_size, in_channels=in_channels, classes=classes)
        if input_size % patch_size:
            raise ValueError(f"input_size {input_size} is not a multiple of patch_size {patch_size}")
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of heads {heads}")
        self.patch_size, self.depth, self.width, self.heads = patch_size, depth, width, heads
        self.head_width = width // heads
        self.grid = (input_size // patch_size, input_size // patch_size)
        self.taps = sit_taps(depth, width, heads, self.grid[0])
        self.tokens = self.grid[0] * self.grid[1]
        self.outputs = patch_size * patch_size * self.predictions * in_channels  # numbers of a patch

        self.x_embedder = PatchEmbedding(in_channels, patch_size, width)
        self.t_embedder = TimestepEmbedding(width)
        # A buffer, not a frozen parameter: the key is the same, and no optimiser or parameter count ever meets it.
        self.register_buffer("pos_embed", torch.zeros(1, self.tokens, width))

    def place(self) -> None:
        """Set the positions."""
        self.pos_embed.copy_(sincos_positions(self.width, self.grid))

    def check(self, x: Tensor, t: Tensor, taps: Collection[str]) -> None:
        """Refuse inputs of another shape, and taps that it does not have (ValueError)."""
        for tap in taps:
            if tap not in self.taps:
                raise ValueError(
                    f"no tap {tap!r}: a {type(self).__name__} of {self.depth} blocks has tokens.1 to "
                    f"tokens.{self.depth} and attention.0 to attention.{self.depth - 1}"
                )
        assert x.shape[1:] == (self.in_channels, self.input_size, self.input_size), tuple(x.shape)
        assert t.shape == x.shape[:1], tuple(t.shape)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """(B, N, p p C) -> (B, C, H, W); within a patch the order is rows, columns, channels."""
        rows, columns, p = *self.grid, self.patch_size
        channels = self.predictions * self.in_channels
        patches = patches.view(-1, rows, columns, p, p, channels)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, rows * p, columns * p)
