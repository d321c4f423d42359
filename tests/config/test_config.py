"""The configuration refuses what cannot run, with the path, what was found and what was expected."""

import json
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from haste import config

TINY = yaml.safe_load(Path(__file__).parents[1].joinpath("tiny.yaml").read_text())


def changed(raw, path, value):
    """The configuration with one entry set."""
    *folders, last = path.split(".")
    part = raw
    for name in folders:
        part = part.setdefault(name, {})
    part[last] = value
    return raw


def idle(student, teacher, **more):
    return {"attention": {"teacher": "vit", "student_layers": student, "teacher_layers": teacher, **more}}


def xent(**more):
    return {"features": {"teacher": "vit", "depth": 1, "similarity": "nt-xent", **more}}


def variant(**keys):
    return {"features": {"teacher": "vit", "depth": 1, **keys}}


def named(teacher):
    return {"pretrained": {"name": teacher}}


REFUSALS = [
    ("imagess", {}, ["imagess: unknown key", "did you mean 'images'"]),
    ("images.resolutoin", 8, ["images.resolutoin: unknown key", "'resolution'"]),
    ("autoencoder.trained.stepz", 8, ["autoencoder.trained.stepz: unknown key", "'steps'"]),
    ("teachers.vit.trained.widht", 8, ["teachers.vit.trained.widht: unknown key", "'width'"]),
    ("alignments.REPA.features.deth", 8, ["alignments.REPA.features.deth: unknown key", "'depth'"]),
    ("runs.vanilla", {"milestone": [3]}, ["runs.vanilla.milestone: unknown key", "'milestones'"]),
    ("runs.HASTE.stop", {"feature": 3}, ["runs.HASTE.stop.feature: unknown key", "'features'"]),
    ("runs.HASTE.stop", {"features": {"trigger": "platau"}}, ["runs.HASTE.stop.features: nothing", "'plateau'"]),
    ("runs.HASTE.stop", {"trigger": "plateau", "marign": 1}, ["runs.HASTE.stop: unknown key", "'margin'"]),
    ("runs.HASTE.stop", {"trigger": "plateau", "evry": 1}, ["runs.HASTE.stop: unknown key", "'every'"]),
    ("runs.HASTE.stop", {"trigger": "plateau", "every": 0}, ["runs.HASTE.stop.every", "found 0"]),
    (
        "runs.HASTE",
        {"alignment": "HASTE", "milestones": [400_000], "stop": {"trigger": "plateau", "after": 9, "every": 7}},
        ["runs.HASTE.stop.features.every: 7 makes 57,141 readings up to step 400000, expected at most 50,000"],
    ),
    ("runs.HASTE.stop", {"trigger": "plateau", "fast": 1}, ["runs.HASTE.stop.fast", "less than 1", "found 1"]),
    ("runs.HASTE.stop", {"trigger": "plateau", "fast": 0.99999}, ["stop: fast 0.99999 is not below slow"]),
    ("runs.HASTE.stop", {"attention": {"every": 3}}, ["runs.HASTE.stop.attention.trigger: missing"]),
    ("runs.HASTE.stop", {"attention": {"trigger": 3}}, ["runs.HASTE.stop.attention.trigger", "found 3"]),
    ("runs.HASTE.stop", {"features": "soon"}, ["runs.HASTE.stop.features", "integer", "found 'soon'"]),
    ("runs.vanilla.stop", {"trigger": "plateau"}, ["runs.vanilla.stop: trigger plateau", "aligns nothing"]),
    (
        "runs.REPA.stop",
        {"attention": {"trigger": "plateau"}},
        ["runs.REPA.stop.attention: trigger plateau", "features"],
    ),
    (
        "runs.HASTE",
        {"alignment": "HASTE", "ramp": 3, "stop": {"trigger": "plateau"}},
        ["HASTE.ramp.features: 3", "by plateau"],
    ),
    ("runs.HASTE.stop", {"trigger": "plateau", "release": 0}, ["runs.HASTE.stop.release", "greater than 0", "found 0"]),
    ("runs.HASTE.stop", {"trigger": "plateau", "release": 2}, ["runs.HASTE.stop.release", "less than or equal to 1"]),
    ("runs.HASTE.training", {"bach": 3}, ["runs.HASTE.training.bach: unknown key", "'batch'"]),
    ("defaults.modle", "dot", ["defaults.modle: unknown key", "'model'"]),
    ("sampling.quick.sampler", "eulr", ["sampling.quick.sampler", "'eulr'", "'euler'"]),
    ("runs.HASTE.alignment", "HASTEE", ["runs.HASTE.alignment", "'HASTEE'", "did you mean 'HASTE'"]),
    ("runs.HASTE.model", "SiT-B/3", ["runs.HASTE.model", "'SiT-B/3'", "SiT-B/"]),
    ("runs.HASTE.sampling", ["quik"], ["runs.HASTE.sampling", "'quik'", "'quick'"]),
    ("runs.vanilla.stop", 5, ["runs.vanilla.stop: 5", "aligns nothing"]),
    ("runs.vanilla.milestones", [9, 4], ["runs.vanilla", "[9, 4]", "increasing"]),
    ("runs.vanilla.milestones", [4, 4], ["runs.vanilla", "[4, 4]", "increasing"]),
    ("runs.vanilla.milestones", [], ["runs.vanilla.milestones"]),
    ("runs.vanilla.seed", -1, ["runs.vanilla.seed", "-1"]),
    ("runs", {}, ["runs"]),
    ("alignments.REPA.features.depth", 3, ["alignments.REPA.features.depth: 3", "dot has blocks 1 to 2"]),
    ("alignments.HASTE.attention.student_layers", [2], ["student_layers: [2]", "dot has layers 0 to 1"]),
    ("alignments.HASTE.attention.teacher_layers", [7], ["teacher_layers: [7]", "vit has layers 0 to 1"]),
    ("alignments.HASTE.attention.teacher_layers", [0], ["[0]", "[0, 1]", "pair up"]),
    ("alignments.HASTE.attention.heads", 3, ["alignments.HASTE.attention.heads: 3", "has 2"]),
    ("alignments.REPA.features.teacher", "vitt", ["'vitt'", "did you mean 'vit'"]),
    ("alignments.REPA.features.depth", None, ["dot has no published mapping", "1 to 2"]),
    ("images.resolution", 9, ["images.resolution: 9", "factor 2"]),
    ("images.resolution", "big", ["images.resolution", "'big'"]),
    ("models.dot.patch_size", 3, ["defaults.model", "patches of 3"]),
    ("models.dot.heads", 3, ["models.dot", "width 16", "heads 3"]),
    ("autoencoder.pretrained", {"encode": "x"}, ["autoencoder", "exactly one of trained and pretrained"]),
    ("training.ema", 1.0, ["training.ema", "less than 1"]),
    ("training.batch", 0, ["training.batch", "0"]),
    ("training.batch", True, ["training.batch", "True"]),
    ("name", "../elsewhere", ["name", "../elsewhere"]),
    # what the data and the small networks need
    ("images", {"source": "digits", "resolution": 8, "classes": 10}, ["images.holdout: missing", "no default"]),
    ("images.holdout", 0, ["images.holdout: 0", "autoencoder, teachers.vit, detector.cnn are trained here"]),
    ("images.holdout", -1, ["images.holdout", "greater than or equal to 0", "found -1"]),
    ("images.resolution", 4, ["images.resolution: 4", "detector cnn", "8, 12, 16"]),
    ("images.resolution", 10, ["images.resolution: 10", "detector cnn", "8, 12, 16"]),
    ("autoencoder.trained.width", 12, ["autoencoder.trained.width", "multiple of 8", "found 12"]),
    ("detector.cnn.pretrained", {"name": "inception"}, ["detector.cnn: give exactly one of trained and pretrained"]),
    ("detector", {}, ["detector: Dictionary should have at least 1 item"]),
    ("detector.i", {"pretrained": {"name": "incepton"}}, ["detector.i.pretrained.name", "did you mean 'inception'"]),
    ("detector.i", {"pretrained": {"name": "inception"}}, ["resolution: 8", "detector i (inception) reads", "32 px"]),
    ("detector.cnn.reference", "a.npz", ["detector.cnn: reference: such files hold statistics of inception"]),
    ("detector.d", TINY["detector"]["cnn"], ["detector.d: the same as cnn"]),
    ("detector.cnn.trained.width", 6, ["detector.cnn.trained.width", "multiple of 4", "found 6"]),
    ("teachers.vit.trained.heads", 3, ["teachers.vit.trained: width 16", "heads 3"]),
    ("teachers.vit.trained.patch", 3, ["teachers.vit.trained.patch: 3", "images.resolution 8"]),
    # sampling
    ("sampling.quick.count", 3, ["sampling.quick.count", "greater than or equal to 4", "found 3"]),
    ("sampling.quick", {"sampler": "euler-maruyama", "steps": 1}, ["sampling.quick: steps 1", "at least 2"]),
    ("runs.HASTE.sampling", ["quick", "quick"], ["runs.HASTE.sampling", "'quick' more than once"]),
    ("runs.HASTE.sampling", ["sde-25"], ["runs.HASTE.sampling", "'sde-25'", "did you mean 'sde-250'"]),
    ("sampling.mine", {"preset": "ode-5"}, ["sampling.mine.preset", "'ode-50'", "found 'ode-5'"]),
    ("sampling.ode-50", {"steps": 51}, ["sampling.ode-50.steps: 51", "preset ode-50 has 50", "another name"]),
    ("sampling.quick", {"sampler": "dopri5", "steps": 9}, ["sampling.quick: dopri5 chooses its own steps", "steps 9"]),
    ("sampling.quick", {"sampler": "dopri5", "atol": None}, ["sampling.quick: dopri5", "'atol': None"]),
    ("sampling.quick", {"sampler": "heun", "rtol": 0.1}, ["sampling.quick: heun needs steps", "'rtol': 0.1"]),
    ("sampling.quick", {"sampler": "heun", "steps": None}, ["sampling.quick: heun needs steps", "found None"]),
    ("sampling.quick", {"guided_channels": 4}, ["sampling.quick.guided_channels", "'all' or 3", "found 4"]),
    ("sampling.quick.labels", "all", ["sampling.quick.labels: expected random, balanced, or a list of", "'all'"]),
    ("sampling.quick.labels", [], ["sampling.quick.labels: expected random, balanced, or a list of", "found []"]),
    ("sampling.quick.labels", [1, -1], ["sampling.quick.labels", "counted from 0", "found [1, -1]"]),
    ("sampling.quick.labels", [1, True], ["sampling.quick.labels", "found [1, True]"]),
    ("sampling.quick.labels", [3, 1, 3], ["sampling.quick.labels", "has 3 more than once"]),
    ("sampling.quick.labels", [3, 10], ["sampling.quick.labels: [10], but images.classes is 10; expected 0 to 9"]),
    ("sampling.quick", {"count": 4, "labels": [0, 1, 2, 3, 4]}, ["sampling.quick: count 4", "5 labels", "of each"]),
    # numbers
    ("runs.vanilla.seeds", [0, 1, 0], ["runs.vanilla.seeds", "has 0 more than once"]),
    ("runs.vanilla.seeds", [], ["runs.vanilla.seeds", "at least 1"]),
    ("runs.vanilla.seeds", [1, -1], ["runs.vanilla.seeds.1", "-1"]),
    ("runs.vanilla", {"seed": 3, "seeds": [0, 1]}, ["runs.vanilla: found seed 3 and seeds [0, 1]", "one of the two"]),
    ("runs.vanilla.seed", 2**63, ["runs.vanilla.seed", "less than 9223372036854775808"]),
    ("sampling.quick.seed", 2**63, ["sampling.quick.seed", "less than 9223372036854775808"]),
    ("autoencoder.trained.seed", 2**63, ["autoencoder.trained.seed", "less than 9223372036854775808"]),
    ("teachers.vit.trained.seed", 2**63, ["teachers.vit.trained.seed", "less than 9223372036854775808"]),
    ("detector.cnn.trained.seed", 2**63, ["detector.cnn.trained.seed", "less than 9223372036854775808"]),
    ("training.clip", float("inf"), ["training.clip", "finite", "found inf"]),
    ("training.lr", float("nan"), ["training.lr", "finite", "found nan"]),
    ("training.lr", "1e999", ["training.lr", "finite"]),
    ("runs.HASTE.training", {"lr": float("nan")}, ["runs.HASTE.training.lr", "finite", "found nan"]),
    ("alignments.REPA.features.weight", float("inf"), ["alignments.REPA.features.weight", "finite"]),
    # alignments, of which no run uses `idle`
    ("alignments.idle", {"features": {"teacher": "vti"}}, ["alignments.idle.features.teacher", "'vti'", "'vit'"]),
    ("alignments.idle", {"attention": {"teacher": "vti"}}, ["alignments.idle.attention.teacher", "'vti'", "'vit'"]),
    ("alignments.idle", idle([0], [2]), ["alignments.idle.attention.teacher_layers: [2]", "vit has layers 0 to 1"]),
    ("alignments.idle", idle([0], [1], heads=3), ["alignments.idle.attention.heads: 3", "teacher vit has 2"]),
    ("alignments.idle", idle([0], [0, 1]), ["alignments.idle.attention: student_layers [0]", "[0, 1]", "pair up"]),
    ("alignments.idle", idle([0], None), ["alignments.idle.attention", "both", "'teacher_layers': None"]),
    ("alignments.idle", idle([], []), ["alignments.idle.attention.student_layers", "at least one"]),
    ("alignments.HASTE.attention", {"teacher": "vit"}, ["alignments.HASTE.attention: dot has no published mapping"]),
    ("runs.REPA.stop", {"attention": 5}, ["runs.REPA.stop.attention: 5", "'REPA' has no attention", "only features"]),
    ("alignments.REPA.features.temperature", 0.2, ["alignments.REPA.features: similarity cosine takes no temperature"]),
    ("alignments.REPA.features.negatives", "batch", ["similarity cosine takes no negatives"]),
    ("alignments.REPA.features.similarity", "nt-xnt", ["alignments.REPA.features.similarity", "'nt-xent'", "'nt-xnt'"]),
    ("alignments.idle", xent(temperature=None), ["alignments.idle.features: similarity nt-xent needs a temperature"]),
    ("alignments.idle", xent(temperature=0), ["alignments.idle.features.temperature", "greater than 0"]),
    ("alignments.idle", xent(negative_count=5), ["alignments.idle.features: negative_count", "found 5", "image"]),
    ("alignments.idle", xent(negatives="batch", negative_count=None), ["negative_count", "found None"]),
    ("alignments.REPA.features.t_min", 1.5, ["alignments.REPA.features.t_min", "less than or equal to 1"]),
    ("alignments.idle", variant(t_min=0.5, t_max=0.4), ["alignments.idle.features: t_max 0.4 is below t_min 0.5"]),
    ("alignments.idle", idle([0], [1], t_min=0.5, t_max=0), ["alignments.idle.attention: t_max 0.0 is below t_min"]),
    ("alignments.idle", variant(layer=2), ["alignments.idle.features.layer: [2]", "vit has layers 0 to 1"]),
    ("alignments.idle", variant(layer=-1), ["alignments.idle.features.layer", "found -1"]),
    ("alignments.idle", variant(head="convolution"), ["alignments.idle.features.head", "'conv'", "'convolution'"]),
    ("alignments.idle", variant(head="conv", kernel=2), ["alignments.idle.features: kernel 2 is even", "1, 3, 5"]),
    ("alignments.idle", variant(head="conv", kernel=0), ["alignments.idle.features.kernel", "found 0"]),
    ("alignments.idle", variant(kernel=3), ["alignments.idle.features: kernel goes with head: conv", "head mlp"]),
    (
        "alignments.idle",
        variant(head="linear", hidden=8),
        ["features: hidden goes with head: mlp", "8 and head linear"],
    ),
    ("alignments.idle", variant(hidden=None), ["features: hidden goes with head: mlp and only with it, found None"]),
    ("alignments.idle", variant(normalise="batch"), ["alignments.idle.features.normalise", "'spatial'", "'batch'"]),
    ("alignments.idle", variant(normalise_factor=0.5), ["normalise_factor goes with normalise: spatial"]),
    ("alignments.idle", variant(normalise="spatial", normalise_factor=2), ["features.normalise_factor", "equal to 1"]),
    ("teachers.vit.filter", {}, ["teachers.vit.filter.low_pass: missing"]),
    ("teachers.vit.filter", {"low_pass": 0}, ["teachers.vit.filter.low_pass", "greater than 0"]),
    ("teachers.vit.filter", {"low_pass": 1.1}, ["teachers.vit.filter.low_pass", "less than or equal to 1"]),
    (
        "teachers.vit.filter",
        {"low_pass": 0.24},
        ["low_pass: 0.24 is below the first wave of its images of 8 px and leaves their mean alone; expected 0.25 or"],
    ),
    ("teachers.vit.filter", {"high_pass": 0.1}, ["teachers.vit.filter.high_pass: unknown key", "'low_pass'"]),
    ("runs.HASTE", {"alignment": "HASTE", "ramp": 3}, ["runs.HASTE.ramp.features: 3", "features never stops"]),
    ("runs.HASTE-12.ramp", 13, ["runs.HASTE-12.ramp.attention: 13", "stops at step 12"]),
    ("runs.HASTE-12.ramp", 1, ["runs.HASTE-12.ramp", "greater than or equal to 2", "found 1"]),
    ("runs.HASTE-12.ramp", {"feature": 3}, ["runs.HASTE-12.ramp.feature: unknown key", "'features'"]),
    ("runs.HASTE-12.ramp", {"features": 3, "shape": "cos"}, ["runs.HASTE-12.ramp.shape", "'cosine'", "'cos'"]),
    ("alignments.REPA.features.warmup", -1, ["alignments.REPA.features.warmup", "found -1"]),
    ("training.timesteps", {"mu": 1.0}, ["training.timesteps: uniform takes no mu", "found mu 1.0"]),
    ("training.timesteps", {"distribution": "lognorm"}, ["training.timesteps.distribution", "'lognormal'"]),
    ("training.timesteps", {"distribution": "lognormal", "s": 0}, ["training.timesteps.s", "greater than 0"]),
    ("runs.HASTE.training", {"timesteps": {"my": 1}}, ["runs.HASTE.training.timesteps.my: unknown key"]),
    # names
    ("models.SiT-B/2", {"depth": 2, "width": 16, "heads": 2, "patch_size": 2}, ["models.SiT-B/2: depth 2", "depth 12"]),
    ("teachers.vit", named("DINOv2-BB"), ["teachers.vit.pretrained.name", "'DINOv2-BB'", "did you mean 'DINOv2-B'"]),
    ("teachers.vit", named("dinov2-l"), ["teachers.vit.pretrained.name", "'dinov2-l'", "did you mean 'DINOv2-L'"]),
    ("teachers.vit", named("resnet50"), ["teachers.vit.pretrained.name", "'resnet50'", "vit_"]),
]


