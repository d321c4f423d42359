"""Alignment losses: features (REPA) and attention (ATTA, HASTE).

Shapes: B batch, N tokens, D width, H heads, K head width; suffix s student, t teacher. Both sides hold image tokens
only. Losses are computed in float32 (float64 if given float64) regardless of autocast and the inputs' dtype. Teachers
get no gradient.

The attention loss never holds the B x H x N x N maps. It has two implementations, one per kind of device: see `WAYS`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

# Logits that the fused implementation holds at once, over the whole batch: 64 MiB in float32.
_CHUNK_LOGITS = 2**24


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _mean(by_sample: Tensor, weights: Tensor | None) -> Tensor:
    """The mean of (B,) values times weights (B,), which are scaled so that microbatches' means may be averaged."""
    return by_sample.mean() if weights is None else (by_sample * weights.to(by_sample.dtype)).mean()


def feature_loss(projected: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Minus the mean cosine between projected student tokens and teacher features (REPA, Eq. 8); scalar in [-1, 1].

    Both (B, N, D); weights (B,) are the samples' weights. ValueError if the shapes differ.
    """
    projected, target = _normalised(projected, target)
    return -_mean((projected * target).sum(dim=-1).mean(dim=-1), weights)


@dataclass(frozen=True)
class Negatives:
    """Teacher features of some tokens of the whole batch, over all ranks, and their positions.

    features: (M, D), without gradient; places: (M,) int64, row in the whole batch times N plus the token's number,
    without duplicates; rows: (B,) int64, the rows in the whole batch of the samples of this microbatch.
    """

    features: Tensor
    places: Tensor
    rows: Tensor


@dataclass(frozen=True)
class TeacherTargets:
    """What a student is aligned with, asked of a teacher now or read from disk.

    features: (B, N, D), or None if not asked for; attention: layer -> (queries, keys), each (B, H, N, K) as they enter
    the scaled dot product (after their normalisation if there is one, before the scale); grid: (h, w), h x w = N.
    """

    features: Tensor | None
    attention: dict[int, tuple[Tensor, Tensor]]
    grid: tuple[int, int]


def normalised_over_tokens(features: Tensor, factor: float = 1.0) -> Tensor:
    """(y - factor * mean) / (std + 1e-6), by image and channel over its tokens (iREPA, arXiv 2512.10794).

    This lessens what the tokens of an image have in common, in favour of how they differ. std has N - 1 in its
    denominator, as in the authors' code; they use factors of 0.6 and 0.8 too.

    (B, N, D) -> (B, N, D), without gradient. ValueError if there is only one token, which has no deviation.
    """
    if features.shape[1] < 2:
        raise ValueError(f"normalise spatial: the teacher has {features.shape[1]} token an image, expected several")
    features = _precise(features.detach())
    std, mean = torch.std_mean(features, dim=1, keepdim=True)
    return (features - factor * mean) / (std + 1e-6)


def contrastive_loss(
    projected: Tensor,
    target: Tensor,
    temperature: float = 0.1,
    negatives: Negatives | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """NT-Xent (SimCLR, Eq. 1) of projected student tokens against teacher features, in one direction; scalar.

    -log( exp(cos(z, h) / T) / sum over h' of exp(cos(z, h') / T) ), mean over tokens and batch: a student token z must
    find its teacher token h among others h', which are the image's other tokens or, if `negatives` are given,
    those of the whole batch. A token is never its own negative. Only teacher tokens are negatives, so that no gradient
    crosses ranks. No source states a temperature: 0.1 is our choice.

    Both (B, N, D); weights (B,) are the samples' weights. ValueError if the shapes differ.
    """
    projected, target = _normalised(projected, target)
    with torch.autocast(device_type=projected.device.type, enabled=False):
        positive = (projected * target).sum(dim=-1, keepdim=True) / temperature  # (B, N, 1)
        if negatives is None:
            logits = projected @ target.mT / temperature  # (B, N, N), the positive on the diagonal
        else:
            logits = torch.cat([positive, _others(projected, negatives, temperature)], dim=-1)  # (B, N, 1 + M)
    return _mean((torch.logsumexp(logits, dim=-1) - positive[..., 0]).mean(dim=-1), weights)


def _others(projected: Tensor, negatives: Negatives, temperature: float) -> Tensor:
    """Logits (B, N, M) of every token with every negative; -inf for the token itself."""
    tokens = projected.shape[1]
    keys = functional.normalize(_precise(negatives.features.detach()).to(projected.dtype), dim=-1)
    place = negatives.rows[:, None] * tokens + torch.arange(tokens, device=projected.device)  # (B, N)
    own = place[..., None] == negatives.places  # (B, N, M)
    return (projected @ keys.mT / temperature).masked_fill(own, -torch.inf)


def _normalised(projected: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Both normalised to unit length; the teacher's without gradient."""
    if projected.shape != target.shape:
        raise ValueError(
            f"feature loss: projected tokens are {tuple(projected.shape)}, teacher features {tuple(target.shape)}; "
            "both must be (batch, tokens, teacher width)"
        )
    projected, target = _precise(projected), _precise(target.detach())
    return functional.normalize(projected, dim=-1), functional.normalize(target, dim=-1)


