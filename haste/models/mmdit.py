"""MM-DiT: the transformer of Stable Diffusion 3 (Esser et al. 2024, arXiv 2403.03206), in which text and image attend
to each other, as REPA and HASTE have it: a velocity model without pooled text. With named taps.

Shapes: B batch, C channels, N image tokens, L text tokens, W their width, D model width, H heads, K head width.
Parameter names are those of REPA's and HASTE's checkpoints.
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from haste.config.joint import Joint
from haste.models.layers import AttentionTap, Block, FinalLayer, fill_default
from haste.models.transformer import Transformer


class JointBlock(nn.Module):
    """A block of its own for the text and for the image, with one attention over the tokens of both.

    last        nothing follows the text: it is attended to, and not changed
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, qk_norm: bool, last: bool):
        super().__init__()
        self.context_block = Block(width, heads, mlp_ratio, qk_norm, last)
        self.x_block = Block(width, heads, mlp_ratio, qk_norm)
        self.last = last

    def forward(
        self, text: Tensor, image: Tensor, condition: Tensor, tap: bool = False
    ) -> tuple[Tensor, Tensor, AttentionTap | None]:
        """text (B, L, D), image (B, N, D), condition (B, D) -> text, image, and the image's tap if `tap`."""
        of_text, of_image = self.context_block.attn, self.x_block.attn
        entered, text_rest = self.context_block.enter(text, condition)
        text_q, text_k, text_v = of_text.split(entered)
        entered, rest = self.x_block.enter(image, condition)
        q, k, v = of_image.split(entered)
        pairs = ((text_q, q), (text_k, k), (text_v, v))
        queries, keys, values = (torch.cat(pair, dim=2) for pair in pairs)  # each (B, H, L + N, K), text first
        out = functional.scaled_dot_product_attention(queries, keys, values)
        attended = out.split([text.shape[1], image.shape[1]], dim=2)
        image = self.x_block.leave(image, of_image.merge(attended[1]), rest)
        if not self.last:
            text = self.context_block.leave(text, of_text.merge(attended[0]), text_rest)
        return text, image, AttentionTap(q, k, None) if tap else None


class MMDiT(Joint, Transformer):
    """Velocity model v(x_t, t, y) of an image told by a text's hidden states y.

    input_size      height and width of the (latent) image
    in_channels     its channels; the velocity has as many
    text_width      W
    text_tokens     L; None allows any number
    generator       source of the initial weights (see `initialise`); without one, seed 0

    The blocks are conditioned on the time alone. Text has no positions: in another order it gives the same velocity.
    ValueError if the patches do not tile the image or the heads do not divide the width.
    """

    fill = staticmethod(fill_default)

    def __init__(
        self,
        *,
        input_size: int,
        in_channels: int,
        text_width: int,
        text_tokens: int | None = None,
        depth: int,
        width: int,
        heads: int,
        patch_size: int = 2,
        mlp_ratio: float = 4.0,
        qk_norm: str = "none",
        generator: torch.Generator | None = None,
    ):
        sizes = {"patch_size": patch_size, "depth": depth, "width": width, "heads": heads}
        super().__init__(input_size=input_size, in_channels=in_channels, **sizes)
        self.text_width, self.text_tokens = text_width, text_tokens
        self.context_embedder = nn.Linear(text_width, width)
        blocks = (JointBlock(width, heads, mlp_ratio, qk_norm == "rms", i == depth - 1) for i in range(depth))
        self.joint_blocks = nn.ModuleList(blocks)
        self.final_layer = FinalLayer(width, self.outputs)
        self.initialise(generator or torch.Generator("cpu").manual_seed(0))

    def initialise(self, generator: torch.Generator) -> None:
        """PyTorch's default everywhere, as published: nothing begins at zero. From `generator` alone."""
        super().initialise(generator)
        self.place()

    @property
    def block_list(self) -> Sequence[nn.Module]:
        """Its joint blocks in order."""
        return list(self.joint_blocks)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, taps: Collection[str] = ()) -> tuple[Tensor, dict[str, Any]]:
        """Velocity (B, C, H, W) at x (B, C, H, W), t (B,) in [0, 1] (0 is data), y (B, L, W), and the requested taps.

        taps: "tokens.m"     hidden tokens (B, N, D) of the image after block m, counted from 1
              "attention.i"  `AttentionTap` of block i counted from 0: the image's q and k, each (B, H, N, K). Their
                             logits are a part of the block's, in which the image attends to the text too.

        Taps cost nothing unless requested, and do not change the velocity. ValueError for a tap that it does not have.
        """
        self.check(x, t, taps)
        assert y.shape == (len(x), self.text_tokens or y.shape[1], self.text_width), tuple(y.shape)
        tapped: dict[str, Any] = {}
        image = self.x_embedder(x) + self.pos_embed  # (B, N, D)
        text = self.context_embedder(y.to(self.context_embedder.weight.dtype))  # (B, L, D)
        condition = self.t_embedder(t, self.precise_time)  # (B, D)
        for index, block in enumerate(self.joint_blocks):
            wants_attention = f"attention.{index}" in taps
            text, image, inner = self.through(block, text, image, condition, wants_attention)
            if wants_attention:
                tapped[f"attention.{index}"] = inner
            if f"tokens.{index + 1}" in taps:
                tapped[f"tokens.{index + 1}"] = image
        return self.unpatchify(self.final_layer(image, condition)), tapped
