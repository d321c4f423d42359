"""The device that networks run on."""

from __future__ import annotations

import os
import shutil

import torch


def choose_device(asked: str, local_rank: int = 0) -> torch.device:
    """`auto` is a GPU if there is one, a separate one for each rank.

    Raises:
        ValueError: a GPU is requested and there is none for this rank.
    """
    if asked == "cpu" or (asked == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available() or local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"runtime.device is {asked}: process {local_rank} of this machine needs a GPU of its own, "
            f"and {torch.cuda.device_count()} are visible"
        )
    return torch.device("cuda", local_rank)


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
    return [f"cuda:{number}" for number in range(torch.cuda.device_count())] or ["cpu"]


def device_named(name: str) -> str:
    """The device that `--device` names; `auto` is a GPU if there is one.

    Raises:
        ValueError: there is no such device.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device: {name!r} is not available: {str(error).splitlines()[0]}") from error
    return name
