"""Kernels that give the same bits each time, where torch has them."""

import pytest
import torch

from haste.networks.devices import repeatable

GPU = torch.device("cuda")  # named only


def settings():
    filled = torch.utils.deterministic.fill_uninitialized_memory
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(), filled


def test_on_a_gpu_repeatable_kernels_alone_are_taken_and_afterwards_any_again(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = settings()
    with repeatable(GPU, True):
        assert settings() == (True, False, False)  # where warnings are enough, fused attention's backward differs
    with repeatable(GPU, False):
        assert settings() == before
    with repeatable(torch.device("cpu"), True):
        assert settings() == before
    assert settings() == before


def test_an_operation_without_such_a_kernel_is_refused_with_the_key_and_other_errors_are_left_alone():
    before = settings()
    with (
        pytest.raises(
            ValueError, match=r"deterministic: true, but put_ does not have .*\. Set runtime.deterministic: f"
        ),
        repeatable(GPU, True),
    ):
        torch.zeros(3).put_(torch.tensor([0]), torch.tensor([1.0]))
    with pytest.raises(RuntimeError, match="size"), repeatable(GPU, True):
        torch.zeros(3) + torch.zeros(2)
    assert settings() == before