def test_coco_is_cropped_as_its_published_numbers_are_unless_another_crop_is_asked_for():
    coco = {"source": "coco", "path": "coco", "resolution": 8, "holdout": 4, "classes": 0}
    of = [config.Images.model_validate({**coco, **more}) for more in ({}, {"crop": "adm"}, {"source": "folder"})]
    assert [one.crop for one in of] == ["centre-lanczos", "adm", "adm"]
    assert config.Images.model_validate(of[1].model_dump()) == of[1]


@pytest.mark.parametrize(("path", "value", "words"), REFUSALS, ids=[f"{p}={v}"[:80] for p, v, _ in REFUSALS])
def test_a_bad_entry_is_refused_with_its_path_and_what_was_expected(tiny, path, value, words):
    with pytest.raises(ValueError) as refusal:
        config.resolve(changed(tiny, path, value))
    for word in words:
        assert word in str(refusal.value)


A_STOP = "; expected a step such as 300000, a trigger such as {trigger: plateau}, or no such key for never"


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("runs.HASTE.seeds", 3, "list, found 3; expected a list such as [0, 1, 2]"),
        ("runs.HASTE.sampling", "quick", "list, found 'quick'; expected a list such as [quick]"),
        ("training.batch", "1e3", "integer, found '1e3', which YAML reads as text; write 1000"),
        ("training.batch", 1000.0, "integer, found 1000.0; write 1000"),
        ("runs.HASTE.stop", "300K", "integer, found '300K', which YAML reads as text; write 300000"),
        (
            "runs.HASTE.stop",
            {"trigger": "plateau", "after": "1.5e3"},
            "found '1.5e3', which YAML reads as text; write 1500",
        ),
    ],
)
def test_what_cannot_be_meant_otherwise_is_told_as_it_is_to_be_written(tiny, path, value, words):
    with pytest.raises(ValueError) as refusal:
        config.resolve(changed(tiny, path, value))
    assert str(refusal.value).endswith(words) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("defaults", "rows", "said"),
    [
        (
            {"milestones": 400},
            [{}, {}],
            "defaults.milestones: Input should be a valid list, found 400; expected a list",
        ),
        ({"stop": "never"}, [{}, {}], "defaults.stop: Input should be a valid integer, found 'never'; expected a step"),
        (
            {"stop": 0.5},
            [{"stop": 3}, {"stop": 3}],
            "defaults.stop: Input should be a valid integer, found 0.5; expected",
        ),
        ({"seeds": [-1]}, [{}, {}], "defaults.seeds.0: Input should be greater than or equal to 0, found -1"),
        ({"seed": -1, "seeds": [0]}, [{}, {}], "defaults.seed: Input should be greater than or equal to 0, found -1"),
        (
            {},
            [{}, {"seed": -1, "seeds": [0, 1]}],
            "runs.a.b.seed: Input should be greater than or equal to 0, found -1",
        ),
        ({"model": "dott"}, [{}, {}], "defaults.model: nothing is called 'dott'; did you mean 'dot'?"),
        ({"model": "dot"}, [{}, {"model": "dott"}], "runs.a.b.model: nothing is called 'dott'; did you mean 'dot'?"),
        ({"training": {"lrr": 1}}, [{"training": {"lr": 0.1}}, {}], "defaults.training.lrr: unknown key; did you mean"),
        ({}, [{}, {"training": {"lrr": 1}}], "runs.a.b.training.lrr: unknown key; did you mean 'lr'?"),
        ({"ramp": 10}, [{"alignment": "HASTE", "stop": 12}, {"alignment": "HASTE", "stop": 5}], "runs.a.b.ramp"),
    ],
)
def test_a_fault_is_told_once_where_it_is_written_in_the_defaults_or_in_the_row(tiny, defaults, rows, said):
    rows = dict(zip(("a", "a.b"), rows, strict=True))
    with pytest.raises(ValueError) as refusal:
        config.resolve({**tiny, "defaults": {**tiny["defaults"], **defaults}, "runs": rows})
    lines = str(refusal.value).splitlines()
    assert lines and all(line.startswith(said) for line in lines) and len({*lines}) == len(lines)


