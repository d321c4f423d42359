"""What the pixels of samples say by themselves, and that a score says it."""

import numpy as np
import pytest

from haste.cli import main as cli
from haste.files import artefact
from haste.sampling import looks


@pytest.fixture
def images() -> np.ndarray:
    """20 images, 5 of them black, 3 more copies of one, and one whose only light pixel is dim."""
    drawn = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    drawn[[2, 3, 5, 7, 11]] = 0
    drawn[[13, 17, 19]] = drawn[0]
    drawn[1], drawn[1, 4, 4, 1] = 0, 2
    return drawn


def test_copies_black_images_and_brightness_are_counted_over_parts_of_any_size(images):
    expected = {"images": 20, "copies": 4 + 3, "black": 5, "brightness": images.mean()}
    for cuts in ([], [1, 7], [10]):
        parts = [looks.looks_of(part) for part in np.split(images, cuts)]
        assert looks.facts(parts, (8, 8)) == pytest.approx(expected)
    assert looks.facts([], (8, 8)) == {"images": 0, "copies": 0, "black": 0, "brightness": 0}


def test_shards_that_are_older_than_these_facts_are_read_and_shards_that_are_gone_say_nothing(images, tmp_path):
    old, new = tmp_path / "old.npz", tmp_path / "new.npz"
    np.savez(old, arr_0=images[:9])
    np.savez(new, arr_0=images[9:], **looks.looks_of(images[9:]))
    assert looks.facts_of_shards([old, new]) == looks.facts([looks.looks_of(images)], (8, 8))
    new.unlink()
    assert looks.facts_of_shards([old, new]) == {}


@pytest.mark.parametrize("kept", [True, False], ids=["with its facts", "older"])
def test_a_score_of_the_workflow_says_black_samples_and_copies(world, images, kept):
    (shard,), score = world.row().sample_files, world.row().score
    with np.load(shard) as file:
        whole = {name: file[name] for name in file.files if name not in looks.FIELDS}
        assert set(file.files) > set(looks.FIELDS)
    np.savez(shard, **whole | {"arr_0": images} | (looks.looks_of(images) if kept else {}))
    assert cli.main(["evaluate", world.row().name, "-c", str(world.file)]) == 0
    said = artefact.read_json(score, "score")["notes"]
    assert said[:2] == ["7 of 20 samples are copies of another one, pixel by pixel", "5 of 20 samples are black"]
