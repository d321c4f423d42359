"""How fast jobs compute: on the CPUs here, measured, or on GPUs of the table of machines, assumed. No torch."""

from __future__ import annotations

import dataclasses
import time

from haste.plan.machines import Machine
from haste.plan.plan import Plan

# Fraction of the speed of bare matrix products that whole networks reach on a CPU.
EFFICIENCY = 0.5
# Seconds of a training step around its operations: its kernels are started; and on a CPU of each of its images, whose
# noise is drawn and whose row is read, or whose attention is compared in one layer.
STEP, IMAGE = 0.008, 0.00015


@dataclasses.dataclass(frozen=True)
class Pace:
    """How fast the jobs of a plan compute.

    core: operations a second of one core here; threads: of a job; ranks: of a training job; machine: the GPUs to be
    planned for, if not the CPUs here.
    """

    core: float
    threads: int
    ranks: int
    machine: Machine | None = None

    @classmethod
    def of_plan(cls, plan: Plan, machine: Machine | None = None, core: float | None = None) -> Pace:
        """That of a plan's jobs; `core` is measured unless it is given."""
        runtime = plan.config.runtime
        if machine is not None:
            return cls(0.0, runtime.threads, machine.count, machine)
        return cls(machine_flops() if core is None else core, runtime.threads, runtime.processes)

    def wall(self, seconds: float, gpus: int) -> float:
        """The time of jobs that take so long one after another, with so many GPUs each: on a machine they run side by
        side."""
        return seconds * max(1, gpus) / self.machine.count if self.machine else seconds

    def of(self, precision: str = "fp32") -> float:
        """Operations a second of a job with one device."""
        return self.machine.pace(precision) if self.machine else EFFICIENCY * self.core * self.threads

    def training(self, steps: int, batch: int, looks: int, work: float, precision: str) -> float:
        """Seconds of training.

        Args:
            steps: of it.
            batch: images of a step.
            looks: at each image: one, and one for each layer whose attention is compared.
            work: operations of all steps.
            precision: in which they are computed.
        """
        computing = work / (self.of(precision) * self.ranks)
        if self.machine:  # a GPU starts kernels while it computes
            return max(steps * STEP, computing)
        return steps * (STEP + IMAGE * looks * batch / self.ranks) + computing


def machine_flops() -> float:
    """The FLOP/s of one core of this machine in float32 matrix products, measured in some tenths of a second."""
    import numpy as np
    from threadpoolctl import threadpool_limits

    a = np.random.default_rng(0).standard_normal((1024, 512), dtype=np.float32)
    b = np.ascontiguousarray(a.T)
    with threadpool_limits(1):
        a @ b
        started, count = time.perf_counter(), 0
        while time.perf_counter() - started < 0.2:
            a @ b
            count += 1
    return count * 2 * 1024 * 1024 * 512 / (time.perf_counter() - started)
