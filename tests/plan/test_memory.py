"""What a GPU must hold, from what was measured once: peaks, the most images that fit, and the settings that would."""

import copy
import math

import pytest
from hypothesis import given
from hypothesis import strategies as some

from haste import config
from haste.files import artefact
from haste.plan import memory
from haste.plan.memory import Memory, Need, Way
from haste.plan.plan import Plan

megabytes, each_image = some.floats(1, 1e5), some.floats(0.01, 1e3)
ways = some.builds(Way, some.integers(1, 64), some.integers(1, 16), some.booleans())


@some.composite
def memories(draw):
    lines = {
        (kept, sparing): (draw(megabytes), draw(each_image)) for kept in (False, True) for sparing in (False, True)
    }
    return Memory(draw(megabytes), draw(some.floats(0.01, 1)), draw(some.integers(0, 4)), lines)


@given(memories(), ways, some.floats(0, 1e6))
def test_the_most_images_that_fit_fit_and_one_more_does_not(held, way, room):
    most = held.most(way, room)
    assert most == 0 or held.peak(way, most) <= room * (1 + 1e-9)
    assert held.peak(way, most + 1) > room * (1 - 1e-9)


@given(memories(), ways, some.integers(1, 1024), some.floats(1, 500))
def test_what_is_offered_fits_and_divides_the_batch_and_what_fits_is_not_refused(held, way, batch, gigabytes):
    need = Need("it", {}, held, way, batch, 1.0)
    said, room = need.refusal(gigabytes, "that"), gigabytes * 1e3
    assert bool(said) == (held.peak(way, math.ceil(batch / (way.gpus * way.accumulate))) > room)
    for other in need.fitting(room):
        assert batch % (other.gpus * other.accumulate) == 0 and held.peak(other, other.images(batch)) <= room


def test_a_refusal_names_accumulating_checkpointing_and_more_gpus_or_else_the_batch_that_fits():
    lines = {
        (False, False): (10e3, 1e3),
        (True, False): (12e3, 1e3),
        (False, True): (11e3, 100),
        (True, True): (13e3, 100),
    }
    need = Need("SiT + features", {}, Memory(9e3, 0.25, 3, lines), Way(1, 1, False), 96, 1.0)
    assert need.peak == 10e3 + 96e3 + 0.25 * 3 * 96
    assert need.refusal(80, "runtime.gpu_memory_gb") == (
        "SiT + features: 96 images at once take 106.1 GB of a GPU, runtime.gpu_memory_gb is 80 GB. These would fit: "
        "runtime.accumulate: 2 (48 images at once, 60.1 GB); runtime.checkpoint_blocks: true (96 images at once, "
        "20.7 GB); 2 GPUs (48 images at once, 60.0 GB)"
    )
    assert need.refusal(107, "") == ""
    odd = Need(
        "it", {}, Memory(9e3, 0.25, 3, {key: one for key, one in lines.items() if not key[1]}), Way(1, 1, False), 1, 1.0
    )
    assert odd.refusal(10, "that").endswith("These would fit: a smaller network")


def plan_in(tmp_path, tiny, **changes):
    return Plan(config.resolve({**tiny, "results": str(tmp_path), **changes}))


def test_equal_networks_terms_and_precisions_are_one_measurement_and_runs_differ_only_by_what_changes_memory(
    tmp_path, tiny
):
    runs = {
        "a": {},
        "b": {"seed": 1},
        "c": {"training": {"lr": 0.1}},
        "d": {"alignment": "HASTE"},
        "e": {"alignment": "HASTE", "stop": 12},
    }
    plan = plan_in(tmp_path, tiny, runs=runs)
    aligned, plain = memory.needs(plan)
    assert (aligned.who, plain.who) == ("SiT-d2w16p2 + features + attention", "SiT-d2w16p2")
    (half,) = memory.needs(plan_in(tmp_path, tiny, runs={"a": {}}, training={**tiny["training"], "precision": "bf16"}))
    assert half.recipe != plain.recipe
    weighed = copy.deepcopy(tiny["alignments"])
    weighed["HASTE"]["features"]["weight"] = 0.1
    other = memory.needs(plan_in(tmp_path, tiny, runs={"d": {"alignment": "HASTE"}}, alignments=weighed))
    assert other[0].recipe == aligned.recipe
    assert memory.needs(plan_in(tmp_path, tiny, runtime={"device": "cpu"})) == []


def test_a_damaged_measurement_is_refused_by_name(tmp_path, tiny):
    plan = plan_in(tmp_path, tiny, runs={"a": {}})
    (one,) = memory.needs(plan)
    path = memory.file_of(plan, one.recipe)
    said = {"schema": 1, "kind": "memory", "key": artefact.fingerprint(one.recipe), "update_mb": 1.0}
    artefact.write_json(path, {**said, "batch_mb": 0.1, "ahead": 3, "lines": [[False, False, 1.0, 2.0]]})
    assert memory.needs(plan)[0].memory.lines == {(False, False): (1.0, 2.0)}
    artefact.write_json(path, said)
    with pytest.raises(ValueError, match=path):
        memory.needs(plan)
