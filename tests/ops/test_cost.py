"""What the plan says a run costs is what the networks compute, and what nobody can tell it calls unknown."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import AutoencoderKL
from timm.models.vision_transformer import VisionTransformer
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

from haste import config
from haste.metrics.detectors import SmallCNN
from haste.ops import cost
from haste.ops.pace import EFFICIENCY, IMAGE, STEP, Pace
from haste.plan import memory
from haste.plan.plan import Plan

TINY = yaml.safe_load(Path(__file__).parents[1].joinpath("tiny.yaml").read_text())
PACE = Pace(1e9, threads=1, ranks=1)


def plan_of(**changes):
    return Plan(config.resolve({**copy.deepcopy(TINY), **changes}))


def counted(network, *given):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(*given)
    return counter.get_total_flops()


def test_the_operations_of_small_networks_and_of_the_public_autoencoder_are_those_of_the_networks():
    plan = plan_of()
    (detector,) = plan.detectors.values()
    spec, side = plan.config.detector["cnn"].trained, plan.config.images.resolution
    seen = counted(SmallCNN(side, spec.width, 10), torch.zeros(1, side, side, 3, dtype=torch.uint8))
    assert cost.detector_flops(plan, detector) == pytest.approx(seen, rel=1e-6)
    with torch.device("meta"):
        kl_f8 = AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=[128, 256, 512, 512], layers_per_block=2, latent_channels=4,
        )  # fmt: skip
        ways = counted(kl_f8.encode, torch.zeros(1, 3, 256, 256)), counted(kl_f8.decode, torch.zeros(1, 4, 32, 32))
    found = [cost._autoencoder_flops("stabilityai/sd-vae-ft-ema", way) * 256**2 for way in (0, 1)]
    assert found == pytest.approx(ways, rel=0.01)
    assert cost._autoencoder_flops(plan.decoder, 1) is None


def test_training_a_text_encoder_costs_three_passes_through_both_towers():
    small = {"steps": 5, "batch": 16, "depth": 3, "heads": 2, "patch": 2}
    plan = plan_of(
        images={**TINY["images"], "source": "moved-digits"},
        condition={"name": "captions", "encoder": {"trained": small}, "tokens": 12, "width": 32},
        models={"dot": {"architecture": "mmdit", "depth": 2, "width": 16, "heads": 2}},
        alignments={},
        sampling={"quick": {"steps": 2, "count": 8}},
        runs={"vanilla": {}},
    )
    seeing = VisionTransformer(8, patch_size=2, embed_dim=32, depth=3, num_heads=2, num_classes=32)
    sizes = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2}
    reading = CLIPTextModel(CLIPTextConfig(max_position_embeddings=12, **sizes))
    passes = counted(seeing, torch.zeros(1, 3, 8, 8)) + counted(reading, torch.zeros(1, 12, dtype=torch.long))
    assert cost._network_flops(plan, plan.text_encoder) == pytest.approx(3 * 5 * 16 * passes, rel=0.1)
    said = {stage.name: stage.time for stage in cost.stages(plan)[0]}
    assert re.fullmatch(r"\d+ s", said["text_encoder"])


def test_the_plan_says_unknown_where_nobody_can_tell_and_a_time_where_operations_are_known():
    plan = plan_of(sampling={"quick": {"sampler": "dopri5", "count": 20}})
    said = {stage.name: stage.time for stage in cost.stages(plan)[0]}
    unknown = {"images", "images_join", "autoencoder", "latents", "latents_join", "sample", "score", "floor", "grid"}
    unknown |= {"report", "reconstruct"}
    assert {name for name, words in said.items() if words.endswith(" + unknown")} == unknown  # each is started
    timed = ("reference", "teacher", "detector", "sample", "train")
    assert all(re.match(r"\d+ (s|min)", said[name]) for name in timed)
    public = {"pretrained": {"encode": "stabilityai/sd-vae-ft-mse", "factor": 8}}
    images = {"source": "digits", "resolution": 64, "classes": 10, "holdout": 97}
    known = {stage.name: stage for stage in cost.stages(plan_of(autoencoder=public, images=images))[0]}
    assert known["latents"].seconds > 0 and not known["latents"].unknown
    assert known["sample"].seconds > 0 and not known["sample"].unknown


def test_every_job_that_is_left_is_started_and_features_are_made_by_the_jobs_that_draw(tmp_path):
    settings = {"results": str(tmp_path), "runs": {"vanilla": {}}}
    plan = plan_of(**settings)
    before = {stage.name: stage for stage in cost.stages(plan)[0]}
    assert before["score"].seconds == cost.START * 2 and "features" not in before
    for row in plan.rows:
        Path(row.evaluation.score).parent.mkdir(parents=True, exist_ok=True)
        Path(row.evaluation.score).touch()
    assert {stage.name: stage for stage in cost.stages(plan_of(**settings))[0]}["score"].seconds == 0


def test_training_costs_three_forward_passes_and_one_of_each_teacher_that_is_asked():
    plan = plan_of(runs={"HASTE": {"alignment": "HASTE", "stop": 8}})
    aligned, plain = (plan.segment(plan.state("HASTE", step)) for step in (8, 16))
    forward = cost.facts_in(plan.trajectories[plain.state.trajectory].recipe).flops
    (vit,) = aligned.teachers
    spec = plan.config.teachers[vit].trained
    images = torch.zeros(1, 3, 8, 8)
    network = VisionTransformer(8, patch_size=4, embed_dim=spec.width, depth=2, num_heads=2, num_classes=0)
    with_teacher, without = (cost.training_seconds(plan, segment, PACE)[0] for segment in (aligned, plain))
    operations = 8 * TINY["training"]["batch"] / (EFFICIENCY * 1e9)  # seconds of one for each image of 8 steps
    around, layers = (8 * seconds for seconds in (STEP + IMAGE * TINY["training"]["batch"], IMAGE * 8 * 2))
    assert without == pytest.approx(around + 3 * forward * operations)
    head = 6 * memory.head_parameters(plan, aligned) * 4  # tokens; forward and backward
    # the class token, and the first layer, are not in the formula: a quarter for a network this small
    extra = (with_teacher - without - layers) / operations - head
    assert extra == pytest.approx(counted(network, images), rel=0.3)
    name = "vit_base_patch16_224.mae"  # known to timm alone
    plan = plan_of(teachers={"vit": {"pretrained": {"name": name}}}, runs={"HASTE": {"alignment": "REPA"}})
    said = {stage.name: stage.time for stage in cost.stages(plan)[0]}
    assert said["train"].endswith(" + unknown") and not said.get("train_plain", "")


def test_a_measured_rate_is_that_of_most_lines_and_not_of_one_that_was_slow(tmp_path):
    plan = plan_of(results=str(tmp_path), runs={"vanilla": {}})
    segment = plan.segment(plan.state("vanilla", 16))
    log = tmp_path / "states" / segment.state.trajectory / "log.jsonl"
    log.parent.mkdir(parents=True)
    rates = [*[1000.0] * 20, *[40.0] * 8, 2.0]  # images a second; the newest lines count, and the last is no rate
    lines = [{"step": 1 + i, "denoising": 1.0, "images_per_s": rate} for i, rate in enumerate(rates)]
    log.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    images = (segment.state.step - segment.start) * plan.config.training.batch
    assert cost.training_seconds(plan, segment, PACE) == (images / 40.0, True)


def test_angles_between_gradients_cost_passes_of_their_images_at_every_reading_and_are_measured_once_for_both_losses():
    stop = {"trigger": "gradient-angle", "after": 4, "every": 3, "images": 30, "times": [0.1, 0.5]}
    plan = plan_of(runs={"HASTE": {"alignment": "HASTE", "stop": stop}, "plain": {"alignment": "HASTE"}})
    first, second = (plan.segment(plan.state("HASTE", step)) for step in (8, 16))  # readings after 7, and 10, 13, 16
    (vit,) = first.teachers
    recipe = plan.trajectories[first.state.trajectory].recipe
    image = 2 * cost.training_flops(recipe) + cost._teacher_flops(plan, vit)
    assert [cost.angle_flops(plan, segment) for segment in (first, second)] == [30 * image, 90 * image]
    plain = plan.segment(plan.state("plain", 16))
    assert cost.angle_flops(plan, plain) == 0
    with_angles, without = (cost.training_seconds(plan, segment, PACE)[0] for segment in (second, plain))
    assert with_angles - without == pytest.approx(90 * image / EFFICIENCY / 1e9)
    own = plan_of(runs={"HASTE": {"alignment": "HASTE", "stop": {**stop, "of": "own"}}})
    assert cost.angle_flops(own, own.segment(own.state("HASTE", 16))) == 180 * image


def test_a_measure_costs_its_passes_and_is_counted_until_its_file_is_there(tmp_path):
    spec = {"measure": "gradient-cosine", "images": 50, "t": [0.1, 0.5], "shards": 2}
    runs = {"HASTE": {"alignment": "HASTE", "milestones": [8], "measures": ["cos"]}}
    settings = {"measures": {"cos": spec}, "runs": runs, "results": str(tmp_path)}
    plan = plan_of(**settings)
    forward = config.facts_in(plan.trajectories[plan.state("HASTE", 8).trajectory].recipe).flops
    teacher = cost.flops_per_image(plan.teacher_size("vit"))
    (stage,) = cost._measure_stages(plan, PACE)
    # at each t a forward pass, and a backward pass of twice as much for each of three losses; the teacher looks once
    work = 50 * (2 * 7 * forward + teacher)
    assert stage.seconds == pytest.approx(work / (EFFICIENCY * 1e9)) and not stage.unknown
    assert (stage.jobs, stage.left) == (1, 1)
    (file,) = map(Path, plan.measure_files)
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    assert cost._measure_stages(plan_of(**settings), PACE)[0].left == 0
    assert "measure" not in {stage.name for stage in cost.stages(plan_of())[0]}


def test_hidden_states_cost_a_pass_and_their_disk_once_for_all_measures_that_read_them(tmp_path):
    spec = {"measure": "cknna", "images": 50, "t": [0.1, 0.5], "neighbours": 3}
    runs = {"HASTE": {"alignment": "HASTE", "milestones": [8], "measures": ["hsic", "centred", "probe"]}}
    measures = {"hsic": spec, "centred": {**spec, "formula": "centred"}, "probe": {"measure": "probe", "layers": [2]}}
    plan = plan_of(measures=measures, runs=runs, results=str(tmp_path))
    forward = config.facts_in(plan.trajectories[plan.state("HASTE", 8).trajectory].recipe).flops
    (stage,) = cost._measure_stages(plan, PACE)
    # two layers at two times of 50 images, and one at one of all 1,797, of width 16; the teacher sees the 50 images
    work = (50 * 2 + 1797) * forward + 50 * cost.flops_per_image(plan.teacher_size("vit"))
    assert stage.seconds == pytest.approx(work / (EFFICIENCY * 1e9)) and not stage.unknown
    assert stage.megabytes == pytest.approx((50 * 4 + 1797) * 16 * 4 / 1e6)
    assert (stage.jobs, stage.left) == (3, 3)


def test_forks_are_priced_beside_their_trunk_and_what_was_not_kept_is_named(tmp_path):
    runs = {"HASTE": {"alignment": "HASTE", "milestones": [16]}}
    assert cost.price_of_forks(plan_of(runs=runs), PACE) == []
    forked = {"runs": runs, "forks": {"F": {"run": "HASTE", "at": [4, 12], "for": 6}}, "results": str(tmp_path)}
    plan = plan_of(**forked)
    (said,) = cost.price_of_forks(plan, PACE)
    # the stopped branches, and the aligned one of step 12 beyond the trunk's end
    assert re.fullmatch(r"Forks add 14 more steps of training \([\d smin]+\), 4 more sets of samples, 4 more .*", said)

    def there(*steps):
        for step in steps:
            path = Path(plan.path(plan.state("HASTE", step)))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return cost.price_of_forks(plan_of(**forked), PACE)

    finished = there(10, 16)  # without the states at the forks
    assert finished[0].startswith("Forks add 20 more steps")  # 4 and 2 of the trunk once more, 14 of branches
    assert finished[1:] == [
        "F: HASTE is finished beyond step 4, of which no state was kept: 4 steps are trained again from step 0. "
        "runtime.keep_every keeps more.",
        "F: HASTE is finished beyond step 12, of which no state was kept: 2 steps are trained again from step 10. "
        "runtime.keep_every keeps more.",
    ]
    assert there(4, 12) == [finished[0].replace("20", "14")]
