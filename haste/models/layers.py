"""Layers of the diffusion transformers, each with its published initialisation.

Shapes: B batch, C channels, N tokens, D model width, H heads, K head width (D = H K).

Every layer with parameters has `initialise(generator)`. Numbers are drawn on the generator's device in float32 and
then copied, so that one seed gives the same model on every device and in every precision.
"""

import math
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from haste.models.attention import attention_with_logsumexp

NORM_EPS = 1e-6


def fill_xavier(layer: nn.Linear | nn.Conv2d, generator: torch.Generator) -> None:
    """Xavier-uniform weight, zero bias (Glorot and Bengio 2010, Eq. 16).

    A convolution counts as a linear map of its patch.
    """
    fan_out, fan_in = layer.weight.flatten(1).shape
    bound = math.sqrt(6.0 / (fan_in + fan_out))
    if not layer.weight.is_meta:
        drawn = torch.empty(layer.weight.shape, device=generator.device, dtype=torch.float32)
        _copy(layer.weight, drawn.uniform_(-bound, bound, generator=generator))
    fill_zero(layer.bias)


def fill_default(layer: nn.Linear | nn.Conv2d, generator: torch.Generator) -> None:
    """PyTorch's own initialisation: weight and bias uniform within 1 / sqrt(fan in)."""
    bound = layer.weight[0].numel() ** -0.5
    for tensor in (layer.weight, layer.bias):
        if tensor is not None and not tensor.is_meta:
            drawn = torch.empty(tensor.shape, device=generator.device, dtype=torch.float32)
            _copy(tensor, drawn.uniform_(-bound, bound, generator=generator))


def fill_normal(weight: Tensor, std: float, generator: torch.Generator) -> None:
    """N(0, std^2) in place."""
    if not weight.is_meta:
        drawn = torch.empty(weight.shape, device=generator.device, dtype=torch.float32)
        _copy(weight, drawn.normal_(0.0, std, generator=generator))


def fill_zero(*tensors: Tensor | None) -> None:
    """Zeros in place; a layer without a bias passes None."""
    with torch.no_grad():
        for tensor in tensors:
            if tensor is not None:
                tensor.zero_()


def _copy(weight: Tensor, values: Tensor) -> None:
    with torch.no_grad():
        weight.copy_(values)


def sincos_positions(width: int, grid: tuple[int, int]) -> Tensor:
    """Fixed 2-D positions, (N, D) float32, N = rows * columns counted row by row.

    The first half of the channels encodes the column x, the second half the row y; in each, the sines of x w_i come
    before the cosines, with w_i = 10000^(-i / (D / 4)) ("Attention Is All You Need", section 3.5, in two dimensions as
    in MAE and DiT). Computed in float64. ValueError if `width` is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"position embedding of width {width}: a multiple of 4 is needed (sin and cos of x and of y)")
    rows, columns = grid
    frequency = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = [place.reshape(-1, 1) * frequency for place in (x, y)]  # 2 of (N, D/4)
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1).float()


def timestep_features(t: Tensor, features: int = 256) -> Tensor:
    """t (B,) -> (B, features): [cos(t w_i) | sin(t w_i)] with w_i = 10000^(-i / (features / 2)).

    `t` is not rescaled: it is in [0, 1] for SiT, 0..999 for DiT. The result has t's precision, at least float32.
    """
    half = features // 2
    t = t.to(torch.promote_types(t.dtype, torch.float32))
    frequency = 10000.0 ** (-torch.arange(half, device=t.device, dtype=t.dtype) / half)
    angle = t[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class PatchEmbedding(nn.Module):
    """(B, C, H, W) -> (B, N, D): one linear map of every patch, patches row by row."""

    def __init__(self, channels: int, patch_size: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch_size, stride=patch_size)

    def initialise(self, generator: torch.Generator) -> None:
        fill_xavier(self.proj, generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)  # (B, D, rows, columns) -> (B, N, D)


class TimestepEmbedding(nn.Module):
    """t (B,) -> (B, D)."""

    def __init__(self, width: int, features: int = 256):
        super().__init__()
        self.features = features
        self.mlp = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width))

    def initialise(self, generator: torch.Generator) -> None:
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                fill_normal(layer.weight, 0.02, generator)
                fill_zero(layer.bias)

    def forward(self, t: Tensor, precise: bool = False) -> Tensor:
        """With `precise` it leaves autocast: bf16 would round the features of t in [0, 1] to steps of 0.004 near 1."""
        dtype = next(self.mlp.parameters()).dtype
        with torch.autocast(t.device.type, enabled=False) if precise else nullcontext():
            return self.mlp(timestep_features(t, self.features).to(dtype))


class LabelEmbedding(nn.Module):
    """y (B,) int64 in 0..classes -> (B, D). Row `classes` is the null class of classifier-free guidance."""

    def __init__(self, classes: int, width: int):
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)

    def initialise(self, generator: torch.Generator) -> None:
        fill_normal(self.embedding_table.weight, 0.02, generator)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class AttentionTap(NamedTuple):
    """q and k, each (B, H, N, K), as in the logits K^(-1/2) q k^T, and logsumexp of these over keys, (B, H, N).

    `logsumexp` is None if the attention does not compute it.
    """

    q: Tensor
    k: Tensor
    logsumexp: Tensor | None


class HeadNorm(nn.RMSNorm):
    """(B, H, N, K) -> the same; in the precision of its scale also under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention with a fused kernel.

    qk_norm     normalise queries and keys over the width of a head (RMS, with a learnt scale)
    last        nothing follows the attention: there is no `proj`
    """

    def __init__(self, width: int, heads: int, qk_norm: bool = False, last: bool = False):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        if not last:
            self.proj = nn.Linear(width, width)
        if qk_norm:
            self.ln_q, self.ln_k = (HeadNorm(width // heads, eps=NORM_EPS) for _ in "qk")
        self.qk_norm = qk_norm

    def initialise(self, generator: torch.Generator) -> None:
        fill_xavier(self.qkv, generator)
        fill_xavier(self.proj, generator)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, N, D) -> q, k and v, each (B, H, N, K)."""
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1))  # (B, N, 3, H, K)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return (self.ln_q(q), self.ln_k(k), v) if self.qk_norm else (q, k, v)

    def merge(self, attended: Tensor) -> Tensor:
        """(B, H, N, K) -> (B, N, D)."""
        return self.proj(attended.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, with_logsumexp: bool = False) -> tuple[Tensor, AttentionTap]:
        """x (B, N, D) -> (B, N, D), and the tap; with the logits' logsumexp only if requested."""
        q, k, v = self.split(x)
        logsumexp = None
        if with_logsumexp:
            out, logsumexp = attention_with_logsumexp(q, k, v)
        else:
            out = functional.scaled_dot_product_attention(q, k, v)
        return self.merge(out), AttentionTap(q, k, logsumexp)


