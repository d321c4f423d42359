"""The page on extending shows a package that works: its files are installed as they stand, and used from end to end."""

import re
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from haste import artefact, cli, config, extensions
from haste.data.store import Store
from haste.diffusion import samplers
from haste.metrics import detectors, scores
from haste.teachers import encoder

PAGE = Path(__file__).parent.parent / "docs" / "extending.md"
SECTION = PAGE.read_text().split("## From a package of your own")[1].split("\n## ")[0]
TABLES = {
    "samplers": samplers.SAMPLERS,
    "metrics": scores.METRICS,
    "detectors": detectors.PUBLISHED,
    "teachers": encoder.ADDED,
}


def block(language):
    (found,) = re.findall(rf"```{language}\n(.*?)```", SECTION, re.DOTALL)
    return found


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The page's package where Python finds it, laid out as pip does."""
    site, about = tmp_path / "site", tomllib.loads(block("toml"))["project"]
    meta = site / f"my_haste-{about['version']}.dist-info"
    meta.mkdir(parents=True)
    (site / "my_haste.py").write_text(block("python"))
    (meta / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {about['name']}\nVersion: {about['version']}\n")
    groups = about["entry-points"].items()
    lines = [
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in added.items()) for group, added in groups
    ]
    (meta / "entry_points.txt").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(site)
    extensions._found.cache_clear()
    yield site
    extensions._found.cache_clear()
    sys.modules.pop("my_haste", None)


@pytest.fixture
def tables(installed, monkeypatch):
    """The tables as a process has them that starts with the package there."""
    for group, table in TABLES.items():
        for name, value in extensions.loaded(group, table).items():
            monkeypatch.setitem(table, name, value)


def test_every_group_is_described_and_recorded():
    added = tomllib.loads(block("toml"))["project"]["entry-points"]
    assert (
        set(added) == {f"haste.{group}" for group in extensions.GROUPS} == {f"haste.{g}" for g in artefact.EXTENSIONS}
    )


def run_haste(world, *command):
    assert cli.main([*map(str, command), "-c", str(world.file)]) == 0, command


def test_what_the_page_adds_is_used_from_training_to_scores(world, tables, tmp_path):
    network = VisionTransformer(8, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=0)
    save_file(network.state_dict(), tmp_path / "small.safetensors")
    changes = yaml.safe_load(block("yaml").replace("small.safetensors", str(tmp_path / "small.safetensors")))
    world.configure(**changes, defaults={**world.raw["defaults"], "sampling": ["mine"]})
    run_haste(world, "train", world.plan.state("HASTE", 8))
    run_haste(world, "reference")
    run_haste(world, "sample", world.row().name)
    run_haste(world, "evaluate", world.row().name)
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


def test_the_midpoint_rule_of_the_page_is_of_second_order(tables):
    class Decay:
        def __call__(self, x, t):
            return x * t

        def held(self, t):
            return self

    def error(steps):
        found = samplers.SAMPLERS["midpoint"].run(Decay(), torch.ones(1), steps)
        return abs(float(found) - torch.tensor(-0.5, dtype=torch.float64).exp().item())

    assert error(20) / error(40) == pytest.approx(4, rel=0.1)


def test_names_are_known_without_importing_what_they_name(installed, tiny):
    tiny["sampling"]["quick"] = {"sampler": "midpoint", "steps": 2}
    assert config.resolve(tiny).sampling["quick"].sampler == "midpoint"
    assert "my_haste" not in sys.modules
    tiny["sampling"]["quick"] = {"sampler": "midpint", "steps": 2}
    with pytest.raises(ValueError, match=r"sampling\.quick\.sampler: Input should be 'euler'"):
        config.resolve(tiny)


def test_what_cannot_be_imported_or_takes_a_name_of_ours_is_refused_by_package(installed):
    points = next(installed.glob("*.dist-info")) / "entry_points.txt"
    points.write_text("[haste.samplers]\nmidpoint = my_haste:NOTHING\n")
    extensions._found.cache_clear()
    with pytest.raises(ValueError, match=r"'midpoint' cannot be had from my_haste:NOTHING \(of my-haste\)"):
        extensions.loaded("samplers", {})
    points.write_text("[haste.samplers]\nheun = my_haste:MIDPOINT\n")
    extensions._found.cache_clear()
    with pytest.raises(ValueError, match=r"my_haste:MIDPOINT \(of my-haste\) is called 'heun', which is taken"):
        extensions.loaded("samplers", samplers.SAMPLERS)
