"""What training a run took along its lineage, and which runs share the beginning of theirs. No torch."""

from __future__ import annotations

import bisect
import itertools
import math
from pathlib import Path
from typing import Any

from haste.files import journal
from haste.files.provenance import read_header
from haste.plan.plan import Plan
from haste.report.content import Trunk


def trunks(plan: Plan) -> dict[str, Trunk]:
    """For each run, the earlier one in the table with whose states its own agree longest, for all of its seeds."""
    found: dict[str, Trunk] = {}
    rows = plan.config.runs
    for place, run in enumerate(rows):
        for other in list(rows)[:place]:
            if {*rows[run].all_seeds} == {*rows[other].all_seeds}:
                step = min(_shared(plan, run, other, seed) for seed in rows[run].all_seeds)
                step = min(step, rows[other].milestones[-1])
                if step > (found[run].step if run in found else 0):
                    found[run] = Trunk(other, int(step))
    return found


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
        unit: `GPU` or `core`.
    """

    def __init__(self, plan: Plan):
        self.plan, self.unit = plan, "core"
        self._summed: dict[tuple[str, int], tuple[list[int], list[float]]] = {}

    def hours(self, run: str, seed: int, step: int) -> float | None:
        """Of the steps up to one, from the first, also of a trunk that other runs share. Steps that were repeated after
        an interruption count once. None if nothing of it is recorded."""
        if (run, seed) not in self.plan.pieces:
            return None
        steps, hours = self._along(run, seed)
        place = bisect.bisect_right(steps, step)
        return hours[place - 1] if place else None

    def _along(self, run: str, seed: int) -> tuple[list[int], list[float]]:
        """The logged steps of a run, and the hours up to each."""
        if (run, seed) not in self._summed:
            pairs = [
                (line["step"], line.get("seconds", 0.0) * devices / 3600)
                for piece in self.plan.pieces[run, seed]
                for line, devices in self._lines(piece.trajectory, piece.low, piece.high)
            ]
            self._summed[run, seed] = [step for step, _ in pairs], [*itertools.accumulate(h for _, h in pairs)]
        return self._summed[run, seed]

    def _lines(self, trajectory: str, low: int, high: int | None) -> list[tuple[dict[str, Any], int]]:
        """A journal's lines with the devices that made each, as the next state says."""
        folder = Path(self.plan.root, "states", trajectory)
        known = sorted(
            (step, self._devices(folder / f"step-{step:08d}.safetensors")) for step in self.plan.on_disk(trajectory)
        )
        lines = journal.read(folder / "log.jsonl", low, high)
        if not known:
            return [(line, 1) for line in lines]
        after = [min(bisect.bisect_left(known, (line["step"], 0)), len(known) - 1) for line in lines]
        return [(line, known[place][1]) for line, place in zip(lines, after, strict=True)]

    def _devices(self, state: Path) -> int:
        try:
            made = read_header(state)["provenance"]
        except (ValueError, KeyError):
            return 1
        processes, hardware = made.get("processes", 1), made.get("hardware", {})
        if "gpu" in hardware and self.plan.config.runtime.device != "cpu":
            self.unit = "GPU"
            return processes
        return processes * hardware.get("threads", 1)
