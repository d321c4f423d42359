"""Files in archives, read without unpacking. No torch.

An archive is a .zip or a .tar, or a folder of them, such as WebDataset shards or one .tar a class, whose files are
taken together; a .tar in a .tar is read as it lies there, as ImageNet is handed out. A .tar that is compressed as a
whole is refused: it has no random access.
"""

from __future__ import annotations

import os
import resource
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from haste.files.walk import EMPTY, HIDDEN, PICTURES, Directory, Parts, Unused, is_hidden, why_unreadable

SUFFIXES = (".zip", ".tar")
MOST = 1 << 30  # most bytes of one file; more is not a picture
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
_BLOCK = 512  # bytes; one of zeros follows the last file of a complete .tar
_MANY = 1 << 20  # bytes of zeros read at once
_DAMAGED = (
    *(zipfile.BadZipFile, zlib.error, tarfile.TarError, EOFError, OSError, RuntimeError, ValueError, IndexError),
    *(KeyError, OverflowError, MemoryError),
)


class Archives:
    """The files of an archive, or of a folder of archives, by their path as a tuple of parts.

    An archive that is not the only one is a folder of that path, called as its file is.

    Attributes:
        root: the archive, or the folder of archives.
        files: the archives.
        names: every file's path, in arbitrary order.
        unused: names of what is not used, each with its reason.
    """

    def __init__(self, path: Path | str):
        """
        Raises:
            ValueError: not an archive, or one that is truncated, encrypted or compressed as a whole, or in which a
                file's path leads out of it or occurs twice; the message says which.
        """
        self.root = Path(path)
        self.unused: Unused = []
        self._found: dict[Parts, tuple[_Zip | _Tar, Any, int]] = {}  # archive, entry, depth of the archive
        self.files = self._archives()
        for file in self.files:
            opened = _Zip(file) if file.suffix.lower() == ".zip" else _Tar(file)
            self._add(opened, () if file == self.root else (file.name,))
        self.names = list(self._found)

    def inner(self, parts: Parts) -> Parts:
        """A file's path inside its archive."""
        return parts[self._found[parts][2] :]

    def read(self, parts: Parts) -> bytes:
        """A file's content. Thread-safe.

        Raises:
            ValueError: it is empty, damaged, or not a regular file.
        """
        archive, entry, _ = self._found[parts]
        if not (content := archive.read(entry)):
            raise ValueError(EMPTY)
        return content

    def size(self, parts: Parts) -> int:
        """A file's size in bytes; -1 for a link."""
        archive, entry, _ = self._found[parts]
        return archive.size(entry)

    def _archives(self) -> list[Path]:
        path = self.root
        if path.is_dir():
            inside = Directory(path)
            found = [name for name in inside.names if len(name) == 1 and not _beside(path, name)]
            rest = {*inside.names} - {*found}
            self.unused += [*inside.unused, *(("/".join(name), _beside(path, name)) for name in rest)]
            if not found:
                deeper = next((f"; they are in {name[0]}" for name in inside.names if _is_archive(name[-1])), "")
                raise ValueError(f"{path}: a folder without archives, expected {' or '.join(SUFFIXES)}{deeper}")
            _allow_open_files(len(found))
            return sorted(path.joinpath(*name) for name in found)
        if path.name.lower().endswith(COMPRESSED):
            raise ValueError(
                f"{path}: compressed as a whole, so that no picture can be read without all before it; expected a "
                ".tar. Undo the compression, as gunzip does for .gz"
            )
        if not _is_archive(path.name) or not path.is_file():
            found_instead = path.suffix or "no suffix" if path.is_file() else "nothing"
            raise ValueError(f"{path}: expected {', '.join(SUFFIXES)} or a folder of these, found {found_instead}")
        return [path]

    def _add(self, archive: _Zip | _Tar, place: Parts) -> None:
        entries: list[tuple[str, Any]] = list(archive.entries())
        tars_alone = not any(name.lower().endswith(PICTURES) for name, _ in entries)
        for name, entry in entries:
            parts = (*place, *_parts(archive.path, name))
            if parts in self._found:
                raise ValueError(f"{archive.path}: {name!r} is twice, expected every name once")
            if len(parts) == len(place):
                self.unused.append((f"{archive.path.name}:{name}", "a file without a name"))
            elif any(is_hidden(part) for part in parts[len(place) :]):
                self.unused.append(("/".join(parts), HIDDEN))
            elif isinstance(archive, _Tar) and tars_alone and (inside := archive.nested(name, entry)):
                self._add(inside, parts)
            else:
                self._found[parts] = (archive, entry, len(place))


