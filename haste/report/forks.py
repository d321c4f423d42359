"""What stopping did at each step of a fork: the difference of its two branches, stopped minus aligned.

Both branches saw the same batches and noise, both losses are of the same images and noise, and both sets of samples
start from the same noise; so a difference is of the alignment alone. It is positive where alignment still helped.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from numpy.typing import NDArray

from haste.align import crossing
from haste.align.crossing import Curve
from haste.report.compare import Column, row_scores
from haste.report.content import Fork, Measured, Report, Row
from haste.report.figures import INK, PALETTE, WIDTH, Panel, new_figure, to_svg
from haste.report.formats import Cell, Entry, Head, Table, number_cell, text_cell

SCORE = "fd"  # the score whose differences are shown
DIGITS = 3
LABEL = 0.045  # height of a line's label, as a share of the axis


@dataclass(frozen=True)
class Effect:
    """The differences of one quantity, by the steps of a fork at which all seeds have both branches.

    Attributes:
        name: of the quantity, such as `loss` or `FD (cnn)`; several effects may share it.
        t: where the quantity was measured; "" for a whole one.
        curve: the differences, stopped minus aligned.
        samples: how many samples a score is of; None of a loss.
        dated: whether scores were made before they had errors.
    """

    name: str
    t: str
    curve: Curve
    samples: int | None = None
    dated: bool = False

    @property
    def title(self) -> str:
        """Its name in a table."""
        return f"{self.name} {self.t}".strip()

    @property
    def half(self) -> np.ndarray:
        """Half the width of the 95 % interval of each step, (K,); NaN if unknown."""
        low, high = crossing.interval(self.curve)
        return (high - low) / 2


def effects(fork: Fork) -> list[Effect]:
    """The differences of held-out losses, on average over t and at each t, and of Fréchet distances."""
    return [*_losses(fork), *_scores(fork)]


def _losses(fork: Fork) -> Iterator[Effect]:
    for name in dict.fromkeys(one.name for one in fork.measures if one.found["measure"] == "denoising"):
        found = {(_side(fork, one), one.seed): one for one in fork.measures if one.name == name}
        pairs = {place: _pair(found, place) for place in _places(fork, found)}
        for t in ["mean", *next(iter(pairs.values()), pd.DataFrame()).index]:
            rows = {place: one.mean() if t == "mean" else one.loc[t] for place, one in pairs.items()}
            curve = _curve(fork, {place: row.to_numpy() for place, row in rows.items()})
            yield Effect("held-out loss" if name == "denoising" else name, "" if t == "mean" else f"t {t:g}", curve)


def _pair(found: Mapping[tuple[tuple[int, bool], int], Measured], place: tuple[int, int]) -> pd.DataFrame:
    """Differences of losses at one step with one seed: a line for each t, a column for each group of images."""
    step, seed = place
    aligned, stopped = (
        pd.DataFrame(found[(step, side), seed].found["rows"]).pivot(index="t", columns="group", values="loss")
        for side in (False, True)
    )
    return stopped - aligned


def _scores(fork: Fork) -> Iterator[Effect]:
    columns = [(row.score["sampling"]["name"], column) for row in fork.rows for column in row_scores(row)]
    several = len({way for way, _ in columns}) > 1
    for way, column in dict.fromkeys(pair for pair in columns if pair[1].metric == SCORE):
        rows = [row for row in fork.rows if row.score["sampling"]["name"] == way and column in row_scores(row)]
        found = {(_side(fork, row), row.seed): row for row in rows}
        places = _places(fork, found)
        values = {(s, seed): np.array([_difference(found, s, seed, column)]) for s, seed in places}
        errors = [_error(found[(s, False), seed], found[(s, True), seed]) for s, seed in places]
        known = len(fork.seeds) == 1 and all(error is not None for error in errors)
        curve = _curve(fork, values, np.array(errors, dtype=float) if known else None)
        dated = any("errors" not in row.score for row in rows)
        yield Effect(column.name + (f", {way}" if several else ""), "", curve, rows[0].score.get("samples"), dated)


def _difference(found: Mapping[tuple[tuple[int, bool], int], Row], step: int, seed: int, column: Column) -> float:
    aligned, stopped = (row_scores(found[(step, side), seed])[column] for side in (False, True))
    return stopped - aligned


def _error(aligned: Row, stopped: Row) -> float | None:
    """The standard error of a difference of scores, as if their noise were independent: an upper bound."""
    errors = [float((row.score.get("errors") or {}).get(SCORE) or math.nan) for row in (aligned, stopped)]
    return None if math.isnan(sum(errors)) else math.hypot(*errors)


def _side(fork: Fork, one: Row | Measured) -> tuple[int, bool]:
    branch = fork.branches[one.run]
    return branch.at, branch.stopped


def _places(fork: Fork, found: Mapping[tuple[tuple[int, bool], int], object]) -> list[tuple[int, int]]:
    """The steps, and for each of them all seeds, of which both branches are there for every seed."""
    whole = [s for s in fork.at if all(((s, side), seed) in found for side in (False, True) for seed in fork.seeds)]
    return [(step, seed) for step in whole for seed in fork.seeds]


def _curve(fork: Fork, found: Mapping[tuple[int, int], np.ndarray], errors: np.ndarray | None = None) -> Curve:
    """From the differences of units at each step with each seed: over seeds if there are several, else over units."""
    steps = list(dict.fromkeys(step for step, _ in found))
    if len(fork.seeds) > 1:
        values = np.array([[found[step, seed].mean() for step in steps] for seed in fork.seeds])
        return Curve(np.array(steps, dtype=float), values.reshape(len(fork.seeds), len(steps)), "seeds")
    values = np.array([found[step, fork.seeds[0]] for step in steps]).reshape(len(steps), -1).T
    return Curve(np.array(steps, dtype=float), values, "images", errors)


# ---------------------------------------------------------------------------------------------------------------------
# Words, tables, figures


def sentences(report: Report) -> list[str]:
    """What each fork says of when to stop."""
    return [line for fork in report.forks for line in _sentences(fork)]


def _sentences(fork: Fork) -> Iterator[str]:
    for effect in effects(fork):
        if not effect.t and len(effect.curve.steps):
            found = crossing.crossing(effect.curve)
            says = f"stopping was better from {found}" if found.step is not None else str(found)
            yield f"{fork.name}, of {fork.run}, by {effect.title}: {says}."


def fork_tables(report: Report) -> list[Table]:
    """A table a fork."""
    return [_table(report, fork, place) for place, fork in enumerate(report.forks) if any(_steps(fork))]


def _steps(fork: Fork) -> list[int]:
    return sorted({int(step) for effect in effects(fork) for step in effect.curve.steps})


def anchor(place: int, step: int) -> str:
    """The id of the place on the page that says how a fork's numbers of a step were made."""
    return f"made-fork-{place}-{step}"


