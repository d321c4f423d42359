"""What a source of pictures held when stores were made from it, so that a later change is noticed and named.

A source may change under its path while results exist: pictures are added, removed or replaced. The results folder
keeps one record per image store (`sources/NAME.json`) of the *contents* that were taken up, and the names, sizes and
labels of the pictures of each (`sources/NAME-IDENTITY.gz`). The first content taken up has the store's plain name; the
name of every other one also hashes its identity. So a name never depends on whether this machine can see the pictures.

A content's identity covers the relative names, sizes and labels of all pictures, in sorted order, and no times. An edit
that keeps the size is found where bytes are read: a store that is made again must be equal to the one before.
"""

from __future__ import annotations

import datetime
import gzip
import hashlib
import heapq
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from haste.files import artefact

KIND = "source"
UNUSED = "; the change is not used"
_NAMED = 3  # pictures named in a message

Pictures = list[bytes]  # a line per picture, sorted: its relative name, its size in bytes and its label


def pictures_of(found: Iterable[tuple[str, int, int | str]]) -> Pictures:
    """The lines of pictures given by relative name, size in bytes and label, or more that is said of them."""
    lines = (f"{name.translate(_ESCAPES)}\t{size}\t{label}\n" for name, size, label in found)
    return sorted(line.encode(errors="surrogatepass") for line in lines)  # names may be bytes that are not UTF-8


_ESCAPES = str.maketrans({"\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"})


def identity_of(pictures: Pictures) -> str:
    """The identity of a content: the first 12 hexadecimal digits of the sha256 of its lines."""
    return hashlib.sha256(b"".join(pictures)).hexdigest()[:12]


@dataclass(frozen=True)
class SourceRecord:
    """The record of a source for one image store.

    Attributes:
        root: the results folder.
        name: the store's plain name, `images-KEY`.
    """

    root: str
    name: str

    @property
    def path(self) -> Path:
        """The record's file."""
        return Path(self.root) / "sources" / f"{self.name}.json"

    def read(self) -> dict[str, Any] | None:
        """The record, None before anything was made.

        Raises:
            ValueError: a damaged record.
        """
        return artefact.read_json(self.path, KIND) if self.path.exists() else None

    @property
    def content(self) -> str:
        """The identity that the names of the content in use hash; "" for the first one."""
        return "" if (record := self.read()) is None else _named(record, record["current"])

    @property
    def contents(self) -> list[str]:
        """What the names of all contents hash that were taken up so far, in no order."""
        record = self.read()
        return [] if record is None else [_named(record, one) for one in record["contents"]]

    def check(self, where: str, pictures: Pictures) -> None:
        """Refuse a source that does not hold the content in use.

        Raises:
            ValueError: says what was added, removed and changed.
        """
        if changes := self.changes(where, pictures):
            raise ValueError(
                f"{changes}. The store is made from the former content: bring that back, or run `haste images "
                "--update`, which takes up the present one under new names, while existing results keep theirs"
            )

    def use(self, where: str, pictures: Pictures, before: int | None = None, anew: bool = False) -> None:
        """Take a content up: from now on, names are those of what is made from it.

        Args:
            where: the source, for messages.
            pictures: what it holds.
            before: the number of pictures of the first content, if a store was made from one that nobody recorded.
            anew: as another content although names and sizes are those of one before: its pixels are others.
        """
        now, since = identity_of(pictures), datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        record = self.read()
        if anew and record is not None:
            now += f"-{1 + sum(one.startswith(now) for one in record['contents'])}"
        if record is None:
            contents = {} if before is None else {"unknown": {"pictures": before, "since": since}}
            first = now if before is None else "unknown"
            record = {"schema": artefact.SCHEMA, "kind": KIND, "source": where, "first": first, "contents": contents}
        known = {now: {"pictures": len(pictures), "since": since}, **record["contents"]}
        with artefact.replacing(self._names(now)) as aside:
            aside.write_bytes(gzip.compress(b"".join(pictures), compresslevel=1, mtime=0))
        artefact.write_json(self.path, {**record, "current": now, "contents": known})

    def adopt(self, where: str, pictures: Pictures, store: str) -> None:
        """Record what the first store was made from, once a source is found that holds just that."""
        record, now = self.read(), identity_of(pictures)
        if record is None:
            self.use(where, pictures)
            self.check_store(store)
        else:
            known = {**record["contents"].pop("unknown"), "pictures": len(pictures), "store": store}
            artefact.write_json(self.path, {**record, "first": now, "contents": {**record["contents"], now: known}})

    def check_store(self, identity: str, decoder: str = "") -> None:
        """Remember the identity of the store that is made from the content in use; refuse another one later.

        Args:
            identity: of its rows.
            decoder: what decoded the pictures, whose version may decide the last bits of pixels.

        Raises:
            ValueError: the store was made before from pictures of the same names and sizes, and its pixels were others.
        """
        if (record := self.read()) is None:
            return
        known = {"store": identity, "decoder": decoder, **record["contents"][record["current"]]}
        if known["store"] != identity:
            others = (
                f"{decoder or 'another version'} decodes them otherwise than {known['decoder'] or 'the one before'}"
            )
            raise ValueError(
                f"{record['source']}: the images are {identity[:12]}, and were {known['store'][:12]} on "
                f"{known['since'][:10]}, although names and sizes are equal: pictures were edited since, or {others}. "
                "Put back what was there, or run `haste images --update`, which makes them under a new name"
            )
        artefact.write_json(self.path, {**record, "contents": {**record["contents"], record["current"]: known}})

    def changes(self, where: str, pictures: Pictures) -> str:
        """How a source differs from the content in use, in a sentence; "" if it does not, or if none is in use."""
        record = self.read()
        if record is None or record["current"].partition("-")[0] == identity_of(pictures):
            return ""
        known = record["contents"][record["current"]]
        before = self._read_names(record["current"])
        since = f"since {known['since'][:10]}"
        if before is None:
            counts = f"{len(pictures):,} pictures, and {known['pictures']:,} on {known['since'][:10]}"
            return f"{where}: {counts}{UNUSED}"
        old, new = ({line.split(b"\t")[0] for line in each} for each in (before - {*pictures}, {*pictures} - before))
        parts = [_counted("added", new - old), _counted("removed", old - new), _counted("changed", new & old)]
        return f"{where}: {', '.join(filter(None, parts))} {since}{UNUSED}"

    def _names(self, identity: str) -> Path:
        return self.path.with_name(f"{self.name}-{identity}.gz")

    def _read_names(self, identity: str) -> set[bytes] | None:
        try:
            lines = gzip.decompress(self._names(identity).read_bytes()).splitlines(keepends=True)
        except (OSError, EOFError, zlib.error):
            return None  # the count is in the record
        return {*lines} if identity_of(lines) == identity.partition("-")[0] else None


def _named(record: dict[str, Any], content: str) -> str:
    return "" if content == record["first"] else content


def _counted(verb: str, names: set[bytes]) -> str:
    if not names:
        return ""
    first = heapq.nsmallest(_NAMED, names)
    some = ", ".join(name.decode(errors="replace") for name in first) + (", ..." if len(names) > _NAMED else "")
    pictures = "1 picture was" if len(names) == 1 else f"{len(names):,} pictures were"
    return f"{pictures} {verb} ({some})"