def attention_loss(
    q_s: Tensor,
    k_s: Tensor,
    q_t: Tensor,
    k_t: Tensor,
    heads: int | None = None,
    scale_s: float | None = None,
    scale_t: float | None = None,
    logsumexp_s: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of the student's attention against the teacher's (HASTE, Eq. 5), mean over batch, heads and rows.

    q_s, k_s (B, H_s, N, K_s) and q_t, k_t (B, H_t, N, K_t), as they enter scale q k^T. The first `heads` heads of both
    sides are compared, by default as many as both have. Scales default to K^(-1/2) of their side. logsumexp_s
    (B, H_s, N), of the student's logits over keys, is passed if the student's attention returned it. weights (B,) are
    the samples' weights. Returns a scalar.
    ValueError if a side has too few heads, or if batch sizes or token counts differ.
    """
    heads = _check_attention(q_s, k_s, q_t, k_t, heads)
    q_s, k_s = _precise(q_s[:, :heads]), _precise(k_s[:, :heads])
    q_t, k_t = q_t[:, :heads].detach().to(q_s.dtype), k_t[:, :heads].detach().to(q_s.dtype)
    # Scaling q here leaves plain q k^T for everything below.
    q_s = q_s * (q_s.shape[-1] ** -0.5 if scale_s is None else scale_s)
    q_t = q_t * (q_t.shape[-1] ** -0.5 if scale_t is None else scale_t)
    with torch.autocast(device_type=q_s.device.type, enabled=False):
        if logsumexp_s is not None:
            return cross_entropy_fused(q_s, k_s, q_t, k_t, weights, logsumexp_s[:, :heads].to(q_s.dtype))
        return WAYS.get(q_s.device.type, cross_entropy_fused)(q_s, k_s, q_t, k_t, weights)


def _check_attention(q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, heads: int | None) -> int:
    """The number of heads to compare, after checking that the two sides fit."""
    assert q_s.shape == k_s.shape and q_t.shape == k_t.shape
    (batch_s, heads_s, tokens_s, _), (batch_t, heads_t, tokens_t, _) = q_s.shape, q_t.shape
    if tokens_s != tokens_t:
        raise ValueError(
            f"attention loss: the student has {tokens_s} tokens, the teacher {tokens_t}; "
            "bring the student's q and k to the teacher's grid with resize_tokens"
        )
    if batch_s != batch_t:
        raise ValueError(f"attention loss: the student's batch is {batch_s}, the teacher's {batch_t}")
    most = min(heads_s, heads_t)
    heads = most if heads is None else heads
    if not 1 <= heads <= most:
        raise ValueError(
            f"attention loss: {heads} heads requested, the student has {heads_s}, the teacher {heads_t}; "
            f"expected 1 to {most}"
        )
    return heads


def cross_entropy_by_sample(
    q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Mean cross-entropy of softmax(q_t k_t^T) against softmax(q_s k_s^T), with its gradient, one sample at a time.

    All (B, H, N, K_side), scaled; weights (B,). The loss is a scalar, so its gradient is known up to a factor before
    the backward pass: it is computed in the forward pass, while the sample's maps are in memory, and only the gradient
    is kept, which is as large as q and k.
    """
    if torch.is_grad_enabled() and (q_s.requires_grad or k_s.requires_grad):
        return _LossWithGradient.apply(q_s, k_s, q_t, k_t, weights)  # pyright: ignore[reportReturnType]
    return _walk_samples(q_s, k_s, q_t, k_t, weights, None, None)


class _LossWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, weights: Tensor | None) -> Tensor:
        grad_q, grad_k = torch.empty_like(q_s), torch.empty_like(k_s)
        loss = _walk_samples(q_s, k_s, q_t, k_t, weights, grad_q, grad_k)
        ctx.save_for_backward(grad_q, grad_k)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_q, grad_k = ctx.saved_tensors
        return grad_loss * grad_q, grad_loss * grad_k, None, None, None