def fork_made(report: Report) -> list[tuple[str, str, list[Mapping[str, Any]]]]:
    """Id, title and files, parsed, of all that a fork's numbers of a step were made from."""
    found = []
    for place, fork in enumerate(report.forks):
        for step in _steps(fork):
            here = {name for name, branch in fork.branches.items() if branch.at == step}
            files: list[Mapping[str, Any]] = [{**one.score, "file": one.file} for one in fork.rows if one.run in here]
            files += [{**one.found, "file": one.file} for one in fork.measures if one.run in here]
            found.append((anchor(place, step), f"{fork.name} at step {step:,}", files))
    return found


def _table(report: Report, fork: Fork, number: int) -> Table:
    shown, entries = effects(fork), []
    for step in _steps(fork):
        cells = [_cell(effect, step, anchor(number, step)) for effect in shown]
        entries.append(Entry([text_cell(step), *cells]))
    heads = [Head("step", True), *(Head(effect.title, True) for effect in shown)]
    plain = "".join(c if c.isascii() and c.isalnum() else "-" for c in fork.name)
    taken = [one.name for one in report.forks].index(fork.name)
    name = f"fork-{plain}" if plain == fork.name else f"fork-{plain}-{taken}"
    return Table(name, f"{fork.name}: {fork.run}, stopped minus aligned", heads, entries, _notes(fork, shown))


def _cell(effect: Effect, step: int, link: str) -> Cell:
    place = np.flatnonzero(effect.curve.steps == step)
    if not len(place):
        return number_cell(None, 0)
    mean, half = effect.curve.mean[place[0]], effect.half[place[0]]
    low, high = (bound[place[0]] for bound in crossing.interval(effect.curve))
    largest = float(np.abs(effect.curve.mean).max())
    places = min(8, max(0, DIGITS - 1 - math.floor(math.log10(largest)))) if largest else 0
    spread, sure = (None, False) if math.isnan(half) else (float(half), bool(low > 0 or high < 0))
    return number_cell(float(mean), places, spread=spread, bold=sure, link=link)


