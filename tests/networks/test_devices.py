"""Which device computes, and kernels that give the same bits each time, where torch has them."""

import os
import threading

import pytest
import torch

from haste.networks import driver
from haste.networks.devices import choose_device, device_named, devices_named, exact_convolutions, repeatable

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


@pytest.fixture
def unusable(tmp_path, monkeypatch):
    """A machine with one GPU, whose driver is older than the CUDA of torch."""
    script = tmp_path / "nvidia-smi"
    script.write_text(
        "#!/bin/sh\ncase $1 in -L) echo 'GPU 0: NVIDIA H100 (UUID: GPU-1111)';; *) echo 535.104.05;; esac\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv(driver.VISIBLE, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    driver._machine.cache_clear()
    yield
    driver._machine.cache_clear()


@pytest.mark.parametrize(
    ("cuda", "why"),
    [("13.2", r"the driver \(535.104.05\) is probably too old for torch's CUDA 13.2. Update"), (None, "without CUDA")],
)
def test_beside_a_gpu_that_torch_cannot_use_nothing_computes_on_the_cpu_unless_it_is_asked_for(
    unusable, monkeypatch, cuda, why
):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.raises(ValueError, match=rf"lists a GPU for this process.*{why}.* set runtime.device: cpu to compute"):
        choose_device("auto")
    for choose in (device_named, devices_named):
        with pytest.raises(ValueError, match=rf"--device a\w+: .*{why}.* give --device cpu"):
            choose({device_named: "auto", devices_named: "all"}[choose])
    assert choose_device("cpu").type == device_named("cpu") == "cpu"


@pytest.mark.parametrize("hidden", ["", "-1", "NoDevFiles", "GPU-elsewhere", "1"])
def test_a_gpu_that_is_hidden_from_a_process_leaves_it_the_cpu(unusable, monkeypatch, hidden):
    monkeypatch.setenv(driver.VISIBLE, hidden)
    assert choose_device("auto").type == device_named("auto") == "cpu" and devices_named("all") == ["cpu"]
