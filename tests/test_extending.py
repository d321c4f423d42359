"""The page on extending shows a package that works: its files are installed as they stand, and used from end to end."""

import importlib
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import packages
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer

from haste import config, extensions
from haste.cli import main as cli
from haste.diffusion import samplers
from haste.files import artefact, provenance
from haste.files.store import Store
from haste.ops import cost
from haste.ops.pace import Pace
from haste.plan.plan import Plan
from haste.train import loop, stops, warm_start
from haste.train.state import new_learner

SECTION, MODEL = packages.section("From a package of your own"), packages.section("A model")


def block(language, text=SECTION):
    return packages.block(language, text)


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The page's packages where Python finds them."""
    with packages.installed(tmp_path / "site", monkeypatch, SECTION, MODEL) as site:
        yield site


def test_every_group_is_described():
    added = [
        group
        for text in (SECTION, MODEL, packages.section("A process"), packages.section("A condition"))
        for group in tomllib.loads(block("toml", text))["project"]["entry-points"]
    ]
    assert set(added) == {f"haste.{group}" for group in extensions.GROUPS}


def run_haste(world, *command):
    assert cli.main([*map(str, command), "-c", str(world.file)]) == 0, command


def test_what_the_page_adds_is_used_from_training_to_scores(world, installed, tmp_path):
    network = VisionTransformer(8, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=0)
    save_file(network.state_dict(), tmp_path / "small.safetensors")
    changes = yaml.safe_load(block("yaml").replace("small.safetensors", str(tmp_path / "small.safetensors")))
    defaults = changes.pop("defaults")
    defaults["stop"] |= {"every": 4, "level": 9.0}  # at the first reading
    world.configure(**changes, defaults={**world.raw["defaults"], **defaults, "sampling": ["mine"]})
    run_haste(world, "plan")
    run_haste(world, "train", world.plan.state("HASTE", 8))
    run_haste(world, "reference")
    run_haste(world, "sample", world.row().name)
    run_haste(world, "evaluate", world.row().name)
    stopped = stops.read(world.state.parent)
    assert {kind: (one.step, one.trigger) for kind, one in stopped.items()} == {
        "features": (4, "below"),
        "attention": (4, "below"),
    }
    assert all(re.fullmatch(r"\d\.\d{3} is left, the level is 9\.0", one.reason) for one in stopped.values())
    score = artefact.read_json(world.row().score, "score")
    assert score["detector"]["name"] == "colours"
    assert score["nfe"] == 4  # two steps, two evaluations each
    assert score["provenance"]["versions"]["my-haste"] == "0.1"
    means = []
    for folder in (world.row().features.folder, world.reference):
        with Store.open(folder) as store:
            means.append(store.read("pool", range(store.count)).astype(float).mean(axis=0))
    assert score["scores"]["gap"] == pytest.approx(((means[0] - means[1]) ** 2).sum() ** 0.5, rel=1e-9)
    with open(world.plan.path(world.plan.state("HASTE", 8)), "rb") as file:
        assert artefact.file_identity(tmp_path / "small.safetensors").encode() in file.read()


