import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from haste.align import losses
from haste.align.losses import (
    attention_loss,
    cross_entropy_by_sample,
    cross_entropy_fused,
    feature_loss,
    normalised_over_tokens,
    resize_tokens,
)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, size: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * size).to(dtype)


def sides(batch=2, heads_s=3, heads_t=3, tokens=12, width_s=8, width_t=8, seed=0, dtype=torch.float64, size=1.0):
    """Student's q and k (which want gradients) and teacher's q and k."""
    shapes = [(heads_s, width_s), (heads_s, width_s), (heads_t, width_t), (heads_t, width_t)]
    q_s, k_s, q_t, k_t = (
        draw(batch, h, tokens, w, seed=4 * seed + i, dtype=dtype, size=size) for i, (h, w) in enumerate(shapes)
    )
    return q_s.requires_grad_(), k_s.requires_grad_(), q_t, k_t


def plain(q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, heads: int | None = None) -> Tensor:
    """The formula as it stands, every map held, in float64."""
    heads = heads or min(q_s.shape[1], q_t.shape[1])
    q_s, k_s, q_t, k_t = (x[:, :heads].double() for x in (q_s, k_s, q_t, k_t))
    student = torch.einsum("bhik,bhjk->bhij", q_s, k_s) / math.sqrt(q_s.shape[-1])
    teacher = torch.einsum("bhik,bhjk->bhij", q_t, k_t) / math.sqrt(q_t.shape[-1])
    tokens = student.shape[-1]
    return functional.cross_entropy(student.reshape(-1, tokens), teacher.softmax(-1).reshape(-1, tokens))


@pytest.fixture(params=[cross_entropy_by_sample, cross_entropy_fused], ids=["by_sample", "fused"])
def way(request, monkeypatch):
    """Both ways of computing the loss, whatever the device would have chosen."""
    monkeypatch.setitem(losses.WAYS, "cpu", request.param)
    return request.param


PAIRS = [
    {"batch": 2, "heads_s": 3, "heads_t": 3, "tokens": 12},
    {"batch": 1, "heads_s": 16, "heads_t": 12, "tokens": 9, "width_s": 72, "width_t": 64},
    {"batch": 3, "heads_s": 2, "heads_t": 4, "tokens": 1, "width_s": 5, "width_t": 7},
    {"batch": 2, "heads_s": 6, "heads_t": 4, "tokens": 33, "width_s": 32, "width_t": 64, "size": 3.0},
]


@pytest.mark.parametrize("shape", PAIRS, ids=str)
def test_value_and_gradients_are_those_of_the_plain_formula(way, shape):
    q_s, k_s, q_t, k_t = sides(**shape)
    expected = torch.autograd.grad(plain(q_s, k_s, q_t, k_t), (q_s, k_s))
    loss = attention_loss(q_s, k_s, q_t, k_t)
    torch.testing.assert_close(loss, plain(q_s, k_s, q_t, k_t), rtol=1e-10, atol=1e-15)
    # An upstream factor, as the weight of the loss is one.
    found = torch.autograd.grad(0.3 * loss, (q_s, k_s))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, 0.3 * theirs, rtol=1e-10, atol=1e-14)


def test_a_mean_over_layer_pairs_has_the_gradients_of_the_plain_mean(way):
    pairs = [sides(heads_s=4, heads_t=3, width_s=72, width_t=64, seed=seed) for seed in range(3)]
    students = [x for pair in pairs for x in pair[:2]]
    found = torch.autograd.grad(torch.stack([attention_loss(*pair) for pair in pairs]).mean(), students)
    expected = torch.autograd.grad(torch.stack([plain(*pair) for pair in pairs]).mean(), students)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-14)


def test_queries_and_keys_may_be_views_into_one_projection(way):
    """As a transformer hands them out: strides of (B, N, 3, H, K), one gradient for all."""
    qkv_s, qkv_t = draw(2, 10, 3, 4, 8, seed=1).requires_grad_(), draw(2, 10, 3, 3, 8, seed=2)

    def parts(qkv: Tensor) -> tuple[Tensor, Tensor]:
        q, k, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return q, k

    found = torch.autograd.grad(attention_loss(*parts(qkv_s), *parts(qkv_t)), qkv_s)[0]
    expected = torch.autograd.grad(plain(*parts(qkv_s), *parts(qkv_t)), qkv_s)[0]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


def test_gradients_pass_gradcheck(way):
    q_s, k_s, q_t, k_t = sides(tokens=4, width_s=3, width_t=5)
    assert torch.autograd.gradcheck(lambda q, k: attention_loss(q, k, q_t, k_t), (q_s, k_s))


