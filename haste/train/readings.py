"""What triggers see while training, and what they decide.

Each process averages what its own rows give, on its device: nothing in a step waits. At a reading the processes'
averages are averaged, which is exact since an average is linear; what costs passes of its own is measured then too
(`haste/train/gradient_angles.py`); rank 0 asks the trigger and tells the others. A state holds the averages
of every process, so that going on with as many ends in the same bits.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from haste.align import triggers
from haste.align.triggers import Angle, Average, Decision, Reading
from haste.plan.names import Segment
from haste.train.distributed import Group
from haste.train.gradient_angles import Angles

log = logging.getLogger("haste.train")


def residual(kind: str, term: Mapping[str, Any], loss: Tensor, share: Tensor) -> Tensor:
    """What is left of a term's loss, times the share of samples that count: `share` - cosine, else the loss itself.

    Args:
        kind: `features` or `attention`.
        term: its settings.
        loss: the term's, as `Objective` gives it: 0 where no sample counts.
        share: mean weight of this process's samples; over all processes it is 1, or 0 where no sample counts.
    """
    by_angle = kind == "features" and term.get("similarity", "cosine") == "cosine"
    return share + loss if by_angle else loss  # the loss of features is -cosine (REPA, Eq. 8)


class Watch:
    """One term's trigger at work: its averages, its readings so far, and what it decided.

    B samples, K averages, W processes.

    Attributes:
        sums: (2, K) float64: of values times weights, and of weights, both weighed by decay^age.
        history: the readings so far.
        seconds: wall time that readings took so far.
        stopped: step, reason and trajectory of the stop, once there is one.
    """

    def __init__(self, kind: str, term: Mapping[str, Any], group: Group):
        """
        Args:
            kind: the term's.
            term: its settings, with those of its trigger.
            group: the processes.

        Raises:
            ValueError: a parameter that the trigger does not take.
        """
        self.kind, self.term, self.settings, self.group = kind, term, dict(term["trigger"]), group
        own = {key: value for key, value in self.settings.items() if key not in ("trigger", "after", "every")}
        self.trigger = triggers.made(self.settings["trigger"], own)
        self.after, self.every = self.settings["after"], self.settings["every"]
        self.first = triggers.first_reading(self.trigger, self.after, self.every)
        needs = self.trigger.needs
        self.averages = {name: measure for name, measure in needs.items() if isinstance(measure, Average)}
        self.angles = {name: measure for name, measure in needs.items() if isinstance(measure, Angle)}
        decays = [measure.decay for measure in self.averages.values()]
        self.decay = torch.tensor(decays, dtype=torch.float64, device=group.device)
        self.sums = torch.zeros(2, len(decays), dtype=torch.float64, device=group.device)
        self.history: list[Reading] = []
        self.seconds = 0.0
        self.stopped: dict[str, Any] | None = None

    @torch.no_grad()
    def add(self, found: Mapping[str, Tensor], weights: Tensor | None) -> None:
        """Take a step's losses, of this process's rows. What is not finite is left out: such a step teaches nothing.

        Args:
            found: `Objective`'s losses.
            weights: (B,) of the samples for this term; None where all count alike.
        """
        if self.stopped is not None or not self.averages:
            return
        one = torch.ones((), dtype=torch.float64, device=self.sums.device)
        share = one if weights is None else weights.double().mean()
        left = residual(self.kind, self.term, found[self.kind].double(), share)
        pairs = {"residual": (left, share), "denoising": (found["denoising"].double(), one)}
        new = torch.stack([torch.stack(pairs[measure.of]) for measure in self.averages.values()], dim=1)  # (2, K)
        updated = self.sums * self.decay + new * (1 - self.decay)
        self.sums = torch.where(new.isfinite().all(dim=0), updated, self.sums)

    def is_due(self, done: int) -> bool:
        """Whether a reading comes after `done` steps."""
        fresh = not self.history or self.history[-1].step < done
        return self.stopped is None and fresh and done >= self.first and (done - self.after) % self.every == 0

    def read(self, done: int, trajectory: str, angles: Angles | None = None) -> bool:
        """Make the reading after `done` steps and ask the trigger. Everybody must call it.

        Args:
            done: steps done.
            trajectory: the name of the one that is trained, for the record.
            angles: measures them, where the trigger needs some.

        Returns:
            Whether the trigger stops the term.
        """
        started = time.monotonic()
        found = self._averaged()
        if found is not None and self.angles:
            assert angles is not None
            found |= angles.values(done, self.kind, self.angles)
        if found is not None and self._is_finite(done, found):
            self.history.append(Reading(done, {name: found[name] for name in self.trigger.needs}))
            decision = self.group.broadcast(self._ask)
            self._tell(done, decision)
            if decision.stop:
                self.stopped = {"step": done, "reason": decision.reason, "trajectory": trajectory}
        self.seconds += time.monotonic() - started
        return self.stopped is not None

    def _averaged(self) -> dict[str, float] | None:
        """The averages over all processes; None if no step was of any use to one of them yet."""
        if not self.averages:
            return {}
        agreed = self.group.mean(self.sums.flatten().tolist())
        values, weights = agreed[: len(self.averages)], agreed[len(self.averages) :]
        if not all(weights):
            return None
        return {name: value / weight for name, value, weight in zip(self.averages, values, weights, strict=True)}

    def _is_finite(self, done: int, found: Mapping[str, float]) -> bool:
        """Whether all of it are numbers. The angle with a gradient that is 0, or overflowed, is none."""
        wrong = [name for name, value in found.items() if not math.isfinite(value)]
        if wrong and self.group.is_first:
            log.warning("step %d: no reading for %s: %s not finite", done, self.kind, ", ".join(wrong))
        return not wrong

    def _ask(self) -> Decision:
        return triggers.decided(self.settings["trigger"], self.trigger, self.history)

    def _tell(self, done: int, decision: Decision) -> None:
        if self.group.is_first:
            does = "stops" if decision.stop else "goes on with"
            log.info("step %d: %s %s %s: %s", done, self.settings["trigger"], does, self.kind, decision.reason)

    def record(self) -> dict[str, Any]:
        """What a state's header says of it."""
        readings = [{"step": reading.step, **reading.values} for reading in self.history]
        return {
            "trigger": self.settings,
            "stopped": self.stopped,
            "seconds": round(self.seconds, 6),
            "readings": readings,
        }

    def gathered(self) -> Tensor:
        """(W, 2, K): every process's sums. All must call it."""
        found = torch.zeros(self.group.size, *self.sums.shape, dtype=torch.float64, device=self.sums.device)
        found[self.group.rank] = self.sums
        return self.group.total(found) if self.averages else found

    def go_on(self, record: Mapping[str, Any], sums: Tensor | None, path: Path) -> None:
        """Continue from what a state says.

        Args:
            record: as `record` made it.
            sums: as `gathered` made it; None where there are none.
            path: the state's file, for messages.

        Raises:
            ValueError: it does not fit the trigger.
        """
        names, readings = list(self.trigger.needs), record["readings"]
        if any(set(reading) != {"step", *names} for reading in readings):
            raise ValueError(f"{path}: readings of {self.kind} are not the trigger's, expected {', '.join(names)}")
        self.history = [Reading(r["step"], {name: r[name] for name in names}) for r in readings]
        self.seconds = record["seconds"]
        if sums is None or sums.shape[1:] != self.sums.shape:
            found = "nothing" if sums is None else tuple(sums.shape)
            raise ValueError(f"{path}: readings/{self.kind} is {found}, expected (processes, {tuple(self.sums.shape)})")
        mine = sums[self.group.rank] if len(sums) == self.group.size else sums.mean(dim=0)
        self.sums = mine.to(self.sums)