def test_a_measure_from_outside_has_its_file_its_table_and_its_figure(world, installed):
    measures = {"size": {"measure": "norms"}, "largest": {"measure": "norms", "order": float("1e3")}}
    world.configure(measures=measures, runs={"HASTE": {"alignment": "HASTE", "measures": ["size", "largest"]}})
    made = [one.measurement for one in world.plan.measured if one.step == 8]
    for one in made:
        run_haste(world, "measure", one.label, one.name)
    run_haste(world, "report")
    state = load_file(world.state)
    blocks = [[v.double().flatten() for n, v in state.items() if n.startswith(f"model/blocks.{i}.")] for i in (0, 1)]
    norms = [torch.cat(block).norm().item() for block in blocks]
    found = artefact.read_json(made[0].file, "measure")
    assert [row["norm"] for row in found["rows"]] == pytest.approx(norms, rel=1e-12)
    assert found["provenance"]["versions"]["my-haste"] == "0.1"
    assert found["provenance"]["inputs"].keys() == {"latents"}  # it asks for no teacher
    folder = Path(world.plan.report).parent
    table = [line.split(",") for line in (folder / "measure-size.csv").read_text().splitlines()]
    assert table[0] == ["run", "block 1", "block 2"]
    assert table[1][0] == "HASTE" and [float(x) for x in table[1][1:]] == pytest.approx(norms, rel=1e-12)
    page = (folder / "index.html").read_text()
    assert "norm over block: HASTE" in page and "Not measured yet: size of HASTE at step 16; largest" in page


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"measure": "nroms"}, "measures.size: nothing is called 'nroms'; did you mean 'norms'?"),
        ({"measure": "norms", "ordre": 1}, "measures.size: unknown key 'ordre'; did you mean 'order'?"),
        ({"measure": "norms", "order": "two"}, "measures.size.order: Input should be a valid number"),
        ({"measure": "norms", "alignment": "HASTE"}, "'HASTE' given, but norms compares with no alignment"),
        ({"measure": "small"}, "expected a class derived from haste.measure.measure.Measure"),
    ],
)
def test_a_measure_from_outside_has_its_keys_checked_before_anything_runs(installed, tiny, spec, words):
    points = next(installed.glob("my_haste-*")) / "entry_points.txt"
    points.write_text(points.read_text().replace("norms = ", "small = my_haste:small\nnorms = "))
    extensions._points.cache_clear()
    with pytest.raises(ValueError, match=re.escape(words)):
        config.resolve({**tiny, "measures": {"size": spec}})


def test_the_midpoint_rule_of_the_page_is_of_second_order(installed):
    class Decay:
        def __call__(self, x, t):
            return x * t

        def freeze_guidance(self, t):
            return self

    def error(steps):
        found = samplers.SAMPLERS["midpoint"].run(Decay(), torch.ones(1), steps)
        return abs(float(found) - torch.tensor(-0.5, dtype=torch.float64).exp().item())

    assert error(20) / error(40) == pytest.approx(4, rel=0.1)


def test_the_plan_counts_the_evaluations_of_a_sampler_from_outside(installed, tiny):
    tiny["sampling"] |= {"mine": {"sampler": "midpoint", "steps": 2, "count": 20}}
    tiny["defaults"]["sampling"] = ["quick", "mine"]
    plan = Plan(config.resolve(tiny))
    seconds = {e.sampling_name: cost.sampling_seconds(plan, e, Pace(1e9, 1, 1)) for e in plan.evaluations.values()}
    assert seconds["mine"] == pytest.approx(2 * seconds["quick"])


def test_names_are_known_without_importing_what_they_name(installed, tiny):
    tiny["sampling"]["quick"] = {"sampler": "midpoint", "steps": 2}
    assert config.resolve(tiny).sampling["quick"].sampler == "midpoint"
    assert "my_haste" not in sys.modules
    tiny["sampling"]["quick"] = {"sampler": "midpint", "steps": 2}
    with pytest.raises(ValueError, match=r"sampling\.quick\.sampler: Input should be 'euler'"):
        config.resolve(tiny)


def test_what_cannot_be_imported_or_takes_a_name_of_ours_is_refused_by_package(installed):
    points = next(installed.glob("my_haste-*")) / "entry_points.txt"
    points.write_text("[haste.samplers]\nmidpoint = my_haste:NOTHING\n")
    extensions._points.cache_clear()
    with pytest.raises(ValueError, match=r"'midpoint' cannot be loaded from my_haste:NOTHING \(of my-haste\): Attrib"):
        samplers.SAMPLERS["midpoint"]
    (installed / "my_haste.py").write_text("import nothing_of_that_name\n")
    sys.modules.pop("my_haste")
    importlib.invalidate_caches()
    for text in ("import nothing_of_that_name", "nothing", "def broken(:", "raise RuntimeError('no')"):
        (installed / "my_haste.py").write_text(f"{text}\n")
        with pytest.raises(
            ValueError, match=r"'midpoint' cannot be loaded from my_haste:NOTHING \(of my-haste\): \w+Error"
        ):
            samplers.SAMPLERS["midpoint"]
    points.write_text("[haste.samplers]\nheun = my_haste:MIDPOINT\n")
    extensions._points.cache_clear()
    with pytest.raises(ValueError, match=r"my_haste:MIDPOINT \(of my-haste\) is called 'heun', which is taken"):
        samplers.SAMPLERS["heun"]


