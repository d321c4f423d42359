"""A configuration for somebody's own pictures, with a reason for each line: `haste new`. No torch.

It looks at the pictures' names and at some of their headers, and at this machine. The template beside this file holds
the settings: of a laptop, where every network is small and trained on the pictures, and of GPUs with public networks.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import json
import re
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jinja2
import psutil
import yaml

from haste import config
from haste.data import pictures
from haste.data.ahead import cores
from haste.files import archives, artefact, captions, listing, parquet
from haste.files.walk import Directory, Parts, Unused, grouped, printable, told
from haste.networks import driver

LEAST = 20  # pictures; of fewer no model, and no score of one, says anything
_SPLIT = re.compile(r"(train|val|test|dev|eval)(ing|id|idation|uation)?[-_]?\d*", re.IGNORECASE)  # of a folder
_OF_SPLIT = re.compile(rf"(?:^|[-_.])({_SPLIT.pattern})[-_.]", re.IGNORECASE)  # in the name of an archive
_LOOKED = 256  # pictures whose headers are read
_IN_CLASS = 8  # pictures of a class on average; fewer teach nothing about it
_JOBS, _JOB = 4, 2.0  # jobs at once that a table of three runs keeps busy; GB of memory of each, mostly torch itself
_BATCH, _BATCH_SMALL = 256, 64  # images per step, as the papers; of small networks
_PER_GB = 6.0  # images at once, a GB: SiT-B/2 with both losses takes 38.6 GB for 256 of 256 px, by `haste memory`
_ENLARGED = 96  # px, the median short side below which public networks would see blurred enlargements


@dataclasses.dataclass(frozen=True)
class Look:
    """What lies in a place.

    source: its kind, as in `images.source`; table: a .csv of labels, if it says them; count: of pictures; sizes:
    pictures of each class by its name, empty without labels; because: of what sizes the classes are, or why there are
    none; side: the median of the pictures' shorter sides, px; odd: what some of them are, in words; bad: the share that
    cannot be read; captioned: how many have a .txt beside them; unused: the other files.
    """

    source: str
    table: Path | None
    count: int
    sizes: dict[str, int]
    because: str
    side: int
    odd: list[str]
    bad: float
    captioned: int
    unused: Unused


def look(root: Path) -> Look:
    """Look at a folder of pictures, an archive, or parquet files, without decoding a picture.

    Raises:
        ValueError: there are none, too few, none that can be read, or a data set with its splits or captions; says what
            was found and what to do.
    """
    source = _source(root)
    found = listing.survey(source, str(root), 0, said=captions.BESIDE)
    _check_splits(root, source, found)
    if len(found.files) < LEAST:
        raise ValueError(
            f"{root}: found {len(found.files)} pictures, expected at least {LEAST}, and hundreds for samples that are "
            "worth looking at; name the folder above it if there are more beside it"
        )
    sizes, table, because, used = _classes(source, root, found)
    side, odd, bad = _headers(root, source, found)
    unused = [one for one in found.unused if one not in used]
    return Look(source, table, len(found.files), sizes, because, side, odd, bad, len(found.marks), unused)


def _source(root: Path) -> str:
    """Which kind of source a place is: by its name, or by what lies in the folder."""
    if not root.exists() and not any(letter in root.name for letter in "*?["):
        raise ValueError(
            f"{root}: found nothing there, expected a folder of pictures, a .zip, a .tar or .parquet files"
        )
    if not root.is_dir():
        if root.name.lower().endswith(archives.COMPRESSED):
            return "archive"  # which says what to do
        kinds = {**dict.fromkeys(archives.SUFFIXES, "archive"), parquet.SUFFIX: "parquet"}
        if kind := kinds.get(root.suffix.lower()):
            return kind
        expected = "a folder of pictures, a .zip, a .tar or a .parquet"
        raise ValueError(f"{root}: found a file of {root.suffix or 'no suffix'}, expected {expected}")
    if any(root.glob("annotations/captions_train*.json")):
        raise ValueError(
            f"{root}: found MS-COCO with its captions, which this command does not write a configuration for; expected "
            "pictures alone. Write this folder as images.path into a copy of config/coco256.yaml, or name one of its "
            f"splits, such as {root}/train2014, to leave the captions out"
        )
    names = {Path(parts[-1].lower()).suffix for parts in Directory(root).names}
    if not names & {*listing.SUFFIXES}:
        if names & {*archives.SUFFIXES}:
            return "archive"
        if parquet.SUFFIX in names:
            return "parquet"
    return "folder"


def _check_splits(root: Path, source: str, found: listing.Listing) -> None:
    """Refuse folders and archives that are splits of a data set: they are no classes, and one is not to be trained on.
    What parquet files are of, their reader looks at."""
    files = [*root.iterdir()] if source == "archive" and root.is_dir() else []
    of = [_OF_SPLIT.search(file.name) for file in files if file.suffix.lower() in archives.SUFFIXES]
    splits = sorted({match[1].strip("-_0123456789").lower() for match in of if match})
    if len(splits) > 1 and all(of):
        raise ValueError(
            f"{root}: its archives are of the splits {' and '.join(splits)} of a data set; expected those to train on "
            "alone, in a folder of their own"
        )
    tops = collections.Counter(parts[0] if parts[1:] else "" for parts, _ in found.files)
    if all(_SPLIT.fullmatch(name) for name in tops):
        first = min(tops, key=lambda name: (not name.lower().startswith("train"), -tops[name]))
        raise ValueError(
            f"{root}: its pictures are in {' and '.join(sorted(tops))}, splits of a data set and not classes; expected "
            f"those to train on alone, as in {root / first}"
        )


def _classes(
    source: str, root: Path, every: listing.Listing
) -> tuple[dict[str, int], Path | None, str, set[tuple[str, str]]]:
    """Pictures of each class by its name, the table that says the classes, a reason in words, and what of
    `every.unused` says the classes."""
    tables: list[Path | None] = [None, *sorted(root.glob("*.csv"))] if source == "folder" else [None]
    reasons = []
    for table in tables:
        try:
            found = listing.survey(source, str(root), 2, None if table is None else str(table), lazily=False)
        except ValueError as error:
            reasons.append(str(error).removeprefix(f"{root}: "))
            continue
        assert found.classes is not None
        counts = collections.Counter(label for _, label in found.files)
        sizes = {name: counts[label] for label, name in enumerate(found.classes)}
        if len(sizes) < 2:
            reasons.append("the pictures are in no folders of classes, and there are no labels beside them")
        elif min(sizes.values()) < 2 or len(found.files) < _IN_CLASS * len(sizes):
            reasons.append(f"{len(sizes):,} classes, some of one picture, or of less than {_IN_CLASS} on average")
        else:
            few, many = (pick(sizes.items(), key=lambda one: one[1]) for pick in (min, max))
            said = f"{printable(few[0])!r} with {few[1]:,} pictures to {printable(many[0])!r} with {many[1]:,}"
            said = f"each with {few[1]:,} pictures" if few[1] == many[1] else said
            beside = {*every.unused} - {*found.unused}
            return sizes, table, said, beside | {one for one in every.unused if root / one[0] == table}
    return {}, None, "without labels: " + printable(reasons[0]), set()


def _headers(root: Path, source: str, found: listing.Listing) -> tuple[int, list[str], float]:
    """The median of the shorter sides, what some pictures are, and the share of those that cannot be read."""
    read = _reader(root, source)
    # Rows of parquet files are cheap in their order only.
    step = 1 if source == "parquet" else -(-len(found.files) // _LOOKED)
    some = [parts for parts, _ in found.files][::step][:_LOOKED]
    sides, kinds, reasons = [], collections.Counter[str](), []
    for parts in some:
        try:
            size, kind = pictures.opened(read(found.places.get(parts, parts)), _header)
        except Exception as error:  # of many classes; a picture that cannot be read is nothing new
            reasons.append(pictures.reason(error, root.joinpath(*parts)))
            continue
        sides.append(min(size))
        kinds[kind] += 1
    if not sides:
        raise ValueError(
            f"{root}: none of the {len(some)} pictures that were tried can be read ({printable(reasons[0])}), expected "
            "PNG, JPEG or WebP that other programs show"
        )
    odd = [f"{100 * many // len(some) or 1} % {kind}" for kind, many in kinds.most_common() if kind]
    return int(statistics.median(sides)), odd, len(reasons) / len(some)


def _reader(root: Path, source: str) -> Callable[[Parts], Path | io.BytesIO]:
    if source == "folder":
        return Directory(root).file
    packed = archives.Archives(root) if source == "archive" else parquet.Rows(root)
    return lambda parts: io.BytesIO(packed.read(parts))


def _header(image: Any) -> tuple[tuple[int, int], str]:
    """Size, and what is odd about it; empty for plain RGB."""
    if image.has_transparency_data:
        return image.size, "with transparent areas, which become white"
    names = {"RGB": "", "L": "grey", "1": "two-coloured", "P": "of a palette, opaque", "CMYK": "CMYK"}
    return image.size, names.get(image.mode, f"of mode {image.mode}")


# ---- the file


def write(root: Path, out: Path | None, small: bool = False) -> list[str]:
    """Write a configuration for pictures and this machine; returns lines for the terminal.

    Args:
        root: the pictures.
        out: the file; None is one in config/ named after the pictures.
        small: small networks trained here even where there are GPUs: nothing is loaded from the internet.

    Raises:
        ValueError: the file exists, the path cannot stand in a configuration, or as in `look`.
    """
    if not str(root).isprintable() or re.search(r"\$(\w|\{)|^~", str(root)):
        raise ValueError(
            f"{printable(str(root))}: a configuration cannot hold this path, in which $, ~ and control characters mean "
            "something else; rename it, or make a link to it with a plainer name: ln -s"
        )
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", root.resolve().stem).strip("._-") or "mine"
    out = out or Path("config", f"{name}.yaml")
    if out.exists():
        raise ValueError(f"{out}: is there already and is not changed; remove it, or name another file by -o")
    found = look(root)
    here = _machine(found, small)
    images = _images(found, here["small"])
    here |= _batch(here, images["trained_on"])
    text = _rendered({**images, **here, "found": found, "path": root, "name": name})
    config.resolve(yaml.safe_load(text))
    with artefact.replacing(out) as aside:
        aside.write_text(text, encoding="utf-8")
    classes = f"{len(found.sizes):,} classes" if found.sizes else "no classes"
    fetch = [] if here["small"] else [f"next: haste fetch -c {out}, which loads the public networks' weights"]
    return [
        f"{out}: written for {found.count:,} pictures, {classes}, and a machine of {here['machine']}",
        *filter(None, [told(grouped(found.unused), between="\n          "), _captions(found)]),
        *fetch,
        f"next: haste plan -c {out}",
        f"then: snakemake --cores {here['cores']} --configfile {out}",
    ]


def _captions(found: Look) -> str:
    if not found.captioned:
        return ""
    return (
        f"{found.captioned:,} of {found.count:,} pictures have a .txt beside them, which is not used; if these are "
        "captions, images.captions: beside and condition: captions train with them (config/README.md)"
    )


def _rendered(settings: Mapping[str, Any]) -> str:
    options: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, **options)
    environment.filters["quoted"] = lambda value: json.dumps(str(value), ensure_ascii=False)  # which is YAML, too
    return environment.get_template("new.yaml.j2").render(settings)


def _images(found: Look, small: bool) -> dict[str, Any]:
    """The keys of `images` that follow from the pictures, and how often so many images in training show each."""
    sides = (16, 32) if small else (128, 256)
    counts, usable = found.sizes.values(), int(found.count * (1 - found.bad))
    holdout = max(1, min(usable // 10, 1000))
    return {
        "resolution": max((side for side in sides if 4 * found.side >= 3 * side), default=sides[0]),
        "holdout": holdout,
        "trained_on": usable - holdout,
        "seen": lambda images: f"{images / max(1, usable - holdout):,.0f}",
        "uneven": bool(counts) and max(counts) > 4 * min(counts),
    }


def _machine(found: Look, small: bool) -> dict[str, Any]:
    """How jobs run here: in words, and the keys of `training` and `runtime` that follow from it."""
    count, memory, there = cores(), psutil.virtual_memory().total / 1e9, driver.equipment()
    reasons = {
        "as --small asks": small,
        "no whole GPU was found": not there,
        f"half of the pictures have less than {_ENLARGED} px": found.side < _ENLARGED,
    }
    why = next((reason for reason, holds in reasons.items() if holds), "")
    words = f"{count} cores, {memory:.0f} GB of memory and {len(there) or 'no'} GPU{'s' * (len(there) > 1)}"
    jobs = max(1, min(count, _JOBS, int(memory / _JOB)))
    threads = max(1, count // jobs)
    here = {"machine": words, "small": bool(why), "why": why, "jobs": jobs, "threads": threads, "cores": threads * jobs}
    if why:
        return here
    gigabytes = int(min(one.gigabytes for one in there))
    ranks = max(ranks for ranks in (1, 2, 4, 8) if ranks <= len(there))
    precision = "bf16" if all(one.bf16 for one in there) else "fp16"
    return {**here, "gigabytes": gigabytes, "processes": ranks, "precision": precision, "cores": count}


def _batch(here: Mapping[str, Any], images: int) -> dict[str, int]:
    """Images per step, a power of two of at most so many images, and in how many parts a GPU takes its share."""
    batch = min(_BATCH_SMALL if here["small"] else _BATCH, 2 ** (images.bit_length() - 1))
    if here["small"]:
        return {"batch": batch}
    fit = here["processes"] * _PER_GB * here["gigabytes"]
    return {"batch": batch, "accumulate": next(n for n in (1, 2, 4, 8, 16, 32) if n * fit >= batch or n == 32)}
