"""The GPUs of one machine, shared out among jobs: each takes free ones by locks that die with its process. No torch.

A cluster's own allocation, and a launcher that starts ranks, have already decided who computes where.
"""

from __future__ import annotations

import itertools
import logging
import os
import random
import re
import stat
import tempfile
import time
from pathlib import Path
from typing import Any

from haste.files import locks
from haste.files.artefact import fingerprint
from haste.networks.driver import VISIBLE, visible

log = logging.getLogger("haste.cluster")

SHARING = "HASTE_SHARING"  # set for jobs that Snakemake runs itself, also within an allocation of a cluster
_UNFIT = re.compile(r"[^\w.-]")  # for the name of a file
_held: dict[str, Any] = {}  # GPU -> open lock file of this process, until it ends


def take(count: int, jobs_per_gpu: int = 1) -> list[str]:
    """Take GPUs for this process and those that it starts, after waiting for free ones: CUDA sees no others. To be
    called before CUDA is used.

    Args:
        count: of GPUs.
        jobs_per_gpu: how many jobs may share one; the least used ones come first.

    Returns:
        The GPUs, those that the process has already if it has enough; none if they are not shared out here: in a job of
        a cluster, in a launcher's rank, or where fewer are visible than asked for, which is refused when a rank looks
        for its own.

    Raises:
        ValueError: the process has fewer already, and CUDA may be in use.
    """
    if _held:
        if len(_held) >= count:
            return [*_held]
        raise ValueError(
            f"this process took {', '.join(_held)} for itself before, and now needs {count} GPUs: start another process"
        )
    names = visible()
    given = "RANK" in os.environ or ("SLURM_JOB_ID" in os.environ and SHARING not in os.environ)
    if given or len(names) < count or not locks.taken() or (folder := _folder()) is None:
        return []
    # Who waits for several keeps those that became free, and the next one of the same GPUs waits behind it: nobody
    # starves.
    queue = folder / f"queue-{fingerprint(sorted(names))}"
    with locks.waiting(queue, "its turn at the GPUs of this machine"):
        taken = _attempts(folder, names, count, jobs_per_gpu)
        if len(taken) < count:
            log.info("waiting for %d free GPUs of %d", count, len(names))
        patience = _patience()
        while len(taken) < count:
            time.sleep(locks.LOOK)
            if time.monotonic() > patience:  # somebody with other GPUs to choose from may wait for these
                _release(taken)
                time.sleep(2 * locks.LOOK)
                patience = _patience()
            taken |= _attempts(folder, [name for name in names if name not in taken], count - len(taken), jobs_per_gpu)
    _held.update(taken)
    os.environ[VISIBLE] = ",".join(taken)
    log.info("computes on %s", ", ".join(taken))
    return [*taken]


def _attempts(folder: Path, names: list[str], count: int, jobs: int) -> dict[str, Any]:
    """Locks of at most so many of the GPUs, by name."""
    found: dict[str, Any] = {}
    for slot, name in itertools.product(range(jobs), names):
        if len(found) < count and name not in found:
            file = locks.attempt(folder / f"{_UNFIT.sub('_', name)}.{slot}")
            found |= {name: file} if file is not None else {}
    return found


def _release(taken: dict[str, Any]) -> None:
    while taken:
        taken.popitem()[1].close()


def _patience() -> float:
    return time.monotonic() + random.uniform(60, 120)


def _folder() -> Path | None:
    """Where the locks of this user are: one place for all jobs of the machine, whose own TMPDIR may differ. None where
    somebody else made it, who could point its files elsewhere."""
    shared = Path("/tmp")
    folder = (shared if shared.is_dir() else Path(tempfile.gettempdir())) / f"haste-gpus-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = os.lstat(folder)
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
        return folder
    log.warning("%s is not a folder of this user alone: jobs are not kept apart on GPUs", folder)
    return None