@pytest.mark.parametrize(
    ("stop", "said"),
    [
        ({"trigger": "plateau", "marign": 1}, ["runs.HASTE.stop: unknown key 'marign'; did you mean 'margin'?"]),
        ("soon", [f"runs.HASTE.stop: Input should be a valid integer, found 'soon'{A_STOP}"]),
        ({"features": "never"}, [f"runs.HASTE.stop.features: Input should be a valid integer, found 'never'{A_STOP}"]),
        (
            {"features": {"trigger": "plateau"}, "trigger": "plateau"},
            ["runs.HASTE.stop: found trigger beside features, expected one trigger for all terms, or a stop for each"],
        ),
        (
            {kind: {"trigger": "plateau", "marign": 1} for kind in ("features", "attention")},
            [
                f"runs.HASTE.stop.{kind}: unknown key 'marign'; did you mean 'margin'?"
                for kind in ("features", "attention")
            ],
        ),
    ],
)
def test_what_is_wrong_with_a_stop_is_told_where_and_as_often_as_it_was_written(tiny, stop, said):
    with pytest.raises(ValueError) as refusal:
        config.resolve({**tiny, "runs": {"HASTE": {"alignment": "HASTE", "stop": stop}}})
    assert [line.split(", unable to parse")[0] for line in str(refusal.value).splitlines()] == said


