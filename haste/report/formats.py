"""A table and its formats: HTML, CSV, Markdown, LaTeX with booktabs, and text for a terminal."""

from __future__ import annotations

import csv
import io
import re
import shutil
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.text import Text

from haste.files.terminal import below, fitted, has_width
from haste.report.content import NONE


@dataclass(frozen=True)
class Head:
    """A column: its name, and whether it holds numbers, which are right-aligned."""

    name: str
    number: bool = False


@dataclass(frozen=True)
class Cell:
    """A cell of a table: its text, the value for sorting and for CSV with all digits, the spread that follows `±`, and
    the id of the element on the page that shows how it was made."""

    text: str
    value: Any = None
    spread: float | None = None
    places: int = 0
    bold: bool = False
    link: str = ""

    @property
    def around(self) -> str:
        """` ± 1.3`, or nothing."""
        return "" if self.spread is None else f" ± {self.spread:.{self.places}f}"


@dataclass(frozen=True)
class Entry:
    """A line of a table. `kind` is "", "floor" (real against real, in the foot) or "published" (not measured here);
    `first` starts a group."""

    cells: Sequence[Cell]
    kind: str = ""
    first: bool = False


@dataclass(frozen=True)
class Table:
    """A table independent of its format. `name` is the stem of its files, `notes` are sentences below it."""

    name: str
    title: str
    heads: Sequence[Head]
    entries: Sequence[Entry]
    notes: Sequence[str] = ()

    def column(self, name: str) -> list[Cell]:
        """The cells below a heading."""
        place = [head.name for head in self.heads].index(name)
        return [entry.cells[place] for entry in self.entries]


def text_cell(value: Any) -> Cell:
    """A cell of a word or a plain number; a missing value is a dash."""
    if value is None or value == "" or value != value:
        return Cell(NONE)
    if isinstance(value, float) and not value.is_integer():
        return Cell(f"{value:,.1f}", value)
    return Cell(value if isinstance(value, str) else f"{int(value):,}", value)


def number_cell(value: float | None, places: int, **more: Any) -> Cell:
    """A cell of a measured number."""
    if value is None:
        return Cell(NONE)
    text = f"{value:.{places}f}"
    return Cell(text if float(text) else text.removeprefix("-"), value, places=places, **more)


# ---------------------------------------------------------------------------------------------------------------------
# CSV and Markdown


def to_csv(table: Table) -> str:
    """All digits; a column that has spreads is followed by a column of them."""
    spread = [any(entry.cells[i].spread is not None for entry in table.entries) for i in range(len(table.heads))]
    names = [[h.name, *([f"{h.name} ±"] if s else [])] for h, s in zip(table.heads, spread, strict=True)]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([name for both in names for name in both])
    for entry in table.entries:
        cells = [[c.value, *([c.spread] if s else [])] for c, s in zip(entry.cells, spread, strict=True)]
        writer.writerow(["" if value is None else value for both in cells for value in both])
    return buffer.getvalue()


def _markdown_escape(text: str) -> str:
    text = " ".join(text.split())  # a line break would end the row
    return "".join("\\" + c if c in "\\`*_|<>[]~$" else c for c in text)


def to_markdown(table: Table) -> str:
    """GitHub's Markdown, the best in bold, published numbers in italics."""
    lines = [[_markdown_escape(h.name) for h in table.heads], ["--:" if h.number else ":--" for h in table.heads]]
    for entry in table.entries:
        mark = "_" if entry.kind == "published" else ""
        shown = [_markdown_escape(cell.text + cell.around) for cell in entry.cells]
        pairs = zip(entry.cells, shown, strict=True)
        lines.append([f"**{t}**" if c.bold else t if t == NONE else f"{mark}{t}{mark}" for c, t in pairs])
    notes = "".join(f"\n{_markdown_escape(note)}\n" for note in table.notes)
    return "".join("| " + " | ".join(line) + " |\n" for line in lines) + notes


# ---------------------------------------------------------------------------------------------------------------------
# LaTeX

