"""The sentences of a report: the headline with its context, and speed-ups read off the curves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from scipy.special import stdtrit

from haste.align.crossing import LEVEL
from haste.report import compare
from haste.report.compare import Comparison, Point, Summary, comparisons, decimals
from haste.report.content import NONE, Report
from haste.report.formats import Cell, Entry, Head, Table, number_cell, text_cell
from haste.report.papers import Claim, claims, is_like

BASELINES = ("vanilla", "REPA")  # methods relative to which speed-ups are measured


def headline(report: Report) -> Comparison | None:
    """The comparison that the headline quotes: the one of Fréchet distances with most runs; unguided if equal."""
    distances = [group for group in comparisons(report) if group.column.metric == "fd"]
    return max(distances, key=lambda group: len({p.run for p in group.points}), default=None)


def _headline_step(group: Comparison) -> int:
    """The last step that most runs have reached."""
    return max({p.step for p in group.points}, key=lambda s: (len({p.run for p in group.points if p.step == s}), s))


def _headline_points(group: Comparison) -> dict[str, list[Point]]:
    step, runs = _headline_step(group), dict[str, list[Point]]()
    for point in group.points:
        if point.step == step:
            runs.setdefault(point.run, []).append(point)
    return runs


def best_value(report: Report, detector: str | None) -> float | None:
    """The smallest Fréchet distance of a run by a detector, of means over seeds."""
    found = [
        summary.mean
        for group in comparisons(report)
        if group.column.metric == "fd" and group.column.detector == detector
        for run in {p.run for p in group.points}
        for _, summary in compare.curve(group, run, compare.seeds_of(report, run))
    ]
    return min(found, default=None)


def finding(report: Report) -> str:
    """One sentence with the main numbers, best first. It states values without judging them."""
    group = headline(report)
    if group is None:
        return "No scores yet."
    step, runs = _headline_step(group), _headline_points(group)
    found = {run: _summary(report, run, points) for run, points in runs.items()}
    best, *others = sorted(found, key=lambda run: found[run].mean)
    places, names = decimals(report)[group.column.place], _names(runs)
    guided = "" if group.column.guidance == "none" else f" at w={group.column.guidance}"
    of = f", the lowest of {len(runs)} runs," if len(runs) > 4 else ""
    shown = [r for i, r in enumerate(others) if i < 3 or runs[r][0].method == "vanilla"]
    rest = "".join(f", {names[run]} {_text(found[run], places)}" for run in shown)
    label = group.column.title.split(" (")[0]
    return f"At step {step:,} {names[best]}{of} reaches {label} {_text(found[best], places)}{guided}{rest}."


def _summary(report: Report, run: str, points: Sequence[Point]) -> Summary:
    values = {point.seed: point.value for point in points}
    return Summary(values, [seed for seed in compare.seeds_of(report, run) if seed not in values])


def _names(runs: Mapping[str, Sequence[Point]]) -> dict[str, str]:
    """A run's method, if no other run has it; otherwise the run's own name."""
    methods = [points[0].method for points in runs.values()]
    return {run: p[0].method if methods.count(p[0].method) == 1 else run for run, p in runs.items()}


def _text(found: Summary, places: int) -> str:
    """`52.1`; over several seeds `52.1 ± 1.3`; where seeds are missing `52.1 (1 of 3 seeds)`."""
    if found.missing:
        count = f"{len(found.values)} of {len(found.values) + len(found.missing)}"
        return f"{found.mean:.{places}f} ({count} seeds)"
    return f"{found.mean:.{places}f}" + ("" if found.spread is None else f" ± {found.spread:.{places}f}")


def noise(found: Summary, errors: Sequence[float]) -> tuple[float, bool] | None:
    """The standard error of a distance, and whether it is over seeds (else of the samples alone); None if unknown."""
    if found.spread is not None:
        return found.spread / math.sqrt(len(found.values)), True
    return (errors[0], False) if len(errors) == 1 else None


def headline_runs(report: Report) -> dict[str, tuple[Summary, tuple[float, bool] | None]]:
    """The runs of the headline, best first: distance and its noise."""
    group, table, found = headline(report), compare.lines(report), {}
    for run, points in ({} if group is None else _headline_points(group)).items():
        detector = group.column.detector if group else ""
        scores = [row.score for row in table[points[0].line].rows if compare.detector_name(row.score) == detector]
        errors = [error for one in scores if (error := (one.get("errors") or {}).get("fd")) is not None]
        summary = _summary(report, run, points)
        found[run] = summary, noise(summary, errors)
    return dict(sorted(found.items(), key=lambda item: item[1][0].mean))


def caution(report: Report) -> str:
    """Whether the best run's lead is more than noise, in a sentence or two; empty if that is not known.

    Noise is half of the 95 % interval of the difference over seeds or, with one, two standard errors of the samples
    alone, as if these were independent in both runs.
    """
    group, runs = headline(report), headline_runs(report)
    if group is None or len(runs) < 2:
        return ""
    (best, (first, one)), *others = runs.items()
    widths = {}
    for run, (second, two) in others:
        if one is None or two is None or one[1] != two[1]:
            return ""
        parts = [(error, len(found.values) - 1) for found, (error, _) in ((first, one), (second, two))]
        widths[run] = _width(*parts) if one[1] else 2 * math.hypot(one[0], two[0])
    places, names = decimals(report)[group.column.place], _names(_headline_points(group))
    close = [run for run, (found, _) in others if found.mean - first.mean < widths[run]]
    of, seeds = ("over seeds", "") if one and one[1] else (
        "of the samples", " Each run was trained once: what another seed would change is not known."
    )  # fmt: skip
    if close:
        all_close = f"{names[best]}{''.join(f', {names[run]}' for run in close[:-1])} and {names[close[-1]]}"
        width = max(widths[run] for run in close)
        apart = f"they differ by less than the noise {of}, ±{width:.{places}f}"
        return f"Which of {all_close} is {'best' if len(close) > 1 else 'better'} is open: {apart}.{seeds}"
    next_best, gap = others[0][0], others[0][1][0].mean - first.mean
    lead = f"{gap:.{places}f} less than {names[next_best]}, more than the noise {of}, ±{widths[next_best]:.{places}f}"
    return f"That is {lead}.{seeds}"


def _width(*parts: tuple[float, int]) -> float:
    """Half of the 95 % interval of the difference of two means, from the standard error and the degrees of freedom of
    each (Welch 1947)."""
    variance = sum(error**2 for error, _ in parts)
    if not variance:
        return 0.0
    return -float(stdtrit(variance**2 / sum(e**4 / free for e, free in parts), (1 - LEVEL) / 2)) * variance**0.5


def context(report: Report) -> str:
    """How to read the headline's numbers: metric, number of samples, number of seeds, and the floor."""
    group = headline(report)
    if group is None:
        return ""
    runs = dict.fromkeys(p.run for p in group.points)
    counts = sorted({len(compare.seeds_of(report, run)) for run in runs})
    trained = "one seed per run" if counts == [1] else (
        f"± is the standard deviation over {' or '.join(str(n) for n in counts if n > 1)} seeds"
    )  # fmt: skip
    text = f"Fréchet distance on {group.column.detector} features, lower is better ({group.protocol}; {trained})."
    floor, value = compare.floor_of(report, group.column), compare.floor_value(report, group.column)
    if floor is None or value is None:
        return text
    sizes = [floor.get("samples"), (floor.get("reference") or {}).get("images")]
    images = f"{sizes[0]:,} against {sizes[1]:,}" if all(sizes) else "in two halves"
    places = decimals(report)[group.column.place]
    again = compare.reconstructed_value(report, group.column)
    said = "" if again is None else f", and as the autoencoder gives them back {again:.{places}f}"
    return f"{text} Real images against real ones ({images}) measure {value:.{places}f}{said}."


