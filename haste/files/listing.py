"""The pictures of a folder or of archives and their classes, by names alone: no picture is opened. No torch."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Protocol

from haste.files import archives, labels, parquet, walk
from haste.files.labels import Labels
from haste.files.sources import Pictures, pictures_of
from haste.files.walk import Directory, Parts, Unused, grouped, told

SUFFIXES = walk.PICTURES
OTHERS = (".tif", ".tiff", ".gif", ".bmp", ".jp2", ".jxl", ".avif", ".heic", ".heif", ".ppm", ".jfif", ".dng", ".svg")
DIGITS = 1797  # images in scikit-learn's dataset
Files = list[tuple[Parts, int]]  # paths and labels


class Tree(Protocol):
    """Files by their path as a tuple of parts: `haste.files.walk.Directory`, `haste.files.archives.Archives`."""

    root: Path
    names: list[Parts]
    unused: Unused

    def inner(self, parts: Parts) -> Parts:
        """A file's path inside its archive, or the same."""
        ...

    def read(self, parts: Parts) -> bytes:
        """A file's content. Raises ValueError where it cannot be had."""
        ...

    def size(self, parts: Parts) -> int:
        """A file's size in bytes; -1 where it cannot be had."""
        ...


@dataclasses.dataclass(frozen=True)
class Listing:
    """What a source holds.

    classes: their names; None if only files beside the pictures, which were not read, state them.
    files: path and label of every picture: sorted, by label first.
    places: path of a picture -> where its tree has it, if that is somewhere else.
    unused: names of the files that are not used, each with its reason.
    size: a picture's size in bytes, by where its tree has it; -1 where it cannot be had.
    """

    classes: list[str] | None
    files: Files
    places: Mapping[Parts, Parts] = dataclasses.field(default_factory=dict)
    unused: Unused = dataclasses.field(default_factory=list)
    size: Callable[[Parts], int] = lambda _: 0


def held(found: Listing) -> Pictures:
    """What a source holds, as `haste.files.sources` compares it: names, sizes and those labels that names give."""
    places = found.places
    return pictures_of(("/".join(parts), found.size(places.get(parts, parts)), label) for parts, label in found.files)


def survey(source: str, path: str | None, classes: int, table: str | None = None) -> Listing:
    """The pictures of a source and its classes, without reading a file a picture.

    Args:
        source: which kind.
        path: where it is.
        classes: the number of classes that is expected; 0 ignores labels.
        table: a .csv of names and labels, or a column of a parquet file.

    Raises:
        ValueError: there is no such source, or it has no pictures; the same message as when reading it.
    """
    if source == "digits":
        names = [str(digit) for digit in range(10)] if classes else []
        return Listing(names, [((str(i),), 0) for i in range(DIGITS)])
    root = Path(path or "")
    if source == "parquet":
        return of_rows(parquet.Rows(root), bool(classes), classes, table)
    tree = Directory(root) if source == "folder" else archives.Archives(root)
    return listed(tree, bool(classes), classes, table, lazily=True)


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


def listed(
    tree: Tree, labelled: bool, classes: int | None = None, table: str | None = None, lazily: bool = False
) -> Listing:
    """The pictures among some files, and their classes.

    Labels are those of `table`; else of a dataset.json above the pictures; else of the .cls beside each, unless they
    are in class folders; else the sorted names of the folders in which they are, or, where each is directly in one of
    several archives, of the archives. A flat folder is one class.

    Args:
        tree: the files.
        labelled: False ignores labels: all pictures have 0, and there are no classes.
        classes: the number of classes that is expected. Several archives of pictures without labels are one class
            only where 1 is.
        table: a .csv of names and labels.
        lazily: do not read a file a picture; classes are then None where that would be needed.

    Raises:
        ValueError: no pictures, or invalid labels beside them; the message says which.
    """
    pictures = pictures_among(tree, SUFFIXES)
    inner = {parts: tree.inner(parts) for parts in pictures}
    apart = len({*inner.values()}) < len(inner)  # archives whose names begin anew in each
    above = _shared([path[:-1] for path in inner.values()]) if isinstance(tree, archives.Archives) else ()
    below = {parts: path[len(above) :] for parts, path in inner.items()}
    shown = {parts: parts if apart else path for parts, path in below.items()}
    if not labelled:
        return _in_order(tree, [], dict.fromkeys(pictures, 0), shown)
    if table is not None:
        names, found, lost = labels.of_csv(table, tree.root, below)
        return _in_order(tree, names, found, shown, lost=lost)
    flat = all(len(path) == 1 for path in below.values())
    whole = shown if apart else inner  # by which pictures with numbers have always been called
    written = labels.of_json(tree.root, tree.names, pictures, tree.read)
    cls = {name for name in tree.names if name[-1].endswith(labels.CLS)}
    if written is None and cls and (not isinstance(tree, Directory) or (flat and classes != 1)):
        if lazily:
            return _in_order(tree, None, dict.fromkeys(pictures, 0), shown, cls)
        beside = {parts if apart else tree.inner(parts): parts for parts in cls}
        written = labels.of_cls(tree.root, beside, whole, tree.read)
    if written is not None:
        found, used, lost = written
        return _in_order(tree, _numbered(tree.root, found), found, whole, used, lost)
    origins = {parts: parts[: -len(path)] for parts, path in inner.items()}
    if flat and classes != 1 and len({*origins.values()}) > 1:
        below = {parts: (origins[parts][-1].rpartition(".")[0], *path) for parts, path in below.items()}
    return _in_order(tree, *_by_folder(tree, below), shown)


