"""The NVIDIA GPUs that the driver of this machine has, and which of them this process may use. No torch.

torch may be unable to use them: see `haste.networks.devices`.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import re
import shutil
import subprocess

log = logging.getLogger("haste.networks")

VISIBLE = "CUDA_VISIBLE_DEVICES"
_ANSWER = 30.0  # seconds that a driver may take to say which GPUs there are
_GPU = re.compile(r"GPU (\d+): (.*) \(UUID: (\S+)\)")
_ABOUT = re.compile(r"(\S+), (\d+), ([\d.]+)$")  # UUID, MiB, capability; a GPU without memory of its own says [N/A]
_PART = re.compile(r"\s+MIG .*\(UUID: (\S+)\)")


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
    """A GPU. gigabytes: its memory as makers count it, in 2^30 bytes; bf16: whether it computes in bfloat16 itself."""

    gigabytes: float
    bf16: bool


def equipment() -> list[Equipment]:
    """What the whole GPUs are that this process may use; empty where the driver does not say it, as for parts."""
    uuids, there = {uuid for _, uuid, _ in _machine()} & {*visible()}, []
    for line in _asked("--query-gpu=uuid,memory.total,compute_cap", "--format=csv,noheader,nounits") if uuids else ():
        if (said := _ABOUT.match(line)) and said[1] in uuids:
            there.append(Equipment(int(said[2]) / 1024, float(said[3]) >= 8))
    return there


def unused(cuda: str | None) -> str:
    """Why networks should not compute on the CPU where torch has no GPU, in words; empty where there is none to use.

    cuda: the version of CUDA that torch was built with; None is a build for CPUs.
    """
    machine = _machine()
    known = {part for _, _, parts in machine for part in parts}.union(map(str, range(len(machine))))
    if not (there := [name for name in visible() if name in known]):
        return ""
    why = "this torch was built without CUDA. Install one that has it"
    if cuda is not None:
        version = next(iter(_asked("--query-gpu=driver_version", "--format=csv,noheader")), "of unknown version")
        why = f"the driver ({version}) is probably too old for torch's CUDA {cuda}. Update the driver"
    found = "a GPU" if len(there) == 1 else f"{len(there)} GPUs"
    return f"nvidia-smi lists {found} for this process, but torch can use none: {why}"


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