# ---------------------------------------------------------------------------------------------------------------------
# Speed-ups


@dataclass(frozen=True)
class SpeedUp:
    """When a run reached the Fréchet distance that a baseline has at its last step.

    `at` is None if it did not, by its last step `last`. `measured`: `at` is the run's first measured step, so that the
    distance may have been reached earlier; otherwise `at` is interpolated between two measured steps. `like` are the
    model, method, the baseline's method and whether both are guided, by which papers' claims are like it; None if the
    distance is not FID. `links` say how the baseline's distance was made, and the run's at its first step after `at`.
    """

    run: str
    baseline: str
    value: float
    step: int
    at: float | None
    last: int
    measured: bool
    column: str
    places: int
    links: tuple[str, str] = ("", "")
    like: tuple[str, str, str, bool] | None = None

    @property
    def ratio(self) -> float | None:
        """Steps of the baseline over steps of the run; a lower bound if `measured`."""
        return None if self.at is None else self.step / self.at

    def __str__(self) -> str:
        target = f"{self.baseline}'s {self.column} of step {self.step:,} ({self.value:.{self.places}f})"
        if self.at is None:
            return f"{self.run} does not reach {target} by step {self.last:,}."
        if self.measured:
            return f"{self.run} reaches {target} at step {self.at:,.0f} or before: at least {self.ratio:.1f}×."
        return f"{self.run} reaches {target} at step {_round(self.at):,}: {self.ratio:.1f}×."


