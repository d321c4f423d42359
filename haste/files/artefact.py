"""What all files of the project have in common: a key, an atomic write, and provenance.

Nothing here depends on the files' content, and nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fnmatch
import functools
import hashlib
import json
import os
import platform
import re
import resource
import shutil
import socket
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from haste import extensions

SCHEMA = 1
FULL = (errno.ENOSPC, errno.EDQUOT)  # errors of a full disk or quota
_PART = re.compile(r"\.(?P<name>.+)\.(?P<process>\d+)@(?P<host>.*)\.[0-9a-f]{8}\.part$")  # of `aside_of`
_SILENT = 24 * 3600.0  # seconds without a change after which a file that another machine was writing is abandoned
LIBRARIES = ("torch", "timm", "diffusers", "torch-fidelity", "torchdiffeq", "numpy", "h5py", "snakemake", "safetensors")


def canonical(obj: Any) -> str:
    """JSON with sorted keys and no spaces: equal objects give equal text, NaN is refused."""
    return json.dumps(obj, sort_keys=True, separators=(",", ":"), allow_nan=False)


def fingerprint(obj: Any, length: int = 12) -> str:
    """The first `length` hexadecimal digits of the sha256 of an object's canonical JSON."""
    return hashlib.sha256(canonical(obj).encode()).hexdigest()[:length]


def file_identity(path: Path | str) -> str:
    """The sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remembered_identity(path: Path | str, memory: Path | str) -> str:
    """`file_identity`, cached: a file is read again only after it changed.

    A file's size, times and inode show whether it changed; the time of the last change is set by the kernel and not by
    the writer. A deleted file keeps its last identity: what was made from it stays valid.

    Args:
        path: the file.
        memory: the JSON file in which identities are kept; not required to be writable.

    Raises:
        ValueError: there is no such file, and none was recorded before.
    """
    return _remember(path, memory)["sha256"]


def changed_identity(path: Path | str, memory: Path | str) -> str:
    """The identity of a file whose content is not what it was when first remembered; "" while it is.

    Arguments and errors as `remembered_identity`.
    """
    found = _remember(path, memory)
    return "" if found["sha256"] == found.get("first", found["sha256"]) else found["sha256"]


def _remember(path: Path | str, memory: Path | str) -> dict[str, Any]:
    place, known = os.path.abspath(path), _remembered(memory)
    if not os.path.isfile(place):
        if place in known:
            return known[place]
        raise ValueError(f"{path}: expected a file, found {'a folder' if os.path.isdir(place) else 'nothing'}")
    found = os.stat(place)
    mark = [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
    before = known.get(place, {})
    if before.get("mark") != mark:
        now = file_identity(place)  # it takes a while, in which others may have written theirs
        before = _remembered(memory).get(place, before)
        first = before.get("first", before.get("sha256", now))
        return remember(place, {"mark": mark, "sha256": now, "first": first}, memory)
    return before


def remember(name: str, entry: dict[str, Any], memory: Path | str) -> dict[str, Any]:
    """Keep what is known of a file among the identities, under its absolute path or its id. Returns it."""
    with contextlib.suppress(OSError):
        files = {**_remembered(memory), name: entry}
        write_json(memory, {"schema": SCHEMA, "kind": "identities", "files": files})
    return entry


def remembered(name: str, memory: Path | str) -> dict[str, Any] | None:
    """What `remember` kept."""
    return _remembered(memory).get(name)


def remembered_below(path: Path | str, memory: Path | str) -> set[str]:
    """The files that were remembered at a path or below it, absolute, also those that are gone since."""
    place = Path(os.path.abspath(path))
    return {file for file in _remembered(memory) if Path(file).is_relative_to(place)}


def _remembered(memory: Path | str) -> dict[str, dict[str, Any]]:
    try:
        return read_json(memory, "identities")["files"]
    except (ValueError, KeyError):  # missing or broken: everything is read again
        return {}


def _sync_folder(folder: Path) -> None:
    # A rename is durable only once its folder is flushed.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network and FUSE file systems refuse it for a folder
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync(path: Path) -> None:
    with open(path, "rb+") as file:
        if os.fstat(file.fileno()).st_mode & 0o777 == 0o600:  # safetensors' doing: colleagues could not read it
            mask = os.umask(0o077)
            os.umask(mask)
            with contextlib.suppress(OSError):  # a file system without modes
                os.fchmod(file.fileno(), 0o666 & ~mask)
        os.fsync(file.fileno())


@contextlib.contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path` for a file or a folder, and rename it to `path` once everything is on disk.

    If the block raises, what was written is removed and `path` is unchanged. A killed process leaves the temporary
    path behind, which no reader opens and `sweep` removes.

    Raises:
        OSError: the folder cannot be written, or the disk is full; `path` is then unchanged.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = aside_of(path)
    try:
        yield aside
        for file in [aside] if aside.is_file() else [p for p in aside.rglob("*") if p.is_file()]:
            _sync(file)
        if aside.is_dir():
            _sync_folder(aside)
        if aside.is_dir() and path.is_dir():  # os.replace cannot replace a folder that is not empty
            old = aside_of(path)
            os.replace(path, old)
            os.replace(aside, path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(aside, path)
        _sync_folder(path.parent)
    except OSError as error:  # for a full disk, Python names neither the file nor the folder
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
    finally:
        if aside.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.unlink(missing_ok=True)


@contextlib.contextmanager
def saving_tensors(path: Path | str) -> Iterator[None]:
    """Turn safetensors' error for a failed write into an OSError that names `path`, with its errno."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        if (code := re.search(r"os error (\d+)", str(error))) is None:
            raise OSError(f"{path}: could not be written: {error}") from error
        raise OSError(int(code[1]), f"could not be written: {os.strerror(int(code[1]))}", str(path)) from error