def test_all_faults_are_told_at_once(tiny):
    tiny["imagess"], tiny["training"]["bach"] = {}, 3
    with pytest.raises(ValueError, match=r"(?s)bach.*imagess"):
        config.resolve(tiny)


def test_a_resolved_configuration_resolves_to_itself(tiny):
    once = config.resolve(tiny)
    assert config.resolve(once.model_dump(mode="json")) == once


def test_a_fault_of_an_alignment_is_told_once_for_all_its_runs(tiny):
    tiny["alignments"]["HASTE"]["attention"]["student_layers"] = [0, 2]  # of two runs
    with pytest.raises(ValueError) as refusal:
        config.resolve(tiny)
    assert len(str(refusal.value).splitlines()) == 1


COSINE = {"measure": "gradient-cosine", "images": 14, "shards": 3}


@pytest.mark.parametrize(
    ("spec", "rows", "words"),
    [
        ({"t": [0.1, 1.5]}, {}, "measures.cos.t.1: Input should be less than or equal to 1, found 1.5"),
        ({"shards": 15}, {}, "measures.cos: shards 15 are more than images 14, expected at most as many"),
        ({"t": [0.1, 0.1]}, {}, "measures.cos: t [0.1, 0.1] has a value more than once"),
        ({"imges": 2}, {}, "measures.cos: unknown key 'imges'; did you mean 'images'?"),
        ({"measure": "gradient"}, {}, "measures.cos: nothing is called 'gradient'; did you mean 'gradient-cosine'?"),
        ({"measure": None}, {}, "measures.cos.measure: Input should be a valid string"),
        ({"alignment": "HSTE"}, {}, "measures.cos.alignment: nothing is called 'HSTE'; did you mean 'HASTE'?"),
        ({}, {"HASTE": ["cso"]}, "runs.HASTE.measures: nothing is called 'cso'; did you mean 'cos'?"),
        ({}, {"HASTE": ["cos", "cos"]}, "runs.HASTE.measures: ['cos', 'cos'] has 'cos' more than once"),
        (
            {"blocks": [1, 3]},
            {"HASTE": ["cos"]},
            "measures.cos.blocks: [3], but the network has blocks 1 to 2",
        ),
        (
            {"blocks": [2]},
            {"REPA": ["cos"]},
            "measures.cos.blocks: 2, but the loss of features reaches no block after 1",
        ),
        (
            {},
            {"vanilla": ["cos"]},
            "runs.vanilla.measures: cos (gradient-cosine) compares with an alignment",
        ),
        (
            {"alignment": "REPA"},
            {"vanilla": ["cos"]},
            "features need a projector, which vanilla never has",
        ),
    ],
)
def test_a_measure_that_could_not_be_taken_is_refused_with_its_path(tiny, spec, rows, words):
    tiny["measures"] = {"cos": {**COSINE, **spec}}
    for run, names in rows.items():
        tiny["runs"][run]["measures"] = names
    with pytest.raises(ValueError, match=re.escape(words)):
        config.resolve(tiny)


