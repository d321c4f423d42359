"""What would make two numbers look comparable that are not."""

import json
import shutil
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from haste.files import artefact
from haste.sampling.samples import open_samples
from haste.score.images import Scorer, score_images

MU = {"mu": np.zeros(5), "sigma": np.eye(5), "mu_s": np.zeros(4), "sigma_s": np.eye(4)}


@pytest.fixture
def real(draw, pack):
    return pack("real", draw(1, 20))


def test_two_detectors_that_would_fill_one_column_are_refused_before_anything_is_looked_at(real, make_detector):
    with pytest.raises(ValueError, match="would both give FID"):
        Scorer(real, detectors=[make_detector(seed=0), make_detector(seed=1)])
    Scorer(real, detectors=[make_detector(seed=0), make_detector(kind="other", seed=1)])


def test_sets_that_other_detectors_looked_at_are_not_scored_side_by_side(real, draw, pack, make_detector, tmp_path):
    for seed in (0, 1):
        score_images(pack(f"fake{seed}", draw(seed, 20)), None, detectors=[make_detector(seed=seed)], features=tmp_path)
    stores = sorted(path.parent for path in tmp_path.glob("fake*/manifest.json"))
    scorer = Scorer(None)
    scorer(stores[0])
    with pytest.raises(ValueError, match="would both give FID"):
        scorer(stores[1])


def test_kept_features_of_the_same_pixels_are_said_to_be_of_the_files_at_hand(real, draw, pack, detector, tmp_path):
    first = pack("first", draw(0, 20))
    score_images(first, real, detectors=[detector], features=tmp_path / "kept")
    second = shutil.copy(first, tmp_path / "second.npz")
    found = score_images(second, real, detectors=[detector], features=tmp_path / "kept")
    assert found.samples["path"] == str(second)
    assert len(list((tmp_path / "kept").glob("*/manifest.json"))) == 2  # nothing was looked at twice


def test_saved_statistics_never_claim_a_number_of_images_that_nobody_knows(draw, pack, detector, tmp_path):
    adm = pack("adm", draw(1, 20), **MU)
    scorer = Scorer(adm, detectors=[detector])
    scorer(pack("fake", draw(0, 20)))
    scorer.save_reference(tmp_path / "saved.npz")
    header = json.loads(str(np.load(tmp_path / "saved.npz")["haste"]))
    assert header["images"] is None
    assert score_images(pack("again", draw(2, 20)), tmp_path / "saved.npz", detectors=[detector])["FID"] > 0


def test_samples_that_are_the_reference_file_are_called_so_whatever_else_it_holds(draw, pack, detector):
    adm = pack("adm", draw(1, 20), **MU)
    assert "samples and reference are the same images" in score_images(adm, adm, detectors=[detector]).notes


def test_mu_and_sigma_alone_are_taken_for_inceptions_and_a_note_says_so(draw, pack, detector, tmp_path):
    np.savez(tmp_path / "mar.npz", mu=MU["mu"], sigma=MU["sigma"])
    found = score_images(pack("fake", draw(0, 20)), tmp_path / "mar.npz", detectors=[detector])
    assert set(found.columns) == {"FID", "IS"} and "holds no images" in found.absent["precision"]
    assert any(
        "mar.npz says how its mu and sigma were made; they are taken to be of inception" in one for one in found.notes
    )


def test_fid_by_pytorch_fid_has_a_column_of_its_own_and_takes_mu_and_sigma_alone_for_its_own(
    draw, pack, make_detector, tmp_path
):
    theirs = make_detector(kind="pytorch-fid", seed=1, widths={"pool": 5})
    fake, stats = pack("fake", draw(0, 20)), tmp_path / "fid_stats.npz"
    seen = theirs(torch.from_numpy(draw(3, 40)))["pool"].numpy().astype(np.float64)
    np.savez(stats, mu=seen.mean(0), sigma=np.cov(seen.T))
    mine = theirs(torch.from_numpy(draw(0, 20)))["pool"].numpy().astype(np.float64)
    gap, product = mine.mean(0) - seen.mean(0), np.cov(mine.T) @ np.cov(seen.T)
    expected = (
        gap @ gap + np.trace(np.cov(mine.T) + np.cov(seen.T)) - 2 * np.sqrt(np.linalg.eigvals(product).real).sum()
    )
    found = score_images(fake, stats, detectors=[theirs])
    assert found.values == pytest.approx({"FID (pytorch-fid)": expected})
    assert "20 samples; published scores on MS-COCO are of 30,000 or 40,192 or 40,504" in found.notes[0]
    assert any("they are taken to be pytorch-fid's" in note for note in found.notes)
    images = score_images(fake, pack("seen", draw(3, 40)), detectors=[make_detector(), theirs])
    assert images["FID (pytorch-fid)"] == pytest.approx(expected) and images["FID"] != pytest.approx(expected)
    assert any("neither compares with the other" in note for note in images.notes)


