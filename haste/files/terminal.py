"""Tables in a terminal. A narrow one gets fewer columns, and the line below says which are left out."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Collection, Iterator, Sequence

from rich import box
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

FILE = 160  # characters of a line where output goes to a file, which has no width
LINES = 2  # of a heading or a short cell at most
PROSE = 40  # characters of a cell that may take more lines
LEAST = 24  # characters of such a cell's lines at least

Heads = Sequence[tuple[str, bool]]


def console(file_width: int = FILE) -> Console:
    """Standard output, as wide as the terminal or COLUMNS says, else `file_width` wide."""
    return Console(width=None if has_width() else file_width, highlight=False)


def has_width() -> bool:
    """Whether standard output has a width, for which columns may have to go."""
    return sys.stdout.isatty() or "COLUMNS" in os.environ


def fitted(
    heads: Heads,
    rows: Sequence[Sequence[Text | str]],
    width: int | None,
    *,
    title: str = "",
    sections: Collection[int] = (),
    first_out: Sequence[str] = (),
    lines: box.Box = box.HEAVY_HEAD,
) -> list[RenderableType]:
    """A table, and below it the names of the columns for which there is no room. The first column always stays.

    Args:
        heads: each column's name, and whether it holds numbers: these are on the right and never broken.
        rows: a cell a column. Markup in a str is shown as it is.
        width: characters of a line; None has room for all columns.
        title: above the table.
        sections: places in `rows` below which there is a line.
        first_out: the columns that go first, in order; then they go from the right.
        lines: rich's box.
    """
    texts = [[cell if isinstance(cell, Text) else Text(cell) for cell in row] for row in rows]
    needs, wants = [], []
    for at, (name, number) in enumerate(heads):
        cells = [row[at].plain for row in texts]
        needs.append(max([_least(name), *(len(cell) if number else _least(cell) for cell in cells)]))
        wants.append(max([needs[at], len(name) if lines is box.HEAVY_HEAD else 0, *map(len, cells)]))
    for shown, padding in _tries(heads, first_out):
        around = {"padding": (0, padding, 0, 0), "pad_edge": False} if lines is box.SIMPLE_HEAD else {}
        drawn = Table(box=lines, title=Text(title) if title else None, title_justify="left", **around)  # type: ignore[arg-type]
        for at in shown:
            words, side = Text("\n".join(_wrapped(heads[at][0], needs[at]))), "right" if heads[at][1] else "left"
            drawn.add_column(words, justify=side, no_wrap=heads[at][1], overflow="fold", min_width=needs[at])  # type: ignore[arg-type]
        room = 0 if width is None else width - Console(width=10**6).measure(drawn).minimum
        if room >= 0:
            break
    if width is not None:  # rich, left to itself, may take from columns that have nothing to give
        for column, at in sorted(zip(drawn.columns, shown, strict=True), key=lambda one: wants[one[1]] - needs[one[1]]):
            column.width = max(needs[at] + min(room, wants[at] - needs[at]), 1)
            column.header = Text("\n".join(_wrapped(heads[at][0], column.width)))
            room -= column.width - needs[at]
    for place, row in enumerate(texts):
        drawn.add_row(*(row[at] for at in shown), end_section=place in sections)
    left_out = ", ".join(name for at, (name, _) in enumerate(heads) if at not in shown)
    return [drawn, *([below(f"Not shown in {width} columns: {left_out}.")] if left_out else [])]


def _tries(heads: Heads, first_out: Sequence[str]) -> Iterator[tuple[list[int], int]]:
    """Places of the columns that are shown, and the space beside them: from all to the first one alone."""
    places = {name: at for at, (name, _) in enumerate(heads)}
    goes = [places[name] for name in first_out if name in places]
    goes += [at for at in reversed(range(1, len(heads))) if at not in goes]
    yield list(range(len(heads))), 1
    for gone in range(len(heads)):
        yield [at for at in range(len(heads)) if at not in goes[:gone]], 0


def below(words: str) -> RenderableType:
    """A sentence below a table, indented."""
    return Padding(Text(words), (0, 0, 0, 2))


def _least(text: str) -> int:
    """The fewest characters of a line in which words fill at most `LINES`, unless it is prose."""
    longest = min(max(map(len, text.split()), default=1), PROSE)
    if len(text) > PROSE:
        return max(longest, LEAST)
    return next(
        (width for width in range(longest, len(text)) if len(_wrapped(text, width)) <= LINES), max(len(text), 1)
    )


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
