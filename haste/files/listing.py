"""The pictures of a folder or of archives and their classes, by names alone: no picture is opened. No torch."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from haste.files.archives import Archives

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
DIGITS = 1797  # images in scikit-learn's dataset
Parts = tuple[str, ...]  # of a path
Files = list[tuple[Parts, int]]  # paths and labels


def survey(source: str, path: str | None, labelled: bool) -> tuple[int, list[str] | None]:
    """The number of pictures of a source, and its classes; None if only files beside the pictures state them.

    Raises:
        ValueError: there is no such source, or it has no pictures; the same message as when reading it.
    """
    if source == "digits":
        return DIGITS, [str(digit) for digit in range(10)] if labelled else []
    root = Path(path or "")
    if source == "folder":
        classes, files = in_folder(root, labelled)
        return len(files), classes
    archives = Archives(root)
    if labelled and any(_is_label(parts) for parts in archives.names):
        return len(_pictures_among(root, archives)), None
    classes, files, _ = in_archives(root, archives, labelled)
    return len(files), classes


def checked_holdout(where: str, holdout: int, count: int) -> int:
    """Refuse a holdout of all pictures of a source, or more."""
    if not 0 <= holdout < count:
        raise ValueError(f"{where}: {holdout} pictures to hold out of {count}, expected 0..{count - 1}")
    return holdout


def check_classes(where: str, classes: list[str], expected: int) -> None:
    """Refuse a source whose number of classes differs from the configuration's."""
    if len(classes) != expected:
        found = f"{len(classes)} ({', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''})"
        raise ValueError(f"images.classes: {expected}, but {where} has {found}")


def in_archives(root: Path, archives: Archives, labelled: bool) -> tuple[list[str], Files, Parts]:
    """As `in_folder`, for files in archives; and the folders that all pictures share, which their paths leave out.

    Raises:
        ValueError: no pictures, or invalid labels beside them.
    """
    pictures = _pictures_among(root, archives)
    if labelled and (labels := _written_labels(root, archives, pictures)):
        return *_numbered(root, labels), ()
    above = _shared([parts[:-1] for parts in pictures])
    return *_in_classes(root, [parts[len(above) :] for parts in pictures], labelled), above


def _pictures_among(root: Path, archives: Archives) -> list[Parts]:
    pictures = [parts for parts in archives.names if _is_picture(parts[-1])]
    if not pictures:
        raise ValueError(f"{root}: found no pictures, expected {', '.join(SUFFIXES)} in it")
    return pictures


def _is_label(parts: Parts) -> bool:
    return parts[-1].endswith(".cls")


def _written_labels(root: Path, archives: Archives, pictures: list[Parts]) -> dict[Parts, int]:
    """Picture -> the number in the .cls beside it, if there are any."""
    names = {parts for parts in archives.names if _is_label(parts)}
    labels: dict[Parts, int] = {}
    for parts in pictures if names else ():
        beside = (*parts[:-1], parts[-1].split(".")[0] + ".cls")
        word = archives.read(beside).strip() if beside in names else b"no .cls beside it"
        if not word.isdigit():
            found = word[:20].decode(errors="replace")
            raise ValueError(f"{root}: the label of {'/'.join(parts)} is {found!r}, expected a number")
        labels[parts] = int(word)
    return labels


def in_folder(root: Path, labelled: bool) -> tuple[list[str], Files]:
    """Class names, and (path in parts, label) of every picture: classes sorted, and pictures within a class.

    Without labels, all pictures below the folder, without classes and with the label 0.

    Raises:
        ValueError: no folder, one that cannot be read, or one without pictures; the message says which.
    """
    if not root.is_dir():
        raise ValueError(f"{root}: expected a folder of images, found {'a file' if root.exists() else 'nothing'}")
    if not labelled:
        if not (every := sorted(_pictures(root))):
            raise ValueError(f"{root}: found no pictures, expected {', '.join(SUFFIXES)} anywhere below")
        return [], [(parts, 0) for parts in every]
    try:
        entries = [(entry.name, entry.is_dir()) for entry in root.iterdir()]
    except OSError as error:
        raise ValueError(f"{root}: cannot be read ({error.strerror})") from error
    folders = sorted(name for name, is_folder in entries if is_folder and not name.startswith("."))
    loose: list[Parts] = [(name,) for name, _ in entries if _is_picture(name)]
    _check_either(root, folders, loose)
    if not folders:
        found, classes = [(parts, 0) for parts in sorted(loose)], ["all"]
    else:
        found, classes = [], folders
        for label, name in enumerate(folders):
            inside = sorted((name, *parts) for parts in _pictures(root / name))
            if not inside:  # skipping it would shift all later labels
                raise ValueError(f"{root / name}: a class folder without pictures, expected {', '.join(SUFFIXES)}")
            found += [(parts, label) for parts in inside]
    if not found:
        raise ValueError(f"{root}: found no pictures, expected {', '.join(SUFFIXES)} in class folders or directly")
    return classes, found


def _check_either(root: Path, folders: list[str], loose: list[Parts]) -> None:
    if folders and loose:
        raise ValueError(
            f"{root}: found both class folders ({folders[0]!r}) and pictures ({loose[0][0]!r}) beside them; "
            "expected one of the two, or classes: 0 to train without labels"
        )


def _in_classes(root: Path, pictures: list[Parts], labelled: bool) -> tuple[list[str], Files]:
    """As `in_folder`, for pictures given by name alone."""
    if not labelled:
        return [], [(parts, 0) for parts in sorted(pictures)]
    folders = sorted({parts[0] for parts in pictures if len(parts) > 1})
    _check_either(root, folders, [parts for parts in pictures if len(parts) == 1])
    places = {name: label for label, name in enumerate(folders)}
    found = [(parts, places[parts[0]] if folders else 0) for parts in pictures]
    return folders or ["all"], sorted(found, key=lambda one: (one[1], one[0]))


def _shared(paths: list[Parts]) -> Parts:
    """The longest common prefix of these paths: that of the first and the last in order."""
    low, high = min(paths), max(paths)
    equal = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(low, high, strict=False))
    return tuple(part for part, _ in equal)


def _numbered(root: Path, labels: Mapping[Parts, int]) -> tuple[list[str], Files]:
    """As `in_folder`, for pictures whose labels are given as numbers from 0."""
    count = max(labels.values()) + 1
    if absent := sorted({*range(count)} - {*labels.values()}):
        raise ValueError(f"{root}: labels up to {count - 1}, but no picture has {absent[0]}, expected some of each")
    return [str(label) for label in range(count)], sorted(labels.items(), key=lambda one: (one[1], one[0]))


def _is_picture(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def _pictures(folder: Path, above: tuple[tuple[int, int], ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths in parts of all pictures below a folder, following links, but not into hidden folders.

    Raises:
        ValueError: a folder cannot be read, so that its pictures would silently be missing, or contains itself.
    """
    try:
        here = (os.stat(folder).st_dev, os.stat(folder).st_ino)
        with os.scandir(folder) as found:
            entries = [(entry.name, entry.is_dir()) for entry in found if not entry.name.startswith(".")]
    except OSError as error:
        raise ValueError(f"{folder}: cannot be read ({error.strerror})") from error
    if here in above:
        raise ValueError(f"{folder}: a link that leads back to a folder above it")
    for name, is_folder in entries:
        if is_folder:
            yield from ((name, *parts) for parts in _pictures(folder / name, (*above, here)))
        elif _is_picture(name):
            yield (name,)
