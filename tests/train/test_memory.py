"""What a training step takes of memory, measured without numbers, is what an allocator says of one with numbers."""

import pytest
import torch

from haste.config import Runtime
from haste.measure.steps import cpu_peak_megabytes
from haste.plan.memory import Memory, Way
from haste.train import memory
from haste.train.step import update

SIZE = {"depth": 2, "width": 64, "heads": 4, "patch_size": 2, "mlp_ratio": 4.0}
FEATURES = {"teacher": "0", "depth": 1, "hidden": 96, "head": "mlp", "cached": False}
ATTENTION = {"teacher": "0", "student_layers": [1], "teacher_layers": [0], "heads": 2, "cached": False}
TEACHER = {"trained": {"depth": 2, "width": 32, "heads": 2, "patch": 4}, "low_pass": None}


def recipe_of(precision="fp32", terms=("features", "attention"), teacher=TEACHER, **changed):
    every = {"features": FEATURES, "attention": ATTENTION}
    return {
        "model": {**SIZE, "input_size": 16, "channels": 4},
        "classes": 10,
        "training": {"precision": precision},
        "resolution": 32,
        "terms": {kind: {**every[kind], **changed} for kind in terms},
        "teachers": {"0": teacher} if terms else {},
    }


def known(recipe, device="cpu", sizes=(4, 12)):
    """What is known of a recipe's steps, with one batch at a time on the device."""
    found = memory.measured(recipe, device, sizes)
    lines = {(kept, checkpointed): (base, each) for kept, checkpointed, base, each in found["lines"]}
    return Memory(found["update_mb"], found["batch_mb"], 0, lines)


def real(recipe, images, runtime=Runtime(), device="cpu"):  # noqa: B008
    """A step with numbers, whatever they are; and what is in memory between steps."""
    loop = memory.looped(memory.Shapes(recipe, memory.shown(recipe, device), device, device), runtime)
    loop.learner.model.checkpoint_blocks = runtime.checkpoint_blocks
    batch = loop.inputs.batch(images * runtime.accumulate)

    def step():
        loop._backward(batch)
        update(loop.learner, clip=1.0, ema=0.9, skip=False)

    step()
    networks = [loop.learner.model, loop.learner.ema, loop.learner.projectors]
    networks += [teacher.network for teacher in loop.inputs.teachers.values()]
    held = [tensor for network in networks for tensor in (*network.parameters(), *network.buffers())]
    held += [value for moments in loop.learner.optimizer.state.values() for value in moments.values()]
    batch.map(lambda x: held.append(x) or x)
    return step, held


STORED = {"stored": {"features": [16, 8], "queries.1": [2, 16, 16], "keys.1": [2, 16, 16]}}
LATENTS = {"input_size": 16, "channels": 4}
DIT = {
    "model": {**SIZE, "architecture": "dit", **LATENTS},
    "training": {"precision": "fp32", "process": {"name": "ddpm"}},
}
MMDIT = {
    "model": {"architecture": "mmdit", "depth": 2, "width": 64, "heads": 4, "patch_size": 2, **LATENTS},
    "condition": {"name": "captions", "encoder": "words", "tokens": 12, "width": 48, "attention_mask": False},
}
CASES = {
    "vanilla": (recipe_of(terms=()), {}),
    "DiT": ({**recipe_of(terms=()), **DIT}, {}),
    "MM-DiT": ({**recipe_of(terms=()), **MMDIT}, {}),
    "in bf16": (recipe_of("bf16"), {}),
    "with checkpointed blocks": (recipe_of(), {"checkpoint_blocks": True}),
    "accumulated in float64": (recipe_of("fp64", ("features",)), {"accumulate": 2}),
    "from targets on disk": (recipe_of(teacher=STORED, cached=True, teacher_layers=[1]), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_steps_memory_without_numbers_is_that_of_the_allocator_within_five_percent(case):
    recipe, settings = CASES[case]
    runtime, images = Runtime(**settings), 8  # between those that are measured
    way = Way(1, runtime.accumulate, runtime.checkpoint_blocks)
    step, held = real(recipe, images, runtime)
    assert known(recipe).peak(way, images) == pytest.approx(cpu_peak_megabytes(step, held), rel=0.05)


def test_memory_grows_by_the_same_for_every_image():
    """In a model of the published shape, by the line through what is measured; a small batch may need less."""
    shape = {**recipe_of("bf16", ())["model"], "depth": 2, "width": 192}
    few, many = (known({**recipe_of("bf16", ()), "model": shape}, "cuda", sizes) for sizes in (memory.SIZES, (8, 400)))
    for images in (8, 20, 100, 400):
        assert few.peak(Way(2, 1, False), images) == pytest.approx(many.peak(Way(2, 1, False), images), rel=0.01)


def test_of_a_gpu_half_precision_makes_the_teacher_half_as_large():
    sizes = {}
    for device in ("cpu", "cuda"):
        network = memory.shown(recipe_of("bf16"), device)["0"].network
        sizes[device] = sum(p.nbytes for p in network.parameters())
    assert sizes["cpu"] == 2 * sizes["cuda"]
    assert memory.losses.WAYS.keys() == {"cpu"}  # put back after every measurement


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("terms", [(), ("features", "attention")])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gpus_allocator_says_the_same_within_five_percent(precision, terms):
    size = {"depth": 12, "width": 384, "heads": 6, "patch_size": 2, "mlp_ratio": 4.0, "input_size": 32, "channels": 4}
    recipe = {**recipe_of(precision, terms), "model": size, "resolution": 64}
    expected, before = known(recipe, "cuda", memory.SIZES).peak(Way(1, 1, False), 64), torch.cuda.memory_allocated()
    step, _ = real(recipe, 64, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    step()
    assert expected == pytest.approx((torch.cuda.max_memory_allocated() - before) / 1e6, rel=0.05)
