"""Cosines between gradients that papers print (HASTE, Tables 1 and 2), as if they were found by the measure.

They stand behind what was measured of the same model and method, as a run of their own that is named by its source.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from haste.report.content import Benchmark, Measured, Report, Row
from haste.report.papers import is_like, lines_of

FILES = {"REPA": "gradient_cosine_repa.csv", "HASTE": "gradient_cosine_haste.csv"}  # by method
TERMS = {"REPA": "features", "HASTE": "alignment"}  # papers print those of all terms together, in the measure's words
MEASURE = "gradient-cosine"
RESOLUTION = 256  # pixels a side of the images that they are of


def printed(row: Row, benchmark: Benchmark | None) -> list[Mapping[str, str]]:
    """The published cosines of a row's model and method: block (from 1), iteration, t, cosine, source. The means over t
    that a source prints too are left out: they follow from these."""
    if not is_like(row, benchmark) or benchmark is None or benchmark.resolution != RESOLUTION:
        return []
    lines = lines_of(FILES[row.method]) if row.method in FILES else ()
    return [line for line in lines if line["model"] == row.model and line["t"] != "mean"]


def with_published(report: Report, ones: Sequence[Measured]) -> Iterator[Sequence[Measured]]:
    """The files of one measure by their runs' models and methods, and behind each group what papers print of it, of the
    blocks that were measured. All files are there, whatever the measure."""
    rows, groups = {row.run: row for row in report.rows}, dict[tuple[str, str], list[Measured]]()
    for one in ones:
        row = rows.get(one.run)
        known = one.found["measure"] == MEASURE and row is not None and printed(row, report.benchmark)
        groups.setdefault((row.model, row.method) if known and row else ("", ""), []).append(one)
    for whose, group in groups.items():
        yield group
        if whose != ("", ""):
            yield list(_published(group, printed(rows[group[0].run], report.benchmark), whose))


def _published(
    ones: Sequence[Measured], lines: Sequence[Mapping[str, str]], whose: tuple[str, str]
) -> Iterator[Measured]:
    """Published cosines of the blocks at which some files have any."""
    blocks = {str(row["block"]) for one in ones for row in one.found["rows"]}
    steps: dict[tuple[str, int], list[Mapping[str, str]]] = {}
    for line in lines:
        if line["block"] in blocks:
            steps.setdefault((line["source"], int(line["iteration"])), []).append(line)
    for (source, step), some in steps.items():
        yield _found(ones[0], f"{source}: {', '.join(whose)}", step, some, TERMS[whose[1]])


def _found(like: Measured, run: str, step: int, lines: Sequence[Mapping[str, str]], term: str) -> Measured:
    """Lines of a published file as what a measure found."""
    rows = [
        {"term": term, "t": float(line["t"]), "block": int(line["block"]), "cosine": float(line["cosine"])}
        for line in lines
    ]
    digits = max(len(line["cosine"].partition(".")[2]) for line in lines)
    return Measured(like.name, run, 0, step, {**like.found, "rows": rows, "notes": []}, printed=digits)
