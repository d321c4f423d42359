"""Labels written beside pictures: EDM's dataset.json, WebDataset's NAME.cls, a table of names and labels. No torch."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from haste.files.walk import Parts, Unused

JSON = "dataset.json"
CLS = ".cls"
NO_PICTURE = "named beside the pictures, but not there"
NAMES = ("file_name", "filename", "file", "name", "path", "image", "image_id", "id")  # of a table's first column
LABELS = ("label", "class", "target", "category")
Labels = dict[Parts, int]
Read = Callable[[Parts], bytes]
Found = tuple[Labels, set[Parts], Unused]  # labels, the files that state them, and what they name that is not there


def of_json(where: Path, names: Collection[Parts], pictures: Collection[Parts], read: Read) -> Found | None:
    """Labels by the nearest dataset.json above each picture, as EDM's and REPA's tools write them; None without one.

    Args:
        where: the folder or archive, for messages.
        names: of all files.
        pictures: those of the pictures.
        read: reads a file.

    Raises:
        ValueError: it is no JSON, or gives a picture no label that is a number from 0.
    """
    files = sorted(name for name in names if name[-1] == JSON)
    tables = {parts[:-1]: table for parts in files if (table := _table(where, parts, read)) is not None}
    if not any(picture[: len(above)] == above for above in tables for picture in pictures):
        return None
    labels: Labels = {}
    known = any(tables.values())  # otherwise the tool was given no labels
    for picture in pictures:
        above = next((picture[:depth] for depth in reversed(range(len(picture))) if picture[:depth] in tables), None)
        name = "/".join(picture[len(above or ()) :])
        label = tables[above].get(name) if known and above is not None else None if known else 0
        if not isinstance(label, int) or label < 0:
            found = "no label" if label is None else repr(label)[:40]
            raise ValueError(f"{where}: {JSON} gives {'/'.join(picture)} {found}, expected a number from 0")
        labels[picture] = label
    written = ((*above, *name.split("/")) for above, table in tables.items() for name in table)
    lost = [("/".join(parts), NO_PICTURE) for parts in written if parts not in labels]
    return labels, {(*above, JSON) for above in tables}, lost


def _table(where: Path, parts: Parts, read: Read) -> dict[str, Any] | None:
    """Name -> label; empty where the tool knew of no labels, None for a file of another kind."""
    try:
        found = json.loads(read(parts))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {'/'.join(parts)} is no JSON ({str(error)[:80]})") from error
    entries = found.get("labels", ()) if isinstance(found, dict) else ()
    if entries is None:
        return {}
    if not isinstance(entries, list) or not entries or not all(map(_is_pair, entries)):
        return None
    return {name.replace("\\", "/"): label for name, label in entries}


def _is_pair(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)


def of_cls(where: Path, files: Mapping[Parts, Parts], pictures: Mapping[Parts, Parts], read: Read) -> Found:
    """Labels by the number in the .cls beside each picture.

    Args:
        where: the folder or archive, for messages.
        files: path of a .cls, as it compares with that of a picture -> where it is.
        pictures: picture -> its path.
        read: reads a file.

    Raises:
        ValueError: a picture has none, or it holds no number.
    """
    labels, used = Labels(), set[Parts]()
    for picture, path in pictures.items():
        beside = files.get((*path[:-1], path[-1].split(".")[0] + CLS))
        word = b"no .cls beside it" if beside is None else _word(read, beside)
        if beside is None or not word.isdigit() or len(word) > 18:
            found = word[:40].decode(errors="replace")
            raise ValueError(f"{where}: the label of {'/'.join(path)} is {found!r}, expected a number")
        labels[picture] = int(word)
        used.add(beside)
    return labels, used, []


def _word(read: Read, name: Parts) -> bytes:
    try:
        return read(name).strip()
    except ValueError as error:
        return str(error).encode()


def of_csv(file: Path | str, where: Path, pictures: Mapping[Parts, Parts]) -> tuple[list[str], Labels, Unused]:
    """Classes, labels and names that are no pictures, by a table of names and labels.

    Classes are in the order of numbers where all are numbers, else in that of texts.

    Args:
        file: a .csv with a header: a column of names as `NAMES` says, with or without suffixes, else the first
            one; and one of labels as `LABELS` says, else the second of two.
        where: the folder or archive, for messages.
        pictures: picture -> its path as the table names it.

    Raises:
        ValueError: no such table, or a picture is not in it.
    """
    words: dict[str, str] = {}
    for _, name, word in columns_of(file, LABELS):
        label = word.strip()
        if words.setdefault(name, label) != label:
            raise ValueError(f"{file}: {name!r} has the labels {words[name]!r} and {label!r}, expected one")
    found: dict[Parts, str] = {}
    met = set[str]()
    for picture, path in pictures.items():
        name = "/".join(path)
        known = next((one for one in (name, name.rpartition(".")[0]) if one in words), None)
        if known is None:
            raise ValueError(f"{file}: has no label for {name} of {where}, expected one for every picture")
        met.add(known)
        found[picture] = words[known]
    classes = sorted({*found.values()}, key=int if all(word.isdecimal() for word in found.values()) else None)
    places = {word: place for place, word in enumerate(classes)}
    lost = [(name, NO_PICTURE) for name in sorted(words.keys() - met)]
    return classes, {picture: places[word] for picture, word in found.items()}, lost


def columns_of(file: Path | str, words: Collection[str]) -> Iterator[tuple[int, str, str]]:
    """Line, name and what is said of it, of each row of a .csv with a header.

    Args:
        file: the .csv.
        words: names of the column that says it, else it is the second of two.

    Raises:
        ValueError: no such table.
    """
    try:
        with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
            reader = csv.reader(lines)
            rows = [(reader.line_num, row) for row in reader if row]
    except (OSError, csv.Error) as error:
        raise ValueError(f"{file}: expected a .csv of names and {next(iter(words))}s ({error})") from error
    header = [word.strip().lower() for word in rows[0][1]] if rows else []
    name = next((place for word in NAMES for place, found in enumerate(header) if found == word), 0)
    said = next((place for word in words for place, found in enumerate(header) if found == word), None)
    said = 1 - name if said is None and len(header) == 2 and name < 2 else said
    if said is None or said == name:
        expected = f"a name and a column {next(iter(words))!r}"
        raise ValueError(f"{file}: has columns {', '.join(header) or 'none'}, expected {expected}")
    for number, row in rows[1:]:
        if len(row) <= max(name, said):
            raise ValueError(f"{file}: line {number} has {len(row)} columns, expected {len(header)}")
        yield number, row[name].strip().replace("\\", "/").removeprefix("./"), row[said]