def _is_archive(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def _beside(folder: Path, name: Parts) -> str:
    """Why a file of a folder of archives is not used; empty if it is one of them."""
    if name[-1].lower().endswith(COMPRESSED):
        return "compressed as a whole"
    if not _is_archive(name[-1]):
        return "beside the archives, not in one"
    return "an archive in a folder below" if len(name) > 1 else why_unreadable(folder / name[0]) or ""


def _allow_open_files(count: int) -> None:
    """A .zip stays open, and there may be one a class."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 256
    if resource.RLIM_INFINITY != soft < wanted:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
        )


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
            first = min((entry.header_offset for entry in self._archive.infolist()), default=0)
            with open(path, "rb") as file:
                joined = first > 0 and file.read(4) == b"PK\3\4"
        except _DAMAGED as error:
            raise ValueError(f"{path}: expected a .zip, found a truncated or foreign file ({error})") from error
        if joined:  # its end lists only the files of the last one
            raise ValueError(f"{path}: has {first:,} bytes before its first file: archives joined by cat; unjoin them")

    def entries(self) -> Iterator[tuple[str, zipfile.ZipInfo]]:
        for entry in self._archive.infolist():
            if entry.flag_bits & 1:
                raise ValueError(f"{self.path}: {entry.filename!r} is encrypted")
            if not entry.filename.endswith("/"):
                yield entry.filename, entry

    def size(self, entry: zipfile.ZipInfo) -> int:
        return entry.file_size

    def read(self, entry: zipfile.ZipInfo) -> bytes:
        """One file's bytes. Raises ValueError where they cannot be had."""
        _check_size(entry.file_size)
        try:
            return self._archive.read(entry)
        except (*_DAMAGED, NotImplementedError) as error:
            raise ValueError(f"damaged in the archive ({error})") from error


class _Tar:
    """A .tar, or several joined by `cat`: a file, or the bytes from `begin` to `end` of one."""

    def __init__(self, path: Path, begin: int = 0, end: int | None = None, name: str = ""):
        self.path, self._end = path, path.stat().st_size if end is None else end
        self._entries: list[tuple[str, _Extent | None]] = []
        try:
            # Opened whenever something is read: a data set may be a thousand of them.
            with open(path, "rb") as file:
                while (begin := self._nonzero(file, begin)) < self._end:
                    begin = self._add(file, begin)
        except _DAMAGED as error:
            where = f"{path}:{name}" if name else path
            raise ValueError(f"{where}: expected a .tar, found a truncated or foreign file ({error})") from error

    def _nonzero(self, file: BinaryIO, begin: int) -> int:
        """The next block that is not of zeros."""
        while begin < self._end and (found := os.pread(file.fileno(), min(_MANY, self._end - begin), begin)):
            if rest := found.lstrip(b"\0"):
                return begin + (len(found) - len(rest)) // _BLOCK * _BLOCK
            begin += len(found)
        return self._end

    def _add(self, file: BinaryIO, begin: int) -> int:
        """Read the headers of the archive from `begin` on; where it ends."""
        file.seek(begin)
        count, end = 0, begin
        with tarfile.open(fileobj=file, mode="r:") as archive:
            while (entry := archive.next()) is not None:
                if archive.offset <= end:  # a damaged size may lead back, for ever
                    raise tarfile.ReadError(f"entry {count} has no size")
                if not entry.isdir():
                    self._entries.append((entry.name, _extent(entry)))
                archive.members.clear()  # type: ignore[attr-defined] # a million of them take gigabytes
                count, end = count + 1, archive.offset
        if self._entries and not count:
            raise tarfile.ReadError(f"{self._end - begin:,} bytes behind its end are no archive")
        if end + _BLOCK > self._end or os.pread(file.fileno(), _BLOCK, end) != bytes(_BLOCK):
            raise tarfile.ReadError(f"truncated after {count} entries, it has no end")
        return end

    def entries(self) -> Iterator[tuple[str, _Extent | None]]:
        return iter(self._entries)

    def nested(self, name: str, entry: _Extent | None) -> _Tar | None:
        """The .tar that an entry is, if it is one."""
        if entry is None or not name.lower().endswith(".tar"):
            return None
        return _Tar(self.path, entry[0], sum(entry), name)

    def size(self, entry: _Extent | None) -> int:
        return entry[1] if entry else -1

    def read(self, entry: _Extent | None) -> bytes:
        """One file's bytes. Raises ValueError where they cannot be had."""
        if entry is None:
            raise ValueError("a link in the archive, or no regular file")
        offset, size = entry
        _check_size(size)
        with open(self.path, "rb") as file:
            found = os.pread(file.fileno(), size, offset)
        if len(found) != size:
            raise ValueError("the archive was truncated since it was opened")
        return found


_Extent = tuple[int, int]  # offset and size in the file


def _extent(entry: tarfile.TarInfo) -> _Extent | None:
    return (entry.offset_data, entry.size) if entry.isreg() and not entry.issparse() else None


def _check_size(size: int) -> None:
    if size > MOST:
        raise ValueError(f"{size} bytes in the archive, expected at most {MOST}")
