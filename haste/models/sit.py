"""SiT: the diffusion transformer of Peebles and Xie (2023) as a velocity model (Ma et al. 2024), with named taps.

Shapes: B batch, C channels, N tokens, D model width, H heads, K head width (D = H K), p patch size.
Parameter names are those of REPA's checkpoints.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from haste.models.denoiser import Denoiser
from haste.models.layers import Block, FinalLayer, LabelEmbedding, PatchEmbedding, TimestepEmbedding, sincos_positions
from haste.networks.spec import sit_taps


class SiT(Denoiser):
    """Velocity model v(x_t, t, y).

    input_size      height and width of the (latent) image
    in_channels     its channels; the velocity has as many
    classes         number of labels; the null class is one more, `null_class`
    generator       source of the initial weights (see `initialise`); without one, seed 0

    ValueError if the patches do not tile the image or the heads do not divide the width.
    """

    can_checkpoint = can_precise_time = True
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
        classes: int,
        mlp_ratio: float = 4.0,
        generator: torch.Generator | None = None,
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

        self.x_embedder = PatchEmbedding(in_channels, patch_size, width)
        self.t_embedder = TimestepEmbedding(width)
        self.y_embedder = LabelEmbedding(classes, width)
        # A buffer, not a frozen parameter: the key is the same, and no optimiser or parameter count ever meets it.
        self.register_buffer("pos_embed", torch.zeros(1, self.tokens, width))
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(width, patch_size * patch_size * in_channels)
        self.initialise(generator or torch.Generator("cpu").manual_seed(0))

    def initialise(self, generator: torch.Generator) -> None:
        """The published initialisation (DiT), from `generator` alone.

        Zero modulations and output, N(0, 0.02^2) label table and timestep MLP, Xavier-uniform elsewhere, zero biases.
        It does not use the global random state, so anything built beside the model does not affect its weights.
        """
        self.x_embedder.initialise(generator)
        self.t_embedder.initialise(generator)
        self.y_embedder.initialise(generator)
        for block in self.blocks:
            assert isinstance(block, Block)
            block.initialise(generator)
        self.final_layer.initialise()
        self.pos_embed.copy_(sincos_positions(self.width, self.grid))

    def forward(self, x: Tensor, t: Tensor, y: Tensor, taps: Collection[str] = ()) -> tuple[Tensor, dict[str, Any]]:
        """Velocity (B, C, H, W) at x (B, C, H, W), t (B,) in [0, 1] (0 is data), y (B,) int64, and the requested taps.

        taps: "tokens.m"     hidden tokens (B, N, D) after block m, counted from 1
              "attention.i"  `AttentionTap` of block i counted from 0: the q and k that enter K^(-1/2) q k^T, each
                             (B, H, N, K), and with `own_logsumexp` that of these logits, (B, H, N)

        Taps cost nothing unless requested, and do not change the velocity. Labels are never dropped here: to
        train without a label, pass `null_class`. ValueError for a tap that this model does not have.
        """
        self._check_taps(taps)
        assert x.shape[1:] == (self.in_channels, self.input_size, self.input_size), tuple(x.shape)
        assert t.shape == y.shape == x.shape[:1], (tuple(t.shape), tuple(y.shape))
        tapped: dict[str, Any] = {}
        tokens = self.x_embedder(x) + self.pos_embed  # (B, N, D)
        condition = self.t_embedder(t, self.precise_time) + self.y_embedder(y)  # (B, D)
        for index, block in enumerate(self.blocks):
            wants_attention = f"attention.{index}" in taps
            tokens, inner = self.through(block, tokens, condition, wants_attention, self.own_logsumexp)
            if wants_attention:
                tapped[f"attention.{index}"] = inner
            if f"tokens.{index + 1}" in taps:
                tapped[f"tokens.{index + 1}"] = tokens
        return self._unpatchify(self.final_layer(tokens, condition)), tapped

    def _check_taps(self, taps: Collection[str]) -> None:
        for tap in taps:
            if tap not in self.taps:
                raise ValueError(
                    f"no tap {tap!r}: a SiT of {self.depth} blocks has tokens.1 to tokens.{self.depth} "
                    f"and attention.0 to attention.{self.depth - 1}"
                )

    def _unpatchify(self, patches: Tensor) -> Tensor:
        """(B, N, p p C) -> (B, C, H, W); within a patch the order is rows, columns, channels."""
        rows, columns, p = *self.grid, self.patch_size
        patches = patches.view(-1, rows, columns, p, p, self.in_channels)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.in_channels, rows * p, columns * p)
