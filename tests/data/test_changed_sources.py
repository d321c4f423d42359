"""A source that changes under results: it is said, nothing is remade under its old name, and `--update` helps."""

import copy
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from haste import config
from haste.cli import main as cli
from haste.files import artefact, locks
from haste.plan.plan import Plan

ROOT = Path(__file__).parents[2]


def add(folder, *numbers, level=100):
    for number in numbers:
        path = folder / "ab"[number % 2] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), level + number, np.uint8)).save(path, compress_level=0)  # all of one size


class World:
    """A folder of pictures, or an archive of it, and what is made of it."""

    def __init__(self, tiny, folder, kind):
        self.pictures, self.results, self.file = folder / "pictures", folder / "results", folder / "tiny.yaml"
        add(self.pictures, *range(12))
        self.archive = folder / "pictures.zip" if kind == "archive" else None
        images = {
            "source": kind,
            "path": str(self.archive or self.pictures),
            "resolution": 8,
            "classes": 2,
            "holdout": 2,
        }
        self.raw = {**copy.deepcopy(tiny), "results": str(self.results), "images": {**images, "shards": 2}}
        self.raw["runs"] = {"vanilla": {}}
        self.file.write_text(yaml.safe_dump(self.raw))
        self.pack()

    def pack(self):
        if self.archive:
            with zipfile.ZipFile(self.archive, "w") as packed:
                for path in sorted(self.pictures.rglob("*.png")):
                    packed.write(path, path.relative_to(self.pictures))

    @property
    def plan(self):
        return Plan(config.resolve(self.raw))

    def make(self):
        return [
            cli.main(["images", "-c", str(self.file), *how]) for how in (["--shard", "0"], ["--shard", "1"], ["--join"])
        ]

    def update(self):
        assert cli.main(["images", "-c", str(self.file), "--update"]) == 0


@pytest.fixture(params=["folder", "archive"])
def world(tiny, tmp_path, request):
    world = World(tiny, tmp_path, request.param)
    assert world.plan.changes == []
    assert world.make() == [0, 0, 0]
    return world