def _round(step: float) -> int:
    """Three digits: interpolation gives no more."""
    digits = max(0, math.floor(math.log10(step)) - 2)
    return round(step / 10**digits) * 10**digits


def reached(curve: Sequence[tuple[float, float]], target: float) -> tuple[float, bool] | None:
    """Where a falling curve of (step, distance) first is at most a target: (step, whether at its first point).

    Interpolates linearly in the logarithm of the distance (in the distance if one is not positive) and does not
    extrapolate: None if no measured point is at most the target.
    """
    for place, (step, value) in enumerate(curve):
        if value > target:
            continue
        if place == 0:
            return float(step), True
        before, high = curve[place - 1]
        scale = math.log if min(value, target, high) > 0 else float
        fall = scale(high) - scale(value)  # 0 of neighbouring numbers, whose logarithms are the same
        share = (scale(high) - scale(target)) / fall if fall else 1.0
        return before + share * (step - before), False
    return None


def speedups(report: Report) -> list[SpeedUp]:
    """For vanilla and for REPA (the first run of each), when others of the same model reached its last step's distance.

    With several seeds a curve is the mean, at steps where no seed is missing.
    """
    groups = [group for group in comparisons(report) if group.column.metric == "fd"]
    several = len({group.column.detector for group in groups}) > 1
    return [found for group in groups for found in _timed(report, group, _label(group, several))]


def _label(group: Comparison, several: bool) -> str:
    """`FD`, with its detector if there are several, its guidance if any, and its noise seed if there are several."""
    title, guided = group.column.title, group.column.guidance
    noise = "" if group.noise is None else f" with noise {group.noise}"
    return (title if several else title.split(" (")[0]) + ("" if guided == "none" else f" at w={guided}") + noise


def _timed(report: Report, group: Comparison, label: str) -> Iterator[SpeedUp]:
    methods = {p.run: p.method for p in group.points}
    curves = {
        run: [(s, f.mean) for s, f in compare.curve(group, run, compare.seeds_of(report, run)) if not f.missing]
        for run in methods
    }
    places, rows = decimals(report)[group.column.place], compare.lines(report)
    for method in BASELINES:
        baseline = next((run for run in methods if methods[run] == method and curves[run]), None)
        for run in methods:
            if baseline is None or not curves[run] or methods[run] in (method, "vanilla"):
                continue
            step, value = curves[baseline][-1]
            like = (group.model, methods[run], method, group.column.guidance != "none")
            found = reached(curves[run], value)
            # A single measured step shows no speed-up, and neither does a first one that is no earlier.
            if (len(curves[run]) == 1 and not found) or (found and found[1] and found[0] >= step):
                continue
            at, first = found or (None, False)
            last = curves[run][-1][0]
            own = rows[next(p.line for p in group.points if p.run == run)].first
            told = like if group.column.inception and is_like(own, report.benchmark) else None
            links = (_made(group, baseline, step), _made(group, run, last if at is None else at))
            yield SpeedUp(run, baseline, value, step, at, last, first, label, places, links, told)


