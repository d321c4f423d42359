"""The report as one HTML file that needs nothing else, with its table beside it as CSV and Markdown."""

from __future__ import annotations

import base64
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from haste.artefact import replacing
from haste.report import figures, tables
from haste.report.tables import Grid, Part, Report, Stage

PNG = b"\x89PNG\r\n\x1a\n"
CELL = 68  # pixels a column of a grid may be wide on a page, and half of it is the least on a phone


def write(report: Report, folder: Path | str) -> Path:
    """Write results.csv, results.md and, last, index.html into a folder; each whole or not at all.

    Returns:
        The path of index.html.

    Raises:
        ValueError: a row without scores, or a grid that is not a PNG file; the message names it.
    """
    folder = Path(folder)
    page = render(report)
    tables.to_csv(report, folder / "results.csv")
    _write_text(folder / "results.md", tables.to_markdown(report))
    _write_text(folder / "index.html", page)
    return folder / "index.html"


def _write_text(path: Path, text: str) -> None:
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8")


def render(report: Report) -> str:
    """The page as text."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    # Names, notes and configurations come from the user, so all is escaped but the fragments that we build.
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {"duration": duration, "value": value_text}
    environment.globals |= {"made": made, "guidance": tables.guidance_text}
    return environment.get_template("template.html.j2").render(
        report=report,
        finding=tables.finding(report),
        context=tables.context(report),
        table=Markup(tables.to_html(report)),
        rows=tables.ordered(report),
        shared=shared(report),
        styles=figures.styles(report),
        score_panels=[(p, Markup(p.svg)) for p in figures.score_panels(report)],
        loss_panels=[(p, Markup(p.svg)) for p in figures.loss_panels(report)],
        grids=[(step, [_grid(grid) for grid in group]) for step, group in _by_step(report)],
        parts=[(part, _quality(part)) for part in report.parts],
        total=Stage("total", sum(s.jobs for s in report.stages), sum(s.seconds for s in report.stages)),
    )


def shared(report: Report) -> list[str]:
    """What all rows agree on and the table therefore leaves out, as `model SiT-XL/2`."""
    found = {name: {str(getattr(row, name)) for row in report.rows} for name in ("model", "seed")}
    return [f"{name} {min(values)}" for name, values in found.items() if len(values) == 1]


def _by_step(report: Report) -> list[tuple[int, list[Grid]]]:
    """Grids that may be compared stand below one another: the same step, in the report's order."""
    by_step = sorted(report.grids, key=lambda grid: grid.step)
    return [(step, list(group)) for step, group in itertools.groupby(by_step, key=lambda grid: grid.step)]


def _grid(grid: Grid) -> dict[str, Any]:
    what = f"Samples of {grid.run} at step {grid.step:,}"
    columns = max(len(grid.labels), 1)
    alt = f"{what}, one column a class: {', '.join(map(str, grid.labels))}"
    return {"run": grid.run, "labels": grid.labels, "columns": columns, "alt": alt, "src": data_uri(grid.image)} | {
        "most": columns * CELL,
        "least": columns * CELL // 2,
    }


def data_uri(path: Path | str) -> str:
    """A PNG file as a data URI.

    Raises:
        ValueError: the file is missing or not a PNG.
    """
    try:
        content = Path(path).read_bytes()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ValueError(f"{path}: expected a PNG with samples, found {type(error).__name__}") from error
    if not content.startswith(PNG):
        raise ValueError(f"{path}: expected a PNG, found a file that begins with {content[:8]!r}")
    return "data:image/png;base64," + base64.b64encode(content).decode()


def _quality(part: Part) -> list[tuple[str, str]]:
    return [(name.replace("_", " "), value_text(value)) for name, value in part.quality.items()]


def value_text(value: Any) -> str:
    """A value for people: four digits of a number, thousands apart, a dash for nothing."""
    if value is None or value == "":
        return tables.NONE
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return value if isinstance(value, str) else _inline(value)


def duration(seconds: float | None) -> str:
    """`0.4 s`, `25 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds is None:
        return tables.NONE
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{round(whole / 60) // 60} h {round(whole / 60) % 60:02d} min"


def made(score: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How a score was made, as pairs to list: what names it and its inputs; the rest is in its provenance."""
    state, detector = score.get("state") or {}, score.get("detector") or {}
    return [
        ("key", value_text(score.get("key"))),
        ("state", value_text(state.get("file"))),
        ("trajectory", value_text(state.get("trajectory"))),
        ("sampling", ", ".join(f"{k} {_inline(v)}" for k, v in (score.get("sampling") or {}).items()) or tables.NONE),
        ("detector", " ".join(_inline(v) for v in detector.values())),
        ("samples", value_text(score.get("samples"))),
        ("reference", ", ".join(f"{k} {_inline(v)}" for k, v in (score.get("reference") or {}).items())),
    ]


def _inline(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