def test_what_needs_several_tokens_is_refused_of_a_teacher_with_one(tiny):
    tiny["teachers"]["vit"]["trained"]["patch"] = 8
    tiny["alignments"]["REPA"]["features"] = {"teacher": "vit", "depth": 1, "head": "conv", "normalise": "spatial"}
    with pytest.raises(ValueError) as refusal:
        config.resolve(tiny)
    for key in ("head: conv", "normalise: spatial"):
        assert f"alignments.REPA.features.{key}, but teacher vit has one token an image" in str(refusal.value)


def test_heads_and_normalisations_come_with_their_defaults(tiny):
    def resolved(**more):
        tiny["alignments"]["REPA"] = {"features": {"teacher": "vit", "depth": 1, **more}}
        return config.resolve(tiny).alignments["REPA"].features

    assert (resolved().head, resolved().hidden, resolved().kernel) == ("mlp", 2048, None)
    conv, linear = resolved(head="conv", normalise="spatial"), resolved(head="linear")
    assert (conv.hidden, conv.kernel, conv.normalise_factor) == (None, 3, 1.0)
    assert (linear.hidden, linear.kernel, linear.normalise_factor) == (None, None, None)
    assert config.resolve(config.resolve(tiny).model_dump(mode="json")) == config.resolve(tiny)