FIRST = [
    *("haste.diffusion.samplers", "haste.metrics.detectors", "haste.metrics.scores", "haste.teachers.encoder"),
    *("haste.score.sides", "haste.sampling.painter", "haste.cli", "my_haste", "my_network"),
]
# Each in a Python of its own that has the large libraries already, which take most of a start and know nothing of ours.
EACH = """
import os, sys
import diffusers, matplotlib, pandas, timm, torch, torchvision
assert not any(name.split(".")[0] in ("haste", "my_haste", "my_network") for name in sys.modules)
for first in sys.argv[1:]:
    child = os.fork()
    if not child:
        __import__(first)
        import haste.diffusion.samplers as s, haste.metrics.scores as m, haste.metrics.detectors as d
        import haste.teachers.encoder as t
        found = s.SAMPLERS["midpoint"].evaluations(2), m.METRICS["gap"].needs, d.PUBLISHED["colours"], t.ADDED["small"]
        print(first, *found, flush=True)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(f"with {first} first")
"""


def test_whatever_is_imported_first_the_packages_are_there(installed):
    path = f"{installed}{os.pathsep}{packages.PAGE.parent.parent}"
    command = [sys.executable, "-c", EACH, *FIRST]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert [line.split(" <function colours")[0] for line in said] == [f"{first} 4 ('pool',)" for first in FIRST]


def test_a_trigger_from_outside_has_its_keys_checked_before_anything_runs(installed, tiny):
    def refused(**stop):
        with pytest.raises(ValueError) as refusal:
            config.resolve({**tiny, "runs": {"HASTE": {"alignment": "HASTE", "stop": {"trigger": "below", **stop}}}})
        return str(refusal.value).splitlines()[0]

    assert refused(levl=1) == "runs.HASTE.stop: unknown key 'levl'; did you mean 'level'?"
    assert refused() == "runs.HASTE.stop.level: missing, and it has no default"
    assert refused(level="low").startswith("runs.HASTE.stop.level: Input should be a valid number")
    assert refused(trigger="belw") == "runs.HASTE.stop: nothing is called 'belw'; did you mean 'below'?"
    text = (installed / "my_haste.py").read_text()
    (installed / "my_haste.py").write_text(text.replace("    level: float\n", "    level: float\n    after: int = 0\n"))
    sys.modules.pop("my_haste")
    importlib.invalidate_caches()
    assert refused(level=1) == "runs.HASTE.stop: below: its fields have after, which stands for something else"
    points = next(installed.glob("my_haste-*")) / "entry_points.txt"
    points.write_text("[haste.triggers]\nbelow = my_haste:small\n")
    extensions._points.cache_clear()
    assert "expected a class derived from haste.align.triggers.Trigger" in refused(level=1)


# ---- a model


def with_network(world, alignment="HASTE", **changes):
    """The world with the page's network in the place of its SiT."""
    (mine,) = yaml.safe_load(block("yaml", MODEL))["models"].values()
    runs = {"HASTE": {"alignment": alignment}}
    world.configure(models={"dot": {**mine, **changes}}, runs=runs)


@pytest.mark.parametrize("alignment", ["REPA", "HASTE"])
def test_a_network_from_outside_is_trained_with_its_taps_sampled_and_scored(world, installed, alignment):
    with_network(world, alignment, half=1)
    run_haste(world, "plan")
    run_haste(world, "train", world.plan.state("HASTE", 8))
    run_haste(world, "sample", world.row().name)
    run_haste(world, "evaluate", world.row().name)
    score = artefact.read_json(world.row().score, "score")
    assert score["scores"]["fd"] > 0 and "u_vit" in score["state"]["trajectory"]
    state, header = load_file(world.state), provenance.provenance_of(world.state)
    assert header["recipe"]["model"] == {
        **{"architecture": "u_vit", "half": 1, "width": 16, "heads": 2, "patch": 2},
        **{"input_size": 4, "channels": 4},
    }
    assert header["provenance"]["versions"]["my-network"] == "0.1"
    moved = [name for name in state if name.startswith("optimizer/exp_avg/") and state[name].any()]
    assert len(moved) == sum(name.startswith("optimizer/exp_avg/") for name in state)  # every weight took part
    assert any(name.startswith("projectors/features/") for name in state)


