"""The memory of a training step, without a GPU: the step that training takes, on tensors that have no numbers.

torch's fake tensors have a shape and a dtype, and every operation on them is dispatched as if it computed. Here each
storage that an operation makes is on record until it is freed, so the peak is that of the GPU's allocator, except for
what kernels take for themselves.

A GPU is pretended: the tensors are a CPU's, since torch computes no gradient of a GPU's without one, and what our code
does otherwise on a GPU is done.
"""

from __future__ import annotations

import contextlib
import math
import warnings
import weakref
from collections.abc import Generator, Mapping
from types import SimpleNamespace
from typing import Any, cast

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from haste.align import losses
from haste.align.losses import TeacherTargets
from haste.config import Runtime, Training, condition_in
from haste.data.batches import AHEAD, Batch
from haste.networks.spec import each
from haste.teachers.encoder import Teacher, with_any_weights
from haste.teachers.targets import merged
from haste.train.distributed import Group
from haste.train.inputs import AUTOCAST, Inputs
from haste.train.loop import Loop
from haste.train.small_networks import NORM, transformer_kwargs
from haste.train.state import Learner
from haste.train.step import teacher_targets, update

SIZES = (32, 128)  # images at once: the line through both gives every other number
BLOCKS = {"cuda": 512, "cpu": 1}  # bytes to which the allocator rounds
_ANY_WEIGHT = {"weight": 1.0, "temperature": 1.0, "normalise_factor": 1.0}


class Ledger(TorchDispatchMode):
    """Bytes of the storages that operations made and nothing has freed.

    Attributes:
        live: their sum now; peak: its height since `begin`.
        kept: the height if all gradients were there from the beginning, to be added to.
    """

    def __init__(self, block: int):
        super().__init__()
        self.live = self.peak = self.kept = 0
        self._block, self._known = block, set[int]()
        self._gradients = self._all = 0

    def watch(self, parameters: list[nn.Parameter]) -> None:
        """Count the gradients of parameters from now on."""
        self._all = sum(self._bytes(p) for p in parameters)
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._arrived)

    def _arrived(self, parameter: Tensor) -> None:
        self._gradients += self._bytes(parameter)

    def begin(self) -> None:
        """Begin at what is there now, without gradients."""
        self._gradients = 0
        self.peak, self.kept = self.live, self.live + self._all

    def _bytes(self, tensor: Tensor) -> int:
        return -(-tensor.untyped_storage().nbytes() // self._block) * self._block

    def _freed(self, storage: int, size: int) -> None:
        self._known.discard(storage)
        self.live -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if not isinstance(tensor, Tensor) or (storage := tensor.untyped_storage())._cdata in self._known:
                continue
            size = self._bytes(tensor)
            self._known.add(storage._cdata)
            weakref.finalize(storage, self._freed, storage._cdata, size).atexit = False
            self.live += size
            self.peak, self.kept = max(self.peak, self.live), max(self.kept, self.live + self._all - self._gradients)
        return found


class Shapes(Inputs):
    """The inputs of a recipe of `haste.plan.memory`, without stores and weights: made where tensors are fake."""

    def __init__(self, recipe: Mapping[str, Any], teachers: Mapping[str, Teacher], device: str, where: str = "cpu"):
        """
        Args:
            recipe: as `haste.plan.memory.recipe_of` returns it.
            teachers: `shown` of it.
            device: whose step it is, `cpu` or `cuda`.
            where: the tensors are; fake ones only on the CPU.
        """
        self.settings = {**Training().model_dump(), **recipe["training"]}
        self.recipe = {**recipe, "training": self.settings, "seed": 0}
        self.terms = {kind: {**_ANY_WEIGHT, **term} for kind, term in recipe["terms"].items()}
        self.group, self.device = Group(0, 1, torch.device(where)), device
        self.half, self.checkpoint_blocks = AUTOCAST.get(self.settings["precision"]), False
        self.teachers = dict(teachers)
        for teacher in self.teachers.values():
            teacher.network.to_empty(device=where)
            teacher.mean, teacher.std = (torch.empty_like(x, device=where) for x in (teacher.mean, teacher.std))
        self.online = {kind: term for kind, term in self.terms.items() if not term["cached"]}
        self.stored = {name: one["stored"] for name, one in recipe["teachers"].items() if "stored" in one}
        scaling = SimpleNamespace(manifest={"scale": 1.0, "shift": 0.0})
        self.batches = cast(Any, SimpleNamespace(latents=scaling, seed=0))

    @property
    def widths(self) -> dict[str, int]:
        """See `Inputs`."""
        rows = {
            name: row for name, fields in self.stored.items() for field, row in fields.items() if "features" in field
        }
        return {name: one.width for name, one in self.teachers.items()} | {name: row[-1] for name, row in rows.items()}

    def _logsumexp_works(self, learner: Learner) -> bool:
        """See `Inputs`: of a GPU what its kernels are made for is taken to work."""
        return self.device == "cuda" and self.half is not None and "attention" in self.terms

    def targets(self, batch: Batch) -> dict[str, TeacherTargets]:
        """See `Inputs`."""
        with self.precision():
            seen = teacher_targets(self.teachers, self.online, batch.images)
        for name in self.stored:
            rows = {field: value for (owner, field), value in batch.targets.items() if owner == name}
            side = math.isqrt(next(iter(rows.values())).shape[-2])
            seen[name] = merged(seen.get(name, TeacherTargets(None, {}, (side, side))), rows)
        return seen

    def batch(self, images: int) -> Batch:
        """A batch of so many images, whatever is in it."""
        with self.group.device:
            return self._batch(images)

    def _batch(self, images: int) -> Batch:
        size, side = self.recipe["model"], self.recipe["resolution"]
        channels, cells = size["channels"], (size["input_size"],) * 2
        stored = {(name, field): row for name, fields in self.stored.items() for field, row in fields.items()}
        pictures = torch.empty(images, side, side, 3, dtype=torch.uint8) if self.teachers else None
        return Batch(
            step=0,
            moments=torch.empty(images, 2 * channels, *cells),
            draw=torch.empty(images, channels, *cells),
            noise=torch.empty(images, channels, *cells),
            t=torch.zeros(images),
            condition=each(
                lambda x: torch.zeros(x.shape, dtype=torch.from_numpy(x).dtype), condition_in(self.recipe).like(images)
            ),
            images=pictures,
            targets={key: torch.empty(images, *row, dtype=torch.float16) for key, row in stored.items()},
            rows=torch.empty(images, dtype=torch.int64),
        )


def shown(recipe: Mapping[str, Any], device: str) -> dict[str, Teacher]:
    """The teachers that are asked while training, on torch's device of shapes alone: timm reads numbers meanwhile."""
    found, precision = {}, recipe["training"]["precision"]
    dtype = torch.float64 if precision == "fp64" else AUTOCAST.get(precision) if device == "cuda" else None
    for name, one in recipe["teachers"].items():
        with torch.device("meta"):
            if "trained" in one:
                network = VisionTransformer(**transformer_kwargs(recipe["resolution"], 1, **one["trained"]))
                found[name] = Teacher(network, identity="any", norm=(NORM, NORM))
            elif "pretrained" in one:
                found[name] = with_any_weights(one["pretrained"], recipe["resolution"])
            else:
                continue
        found[name].to("meta", dtype).low_pass = one["low_pass"]
    return found


@contextlib.contextmanager
def _pretended(recipe: Mapping[str, Any], device: str) -> Generator[Ledger]:
    """Tensors without numbers, on record, and what our code does on a kind of device."""
    ways, dtype = dict(losses.WAYS), torch.get_default_dtype()
    if device == "cuda":
        losses.WAYS.clear()
    if recipe["training"]["precision"] == "fp64":
        torch.set_default_dtype(torch.float64)
    try:
        with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True), Ledger(BLOCKS[device]) as ledger:
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # copying a module asks
            yield ledger
    finally:
        torch.set_default_dtype(dtype)
        losses.WAYS.update(ways)


