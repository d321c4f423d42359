"""Pictures as the page embeds them: no larger than they are shown, each once."""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from haste.measure.pictures import Picture
from haste.report.content import Grid, Real, Report
from haste.report.measures import anchor

PNG = b"\x89PNG\r\n\x1a\n"
CELL = 68  # largest width of a grid's column on the page, in pixels
CELL_WITH_WORDS = 150
MOST_WORDS = 80  # characters under a picture; pointing at it shows all
ROWS = 2  # of pictures below a grid: real, and as the autoencoder gives them back


def by_step(report: Report) -> list[tuple[str, list[Grid]]]:
    """Grids that may be compared, side by side: those of the same step and sampling, in the report's order."""
    names = {grid.sampling for grid in report.grids}
    by_step = sorted(report.grids, key=lambda grid: (grid.step, grid.sampling))
    return [
        (f"Step {step:,}" + (f", {sampling}" if len(names) > 1 else ""), list(group))
        for (step, sampling), group in itertools.groupby(by_step, key=lambda grid: (grid.step, grid.sampling))
    ]


@dataclass
class Shared:
    """The real pictures that belong below grids, one strip for each set of columns, which grids of these share."""

    real: Real | None
    dense: int
    strips: dict[tuple[str, ...], dict[str, Any]] = field(default_factory=dict)

    def below(self, grid: Grid, columns: int) -> dict[str, Any] | None:
        """The strip of a grid's columns; None if there is no picture of any of them."""
        if self.real is None or not (self.real.classes if grid.labels else not self.real.classes):
            return None
        key = tuple(map(str, grid.labels)) or tuple(map(str, range(columns)))
        if self.real.classes and not {*key} & {*self.real.classes}:
            return None
        if key not in self.strips:
            self.strips[key] = {"id": f"real-{len(self.strips)}", **_strip(self.real, key, self.dense)}
        return self.strips[key]


def _strip(real: Real, columns: Sequence[str], dense: int) -> dict[str, Any]:
    with Image.open(io.BytesIO(real.png), formats=("PNG",)) as opened:
        whole = opened.convert("RGBA")
    side = whole.height // ROWS
    names = list(real.classes) or [str(place) for place in range(whole.width // side)]
    picture = Image.new("RGBA", (side * len(columns), whole.height), (0, 0, 0, 0))
    for place, name in enumerate(columns):
        if name in names:
            left = names.index(name) * side
            picture.paste(whole.crop((left, 0, left + side, whole.height)), (place * side, 0))
    out = io.BytesIO()
    picture.save(out, "PNG")
    said = f"Real pictures, one {'of each class' if real.classes else 'a column'}, and below them what the autoencoder"
    return {
        "src": data_uri(out.getvalue(), dense * len(columns) * CELL),
        "width": len(columns),
        "height": ROWS,
        "alt": f"{said} makes of them",
    }


def grid_of(grid: Grid, shared: Shared) -> dict[str, Any]:
    """A grid of samples for the page, with the strip below it."""
    found = _grid(grid, shared.dense)
    return {**found, "below": shared.below(grid, found["columns"])}


def _grid(grid: Grid, dense: int) -> dict[str, Any]:
    what = f"Samples of {grid.run} at step {grid.step:,}"
    columns = grid.columns or max(len(grid.labels), 1)
    alt = f"{what}, one column per class: {', '.join(map(str, grid.labels))}" if grid.labels else what
    if grid.words:
        facts = {"title": grid.run, "labels": grid.labels, "columns": columns, "alt": alt, "link": ""}
        return {**facts, "told": list(_told(grid, columns, what, dense)), "most": columns * CELL_WITH_WORDS}
    return _framed(grid.run, grid.labels, columns, alt, grid.image, dense)


def _told(grid: Grid, columns: int, what: str, dense: int) -> Iterator[dict[str, str]]:
    """A grid's pictures one by one, each with its words: all of them, and as many as fit under it."""
    most = dense * CELL_WITH_WORDS
    data_uri(grid.image, columns * most)  # refuses what is no picture
    with Image.open(grid.image) as image:
        side = image.width // columns
        for place, words in enumerate(grid.words):
            left, top = place % columns * side, place // columns * side
            picture, out = image.crop((left, top, left + side, top + side)), io.BytesIO()
            if side > most:
                picture = picture.resize((most, most))
            picture.save(out, "WEBP", quality=90, lossless=side <= most)
            src = "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode()
            short = words if len(words) <= MOST_WORDS else words[: MOST_WORDS - 1].rstrip() + "…"
            yield {"src": src, "words": words, "short": short, "alt": f"{what}: {words}"}


def _framed(
    title: str, labels: Sequence[str], columns: int, alt: str, image: Path | bytes, dense: int, link: str = ""
) -> dict[str, Any]:
    """A PNG of equal columns for the page; `link` is the id of the place that says how it was made."""
    src = data_uri(image, dense * columns * CELL)
    facts = {"title": title, "labels": labels, "columns": columns, "alt": alt, "told": [], "below": None}
    return {**facts, "src": src, "most": columns * CELL, "link": link}


def of_measures(report: Report, dense: int) -> list[tuple[str, list[tuple[str, list[dict[str, Any]]]]]]:
    """The pictures that measures left, of the first seed of every run: name -> steps, the last one first."""
    found: dict[str, dict[int, dict[str, list[dict[str, Any]]]]] = {}
    for one in report.measures:
        by_run = found.setdefault(one.name, {}).setdefault(one.step, {})
        if one.run not in by_run:
            by_run[one.run] = [
                _framed(
                    f"{one.run}: {picture.title}",
                    picture.columns,
                    len(picture.columns),
                    f"{one.run} at step {one.step:,}. {picture.alt}",
                    picture.png,
                    dense,
                    anchor(report, one),
                )
                for picture in (Picture.read(one.file, entry) for entry in one.found.get("pictures", []))
            ]
    steps = {
        name: [
            (f"Step {step:,}", shown)
            for step, runs in sorted(steps.items(), reverse=True)
            if (shown := [*itertools.chain(*runs.values())])
        ]
        for name, steps in found.items()
    }
    return [(name, shown) for name, shown in steps.items() if shown]


def data_uri(image: Path | str | bytes, most: int) -> str:
    """A PNG, by its file or content, as a data URI: as it is if it is at most `most` pixels wide, else of that width,
    as WebP. A grid of 256 px samples has 6 MB, and ImageNet's tables have fifty.

    Raises:
        ValueError: the file is missing or not a PNG.
    """
    path = "a picture" if isinstance(image, bytes) else image
    try:
        content = image if isinstance(image, bytes) else Path(image).read_bytes()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ValueError(f"{path}: expected a PNG with samples, found {type(error).__name__}") from error
    if not content.startswith(PNG):
        raise ValueError(f"{path}: expected a PNG, found a file that begins with {content[:8]!r}")
    kind = "png"
    try:
        with Image.open(io.BytesIO(content)) as opened:
            if opened.width > most:
                small, out, kind = (
                    opened.resize((most, max(1, opened.height * most // opened.width))),
                    io.BytesIO(),
                    "webp",
                )
                small.save(out, "WEBP", quality=90)
                content = out.getvalue()
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"{path}: a damaged PNG ({error}); remove it, and the workflow draws it again") from error
    return f"data:image/{kind};base64," + base64.b64encode(content).decode()
