"""What each alignment term costs a training step: memory, operations, and time, of a network whatever its weights are.

A step is that of training without loading data: teacher, losses, backward pass, clipping, optimiser, average. It is
taken without any term, with each alone, and with all. Times depend on the machine, which may be shared: the sets of
terms take turns, and each is compared with the step without terms of the same turn.

S sets of terms, R turns.
"""

from __future__ import annotations

import itertools
import math
import platform
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from haste.config import Config, Positive
from haste.measure.measure import Measure, Row

if TYPE_CHECKING:
    from haste.measure.subject import Subject

NONE, JOINT = "vanilla", " + "
MEMORY, STUDENT, TEACHER, RATE = "peak MB", "student GMAC", "teacher GMAC", "images/s"
TIMES_MEMORY, TIMES_RATE = "MB / vanilla", "images/s / vanilla"


class Cost(Measure):
    """See the file. A GMAC is a thousand million multiplications, each with its addition: two GFLOP.

    Attributes:
        batch: images a step; None is what a process holds at once in training. Batches are not accumulated.
        turns: of every set of terms; the network is built anew for each.
        steps: that are timed in a turn, after one that is not.
    """

    needs: ClassVar = frozenset({"named alignment"})
    axes: ClassVar = ("terms", "batch")
    values: ClassVar = {
        MEMORY: "",
        TIMES_MEMORY: "",
        STUDENT: "",
        TEACHER: "",
        RATE: f"{RATE} error",
        TIMES_RATE: f"{TIMES_RATE} error",
    }
    along: ClassVar = "nothing"
    once: ClassVar = True

    batch: Positive | None = None
    turns: Annotated[int, Field(ge=2)] = 5
    steps: Positive = 3

    def unfit(self, config: Config, model: str) -> list[str]:
        """See `Measure`."""
        most, found = config.training.batch, super().unfit(config, model)
        return found + ([f"batch: {self.batch}, but training.batch is {most}"] if (self.batch or 0) > most else [])

    def run(self, subject: Subject) -> Iterator[Row]:
        """See `Measure`. Ranks do the same side by side; numbers are means over them."""
        from haste.measure.steps import Step

        size, kinds = self.batch or subject.part, list(subject.terms)
        sets = [(), *((kind,) for kind in kinds), *([tuple(kinds)] if len(kinds) > 1 else [])]
        rates, once = [[0.0] * len(sets) for _ in range(self.turns)], list[tuple[float, float, float]]()
        for turn, (place, terms) in itertools.product(range(self.turns), enumerate(sets)):
            subject.group.free()
            step = Step(subject, terms, size)
            step()
            rates[turn][place] = self._rate(step)
            if not turn:
                student, teacher = step.flops()
                once.append((step.peak_megabytes(), student / 2e9, teacher / 2e9))
            del step
        subject.notes += [f"the teacher of {term} is read from disk and not run" for term in subject.what.cached]
        subject.notes.append(f"images/s are of this machine alone, {_machine(subject)}, one process")
        rates = [subject.group.mean(turn) for turn in rates]
        memory = subject.group.mean([megabytes for megabytes, _, _ in once])
        for place, terms in enumerate(sets):
            where: dict[str, str | int | float] = {"terms": JOINT.join(terms) or NONE, "batch": size}
            found = {MEMORY: memory[place], TIMES_MEMORY: memory[place] / memory[0]}
            found |= {STUDENT: once[place][1], TEACHER: once[place][2]}
            yield {**where, **found, **_over_turns([turn[place] for turn in rates], [turn[0] for turn in rates])}

    def _rate(self, step: Any) -> float:
        """Images a second."""
        step.wait()
        started = time.perf_counter()
        for _ in range(self.steps):
            step()
        step.wait()
        return self.steps * step.size / (time.perf_counter() - started)


def _over_turns(rates: Sequence[float], vanilla: Sequence[float]) -> Mapping[str, float]:
    """Means over turns with their standard errors."""
    found = {}
    for name, values in {RATE: rates, TIMES_RATE: [a / b for a, b in zip(rates, vanilla, strict=True)]}.items():
        found[name] = statistics.fmean(values)
        found[f"{name} error"] = statistics.stdev(values) / math.sqrt(len(values))
    return found


def _machine(subject: Subject) -> str:
    """The device, in words, and how it computes."""
    import torch

    settings, device = subject.inputs.settings, subject.group.device
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {settings['precision']}"
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    named = (line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return f"{next(named, platform.machine())}, {torch.get_num_threads()} threads, {settings['precision']}"
