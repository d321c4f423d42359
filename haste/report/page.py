"""The report as one self-contained HTML file, with its tables beside it as CSV, Markdown and LaTeX."""

from __future__ import annotations

import base64
import itertools
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from haste.cluster import accounting
from haste.files import artefact
from haste.files.artefact import replacing
from haste.plan.plan import Plan
from haste.report import embed, figures, formats, gather, probes, sweeps, systems, tables
from haste.report.compare import Line, guidance_text, lines
from haste.report.content import NONE, Part, Report, Row
from haste.report.doubts import doubts
from haste.report.figures import Panel
from haste.report.finding import caution, context, finding, headline, lead, speedup_table, speedups
from haste.report.forks import fork_made, fork_panels, fork_tables, sentences
from haste.report.formats import Entry, Head, Table, text_cell
from haste.report.headline import headline_panel
from haste.report.measures import anchor, measure_panels, measure_tables
from haste.report.replay import reading_panels
from haste.report.times import duration, duration_cell, time_table

log = logging.getLogger("haste.report")

OURS = re.compile(
    r"(results|guided|parts|time|speed-up|published[\w-]*|ablation-[\w-]+|fork-[\w-]+|measure-[\w-]+)\.(csv|md|tex)"
)  # files of tables
BANDS = " Lines are means over seeds, bands one sample standard deviation."
KINDS = {"csv": ("CSV", "text/csv"), "md": ("Markdown", "text/markdown"), "tex": ("LaTeX", "text/x-tex")}
MOST = 20_000_000  # bytes of a page that a mail still takes: a larger one has pictures of half the resolution


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
        words = [text_cell(word) for word in (_spaced(part.part), part.name, quality)]
        entries.append(Entry([*words, duration_cell(part.provenance.get("seconds"))]))
    return Table("parts", "Parts", [Head("part"), Head("name"), Head("quality"), Head("made in", True)], entries)


def write(report: Report, folder: Path | str) -> Path:
    """Write every table as CSV, Markdown and LaTeX, results.csv with a line per seed, and last index.html into a
    folder, each atomically. Tables of an earlier report that this one lacks are removed.

    Returns:
        The path of index.html, which needs no other file: it holds the tables' files too.

    Raises:
        ValueError: a row without scores, or a grid that is not a PNG file; the message names it.
    """
    folder, files = Path(folder), _files(report)
    page = render(report, files=files)
    if len(page.encode()) > MOST:
        page = render(report, dense=1, files=files)
    for name, text in files.items():
        _write_text(folder / name, text)
    for old in folder.glob("*.*"):
        if OURS.fullmatch(old.name) and old.name not in files:
            old.unlink()
    _write_text(folder / "index.html", page)
    return folder / "index.html"


def _files(report: Report) -> dict[str, str]:
    """Name -> content of each table's files."""
    files = {"results.csv": tables.results(report).to_csv(index=False)}
    for table in (table for part in all_tables(report).values() for table in part):
        files.setdefault(f"{table.name}.csv", formats.to_csv(table))
        files[f"{table.name}.md"] = formats.to_markdown(table)
        files[f"{table.name}.tex"] = formats.to_latex(table, tables.arrows(report))
    return files


def _write_text(path: Path, text: str) -> None:
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8")


def text(report: Report, width: int | None = None) -> str:
    """The results and the speed-ups for a terminal."""
    shown = formats.to_text(tables.main_tables(report), report.title, width)
    said = [*doubts(report), *map(str, speedups(report)), *report.notes]
    return shown + "".join(f"{line}\n" for line in said)


def render(report: Report, dense: int = 2, files: Mapping[str, str] | None = None) -> str:
    """The page as text, with `dense` pixels of a picture for one of the page; `files` are the tables', if made."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    # Names, notes and configurations come from the user, so everything is escaped except the fragments built here.
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"duration": duration, "value": value_text}
    environment.globals |= {
        "made": made,
        "guidance": guidance_text,
        "files": {name: _link(name, content) for name, content in (files or _files(report)).items()},
        "kinds": {kind: title for kind, (title, _) in KINDS.items()},
        "untitled": ("Results", "Parts", "Time"),
    }
    arrows, first = tables.arrows(report), headline_panel(report)
    shared = embed.Shared(report.real, dense)
    grids = [(step, [embed.grid_of(grid, shared) for grid in group]) for step, group in embed.by_step(report)]
    return environment.get_template("template.html.j2").render(
        report=report,
        finding=finding(report),
        caution=caution(report),
        context=context(report),
        doubts=doubts(report),
        first=_shown([first] if first else []),
        tables={
            name: [(table, Markup(formats.to_html(table, arrows))) for table in found]
            for name, found in all_tables(report).items()
        },
        lead=lead(report),
        bands=BANDS if any(len(line.seeds) > 1 for line in lines(report)) else "",
        lines=[(line, _title(line)) for line in lines(report)],
        styles=figures.styles(report),
        score_panels=_by_protocol(figures.score_panels(report, besides=headline(report))),
        guidance_panels=_by_protocol(sweeps.guidance_panels(report)),
        loss_panels=_shown([*figures.loss_panels(report), *reading_panels(report)]),
        measure_panels=[(name, _shown(found)) for name, found in [*measure_panels(report), *_scattered(report)]],
        pictures=embed.of_measures(report, dense),
        fork_says=sentences(report),
        fork_panels=_shown(fork_panels(report)),
        forked=fork_made(report),
        measured=[(anchor(report, one), f"{one.name} of {one.run}, step {one.step:,}", one) for one in report.measures],
        grids=grids,
        strips=list(shared.strips.values()),
    )


def _link(name: str, content: str) -> str:
    """A file within the page."""
    return f"data:{KINDS[name.rsplit('.', 1)[1]][1]};base64,{base64.b64encode(content.encode()).decode()}"


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
        "Scores": {**(score.get("scores") or {}), "PSNR, dB": score.get("psnr"), "samples": score.get("samples")},
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
    log.info("report: reading scores, logs and measures")
    found = gather.report(plan)
    log.info("report: drawing tables, figures and pictures")
    folder = Path(plan.report).parent
    header = {"schema": artefact.SCHEMA, "kind": "report", "configuration": plan.config.model_dump(mode="json")}
    index = write(found, folder)
    log.info("%s: written, %.1f MB", index, index.stat().st_size / 1e6)
    for old in folder.glob("made-*.json"):
        old.unlink()
    artefact.write_json(plan.report_made, {**header, "provenance": found.provenance})
