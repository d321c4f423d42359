"""Which device the networks run on."""

from __future__ import annotations

import torch


def choose_device(asked: str, local_rank: int = 0) -> torch.device:
    """`auto` is a GPU where there is one, each process its own.

    Raises:
        ValueError: a GPU is asked for and there is none for this process.
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
    """A device that is there, by what `--device` says; `auto` is a GPU where there is one.

    Raises:
        ValueError: it is not there.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device: {name!r} is not there: {str(error).splitlines()[0]}") from error
    return name
