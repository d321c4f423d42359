"""Copies of the stores that a training job reads on its node's own disk, for slow shared file systems. No torch.

    SCRATCH/haste-UID/STORE-IDENTITY/      a copy; it gets this name once it is complete and every sample is checked
    SCRATCH/haste-UID/STORE-IDENTITY.lock  held, shared, by every process that reads it
    SCRATCH/haste-UID/lock                 held by a process that checks, makes or removes copies

All processes of a node share one copy, also those of several jobs; the last user removes it. The kernel releases locks
when a process dies, so copies of dead jobs are recognised, and the next process that acquires or releases removes them.
"""

from __future__ import annotations

import contextlib
import copy as copying
import dataclasses
import logging
import os
import shutil
import stat
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from haste.files import artefact, locks
from haste.files.store import MANIFEST, Store, shard_path
from haste.files.units import duration, readable
from haste.plan.names import Artefact, State
from haste.plan.plan import Plan

log = logging.getLogger("haste.cluster")

VARIABLES = ("SLURM_TMPDIR", "TMPDIR")  # where sites name a job's own folder on the node
WORKERS = 4  # files copied at once: a network file system is faster with several readers
CHUNK = 16 * 2**20  # bytes between two checks for an interruption
LOOK = 0.2  # seconds between two attempts to lock
SHOWN_EVERY = 10.0  # seconds between lines of the log
LEAVING = 30.0  # seconds that a release waits for the lock; whoever holds it longer is copying, and cleans up later

FLIPPED = "flipped latents"

Check = Callable[[], bool]


class _Interrupted(Exception):  # noqa: N818 - not an error
    """Waiting, or copying, was abandoned."""


@contextlib.contextmanager
def staged(plan: Plan, state: State, setting: str, interrupted: Check = lambda: False) -> Iterator[Plan]:
    """A plan whose stores are on this node's disk during the block.

    Args:
        plan: the configuration's plan.
        state: the state that is trained.
        setting: `true`, `false`, or a folder that may contain $VARIABLES of the node.
        interrupted: polled while copying; if true, the copy is abandoned and the stores are read where they are.

    Raises:
        ValueError: there is no such folder, too little room, or the copy does not match the manifest.
        OSError: a file cannot be read or written.
    """
    scratch = scratch_of(setting)
    if scratch is None or Path(plan.path(state)).exists():
        yield plan
        return
    place = scratch / f"haste-{os.getuid()}"
    with contextlib.ExitStack() as held:
        held.callback(_release, place)  # last, after the locks below are released
        try:
            near = _acquire(plan, wanted(plan, state), place, held, interrupted)
        except _Interrupted:
            log.info("interrupted while copying to %s: the stores are read where they are", place)
            near = plan
        yield near


def scratch_of(setting: str) -> Path | None:
    """The folder on this node that a setting means; None for no copies.

    Raises:
        ValueError: no such folder on this node.
    """
    if setting.lower() == "false":
        return None
    if setting.lower() == "true":
        found = next((os.environ[name] for name in VARIABLES if os.environ.get(name)), None)
        if found is None:
            raise ValueError(f"stage_in: neither {' nor '.join(VARIABLES)} is set on this node; name a folder instead")
    else:
        found = os.path.expandvars(setting)
    folder = Path(found)
    if "$" in found or not folder.is_absolute() or not folder.is_dir():
        raise ValueError(f"stage_in: {setting} is {found} on this node, expected an absolute path to a folder")
    return folder


def wanted(plan: Plan, state: State) -> dict[str, Artefact]:
    """The stores that the job of a state reads, by their name in messages: images and targets only while it aligns."""
    segment = plan.segment(state)
    images = {"images": plan.images} if segment.teachers else {}
    images |= {"text": plan.text} if plan.text else {}
    images |= {FLIPPED: plan.flipped} if plan.flipped and plan.trajectories[state.trajectory].flips else {}
    return {"latents": plan.latents, **images, **{f"targets of {name}": plan.targets[name] for name in segment.targets}}


# -- acquiring and releasing -------------------------------------------------------------------------------------------


def _acquire(
    plan: Plan, stores: Mapping[str, Artefact], place: Path, held: contextlib.ExitStack, interrupted: Check
) -> Plan:
    manifests = {what: artefact.read_json(made.manifest, "store") for what, made in stores.items()}
    copies = {
        what: place / f"{Path(made.folder).name}-{manifests[what]['identity'][:12]}" for what, made in stores.items()
    }
    with _locked(place / "lock", interrupted):
        _clear(place, keep={path.name for path in copies.values()})
        for path in copies.values():
            held.enter_context(_locked(_lock_of(path), interrupted, shared=True))
        missing = [what for what in stores if not _whole(copies[what], manifests[what])]
        _check_room(place, {what: _bytes(manifests[what]) for what in missing})
        for what in missing:
            _copy(what, Path(stores[what].folder), copies[what], manifests[what], interrupted)
    log.info("%s: read from copies in %s", " and ".join(stores), place)
    return _reading(plan, copies)


def _release(place: Path) -> None:
    limit = time.monotonic() + LEAVING
    with (
        contextlib.suppress(_Interrupted, OSError),
        _locked(place / "lock", lambda: time.monotonic() > limit),
    ):
        _clear(place)