class Watches:
    """The triggers of a segment's terms at work, and the records of those that have stopped their term before it."""

    def __init__(self, segment: Segment, group: Group):
        """
        Args:
            segment: its terms; those without a trigger are not watched.
            group: the processes.
        """
        self.trajectory = segment.state.trajectory
        self.of = {kind: Watch(kind, term, group) for kind, term in segment.terms.items() if term["trigger"]}
        self.stopped: dict[str, Any] = {}

    def add(self, found: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        """Take a step's losses, and by term the weights of its samples where they do not count alike; see `Watch`."""
        for kind, watch in self.of.items():
            watch.add(found, weights.get(kind))

    def read(self, done: int, angles: Angles) -> bool:
        """Make the readings that are due after `done` steps. Everybody must call it. Returns whether a term stops."""
        due = [watch for watch in self.of.values() if watch.is_due(done)]
        return any(
            [watch.read(done, self.trajectory, angles) for watch in due]
        )  # each of them, whatever the others say

    def header(self) -> dict[str, Any]:
        """What a state's header says of triggers: `triggers`, by term; nothing where none ever watched."""
        records = {**self.stopped, **{kind: watch.record() for kind, watch in self.of.items()}}
        return {"triggers": records} if records else {}

    def averages(self) -> dict[str, Tensor]:
        """Tensors of a state, `readings/TERM`, of the triggers that go on. Everybody must call it."""
        going = {kind: watch for kind, watch in self.of.items() if watch.stopped is None}
        return {f"readings/{kind}": watch.gathered() for kind, watch in going.items()}

    def go_on(self, header: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> None:
        """Continue from a state; a trigger that it does not know of begins at its own first step.

        Args:
            header: of the state.
            tensors: of the state.
            path: its file, for messages.

        Raises:
            ValueError: it has no readings of a term that was watched before it, or they do not fit the trigger.
        """
        records = header.get("triggers", {})
        self.stopped = {kind: record for kind, record in records.items() if kind not in self.of}
        for kind, watch in self.of.items():
            if kind in records:
                watch.go_on(records[kind], tensors.get(f"readings/{kind}"), path)
            elif header["step"] != watch.after:
                raise ValueError(
                    f"{path}: has no readings of {kind}, which is watched from step {watch.after} on; expected them, "
                    "or the state of that step"
                )
