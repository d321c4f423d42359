"""What training a run took along its lineage, and which runs share the beginning of theirs. No torch."""

from __future__ import annotations

import bisect
import itertools
import math
from pathlib import Path

from haste.files import journal
from haste.files.provenance import read_header
from haste.plan.names import Piece
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
        an interruption count once. None if no log or no state on the way tells."""
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
        folder = Path(self.plan.root, "states", piece.trajectory)
        files = {step: folder / f"step-{step:08d}.safetensors" for step in sorted(self.plan.on_disk(piece.trajectory))}
        known = {step: count for step, file in files.items() if (count := self._devices(file)) is not None}
        steps, found = list(known), list[tuple[int, float]]()
        for line in journal.read(folder / "log.jsonl", piece.low, piece.high):
            after = min(bisect.bisect_left(steps, line["step"]), len(steps) - 1)
            devices = known[steps[after]] if steps else math.nan
            found.append((line["step"], line.get("seconds", math.nan) * devices / 3600))
        return found

    def _devices(self, state: Path) -> int | None:
        try:
            made = read_header(state)["provenance"]
        except ValueError:
            return None
        processes, hardware = made.get("processes", 1), made.get("hardware", {})
        if "gpu" in hardware and self.plan.config.runtime.device != "cpu":
            self.unit = "GPU"
            return processes
        return processes * hardware.get("threads", 1)