class Mlp(nn.Module):
    """Two linear layers with the tanh form of GELU between."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def initialise(self, generator: torch.Generator) -> None:
        fill_xavier(self.fc1, generator)
        fill_xavier(self.fc2, generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(x), approximate="tanh"))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, N, D), shift and scale (B, D) -> (B, N, D)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Modulation(nn.Sequential):
    """Condition (B, D) -> (B, parts D), zero at the start of training (adaLN-Zero, DiT section 3.2)."""

    def __init__(self, width: int, parts: int):
        super().__init__(nn.SiLU(), nn.Linear(width, parts * width))
        self.parts = parts

    def zero(self) -> None:
        fill_zero(*self.parameters())

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        return super().forward(input).chunk(self.parts, dim=1)


class Block(nn.Module):
    """Transformer block whose norms and residuals are scaled by the condition; the identity once `initialise`d.

    qk_norm     as for `Attention`
    last        its tokens are attended to, and end here: no `proj`, no MLP, and two modulations of six
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float = 4.0, qk_norm: bool = False, last: bool = False):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS, elementwise_affine=False)
        self.attn = Attention(width, heads, qk_norm, last)
        if not last:
            self.norm2 = nn.LayerNorm(width, eps=NORM_EPS, elementwise_affine=False)
            self.mlp = Mlp(width, int(width * mlp_ratio))
        self.adaLN_modulation = Modulation(width, 2 if last else 6)

    def initialise(self, generator: torch.Generator) -> None:
        self.attn.initialise(generator)
        self.mlp.initialise(generator)
        self.adaLN_modulation.zero()

    def enter(self, x: Tensor, condition: Tensor) -> tuple[Tensor, list[Tensor]]:
        """x (B, N, D), condition (B, D) -> the attention's input (B, N, D), and the modulations for `leave`."""
        shift, scale, *rest = self.adaLN_modulation(condition)
        return modulate(self.norm1(x), shift, scale), rest

    def leave(self, x: Tensor, attended: Tensor, rest: list[Tensor]) -> Tensor:
        """Residual x, and what the attention makes of its input, each (B, N, D) -> (B, N, D)."""
        gate_a, shift_m, scale_m, gate_m = rest
        x = x + gate_a.unsqueeze(1) * attended
        return x + gate_m.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_m, scale_m))

    def forward(
        self, x: Tensor, condition: Tensor, tap: bool = False, with_logsumexp: bool = False
    ) -> tuple[Tensor, AttentionTap | None]:
        """x (B, N, D), condition (B, D) -> (B, N, D), and the attention's tap if `tap`, else None."""
        entered, rest = self.enter(x, condition)
        attended, inner = self.attn(entered, tap and with_logsumexp)
        tapped = inner if tap else None
        del inner, entered  # free them before the rest of the block runs
        return self.leave(x, attended, rest), tapped


class FinalLayer(nn.Module):
    """Tokens (B, N, D) -> patches (B, N, outputs); exactly zero at initialisation."""

    def __init__(self, width: int, outputs: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=NORM_EPS, elementwise_affine=False)
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = Modulation(width, 2)

    def initialise(self) -> None:
        fill_zero(*self.linear.parameters())
        self.adaLN_modulation.zero()

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition)
        return self.linear(modulate(self.norm_final(x), shift, scale))
