"""NT-Xent by its formula, one term after another in float64; samples that count less, in every loss."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from haste.align import losses
from haste.align.losses import Negatives, attention_loss, contrastive_loss, cross_entropy_by_sample, feature_loss

BATCH, TOKENS, WIDTH = 3, 4, 5


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.tolist(), b.tolist()
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)


def by_hand(z: Tensor, h: Tensor, temperature: float, places: list[int] | None, rows=range(BATCH), whole=None):
    """By sample; `places` None: the image's own tokens; else those of `whole`, the tokens of all the batch in order."""
    values = []
    for b, row in enumerate(rows):
        tokens = []
        for n in range(TOKENS):
            if places is None:
                others = [h[b, m] for m in range(TOKENS) if m != n]
            else:
                others = [whole[place] for place in places if place != row * TOKENS + n]
            positive = math.exp(cosine(z[b, n], h[b, n]) / temperature)
            against = sum(math.exp(cosine(z[b, n], other) / temperature) for other in others)
            tokens.append(-math.log(positive / (positive + against)))
        values.append(sum(tokens) / TOKENS)
    return values


@pytest.mark.parametrize("temperature", [0.1, 0.7])
def test_nt_xent_against_the_other_tokens_of_an_image_is_the_formula(temperature):
    z, h = draw(BATCH, TOKENS, WIDTH, seed=0), draw(BATCH, TOKENS, WIDTH, seed=1)
    expected = sum(by_hand(z, h, temperature, None)) / BATCH
    assert contrastive_loss(z, h, temperature).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("places", [[7, 0, 3, 11, 5], list(range(12)), [2]], ids=["some", "all", "one"])
def test_nt_xent_against_tokens_of_the_batch_is_the_formula_and_no_token_is_its_own_negative(places):
    z, h = draw(BATCH, TOKENS, WIDTH, seed=0), draw(BATCH, TOKENS, WIDTH, seed=1)
    whole = h.reshape(-1, WIDTH)
    negatives = Negatives(whole[places], torch.tensor(places), torch.arange(BATCH))
    expected = by_hand(z, h, 0.1, places, whole=whole)
    assert contrastive_loss(z, h, 0.1, negatives).item() == pytest.approx(sum(expected) / BATCH, rel=1e-12)
    # a part of the batch knows its rows
    part = Negatives(whole[places], torch.tensor(places), torch.tensor([1, 2]))
    found = contrastive_loss(z[1:], h[1:], 0.1, part).item()
    assert found == pytest.approx(sum(expected[1:]) / 2, rel=1e-12)


def test_gradients_of_nt_xent_are_those_of_finite_differences_and_never_the_teachers():
    z, h = draw(2, 3, 4, seed=0).requires_grad_(), draw(2, 3, 4, seed=1).requires_grad_()
    negatives = Negatives(draw(4, 4, seed=2).requires_grad_(), torch.tensor([0, 4, 9, 20]), torch.arange(2))
    weights = torch.tensor([0.5, 1.5], dtype=torch.float64)
    for others in (None, negatives):
        assert torch.autograd.gradcheck(
            lambda z, others=others: contrastive_loss(z, h.detach(), 0.3, others, weights), z
        )
        contrastive_loss(z, h, 0.3, others).backward()
    assert h.grad is None and negatives.features.grad is None


def test_nt_xent_computes_in_float32_whatever_autocast_says():
    z, h = draw(2, 8, 16, seed=0).float(), draw(2, 8, 16, seed=1).float()
    expected = contrastive_loss(z, h)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(contrastive_loss(z, h), expected)
        assert contrastive_loss(z.bfloat16(), h.bfloat16()).dtype == torch.float32


WEIGHTS = torch.tensor([0.0, 2.0, 1.0], dtype=torch.float64)


def test_weights_of_samples_weigh_the_feature_losses():
    z, h = draw(BATCH, TOKENS, WIDTH, seed=0), draw(BATCH, TOKENS, WIDTH, seed=1)
    cosines = [sum(cosine(z[b, n], h[b, n]) for n in range(TOKENS)) / TOKENS for b in range(BATCH)]
    assert feature_loss(z, h, WEIGHTS).item() == pytest.approx(-(2 * cosines[1] + cosines[2]) / 3, rel=1e-12)
    terms = by_hand(z, h, 0.1, None)
    assert contrastive_loss(z, h, weights=WEIGHTS).item() == pytest.approx((2 * terms[1] + terms[2]) / 3, rel=1e-12)


@pytest.mark.parametrize("way", ["by sample", "fused", "own logsumexp"])
def test_weights_of_samples_weigh_the_attention_loss_and_its_gradient(way, monkeypatch):
    monkeypatch.setitem(
        losses.WAYS, "cpu", cross_entropy_by_sample if way == "by sample" else losses.cross_entropy_fused
    )
    q, k = (draw(BATCH, 2, 6, 5, seed=i).requires_grad_() for i in (0, 1))
    teacher = [draw(BATCH, 2, 6, 4, seed=i) for i in (2, 3)]
    logits = q @ k.mT / math.sqrt(5)
    known = torch.logsumexp(logits, -1) if way == "own logsumexp" else None
    found = attention_loss(q, k, *teacher, logsumexp_s=known, weights=WEIGHTS)
    target = (teacher[0] @ teacher[1].mT / 2.0).softmax(-1)
    each = -(target * functional.log_softmax(q @ k.mT / math.sqrt(5), -1)).sum(-1).mean((1, 2))
    expected = (each * WEIGHTS).mean()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for mine, theirs in zip(torch.autograd.grad(found, (q, k)), torch.autograd.grad(expected, (q, k)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-14)
        assert mine[0].abs().max() == 0  # the first sample does not count