def looped(inputs: Shapes, runtime: Runtime) -> Loop:
    """Training's loop, whose steps are taken one by one."""
    nothing = cast(Any, None)
    return Loop(0, 1, inputs, inputs.learner(), nothing, nothing, runtime)


def _updated(loop: Loop, ledger: Ledger) -> float:
    """MB at the height of an update; the first one makes the optimiser's moments."""
    learner, settings = loop.learner, loop.settings
    for _ in range(2):
        for parameter in learner.parameters().values():
            parameter.grad = torch.empty_like(parameter)
        ledger.begin()
        update(learner, clip=settings["clip"], ema=settings["ema"], skip=settings["nonfinite"] == "skip")
    return ledger.peak / 1e6


def _passed(loop: Loop, ledger: Ledger, batch: Batch) -> tuple[float, float]:
    """MB at the height of a forward and backward pass: where it makes the gradients, and where it adds to them."""
    ledger.begin()
    loop._backward(batch)
    loop.learner.optimizer.zero_grad(set_to_none=True)
    return ledger.peak / 1e6, ledger.kept / 1e6


def measured(recipe: Mapping[str, Any], device: str = "cuda", sizes: tuple[int, int] = SIZES) -> dict[str, Any]:
    """The memory of a step of a recipe, as `haste.plan.memory.Memory` reads it.

    Args:
        recipe: as `haste.plan.memory.recipe_of` returns it.
        device: whose step it is, `cuda`, or `cpu` to compare with what a CPU's allocator says.
        sizes: images at once, of two passes.
    """
    teachers = shown(recipe, device)
    with _pretended(recipe, device) as ledger:
        loop = looped(Shapes(recipe, teachers, device), Runtime())
        ledger.watch(list(loop.learner.parameters().values()))
        update_mb, lines = _updated(loop, ledger), []
        for checkpointed in (False, True)[: 1 + loop.learner.model.can_checkpoint]:
            loop.learner.model.checkpoint_blocks = checkpointed
            peaks = [_passed(loop, ledger, cast(Shapes, loop.inputs).batch(size)) for size in sizes]
            for kept, (low, high) in enumerate(zip(*peaks, strict=True)):
                each_one = (high - low) / (sizes[1] - sizes[0])
                lines.append([bool(kept), checkpointed, low - each_one * sizes[0], each_one])
        before = ledger.live
        batch = cast(Shapes, loop.inputs).batch(1)  # noqa: F841 - held
        return {"update_mb": update_mb, "batch_mb": (ledger.live - before) / 1e6, "ahead": AHEAD, "lines": lines}
