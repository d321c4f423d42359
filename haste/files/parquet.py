"""Pictures in the rows of parquet files, as hubs keep data sets: a column `image` of structs with `bytes`. No torch.

Needs pyarrow, which is not among the package's requirements: nothing else does.
"""

from __future__ import annotations

import collections
import itertools
import json
import re
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from haste.files.walk import EMPTY, Directory, Parts, Unused, why_unreadable

SUFFIX = ".parquet"
_HELD = 2  # groups of rows in memory at once
_IMAGES = ("image", "img")


class Rows:
    """The pictures of a parquet file, of those that a path with a `*` means, or of all of one split in a folder.

    Rows are read by groups, the last two of which are kept: so pictures are cheap in the order of `names` only.

    Attributes:
        root: the path.
        names: (file, row) of every picture, in order.
        unused: names of the files that are not used, each with its reason.
    """

    def __init__(self, path: Path | str):
        """
        Raises:
            ValueError: pyarrow is missing, there are no such files or files of several splits, or one is truncated
                or has no column of pictures; the message says which.
        """
        self.root, self.unused, self.names = Path(path), Unused(), list[Parts]()
        self._groups: dict[str, list[range]] = {}
        self._images: dict[str, str] = {}  # the column of pictures, by file
        self._held: collections.OrderedDict[tuple[str, int], Any] = collections.OrderedDict()
        self._lock = threading.Lock()
        self._files = {file.name: file for file in self._found()}
        self._sizes = {name: file.stat().st_size for name, file in self._files.items()}
        for name, file in self._files.items():
            with self._opened(name) as opened:
                schema = opened.schema_arrow
                counts = [opened.metadata.row_group(group).num_rows for group in range(opened.num_row_groups)]
            if min(counts, default=0) < 0 or sum(counts) > self._sizes[name]:
                raise ValueError(f"{file}: says that it has {sum(counts):,} rows, which is more than its bytes")
            self._images[name] = _image_column(file, schema)
            ends = [0, *itertools.accumulate(counts)]
            self._groups[name] = [range(low, high) for low, high in itertools.pairwise(ends)]
            self.names += [(name, str(row)) for row in range(ends[-1])]
        if not self.names:
            raise ValueError(f"{path}: found no rows, expected pictures")

    def read(self, parts: Parts) -> bytes:
        """A picture's file. Thread-safe.

        Raises:
            ValueError: the row holds none, or is damaged.
        """
        name, row = parts[0], int(parts[1])
        group = next(number for number, rows in enumerate(self._groups[name]) if row in rows)
        with self._lock:
            if (name, group) not in self._held:
                with self._opened(name) as opened:
                    self._held[name, group] = opened.read_row_group(group, columns=[self._images[name]]).column(0)
                while len(self._held) > _HELD:
                    self._held.popitem(last=False)
            value = self._held[name, group][row - self._groups[name][group].start].as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        if not content:
            raise ValueError(EMPTY if content == b"" else "a row without a picture's bytes")
        return content

    def size(self, parts: Parts) -> int:
        """The size in bytes of the file that a row is in: that of a row is not known without reading it."""
        return self._sizes[parts[0]]

    def labels(self, column: str | None) -> tuple[list[str], list[int]]:
        """The classes, and the label of each of `names`.

        Args:
            column: of the labels; None is `label`, or the only one that the file says to hold classes.

        Raises:
            ValueError: no such column, or a row without a label.
        """
        classes, found = list[str](), list[Any]()
        for number, (name, file) in enumerate(self._files.items()):
            with self._opened(name) as opened:
                schema = opened.schema_arrow
            names = _class_names(schema)
            asked = column or _label_column(file, schema.names, names)
            if asked not in schema.names:
                raise ValueError(f"{file}: no column {asked!r}, found {', '.join(schema.names)}")
            if number and names.get(asked, []) != classes:
                raise ValueError(f"{file}: names other classes than {next(iter(self._files))}")
            classes = names.get(asked, [])
            with self._opened(name) as opened:
                found += opened.read(columns=[asked]).column(0).to_pylist()
        wrong = next((row for row, one in enumerate(found) if not _is_label(one, classes)), None)
        if wrong is not None:
            what = f"one of {len(classes)} classes" if classes else "a number from 0 or a text"
            raise ValueError(
                f"{self.root}: row {'/'.join(self.names[wrong])} has label {found[wrong]!r}, expected {what}"
            )
        if classes:
            return classes, found
        values = sorted(set(found), key=lambda one: (isinstance(one, str), one))
        places = {value: place for place, value in enumerate(values)}
        return [str(value) for value in values], [places[value] for value in found]

    def _found(self) -> list[Path]:
        if "*" in self.root.name:
            found = sorted(self.root.parent.glob(self.root.name))
        elif self.root.is_dir():
            found = self._of_folder(Directory(self.root))
        else:
            found = [self.root] if self.root.is_file() else []
        if wrong := next((file for file in found if why_unreadable(file)), None):
            raise ValueError(f"{wrong}: expected a {SUFFIX}, found {why_unreadable(wrong)}")
        if not found or any(file.suffix != SUFFIX for file in found):
            raise ValueError(f"{self.root}: expected {SUFFIX} files, found {found[0].name if found else 'none'}")
        return found

    def _of_folder(self, inside: Directory) -> list[Path]:
        found = sorted(name for name in inside.names if name[-1].endswith(SUFFIX))
        rest = {*inside.names} - {*found}
        self.unused = [*inside.unused, *(("/".join(name), f"no {SUFFIX} files") for name in sorted(rest))]
        splits = sorted(
            {"/".join((*name[:-1], re.sub(r"-?\d+(-of-\d+)?$", "*", name[-1][: -len(SUFFIX)]))) for name in found}
        )
        if len(splits) > 1:
            raise ValueError(
                f"{self.root}: has {len(splits)} sets of rows ({', '.join(splits[:4])}"
                f"{', ...' if len(splits) > 4 else ''}); expected one, such as "
                f"{self.root}/{splits[-1].removesuffix('*')}*{SUFFIX}"
            )
        return [self.root.joinpath(*name) for name in found]

    @contextmanager
    def _opened(self, name: str) -> Generator[Any]:
        file = self._files[name]
        try:
            from pyarrow import parquet
        except ImportError as error:
            raise ValueError(f"{file}: reading {SUFFIX} needs pyarrow: pip install 'haste[parquet]'") from error
        try:
            with parquet.ParquetFile(file) as opened:
                yield opened
        except Exception as error:  # of many classes, where a file is damaged
            what = " ".join(str(error).split())[:200]
            raise ValueError(f"{file}: expected a {SUFFIX}, found a truncated or foreign file ({what})") from error


