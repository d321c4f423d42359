"""What `haste plan` and `haste memory` print: days and GPU-hours on GPUs by name, memory, and what does not fit."""

import json
import re

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from haste import config
from haste.cli import main as cli
from haste.cluster import check
from haste.files import artefact
from haste.ops import cost, plan
from haste.ops.pace import Pace
from haste.plan import memory
from haste.plan.machines import gpu_of, machine
from haste.plan.plan import Plan

LINES = [[False, False, 10e3, 1e3], [True, False, 12e3, 1e3], [False, True, 11e3, 100.0], [True, True, 13e3, 100.0]]


@pytest.fixture
def world(tmp_path, tiny):
    """A configuration, as a file and as a plan, of two runs whose memory was measured: 10 GB, and 1 GB an image."""

    def make(**changes):
        given = {**tiny, "results": str(tmp_path), "runs": {"a": {}, "b": {"alignment": "HASTE"}}, **changes}
        given["runtime"] = {**tiny["runtime"], **changes.get("runtime", {})}
        (tmp_path / "it.yaml").write_text(yaml.safe_dump(given))
        return Plan(config.resolve(given))

    def measured(made):
        for one in memory.needs(made):
            said = {"schema": 1, "kind": "memory", "key": artefact.fingerprint(one.recipe), "update_mb": 9e3}
            artefact.write_json(
                memory.file_of(made, one.recipe), {**said, "batch_mb": 0.25, "ahead": 3, "lines": LINES}
            )

    make.measured, make.file = measured, str(tmp_path / "it.yaml")
    return make


def run(capsys, *arguments):
    status = cli.main(list(arguments))
    said = capsys.readouterr()
    return status, " ".join(said.out.split()), " ".join(said.err.split())


def test_times_on_gpus_follow_from_their_peak_and_its_share(world):
    runs = {"a": {"alignment": "HASTE"}, "b": {"alignment": "HASTE", "stop": 12}}
    made = world(runs=runs, training={"batch": 8, "precision": "bf16"})
    eight, one = (Pace.of_plan(made, machine(text, 0.4)) for text in ("8xH100", "H100"))
    segment = made.segment(made.state("a", 8))
    for many in (eight, one):
        assert cost.training_seconds(made, segment, many) == (
            8 * 0.008,
            False,
        )  # so small a network only starts kernels
    work = 1e18
    assert one.training(10, 8, 1, work, "bf16") == pytest.approx(work / (0.4 * 989e12))
    assert eight.training(10, 8, 1, work, "fp32") == pytest.approx(work / (8 * 0.4 * 67e12))
    hours = list(zip(*plan.by_run(made, one), strict=True))
    assert hours[0] == ("a", "b", "all, what runs share once")
    assert set(hours[-1]) == {""}  # of less than 0.05 GPU-hours nothing is said


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA A100-SXM4-40GB", "A100-40"),
        ("NVIDIA A100-SXM4-80GB", "A100-80"),
        ("NVIDIA A100 80GB PCIe", "A100-80"),
        ("Tesla V100-SXM2-32GB", "V100"),
        ("NVIDIA GeForce RTX 4090", "RTX4090"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None),  # a part has no rate of the whole
        ("Tesla T4", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("", None),
    ],
)
def test_a_gpu_is_known_by_what_cuda_calls_it(device, name):
    assert gpu_of(device) == name


def test_what_was_trained_on_such_gpus_goes_on_at_the_rate_of_its_log(world, tmp_path):
    made = world()
    segment = made.segment(made.state("a", 8))
    folder = tmp_path / "states" / segment.state.trajectory
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text("".join(f'{{"step": {step}, "images_per_s": 100.0}}\n' for step in (1, 2)))
    header = {
        "schema": 1,
        "kind": "state",
        "provenance": {"hardware": {"gpu": "NVIDIA H100 80GB HBM3"}, "processes": 4},
    }
    save_file({"x": np.zeros(1)}, folder / "step-00000002.safetensors", {"haste": json.dumps(header)})
    images = (segment.state.step - segment.start) * 8
    for name, rate in [("8xH100", 200.0), ("2xH100", 50.0)]:
        said = cost.training_seconds(made, segment, Pace.of_plan(made, machine(name)))
        assert said == (pytest.approx(images / rate), True)
    assert not cost.training_seconds(made, segment, Pace.of_plan(made, machine("8xA100")))[
        1
    ]  # others were not measured


def test_a_plan_for_gpus_says_days_and_gpu_hours_and_what_it_assumes(world, capsys):
    world(training={"batch": 8, "precision": "bf16"})
    status, out, _ = run(capsys, "plan", "-c", world.file, "--as", "8xh100", "--share", "0.4")
    assert status == 0
    assert "time on 8 x H100" in out and "GPU-hours" in out and "each run on 8 x H100" in out
    assert "Times assume that 40 % of the peak of an H100 is reached, 989 TFLOP/s in bf16 and 67 in fp32" in out
    assert not re.search(r"\d:\d\d", out)  # never 157222:22:36
    assert run(capsys, "plan", "-c", world.file, "--as", "8xTPU")[0] == 2