@pytest.mark.parametrize("band", [{"t_min": 0.5}, {"t_max": 0.3}, {"t_min": 0.5, "t_max": 0.5}])
def test_a_time_at_which_nothing_is_aligned_is_refused_where_it_is_measured(tiny, band):
    tiny["alignments"]["REPA"]["features"] |= band
    tiny["measures"] = {"cos": {**COSINE, "t": [*{*band.values()}, 0.4]}}
    config.resolve(tiny)  # nobody takes it
    tiny["runs"]["REPA"]["measures"] = ["cos"]
    with pytest.raises(
        ValueError, match=r"measures\.cos\.t: 0\.4 is not from t_min to t_max of features: nothing is aligned"
    ):
        config.resolve(tiny)


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_every_seed_of_63_bits_is_taken(tiny, seed):
    assert config.resolve(changed(tiny, "runs.vanilla.seed", seed)).runs["vanilla"].seed == seed


def test_a_row_has_the_seeds_that_it_or_else_the_defaults_name(tiny):
    rows = {"a": {}, "b": {"seed": 5}, "c": {"seeds": [7, 6]}}
    for defaults, expected in (
        ({}, [[0], [5], [7, 6]]),
        ({"seed": 3}, [[3], [5], [7, 6]]),
        ({"seeds": [1, 2]}, [[1, 2], [5], [7, 6]]),
    ):
        tiny["defaults"], tiny["runs"] = {**TINY["defaults"], **defaults}, rows
        resolved = config.resolve(tiny)
        assert [row.all_seeds for row in resolved.runs.values()] == expected
        assert config.resolve(resolved.model_dump(mode="json")) == resolved


def test_one_number_stops_all_that_a_run_aligns_and_nothing_else(tiny):
    tiny["runs"] = {name: {"alignment": name, "stop": 5} for name in ("REPA", "HASTE")}
    resolved = config.resolve(tiny)
    assert resolved.runs["HASTE"].stop == config.Stops(features=5, attention=5)
    assert resolved.runs["REPA"].stop == config.Stops(features=5)
    assert config.resolve(resolved.model_dump(mode="json")) == resolved


def test_an_alignment_without_terms_has_nothing_to_stop(tiny):
    tiny["alignments"]["none"] = {}
    with pytest.raises(ValueError, match=r"runs\.row\.stop: 5 given, but 'none' aligns nothing"):
        config.resolve(changed(tiny, "runs.row", {"alignment": "none", "stop": 5}))


def test_a_row_changes_single_keys_of_the_default_training_and_stop(tiny):
    tiny["training"] = {"batch": 8, "weight_decay": 0.25}
    tiny["defaults"] |= {"alignment": "HASTE", "training": {"lr": 0.5, "ema": 0.1}, "stop": {"features": 3}}
    tiny["runs"] = {"row": {"training": {"ema": 0.5}, "stop": {"attention": 9}}, "plain": {}, "number": {"stop": 7}}
    resolved = config.resolve(tiny)
    training = resolved.training_of("row")
    assert (training.lr, training.ema, training.weight_decay, training.batch) == (0.5, 0.5, 0.25, 8)
    assert resolved.training_of("plain").ema == 0.1
    assert resolved.runs["row"].stop == config.Stops(features=3, attention=9)
    assert resolved.runs["plain"].stop == config.Stops(features=3)
    assert resolved.runs["number"].stop == config.Stops(features=7, attention=7)


