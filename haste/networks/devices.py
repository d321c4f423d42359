"""The device that networks run on, and the precision in which they compute there."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Generator, Iterator
from typing import Any

import torch
from torch import Tensor

from haste.networks import driver

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def sent(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host's memory on a device; to a GPU from page-locked memory, so that nothing waits for it."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


@contextlib.contextmanager
def repeatable(device: torch.device, wanted: bool) -> Generator[None]:
    """On a GPU only kernels that give the same bits each time, if wanted. Those of a CPU always do.

    Raises:
        ValueError: an operation has no such kernel.
    """
    if device.type != "cuda" or not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it torch may refuse to multiply
    # NVLink's switches add in an order of their own. torch leaves out the first of these only, and only if it was
    # deterministic before the group was made; NCCL reads this when the ranks first communicate.
    os.environ.setdefault("NCCL_ALGO", "^NVLS,NVLSTree")
    # Fused attention has a second backward kernel for this, which it does not take where warnings are enough.
    torch.use_deterministic_algorithms(True, warn_only=False)
    memory.fill_uninitialized_memory = False  # takes time, and finds only mistakes of others
    try:
        yield
    except RuntimeError as error:
        if "use_deterministic_algorithms" not in str(error):
            raise
        raise ValueError(
            f"runtime.deterministic: true, but {str(error).split(', but you set')[0]}. Set runtime.deterministic: "
            "false; then a run that was killed may end with other bits, and its states say so"
        ) from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = filled


def choose_device(asked: str, local_rank: int = 0) -> torch.device:
    """`auto` is a GPU if there is one, a separate one for each rank.

    Raises:
        ValueError: a GPU is requested and there is none for this rank, or there is one that torch cannot use.
    """
    if asked == "cpu":
        return torch.device("cpu")
    if asked == "auto" and not torch.cuda.is_available():
        _refuse_unused("runtime.device is auto", "set runtime.device: cpu")
        return torch.device("cpu")
    if not torch.cuda.is_available() or local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"runtime.device is {asked}: process {local_rank} of this machine needs a GPU of its own, "
            f"and {torch.cuda.device_count()} are visible. A launcher that shows each process one GPU alone, as srun "
            "does with --gpus-per-task or --gpu-bind=single, must show it all"
        )
    return torch.device("cuda", local_rank)


def _refuse_unused(where: str, instead: str) -> None:
    """Refuse to compute on the CPU, for days perhaps, beside a GPU that torch cannot use."""
    if why := driver.unused(torch.version.cuda):
        raise ValueError(f"{where}: {why}, or {instead} to compute on the CPUs all the same")


@contextlib.contextmanager
def computing(precision: str, device: torch.device) -> Iterator[None]:
    """Context of networks with float32 weights: they compute in `bf16` or `fp16` by autocast, in `tf32` by torch's
    switches for products and convolutions, which only NVIDIA GPUs follow, and in any other precision as torch does.

    What is in float64 stays so in all of them.
    """
    if precision in AUTOCAST:
        with torch.autocast(device.type, AUTOCAST[precision]):
            yield
        return
    switches: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn] if precision == "tf32" else []
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = True
        yield
    finally:
        for switch, was in zip(switches, before, strict=True):
            switch.allow_tf32 = was


_EXACT = threading.Lock()
_exact: list[bool] = []  # of each that computes now, what was allowed before


@contextlib.contextmanager
def exact_convolutions() -> Iterator[None]:
    """Context of detectors: convolutions on a GPU keep float32's digits. torch computes them in TF32 by default, which
    changes scores in their third digit. The switch is the process's, so threads share it: the last one puts it back.
    """
    switch: Any = torch.backends.cudnn
    with _EXACT:
        _exact.append(_exact[0] if _exact else switch.allow_tf32)
        switch.allow_tf32 = False
    try:
        yield
    finally:
        with _EXACT:
            before = _exact.pop()
            if not _exact:
                switch.allow_tf32 = before


def check_compiler(device: torch.device) -> None:
    """Refuse `torch.compile` where the compiler that it calls is missing; torch itself says so with a long traceback.

    Raises:
        ValueError: names what was looked for.
    """
    variable, usual = ("CC", ("gcc", "clang", "cc")) if device.type == "cuda" else ("CXX", ("g++", "clang++"))
    wanted = os.environ.get(variable, "").split()[:1] or usual
    if not any(map(shutil.which, wanted)):
        raise ValueError(
            f"runtime.compile: true needs a compiler on a {device.type}, found none of {', '.join(wanted)} on PATH. "
            f"Install one, name it in {variable}, or set compile: false"
        )


def devices_named(name: str) -> list[str]:
    """The devices that `--device` names: `all` is every GPU, or the CPU if there is none; else as `device_named`."""
    if name != "all":
        return [device_named(name)]
    if not (count := torch.cuda.device_count()):
        _refuse_unused("--device all", "give --device cpu")
    return [f"cuda:{number}" for number in range(count)] or ["cpu"]


def device_named(name: str) -> str:
    """The device that `--device` names; `auto` is a GPU if there is one.

    Raises:
        ValueError: there is no such device; or, of `auto`, a GPU that torch cannot use.
    """
    if name == "auto":
        if not (usable := torch.cuda.is_available()):
            _refuse_unused("--device auto", "give --device cpu")
        return "cuda" if usable else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device: {name!r} is not available: {str(error).splitlines()[0]}") from error
    return name
