"""Attention that gives its logsumexp, against formulas that hold every map.

On a CPU: its kernel takes the same backward.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from haste.align.losses import attention_loss
from haste.models.attention import _Attention, attention_with_logsumexp, logsumexp_works
from haste.models.sit import SiT


def _formula(q, k, v):
    logits = q @ k.mT * q.shape[-1] ** -0.5
    return torch.softmax(logits, dim=-1) @ v, torch.logsumexp(logits, dim=-1)


def _values_and_gradients(attention, q, k, v, grad_out, grad_logsumexp):
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, logsumexp = attention(*leaves)
    total = (out * grad_out).sum() + (logsumexp * grad_logsumexp).sum()
    return [out.detach(), logsumexp.detach(), *torch.autograd.grad(total, leaves)]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 33), st.integers(1, 19), st.integers(0, 99))
def test_output_logsumexp_and_the_gradient_through_both_are_the_formulas(batch, heads, tokens, width, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, tokens, width)
    q, k, v, grad_out = torch.randn(4, *shape, generator=generator, dtype=torch.float64).unbind()
    grad_logsumexp = torch.randn(shape[:3], generator=generator, dtype=torch.float64)
    given_to = (q, k, v, grad_out, grad_logsumexp)
    found = _values_and_gradients(attention_with_logsumexp, *given_to)
    for ours, want in zip(found, _values_and_gradients(_formula, *given_to), strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-10, atol=1e-12)


def test_in_half_precision_the_small_gradient_of_a_mean_over_many_rows_keeps_its_digits():
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, 64, 24)
    q, k, v, _ = (x.bfloat16() for x in torch.randn(4, *shape, generator=generator).unbind())
    rows = torch.full(shape[:3], 0.5 / 98304)  # not a number that bfloat16 has: 0.2 % would be lost
    nothing = torch.zeros(shape)
    ours = _values_and_gradients(attention_with_logsumexp, q, k, v, nothing.bfloat16(), rows)
    want = _values_and_gradients(_formula, q.double(), k.double(), v.double(), nothing.double(), rows.double())
    torch.testing.assert_close(ours[1].double(), want[1], rtol=1e-4, atol=1e-4)
    for mine, formula in zip(ours[2:4], want[2:4], strict=True):
        along = (mine.double() * formula).sum() / formula.square().sum()  # 1 where nothing is lost on average
        assert abs(along - 1) < 5e-4
        assert (mine.double() - formula).norm() < 0.01 * formula.norm()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_that_gives_its_logsumexp_has_the_same_loss_and_gradients_as_one_that_does_not(checkpointing):
    generator = torch.Generator().manual_seed(1)
    x, q_t, k_t = (torch.randn(*s, generator=generator).double() for s in [(2, 2, 4, 4), (2, 3, 16, 6), (2, 3, 16, 6)])
    found = []
    for own in (False, True):
        model = SiT(input_size=4, in_channels=2, patch_size=1, depth=2, width=24, heads=4, classes=3).double()
        for index, parameter in enumerate(model.parameters()):  # else nothing flows through modulations that are zero
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
            parameter.data += 0.1 * noise.double()
        model.own_logsumexp, model.checkpoint_blocks = own, checkpointing
        velocity, taps = model(x, torch.tensor([0.3, 0.8]).double(), torch.tensor([0, 3]), taps={"attention.1"})
        tap = taps["attention.1"]
        assert (tap.logsumexp is not None) == own
        loss = attention_loss(tap.q, tap.k, q_t, k_t, heads=3, logsumexp_s=tap.logsumexp)
        gradients = torch.autograd.grad(loss + velocity.square().mean(), list(model.parameters()))
        found.append([loss.detach(), velocity.detach(), *gradients])
    for plain, own in zip(*found, strict=True):
        torch.testing.assert_close(own, plain, rtol=1e-9, atol=1e-12)


def test_a_compiler_can_trace_it_whole():
    compiled = torch.compile(attention_with_logsumexp, backend="aot_eager", fullgraph=True)
    q, k, v = torch.randn(3, 1, 2, 8, 8, dtype=torch.float64).unbind()
    given_to = (q, k, v, v, torch.ones(1, 2, 8, dtype=torch.float64))
    ours = _values_and_gradients(compiled, *given_to)
    for mine, want in zip(ours, _values_and_gradients(_formula, *given_to), strict=True):
        torch.testing.assert_close(mine, want)


def test_it_is_not_chosen_where_it_is_not_the_better_way():
    assert not logsumexp_works("cpu", torch.bfloat16, 64)
    assert not logsumexp_works("cuda", None, 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [24, 60, 64, 72])
def test_the_calls_of_a_gpus_kernel_fit_what_torch_declares_of_it(width, dtype):
    class Kept:
        def save_for_backward(self, *tensors):
            self.saved_tensors = tensors

    # Tensors without values: torch checks arguments, devices and shapes of kernels that this machine cannot run.
    with FakeTensorMode(), torch.no_grad():
        q, k, v = (torch.empty(3, 4, 256, width, device="cuda", dtype=dtype) for _ in range(3))
        kept = Kept()
        out, logsumexp = _Attention.forward(kept, q, k, v)
        grads = _Attention.backward(kept, torch.empty_like(out), torch.empty_like(logsumexp))
    assert (out.shape, out.dtype, out.device.type) == (q.shape, dtype, "cuda")
    assert (logsumexp.shape, logsumexp.dtype) == (q.shape[:3], torch.float32)
    assert [(g.shape, g.dtype, g.device.type) for g in grads] == [(q.shape, dtype, "cuda")] * 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("width", [64, 72])
def test_a_gpus_kernel_agrees_with_the_formula(width):
    assert logsumexp_works("cuda", torch.bfloat16, width)