def test_a_published_name_with_its_published_size_is_taken(tiny):
    tiny["models"]["SiT-B/2"] = {"depth": 12, "width": 768, "heads": 12, "patch_size": 2}
    assert config.resolve(tiny).models["SiT-B/2"] == config.MODELS["SiT-B/2"]


@pytest.mark.parametrize(
    "name", [*config.TEACHERS, "vit_base_patch16_224.mae", "deit3_base_patch16_224", "flexivit_small"]
)
def test_known_teachers_and_vision_transformers_of_timm_are_taken(tiny, name):
    tiny["teachers"]["public"] = named(name)
    assert config.resolve(tiny).teachers["public"].pretrained.name == name


def test_numbers_without_a_dot_in_their_exponent_are_numbers(tiny):
    tiny["training"]["lr"] = "1e-4"  # what YAML 1.1 makes of lr: 1e-4
    assert config.resolve(tiny).training.lr == 1e-4


def test_published_mappings_fill_in_what_an_alignment_leaves_out(tiny):
    tiny["images"]["resolution"] = 32
    tiny["teachers"]["dino"] = {"pretrained": {"name": "DINOv2-B"}}
    tiny["alignments"]["published"] = {"features": {"teacher": "dino"}, "attention": {"teacher": "dino"}}
    tiny["alignments"]["repa"] = {"features": {"teacher": "dino"}}
    tiny["runs"] = {"b": {"model": "SiT-B/2", "alignment": "published"}, "r": {"model": "SiT-B/2", "alignment": "repa"}}
    tiny["runs"]["xl"] = {"model": "SiT-XL/2", "alignment": "published"}
    resolved = config.resolve(tiny)
    terms = config.terms_of(resolved, "b")
    assert terms["features"]["depth"] == 5
    assert (terms["attention"]["student_layers"], terms["attention"]["teacher_layers"]) == ([2, 3, 4], [7, 9, 11])
    assert terms["attention"]["heads"] == 12
    assert config.terms_of(resolved, "r")["features"]["depth"] == 4
    terms = config.terms_of(resolved, "xl")
    assert (terms["features"]["depth"], terms["attention"]["student_layers"]) == (8, [4, 5, 6, 7])


def test_a_mapping_that_the_teacher_is_too_shallow_for_is_refused(tiny):
    tiny["images"]["resolution"] = 32
    tiny["alignments"]["published"] = {"attention": {"teacher": "vit"}}
    tiny["runs"] = {"b": {"model": "SiT-B/2", "alignment": "published"}}
    with pytest.raises(ValueError, match=r"teacher_layers: \[7, 9, 11\], but vit has layers 0 to 1"):
        config.resolve(tiny)


@settings(suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no fault of the configuration's
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    [
                        "name",
                        "images",
                        "runs",
                        "defaults",
                        "models",
                        "stop",
                        "training",
                        "milestones",
                        "resolution",
                        "x",
                    ]
                ),
                inner,
                max_size=4,
            )
        ),
        max_leaves=8,
    )
)
def test_any_rubbish_is_refused_with_a_valueerror_and_nothing_else(rubbish):
    for raw in [{**TINY, "runs": rubbish}, {**TINY, "defaults": rubbish}, {**TINY, "images": rubbish}, rubbish]:
        if isinstance(raw, dict):
            try:
                config.resolve(raw)
            except ValueError as refusal:
                assert str(refusal)


def test_an_unreadable_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.yaml: cannot be read"):
        config.load(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match=r"list\.yaml: expected a mapping of keys, found list"):
        config.load(tmp_path / "list.yaml")
    (tmp_path / "torn.yaml").write_text("a: [1,\n")
    with pytest.raises(ValueError, match=r"torn\.yaml: not YAML"):
        config.load(tmp_path / "torn.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"title: \xe9\n")
    with pytest.raises(ValueError, match=r"latin\.yaml: not YAML"):
        config.load(tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: a\ntitle: x\nname: b\n", ["line 3: key 'name' is already on line 1"]),
        ("runs:\n  a: {}\n  b: {}\n  a: {}\n", ["line 4: key 'a' is already on line 2"]),
        ("runs: {a: {seed: 1, seed: 2}}\n", ["line 1: key 'seed' is already on line 1"]),
        ("runs:\n  1: {}\n  '1': {}\n", ["line 3: key '1' is already on line 2"]),
        ("x: [{a: 1,\n a: 2}]\n", ["line 2: key 'a' is already on line 1"]),
        ('{"name": "a",\n "images": {"holdout": 1,\n "holdout": 2}}', ["line 3: key 'holdout' is already on line 2"]),
    ],
)
@pytest.mark.parametrize("ask", [config.read, config.load])
def test_a_key_that_stands_twice_is_refused_with_its_line(tmp_path, ask, text, words):
    (tmp_path / "twice.yaml").write_text(text)
    with pytest.raises(ValueError) as refusal:
        ask(tmp_path / "twice.yaml")
    for word in ["twice.yaml: ", *words]:
        assert word in str(refusal.value)


def test_a_file_is_read_as_yaml_and_json_mean_it(tmp_path):
    file = tmp_path / "any"
    file.write_text("low: &low {deep: {<<: &base {lr: 1, ema: 2}, lr: 3}}\nother: {<<: *base, ema: 4}\n1: [a, a]\n")
    assert config.read(file) == {"low": {"deep": {"lr": 3, "ema": 2}}, "other": {"lr": 1, "ema": 4}, 1: ["a", "a"]}
    raw = {"lr": 1e-5, "title": "\U0001f600 \t é", "runs": {"a": {"seed": 1}, "b": {"seed": 1}}}
    file.write_text(json.dumps(raw))
    assert config.read(file) == raw


