"""The group of ranks that train together: this process's rank, its rows of a batch, and collective calls."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import datetime
import gc
import itertools
import os
import resource
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from haste.networks.devices import choose_device

Value = TypeVar("Value")

# DDP rebuilds its buckets after the first backward pass; from the second on, the order of reduction is fixed.
WARM_UPS = 2
# Steps between a rank's request and the step at which all act on it. One is enough to hide the communication.
LAG = 1
# How long the first rank waits for the last, and the others for the first. A node may copy its stores for hours; the
# launcher ends all ranks when one dies.
ARRIVAL = datetime.timedelta(days=7)


@dataclasses.dataclass(frozen=True)
class Group:
    """This rank in its group; a group of one needs no process group. Only methods marked so are collective calls."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes states and logs."""
        return self.rank == 0

    def rows(self, batch: int, microbatches: int) -> range:
        """This rank's rows of a batch, which it processes in a number of equal microbatches.

        Raises:
            ValueError: the batch cannot be divided into equal microbatches.
        """
        if batch % (self.size * microbatches):
            raise ValueError(
                f"a batch of {batch} cannot be cut into {self.size} processes times {microbatches} microbatches: "
                "training.batch must be divisible by runtime.processes * runtime.accumulate"
            )
        own = batch // self.size
        return range(self.rank * own, (self.rank + 1) * own)

    def broadcast(self, ask: Callable[[], Value]) -> Value:
        """Broadcast what rank 0 finds: all ranks see the same disk, but not at the same moment. A collective call.

        Raises:
            ValueError: rank 0 raised one; all ranks then raise the same.
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
        """Each value averaged over the ranks. A collective call."""
        if self.size == 1:
            return list(values)
        summed = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(summed)
        return (summed / self.size).tolist()

    def total(self, values: Tensor) -> Tensor:
        """The sum of all ranks' tensors, written into each one. A collective call. No gradient."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def peak_memory_mb(self) -> float:
        """Peak memory so far: of the GPU's allocator, or of the process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e6
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3

    def free(self) -> None:
        """Release unused memory, and reset the peak."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def wait(self) -> None:
        """Wait until all ranks are here (a barrier)."""
        if self.size > 1:
            dist.barrier()


class Agreement:
    """A number that all ranks receive at the same step, without any step waiting for it.

    A value given after a step is reduced while the next one is computed, through gloo and without the GPU; all ranks
    read the result LAG steps later.
    """

    def __init__(self, group: Group):
        self.group = group
        self.asked: collections.deque[tuple[dist.Work, Tensor]] = collections.deque()

    def largest(self, value: int) -> int:
        """Give a value; returns the largest given LAG calls ago, 0 before that. In a group of one, the value itself.

        All ranks must call it equally often, and `settle` at the end.
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
        """Wait for pending reductions, before another collective call or the end of the group."""
        while self.asked:
            self._heard()


# Where ranks find one another, by address, port, rank and size -> the store, open until the process ends, and numbers.
_STORES: dict[tuple[str, str, int, int], tuple[dist.Store, Iterator[int]]] = {}


def _all_here(rank: int, size: int) -> dist.Store:
    """The store through which the ranks find one another, once all have come."""
    where = (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], rank, size)
    if where not in _STORES:
        _STORES[where] = next(dist.rendezvous("env://", rank, size, timeout=ARRIVAL))[0], itertools.count()
    # The same ranks may join again, and one of them before another has left: each time has keys of its own.
    store, times = _STORES[where]
    here = dist.PrefixStore(f"joined {next(times)}", store)
    if here.add("arrived", 1) == size:
        here.set("all", "here")
    here.wait(["all"], ARRIVAL)
    store.set_timeout(dist.constants.default_pg_timeout)  # from now on silence is a failure
    return dist.PrefixStore("default_pg", here)


@contextlib.contextmanager
def joined(device: str) -> Generator[Group]:
    """Join the group that RANK, WORLD_SIZE and LOCAL_RANK in the environment describe; a group of one without them.

    Raises:
        ValueError: a launcher's variables are there only in part.
    """
    said = os.environ.get("WORLD_SIZE", "1")
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if said != "1" and missing:
        raise ValueError(
            f"WORLD_SIZE is {said} in the environment, as a launcher of several processes sets it, but not "
            f"{' and '.join(missing)}: unset WORLD_SIZE, or start this by torchrun or srun"
        )
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    own = choose_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if own.type == "cuda":
        torch.cuda.set_device(own)
    if size == 1:
        yield Group(0, 1, own)
        return
    store = _all_here(rank, size)
    # CPU tensors go through gloo even if gradients go through NCCL, so their reductions never wait for the GPU.
    backend = "cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    waited_for = True
    try:
        yield Group(rank, size, own)
    except BaseException as error:
        # NCCL's end waits for what the other ranks began, and they wait for this one: for minutes, in which nobody
        # learns the reason. The end of the process ends it too. gloo waits for nobody.
        waited_for = own.type != "cuda" or getattr(error, "agreed", False)
        raise
    finally:
        if waited_for:
            dist.destroy_process_group()


@contextlib.contextmanager
def enough_memory() -> Generator[None]:
    """Suggest settings that help when memory runs out.

    Raises:
        ValueError: out of memory.
    """
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one; the CPU's allocator has no class of its own
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise ValueError(
            "out of memory. These help and change results by rounding only: a larger runtime.accumulate, "
            "runtime.checkpoint_blocks: true, more runtime.processes on more devices. These make another run: a "
            f"smaller training.batch, training.precision: bf16. ({str(error).splitlines()[0]})"
        ) from error


def wrap(module: nn.Module, group: Group, compress: str | None = None) -> nn.Module:
    """The module wrapped in DDP, which averages gradients over the group; unchanged in a group of one.

    Buffers, such as positions, are constants: every rank has them, and none is sent at every step. With `compress`,
    "bf16", gradients are rounded to bf16 before they are sent, and summed in it.
    """
    if group.size == 1:
        return module
    wrapped = DistributedDataParallel(module, gradient_as_bucket_view=True)
    wrapped.broadcast_buffers = False  # the argument's name depends on torch's version
    if compress == "bf16":
        wrapped.register_comm_hook(None, bf16_compress_hook)
    return wrapped
