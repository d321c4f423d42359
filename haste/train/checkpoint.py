"""Checkpoints of a segment: find the state to continue from, check and record what changed, and save the next states.
The contents of a state file are defined in `haste/train/state.py`.

    step-00250000.safetensors          kept: the segment's end, every `keep_every` steps, where a trigger stopped a term
    rolling/step-00251000.safetensors  intermediate: the newest two, removed once the segment's end is saved
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from haste.config import minutes_of
from haste.files import artefact, locks
from haste.files.provenance import STATE_NAME, read_header
from haste.plan.names import Segment, State
from haste.plan.plan import Plan
from haste.train import state as states
from haste.train import stops, twins
from haste.train.distributed import Group
from haste.train.inputs import Inputs
from haste.train.readings import Watches
from haste.train.saving import Background
from haste.train.state import Learner

log = logging.getLogger("haste.train")

ROLLING = 2  # the newest may be lost with the disk's write cache; then the one before remains


class Checkpoints:
    """The states of one segment on disk. Every rank has one; only rank 0 writes.

    Attributes:
        folder: of the trajectory.
    """

    def __init__(self, plan: Plan, segment: Segment, group: Group):
        """
        Args:
            plan: where states are.
            segment: the job.
            group: the ranks.
        """
        self.segment, self.group = segment, group
        self.plan, self.trajectory = plan, plan.trajectories[segment.state.trajectory]
        self.folder = Path(plan.path(segment.state)).parent
        before = segment.parent
        self.parent = Path(plan.path(before)) if before else None
        self.parent_key = plan.trajectories[before.trajectory].key if before else None
        self.runtime = plan.config.runtime
        self.background = Background()
        self.asked = time.monotonic()  # when a save was last due by the clock
        # What new states record; see `resume`.
        self.inputs: dict[str, str] = {}  # name -> identity of every input that this lineage was trained with
        self.sources: dict[str, str] = {}  # term -> source of its targets
        self.changes: list[str] = []  # earlier changes of settings that alter results only by rounding

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the trajectory's folder, in which one job trains at a time, and remove leftovers of killed writers.

        A process that trains alone waits for the lock; one of several does not, since the others would wait in a
        collective call, which has a time limit.

        Raises:
            ValueError: another process holds the lock, or the disk has no locks.
        """
        if not self.group.is_first:
            yield
            return
        taking = locks.waiting if self.group.size == 1 else locks.holding
        with taking(self.folder / "lock", f"trajectory {self.trajectory.name}"):
            artefact.sweep(self.folder, locked=locks.taken())
            artefact.sweep(self.folder / "rolling", locked=locks.taken())
            try:
                yield
            finally:
                self.background.close()

    def describe(self) -> None:
        """Write the trajectory's description into its folder."""
        if self.group.is_first:
            about = {"key": self.trajectory.key, "recipe": self.trajectory.recipe}
            about |= {"provenance": artefact.provenance(key=self.trajectory.key)}
            artefact.write_json(
                self.folder / "trajectory.json", {"schema": artefact.SCHEMA, "kind": "trajectory", **about}
            )

    def adopt(self) -> None:
        """Copy what a trajectory that differs only behind a trigger's firing has of this segment already."""
        if self.group.is_first:
            own = self._on_the_way(self.folder) + self._on_the_way(self.folder / "rolling")
            twins.adopt(self.folder, self.trajectory, self.segment, max((step for step, _ in own), default=0))

    # -- resuming --------------------------------------------------------------------------------------------------

    def confirm(self) -> None:
        """Check that the segment's existing state is of this trajectory, and finish what a kill after its save left.

        Raises:
            ValueError: it cannot be read, or is of another trajectory.
        """
        path = self.folder / self.segment.state.file
        header, _ = states.read(path, key=self.trajectory.key, prefixes=("none",))
        log.info("%s: already trained (%s)", self.segment.state, header["provenance"]["made"])
        if self.group.is_first:
            stops.write(self.folder, header)
            self._forget_rolling(keep=0)

    def newest(self, reached: int | None = None) -> Path | None:
        """The newest readable state of the segment, else its parent state; None to begin from scratch.

        A collective call: rank 0 decides and broadcasts the result.

        Args:
            reached: the step whose state was just saved, if any.

        Raises:
            ValueError: the newest state is not the one just saved.
        """
        found = self.group.broadcast(self._newest)
        if reached is not None and (found is None or read_header(found)["step"] != reached):
            raise ValueError(
                f"{found}: found as the newest state, expected that of step {reached}, which was just saved"
            )
        return found

    def _newest(self) -> Path | None:
        found = self._on_the_way(self.folder) + self._on_the_way(self.folder / "rolling")
        for _, path in sorted(found, reverse=True):
            try:
                states.read(path, key=self.trajectory.key)
            except ValueError as error:
                log.warning("passing over a state that cannot be read: %s", error)
                continue
            return path
        return self.parent

    def _on_the_way(self, folder: Path) -> list[tuple[int, Path]]:
        """Step and file of the states in a folder within the segment, newest first; others belong to other segments."""
        names = [STATE_NAME.match(path.name) for path in folder.glob("step-*")]
        steps = sorted((int(match[1]) for match in names if match), reverse=True)
        way = range(self.segment.start + 1, self.segment.state.step + 1)
        return [(step, folder / State(self.trajectory.name, step).file) for step in steps if step in way]

    def resume(self, path: Path | None, learner: Learner, inputs: Inputs, watches: Watches) -> int:
        """Load a state into learner and watches, and record which settings differ from those it was made with.

        Args:
            path: the state's file, as `newest` returns it; None begins from scratch.
            learner: takes its tensors.
            inputs: with which training continues.
            watches: take the readings of the triggers so far.

        Returns:
            The state's step, 0 without one.

        Raises:
            ValueError: the state cannot be read or does not fit, or was trained with other inputs.
        """
        self.inputs, self.sources, self.changes = dict(inputs.identities), inputs.sources, []
        if path is None:
            return 0
        own = self.folder in (path.parent, path.parent.parent)
        header, tensors = states.read(path, key=self.trajectory.key if own else str(self.parent_key))
        self._go_on_with_inputs(header, path)
        self._note_changes(header, path)
        states.restore(learner, tensors, path)
        watches.go_on(header, tensors, path)
        if own and self.group.is_first:
            stops.write(self.folder, header)
        return header["step"]

    def _go_on_with_inputs(self, header: Mapping[str, Any], path: Path) -> None:
        for name, identity in self.inputs.items():
            found = header["inputs"].get(name, "none")
            if found != identity:
                raise ValueError(
                    f"{path}: was trained with {name} {found[:12]}, but {name} is now {identity[:12]}. "
                    "Bring the earlier one back, or remove this trajectory's states to train them anew."
                )
        self.inputs = {**header["inputs"], **self.inputs}  # earlier teachers stay on record

    def _note_changes(self, header: Mapping[str, Any], path: Path) -> None:
        """Log what differs from here on, and permanently record changes in kernels and in the source of targets."""
        made = header["provenance"]
        if made["code"] != artefact.code_version():
            log.warning("%s was made by other code (%s)", path, made["code"])
        if made.get("processes", 1) != self.group.size:
            log.warning("%s was made by %d processes, going on with %d", path, made["processes"], self.group.size)
        self.changes = list(made.get("changes", []))
        before = {"deterministic": "not recorded" if self.group.device.type == "cuda" else True}
        for name, choice in self.kernels.items():
            if (was := made.get(name, before.get(name))) != choice:
                self.changes.append(f"step {header['step']}: {name}: {was} before, {choice} from here on")
                log.warning("%s: was made with %s: %s, going on with %s", path, name, was, choice)
        for kind, now in self.sources.items():
            first = "online" if f"teacher of {kind}" in header["inputs"] else now
            if (was := made.get("targets", {}).get(kind, first)) != now:
                was, now = (source[:20] for source in (was, now))
                self.changes.append(f"step {header['step']}: targets of {kind}: {was} before, {now} from here on")
                log.warning("%s: its targets of %s were %s, going on with %s", path, kind, was, now)

    @property
    def kernels(self) -> dict[str, Any]:
        """Entries of the record that say whether the same steps give the same bits, and whose bits."""
        repeat = self.group.device.type != "cuda" or self.runtime.deterministic
        sent = self.runtime.compress_gradients if self.group.size > 1 else None
        return {"deterministic": repeat, "compress_gradients": sent}

    # -- saving ----------------------------------------------------------------------------------------------------

    def is_due(self, step: int) -> bool:
        """Whether the state after `step` steps is always saved."""
        every = self.runtime.save_every
        return (isinstance(every, int) and step % every == 0) or self._is_kept(step)

    @property
    def timed(self) -> bool:
        """Whether saves are due by the clock, which differs among ranks."""
        return not isinstance(self.runtime.save_every, int)

    def ask_to_save(self) -> bool:
        """Whether rank 0's clock says that a save is due; once for each."""
        now, minutes = time.monotonic(), minutes_of(self.runtime.save_every)
        due = self.group.is_first and minutes is not None and now - self.asked >= 60 * minutes
        self.asked = now if due else self.asked
        return due

    def _is_kept(self, step: int) -> bool:
        every = self.runtime.keep_every
        return every is not None and step % every == 0

    def save(self, learner: Learner, watches: Watches, step: int, *, wait: bool, last: bool) -> None:
        """Save the state after `step` steps, then remove old rolling states. A collective call.

        Args:
            learner: its tensors.
            watches: the readings of the triggers so far.
            step: steps done.
            wait: return once the state is on disk; otherwise it is written while training goes on.
            last: whether training ends here, or continues without a term; such a state is kept.

        Raises:
            OSError: the disk is full or the folder is not writable; existing files stay as they were. What fails in the
                background is raised by `check` or the next save.
        """
        averages = watches.averages()
        if not self.group.is_first:
            return
        header, tensors = self._header(step) | watches.header(), states.tensors_of(learner) | averages
        folder = self.folder if last or self._is_kept(step) else self.folder / "rolling"

        def write(tensors: Mapping[str, Tensor]) -> None:
            states.save(folder / State(self.trajectory.name, step).file, tensors, header)
            stops.write(self.folder, header)
            self._forget_rolling(keep=0 if step == self.segment.state.step else ROLLING)

        if wait or last:
            self.background.end(tensors, write)
        else:
            self.background.start(partial(write, self.background.copy(tensors)))

    def check(self) -> None:
        """Raise what a save in the background raised.

        Raises:
            OSError: as `save`.
        """
        self.background.check()

    def _header(self, step: int) -> dict[str, Any]:
        made = artefact.provenance(key=self.trajectory.key, inputs=self.inputs)
        made |= {"device": self.group.device.type, "processes": self.group.size, "accumulate": self.runtime.accumulate}
        made |= {"targets": self.sources, "changes": self.changes, **self.kernels}
        about = {"key": self.trajectory.key, "trajectory": self.trajectory.name, "recipe": self.trajectory.recipe}
        return {**about, "step": step, "inputs": self.inputs, "provenance": made}

    def _forget_rolling(self, keep: int) -> None:
        for _, path in self._on_the_way(self.folder / "rolling")[keep:]:
            path.unlink(missing_ok=True)