def test_the_resolved_json_loads_as_the_yaml_that_it_came_from(tmp_path):
    yaml_file, json_file = Path(__file__).parents[1].joinpath("tiny.yaml"), tmp_path / "config.json"
    loaded = config.load(yaml_file)
    json_file.write_text(json.dumps(loaded.model_dump(mode="json")))
    assert config.load(json_file) == loaded


def test_a_key_that_is_a_date_is_refused(tmp_path):
    (tmp_path / "date.yaml").write_text("runs: {2024-01-01: {}}\n")
    with pytest.raises(ValueError, match=r"date\.yaml: line 1: 2024-01-01 is datetime"):
        config.load(tmp_path / "date.yaml")


def sampling_of(**changes):
    return config.resolve({**TINY, **changes}).sampling


def test_a_run_may_name_a_preset_that_nothing_defines():
    runs = {"a": {"sampling": ["sde-250", "quick"]}, "b": {"sampling": ["heun-125", "ode-50"]}}
    found = sampling_of(runs=runs)
    solvers = {name: (way.sampler, way.steps) for name, way in found.items() if name != "quick"}
    assert solvers == {"sde-250": ("euler-maruyama", 250), "heun-125": ("heun", 125), "ode-50": ("euler", 50)}
    assert found["sde-250"].count == 50_000
    assert set(sampling_of()) == {"quick"}


def test_keys_beside_a_preset_and_under_its_name_win():
    sampling = {"mine": {"preset": "heun-125", "steps": 30, "guidance": 1.5}, "sde-250": {"count": 8, "seed": 3}}
    found = sampling_of(sampling=sampling, runs={"a": {"sampling": ["mine", "sde-250"]}})
    assert (found["mine"].sampler, found["mine"].steps, found["mine"].guidance) == ("heun", 30, 1.5)
    assert (found["sde-250"].sampler, found["sde-250"].steps, found["sde-250"].count) == ("euler-maruyama", 250, 8)


def test_a_preset_and_what_it_stands_for_draw_the_same_samples():
    from haste.plan.plan import Plan

    ways = {"a": {"preset": "ode-50"}, "b": {"sampler": "euler", "steps": 50}, "c": {"preset": "ode-50", "seed": 1}}
    plan = Plan(config.resolve({**TINY, "sampling": ways, "runs": {"x": {"sampling": list(ways), "milestones": [4]}}}))
    a, b, c = (row.evaluation.name for row in plan.rows)
    assert a == b != c


def test_dopri5_has_its_tolerances_unless_told_others_and_resolves_to_itself():
    sampling = {"a": {"sampler": "dopri5"}, "b": {"preset": "ode-50", "sampler": "dopri5", "rtol": 1e-5}}
    resolved = config.resolve({**TINY, "sampling": sampling, "defaults": {**TINY["defaults"], "sampling": ["a", "b"]}})
    found = {name: (way.steps, way.rtol, way.atol) for name, way in resolved.sampling.items()}
    assert found == {"a": (None, 1e-3, 1e-6), "b": (None, 1e-5, 1e-6)}
    assert config.resolve(resolved.model_dump(mode="json")) == resolved


def test_keys_that_came_later_leave_the_names_of_what_exists_as_they_are():
    """What the sampling's recipe was before presets, tolerances and guided channels were known."""
    way = config.Sampling(sampler="heun", steps=9, count=20)
    assert config.decides(config.Sampling, way.model_dump()) == {
        "sampler": "heun",
        "steps": 9,
        "guidance": 1.0,
        "interval": [0.0, 1.0],
        "count": 20,
        "labels": "random",
        "pixels": "truncate",
        "seed": 0,
    }
    three = config.Sampling(guided_channels=3)
    assert config.decides(config.Sampling, three.model_dump())["guided_channels"] == 3


def test_nt_xent_and_timesteps_fill_in_what_is_left_out_and_resolve_to_themselves():
    alignments = {"a": xent(), "b": xent(negatives="batch", temperature=0.2)}
    training = {"timesteps": {"distribution": "lognormal", "mu": 1.0}}
    resolved = config.resolve({**TINY, "alignments": {**TINY["alignments"], **alignments}, "training": training})
    a, b = (resolved.alignments[name].features for name in "ab")
    assert (a.temperature, a.negatives, a.negative_count) == (0.1, "image", None)
    assert (b.temperature, b.negatives, b.negative_count) == (0.2, "batch", 1024)
    assert (resolved.training.timesteps.mu, resolved.training.timesteps.s) == (1.0, 1.0)
    assert config.resolve(resolved.model_dump(mode="json")) == resolved


def test_a_run_that_draws_its_times_otherwise_takes_nothing_of_the_common_distribution():
    training = {**TINY["training"], "timesteps": {"distribution": "lognormal", "mu": 1.0}}
    runs = {"a": {}, "b": {"training": {"timesteps": {"distribution": "lognormal", "s": 0.5}}}}
    resolved = config.resolve({**TINY, "training": training, "runs": runs})
    assert resolved.training_of("a").timesteps.mu == 1.0
    assert (resolved.training_of("b").timesteps.mu, resolved.training_of("b").timesteps.s) == (0.0, 0.5)