def aside_of(path: Path) -> Path:
    """A new temporary name beside `path`, which says whose it is: `.NAME.PROCESS@HOST.XXXXXXXX.part`."""
    return path.parent / f".{path.name}.{os.getpid()}@{_host()}.{uuid.uuid4().hex[:8]}.part"


def _host() -> str:
    return re.sub(r"[^\w.-]", "-", socket.gethostname())[:40]


def tidy(folder: Path | str) -> None:
    """Before a workflow starts: `sweep` a folder and all below it, and date what comes from the future now.

    Snakemake refuses an output that is older than an input, which may come from a machine whose clock is ahead.
    """
    now = time.time()
    for place, folders, files in os.walk(folder):  # which passes over what others remove meanwhile
        for name in files:
            with contextlib.suppress(OSError):  # gone meanwhile, or another user's
                if os.stat(os.path.join(place, name)).st_mtime > now:
                    os.utime(os.path.join(place, name))
        if any(name.endswith(".part") for name in (*folders, *files)):
            sweep(place)


def sweep(folder: Path | str, *, of: str | None = None, locked: bool = False) -> None:
    """Remove temporary files and folders of dead writers; those of living ones stay.

    Without a lock, a writer of this machine is dead if there is no such process, and one of another machine (or of an
    earlier version, whose names say nothing) if nothing changed for a day.

    Args:
        folder: where they lie.
        of: the name of a file or folder whose lock the caller holds: whoever wrote it is dead.
        locked: the caller holds the folder's lock: whoever wrote here is dead.
    """
    # with `locked` also what safetensors writes before it renames it to ours
    patterns = (".*.part", ".tmp??????") if locked else (".*.part",)
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):  # gone meanwhile
        return
    for path in (Path(folder, name) for name in names if any(fnmatch.fnmatch(name, one) for one in patterns)):
        told = _PART.match(path.name)
        if not (locked or (told and told["name"] == of) or _is_abandoned(path, told)):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _is_abandoned(path: Path, told: re.Match | None) -> bool:
    if told is not None and told["host"] == _host():
        try:
            os.kill(int(told["process"]), 0)
        except ProcessLookupError:
            return True
        except OSError:  # another user's
            pass
        return False
    try:
        return time.time() - path.stat().st_mtime > _SILENT
    except FileNotFoundError:
        return False


