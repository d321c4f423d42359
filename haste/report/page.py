"""The report as one self-contained HTML file, with its tables beside it as CSV, Markdown and LaTeX."""

from __future__ import annotations

import base64
import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image

from haste.cluster import accounting
from haste.files import artefact
from haste.files.artefact import replacing
from haste.measure.pictures import Picture
from haste.plan.plan import Plan
from haste.report import figures, formats, gather, probes, sweeps, systems, tables
from haste.report.compare import Line, guidance_text, lines
from haste.report.content import NONE, Grid, Part, Report, Row
from haste.report.figures import Panel
from haste.report.finding import context, finding, lead, speedup_table, speedups
from haste.report.forks import fork_made, fork_panels, fork_tables, sentences
from haste.report.formats import Entry, Head, Table, text_cell
from haste.report.measures import anchor, measure_panels, measure_tables
from haste.report.replay import reading_panels
from haste.report.times import duration, duration_cell, time_table

PNG = b"\x89PNG\r\n\x1a\n"
OURS = re.compile(
    r"(results|guided|parts|time|speed-up|published[\w-]*|ablation-[\w-]+|fork-[\w-]+|measure-[\w-]+)\.(csv|md|tex)"
)  # files of tables
BANDS = " Lines are means over seeds, bands one sample standard deviation."
CELL = 68  # largest width of a grid's column on the page, in pixels
CELL_WITH_WORDS = 150
MOST_WORDS = 80  # characters under a picture; pointing at it shows all


def all_tables(report: Report) -> dict[str, list[Table]]:
    """Every table of the page, by its section."""
    speedup = speedup_table(report)
    return {
        "results": tables.main_tables(report),
        "speed": [speedup] if speedup else [],
        "published": [*tables.published_tables(report), *systems.system_tables(report)],
        "ablations": tables.ablations(report),
        "forks": fork_tables(report),
        "costs": measure_tables(report, drawn=[False]),
        "measures": measure_tables(report, drawn=[True]),
        "parts": [_parts(report.parts)] if report.parts else [],
        "time": [time_table(report.stages)] if report.stages else [],
    }


def _parts(parts: Sequence[Part]) -> Table:
    entries = []
    for part in parts:
        quality = ", ".join(f"{_spaced(name)} {value_text(value)}" for name, value in part.quality.items())
        words = [text_cell(word) for word in (part.part, part.name, quality)]
        entries.append(Entry([*words, duration_cell(part.provenance.get("seconds"))]))
    return Table("parts", "Parts", [Head("part"), Head("name"), Head("quality"), Head("made in", True)], entries)


def write(report: Report, folder: Path | str) -> Path:
    """Write every table as CSV, Markdown and LaTeX, results.csv with a line per seed, and last index.html into a
    folder, each atomically. Tables of an earlier report that this one lacks are removed.

    Returns:
        The path of index.html.

    Raises:
        ValueError: a row without scores, or a grid that is not a PNG file; the message names it.
    """
    folder = Path(folder)
    page, found = render(report), [table for part in all_tables(report).values() for table in part]
    files = {"results.csv": tables.results(report).to_csv(index=False)}
    for table in found:
        files.setdefault(f"{table.name}.csv", formats.to_csv(table))
        files[f"{table.name}.md"] = formats.to_markdown(table)
        files[f"{table.name}.tex"] = formats.to_latex(table, tables.arrows(report))
    for name, text in files.items():
        _write_text(folder / name, text)
    for old in folder.glob("*.*"):
        if OURS.fullmatch(old.name) and old.name not in files:
            old.unlink()
    _write_text(folder / "index.html", page)
    return folder / "index.html"


def _write_text(path: Path, text: str) -> None:
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8")


def text(report: Report, width: int | None = None) -> str:
    """The results and the speed-ups for a terminal."""
    shown = formats.to_text(tables.main_tables(report), report.title, width)
    return shown + "".join(f"{line}\n" for line in [*map(str, speedups(report)), *report.notes])


