"""What training a run took along its lineage, and which runs share the beginning of theirs. No torch."""

from __future__ import annotations

import bisect
import contextlib
import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from haste.files import journal
from haste.files.provenance import read_header
from haste.plan.names import Piece
from haste.plan.plan import Plan
from haste.report.content import Trunk


def trunks(plan: Plan) -> dict[str, Trunk]:
    """For each run, the earlier one in the table with whose states its own agree longest, for all of its seeds; none
    for a run that agrees with one to its end."""
    found: dict[str, Trunk] = {}
    rows = plan.config.runs
    for place, run in enumerate(rows):
        for other in list(rows)[:place]:
            if {*rows[run].all_seeds} == {*rows[other].all_seeds}:
                step = min(_shared(plan, run, other, seed) for seed in rows[run].all_seeds)
                step = min(step, rows[other].milestones[-1], rows[run].milestones[-1])
                if step > (found[run].step if run in found else 0):
                    found[run] = Trunk(other, int(step))
    return {run: trunk for run, trunk in found.items() if trunk.step < rows[run].milestones[-1]}


def _shared(plan: Plan, one: str, other: str, seed: int) -> float:
    """The last step up to which two runs of one seed have the same states; infinity if they never part."""
    last = 0.0
    for mine, theirs in itertools.zip_longest(plan.pieces[one, seed], plan.pieces[other, seed]):
        if mine is None or theirs is None or mine.trajectory != theirs.trajectory:
            return last
        last = min(math.inf if piece.high is None else piece.high for piece in (mine, theirs))
        if mine.high != theirs.high:
            return last
    return last


class Training:
    """Hours of devices that training took: GPUs or, without any, cores.

    Attributes:
        unit: `GPU` if some state was made on one, else `core`.
    """

    def __init__(self, plan: Plan):
        self.plan = plan
        names = dict.fromkeys(piece.trajectory for pieces in plan.pieces.values() for piece in pieces)
        self._made = {name: self._states(name) for name in names}
        self.unit = "GPU" if any(unit == "GPU" for made in self._made.values() for unit, _ in made.values()) else "core"
        self._summed: dict[tuple[str, int], tuple[list[int], list[float]]] = {}

    def hours(self, run: str, seed: int, step: int) -> float | None:
        """Of the steps up to one, from the first, also of a trunk that other runs share. Steps that were repeated after
        an interruption count once. None if no log or no state on the way tells, or if devices had another unit.
        """
        if (run, seed) not in self.plan.pieces:
            return None
        steps, hours = self._along(run, seed)
        place = bisect.bisect_right(steps, step)
        return hours[place - 1] if place and not math.isnan(hours[place - 1]) else None

    def _along(self, run: str, seed: int) -> tuple[list[int], list[float]]:
        """The logged steps of a run, and the hours up to each: not a number from where nothing tells."""
        if (run, seed) not in self._summed:
            pairs = [pair for piece in self.plan.pieces[run, seed] for pair in self._lines(piece)]
            self._summed[run, seed] = [step for step, _ in pairs], [*itertools.accumulate(h for _, h in pairs)]
        return self._summed[run, seed]

    def _lines(self, piece: Piece) -> list[tuple[int, float]]:
        """The steps of a piece's log and the hours of each line, on as many devices as the next state was made on."""
        known, found = self._made[piece.trajectory], list[tuple[int, float]]()
        steps = list(known)
        for line in journal.read(self._folder(piece.trajectory) / "log.jsonl", piece.low, piece.high):
            after = min(bisect.bisect_left(steps, line["step"]), len(steps) - 1)
            unit, devices = known[steps[after]] if steps else ("", 0)
            hours = line.get("seconds", math.nan) * devices / 3600
            found.append((line["step"], hours if unit == self.unit else math.nan))
        return found

    def _states(self, trajectory: str) -> dict[int, tuple[str, int]]:
        """The unit and the number of devices that each state on disk was made on, by its step."""
        found = dict[int, tuple[str, int]]()
        for step in sorted(self.plan.on_disk(trajectory)):
            with contextlib.suppress(ValueError):
                found[step] = _devices(read_header(self._folder(trajectory) / f"step-{step:08d}.safetensors"))
        return found

    def _folder(self, trajectory: str) -> Path:
        return Path(self.plan.root, "states", trajectory)


def _devices(header: Mapping[str, Any]) -> tuple[str, int]:
    made = header["provenance"]
    processes, hardware = made.get("processes", 1), made.get("hardware", {})
    if "gpu" in hardware and made.get("device") != "cpu":  # older states do not say it
        return "GPU", processes
    return "core", processes * hardware.get("threads", 1)