_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "±": r"$\pm$", "–": "--", "—": "---", "−": "$-$", "≤": r"$\leq$", "≥": r"$\geq$",
    "≈": r"$\approx$", "×": r"$\times$", "·": r"$\cdot$", "→": r"$\to$", "∞": r"$\infty$",
    "‘": "`", "’": "'", "“": "``", "”": "''", "…": r"\dots{}",
}  # fmt: skip
LONG = 32  # characters of a cell that may break
_GREEK = re.compile("GREEK (SMALL|CAPITAL) LETTER ([A-Z]+)")
_DIRECTION = {True: r" $\downarrow$", False: r" $\uparrow$", None: ""}


def _latex_escape(text: str) -> str:
    return "".join(_latex_character(c) for c in " ".join(text.split()))


def _latex_character(c: str) -> str:
    """pdfLaTeX typesets letters of Latin scripts as they are; Greek ones need math mode."""
    greek = _GREEK.fullmatch(unicodedata.name(c, ""))
    if greek:
        size, letter = greek.groups()
        same = {"omicron": "o", "lamda": r"\lambda"}.get(letter.lower(), rf"\{letter.lower()}")
        return f"${same}$" if size == "SMALL" else _capital(letter)
    return _LATEX.get(c, c)


def _capital(letter: str) -> str:
    """Greek capitals that look like Latin ones have no name in LaTeX."""
    looks = {"ALPHA": "A", "BETA": "B", "EPSILON": "E", "ZETA": "Z", "ETA": "H", "IOTA": "I", "KAPPA": "K", "MU": "M"}
    looks |= {"NU": "N", "OMICRON": "O", "RHO": "P", "TAU": "T", "CHI": "X"}
    return looks.get(letter) or rf"$\{letter.replace('LAMDA', 'LAMBDA').capitalize()}$"


