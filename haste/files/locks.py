"""Locks: one process at a time, on one machine or on all that share a disk. The kernel frees what a dead process held.

    results/.lock                 shared by every workflow in the folder; `haste prune` takes it alone
    results/NAME/.lock            the workflow of a configuration, which Snakemake's main process holds
    results/states/NAME/lock      whoever trains a trajectory
    FOLDER/.locks/NAME            whoever makes FOLDER/NAME: a shard, a manifest, a part, samples, a score

No torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import fcntl
import functools
import logging
import os
import re
import socket
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from haste.files import artefact

log = logging.getLogger("haste.files")

SETTING = "HASTE_LOCKS"  # "none" takes no locks
MOST_WORDS = 400  # characters of a command that a lock file has
LOOK = 0.5  # seconds between two attempts to lock
Ask = Callable[[Callable[[], bool]], bool]
_HELD = (errno.EWOULDBLOCK, errno.EACCES)


class InUse(ValueError):  # noqa: N818 - what it says to the user
    """Another process holds a lock; the message says which, since when, and on which host."""


@contextlib.contextmanager
def holding(path: Path | str, what: str) -> Iterator[None]:
    """Hold an exclusive lock on a file during a block.

    Raises:
        InUse: another process holds it.
        ValueError: the disk has no locks.
    """
    with acquire(path, what):
        yield


def _alone(question: Callable[[], bool]) -> bool:
    return question()


@contextlib.contextmanager
def waiting(path: Path | str, what: str, ask: Ask = _alone) -> Iterator[bool]:
    """As `holding`, after waiting for whoever holds it and logging who that is. Yields whether there was a wait. With
    `ask`, as `making` has it, one process holds it for all."""
    waited = False
    with contextlib.ExitStack() as held:

        def took() -> bool:
            lock = attempt(path)
            return lock is not None and bool(held.enter_context(lock))

        while not ask(took):
            if not waited:
                log.info("waiting for %s: it is in use by %s", what, _words(path))
            waited = True
            time.sleep(LOOK)
        yield waited


@contextlib.contextmanager
def making(
    path: Path | str, *, done: Path | str | None = None, anew: bool = False, ask: Ask = _alone
) -> Iterator[bool]:
    """Hold the lock of a file or folder that is to be made, after waiting for whoever makes it; remove leftovers of
    killed makers.

    Args:
        path: what is made.
        done: the file whose presence means that it is finished, if that is not `path`.
        anew: whether it is made again although it is there, unless another process made it during the wait.
        ask: of processes that make it together, each of which calls this: gives all of them what one of them finds.
            That one holds the lock. It is asked again and again during a wait, so that nobody waits long for an answer.

    Yields:
        Whether it is still to be made.
    """
    path, done = Path(path), Path(done or path)
    lock, before, mine = path.parent / ".locks" / path.name, _mark(done), list[Path]()

    def to_do() -> bool:
        mine.append(lock)
        artefact.sweep(path.parent, of=path.name if taken() else None)
        other = _mark(done) not in (None, before)
        found = not done.exists() or (anew and not other)
        if not found:
            log.info("%s: is there, %s", path, "made by another process meanwhile" if other else "nothing to make")
        return found

    with waiting(lock, str(path), ask):
        try:
            yield ask(to_do)
        finally:
            for one in mine:
                one.unlink(missing_ok=True)  # `attempt` notices
                with contextlib.suppress(OSError):  # others are in it
                    one.parent.rmdir()


def _mark(path: Path) -> tuple[int, int] | None:
    """What differs when a file is written again."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


class Held:
    """A lock, until it is closed or this process ends. Then its file names nobody; a killed one's still does."""

    def __init__(self, file: Any):
        self.close = weakref.finalize(self, _leave, file, os.getpid())

    def __enter__(self) -> Held:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _leave(file: Any, owner: int) -> None:
    with contextlib.suppress(OSError):
        if owner == os.getpid():  # a forked process has the file too
            file.truncate(0)
    file.close()


def acquire(path: Path | str, what: str, *, shared: bool = False) -> Held:
    """Take a lock, which is held until it is closed.

    Raises:
        InUse, ValueError: as `holding`.
    """
    if (file := attempt(path, shared=shared)) is None:
        raise InUse(f"{what} is in use (lock {path}) by {_words(path)}. Wait for it, or stop it first.")
    return file


