"""The processes that train together: who this one is, which rows of a batch are its own, and what all agree on."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import gc
import os
import resource
from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from haste.networks.devices import choose_device

Value = TypeVar("Value")

# DDP rebuilds its buckets after the first backward; from the second on, a step reduces as every later one does.
WARM_UPS = 2
# Steps from a process's word until all act on it. One is enough for it to travel unnoticed.
LAG = 1


@dataclasses.dataclass(frozen=True)
class Group:
    """This process among those that train together; a group of one needs no process group."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes states and logs."""
        return self.rank == 0

    def rows(self, batch: int, microbatches: int) -> range:
        """The rows of a batch that are this rank's own, which it goes through in so many equal microbatches.

        Raises:
            ValueError: the batch cannot be cut into that many equal microbatches.
        """
        if batch % (self.size * microbatches):
            raise ValueError(
                f"a batch of {batch} cannot be cut into {self.size} processes times {microbatches} microbatches: "
                "training.batch must be divisible by runtime.processes * runtime.accumulate"
            )
        own = batch // self.size
        return range(self.rank * own, (self.rank + 1) * own)

    def broadcast(self, ask: Callable[[], Value]) -> Value:
        """What rank 0 finds, told to all: they look at one disk, but not at one moment. Everybody must call it.

        Raises:
            ValueError: rank 0 could not say; everybody then raises the same.
        """
        if self.size == 1:
            return ask()
        answer: list[Any] = [None, None]
        if self.is_first:
            try:
                answer[0] = ask()
            except (ValueError, OSError) as error:
                answer[1] = str(error)
        dist.broadcast_object_list(answer, device=self.device)
        if answer[1] is not None:
            raise ValueError(answer[1])
        return answer[0]

    def mean(self, values: Sequence[float]) -> list[float]:
        """Each value averaged over the group. Everybody must call it."""
        if self.size == 1:
            return list(values)
        summed = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(summed)
        return (summed / self.size).tolist()

    def total(self, values: Tensor) -> Tensor:
        """The sum of everybody's tensors, in each one's place. Everybody must call it. Without gradient."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def peak_memory_mb(self) -> float:
        """Largest memory so far: of the GPU's allocator, or of the process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e6
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3

    def free(self) -> None:
        """Give back the memory that nothing holds any more, and measure the peak anew."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def wait(self) -> None:
        """Until everybody is here."""
        if self.size > 1:
            dist.barrier()


class Agreement:
    """A number that all processes learn at one and the same step, and that no step waits for.

    What a process says after a step travels while the next one is computed, through gloo and past the GPU; what came
    of it is read LAG steps later, by all.
    """

    def __init__(self, group: Group):
        self.group = group
        self.asked: collections.deque[tuple[dist.Work, Tensor]] = collections.deque()

    def largest(self, value: int) -> int:
        """Say a value; the largest that anybody said LAG calls ago, 0 before that. Alone, the value itself.

        Everybody must call it as often, and `settle` at the end.
        """
        if self.group.size == 1:
            return value
        found = torch.tensor(value)
        self.asked.append((dist.all_reduce(found, dist.ReduceOp.MAX, async_op=True), found))
        return self._heard() if len(self.asked) > LAG else 0

    def _heard(self) -> int:
        work, found = self.asked.popleft()
        work.wait()
        return int(found)

    def settle(self) -> None:
        """Hear what is still on its way: before anything else is asked, or the group parts."""
        while self.asked:
            self._heard()


@contextlib.contextmanager
def joined(device: str) -> Generator[Group]:
    """Join the processes that RANK, WORLD_SIZE and LOCAL_RANK in the environment tell of; alone without them."""
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    own = choose_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if own.type == "cuda":
        torch.cuda.set_device(own)
    if size == 1:
        yield Group(0, 1, own)
        return
    # Words between processes go through gloo also where gradients go through NCCL: asking costs no GPU a wait.
    dist.init_process_group("cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo", rank=rank, world_size=size)
    try:
        yield Group(rank, size, own)
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def enough_memory() -> Generator[None]:
    """Say which settings would help where memory runs out.

    Raises:
        ValueError: out of memory.
    """
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one; the CPU's allocator has no class of its own
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise ValueError(
            "out of memory. What helps and changes results by rounding only: a larger runtime.accumulate, "
            "runtime.checkpoint_blocks: true, more runtime.processes on more devices. What is another run: a smaller "
            f"training.batch, training.precision: bf16. ({str(error).splitlines()[0]})"
        ) from error


def wrap(module: nn.Module, group: Group) -> nn.Module:
    """The module with gradients averaged over the group; itself in a group of one."""
    return module if group.size == 1 else DistributedDataParallel(module, gradient_as_bucket_view=True)