def to_latex(table: Table, lower: dict[str, bool | None]) -> str:
    """A `table` with booktabs' rules, ready for a paper; `lower` gives a heading its arrow.

    Needs `\\usepackage{booktabs}`. Rules separate groups, and the floor from what is above it.
    """
    heads = [_latex_escape(h.name) + _DIRECTION[lower.get(h.name)] for h in table.heads]
    lines = [" & ".join(heads) + r" \\", r"\midrule"]
    for place, entry in enumerate(table.entries):
        if place and (entry.first or (entry.kind == "floor") != (table.entries[place - 1].kind == "floor")):
            lines.append(r"\midrule")
        lines.append(" & ".join(_latex_cell(cell, entry.kind) for cell in entry.cells) + r" \\")
    notes = " ".join(_latex_escape(note) for note in table.notes)
    return "\n".join(
        [
            r"% needs \usepackage{booktabs}",
            r"\begin{table}[t]",
            r"\centering",
            rf"\caption{{{_latex_escape(table.title)}. {notes}}}".replace(". }", ".}"),
            rf"\label{{tab:{table.name}}}",
            rf"\begin{{tabular}}{{{''.join('r' if h.number else 'l' for h in table.heads)}}}",
            r"\toprule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def _latex_cell(cell: Cell, kind: str) -> str:
    text = _latex_escape(cell.text + cell.around)
    if kind == "published" and cell.text != NONE:
        return rf"\textit{{{text}}}"
    return rf"\textbf{{{text}}}" if cell.bold else text


# ---------------------------------------------------------------------------------------------------------------------
# HTML


def to_html(table: Table, arrows: dict[str, bool | None] | None = None) -> str:
    """An HTML fragment: headings are buttons that sort, the floor is in the foot, lines separate groups.

    Numbers link to `#LINK`, where the page shows how they were made.
    """
    places = range(len(table.heads))
    width = [max((len(e.cells[i].around) for e in table.entries), default=0) for i in places]
    tails = [max((len(_tail(e.cells[i].text)) for e in table.entries), default=0) for i in places]
    signs = {True: "lower is better", False: "higher is better", None: ""}
    head = "".join(
        f'<th scope="col"{_right(h)}><button type="button"{_hint(signs[(arrows or {}).get(h.name)])}>'
        f"{_words(h.name)}</button></th>"
        for h in table.heads
    )
    body = "\n".join(_html_entry(table, entry, width, tails) for entry in table.entries if entry.kind != "floor")
    foot = "\n".join(_html_entry(table, entry, width, tails) for entry in table.entries if entry.kind == "floor")
    foot = f"<tfoot>{foot}</tfoot>" if foot else ""
    opening = f'<table class="data" id="table-{table.name}"><thead><tr>{head}</tr></thead>'
    return f"{opening}\n<tbody>\n{body}\n</tbody>{foot}</table>"


def _room(digits: str) -> str:
    return f'<span class="room" aria-hidden="true">{digits}</span>' if digits else ""


def _hint(words: str) -> str:
    return f' title="{words}"' if words else ""


def _words(name: str) -> str:
    # A heading may break between its words, but not at the hyphen of a detector's name.
    return " ".join(f'<span class="word">{escape(word)}</span>' for word in name.split())


def _right(head: Head) -> str:
    return ' class="n"' if head.number else ""


def _tail(text: str) -> str:
    """The decimal point of a number and what follows it."""
    found = re.fullmatch(r"-?[\d,]+(\.\d+)?", text)
    return (found[1] or "") if found else ""


def _html_entry(table: Table, entry: Entry, width: Sequence[int], tails: Sequence[int]) -> str:
    cells = []
    for place, (head, cell) in enumerate(zip(table.heads, entry.cells, strict=True)):
        shown = escape(cell.text)
        if cell.bold:
            shown = f"<strong>{shown}</strong>"
        if cell.link:
            shown = f'<a href="#{cell.link}">{shown}</a>'
        if head.number and cell.value is not None:  # pad missing decimals, so that the points align
            shown += _room(".0000000000"[len(_tail(cell.text)) : tails[place]])
        if width[place] and cell.value is not None:  # all spreads have one width, so that the numbers before them align
            shown += f'<span class="pm" style="--pm: {width[place]}ch">{escape(cell.around)}</span>'
        opening, tag = ('th scope="row"', "th") if place == 0 else ("td", "td")
        value = "" if cell.value is None else escape(str(cell.value))
        room = ' class="long"' if len(cell.text) > LONG and not head.number else _right(head)
        cells.append(f'<{opening}{room} data-v="{value}">{shown}</{tag}>')
    names = " ".join(name for name in ("first" if entry.first else "", entry.kind) if name)
    opening = f'<tr class="{names}">' if names else "<tr>"
    return f"{opening}{''.join(cells)}</tr>"


# ---------------------------------------------------------------------------------------------------------------------
# A terminal


def to_text(tables: Iterable[Table], title: str, width: int | None = None) -> str:
    """Tables for a terminal, one below the other: as wide as that, with fewer columns if it is narrow. In a file, or
    where `width` says so, lines are longer only if numbers or words would else be cut."""
    limit = shutil.get_terminal_size().columns if width is None and has_width() else None
    drawn = [(table, _terminal(table, limit)) for table in tables]
    least = [Console(width=10**6).measure(found[0]).minimum for _, found in drawn]
    console = Console(file=io.StringIO(), width=limit or max([width or 120, *least]), force_terminal=False)
    console.print(Text(title))
    for table, found in drawn:
        console.print(*found, *map(below, table.notes), sep="\n")
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def _terminal(table: Table, width: int | None) -> list[RenderableType]:
    entries, last = table.entries, len(table.entries) - 1
    return fitted(
        [(head.name, head.number) for head in table.heads],
        # Text, not str: a run may be called "[red]", which rich would take for a colour.
        [[Text(c.text + c.around, "bold" if c.bold else "") for c in entry.cells] for entry in entries],
        width,
        sections=[at for at in range(last) if entries[at].kind != "floor" == entries[at + 1].kind],
        lines=box.SIMPLE_HEAD,
    )