def _made(group: Comparison, run: str, step: float) -> str:
    """The place on the page that says how a run's first score at or after a step was made."""
    return f"made-{next(p.line for p in group.points if p.run == run and p.step >= step)}"


def lead(report: Report) -> str:
    """The largest speed-up over vanilla training in the headline's scores, in words; empty if there is none."""
    group, plain = headline(report), {row.run for row in report.rows if row.method == "vanilla"}
    if group is None:
        return ""
    several = len({c.column.detector for c in comparisons(report) if c.column.metric == "fd"}) > 1
    timed = _timed(report, group, _label(group, several))
    found = [s for s in timed if s.baseline in plain and s.ratio is not None and s.ratio > 1]
    return str(max(found, key=lambda s: s.ratio or 0.0)) if found else ""


def speedup_table(report: Report) -> Table | None:
    """Speed-ups as a table; None if there are none."""
    found = speedups(report)
    if not found:
        return None
    heads = [Head("run"), Head("reaches the distance of"), Head("which at step", True), Head("is", True)]
    heads += [Head("at step", True), Head("speed-up", True)]
    columns, likes = list(dict.fromkeys(s.column for s in found)), {one.like for one in found}
    if len(columns) > 1:
        heads.insert(1, Head("score"))
    entries = []
    for place, one in enumerate(found):
        value = number_cell(one.value, one.places, link=one.links[0])
        cells = [text_cell(one.run), text_cell(one.baseline), text_cell(one.step), value]
        if len(columns) > 1:
            cells.insert(1, text_cell(one.column))
        group = (one.column, one.baseline)
        first = place > 0 and group != (found[place - 1].column, found[place - 1].baseline)
        entries.append(Entry([*cells, *_times(one)], first=first))
    notes = [
        "Read off between measured points, on a line in the logarithm of the distance. Nothing is claimed outside "
        "them: ≤ and ≥ say that the distance was reached by the first measured step."
    ]
    said = [one for one in claims(report.benchmark) if (one.model, one.method, one.baseline, one.guided) in likes]
    entries += [Entry(_claimed(one, len(columns) > 1), "published", first=one is said[0]) for one in said]
    if said:
        notes.append(
            "In italics: what the papers claim, each on their own runs; those of REPA are lower bounds. They are no "
            "results of this code. A dash: the paper does not state it."
        )
    return Table("speed-up", "Speed-up", heads, entries, notes)


def _claimed(one: Claim, several: bool) -> list[Cell]:
    score = [text_cell("FID, guided" if one.guided else "FID")] if several else []
    who = [text_cell(f"{one.model} {one.method}, {one.source}"), *score, text_cell(one.baseline), text_cell(one.step)]
    return [
        *who,
        Cell(NONE),
        text_cell(one.at),
        Cell(f"{one.factor}×", float(one.factor)) if one.factor else Cell(NONE),
    ]


def _times(one: SpeedUp) -> list[Cell]:
    if one.at is None or one.ratio is None:
        return [Cell(f"not by {one.last:,}", link=one.links[1]), Cell(NONE)]
    bound, link = ("≤ ", "≥ ") if one.measured else ("", ""), one.links[1]
    return [
        Cell(f"{bound[0]}{_round(one.at):,}", one.at, link=link),
        Cell(f"{bound[1]}{one.ratio:.1f}×", one.ratio, link=link),
    ]
