"""Kernels that give the same bits each time, where torch has them."""

import os
import threading

import pytest
import torch

from haste.networks.devices import exact_convolutions, repeatable

GPU = torch.device("cuda")  # named only


def settings():
    filled = torch.utils.deterministic.fill_uninitialized_memory
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(), filled


def test_on_a_gpu_repeatable_kernels_alone_are_taken_and_afterwards_any_again(monkeypatch):
    for name in ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO"):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards, also where it is not set
        monkeypatch.delenv(name)
    before = settings()
    with repeatable(GPU, True):
        assert settings() == (True, False, False)  # where warnings are enough, fused attention's backward differs
        assert os.environ["NCCL_ALGO"] == "^NVLS,NVLSTree"  # sums between GPUs in no fixed order
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


def test_convolutions_stay_exact_for_a_detector_while_another_one_ends_and_are_as_before_once_all_have():
    torch.backends.cudnn.allow_tf32 = True
    begun, end = threading.Event(), threading.Event()

    def other():
        with exact_convolutions():
            begun.set()
            assert end.wait(60)

    thread = threading.Thread(target=other)
    with exact_convolutions():
        thread.start()
        assert begun.wait(60)
    assert not torch.backends.cudnn.allow_tf32  # of the process: the other one still computes
    end.set()
    thread.join()
    assert torch.backends.cudnn.allow_tf32