def test_adms_statistics_are_never_taken_for_pytorch_fids_nor_those_that_one_saved_for_the_others(
    draw, pack, make_detector, tmp_path
):
    theirs, fake = make_detector(kind="pytorch-fid", widths={"pool": 5}), pack("fake", draw(0, 20))
    np.savez(tmp_path / "adm.npz", **MU)
    with pytest.raises(ValueError, match="mu and sigma of Inception and no images, but .* by pytorch-fid"):
        score_images(fake, tmp_path / "adm.npz", detectors=[theirs])
    scorer = Scorer(pack("real", draw(1, 20)), detectors=[theirs])
    scorer(fake)
    scorer.save_reference(tmp_path / "saved.npz")
    with pytest.raises(ValueError, match="cannot be compared"):
        score_images(fake, tmp_path / "saved.npz", detectors=[make_detector()])
    again = score_images(fake, tmp_path / "saved.npz", detectors=[theirs])
    assert not any("taken to be" in note for note in again.notes)


def test_a_metric_that_is_named_and_that_no_detector_gives_is_an_error(draw, pack, make_detector, tmp_path):
    np.savez(tmp_path / "statistics.npz", **MU)
    both = [make_detector(seed=0), make_detector(kind="other", seed=1)]
    with pytest.raises(ValueError):
        score_images(pack("fake", draw(0, 20)), tmp_path / "statistics.npz", detectors=both, metrics=["precision"])


HEADERS = {
    "a list": "[]",
    "nothing": "null",
    "not JSON": "{",
    "no source": json.dumps({"schema": artefact.SCHEMA, "kind": "statistics"}),
    "a foreign detector": json.dumps({"schema": artefact.SCHEMA, "kind": "statistics", "source": {}, "detector": 3}),
    "words for a count": json.dumps(
        {
            "schema": artefact.SCHEMA,
            "kind": "statistics",
            "source": {},
            "detector": {"name": "x", "identity": "y", "outputs": {}},
            "images": "many",
        }
    ),
}


@pytest.mark.parametrize("name", HEADERS)
def test_statistics_whose_header_is_damaged_are_refused_by_name(name, draw, pack, detector, tmp_path):
    np.savez(tmp_path / "statistics.npz", haste=np.array(HEADERS[name]), **MU)
    with pytest.raises(ValueError, match="statistics.npz"):
        score_images(pack("fake", draw(0, 20)), tmp_path / "statistics.npz", detectors=[detector])


def test_a_folder_and_its_archive_hold_the_same_pictures_in_the_same_order(draw, tmp_path):
    folder, images = tmp_path / "set", draw(0, 6)
    names = ["a/0.png", "a/1.png", "a-b/2.png", "a.b/3.png", "z.png", "a/b/4.png"]
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for name, image in zip(names, images, strict=True):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / name)
            archive.write(folder / name, name)
        archive.writestr("__MACOSX/._z.png", b"what macOS adds")
    (folder / "._z.png").write_bytes(b"what macOS adds")
    (folder / "folder.png").mkdir()
    assert open_samples(folder).identity() == open_samples(tmp_path / "set.zip").identity()


def test_a_jpeg_that_is_called_png_is_refused_and_files_that_are_not_read_are_named(draw, detector, tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    for place, image in enumerate(draw(0, 6)):
        Image.fromarray(image).save(folder / f"{place}.png")
    Image.fromarray(image).save(folder / "other.tif")
    found = score_images(folder, None, detectors=[detector])
    (note,) = [note for note in found.notes if "there is more" in note]
    assert note.endswith("not used: pictures of a format that is not read (1: other.tif)")
    Image.fromarray(image).save(folder / "3.png", format="JPEG")
    with pytest.raises(ValueError, match="3.png: holds JPEG"):
        score_images(folder, None, detectors=[detector])


def test_with_two_detectors_each_says_what_it_was_compared_with(draw, pack, make_detector):
    adm, fake = pack("adm", draw(1, 20), **MU), pack("fake", draw(0, 20))
    for kinds in (["inception", "other"], ["other", "inception"]):
        both = [make_detector(kind=kind, seed=place) for place, kind in enumerate(kinds)]
        found = score_images(fake, adm, detectors=both).json()
        said = {detector["kind"]: detector.get("reference_moments") for detector in found["detectors"]}
        assert said == {"inception": None, "other": "of its images under arr_0"}
        assert "moments" not in found["reference"]
