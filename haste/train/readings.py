"""The readings of triggers during training, and their decisions. A trigger that only watches is never asked.

Each rank averages the values of its own rows on its device, so no step waits. At a reading the averages are averaged
over ranks, which is exact because an average is linear. Measurements that need their own passes are made then too
(`haste/train/gradient_angles.py`). Rank 0 asks the trigger and broadcasts the decision. A state holds the averages
of every rank, so that continuing with the same number of ranks gives the same bits.
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
from haste.align.terms import kind_of
from haste.align.triggers import Angle, Average, Decision, Reading
from haste.files.artefact import fingerprint
from haste.plan.names import Segment
from haste.train.distributed import Group
from haste.train.gradient_angles import Angles

log = logging.getLogger("haste.train")


def residual(kind: str, term: Mapping[str, Any], loss: Tensor, share: Tensor) -> Tensor:
    """Residual of a term's loss, times the share of samples that count: `share` - cosine, else the loss itself.

    Args:
        kind: its name.
        term: its settings.
        loss: the term's, as `Objective` returns it: 0 where no sample counts.
        share: mean weight of this rank's samples; over all ranks it is 1, or 0 where no sample counts.
    """
    by_angle = kind_of(kind) == "features" and term.get("similarity", "cosine") == "cosine"
    return share + loss if by_angle else loss  # the feature loss is -cosine (REPA, Eq. 8)


class Watch:
    """One term's running trigger: its averages, its readings so far, and its decision.

    B samples, K averages, W ranks.

    Attributes:
        sums: (2, K) float64: of values times weights, and of weights, both weighted by decay^age.
        history: the readings so far.
        seconds: wall time of the readings so far.
        stopped: step, reason and trajectory of the stop, once it has happened.
        since: steps done before the first one that the averages have seen.
    """

    def __init__(self, kind: str, term: Mapping[str, Any], group: Group, watched: Mapping[str, Any] | None = None):
        """
        Args:
            kind: of the term.
            term: its settings, with those of its trigger.
            group: the ranks.
            watched: settings of a trigger that never stops the term, in place of the term's own.

        Raises:
            ValueError: a parameter that the trigger does not accept.
        """
        self.kind, self.term, self.settings, self.group = kind, term, dict(watched or term["trigger"]), group
        self.asks = watched is None
        own = {key: value for key, value in self.settings.items() if key not in ("trigger", "after", "every")}
        self.trigger = triggers.made(self.settings["trigger"], own)
        self.after, self.every = self.settings["after"], self.settings["every"]
        self._begin(self.after)
        needs = self.trigger.needs
        self.averages = {name: measure for name, measure in needs.items() if isinstance(measure, Average)}
        self.angles = {name: measure for name, measure in needs.items() if isinstance(measure, Angle)}
        decays = [measure.decay for measure in self.averages.values()]
        self.decay = torch.tensor(decays, dtype=torch.float64, device=group.device)
        self.sums = torch.zeros(2, len(decays), dtype=torch.float64, device=group.device)
        self.history: list[Reading] = []
        self.seconds = 0.0
        self.stopped: dict[str, Any] | None = None

    def _begin(self, since: int) -> None:
        self.since = max(since, self.after)
        self.first = triggers.first_reading(self.trigger, self.after, self.every, self.since)

    @torch.no_grad()
    def add(self, found: Mapping[str, Tensor], weights: Tensor | None) -> None:
        """Add a step's losses of this rank's rows. Skips non-finite values, because such a step carries no information.

        Args:
            found: the losses of `Objective`.
            weights: (B,) of the samples for this term; None if all count equally.
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
        """Whether a reading is due after `done` steps."""
        fresh = not self.history or self.history[-1].step < done
        return self.stopped is None and fresh and done >= self.first and (done - self.after) % self.every == 0

    def read(self, done: int, trajectory: str, angles: Angles | None = None) -> bool:
        """Make the reading after `done` steps and ask the trigger, unless it only watches. A collective call.

        Args:
            done: steps done.
            trajectory: name of the trajectory being trained, for the record.
            angles: measures angles, if the trigger needs some.

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
            if self.asks and (decision := self._told(done)).stop:
                self.stopped = {"step": done, "reason": decision.reason, "trajectory": trajectory}
        self.seconds += time.monotonic() - started
        return self.stopped is not None

    def _averaged(self) -> dict[str, float] | None:
        """The averages over all ranks; None if some average has no weight yet."""
        if not self.averages:
            return {}
        agreed = self.group.mean(self.sums.flatten().tolist())
        values, weights = agreed[: len(self.averages)], agreed[len(self.averages) :]
        if not all(weights):
            return None
        return {name: value / weight for name, value, weight in zip(self.averages, values, weights, strict=True)}

    def _is_finite(self, done: int, found: Mapping[str, float]) -> bool:
        """Whether all values are finite. The angle with a gradient that is 0, or overflowed, is not."""
        wrong = [name for name, value in found.items() if not math.isfinite(value)]
        if wrong and self.group.is_first:
            log.warning("step %d: no reading for %s: %s not finite", done, self.kind, ", ".join(wrong))
        return not wrong

    def _ask(self) -> Decision:
        return triggers.decided(self.settings["trigger"], self.trigger, self.history)

    def _told(self, done: int) -> Decision:
        decision = self.group.broadcast(self._ask)
        if self.group.is_first:
            does = "stops" if decision.stop else "goes on with"
            log.info("step %d: %s %s %s: %s", done, self.settings["trigger"], does, self.kind, decision.reason)
        return decision

    def record(self) -> dict[str, Any]:
        """The entry for a state's header."""
        readings = [{"step": reading.step, **reading.values} for reading in self.history]
        own = {"stopped": self.stopped} if self.asks else {"term": self.kind, "since": self.since}
        return {"trigger": self.settings, **own, "seconds": round(self.seconds, 6), "readings": readings}

    def gathered(self) -> Tensor:
        """(W, 2, K): every rank's sums. A collective call."""
        found = torch.zeros(self.group.size, *self.sums.shape, dtype=torch.float64, device=self.sums.device)
        found[self.group.rank] = self.sums
        return self.group.total(found) if self.averages else found

    def go_on(self, record: Mapping[str, Any], sums: Tensor | None, path: Path) -> None:
        """Continue from the record in a state.

        Args:
            record: as `record` made it.
            sums: as `gathered` made it; None if there are none.
            path: the state's file, for messages.

        Raises:
            ValueError: it does not fit the trigger.
        """
        names, readings = list(self.trigger.needs), record["readings"]
        if any(set(reading) != {"step", *names} for reading in readings):
            raise ValueError(f"{path}: readings of {self.kind} are not the trigger's, expected {', '.join(names)}")
        self.history = [Reading(r["step"], {name: r[name] for name in names}) for r in readings]
        self.seconds = record["seconds"]
        if not self.asks:
            self._begin(record["since"])
        if sums is None or sums.shape[1:] != self.sums.shape:
            found = "nothing" if sums is None else tuple(sums.shape)
            raise ValueError(f"{path}: readings/{self.kind} is {found}, expected (processes, {tuple(self.sums.shape)})")
        mine = sums[self.group.rank] if len(sums) == self.group.size else sums.mean(dim=0)
        self.sums = mine.to(self.sums)

    def rejoin(self, record: Mapping[str, Any] | None, sums: Tensor | None, step: int, path: Path) -> None:
        """As `go_on`, for a trigger that only watches: without its averages it begins anew at this step, and keeps the
        readings that it has.

        Args:
            step: of the state.
        """
        if record is not None:
            self.go_on(record, self.gathered() if sums is None else sums, path)
        if sums is None:
            self._begin(step)