def attempt(path: Path | str, *, shared: bool = False) -> Held | None:
    """A lock; None if another process holds it, or has just removed it.

    Raises:
        ValueError: the disk has no locks.
    """
    path = Path(path)
    # `making` removes lock and folder behind itself: then this is tried again.
    with contextlib.suppress(FileNotFoundError, FileExistsError), contextlib.ExitStack() as opened:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = opened.enter_context(open(path, "a+"))
        if not _flock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, path.parent):
            return None
        if os.stat(path).st_ino == os.fstat(file.fileno()).st_ino:
            if not shared:
                file.truncate(0)
                try:
                    os.write(file.fileno(), f"{_me()}\n".encode())
                except OSError as error:  # a full disk: Python does not say which
                    raise OSError(error.errno, os.strerror(error.errno or 0), str(path)) from error
            opened.pop_all()
            return Held(file)
    return None


def _flock(file: Any, how: int, folder: Path) -> bool:
    if not taken():
        _without_locks(folder)
        return True
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
        return True
    except OSError as error:
        if error.errno in _HELD:
            return False
        raise ValueError(
            f"{folder}: this disk has no locks (flock: {error.strerror}), so two processes could write the same file. "
            "Use another disk for the results, or have this one mounted with locks (Lustre: flock, NFS: lock). Or "
            f"set {SETTING}=none, and make sure yourself that one workflow at a time uses this folder"
        ) from error


def taken() -> bool:
    return os.environ.get(SETTING) != "none"


@functools.cache
def _without_locks(folder: Path) -> None:
    log.warning("%s: no locks are taken, as %s=none says: one process at a time may write here", folder, SETTING)


def _me() -> str:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    job = f" (job {os.environ['SLURM_JOB_ID']})" if "SLURM_JOB_ID" in os.environ else ""
    return f"process {os.getpid()} on {socket.gethostname()} since {now}{job}: {' '.join(sys.argv)[:MOST_WORDS]}"


def _words(path: Path | str) -> str:
    try:
        return Path(path).read_text().strip() or "an unknown process"
    except OSError:
        return "an unknown process"


@dataclasses.dataclass(frozen=True)
class Holder:
    """Who holds a lock, by its file; at_work: whether that process still runs, None if it is on another machine. Who
    does not run was killed: others leave their locks empty."""

    who: str
    at_work: bool | None

    @property
    def since(self) -> float:
        """When it took the lock, in seconds since 1970; 0 if its file does not say."""
        try:
            return datetime.datetime.fromisoformat(self.who.split(" since ")[1].split()[0].rstrip(":")).timestamp()
        except (IndexError, ValueError):
            return 0.0

    @property
    def configuration(self) -> str:
        """The configuration whose job it is; empty of a command that a person gave."""
        found = re.search(r" -c (?:\S*/)?([^/\s]+)/config\.json", self.who)
        return found[1] if found else ""


def holder(path: Path | str) -> Holder | None:
    """Who holds a lock, without acquiring it: an attempt to acquire it could make another process's attempt fail.

    Returns:
        None if nobody ever held it, or if the holder released it.
    """
    try:
        who = Path(path).read_text().strip()
        place = os.stat(path)
        told = re.match(r"process (\d+) on (\S+) since \S+(?: \(job \S+\))?: ?(.*)", who)
        if told is None:
            return None
        if told[2] != socket.gethostname():
            return Holder(who, None)
        # Lines as "1: FLOCK  ADVISORY  WRITE 4711 fe:00:2146314 0 EOF"; one that waits has an arrow in it.
        held = [line.split() for line in Path("/proc/locks").read_text().splitlines() if "->" not in line]
    except (OSError, UnicodeDecodeError):  # no such lock, or the kernel has no such list
        return None
    mine = any(words[1] == "FLOCK" and words[5].rpartition(":")[2] == str(place.st_ino) for words in held)
    return Holder(who, mine or _runs(told[1], told[3]))


def _runs(process: str, command: str) -> bool:
    """Whether a process of this machine is the one of this command, although it has no lock: where none are taken."""
    try:
        words = Path("/proc", process, "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
    except OSError:
        return False
    return bool(command) and command in words