def _walk_samples(
    q_s: Tensor,
    k_s: Tensor,
    q_t: Tensor,
    k_t: Tensor,
    weights: Tensor | None,
    grad_q: Tensor | None,
    grad_k: Tensor | None,
) -> Tensor:
    """The loss; its gradient with respect to q_s and k_s is written to grad_q and grad_k unless they are None.

    d loss / d logits = weight (softmax(S) - P) / (B H N), with S = q_s k_s^T and P the teacher's map.

    One float32 dot product of a sample's H N N entries is wrong from the fourth digit on and changes with the number of
    threads. So each row is summed pairwise, and rows and samples in float64.
    """
    rows = q_s.shape[:3].numel()  # B H N
    total = q_s.new_zeros((), dtype=torch.float64)
    each = None if weights is None else weights.to(q_s.dtype)
    for b in range(q_s.shape[0]):
        teacher = torch.softmax(q_t[b] @ k_t[b].mT, dim=-1)  # (H, N, N)
        student = torch.log_softmax(q_s[b] @ k_s[b].mT, dim=-1)  # S - logsumexp(S), (H, N, N)
        agreement = (teacher * student).sum(dim=-1).sum(dtype=torch.float64)
        total -= agreement if each is None else each[b] * agreement
        if grad_q is not None and grad_k is not None:
            residual = student.exp_().sub_(teacher)
            if each is not None:
                residual *= each[b]
            torch.matmul(residual, k_s[b], out=grad_q[b])
            torch.matmul(residual.mT, q_s[b], out=grad_k[b])
    for grad in (grad_q, grad_k):
        if grad is not None:
            grad.div_(rows)
    return (total / rows).to(q_s.dtype)


def cross_entropy_fused(
    q_s: Tensor,
    k_s: Tensor,
    q_t: Tensor,
    k_t: Tensor,
    weights: Tensor | None = None,
    logsumexp_s: Tensor | None = None,
) -> Tensor:
    """The same value and gradient from fused attention: mean(logsumexp(S)) - mean(<P, S>).

    All (B, H, N, K_side), scaled; weights (B,); logsumexp_s (B, H, N) if it is known, with its gradient. <P, S> is
    q_s . (P k_s), and P k_s is attention with the teacher's q and k and the student's keys as values.
    Fused kernels need one common width, a multiple of 8, reached by padding with zeros.
    """
    width_s = k_s.shape[-1]
    width = -(-max(width_s, k_t.shape[-1]) // 8) * 8
    q_t, k_t, values = (functional.pad(x, (0, width - x.shape[-1])) for x in (q_t, k_t, k_s))
    expected_keys = functional.scaled_dot_product_attention(q_t, k_t, values, scale=1.0)  # P k_s, (B, H, N, width)
    agreement = (q_s * expected_keys[..., :width_s]).sum(dim=(1, 2, 3))
    logsumexp = _logsumexp_totals(q_s, k_s) if logsumexp_s is None else logsumexp_s.sum(dim=(1, 2))
    return _mean((logsumexp - agreement) / q_s.shape[1:3].numel(), weights)


def _logsumexp_totals(q: Tensor, k: Tensor) -> Tensor:
    """For each sample (B,), the sum over all rows of logsumexp(q k^T), some query rows at a time.

    The backward pass recomputes the logits.
    """
    batch, heads, tokens, _ = q.shape
    rows = max(1, min(_CHUNK_LOGITS // (batch * heads * tokens), -(-tokens // 2)))
    total = q.new_zeros(batch)
    for chunk in q.split(rows, dim=2):
        total = total + checkpoint(_logsumexp_sums, chunk, k, use_reentrant=False, preserve_rng_state=False)
    return total


def _logsumexp_sums(q: Tensor, k: Tensor) -> Tensor:
    return torch.logsumexp(q @ k.mT, dim=-1).sum(dim=(1, 2))


#: The implementation by kind of device; all others use the fused one, which is made for GPUs.
WAYS = {"cpu": cross_entropy_by_sample}


def resize_tokens(x: Tensor, grid_from: tuple[int, int], grid_to: tuple[int, int]) -> Tensor:
    """Resize tokens from one grid to another, bilinearly (half-pixel centres, no antialiasing).

    (B, N, D) -> (B, M, D), or (B, H, N, K) -> (B, H, M, K) for queries and keys, with N and M the grids' sizes (rows,
    columns), tokens row by row. Resizing q and k resizes the logits, which are linear in each. Equal grids return x
    itself. ValueError if x does not have N tokens.
    """
    if x.shape[-2] != grid_from[0] * grid_from[1]:
        raise ValueError(f"tokens to resize: found {x.shape[-2]}, expected {grid_from[0]} x {grid_from[1]} of the grid")
    if grid_from == grid_to:
        return x
    *lead, _, width = x.shape
    image = x.reshape(-1, *grid_from, width).permute(0, 3, 1, 2)  # (B or B H, width, rows, columns)
    image = functional.interpolate(image, size=grid_to, mode="bilinear", align_corners=False)
    return image.flatten(2).transpose(1, 2).reshape(*lead, grid_to[0] * grid_to[1], width)