def test_the_student_that_equals_its_teacher_has_the_entropy_of_the_maps_and_no_gradient(way):
    q_s, k_s, _, _ = sides()
    loss = attention_loss(q_s, k_s, q_s.detach(), k_s.detach())
    maps = (q_s @ k_s.mT / math.sqrt(8)).softmax(-1)
    torch.testing.assert_close(loss, -(maps * maps.log()).sum(-1).mean())
    for gradient in torch.autograd.grad(loss, (q_s, k_s)):
        assert gradient.abs().max() < 1e-15


def test_only_the_first_heads_asked_for_are_compared(way):
    q_s, k_s, q_t, k_t = sides(heads_s=4, heads_t=5)
    loss = attention_loss(q_s, k_s, q_t, k_t, heads=2)
    torch.testing.assert_close(loss, plain(q_s, k_s, q_t, k_t, heads=2), rtol=1e-10, atol=0)
    gradient = torch.autograd.grad(loss, q_s)[0]
    assert gradient[:, :2].any() and not gradient[:, 2:].any()


def test_scales_can_be_given(way):
    q_s, k_s, q_t, k_t = sides(width_s=8, width_t=4)
    found = attention_loss(q_s, k_s, q_t, k_t, scale_s=0.5, scale_t=2.0)
    expected = plain(q_s * 0.5 * math.sqrt(8), k_s, q_t * 2.0 * math.sqrt(4), k_t)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)


def test_the_teacher_gets_no_gradient(way):
    q_s, k_s, q_t, k_t = sides()
    q_t.requires_grad_()
    k_t.requires_grad_()
    attention_loss(q_s, k_s, q_t, k_t).backward()
    assert q_t.grad is None and k_t.grad is None and q_s.grad is not None


def test_one_side_of_the_student_may_be_frozen(way):
    q_s, k_s, q_t, k_t = sides()
    expected = torch.autograd.grad(plain(q_s, k_s, q_t, k_t), k_s)[0]
    attention_loss(q_s.detach(), k_s, q_t, k_t).backward()
    torch.testing.assert_close(k_s.grad, expected)


def test_without_gradients_the_value_is_the_same(way):
    q_s, k_s, q_t, k_t = sides()
    with torch.no_grad():
        silent = attention_loss(q_s, k_s, q_t, k_t)
    assert not silent.requires_grad
    torch.testing.assert_close(silent, attention_loss(q_s, k_s, q_t, k_t).detach(), rtol=1e-14, atol=0)


def test_huge_logits_give_no_nan(way):
    q_s, k_s, q_t, k_t = sides(dtype=torch.float32, size=100.0)
    loss = attention_loss(q_s, k_s, q_t, k_t)
    assert (q_s @ k_s.mT).abs().max() > 1e4
    torch.testing.assert_close(loss.double(), plain(q_s, k_s, q_t, k_t), rtol=1e-4, atol=0)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, (q_s, k_s)))


@pytest.mark.parametrize(("tokens", "heads"), [(256, 12), (1024, 4), (4096, 1)])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_value_is_right_to_1e_6_at_256_1024_and_4096_tokens_on_any_number_of_threads(way, tokens, heads, threads):
    given = [
        x.detach()
        for x in sides(1, heads, heads, tokens, width_s=64, width_t=64, dtype=torch.float32, size=3 ** (1 / 2))
    ]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = attention_loss(*given).item()
    finally:
        torch.set_num_threads(before)
    assert found == pytest.approx(plain(*given).item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_computed_in_float32(way, dtype):
    q_s, k_s, q_t, k_t = sides(dtype=dtype)
    loss = attention_loss(q_s, k_s, q_t, k_t)
    assert loss.dtype == torch.float32
    exact = plain(q_s, k_s, q_t, k_t)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
    pairs = zip(torch.autograd.grad(loss, (q_s, k_s)), torch.autograd.grad(exact, (q_s, k_s)), strict=True)
    for mine, theirs in pairs:
        assert mine.dtype == dtype
        torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-6)


def test_autocast_changes_nothing(way):
    q_s, k_s, q_t, k_t = sides(dtype=torch.float32)
    expected = torch.autograd.grad(attention_loss(q_s, k_s, q_t, k_t), (q_s, k_s))
    with torch.autocast("cpu", torch.bfloat16):
        loss = attention_loss(q_s, k_s, q_t, k_t)
    for mine, theirs in zip(torch.autograd.grad(loss, (q_s, k_s)), expected, strict=True):
        assert torch.equal(mine, theirs)


