"""SiT: the diffusion transformer of Peebles and Xie (2023) as a velocity model (Ma et al. 2024), with named taps.

Shapes: B batch, C channels, N tokens, D model width, H heads, K head width (D = H K), p patch size.
Parameter names are those of REPA's checkpoints.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from haste.models.layers import Block, FinalLayer, LabelEmbedding
from haste.models.transformer import Transformer


class SiT(Transformer):
    """Velocity model v(x_t, t, y).

    input_size      height and width of the (latent) image
    in_channels     its channels; the velocity has as many
    classes         number of labels; the null class is one more, `null_class`
    generator       source of the initial weights (see `initialise`); without one, seed 0

    ValueError if the patches do not tile the image or the heads do not divide the width.
    """

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
        sizes = {"patch_size": patch_size, "depth": depth, "width": width, "heads": heads}
        super().__init__(input_size=input_size, in_channels=in_channels, classes=classes, **sizes)
        self.y_embedder = LabelEmbedding(classes, width)
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(width, self.outputs)
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
        self.place()

    def forward(self, x: Tensor, t: Tensor, y: Tensor, taps: Collection[str] = ()) -> tuple[Tensor, dict[str, Any]]:
        """Velocity (B, C, H, W) at x (B, C, H, W), t (B,) in [0, 1] (0 is data), y (B,) int64, and the requested taps.

        taps: "tokens.m"     hidden tokens (B, N, D) after block m, counted from 1
              "attention.i"  `AttentionTap` of block i counted from 0: the q and k that enter K^(-1/2) q k^T, each
                             (B, H, N, K), and with `own_logsumexp` that of these logits, (B, H, N)

        Taps cost nothing unless requested, and do not change the velocity. Labels are never dropped here: to
        train without a label, pass `null_class`. ValueError for a tap that this model does not have.
        """
        self.check(x, t, taps)
        assert y.shape == x.shape[:1], tuple(y.shape)
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
        return self.unpatchify(self.final_layer(tokens, condition)), tapped