def files(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*.h5")) + sorted(folder.rglob("manifest.json"))}


def test_pictures_that_were_added_are_said_by_the_plan_and_not_used(world, capsys):
    before, state = world.plan.images.key, str(world.plan.state("vanilla", 8))
    add(world.pictures, *range(20, 30))
    world.pack()
    (said,) = world.plan.changes
    assert "10 pictures were added (a/20.png, a/22.png, a/24.png, ...) since" in said and "not used" in said
    assert world.plan.images.key == before and str(world.plan.state("vanilla", 8)) == state
    assert cli.main(["plan", "-c", str(world.file)]) == 0
    assert "10 pictures were added" in " ".join(capsys.readouterr().out.split())


def test_a_store_that_is_removed_is_not_made_again_from_another_content(world, capsys):
    add(world.pictures, 20)
    world.pack()
    shutil.rmtree(world.plan.images.folder)
    with pytest.raises(ValueError, match=r"1 picture was added \(a/20.png\).*`haste images --update`"):
        world.plan.check()
    assert world.make()[0] == 2
    assert "1 picture was added" in capsys.readouterr().err
    assert not Path(world.plan.images.folder).exists()


def test_a_picture_that_is_repaired_before_the_images_are_finished_is_no_change(world):
    shutil.rmtree(world.results)
    broken = world.pictures / "a" / "00.png"
    whole = broken.read_bytes()
    broken.write_bytes(b"not a picture")
    world.pack()
    assert 2 in world.make()
    broken.write_bytes(whole)
    world.pack()
    assert world.make() == [0, 0, 0] and world.plan.changes == []


def test_an_update_gives_new_names_leaves_everything_and_the_old_content_gets_its_names_back(world):
    first, kept = world.plan, files(world.results)
    add(world.pictures, *range(20, 30))
    world.pack()
    world.update()
    second = world.plan
    assert second.changes == []
    assert second.images.key != first.images.key and second.latents.key != first.latents.key
    assert str(second.state("vanilla", 8)) != str(first.state("vanilla", 8))
    assert world.make() == [0, 0, 0]
    assert second.image_count == 22
    assert {path: content for path, content in files(world.results).items() if path in kept} == kept
    for number in range(20, 30):
        (world.pictures / "ab"[number % 2] / f"{number:02d}.png").unlink()
    world.pack()
    assert "10 pictures were removed" in world.plan.changes[0] and world.plan.images.key == second.images.key
    world.update()
    assert world.plan.images.key == first.images.key and world.plan.image_count == 12


def test_an_edit_that_keeps_the_size_is_found_when_the_pixels_are_read_again(world, capsys):
    size = {path.stat().st_size for path in world.pictures.rglob("*.png")}
    add(world.pictures, 3, level=200)
    world.pack()
    assert size == {path.stat().st_size for path in world.pictures.rglob("*.png")} and len(size) == 1
    assert world.plan.changes == []  # by names and sizes nothing has changed
    manifest = Path(world.plan.images.manifest)
    shutil.rmtree(manifest.parent)
    assert world.make()[2] == 2
    assert "pictures were edited since" in capsys.readouterr().err and not manifest.exists()


def test_a_source_that_is_gone_after_the_images_were_made_is_no_change(world):
    shutil.rmtree(world.pictures)
    if world.archive:
        world.archive.unlink()
    assert world.plan.changes == []


def test_results_from_before_sources_were_recorded_say_counts_and_are_updated_as_others(world):
    shutil.rmtree(world.results / "sources")
    assert world.plan.changes == []
    first = world.plan.images.key
    add(world.pictures, 20)
    world.pack()
    assert "13 pictures, and 12 when the images were made; the change is not used" in world.plan.changes[0]
    world.update()
    assert world.plan.images.key != first and world.plan.changes == []


def test_a_dry_run_says_what_changed_and_wants_nothing_of_the_images(world, warm):
    add(world.pictures, 20)
    world.pack()
    command = ["-n", "--cores", "1", "--snakefile", ROOT / "workflow" / "Snakefile", "--configfile", world.file]
    command += ["--workflow-profile", ROOT / "profiles" / "default", "--directory", world.file.parent]
    done = warm.snakemake(*command, world.plan.images.manifest)
    said = done.stdout + done.stderr
    assert done.returncode == 0 and "1 picture was added" in said and "Nothing to be done" in said, said


def test_pictures_that_are_replaced_between_two_shards_are_not_mixed(world, capsys):
    shutil.rmtree(world.results)
    assert cli.main(["images", "-c", str(world.file), "--shard", "0"]) == 0
    for path in world.pictures.rglob("*.png"):
        path.write_bytes(path.read_bytes() + b"more")  # the same names, other sizes
    world.pack()
    assert cli.main(["images", "-c", str(world.file), "--shard", "1"]) == 0
    assert cli.main(["images", "-c", str(world.file), "--join"]) == 2
    assert "pictures were changed after some shards were made" in capsys.readouterr().err
    Path(world.plan.images.shard_files[0]).unlink()
    assert world.make() == [0, 0, 0]


def test_a_store_whose_pixels_are_others_is_made_under_a_new_name_on_request(world, capsys):
    first = world.plan.images.key
    shutil.rmtree(world.plan.images.folder)
    add(world.pictures, 3, level=200)
    world.pack()
    assert world.make()[2] == 2
    assert "or run `haste images --update`" in " ".join(capsys.readouterr().err.split())
    world.update()
    assert world.plan.images.key != first and world.plan.changes == []
    assert world.make() == [0, 0, 0]


def test_results_from_before_sources_were_recorded_get_their_names_back(world):
    shutil.rmtree(world.results / "sources")
    first = world.plan.images.key
    add(world.pictures, 20)
    world.pack()
    world.update()
    assert world.plan.images.key != first
    (world.pictures / "a" / "20.png").unlink()
    world.pack()
    world.update()
    assert world.plan.images.key == first and world.plan.changes == []


def test_names_change_under_no_running_workflow_and_prune_keeps_what_was_made_before(world, capsys):
    kept = files(world.results)
    artefact.write_json(world.plan.config_file, world.plan.config.model_dump(mode="json"))
    add(world.pictures, 20)
    world.pack()
    with locks.acquire(world.results / ".lock", "", shared=True):
        assert cli.main(["images", "-c", str(world.file), "--update"]) == 2
    assert "is in use" in capsys.readouterr().err
    world.update()
    assert cli.main(["prune", "-c", str(world.file), "--yes"]) == 0
    assert {path for path in kept} <= {path for path in files(world.results)}