def write_json(path: Path | str, obj: Mapping[str, Any]) -> None:
    """Write an object as indented JSON, atomically, keeping the order of keys."""
    text = json.dumps(obj, indent=1, allow_nan=False)  # keys unsorted: the order of a table matters
    with replacing(path) as aside:
        aside.write_text(text + "\n")


def read_json(path: Path | str, kind: str) -> dict[str, Any]:
    """Read a JSON artefact and check that it is one of ours, of this schema and this kind.

    Raises:
        ValueError: missing, truncated, foreign, of another kind or another schema; the message names the file,
            what was found and what was expected.
    """
    try:
        text = Path(path).read_text()
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected a {kind} file, found {type(error).__name__}") from error
    try:
        obj = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected a {kind} file, found broken JSON of {len(text)} characters") from error
    check_header(path, obj, kind)
    return obj


def check_header(path: Path | str, header: Any, kind: str) -> None:
    """Refuse a header that is not ours, of another kind, or of another schema."""
    header = header if isinstance(header, Mapping) else {}
    if header.get("kind") != kind or "schema" not in header:
        raise ValueError(f"{path}: expected kind {kind!r}, found {header.get('kind', 'a foreign file')!r}")
    if header["schema"] != SCHEMA:
        age = "older" if str(header["schema"]) < str(SCHEMA) else "newer"
        raise ValueError(f"{path}: schema {header['schema']} is {age} than this version reads ({SCHEMA})")


def check_entries(path: Path | str, found: Any, **expected: type) -> None:
    """Refuse a file that lacks a required entry, or has one of another type.

    Args:
        path: the file, for the message.
        found: its content.
        expected: entry -> its type.

    Raises:
        ValueError: the message names the first such entry, what was found and what was expected.
    """
    for name, kind in expected.items():
        value = found.get(name) if isinstance(found, Mapping) else None
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            text = "nothing" if value is None else repr(value)[:80]
            raise ValueError(f"{path}: damaged or edited: {name!r} is {text}, expected {kind.__name__}")


@functools.cache
def code_version() -> dict[str, str]:
    """The package's version and a hash of its sources, which distinguishes an edited checkout from a release."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]  # the whole package
    for source in sorted(root.rglob("*.py")):
        digest.update(str(source.relative_to(root)).encode() + b"\0" + source.read_bytes())
    try:
        version = metadata.version("haste")
    except metadata.PackageNotFoundError:
        version = "uninstalled"
    return {"version": version, "source": digest.hexdigest()[:12]}


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **_libraries(), **extensions.packages()}


@functools.cache  # it takes 0.2 s
def _libraries() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _hardware() -> dict[str, Any]:
    found: dict[str, Any] = {"host": socket.gethostname(), "machine": platform.machine(), "cpus": os.cpu_count()}
    torch = sys.modules.get("torch")  # only if it is already loaded
    if torch is not None:
        found["threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            found["gpu"] = torch.cuda.get_device_name()
    return found


def provenance(
    *,
    key: str | None = None,
    recipe: Any = None,
    inputs: Mapping[str, str] | None = None,
    seconds: float | None = None,
) -> dict[str, Any]:
    """How an artefact was made: code, versions, hardware, command, time, and the identities of its inputs.

    Args:
        key: the hash that names the artefact.
        recipe: the object whose hash is the key.
        inputs: name of each input -> its content identity.
        seconds: wall time of making it.
    """
    return {
        "code": code_version(),
        "versions": _versions(),
        "hardware": _hardware(),
        "command": sys.argv,
        "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "key": key,
        "recipe": recipe,
        "inputs": dict(inputs or {}),
        "seconds": None if seconds is None else round(seconds, 3),
    }