def render(report: Report) -> str:
    """The page as text."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    # Names, notes and configurations come from the user, so everything is escaped except the fragments built here.
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"duration": duration, "value": value_text}
    environment.globals |= {
        "made": made,
        "guidance": guidance_text,
        "files": ("csv", "md", "tex"),
        "untitled": ("Results", "Parts", "Time"),
    }
    arrows = tables.arrows(report)
    return environment.get_template("template.html.j2").render(
        report=report,
        finding=finding(report),
        context=context(report),
        tables={
            name: [(table, Markup(formats.to_html(table, arrows))) for table in found]
            for name, found in all_tables(report).items()
        },
        lead=lead(report),
        bands=BANDS if any(len(line.seeds) > 1 for line in lines(report)) else "",
        lines=[(line, _title(line)) for line in lines(report)],
        styles=figures.styles(report),
        score_panels=_by_protocol(figures.score_panels(report)),
        guidance_panels=_by_protocol(sweeps.guidance_panels(report)),
        loss_panels=_shown([*figures.loss_panels(report), *reading_panels(report)]),
        measure_panels=[(name, _shown(found)) for name, found in [*measure_panels(report), *_scattered(report)]],
        pictures=_pictures(report),
        fork_says=sentences(report),
        fork_panels=_shown(fork_panels(report)),
        forked=fork_made(report),
        measured=[(anchor(report, one), f"{one.name} of {one.run}, step {one.step:,}", one) for one in report.measures],
        grids=[(step, [_grid(grid) for grid in group]) for step, group in _by_step(report)],
    )


def _shown(panels: Iterable[Panel]) -> list[tuple[Panel, Markup]]:
    return [(panel, Markup(panel.svg)) for panel in panels]


def _by_protocol(panels: Sequence[Panel]) -> list[tuple[str, list[tuple[Panel, Markup]]]]:
    groups = itertools.groupby(panels, key=lambda panel: panel.protocol)
    return [(protocol, _shown(group)) for protocol, group in groups]


def _scattered(report: Report) -> list[tuple[str, list[Panel]]]:
    panel = probes.scatter(report)
    return [("Distance against accuracy", [panel])] if panel else []


def _title(line: Line) -> str:
    row, guided = line.first, guidance_text(line.first.score)
    return f"{row.run}, step {row.step:,}" + ("" if guided == "none" else f", guidance {guided}")


def _by_step(report: Report) -> list[tuple[str, list[Grid]]]:
    """Grids that may be compared, side by side: those of the same step and sampling, in the report's order."""
    names = {grid.sampling for grid in report.grids}
    by_step = sorted(report.grids, key=lambda grid: (grid.step, grid.sampling))
    return [
        (f"Step {step:,}" + (f", {sampling}" if len(names) > 1 else ""), list(group))
        for (step, sampling), group in itertools.groupby(by_step, key=lambda grid: (grid.step, grid.sampling))
    ]


def _grid(grid: Grid) -> dict[str, Any]:
    what = f"Samples of {grid.run} at step {grid.step:,}"
    columns = grid.columns or max(len(grid.labels), 1)
    alt = f"{what}, one column per class: {', '.join(map(str, grid.labels))}" if grid.labels else what
    if grid.words:
        facts = {"title": grid.run, "labels": grid.labels, "columns": columns, "alt": alt, "link": ""}
        return {**facts, "told": list(_told(grid, columns, what)), "most": columns * CELL_WITH_WORDS}
    return _framed(grid.run, grid.labels, columns, alt, grid.image)