def _notes(fork: Fork, shown: Sequence[Effect]) -> list[str]:
    notes = [
        f"Each branch was trained for {fork.length:,} more steps. Positive: alignment still helped; negative: stopping "
        "was better. Bold: surely other than zero, at this step alone."
    ]
    if len(fork.seeds) > 1:
        notes.append(f"±: half of the 95 % t-interval over {len(fork.seeds)} seeds of training.")
    elif any(effect.samples is None for effect in shown):
        notes.append("±: half of the 95 % interval, of losses by the paired bootstrap over groups of images.")
    notes += [f"{one.title}: of {one.samples:,} samples, {_noise(one, fork)}." for one in shown if one.samples]
    missing = [step for step in fork.at if step not in _steps(fork)]
    if missing:
        notes.append(f"Not there yet: {', '.join(f'{step:,}' for step in missing)}.")
    return notes


def _noise(effect: Effect, fork: Fork) -> str:
    if effect.curve.errors is not None:
        return "whose own noise, as if independent in the two branches, makes the ±"
    if len(fork.seeds) > 1:
        return "from the same noise in both branches"
    if effect.dated:
        return "whose noise is not known: scores were made before they had errors; remove them, and they are made again"
    return "too few to know their noise"


def fork_panels(report: Report) -> list[Panel]:
    """Differences over steps: for each fork one figure a quantity, with a line for each t."""
    found = []
    for number, fork in enumerate(report.forks):
        shown = [effect for effect in effects(fork) if len(effect.curve.steps) > 1]
        for place, name in enumerate(dict.fromkeys(effect.name for effect in shown)):
            group = [effect for effect in shown if effect.name == name]
            found.append(_panel(fork, name, group, f"fork{number}-{place}"))
    return found


def _panel(fork: Fork, name: str, group: Sequence[Effect], slug: str) -> Panel:
    """The whole quantity with its interval, fainter lines for its parts, and where it crosses zero."""
    figure, axes = new_figure(f"{name}, stopped minus aligned")
    axes.axhline(0, color=INK, lw=0.8, alpha=0.5)
    whole, said = next(effect for effect in group if not effect.t), crossing.crossing(group[0].curve)
    steps, (low, high) = whole.curve.steps, crossing.interval(whole.curve)
    for effect, colour in zip(group, (PALETTE[0], *(5 * PALETTE[1:])), strict=False):
        main = effect is whole
        axes.plot(effect.curve.steps, effect.curve.mean, color=colour, lw=WIDTH if main else 1, marker="o", ms=3)
    if not np.isnan(low).any():
        axes.fill_between(steps, low, high, color=PALETTE[0], alpha=0.18, lw=0)
    if len(group) > 1:
        for effect, y in zip(group, _apart([one.curve.mean[-1] for one in group], axes), strict=True):
            axes.annotate(
                effect.t or "mean", (steps[-1], y), (4, 0), "data", "offset points", va="center", fontsize=7, color=INK
            )
    if said.step is not None:
        axes.axvspan(said.low or 0, said.high or 0, color=INK, alpha=0.08, lw=0)
        axes.axvline(said.step, color=INK, lw=1.1, dashes=(1.5, 2.5))
    caption = f"{fork.name}, of {fork.run}. Band: 95 % at each step. {_verdict(said)}"
    spoken = "; ".join(f"{mean:.3g} at step {step:,.0f}" for step, mean in zip(steps, whole.curve.mean, strict=True))
    return Panel(name, "", caption, to_svg(figure, slug, f"{fork.name}, {name}, stopped minus aligned: {spoken}"))


def _apart(values: Sequence[float], axes: Axes) -> NDArray[np.float64]:
    """Heights at which labels of values do not overlap: those that would move apart, each by half."""
    low, high = axes.get_ylim()
    order, placed = np.argsort(values), np.array(values, dtype=float)
    for _ in range(20 * len(values)):  # each pass leaves less of an overlap
        for lower, upper in itertools.pairwise(order):
            more = max(0.0, placed[lower] + LABEL * (high - low) - placed[upper]) / 2
            placed[lower], placed[upper] = placed[lower] - more, placed[upper] + more
    return placed


def _verdict(found: crossing.Crossing) -> str:
    words = str(found)
    return f"Stopping was better from {words}." if found.step is not None else f"{words[0].upper()}{words[1:]}."
