"""A replay of triggers as a table for the terminal and as a picture: readings over steps, and where they stop.

The report's page draws the readings of its runs in the same way.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from haste.files import artefact
from haste.ops.replay import Outcome
from haste.report.content import Read, Report
from haste.report.figures import INK, PALETTE, SIZE, TEXT, WIDTH, Panel, draw_line, dress, new_figure, styles, to_svg
from haste.report.formats import Cell, Entry, Head, Table, text_cell, to_text

FORMATS = (".svg", ".png")
FAINT = 0.4  # opacity of all lines but the first of a trigger


def terminal(name: str, said: Sequence[Outcome], width: int | None = None) -> str:
    """The table of a replay: a line a trigger and its settings; those that all lines of a trigger share are below."""
    shared = {
        trigger: _shared([one.settings for one in said if one.settings["trigger"] == trigger])
        for trigger in _names(said)
    }
    heads = [Head("of"), Head("trigger"), Head("settings"), Head("stops at", True), Head("reading there"), Head("why")]
    entries, before = [], ""
    for one in said:
        kept = {k: v for k, v in one.settings.items() if k not in {"trigger", *shared[one.settings["trigger"]]}}
        words = ", ".join([one.whose, *(f"{key} {_value(value)}" for key, value in kept.items())])
        stops = f"{one.step:,}" if one.step is not None else f"never, up to {_last(one):,}" if one.history else ""
        shown = ", ".join(f"{name} {value:.4g}" for name, value in one.shown.items())
        why = one.missing or (one.decision.reason if one.decision else "")
        cells = [one.source.term, one.settings["trigger"], words, stops, shown, why]
        entries.append(
            Entry([Cell(text) if text else text_cell(None) for text in cells], first=one.source.term != before)
        )
        before = one.source.term
    notes = [
        f"{name}: {', '.join(f'{k} {_value(v)}' for k, v in same.items())}." for name, same in shared.items() if same
    ]
    if any(one.source.found == "log" and one.history for one in said):
        notes.append("Averages of a run's log are of the means that it has, not of every step.")
    if any(one.source.found == "published" and not one.missing for one in said):
        notes.append("By default at the times of the table that are nearest to the trigger's own.")
    return to_text([Table("replay", name, heads, entries, notes)], f"When triggers would stop {name}", width)


def _names(said: Sequence[Outcome]) -> list[str]:
    return list(dict.fromkeys(one.settings["trigger"] for one in said))


def _last(one: Outcome) -> int:
    return one.history[-1].step


def _shared(settings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The settings that all have alike, without the trigger's name."""
    return {k: v for k, v in settings[0].items() if k != "trigger" and all(one.get(k) == v for one in settings)}


def _value(value: Any) -> str:
    return f"[{', '.join(map(_value, value))}]" if isinstance(value, list) else "none" if value is None else str(value)


def draw(name: str, said: Sequence[Outcome], path: Path) -> None:
    """Write a picture of a replay, SVG or PNG: a panel for what triggers of one kind read of a term, with a line where
    each would stop it.

    Raises:
        ValueError: another ending of the file's name.
        OSError: it cannot be written.
    """
    if path.suffix not in FORMATS:
        raise ValueError(f"{path}: expected a file named *{' or *'.join(FORMATS)}")
    groups: dict[tuple[str, str, str], list[Outcome]] = {}
    for one in said:
        if one.history:
            groups.setdefault((one.source.term, one.settings["trigger"], str(one.trigger.needs)), []).append(one)
    with matplotlib.rc_context(TEXT):
        figure = Figure(figsize=(SIZE[0] * 1.6, SIZE[1] * len(groups)), layout="constrained")
        for axes, ((term, trigger, _), ones) in zip(
            figure.subplots(len(groups), squeeze=False)[:, 0], groups.items(), strict=True
        ):
            _panel(axes, f"{trigger} of {term}", ones)
        figure.suptitle(name, color=INK, parse_math=False)
        with artefact.replacing(path) as aside:
            figure.savefig(aside, format=path.suffix[1:], dpi=150, facecolor="white")


def _panel(axes: Axes, title: str, ones: Sequence[Outcome]) -> None:
    shown, history = ones[0].trigger.shown, max((one.history for one in ones), key=len)
    dress(axes, ", ".join(shown))
    axes.set_title(title, color=INK, fontsize=9.5, parse_math=False)
    steps, colours = [reading.step for reading in history], itertools.cycle(PALETTE)
    for name, colour in zip(shown, colours, strict=False):
        values = [reading.values[name] for reading in history]
        axes.plot(steps, values, color=colour, lw=WIDTH, marker="o", ms=3, label=name)
    stops: dict[int, list[str]] = {}
    differ = _differing([one.settings for one in ones])
    for one in (one for one in ones if one.step is not None):
        words = ", ".join(f"{key} {_value(one.settings[key])}" for key in differ) or one.whose
        stops.setdefault(one.step or 0, []).append(words)
    for step, colour in zip(sorted(stops), colours, strict=False):
        label = f"stops at {step:,}: {'; '.join(dict.fromkeys(stops[step]))}"
        axes.axvline(step, color=colour, lw=1.5, dashes=(1.5, 2.5), label=label)
    axes.legend(frameon=False, fontsize=7.5, loc="upper left", bbox_to_anchor=(0, -0.22))


def _differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    shared = _shared(settings)
    return [key for key in settings[0] if key not in {"trigger", *shared}]


def reading_panels(report: Report) -> list[Panel]:
    """What triggers read of the report's runs, stopped or only watched: a figure a trigger and term, a line a run. Of
    several values the first is strongest; every seed has lines of its own."""
    drawn, groups = styles(report), dict[tuple[str, str], list[Read]]()
    for one in report.read:
        groups.setdefault((one.trigger, one.term), []).append(one)
    return [
        _reading_panel(f"{trigger} of {term}", ones, drawn, n)
        for n, ((trigger, term), ones) in enumerate(groups.items())
    ]


def _reading_panel(title: str, ones: Sequence[Read], drawn: Mapping[str, Any], number: int) -> Panel:
    shown = list(dict.fromkeys(name for one in ones for name in one.shown))
    figure, axes = new_figure(f"{title}: {shown[0]}")
    for one in ones:
        steps = [reading.step for reading in one.history]
        for place, name in enumerate(one.shown):
            values = [reading.values[name] for reading in one.history]
            draw_line(
                axes, drawn[one.run], steps, values, marker="o" if len(steps) < 2 else "", alpha=FAINT if place else 1.0
            )
    levels = sorted({one.threshold for one in ones if one.threshold is not None})
    for level in levels:
        axes.axhline(level, color=INK, lw=1.1, dashes=(8, 4), alpha=0.7)
    ends = "; ".join(
        f"{one.run} {one.history[-1].values[one.shown[0]]:.3g} at step {one.history[-1].step:,}" for one in ones
    )
    said = [f"Faint: {', '.join(shown[1:])}."] if shown[1:] else []
    said += [f"Dashed: the threshold, {', '.join(f'{level:g}' for level in levels)}."] if levels else []
    return Panel(title, "", " ".join(said), to_svg(figure, f"read{number}", f"{title} over training steps: {ends}"))