def test_a_killed_run_of_a_network_from_outside_ends_in_the_same_bits(world, installed):
    with_network(world)
    state = world.plan.state("HASTE", 8)
    loop.train(world.plan, state)
    whole = load_file(world.state)
    world.state.unlink()
    asked = iter([0, 0, 0, 0, 1])
    with pytest.raises(loop.Interrupted):
        loop.train(world.plan, state, lambda: next(asked))
    torch.rand(7)  # whatever the process did in between
    loop.train(world.plan, state)
    again = load_file(world.state)
    assert all(torch.equal(again[name], whole[name]) for name in whole) and again.keys() == whole.keys()


def test_the_first_numbers_of_a_network_from_outside_follow_from_the_seed_alone(world, installed):
    with_network(world)
    recipe = world.plan.trajectories[world.plan.state("HASTE", 8).trajectory].recipe
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(new_learner(recipe, {}, {}).model.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    other = new_learner({**recipe, "seed": 9}, {}, {}).model.state_dict()
    assert not torch.equal(other["label.weight"], found[0]["label.weight"])


def test_a_checkpoint_of_a_network_from_outside_is_exported_and_judged_elsewhere(world, installed, tmp_path):
    with_network(world)
    run_haste(world, "train", world.plan.state("HASTE", 8))
    bare = tmp_path / "bare.safetensors"
    assert cli.main(["export", str(world.state), str(bare), "--format", "safetensors"]) == 0
    ema = {name: value for name, value in load_file(world.state).items() if name.startswith("ema/")}
    assert all(torch.equal(value, ema[f"ema/{name}"]) for name, value in load_file(bare).items())
    assert cli.main(["export", str(world.state), str(tmp_path / "their.pt"), "--format", "repa"]) == 2
    pictures = []
    for file in (world.state, bare):
        row = {"checkpoint": str(file), "model": "dot", "sampling": ["quick"], "step": 8}
        world.configure(models=world.raw["models"], evaluate={"it": row})
        run_haste(world, "sample", world.plan.rows[-1].evaluation.name)
        with np.load(world.plan.rows[-1].evaluation.sample_file(0)) as found:
            pictures.append(found["arr_0"])
    assert (pictures[0] == pictures[1]).all()
    row = {"alignment": "vanilla", "warm_start": str(bare), "seed": 5}
    world.configure(models=world.raw["models"], runs={"HASTE": row})
    name = world.plan.state("HASTE", 8).trajectory
    learner = new_learner(world.plan.trajectories[name].recipe, {}, {})
    warm_start.warm_start(world.plan, name, learner)
    assert all(torch.equal(value, ema[f"ema/{name}"]) for name, value in learner.model.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": "u_vti"}, "models.dot: nothing is called 'u_vti'; did you mean 'u_vit'?"),
        ({"widht": 3}, "models.dot: unknown key 'widht'; did you mean 'width'?"),
        ({"heads": 3}, "models.dot: width 16 is not divisible by heads 3"),
        ({"heads": "3"}, "models.dot.heads: Input should be a valid integer, found '3'"),
        ({"patch": 3}, "models.dot: latents of 4 cells a side cannot be cut into patches of 3"),
        ({"half": 1}, "alignments.HASTE.attention.student_layers: [5], but dot has layers 0 to 1"),
    ],
)
def test_what_a_network_from_outside_cannot_be_is_refused_before_anything_runs(tiny, installed, changes, words):
    (mine,) = yaml.safe_load(block("yaml", MODEL))["models"].values()
    tiny["models"]["dot"] = {**mine, **changes}
    if changes == {"half": 1}:
        tiny["alignments"]["HASTE"]["attention"]["student_layers"] = [1, 5]
    with pytest.raises(ValueError, match=re.escape(words)):
        config.resolve(tiny)


AGAIN = {"checkpoint_blocks": True}


