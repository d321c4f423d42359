"""The files below a folder, each once: the one walk of all readers of pictures. No torch.

What is found is either in `names`, or in `unused` with the reason, so that nothing is left out without a word:

- hidden files and folders, and what operating systems leave (`LEFT_BEHIND`), are not used;
- links are followed; one to a folder above, or to what is here anyway, is not used, so that nothing is taken twice;
- a folder that cannot be read is refused, since nobody knows what is missing.
"""

from __future__ import annotations

import collections
import contextlib
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
Parts = tuple[str, ...]  # of a path
Unused = list[tuple[str, str]]  # names and reasons

HIDDEN = "hidden, or left there by a program"
NOT_REGULAR, NO_TARGET, EMPTY = "not a regular file", "a link to nothing", "an empty file"
LEFT_BEHIND = {"__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information", "Thumbs.db"}
_ABOVE, _AGAIN = "a link to a folder above", "a link to what is here too"
_SHOWN = 3  # suffixes, or names, of one reason in a message
_OF_SUFFIX = re.compile(r" \((\.[^()]*|no suffix)\)$")  # at the end of a reason
_KEPT = 10_000  # names of one reason in a record


def is_hidden(name: str) -> bool:
    """Whether a name is one that people do not see: programs' own files, such as macOS's ._NAME beside NAME."""
    return name.startswith(".") or name in LEFT_BEHIND


def why_unreadable(path: Path) -> str | None:
    """Why a file cannot be read, of whatever name: reading a pipe or a device would block."""
    try:
        if path.is_file():
            return None if path.stat().st_size else EMPTY
        return NO_TARGET if path.is_symlink() and not path.exists() else NOT_REGULAR
    except OSError as error:
        return f"cannot be read ({error.strerror})"


class Directory:
    """The files below a folder, by their path as a tuple of parts.

    Attributes:
        root: the folder.
        names: every file's path, in arbitrary order; also what cannot be opened, such as a link to nothing.
        folders: names of the folders directly in it, sorted.
        unused: names of what is not used, each with its reason.
    """

    def __init__(self, root: Path | str):
        """
        Raises:
            ValueError: no folder, or one that cannot be read; the message says which.
        """
        self.root = Path(root)
        self.names: list[Parts] = []
        self.folders: list[str] = []
        self.unused: Unused = []
        if not self.root.is_dir():
            raise ValueError(
                f"{root}: expected a folder of images, found {'a file' if self.root.exists() else 'nothing'}"
            )
        self._walk()

    def _walk(self) -> None:
        whole = self.root.resolve()
        above, seen = {_identity(folder) for folder in whole.parents}, set[tuple[int, int]]()
        todo: list[Parts] = [()]
        links: list[Parts] = []  # to folders; after all that is here without a link, in a fixed order
        files: list[Parts] = []  # links to files
        while todo or links:
            place = (todo or links).pop()
            try:
                here = _identity(self.root.joinpath(*place))
                if here in seen or here in above:
                    self._leave(place, _AGAIN if here in seen else _ABOVE, "/")
                    continue
                seen.add(here)
                if len(place) == 1:
                    self.folders.append(place[0])
                self._scan(place, todo, links, files)
            except OSError as error:
                raise ValueError(f"{self.root.joinpath(*place)}: cannot be read ({error.strerror})") from error
            links.sort(reverse=True)
        self._add_links(sorted(files))
        self.folders.sort()

    def _scan(self, place: Parts, folders: list[Parts], folder_links: list[Parts], file_links: list[Parts]) -> None:
        with os.scandir(self.root.joinpath(*place)) as found:
            entries = [
                (entry.name, entry.is_symlink(), os.path.isdir(entry) if entry.is_symlink() else entry.is_dir())
                for entry in found
            ]
        for name, is_link, is_folder in entries:
            if is_hidden(name):
                self._leave((*place, name), HIDDEN, "/" if is_folder else "")
                continue
            kind = (folder_links if is_link else folders) if is_folder else file_links if is_link else self.names
            kind.append((*place, name))

    def _add_links(self, links: list[Parts]) -> None:
        """Take links to files, each file once, but not those to files that are here without a link."""
        here = set()
        for parts in self.names if links else ():
            with contextlib.suppress(OSError):  # gone meanwhile: whoever reads it says so
                here.add(_identity(self.root.joinpath(*parts)))
        for parts in links:
            try:
                target = _identity(self.root.joinpath(*parts))
            except OSError:  # to nothing: whoever reads it says so
                self.names.append(parts)
                continue
            if target in here:
                self._leave(parts, _AGAIN)
            else:
                here.add(target)
                self.names.append(parts)

    def _leave(self, place: Parts, reason: str, end: str = "") -> None:
        self.unused.append(("/".join(place) + end, reason))

    def inner(self, parts: Parts) -> Parts:
        """A file's path inside its archive: here the same."""
        return parts

    def file(self, parts: Parts) -> Path:
        """Where a file is.

        Raises:
            ValueError: it is no regular file, or an empty one.
        """
        path = self.root.joinpath(*parts)
        if reason := why_unreadable(path):
            raise ValueError(reason)
        return path

    def read(self, parts: Parts) -> bytes:
        """A file's content. Raises ValueError as `file`."""
        return self.file(parts).read_bytes()

    def size(self, parts: Parts) -> int:
        """A file's size in bytes; -1 where it cannot be had, such as for a link to nothing."""
        try:
            return os.stat(self.root.joinpath(*parts)).st_size
        except OSError:
            return -1


def _identity(path: Path) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino


def grouped(unused: Iterable[Sequence[str]]) -> list[dict[str, Any]]:
    """What is not used by reason, the most frequent first, JSON: reason, count and names (the first 10,000)."""
    names = collections.defaultdict(list)
    for name, reason in unused:
        names[reason].append(name)
    order = sorted(names.items(), key=lambda one: (-len(one[1]), one[0]))
    return [{"reason": reason, "count": len(of), "names": sorted(of)[:_KEPT]} for reason, of in order]


def told(groups: Iterable[dict[str, Any]], between: str = "; ") -> str:
    """Groups of what is not used in words: why, how many, and the suffixes, else the first names; empty for none."""
    counts, shown = collections.Counter[str](), collections.defaultdict[str, list[str]](list)
    for one in groups:
        of = _OF_SUFFIX.search(one["reason"])
        reason = one["reason"][: of.start()] if of else one["reason"]
        counts[reason] += one["count"]
        shown[reason] += [of[1]] if of and one["count"] > 1 else one["names"][: _SHOWN + 1]
    words = [f"{reason} ({count:,}: {_first(shown[reason])})" for reason, count in counts.most_common()]
    return f"not used: {between.join(words)}" if words else ""


def _first(words: Sequence[str]) -> str:
    return ", ".join(map(printable, words[:_SHOWN])) + (", ..." if len(words) > _SHOWN else "")


def printable(name: str) -> str:
    """A name for people to read: no control characters, and nothing that is no text."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in name)
