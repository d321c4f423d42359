"""The pictures of a folder or of archives and their classes, by names alone: no picture is opened. No torch."""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Protocol

from haste.files import archives, captions, labels, parquet, walk
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
    captions: captions of every picture, also none; None without captions, or if files beside them were not read.
    marks: path of a picture -> what shows that its captions changed.
    held_out: how many of the last pictures the source itself holds out; None if it says nothing.
    """

    classes: list[str] | None
    files: Files
    places: Mapping[Parts, Parts] = dataclasses.field(default_factory=dict)
    unused: Unused = dataclasses.field(default_factory=list)
    size: Callable[[Parts], int] = lambda _: 0
    captions: captions.Captions | None = None
    marks: Mapping[Parts, str] = dataclasses.field(default_factory=dict)
    held_out: int | None = None

    @property
    def said_of_each(self) -> float:
        """Captions of a picture on average; 1 where they were not read."""
        return sum(map(len, self.captions.values())) / len(self.captions) if self.captions else 1.0

    def sized(self, parts: Parts, label: int) -> tuple[str, int, str]:
        """A picture's name and size in bytes, and what is said of it."""
        said = f"{label} {self.marks[parts]}" if parts in self.marks else str(label)
        return "/".join(parts), self.size(self.places.get(parts, parts)), said


def held(found: Listing) -> Pictures:
    """What a source holds, as `haste.files.sources` compares it: names, sizes and what is said of each, as far as names
    tell it."""
    return pictures_of(found.sized(parts, label) for parts, label in found.files)


def survey(
    source: str,
    path: str | None,
    classes: int,
    table: str | None = None,
    said: str | None = None,
    lazily: bool = True,
) -> Listing:
    """The pictures of a source and its classes, without opening a picture.

    Args:
        source: which kind.
        path: where it is.
        classes: the number of classes that is expected; 0 ignores labels.
        table: a .csv of names and labels, or a column of a parquet file.
        said: where captions are, see `with_captions`.
        lazily: do not read a file a picture.

    Raises:
        ValueError: there is no such source, or it has no pictures; the same message as when reading it.
    """
    if source in ("digits", "moved-digits"):
        names = [str(digit) for digit in range(10)] if classes else []
        return Listing(names, [((str(i),), 0) for i in range(DIGITS)])
    root = Path(path or "")
    if source == "parquet":
        return of_rows(parquet.Rows(root), bool(classes), classes, table)
    if source == "coco":
        return of_coco(Directory(root))
    tree = Directory(root) if source == "folder" else archives.Archives(root)
    return with_captions(listed(tree, bool(classes), classes, table, lazily), tree, said, lazily)


def checked_holdout(where: str, holdout: int, count: int, own: int | None = None) -> int:
    """Refuse a holdout of all pictures of a source, or more; or one other than the source's own."""
    if own is not None and holdout != own:
        raise ValueError(
            f"images.holdout: {holdout}, but {where} has {own} pictures of its own to validate, expected {own}"
        )
    if not 0 <= holdout < count:
        raise ValueError(f"{where}: {holdout} pictures to hold out of {count}, expected 0..{count - 1}")
    return holdout


def checked_subset(subset: int | None, trained_on: int) -> int:
    """How many of the pictures to train on are used: `subset` of them, or all. Refuses more than there are."""
    if subset is not None and subset > trained_on:
        raise ValueError(f"images.subset: {subset:,}, but there are {trained_on:,} training images")
    return trained_on if subset is None else subset


def check_captioned(where: str, found: Listing) -> None:
    """Refuse pictures without captions where others have some, as far as they were read."""
    if lacking := ["/".join(parts) for parts, said in (found.captions or {}).items() if not said]:
        raise ValueError(
            f"{where}: {captions.named(lacking)} without a caption. Caption them, or leave them out "
            "(images.on_bad_image: skip)"
        )


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


