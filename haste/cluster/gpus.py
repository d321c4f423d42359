"""The GPUs of one machine, shared out among jobs: each takes free ones by locks that die with its process. No torch.

A cluster's own allocation, and a launcher that starts ranks, have already decided who computes where.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import os
import random
import re
import shutil
import stat
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from haste.files import locks
from haste.files.artefact import fingerprint

log = logging.getLogger("haste.cluster")

VISIBLE = "CUDA_VISIBLE_DEVICES"
SHARING = "HASTE_SHARING"  # set for jobs that Snakemake runs itself, also within an allocation of a cluster
_ANSWER = 30.0  # seconds that a driver may take to say which GPUs there are
_GPU = re.compile(r"GPU (\d+): (.*) \(UUID: (\S+)\)")
_UNFIT = re.compile(r"[^\w.-]")  # for the name of a file
_PART = re.compile(r"\s+MIG .*\(UUID: (\S+)\)")
_held: dict[str, Any] = {}  # GPU -> open lock file of this process, until it ends


def visible() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; none where nothing says which there are.

    Whole GPUs and parts of them (MIG) by their UUIDs; what the variable names in a way that cannot be translated, as it
    stands there.
    """
    found = _machine()
    if (said := os.environ.get(VISIBLE)) is None:
        return [part for _, _, parts in found for part in parts]
    asked = [word.strip() for word in said.split(",")]
    if "-1" in asked:  # CUDA reads up to the first that is none
        asked = asked[: asked.index("-1")]
    return [_uuid(word, found) for word in asked if word]


@dataclasses.dataclass(frozen=True)
class Equipment:
    """A GPU. gigabytes: 10^9 bytes of its memory; bf16: whether it computes in bfloat16 itself."""

    gigabytes: float
    bf16: bool


def equipment() -> list[Equipment]:
    """What the whole GPUs are that this process may use; empty where the driver does not say it, as for parts."""
    uuids, there = {uuid for _, uuid, _ in _machine()} & {*visible()}, []
    for line in _asked("--query-gpu=uuid,memory.total,compute_cap", "--format=csv,noheader,nounits") if uuids else ():
        uuid, mebibytes, capability = (word.strip() for word in line.split(","))
        if uuid in uuids:
            there.append(Equipment(int(mebibytes) * 2**20 / 1e9, float(capability) >= 8))
    return there


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


@functools.cache
def _machine() -> list[tuple[str, str, list[str]]]:
    """Each GPU's kind, UUID, and what of it can be used: itself, or its parts."""
    found: list[tuple[str, str, list[str]]] = []
    for line in _asked("-L"):
        if whole := _GPU.match(line):
            found.append((whole[2], whole[3], []))
        elif (part := _PART.match(line)) and found:
            found[-1][2].append(part[1])
    return [(kind, uuid, parts or [uuid]) for kind, uuid, parts in found]


def _asked(*options: str) -> list[str]:
    """The lines that the driver's tool answers; none where there is no such tool, or it fails."""
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        done = subprocess.run(["nvidia-smi", *options], capture_output=True, text=True, timeout=_ANSWER, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("nvidia-smi does not say which GPUs there are (%s): jobs are not kept apart", error)
        return []
    return done.stdout.splitlines()


def _uuid(word: str, machine: list[tuple[str, str, list[str]]]) -> str:
    """The UUID of what CUDA_VISIBLE_DEVICES names: a number, or the beginning of a UUID."""
    if word.isdigit():
        # CUDA numbers GPUs by their speed unless told otherwise, nvidia-smi by their slot: the same among equal ones.
        ordered = os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID" or len({kind for kind, *_ in machine}) == 1
        known = machine[int(word)] if ordered and int(word) < len(machine) else None
        return known[1] if known and known[2] == [known[1]] else word
    fits = [uuid for _, _, parts in machine for uuid in parts if uuid.startswith(word)]
    return fits[0] if len(fits) == 1 else word