def test_beside_an_assumed_share_the_plan_says_the_time_at_the_published_one(world, capsys):
    world(sampling={"quick": {"sampler": "euler", "steps": 250, "count": 10**11}})
    asked = ("plan", "-c", world.file, "--as", "H100")
    assumed, published = run(capsys, *asked)[1], run(capsys, *asked, "--share", "0.12")[1]
    (time, hours) = re.search(r"│ all │[^│]*│[^│]*│ (.*?)(?: \+ unknown)? │ ([\d,]+)\.\d │", published).groups()
    words = r"At 12 %, the published speed of REPA's training on an H100, all of it takes (.*?) and ([\d,]+) GPU-hours"
    said = re.search(words, assumed)
    assert said[1] == time and 0 <= int(said[2].replace(",", "")) - int(hours.replace(",", "")) <= 1
    assert len(hours) > 2 and "At 12 %" not in published


def test_a_plan_says_what_is_not_measured_and_how_to_measure_it_and_then_what_fits(world, capsys):
    made = world()
    _, out, _ = run(capsys, "plan", "-c", world.file, "--as", "H100")
    assert f"GPU memory is not measured yet: `haste memory -c {world.file}` does it, without a GPU." in out
    _, out, _ = run(capsys, "plan", "-c", world.file)
    assert "GPU memory" not in out and "page-locked" not in out  # where there is none
    world.measured(made)
    _, out, _ = run(capsys, "plan", "-c", world.file, "--as", "H100")
    assert "GPU memory of SiT-d2w16p2: 18 GB a rank with 8 images at once; 69 fit into 80 GB." in out
    assert "rank 0 has a copy of it in its host's memory" in out and "not measured" not in out
    _, out, _ = run(capsys, "plan", "-c", world.file, "--as", "4xH100")
    assert "14 GB a rank with 2 images at once" in out  # gradients are kept: DDP adds to its buckets


def test_what_does_not_fit_is_refused_by_the_plan_with_what_would_after_all_is_said(world, capsys):
    made = world(runtime={"gpu_memory_gb": 16})
    world.measured(made)
    status, out, err = run(capsys, "plan", "-c", world.file)
    assert status == 2 and "all" in out
    first = "SiT-d2w16p2: 8 images at once take 18.0 GB of a GPU, runtime.gpu_memory_gb is 16 GB. These would fit: "
    assert first + "runtime.accumulate: 4 (2 images at once, 14.0 GB); runtime.checkpoint_blocks: true" in err
    assert run(capsys, "plan", "-c", world.file, "--as", "H100")[0] == 0


def test_jobs_of_a_cluster_are_refused_by_the_profiles_memory_and_ranks_and_those_here_by_the_configurations(world):
    made = world(runtime={"gpu_memory_gb": 16})
    world.measured(made)
    state = made.state("a", 8)
    with pytest.raises(ValueError, match=r"8 images at once take 18.0 GB of a GPU, runtime.gpu_memory_gb is 16 GB"):
        check.check_memory(made, [(state, {})])
    node = {"nodes": 2, "tasks_per_node": 2, "gpus_per_node": 2}
    check.check_memory(made, [(state, node)])  # two images each
    with pytest.raises(ValueError, match=r"2 images at once take 14.0 GB of a GPU, gpu_memory_gb in the profile is 13"):
        check.check_memory(made, [(state, {**node, "gpu_memory_gb": 13})])
    check.check_memory(made, [(state, {**node, "gpus_per_node": 0, "gpu_memory_gb": 13})])  # on CPUs


def test_half_precision_on_cpus_is_remarked_and_bf16_on_a_chip_without_it(world, monkeypatch):
    made = world(training={"batch": 8, "precision": "bf16"})
    monkeypatch.setattr(plan, "_computes_half", lambda: False)
    monkeypatch.setattr(plan.driver, "visible", list)
    (said,) = plan.emulated(made, None)
    assert said == "training.precision: bf16 is emulated on the CPUs here, and slower than fp32 there."
    assert plan.emulated(made, machine("H100")) == [] == plan.emulated(world(), None)
    (said,) = plan.emulated(world(), machine("H100"))
    assert (
        "precision: fp32, in which GPUs are many times slower than in bf16 (67 against 989 TFLOP/s on an H100)" in said
    )
    assert "fp16" in plan.emulated(made, machine("V100"))[0]


def test_haste_memory_measures_what_training_takes_once_and_says_it(world, capsys, monkeypatch):
    made = world(runs={"a": {}})
    assert run(capsys, "memory", "-c", world.file)[0] == 0
    (one,) = memory.needs(made)
    assert one.peak < 10 and one.memory.ahead > 0
    monkeypatch.setattr("haste.ops.memory._write", lambda *_: pytest.fail("measured again"))
    status, out, _ = run(capsys, "memory", "-c", world.file)
    assert status == 0 and "kB a rank with 8 images at once" in out
