"""Start the ranks of a training job on this machine. Each runs `haste.train.loop.train`, launched or not."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import sys
import uuid
from pathlib import Path
from typing import Any

from haste import config
from haste.plan.names import State
from haste.plan.plan import Plan
from haste.train.loop import train

# Errors by which a rank refuses its work; the launcher reports them as refusals, not as crashes.
REFUSALS = ("ValueError", "OSError", "FloatingPointError", "FileNotFoundError", "PermissionError")


def launch(plan: Plan, state: State) -> Path:
    """Make a state with the configured number of ranks on this machine.

    A process that was itself launched as a rank (torchrun, srun) joins its group and starts no others. When one
    rank dies, all end within seconds.

    Returns:
        The state's file.

    Raises:
        ValueError: a rank refused; the message is that of the first one.
        RuntimeError: a rank died; the message contains its traceback.
    """
    if "RANK" in os.environ or plan.config.runtime.processes == 1:
        return train(plan, state)
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    count = plan.config.runtime.processes
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
        start_method="spawn",
    )
    # torchrun's own default, set here to avoid its warning
    os.environ.setdefault("OMP_NUM_THREADS", str(plan.config.runtime.threads))
    try:
        elastic_launch(settings, work)(plan.config.model_dump_json(), str(state))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise _reason(rank, failure) from None
    return Path(plan.path(state))


def work(resolved: str, name: str) -> None:
    """One rank: read the configuration that the launcher resolved, and train."""
    from torch.distributed.elastic.multiprocessing.errors import record

    _die_with_the_launcher()
    rank = int(os.environ["RANK"])
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING,
        format=f"%(asctime)s %(name)s: {'' if rank == 0 else f'process {rank}: '}%(message)s",
        datefmt="%H:%M:%S",
    )
    plan = Plan(config.resolve(json.loads(resolved)))
    record(train)(plan, plan.parse(name))


def _die_with_the_launcher() -> None:
    # kill -9 of the launcher must not leave ranks that train on while its successor starts.
    if sys.platform == "linux":
        set_death_signal = 1
        ctypes.CDLL(None, use_errno=True).prctl(set_death_signal, signal.SIGKILL)


def _reason(rank: int, failure: object) -> Exception:
    """The exception that ended a rank, as one to raise in this process."""
    message = getattr(failure, "message", "")
    found: dict[str, Any] = message if isinstance(message, dict) else {"message": str(message)}
    text = str(found.get("message", ""))
    kind, _, words = text.partition(": ")
    if kind.rpartition(".")[2] in REFUSALS:
        return ValueError(words)
    trace = found.get("extraInfo", {}).get("py_callstack", "")
    return RuntimeError(
        f"process {rank} of the training died ({text or getattr(failure, 'signal_msg', lambda: 'no word')()})\n{trace}"
    )