def with_captions(found: Listing, tree: Tree, place: str | None, lazily: bool = False) -> Listing:
    """A listing with the captions of its pictures.

    Args:
        found: the pictures; where COCO numbers them, they come back in that order.
        tree: their files.
        place: a file that `haste.files.captions.read` understands; "beside" for the .txt beside each; None for none.
        lazily: do not read a file a picture.

    Raises:
        ValueError: no such file, or captions for pictures that are not there.
    """
    if place is None:
        return found
    at = {parts: found.places.get(parts, parts) for parts, _ in found.files}
    if place == captions.BESIDE:
        return _beside(found, tree, at, lazily)
    table = captions.read(place)
    texts = captions.matched(table, place, tree.root, {parts: "/".join(parts) for parts in at})
    ids = {parts: table.ids.get("/".join(parts), table.ids.get("/".join(parts).rpartition(".")[0])) for parts in at}
    files = sorted(found.files, key=lambda one: ids[one[0]] or 0) if table.ids else found.files
    own = [one for one in found.unused if (tree.root / one[0]).absolute() != Path(place).absolute()]
    return _captioned(dataclasses.replace(found, files=files, unused=own), texts, table.empty)


def _beside(found: Listing, tree: Tree, at: Mapping[Parts, Parts], lazily: bool) -> Listing:
    apart = len({tree.inner(place) for place in at.values()}) < len(at)
    known = {place if apart else tree.inner(place): place for place in tree.names if place[-1].endswith(captions.TXT)}
    paths = {parts: place if apart else tree.inner(place) for parts, place in at.items()}
    texts = {parts: captions.beside_of(path) for parts, path in paths.items()}
    used = {parts: known[text] for parts, text in texts.items() if text in known}
    taken = {"/".join(place) for place in used.values()}
    found = dataclasses.replace(found, unused=[one for one in found.unused if one[0] not in taken])
    if lazily:
        return dataclasses.replace(found, marks={parts: str(tree.size(place)) for parts, place in used.items()})
    table = captions.Table()
    for parts, said in captions.beside(known, tree.read, paths):
        table.add(str(tree.root), "/".join(parts), said)
    return _captioned(found, {parts: table.texts.get("/".join(parts), []) for parts in at}, table.empty)


def _captioned(found: Listing, texts: captions.Captions, empty: list[str]) -> Listing:
    marks = {parts: captions.mark(said) for parts, said in texts.items()}
    unused = [*found.unused, *captions.empty(empty)]
    return dataclasses.replace(found, captions=texts, unused=unused, marks=marks)


def of_coco(tree: Directory) -> Listing:
    """COCO as it is handed out: annotations/captions_train2014.json and train2014/, and the same of val2014, whose
    pictures are the held-out ones. Pictures are in the order of their numbers.

    Raises:
        ValueError: annotations or pictures that are not there.
    """
    train, val = _coco_split(tree, "train"), _coco_split(tree, "val")
    if train is None:
        raise ValueError(f"{tree.root}: found no annotations/captions_trainYEAR.json, expected COCO's files")
    annotations, texts, empty = train if val is None else tuple(map(operator.add, train, val))
    files = [(parts, 0) for parts, _ in texts]
    listing = Listing([], files, {}, unused_by(tree, {*(parts for parts, _ in files), *annotations}), tree.size)
    return dataclasses.replace(_captioned(listing, dict(texts), empty), held_out=len(val[1]) if val else None)


_Split = tuple[list[Parts], list[tuple[Parts, list[str]]], list[str]]  # annotations, captions in order, empty ones


def _coco_split(tree: Directory, split: str) -> _Split | None:
    """One split; None without annotations. Pictures that these do not name come last, without captions."""
    pattern = rf"captions_({split}\d*)\.json"
    found = [parts for parts in tree.names if parts[:-1] == ("annotations",) and re.fullmatch(pattern, parts[-1])]
    if len(found) > 1:
        raise ValueError(f"{tree.root}: found {', '.join(sorted(p[-1] for p in found))}, expected one of {split}")
    if not found:
        return None
    folder = found[0][-1].removeprefix("captions_").removesuffix(".json")
    file, table = tree.root.joinpath(*found[0]), captions.read(tree.root.joinpath(*found[0]))
    if not table.ids:
        raise ValueError(f"{file}: expected COCO's annotations, found others")
    there = {parts for parts in tree.names if parts[0] == folder and parts[-1].lower().endswith(SUFFIXES)}
    texts = captions.matched(table, file, tree.root / folder, {parts: "/".join(parts[1:]) for parts in there})
    order = sorted(there, key=lambda parts: (table.ids.get("/".join(parts[1:]), math.inf), parts))
    return found, [(parts, texts[parts]) for parts in order], [f"{folder}/{name}" for name in table.empty]


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
