"""Nothing in a step waits for the device."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from haste.data.batches import Batch
from haste.diffusion.ddpm import DDPM
from haste.diffusion.interpolant import Interpolant
from haste.models.dit import DiT
from haste.models.heads import Projector
from haste.models.mmdit import MMDiT
from haste.models.sit import SiT
from haste.teachers.encoder import Teacher
from haste.train import loop
from haste.train.step import Objective, teacher_targets, total_loss

aten = torch.ops.aten
# Operations whose result, or the size of it, the host has to know.
WAIT = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.is_nonzero, aten.equal, aten._unique2}
# Those that the dispatcher does not see on a CPU.
ASK = {Tensor.tolist, Tensor.numpy, Tensor.cpu, torch.tensor, torch.as_tensor}


class NothingWaits(TorchDispatchMode):
    """Refuses what would wait if all tensors were a GPU's, and copies of the host's memory that wait."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func.overloadpacket
        assert found not in WAIT, f"{found} waits for the device"
        if found in (aten.index, aten.index_put, aten.index_put_):
            assert not any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]), "a mask waits"
        if found is aten._to_copy and (device := (kwargs or {}).get("device")) is not None:
            same = torch.device(device) == args[0].device
            assert same or kwargs.get("non_blocking"), f"a copy from {args[0].device} to {device} waits"
        return func(*args, **(kwargs or {}))


class NothingAsked(TorchFunctionMode):
    """Refuses questions for what is in a tensor, and tensors made of Python's numbers."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func not in ASK, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


SIZE = {"input_size": 4, "in_channels": 4, "patch_size": 2, "depth": 2, "width": 16, "heads": 2}
NETWORKS = {
    "SiT": (lambda: SiT(**SIZE, classes=5), Interpolant()),
    "DiT": (lambda: DiT(**SIZE, classes=5), DDPM()),
    "MM-DiT": (lambda: MMDiT(**SIZE, text_width=6, text_tokens=3), Interpolant()),
}
FEATURES = {"features": {"teacher": "it", "depth": 1, "weight": 0.5}}
LAYERS = {"student_layers": [0, 1], "teacher_layers": [1, 0], "heads": 2}
ATTENTION = {"attention": {"teacher": "it", "weight": 0.5, "warmup": 4, **LAYERS}}
TERMS = {"vanilla": {}, "REPA": FEATURES, "ATTA": ATTENTION, "HASTE": FEATURES | ATTENTION}


def batch_of(told):
    images = torch.zeros(2, 8, 8, 3, dtype=torch.uint8)
    draws = {"moments": torch.rand(2, 8, 4, 4), "draw": torch.rand(2, 4, 4, 4), "noise": torch.rand(2, 4, 4, 4)}
    told = torch.zeros(2, 3, 6) if told == "MM-DiT" else torch.zeros(2, dtype=torch.int64)
    weights = {kind: torch.ones(2, dtype=torch.float64) for kind in ("features", "attention")}
    return Batch(step=0, t=torch.rand(2), condition=told, images=images, weights=weights, **draws)


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_steps_losses_and_gradients_need_no_number_of_the_device(name, terms, monkeypatch):
    """On the meta device, which has none, so that shapes follow from shapes alone, as CUDA graphs need them; the losses
    take a GPU's way there."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # there is none for this device
    made, process = NETWORKS[name]
    learner = SimpleNamespace(model=made(), projectors=nn.ModuleDict({"features": Projector(16, 12, hidden=8)}))
    vit = VisionTransformer(img_size=8, patch_size=4, embed_dim=12, depth=2, num_heads=2, num_classes=0)
    objective = Objective(learner, TERMS[terms], process=process, scale=1.0, shift=0.0).to("meta")
    teachers = {"it": Teacher(vit, identity="it", norm=((0.5,) * 3, (0.5,) * 3)).to("meta")} if TERMS[terms] else {}
    batch = batch_of(name).to(torch.device("meta"))
    with NothingWaits(), NothingAsked():
        targets = teacher_targets(teachers, TERMS[terms], batch.images)
        total_loss(objective(batch, targets), TERMS[terms], step=1).backward()
    assert all(p.grad is not None for p in objective.model.parameters())


# Every part of a step that has something to do only when it is asked for.
PARTS = {
    "features": {"teacher": "vit", "depth": 1, "hidden": 16, "similarity": "nt-xent", "negatives": "batch"},
    "attention": {"teacher": "vit", "student_layers": [0, 1], "teacher_layers": [1, 0], "warmup": 3, "t_max": 0.9},
}
RUNS = {"it": {"alignment": "it", "milestones": [3], "stop": {"trigger": "plateau", "every": 3}}}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_whole_step_of_the_loop_asks_nothing_of_the_device(make_plan, tiny, monkeypatch, precision):
    steps, step = [], loop.Loop._step

    def watched(self, batch):
        with NothingWaits(), NothingAsked():
            steps.append(batch.step)
            return step(self, batch)

    monkeypatch.setattr(loop.Loop, "_step", watched)
    training = {**tiny["training"], "clip": 0.5, "nonfinite": "skip", "precision": precision}
    plan = make_plan(training=training, alignments={"it": PARTS}, runs=RUNS, runtime={"accumulate": 2, "trackers": []})
    loop.train(plan, plan.state("it", 3))
    assert steps == [0, 1, 2]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_steps_wait_for_no_gpu(make_plan, tiny, monkeypatch):
    step = loop.Loop._step

    def watched(self, batch):
        torch.cuda.set_sync_debug_mode("error" if batch.step else "default")  # the first one starts libraries
        try:
            return step(self, batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(loop.Loop, "_step", watched)
    training = {**tiny["training"], "precision": "bf16"}
    plan = make_plan(training=training, alignments={"it": PARTS}, runs=RUNS, runtime={"device": "cuda", "trackers": []})
    loop.train(plan, plan.state("it", 3))
