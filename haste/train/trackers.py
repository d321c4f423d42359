"""Further outputs of a journal: TensorBoard, Weights & Biases. A new one is a function and a line in TRACKERS."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from haste.plan.inputs import check_tracker

Track = Callable[[dict[str, Any]], None]


def open_tracker(kind: str, folder: Path, **about: Any) -> Track:
    """A function that takes the records of a journal.

    Args:
        kind: one of TRACKERS.
        folder: the trajectory's folder.
        about: `name` and `config` of the trajectory, and `begin`, the steps done before.

    Raises:
        ValueError: the tracker's library is not installed.
    """
    return TRACKERS[kind](folder, **about)


def _tensorboard(folder: Path, *, name: str, config: Mapping[str, Any], begin: int) -> Track:
    from torch.utils.tensorboard import SummaryWriter

    # An interrupted run repeats the steps after its last state: TensorBoard drops its older records of them.
    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=begin + 1)

    def track(record: dict[str, Any]) -> None:
        for key, value in record.items():
            if key not in ("step", "time"):
                writer.add_scalar(key, value, record["step"], walltime=record["time"])
        writer.flush()

    return track


def _wandb(folder: Path, *, name: str, config: Mapping[str, Any], begin: int) -> Track:
    check_tracker("wandb")
    import wandb

    run = wandb.init(id=name[-64:], name=name, config=dict(config), dir=str(folder), resume="allow")
    return lambda record: run.log(record, step=record["step"])


TRACKERS: dict[str, Callable[..., Track]] = {"tensorboard": _tensorboard, "wandb": _wandb}