def _clear(place: Path, keep: Collection[str] = ()) -> None:
    """Remove the copies that nobody reads, and the folder if none is left. The caller must hold its lock."""
    artefact.sweep(place, locked=locks.taken())
    for lock in place.glob("*.lock"):
        if lock.stem in keep:
            continue
        if (file := locks.attempt(lock)) is not None:
            with file:
                shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
                lock.unlink()
    if not keep and {path.name for path in place.iterdir()} == {"lock"}:
        (place / "lock").unlink()
        place.rmdir()


def _lock_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


@contextlib.contextmanager
def _locked(path: Path, give_up: Check, *, shared: bool = False) -> Iterator[None]:
    """Hold a lock on a file that others may remove while we wait for it.

    Raises:
        _Interrupted: `give_up` became true first.
        ValueError: its folder belongs to another user.
    """
    said = False
    while (file := _try(path, shared)) is None:
        if give_up():
            raise _Interrupted
        if not said:
            log.info("waiting for another process in %s", path.parent)
        said = True
        time.sleep(LOOK)
    with file:
        yield


def _try(path: Path, shared: bool) -> Any:
    """The open file that holds a lock; None if another process holds or removed it."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    owner = os.lstat(path.parent)
    if owner.st_uid != os.getuid() or not stat.S_ISDIR(owner.st_mode):  # scratch is often shared by all users
        raise ValueError(f"stage_in: {path.parent} is of user {owner.st_uid}, expected a folder of our own")
    return locks.attempt(path, shared=shared)


# -- copying -----------------------------------------------------------------------------------------------------------


def _bytes(manifest: Mapping[str, Any]) -> int:
    return sum(entry["bytes"] for entry in manifest["shards"])


def _check_room(place: Path, sizes: Mapping[str, int]) -> None:
    free, needed = shutil.disk_usage(place).free, sum(sizes.values())
    if needed > free:
        each = " and ".join(f"{what} {size:,}" for what, size in sizes.items())
        raise ValueError(
            f"stage_in: {place.parent} has {free:,} bytes free, but {needed:,} are needed ({each}). Name another "
            "folder, ask for nodes with more (slurm_extra: --tmp=...), or leave stage_in out"
        )


def _whole(path: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether a copy exists and fits its source. Its samples were checked before it got its name."""
    if not path.exists():
        return False
    try:
        with Store.open(path, kind=manifest["store"], key=manifest["key"]) as store:
            return store.identity == manifest["identity"]
    except (ValueError, OSError) as error:
        log.warning("the copy is made again: %s", error)
        return False


def _copy(what: str, source: Path, target: Path, manifest: Mapping[str, Any], interrupted: Check) -> None:
    shards, began = len(manifest["shards"]), time.monotonic()
    names = [MANIFEST, *(shard_path("", number, shards).name for number in range(shards))]
    log.info("copying %s, %s, to %s", what, readable(_bytes(manifest)), target)
    shown = _Progress(what, _bytes(manifest) + (source / MANIFEST).stat().st_size)
    with artefact.replacing(target) as aside:
        aside.mkdir()
        with ThreadPoolExecutor(WORKERS) as pool:
            for _ in pool.map(lambda name: _copy_file(source / name, aside / name, interrupted, shown.add), names):
                pass
        log.info("%s: copied in %s, comparing every sample with its digest", what, duration(time.monotonic() - began))
        try:
            Store.open(aside, kind=manifest["store"], key=manifest["key"], verify="full").close()
        except ValueError as error:
            raise ValueError(f"stage_in: the copy of {source} is damaged, or its source is: {error}") from error
    log.info("%s: copied and checked in %s", what, duration(time.monotonic() - began))


class _Progress:
    """Logs now and then how much of a copy is done, and how long the rest will take. Thread-safe."""

    def __init__(self, what: str, whole: int):
        self.what, self.whole, self.done = what, whole, 0
        self.began = self.shown = time.monotonic()
        self._lock = threading.Lock()

    def add(self, size: int) -> None:
        """Count copied bytes."""
        with self._lock:
            self.done += size
            now = time.monotonic()
            if now - self.shown < SHOWN_EVERY:
                return
            self.shown = now
            to_go = (now - self.began) / self.done * (self.whole - self.done)
            done, whole = readable(self.done), readable(self.whole)
            log.info("%s: %s of %s copied, %s to go", self.what, done, whole, duration(max(0.0, to_go)))


def _copy_file(source: Path, target: Path, interrupted: Check, copied: Callable[[int], None]) -> None:
    with open(source, "rb") as have, open(target, "xb") as into:
        while part := have.read(CHUNK):
            if interrupted():
                raise _Interrupted
            into.write(part)
            copied(len(part))


def _reading(plan: Plan, copies: Mapping[str, Path]) -> Plan:
    """The plan, with stores read from copies."""
    near = copying.copy(plan)
    near.latents = _at(plan.latents, copies.get("latents"))
    near.flipped = _at(plan.flipped, copies.get(FLIPPED)) if plan.flipped else None
    near.text = _at(plan.text, copies.get("text")) if plan.text else None
    near.images = _at(plan.images, copies.get("images"))
    near.targets = {name: _at(made, copies.get(f"targets of {name}")) for name, made in plan.targets.items()}
    return near


def _at(made: Artefact, place: Path | None) -> Artefact:
    return made if place is None else dataclasses.replace(made, folder=str(place))
