"""Start the ranks of a training job on this machine. Each runs `haste.train.loop.train`, launched or not."""

from __future__ import annotations

import ctypes
import json
import logging
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from haste import config
from haste.files import artefact, locks
from haste.plan.names import State
from haste.plan.plan import Plan
from haste.train.loop import Interrupted, train

# Errors by which a rank refuses its work; the launcher reports them as refusals, not as crashes.
REFUSALS = ("ValueError", "OSError", "FloatingPointError", "FileNotFoundError", "PermissionError")


ENDED = 128 + signal.SIGTERM  # exit status
LOST = 3.0  # seconds after which a rank says that another one is gone
LONGEST = 70  # characters of a folder in which a socket can be


def launch(plan: Plan, state: State) -> Path:
    """Make a state with the configured number of ranks on this machine.

    A process that was itself launched as a rank (torchrun, srun) joins its group and starts no others. When one
    rank dies, all end within seconds. TERM stops all within two steps, after saving.

    Returns:
        The state's file.

    Raises:
        Interrupted: TERM was received; the last step is saved.
        ValueError: a rank refused; the message is that of the first one.
        RuntimeError: a rank died; the message contains its traceback.
    """
    if "RANK" in os.environ:
        return train(plan, state, _until_term())
    path = Path(plan.path(state))
    with locks.waiting(path.parent / ".locks" / "launch", f"trajectory {state.trajectory}"):
        if plan.config.runtime.processes == 1:
            return train(plan, state, _until_term())
        # Ranks wait for one another in collective calls, which have a time limit, so this waits for other trainers.
        with locks.waiting(path.parent / "lock", f"trajectory {state.trajectory}"):
            pass
        _launch(plan, state)
    return path


def _launch(plan: Plan, state: State) -> None:
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
        start_method=_start_method(),
        local_addr="localhost",  # else it asks for this machine's name, for minutes where nobody knows it
        signals_to_handle="SIGINT,SIGHUP,SIGQUIT",  # its handler of TERM would end the ranks before they save
    )
    # torchrun's own default, set here to avoid its warning
    os.environ.setdefault("OMP_NUM_THREADS", str(plan.config.runtime.threads))
    # gloo would look for this machine by its name, or on the interface that a cluster's settings name
    os.environ["GLOO_SOCKET_IFNAME"] = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
    _on_term(_tell_the_ranks)
    multiprocessing.set_forkserver_preload(["haste.train.ranks"])
    try:
        saved = elastic_launch(settings, work)(plan.config.model_dump_json(), str(state))[0]
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise _reason(rank, failure) from None
    except OSError as error:
        if error.filename is not None or error.errno not in artefact.FULL:
            raise
        where = "/dev/shm or the folder for temporary files"  # Python does not say which
        raise OSError(error.errno, f"{os.strerror(error.errno)}: several processes need some of it", where) from error
    if saved is not None:
        raise Interrupted(saved, 1)


def _tell_the_ranks() -> None:
    ranks = multiprocessing.active_children()
    for rank in ranks:
        rank.terminate()  # TERM, at which a rank saves
    if not ranks:
        sys.exit(ENDED)


def _on_term(do: Callable[[], Any]) -> None:
    if threading.current_thread() is threading.main_thread():  # no other may
        signal.signal(signal.SIGTERM, lambda *_: do())


def _until_term() -> Callable[[], int]:
    """What `train` asks after every step: a reason to stop once TERM was received. Before the first step there is
    nothing to save, so TERM ends the process at once, also while it waits for a lock."""
    asked, told = list[bool](), list[bool]()

    def on_term() -> None:
        told.append(True)
        if not asked:
            sys.exit(ENDED)

    def reason() -> int:
        asked.append(True)
        return int(bool(told))

    _on_term(on_term)
    return reason


def work(resolved: str, name: str) -> int | None:
    """One rank: read the configuration that the launcher resolved, and train. Returns the last step if interrupted."""
    from torch.distributed.elastic.multiprocessing.errors import record

    die_with_parent()
    if (launcher := multiprocessing.parent_process()) and not launcher.is_alive():  # it died before that was said
        os._exit(1)
    interrupted = _until_term()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # blocked in `ranks`
    rank = int(os.environ["RANK"])
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING,
        format=f"%(asctime)s %(name)s: {'' if rank == 0 else f'process {rank}: '}%(message)s",
        datefmt="%H:%M:%S",
    )
    plan = Plan(config.resolve(json.loads(resolved)))
    return record(_train)(plan, plan.parse(name), interrupted)


def _train(plan: Plan, state: State, interrupted: Callable[[], int]) -> int | None:
    try:
        train(plan, state, interrupted)
    except Interrupted as stop:  # not as an error, which the launcher would log with a traceback
        return stop.step
    except RuntimeError as error:
        if "peer" in str(error):  # the reason is the rank that is gone, which the launcher is to find first
            time.sleep(LOST)
        raise
    return None


def _start_method() -> str:
    """Ranks are forked by a process that has imported what they need and touches no GPU.

    It is asked through a socket in the folder for temporary files, whose path may have about a hundred characters.
    Where that is too long, each rank is a new process.
    """
    return "forkserver" if len(tempfile.gettempdir()) <= LONGEST else "spawn"


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends (on Linux).

    kill -9 of the launcher must not leave ranks that train on while its successor starts.
    """
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
