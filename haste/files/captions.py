"""Captions written beside pictures: COCO's annotations, tables of files and captions, a .txt beside each. No torch.

A text is kept exactly as it stands in its file, down to spaces and line breaks. Those without a letter are left out and
named; a text that UTF-8 cannot hold is refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from haste.files.labels import NAMES, columns_of
from haste.files.walk import Parts, Unused, printable

BESIDE = "beside"  # the name of the .txt beside each picture, in the place of a file's
TXT = ".txt"
TEXTS = ("caption", "captions", "text", "prompt")  # of a table's other column
NO_TEXT, NO_CAPTION = "an empty caption", "no caption"
_SHOWN = 3  # names in a message
Captions = dict[Parts, list[str]]  # by picture


@dataclasses.dataclass
class Table:
    """What a file of captions holds.

    texts: name of a picture -> its captions, in order, empty ones left out.
    empty: names of the pictures with empty ones, one each.
    ids: name -> COCO's number of the picture, which orders them; {} where a file has none.
    """

    texts: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    empty: list[str] = dataclasses.field(default_factory=list)
    ids: dict[str, int] = dataclasses.field(default_factory=dict)

    def add(self, where: str, name: str, text: Any) -> None:
        """Add a caption; raises ValueError for what is no text."""
        if not isinstance(text, str):
            raise ValueError(f"{where}: the caption of {printable(name)} is {str(text)[:40]!r}, expected a text")
        said = self.texts.setdefault(name, [])
        if not text.strip():
            self.empty.append(name)
            return
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{where}: the caption of {printable(name)} is no UTF-8 text ({error.reason})") from error
        said.append(text)


def read(file: Path | str) -> Table:
    """The captions of a file: COCO's annotations (.json), JSON lines (.jsonl), or a .csv.

    A line of the latter two has a file's name, in a column as `haste.files.labels.NAMES` says, and a caption, in one as
    `TEXTS` says; in JSON lines also a list of captions. A file in several lines has several captions.

    Raises:
        ValueError: no such file, or one of another form; the message names the line.
    """
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"{file}: expected a file of captions, found {'a folder' if path.is_dir() else 'nothing'}")
    kind = path.suffix.lower()
    if kind == ".csv":
        found = Table()
        for line, name, text in columns_of(path, TEXTS):
            found.add(f"{file}: line {line}", name, text)
        return found
    if kind not in (".json", ".jsonl"):
        raise ValueError(f"{file}: expected captions in a .csv, .jsonl or COCO's .json, found {kind or 'no suffix'}")
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: is no UTF-8 text ({error})") from error
    return _coco(file, content) if kind == ".json" else _lines(file, content)


def _lines(file: Path | str, content: str) -> Table:
    found = Table()
    # Only "\n" ends a line of JSON: other characters that break lines may stand in a text.
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        where, entry = f"{file}: line {number}", _json(f"{file}: line {number}", line)
        keys = {str(key).lower(): key for key in entry} if isinstance(entry, dict) else {}
        name = next((entry[keys[word]] for word in NAMES if word in keys), None)
        said = next((entry[keys[word]] for word in TEXTS if word in keys), None)
        if name is None or said is None:
            known = ", ".join(map(str, keys)) or type(entry).__name__
            raise ValueError(f"{where}: has {known}, expected file_name and caption")
        for text in said if isinstance(said, list) else [said]:
            found.add(where, str(name).replace("\\", "/").removeprefix("./"), text)
        found.texts.setdefault(str(name), [])
    return found


def _coco(file: Path | str, content: str) -> Table:
    whole = _json(str(file), content)
    try:
        names = {one["id"]: str(one["file_name"]) for one in whole["images"]}
        said = sorted((one["id"], one["image_id"], one["caption"]) for one in whole["annotations"])
        found = Table(texts={names[i]: [] for i in sorted(names)}, ids={name: int(i) for i, name in names.items()})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file}: expected COCO's annotations, images with id and file_name, annotations with id, image_id and "
            f"caption; found others ({type(error).__name__}: {str(error)[:60]})"
        ) from error
    if not len(found.ids) == len(names) == len(whole["images"]):
        raise ValueError(f"{file}: names {len(whole['images'])} images, of which some are equal; expected each once")
    for number, image, text in said:
        if image not in names:
            raise ValueError(f"{file}: annotation {number} is of image {image}, which is not among its images")
        found.add(f"{file}: annotation {number}", names[image], text)
    return found


def _json(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: is no JSON ({str(error)[:80]})") from error


def matched(table: Table, file: Path | str, where: Path | str, pictures: Mapping[Parts, str]) -> Captions:
    """The captions of pictures.

    Args:
        table: of a file.
        file: which one, for messages.
        where: the pictures' source, likewise.
        pictures: picture -> its name, which a table may have without its suffix.

    Raises:
        ValueError: captions for pictures that are not there; the message names the first ones.
    """
    found, met = Captions(), set[str]()
    for picture, name in pictures.items():
        known = next((one for one in (name, name.rpartition(".")[0]) if one in table.texts), None)
        found[picture] = [] if known is None else table.texts[known]
        met |= {known} if known is not None else set()
    if lost := [name for name in table.texts if name not in met]:
        raise ValueError(
            f"{file}: has captions for {named(lost)}, which {'is' if len(lost) == 1 else 'are'} not among the "
            f"{len(pictures):,} pictures of {where}. Bring {'it' if len(lost) == 1 else 'them'} back, or remove those "
            "captions"
        )
    return found


def beside(
    files: Mapping[Parts, Parts], read_file: Any, pictures: Mapping[Parts, Parts]
) -> Iterator[tuple[Parts, str]]:
    """The text of the .txt beside each picture that has one: one caption, without a byte order mark or a last line
    break.

    Args:
        files: path of a .txt, as it compares with that of a picture -> where it is.
        read_file: reads a file.
        pictures: picture -> its path.

    Raises:
        ValueError: one is no UTF-8 text.
    """
    for picture, path in pictures.items():
        if (place := files.get(beside_of(path))) is not None:
            yield picture, _text(place, read_file)


def beside_of(path: Parts) -> Parts:
    """The path of a picture's .txt, by WebDataset's rule: up to the first dot of its name."""
    return (*path[:-1], path[-1].split(".")[0] + TXT)


def _text(place: Parts, read_file: Any) -> str:
    try:
        content = read_file(place)
    except ValueError:  # such as an empty file
        return ""
    try:
        return content.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise ValueError(f"{'/'.join(place)}: is no UTF-8 text ({error.reason})") from error


def named(names: list[str]) -> str:
    """How many pictures, and the first ones by name."""
    some = ", ".join(map(printable, names[:_SHOWN])) + (", ..." if len(names) > _SHOWN else "")
    return f"{len(names):,} picture{'s' * (len(names) > 1)} ({some})"


def empty(names: list[str]) -> Unused:
    """Empty captions, as what is not used."""
    return [(name, NO_TEXT) for name in names]


def mark(texts: list[str]) -> str:
    """What stands for captions where it is only compared whether they changed."""
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:12]