def test_what_a_network_cannot_do_is_refused_by_the_key(tiny, installed):
    (mine,) = yaml.safe_load(block("yaml", MODEL))["models"].values()
    dot = tiny["models"]["dot"]
    tiny["models"] = {"dot": dot, "theirs": mine}
    tiny["runtime"] |= AGAIN
    config.resolve(tiny)  # no run trains it
    tiny["runs"]["vanilla"] = {"model": "theirs"}
    with pytest.raises(ValueError, match=r"^runtime\.checkpoint_blocks: true, but models\.theirs \(u_vit\) cannot"):
        config.resolve(tiny)
    tiny["runtime"].pop("checkpoint_blocks")
    tiny["training"] |= {"precision": "bf16", "time_dtype": "fp32"}
    with pytest.raises(ValueError, match=r"^runs\.vanilla: training\.time_dtype: fp32, but theirs has no such"):
        config.resolve(tiny)


def test_a_network_that_says_so_computes_its_blocks_again_and_its_gradients_are_the_same(tiny, installed):
    file = installed / "my_network.py"
    text = file.read_text().replace("class UViT(Denoiser):\n", "class UViT(Denoiser):\n    can_checkpoint = True\n\n")
    file.write_text(text.replace("q, k = block(tokens)", "q, k = self.through(block, tokens)"))
    (mine,) = yaml.safe_load(block("yaml", MODEL))["models"].values()
    tiny["models"]["dot"], tiny["runtime"] = mine, {**tiny["runtime"], **AGAIN}
    plan = Plan(config.resolve(tiny))
    model = new_learner(plan.trajectories[plan.state("vanilla", 8).trajectory].recipe, {}, {}).model
    torch.nn.init.ones_(model.out.weight)
    calls, found = [], []
    for each in model.blocks:
        each.register_forward_pre_hook(lambda *_: calls.append(1))
    for model.checkpoint_blocks in (False, True):
        calls.clear()
        velocity, _ = model(torch.ones(2, 4, 4, 4), torch.tensor([0.2, 0.7]), torch.tensor([1, 2]))
        gradients = torch.autograd.grad(velocity.square().mean(), list(model.parameters()))
        found.append((len(calls), gradients))
    assert [count for count, _ in found] == [4, 8]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


def test_attention_that_a_network_does_not_hand_out_is_refused_for_haste_and_not_for_repa(tiny, installed):
    file = installed / "my_network.py"
    text = file.read_text()
    line = next(line for line in text.splitlines(keepends=True) if 'self.taps |= {f"attention' in line)
    file.write_text(text.replace(line, ""))
    (mine,) = yaml.safe_load(block("yaml", MODEL))["models"].values()
    tiny["models"]["dot"] = mine
    with pytest.raises(ValueError, match=r"alignments\.HASTE\.attention: dot has no attention") as error:
        config.resolve(tiny)
    assert "REPA" not in str(error.value)
    tiny["runs"] = {"REPA": {"alignment": "REPA"}}
    config.resolve(tiny)


def test_a_network_whose_taps_are_not_as_it_says_is_refused(tiny, installed):
    file = installed / "my_network.py"
    file.write_text(
        file.read_text().replace('tapped[f"tokens.{i + 1}"] = tokens[:, 2:]', 'tapped[f"tokens.{i + 1}"] = tokens')
    )
    (mine,) = yaml.safe_load(block("yaml", MODEL))["models"].values()
    tiny["models"]["dot"] = mine
    with pytest.raises(ValueError, match=r"models\.dot: UViT: tap tokens\.1 is \(1, 6, 16\), expected \(1, 4, 16\)"):
        config.resolve(tiny)


def test_a_resolved_configuration_with_a_network_from_outside_resolves_to_itself(tiny, installed):
    (mine,) = yaml.safe_load(block("yaml", MODEL))["models"].values()
    tiny["models"]["dot"] = mine
    once = config.resolve(tiny)
    assert once.models["dot"].settings["patch"] == 2  # a default, written out
    assert config.resolve(once.model_dump(mode="json")) == once
    assert Plan(once).planned() == Plan(config.resolve(once.model_dump(mode="json"))).planned()
