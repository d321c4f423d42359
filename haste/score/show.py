"""Scores as a table on the terminal, as CSV and as JSON. No torch."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich import box
from rich.console import Console, Group, RenderableType
from rich.text import Text

from haste.files import artefact, terminal

if TYPE_CHECKING:
    from haste.score.columns import Score
    from haste.score.images import Scores

NONE = "–"
DIGITS = {"KID": 5, "precision": 4, "recall": 4}  # decimals; others have 3
ARROWS = {"lower": "↓", "higher": "↑"}


def table(found: Sequence[Scores], console: Console | None = None) -> None:
    """Print the sets side by side, a line per score, the best in bold if all are comparable, then the remarks.

    Args:
        found: sets of samples, scored against one reference.
        console: where to print; None is standard output.
    """
    console = console or terminal.console()
    for part in _parts(found, console.width):
        console.print(part)


def _parts(found: Sequence[Scores], width: int) -> list[RenderableType]:
    heads = [("", False), *((name, True) for name in names(found))]
    rows: list[list[Text | str]] = [["samples", *(f"{scores.samples['images']:,}" for scores in found)]]
    for label in dict.fromkeys(label for scores in found for label in scores.columns):
        cells = [scores.columns.get(label) for scores in found]
        best = _best(found, [cell for cell in cells if cell is not None])
        better = next(cell.better for cell in cells if cell is not None)
        texts = [
            Text(_written(label, cell), style="bold" if cell is not None and cell is best else "") for cell in cells
        ]
        rows.append([f"{label} {ARROWS[better]}", *texts])
    grid = terminal.fitted(heads, rows, width, lines=box.SIMPLE_HEAD)
    return [Text(_title(found[0])), *grid, Group(*_below(found))]


def _title(scores: Scores) -> str:
    who = ", ".join(f"{detector['name']} {detector['identity'][:8]}" for detector in scores.detectors)
    if scores.reference is None:
        return f"by {who}"
    return f"against {scores.reference['path']}, by {who}"


def names(found: Sequence[Scores]) -> list[str]:
    """The names of the sets: the shortest distinct ends of their paths."""
    paths = [Path(scores.samples["path"]) for scores in found]
    for parts in range(1, 1 + max(len(path.parts) for path in paths)):
        short = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(short)) == len(short):
            return short
    return [f"{path.name} ({number})" for number, path in enumerate(paths, 1)]


def _best(found: Sequence[Scores], cells: Sequence[Score]) -> Score | None:
    """The best of a line; None if there is nothing to compare: one set, or sets of different counts."""
    if len(cells) < 2 or len({scores.samples["images"] for scores in found}) > 1:
        return None
    pick = min if cells[0].better == "lower" else max
    return pick(cells, key=lambda cell: cell.value)


def _written(label: str, score: Score | None) -> str:
    if score is None:
        return NONE
    digits = DIGITS.get(label.split(" ")[0], 3)
    bar = "" if score.error is None else f" ± {score.error:.{digits}f}"
    return f"{score.value:.{digits}f}{bar}"


def _below(found: Sequence[Scores]) -> list[Text]:
    """The kinds of error bars, and every set's notes; notes that all sets share appear once."""
    bars: dict[str, list[str]] = {}
    for scores in found:
        for label, score in scores.columns.items():
            if score.what is not None and label not in bars.setdefault(score.what, []):
                bars[score.what].append(label)
    lines = [Text("± " + "; ".join(f"{what} ({', '.join(labels)})" for what, labels in bars.items()))] if bars else []
    for note in dict.fromkeys(note for scores in found for note in _said(scores)):
        mine = [name for name, scores in zip(names(found), found, strict=True) if note in _said(scores)]
        who = "" if len(mine) == len(found) else f"{', '.join(mine)}: "
        lines.append(Text(f"! {who}{note}", style="yellow"))
    counts = {scores.samples["images"] for scores in found}
    if len(counts) > 1:
        lines.append(Text("! sets of different counts: their columns do not compare", style="yellow"))
    return lines


def _said(scores: Scores) -> list[str]:
    missing: dict[str, list[str]] = {}
    for label, why in scores.absent.items():
        missing.setdefault(why, []).append(label)
    return [*(f"no {', '.join(labels)}: {why}" for why, labels in missing.items()), *scores.notes]


def csv(found: Sequence[Scores]) -> str:
    """A line per set: what was compared, scores under their columns, error bars under "NAME error"."""
    lines: list[dict[str, Any]] = []
    for scores in found:
        line: dict[str, Any] = {
            "samples": scores.samples["path"],
            "count": scores.samples["images"],
            "samples_identity": scores.samples["identity"],
            "reference": None if scores.reference is None else scores.reference["path"],
            "reference_identity": None if scores.reference is None else scores.reference["identity"],
            "detectors": " ".join(f"{one['name']}:{one['identity'][:12]}" for one in scores.detectors),
        }
        for label, score in scores.columns.items():
            line |= {label: score.value} | ({} if score.error is None else {f"{label} error": score.error})
        lines.append(line | {"notes": "; ".join(_said(scores))})
    return pd.DataFrame(lines).to_csv(index=False)


def write(found: Sequence[Scores], *, json: Path | None = None, csv_file: Path | None = None) -> None:
    """Write the requested files. One set is one object; several are a list under "sets"."""
    if json is not None:
        sets = [scores.json() for scores in found]
        whole = {"schema": artefact.SCHEMA, "kind": "image scores", "sets": sets, "provenance": sets[0]["provenance"]}
        artefact.write_json(json, sets[0] if len(sets) == 1 else whole)
    if csv_file is not None:
        with artefact.replacing(csv_file) as aside:
            aside.write_text(csv(found))


def text(found: Sequence[Scores], width: int = 120) -> str:
    """The table as plain text."""
    out = io.StringIO()
    table(found, Console(file=out, width=width, highlight=False))
    return out.getvalue()
