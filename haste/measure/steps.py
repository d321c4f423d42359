"""A step of training on its own, to measure what it takes: as the loop takes it, without loading data."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from haste.train.step import draws_negatives, total_loss, update

if TYPE_CHECKING:
    from haste.align.losses import TeacherTargets
    from haste.measure.subject import Subject


class Step:
    """Steps of one batch, with some of a subject's alignment terms. Called, it takes one."""

    def __init__(self, subject: Subject, terms: Collection[str], size: int):
        """
        Args:
            subject: whose network and terms, beginning from new weights.
            terms: which of its alignment terms.
            size: images in the batch.
        """
        self.size, self.device = size, subject.group.device
        self._others = torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0
        only = subject.with_terms(terms)
        self.inputs, self.learner = only.inputs, only.learner
        self.objective = self.inputs.objective(self.learner)
        self.batch = self.inputs.batches(0, range(size)).to(self.device)

    def __call__(self) -> None:
        self._backward(self.inputs.targets(self.batch))
        settings = self.inputs.settings
        update(self.learner, clip=settings["clip"], ema=settings["ema"], skip=settings["nonfinite"] == "skip")

    def _backward(self, seen: dict[str, TeacherTargets]) -> None:
        inputs, negatives = self.inputs, None
        if draws_negatives(inputs.terms):
            negatives = inputs.negatives([seen], range(self.size), 0)
        with inputs.precision():
            losses = self.objective(self.batch, seen, negatives)
        self.learner.scaler.scale(total_loss(losses, inputs.terms, 0)).backward()

    def wait(self) -> None:
        """Wait until the device has done all."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def flops(self) -> tuple[float, float]:
        """Floating-point operations an image, two per multiplication: of the network with its projector and losses,
        forward and backward; and of the teachers. Those of torch's counter: products of matrices, convolutions,
        attention."""
        with FlopCounterMode(display=False) as teachers:
            seen = self.inputs.targets(self.batch)
        with FlopCounterMode(display=False) as student:
            self._backward(seen)
        self.learner.optimizer.zero_grad(set_to_none=True)
        return student.get_total_flops() / self.size, teachers.get_total_flops() / self.size

    def peak_megabytes(self) -> float:
        """The most that a step and all that it needs take of the allocator's memory, in MB (10^6 bytes)."""
        if self.device.type != "cuda":
            return cpu_peak_megabytes(self, self._held())
        torch.cuda.reset_peak_memory_stats(self.device)
        self()
        return (torch.cuda.max_memory_allocated(self.device) - self._others) / 1e6

    def _held(self) -> Iterable[Tensor]:
        """What is in memory between steps."""
        networks = [self.learner.model, self.learner.ema, self.learner.projectors]
        networks += [teacher.network for teacher in self.inputs.teachers.values()]
        for network in networks:
            yield from itertools.chain(network.parameters(), network.buffers())
        for moments in self.learner.optimizer.state.values():
            yield from moments.values()
        found: list[Tensor] = []
        self.batch.map(lambda x: found.append(x) or x)  # type: ignore[func-returns-value]
        yield from found


def cpu_peak_megabytes(work: Callable[[], object], held: Iterable[Tensor]) -> float:
    """The most memory during some work on a CPU, in MB: what is held before, and torch's record of every allocation.

    Args:
        work: what is done; all that it allocates and frees is on record.
        held: tensors that are in memory before and after it, each once.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    assert record.profiler is not None and record.profiler.kineto_results is not None
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return (sum(tensor.nbytes for tensor in held) + max(itertools.accumulate(changes), default=0)) / 1e6
