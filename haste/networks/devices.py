"""The device that networks run on."""

from __future__ import annotations

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
