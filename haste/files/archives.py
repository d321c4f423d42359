"""Files in archives, read without unpacking. No torch.

An archive is a .zip or a .tar, or a folder of them, such as WebDataset shards, whose files are taken together. A .tar
that is compressed as a whole is refused: it has no random access.
"""

from __future__ import annotations

import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

SUFFIXES = (".zip", ".tar")
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
_END = bytes(512)  # follows the last file of a complete .tar
_MOST = 1 << 30  # most bytes of one file; more is not a picture
Parts = tuple[str, ...]


class Archives:
    """The files of an archive, or of a folder of archives, by their path as a tuple of parts.

    Attributes:
        names: every file's path in parts, without hidden ones, in arbitrary order.
    """

    def __init__(self, path: Path | str):
        """
        Raises:
            ValueError: not an archive, or one that is truncated, encrypted or compressed as a whole, or in which a
                file's path leads out of it or occurs twice; the message says which.
        """
        self._found: dict[Parts, tuple[_Zip | _Tar, zipfile.ZipInfo | tarfile.TarInfo]] = {}
        for file in _files(Path(path)):
            opened = _Zip(file) if file.suffix.lower() == ".zip" else _Tar(file)
            for name, entry in opened.entries():
                parts = _parts(file, name)
                if parts in self._found:
                    first = self._found[parts][0].path
                    again = "twice" if first == file else f"here and in {first.name}"
                    raise ValueError(f"{file}: {name!r} is {again}, expected every name once")
                if not any(part.startswith(".") for part in parts):  # macOS keeps ._NAME beside NAME
                    self._found[parts] = (opened, entry)
        self.names = list(self._found)

    def read(self, parts: Parts) -> bytes:
        """A file's content. Thread-safe.

        Raises:
            ValueError: it is damaged, or not a regular file.
        """
        archive, entry = self._found[parts]
        return archive.read(entry)  # type: ignore[arg-type]


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(entry for entry in path.iterdir() if entry.suffix.lower() in SUFFIXES and _seen(entry))
        if not found:
            raise ValueError(f"{path}: a folder without archives, expected {' or '.join(SUFFIXES)}")
        return found
    if path.name.lower().endswith(_COMPRESSED):
        raise ValueError(f"{path}: compressed as a whole, so it has no random access; expected a .tar")
    if path.suffix.lower() not in SUFFIXES or not path.is_file():
        found_instead = path.suffix or "no suffix" if path.is_file() else "nothing"
        raise ValueError(f"{path}: expected {', '.join(SUFFIXES)} or a folder of these, found {found_instead}")
    return [path]


def _seen(entry: Path) -> bool:
    return entry.is_file() and not entry.name.startswith(".")


def _parts(archive: Path, name: str) -> Parts:
    plain = name.replace("\\", "/")
    parts = tuple(part for part in plain.split("/") if part not in ("", "."))
    if plain.startswith("/") or ".." in parts or "\0" in plain or (parts and parts[0].endswith(":")):
        raise ValueError(f"{archive}: {name!r} leads out of the archive; it is not trusted")
    return parts


class _Zip:
    def __init__(self, path: Path):
        self.path = path
        try:
            self._archive = zipfile.ZipFile(path)
        except (OSError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path}: expected a .zip, found a truncated or foreign file ({error})") from error

    def entries(self) -> Iterator[tuple[str, zipfile.ZipInfo]]:
        for entry in self._archive.infolist():
            if entry.flag_bits & 1:
                raise ValueError(f"{self.path}: {entry.filename!r} is encrypted")
            if not entry.is_dir():
                yield entry.filename, entry

    def read(self, entry: zipfile.ZipInfo) -> bytes:
        """One picture's bytes. Raises ValueError where they cannot be had."""
        _check_size(entry.file_size)
        try:
            return self._archive.read(entry)
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError) as error:
            raise ValueError(f"damaged in the archive ({error})") from error


class _Tar:
    def __init__(self, path: Path):
        self.path = path
        try:
            self._file = open(path, "rb")  # noqa: SIM115 - kept open while pictures are read
            with tarfile.open(fileobj=self._file, mode="r:") as archive:
                self._entries = archive.getmembers()
                end = archive.offset
        except (OSError, tarfile.TarError) as error:
            raise ValueError(f"{path}: expected a .tar, found a truncated or foreign file ({error})") from error
        if os.pread(self._file.fileno(), len(_END), end) != _END:
            raise ValueError(f"{path}: truncated after {len(self._entries)} entries, it has no end")

    def entries(self) -> Iterator[tuple[str, tarfile.TarInfo]]:
        return ((entry.name, entry) for entry in self._entries if not entry.isdir())

    def read(self, entry: tarfile.TarInfo) -> bytes:
        """One picture's bytes. Raises ValueError where they cannot be had."""
        if not entry.isreg() or entry.issparse():
            raise ValueError("a link in the archive, or no regular file")
        _check_size(entry.size)
        found = os.pread(self._file.fileno(), entry.size, entry.offset_data)  # no shared file position, so thread-safe
        if len(found) != entry.size:
            raise ValueError("the archive was truncated since it was opened")
        return found


def _check_size(size: int) -> None:
    if size > _MOST:
        raise ValueError(f"{size} bytes in the archive, expected at most {_MOST}")