def of_rows(rows: parquet.Rows, labelled: bool, classes: int | None = None, column: str | None = None) -> Listing:
    """As `listed`, for the rows of parquet files: in their order, since other orders are slow to read.

    Raises:
        ValueError: no labels in the rows; the message says how to name their column.
    """
    if labelled and (classes != 1 or column):
        names, numbers = rows.labels(column)
    else:
        names, numbers = ["all"] if labelled else [], [0] * len(rows.names)
    return Listing(names, list(zip(rows.names, numbers, strict=True)), {}, rows.unused, rows.size)


def _in_order(
    tree: Tree,
    classes: list[str] | None,
    found: Mapping[Parts, int],
    shown: Mapping[Parts, Parts],
    used: Collection[Parts] = (),
    lost: Unused | None = None,
) -> Listing:
    files = sorted(((shown[parts], label) for parts, label in found.items()), key=lambda one: (one[1], one[0]))
    places = {shown[parts]: parts for parts in found if shown[parts] is not parts}
    return Listing(classes, files, places, [*unused_by(tree, {*found, *used}), *(lost or [])], tree.size)


def pictures_among(tree: Tree, suffixes: tuple[str, ...]) -> list[Parts]:
    """The pictures of a tree by their names, sorted.

    Raises:
        ValueError: there are none.
    """
    pictures = sorted(parts for parts in tree.names if parts[-1].lower().endswith(suffixes))
    if not pictures:
        rest = told(grouped(unused_by(tree, ())))
        raise ValueError(f"{tree.root}: found no pictures, expected {', '.join(suffixes)}{'; ' * bool(rest)}{rest}")
    return pictures


def unused_by(tree: Tree, pictures: Collection[Parts]) -> Unused:
    """Names of the files of a tree that are not among some pictures, each with its reason."""
    taken = {*pictures}
    return [*tree.unused, *(("/".join(parts), _reason(parts[-1])) for parts in tree.names if parts not in taken)]


def _reason(name: str) -> str:
    suffix = Path(name.lower()).suffix
    if suffix in OTHERS:
        return f"pictures of a format that is not read ({suffix})"
    if suffix in (*archives.SUFFIXES, parquet.SUFFIX):
        return f"files of {suffix}, which another images.source reads"
    return f"no pictures by their names ({suffix or 'no suffix'})"


def _by_folder(tree: Tree, below: Mapping[Parts, Parts]) -> tuple[list[str], Labels]:
    """Classes and labels by the first folder of each path, or one class of pictures that are in none."""
    loose = min((path for path in below.values() if len(path) == 1), default=None)
    folders = tree.folders if isinstance(tree, Directory) else sorted({path[0] for path in below.values() if path[1:]})
    if folders and loose:
        raise ValueError(
            f"{tree.root}: found both class folders ({folders[0]!r}) and pictures ({loose[0]!r}) beside them; "
            "expected one of the two, or classes: 0 to train without labels"
        )
    if not folders:
        return ["all"], dict.fromkeys(below, 0)
    places = {name: label for label, name in enumerate(folders)}
    found = {parts: places[path[0]] for parts, path in below.items()}
    if bare := sorted({*range(len(folders))} - {*found.values()}):  # skipping it would shift all later labels
        where = tree.root / folders[bare[0]]
        raise ValueError(f"{where}: a class folder without pictures, expected {', '.join(SUFFIXES)}")
    return folders, found


def _shared(paths: list[Parts]) -> Parts:
    """The longest common prefix of these paths: that of the first and the last in order."""
    low, high = min(paths), max(paths)
    equal = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(low, high, strict=False))
    return tuple(part for part, _ in equal)


def _numbered(root: Path, found: Labels) -> list[str]:
    """The classes of labels that are given as numbers from 0."""
    given = {*found.values()}
    absent = next(label for label in itertools.count() if label not in given)
    if absent < len(given):
        raise ValueError(f"{root}: labels up to {max(given)}, but no picture has {absent}, expected some of each")
    return [str(label) for label in range(absent)]