class Watches:
    """The running triggers of a segment's terms, and the records of those that stopped their term before it. Those that
    only watch are by the name that states give them."""

    def __init__(self, segment: Segment, group: Group):
        """
        Args:
            segment: its terms, with the triggers that stop or watch them.
            group: the ranks.
        """
        self.trajectory = segment.state.trajectory
        self.of = {kind: Watch(kind, term, group) for kind, term in segment.terms.items() if term["trigger"]}
        self.watching = {
            f"{kind}/{fingerprint(settings)}": Watch(kind, segment.terms[kind], group, settings)
            for kind, settings in segment.watches
            if kind in segment.terms
        }
        self.stopped: dict[str, Any] = {}
        self.watched: dict[str, Any] = {}  # records of those that watched before

    def add(self, step: int, found: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        """Add the losses of the step after `step` steps, and by term the weights of its samples if they do not count
        equally; see `Watch`."""
        for watch in self._all():
            if step >= watch.after:
                watch.add(found, weights.get(watch.kind))

    def _all(self) -> list[Watch]:
        return [*self.of.values(), *self.watching.values()]

    def read(self, done: int, angles: Angles) -> bool:
        """Make the readings that are due after `done` steps. A collective call. Returns whether a term stops."""
        due = [watch for watch in self._all() if watch.is_due(done)]
        return any(
            [watch.read(done, self.trajectory, angles) for watch in due]
        )  # every one of them, whatever the others decide

    def header(self) -> dict[str, Any]:
        """The header's entries `triggers`, by term, and `watched`; without those of which there never was one."""
        found = {
            "triggers": {**self.stopped, **{kind: watch.record() for kind, watch in self.of.items()}},
            "watched": {**self.watched, **{name: watch.record() for name, watch in self.watching.items()}},
        }
        return {entry: records for entry, records in found.items() if records}

    def averages(self) -> dict[str, Tensor]:
        """Tensors of a state, `readings/TERM` of the running triggers and `watched/NAME`. A collective call."""
        going = {f"readings/{kind}": watch for kind, watch in self.of.items() if watch.stopped is None}
        going |= {f"watched/{name}": watch for name, watch in self.watching.items()}
        return {name: watch.gathered() for name, watch in going.items()}

    def go_on(self, header: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> None:
        """Continue from a state; a trigger that the state does not know begins at its own first step. One that only
        watches may begin anywhere, also anew where nobody watched in between.

        Args:
            header: of the state.
            tensors: of the state.
            path: its file, for messages.

        Raises:
            ValueError: readings of a term that was watched before the state are missing or do not fit the trigger.
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
        seen = header.get("watched", {})
        self.watched = {name: record for name, record in seen.items() if name not in self.watching}
        for name, watch in self.watching.items():
            watch.rejoin(seen.get(name), tensors.get(f"watched/{name}"), header["step"], path)