def _image_column(file: Path, schema: Any) -> str:
    """The column of pictures: structs with `bytes`, or bytes."""
    from pyarrow import types

    def is_bytes(kind: Any) -> bool:
        return types.is_binary(kind) or types.is_large_binary(kind)

    structs = [
        f.name
        for f in schema
        if types.is_struct(f.type) and any(g.name == "bytes" and is_bytes(g.type) for g in f.type)
    ]
    found = structs or [field.name for field in schema if is_bytes(field.type)]
    if (named := [name for name in found if name in _IMAGES]) or len(found) == 1:
        return (named or found)[0]
    what = f"{len(found)} of them: {', '.join(found)}" if found else f"columns {', '.join(schema.names)}"
    raise ValueError(f"{file}: expected a column 'image' of structs with bytes, found {what}")


def _class_names(schema: Any) -> dict[str, list[str]]:
    """Column -> names of its classes, as the file says."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {
            name: [*map(str, about["names"])] for name, about in features.items() if about.get("_type") == "ClassLabel"
        }
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def _label_column(file: Path, columns: list[str], names: dict[str, list[str]]) -> str:
    if "label" in columns:
        return "label"
    if len(names) == 1:
        return next(iter(names))
    raise ValueError(
        f"{file}: which of its columns holds the labels ({', '.join(columns)})? Name it in images.labels, or train "
        "without labels by classes: 0"
    )


def _is_label(value: Any, classes: list[str]) -> bool:
    if isinstance(value, int):
        return value >= 0 and (not classes or value < len(classes))
    return isinstance(value, str) and not classes
