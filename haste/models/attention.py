"""Fused attention that also returns the logsumexp of its logits, with gradients through both.

Shapes: B batch, H heads, N tokens, K head width.

The kernels compute logsumexp(S), S = K^(-1/2) q k^T, with the output and keep it for their backward pass, but accept no
gradient of it. It can be passed in another way: with P = softmax(S), the kernel's backward computes
    dS = P * (dO V^T - rowsum(dO * O)),   and logsumexp's gradient g belongs inside the bracket: dS = P * (... + g).
So the values get an extra column of ones, with g in dO and 0 in O there: dO V^T gains g, rowsum(dO * O) is unchanged.
This needs no custom kernel, no N x N map and no second pass over the logits.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad, scaled_dot_product_attention

log = logging.getLogger("haste.models")

_STEP = 8  # the kernels need widths that are multiples of it
_HALF = (torch.bfloat16, torch.float16)


def attention_with_logsumexp(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(S) v, shaped as q, and logsumexp(S) over the keys, (B, H, N) in float32 or q's own higher precision.

    q, k, v (B, H, N, K). On a GPU q, k and v must be in half precision, as its kernel requires.
    """
    return _Attention.apply(q, k, v)  # type: ignore[no-any-return]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        width = q.shape[-1]
        ctx.scale = width**-0.5
        room = (0, -width % _STEP)
        out, logsumexp, *ctx.rest = _forward(pad(q, room), pad(k, room), pad(v, room), ctx.scale)
        ctx.save_for_backward(q, k, v, out[..., :width], logsumexp)
        return out[..., :width], logsumexp[..., : q.shape[2]]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_logsumexp: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        q, k, v, out, logsumexp = ctx.saved_tensors
        width = q.shape[-1]
        # g is small and multiplies the whole gradient, so a second column holds the error of its rounding to half
        # precision.
        high = grad_logsumexp.to(q.dtype)
        low = (grad_logsumexp - high).to(q.dtype)
        room = (0, -(width + 2) % _STEP)
        ones, zeros = torch.ones_like(v[..., :2]), torch.zeros_like(v[..., :2])
        columns = [torch.stack([high, low], dim=-1), zeros, zeros, ones, zeros]
        inner = zip((grad_out, q, k, v, out), columns, strict=True)
        widened = tuple(pad(torch.cat([x, column], dim=-1), room) for x, column in inner)
        grads = _backward((*widened, logsumexp), ctx.rest, ctx.scale)
        return tuple(grad[..., :width] for grad in grads[:3])


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Any, ...]:
    """Output, logsumexp, and the other tensors that the kernel's backward needs."""
    if q.is_cuda:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False, scale=scale)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, scale=scale)


def _backward(given: tuple[Tensor, ...], rest: list[Any], scale: float) -> tuple[Tensor, ...]:
    """Gradients of q, k and v, given (grad_out, q, k, v, out, logsumexp) and the other results of `_forward`."""
    if given[0].is_cuda:
        *lengths, seed, offset = rest[:6]
        return torch.ops.aten._scaled_dot_product_flash_attention_backward(
            *given, *lengths, 0.0, False, seed, offset, scale=scale
        )
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*given, 0.0, False, scale=scale)


@functools.cache
def logsumexp_works(device: str, dtype: torch.dtype | None, width: int) -> bool:
    """Whether this machine's kernel gives logsumexp and its gradient for a head width, found by trying it once.

    It uses torch functions that are not public, so it is used only where it agrees with the formula. Always False on
    a CPU, where the attention loss has a better way, and in full precision, for which GPUs have no such kernel.
    """
    if torch.device(device).type != "cuda" or dtype not in _HALF or width > 248:
        return False
    try:
        return _agrees(device, dtype, width)
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        log.warning("attention's own logsumexp is not available here (%s); it is computed anew", error)
        return False


def _agrees(device: str, dtype: torch.dtype, width: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(3, 2, 2, 64, width, generator=generator).to(device, dtype)
    weight = torch.randn(2, 2, 64, generator=generator).to(device)

    def gradients(precise: bool) -> list[Tensor]:
        q, k, v = (x.double() if precise else x.clone() for x in drawn)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        if precise:
            out, found = scaled_dot_product_attention(q, k, v), torch.logsumexp(q @ k.mT * width**-0.5, dim=-1)
        else:
            out, found = attention_with_logsumexp(q, k, v)
        total = (found * weight).sum() + out.to(weight.dtype).mean()
        return [found.detach(), *torch.autograd.grad(total, leaves)]

    for ours, formula in zip(gradients(False), gradients(True), strict=True):
        if (ours.double() - formula.double()).norm() > 0.05 * formula.double().norm():
            log.warning("attention's own logsumexp disagrees with its formula on %s; it is computed anew", device)
            return False
    return True