class LargestTensor(TorchDispatchMode):
    """The most elements that any result of any operation had, forward and backward."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(part, Tensor):
                self.elements = max(self.elements, part.numel())
        return result


def largest_tensor_and_saved_elements(function, students) -> tuple[int, int]:
    saved: list[int] = []
    with (
        LargestTensor() as largest,
        torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x),
    ):
        torch.autograd.grad(function(), students)
    return largest.elements, sum(saved)


MEMORY = {"batch": 4, "heads_s": 3, "heads_t": 2, "tokens": 256, "width_s": 9, "width_t": 8}


def test_whole_batch_maps_are_never_made_nor_kept(way):
    q_s, k_s, q_t, k_t = sides(**MEMORY, dtype=torch.float32)
    largest, saved = largest_tensor_and_saved_elements(lambda: attention_loss(q_s, k_s, q_t, k_t), (q_s, k_s))
    maps = 4 * 2 * 256 * 256
    assert 0 < largest <= maps / 2
    # What stays for backward is a few times the queries and keys.
    assert saved <= 6 * (q_s.numel() + k_s.numel()) < maps


def test_the_watch_on_memory_sees_the_maps_of_the_plain_formula():
    q_s, k_s, q_t, k_t = sides(**MEMORY, dtype=torch.float32)
    largest, saved = largest_tensor_and_saved_elements(lambda: plain(q_s, k_s, q_t, k_t), (q_s, k_s))
    maps = 4 * 2 * 256 * 256
    assert largest >= maps and saved >= maps


def test_the_sample_way_keeps_exactly_one_gradient_for_q_and_one_for_k():
    q_s, k_s, q_t, k_t = sides(**{**MEMORY, "heads_s": 2}, dtype=torch.float32)
    _, saved = largest_tensor_and_saved_elements(lambda: attention_loss(q_s, k_s, q_t, k_t), (q_s, k_s))
    assert saved == q_s.numel() + k_s.numel()


def test_small_chunks_of_the_fused_way_add_up(monkeypatch):
    monkeypatch.setattr(losses, "_CHUNK_LOGITS", 1)  # one query row at a time
    q_s, k_s, q_t, k_t = sides(tokens=7)
    scaled = q_s / math.sqrt(8), k_s, q_t / math.sqrt(8), k_t
    torch.testing.assert_close(cross_entropy_fused(*scaled), plain(q_s, k_s, q_t, k_t), rtol=1e-10, atol=0)


def test_a_device_without_a_way_of_its_own_takes_the_fused_one(monkeypatch):
    monkeypatch.delitem(losses.WAYS, "cpu")
    called = []
    monkeypatch.setattr(losses, "cross_entropy_fused", lambda *parts: called.append(1) or parts[0].sum())
    attention_loss(*sides())
    assert called == [1]


@pytest.mark.parametrize("heads", [4, 0, -1])
def test_more_heads_than_either_side_has_are_refused(heads):
    with pytest.raises(ValueError, match=f"{heads} heads requested, the student has 5, the teacher 3; expected 1 to 3"):
        attention_loss(*sides(heads_s=5, heads_t=3), heads=heads)


def test_token_counts_and_batches_that_differ_are_refused():
    q_s, k_s, _, _ = sides(tokens=16)
    _, _, q_t, k_t = sides(tokens=9)
    with pytest.raises(ValueError, match="student has 16 tokens, the teacher 9"):
        attention_loss(q_s, k_s, q_t, k_t)
    with pytest.raises(ValueError, match="student's batch is 2, the teacher's 1"):
        attention_loss(q_s, k_s, *sides(tokens=16, batch=1)[2:])


def test_feature_loss_is_minus_the_mean_cosine():
    projected, target = draw(2, 5, 7, seed=1), draw(2, 5, 7, seed=2)
    total = 0.0
    for b in range(2):
        for n in range(5):
            y, h = projected[b, n].tolist(), target[b, n].tolist()
            dot = sum(p * q for p, q in zip(y, h, strict=True))
            total += dot / (math.hypot(*y) * math.hypot(*h))
    assert feature_loss(projected, target).item() == pytest.approx(-total / 10, rel=1e-12)
    assert feature_loss(target, 3 * target).item() == pytest.approx(-1.0)
    assert feature_loss(target, -target).item() == pytest.approx(1.0)


def test_feature_loss_gradients_reach_the_student_only_and_are_right():
    projected, target = draw(2, 3, 4, seed=1).requires_grad_(), draw(2, 3, 4, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: feature_loss(p, target.detach()), projected)
    feature_loss(projected, target).backward()
    assert projected.grad is not None and target.grad is None


def test_feature_loss_is_computed_in_float32_from_half_precision_and_under_autocast():
    projected, target = draw(2, 300, 64, seed=1, dtype=torch.bfloat16), draw(2, 300, 64, seed=2, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = feature_loss(projected, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), feature_loss(projected.double(), target.double()), rtol=0, atol=1e-7)


def test_feature_loss_of_a_zero_token_is_finite():
    projected = torch.zeros(1, 2, 3, requires_grad=True)
    feature_loss(projected, torch.ones(1, 2, 3)).backward()
    assert projected.grad is not None and projected.grad.isfinite().all()


def test_feature_shapes_that_differ_are_refused_with_both():
    with pytest.raises(ValueError, match=r"\(2, 16, 8\), teacher features \(2, 9, 8\)"):
        feature_loss(torch.zeros(2, 16, 8), torch.zeros(2, 9, 8))


def bilinear(image: list[list[float]], rows: int, columns: int) -> list[list[float]]:
    """Half-pixel centres, edges repeated, no antialiasing."""
    height, width = len(image), len(image[0])

    def weights(target: int, size_to: int, size_from: int) -> tuple[int, int, float]:
        place = max((target + 0.5) * size_from / size_to - 0.5, 0.0)
        low = min(int(place), size_from - 1)
        return low, min(low + 1, size_from - 1), place - low

    out = []
    for r in range(rows):
        r0, r1, fr = weights(r, rows, height)
        line = []
        for c in range(columns):
            c0, c1, fc = weights(c, columns, width)
            top = (1 - fc) * image[r0][c0] + fc * image[r0][c1]
            line.append((1 - fr) * top + fr * ((1 - fc) * image[r1][c0] + fc * image[r1][c1]))
        out.append(line)
    return out


@pytest.mark.parametrize(("grid_from", "grid_to"), [((4, 6), (3, 5)), ((3, 2), (5, 4)), ((16, 16), (14, 14))])
def test_resizing_is_bilinear_for_every_channel(grid_from, grid_to):
    tokens = draw(2, grid_from[0] * grid_from[1], 3)
    found = resize_tokens(tokens, grid_from, grid_to)
    assert found.shape == (2, grid_to[0] * grid_to[1], 3)
    for b in range(2):
        for d in range(3):
            expected = bilinear(tokens[b, :, d].view(grid_from).tolist(), *grid_to)
            torch.testing.assert_close(found[b, :, d].view(grid_to), torch.tensor(expected, dtype=torch.float64))


def test_resizing_queries_and_keys_resizes_their_logits():
    q, k = draw(2, 3, 16, 5, seed=1), draw(2, 3, 16, 5, seed=2)
    small_q, small_k = (resize_tokens(x, (4, 4), (3, 2)) for x in (q, k))
    logits = q @ k.mT  # (B, H, N, N)
    by_rows = resize_tokens(logits, (4, 4), (3, 2))  # over queries
    by_both = resize_tokens(by_rows.mT.contiguous(), (4, 4), (3, 2)).mT  # and over keys
    torch.testing.assert_close(small_q @ small_k.mT, by_both)


def test_equal_grids_return_the_tokens_themselves():
    tokens = draw(1, 6, 2)
    assert resize_tokens(tokens, (2, 3), (2, 3)) is tokens


def test_tokens_that_do_not_fill_the_grid_are_refused():
    with pytest.raises(ValueError, match="found 6, expected 2 x 2"):
        resize_tokens(draw(1, 6, 2), (2, 2), (3, 3))


@pytest.mark.parametrize("factor", [0.0, 0.6, 1.0])
def test_features_are_normalised_by_image_and_channel_over_the_tokens(factor):
    y = draw(3, 5, 4) * torch.tensor([1.0, 10.0, 0.1, 3.0]) + torch.tensor([5.0, -1.0, 0.0, 2.0])
    found = normalised_over_tokens(y.requires_grad_(), factor)
    for b in range(3):
        for d in range(4):
            column = y[b, :, d].detach().numpy()
            mean, std = sum(column) / 5, math.sqrt(sum((column - column.mean()) ** 2) / 4)
            np.testing.assert_allclose(found[b, :, d], (column - factor * mean) / (std + 1e-6), rtol=1e-12)
    assert not found.requires_grad


def test_normalised_features_do_not_depend_on_what_all_tokens_share_nor_on_a_channels_scale():
    y = draw(2, 6, 3)
    other = y * torch.tensor([2.0, 7.0, 0.5]) + torch.tensor([3.0, -4.0, 1.0])
    torch.testing.assert_close(normalised_over_tokens(other), normalised_over_tokens(y), rtol=1e-4, atol=1e-5)
    assert torch.equal(normalised_over_tokens(torch.ones(1, 4, 2)), torch.zeros(1, 4, 2))  # 0 / 0 it is not


def test_half_precision_is_normalised_in_float32_and_one_token_has_no_deviation():
    y = draw(2, 6, 3, dtype=torch.bfloat16)
    torch.testing.assert_close(normalised_over_tokens(y), normalised_over_tokens(y.float()), rtol=0, atol=0)
    with pytest.raises(ValueError, match="the teacher has 1 token an image, expected several"):
        normalised_over_tokens(y[:, :1])