def _told(grid: Grid, columns: int, what: str) -> Iterator[dict[str, str]]:
    """A grid's pictures one by one, each with its words: all of them, and as many as fit under it."""
    data_uri(grid.image, 2 * columns * CELL_WITH_WORDS)  # refuses what is no picture
    with Image.open(grid.image) as image:
        side = image.width // columns
        for place, words in enumerate(grid.words):
            left, top = place % columns * side, place // columns * side
            picture, out = image.crop((left, top, left + side, top + side)), io.BytesIO()
            if side > 2 * CELL_WITH_WORDS:
                picture = picture.resize((2 * CELL_WITH_WORDS, 2 * CELL_WITH_WORDS))
            picture.save(out, "WEBP", quality=90, lossless=side <= 2 * CELL_WITH_WORDS)
            src = "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode()
            short = words if len(words) <= MOST_WORDS else words[: MOST_WORDS - 1].rstrip() + "…"
            yield {"src": src, "words": words, "short": short, "alt": f"{what}: {words}"}


def _framed(
    title: str, labels: Sequence[str], columns: int, alt: str, image: Path | bytes, link: str = ""
) -> dict[str, Any]:
    """A PNG of equal columns for the page; `link` is the id of the place that says how it was made."""
    src = data_uri(image, 2 * columns * CELL)  # two pixels of the picture for one of the page
    facts = {"title": title, "labels": labels, "columns": columns, "alt": alt, "told": []}
    return {**facts, "src": src, "most": columns * CELL, "link": link}


def _pictures(report: Report) -> list[tuple[str, list[tuple[str, list[dict[str, Any]]]]]]:
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


def value_text(value: Any) -> str:
    """A value as text: numbers with four digits and thousands separators, a dash for a missing value."""
    if value is None or value == "":
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{_spaced(k)} {value_text(v)}" for k, v in value.items()) or NONE
    if isinstance(value, list | tuple):
        return "[" + ", ".join(value_text(v) for v in value) + "]"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _spaced(name: Any) -> str:
    return str(name).replace("_", " ")


def made(score: Mapping[str, Any], row: Row | None = None) -> list[tuple[str, Sequence[tuple[str, str]]]]:
    """How a score was made, in groups of (name, text): scores, training, sampling, detector, reference, provenance."""
    state, found = score.get("state") or {}, score.get("provenance") or {}
    seconds = found.get("seconds")
    groups = {
        "Scores": {**(score.get("scores") or {}), "samples": score.get("samples")},
        "Training": {**state, **(_recipe(row.recipe) if row else {})},
        "Sampling": {**(score.get("sampling") or {}), **({"NFE": score["nfe"]} if "nfe" in score else {})},
        "Detector": score.get("detector") or {},
        "Reference": score.get("reference") or {},
        "Made": {
            "time": found.get("made"),
            "took": None if seconds is None else duration(seconds),
            "score": row.file if row else "",
            "file": score.get("file"),
            "key": score.get("key"),
            **{k: found.get(k) for k in ("code", "versions", "hardware", "peak_memory_mb", "inputs")},
            "command": _command(found.get("command")),
        },
    }
    return [
        (title, pairs)
        for title, group in groups.items()
        if (pairs := [(_spaced(k), value_text(v)) for k, v in group.items() if v not in (None, "", {})])
    ]


def _recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe of a state, with its losses one by one."""
    flat = {k: v for k, v in recipe.items() if k not in ("terms", "recipe")}
    return {**flat, **{f"{kind} loss": term for kind, term in (recipe.get("terms") or {}).items()}}


def _command(command: Any) -> str | None:
    return " ".join(map(str, command)) if isinstance(command, list | tuple) else command


def make(plan: Plan) -> None:
    """Write a plan's page and tables with their provenance, after asking the cluster for the jobs' accounting.

    Raises:
        ValueError: as `haste.report.gather.report`.
    """
    accounting.update(plan)
    found = gather.report(plan)
    folder = Path(plan.report).parent
    header = {"schema": artefact.SCHEMA, "kind": "report", "configuration": plan.config.model_dump(mode="json")}
    write(found, folder)
    for old in folder.glob("made-*.json"):
        old.unlink()
    artefact.write_json(plan.report_made, {**header, "provenance": found.provenance})
