"""What cannot be scored is refused, or scored with a clear word: a table of mistakes that people make."""

import json
import zipfile

import numpy as np
import pytest
from PIL import Image

from haste.cli import main as cli
from haste.score.images import score_images

MU = {"mu": np.zeros(5), "sigma": np.eye(5), "mu_s": np.zeros(4), "sigma_s": np.eye(4)}


@pytest.fixture
def real(draw, pack):
    return pack("real", draw(1, 20))


def refused(detector, samples, reference, words, **options):
    with pytest.raises(ValueError) as refusal:
        score_images(samples, reference, detectors=[detector], **options)
    for word in words:
        assert word in str(refusal.value)


def torn(path):
    path.write_bytes(path.read_bytes()[:-700])
    return path


SAMPLES = {
    "another size": (lambda x: np.repeat(x, 2, 1).repeat(2, 2), ["16 x 16 px", "real.npz are 8 x 8 px"]),
    "floats": (lambda x: x / 255, ["arr_0 holds float64", "clip(255 x)"]),
    "floats in [0, 1] as bytes": (lambda x: (x > 100).astype(np.uint8), ["no values but 0, 1", "clip(255 x)"]),
    "floats in [-1, 1] as bytes": (
        lambda x: np.array([0, 1, 255], np.uint8)[x % 3],
        ["no values but 0, 1, 255", "clip(127.5 x + 128)"],
    ),
    "black": (lambda x: 0 * x, ["nothing but black"]),
    "sixteen bits": (lambda x: x.astype(np.uint16), ["uint16", "uint8 0..255"]),
    "grey": (lambda x: x[..., 0], ["(20, 8, 8)", "(N, H, W, 3)"]),
    "one channel": (lambda x: x[..., :1], ["(20, 8, 8, 1)", "(N, H, W, 3)"]),
    "alpha": (lambda x: np.concatenate([x, x[..., :1]], -1), ["(20, 8, 8, 4)"]),
    "channels first": (lambda x: np.ascontiguousarray(x.transpose(0, 3, 1, 2)), ["channels come last"]),
    "none": (lambda x: x[:0], ["found no images"]),
    "pickled": (lambda x: np.array([None, x[0]], dtype=object), ["arr_0 is pickled, which is never read"]),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_arrays_that_are_no_such_images_are_refused(name, draw, pack, real, detector):
    change, words = SAMPLES[name]
    refused(detector, pack("fake", change(draw(0, 20))), real, ["fake.npz", *words])


def test_drawings_in_black_and_white_are_images(draw, pack, real, detector):
    drawing = 255 * (draw(0, 20) > 100).astype(np.uint8)
    assert np.isfinite(score_images(pack("fake", drawing), real, detectors=[detector])["FID"])


@pytest.mark.parametrize(
    ("mode", "words"), [("L", "mode L"), ("RGBA", "mode RGBA"), ("P", "mode P"), ("LA", "mode LA")]
)
def test_grey_and_transparent_pictures_are_refused_by_name(mode, words, draw, tmp_path, real, detector):
    (tmp_path / "fakes").mkdir()
    for i, image in enumerate(draw(0, 4)):
        Image.fromarray(image).convert(mode if i == 2 else "RGB").save(tmp_path / "fakes" / f"{i}.png")
    refused(
        detector,
        tmp_path / "fakes",
        real,
        [f"2.png: {words}", "expected RGB", "`haste score --convert`", "haste images"],
    )


def test_truncated_files_are_refused_wherever_they_stand(draw, pack, real, detector, tmp_path):
    fake = pack("fake", draw(0, 20))
    refused(detector, torn(pack("torn", draw(0, 20))), real, ["torn.npz"])
    refused(detector, fake, torn(pack("ref", draw(2, 20), **MU)), ["ref.npz"])
    (tmp_path / "no.zip").write_bytes(b"PK\x03\x04")
    refused(detector, tmp_path / "no.zip", real, ["no.zip", "truncated or foreign"])
    with zipfile.ZipFile(tmp_path / "half.zip", "w") as archive:
        archive.writestr("a.png", b"\x89PNG\r\n\x1a\n")
    refused(detector, tmp_path / "half.zip", real, ["half.zip:a.png", "cannot be read as an image"])


def test_a_missing_shard_is_refused(draw, tmp_path, real, detector):
    (tmp_path / "shards").mkdir()
    for shard in (0, 2):
        np.savez(tmp_path / "shards" / f"shard-{shard:05d}-of-00003.npz", arr_0=draw(shard, 5))
    refused(detector, tmp_path / "shards", real, ["shards", "shard 1 of 3 is missing"])


REFERENCES = {
    "mu alone": ({"mu": np.zeros(5)}, ["mu without sigma"]),
    "another width": ({"mu": np.zeros(6), "sigma": np.eye(6)}, ["(6,) and (6, 6)", "expected (5,) and (5, 5)"]),
    "not square": ({"mu": np.zeros(5), "sigma": np.ones((5, 4))}, ["(5,) and (5, 4)"]),
    "not symmetric": ({"mu": np.zeros(5), "sigma": np.triu(np.ones((5, 5)))}, ["not symmetric"]),
    "a negative variance": ({"mu": np.zeros(5), "sigma": -np.eye(5)}, ["a negative variance"]),
    "not finite": ({"mu": np.full(5, np.nan), "sigma": np.eye(5)}, ["mu, sigma", "finite"]),
    "pickled": ({"mu": np.array([None] * 5, dtype=object), "sigma": np.eye(5)}, ["mu is pickled"]),
    "no statistics": ({"features": np.zeros((3, 5))}, ["expected images under arr_0, found features"]),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_statistics_that_are_none_are_refused(name, draw, pack, tmp_path, detector):
    arrays, words = REFERENCES[name]
    np.savez(tmp_path / "ref.npz", **arrays)
    refused(detector, pack("fake", draw(0, 20)), tmp_path / "ref.npz", ["ref.npz", *words])


def test_a_reference_without_images_gives_the_other_scores_unless_the_rest_is_asked_by_name(
    draw, pack, tmp_path, detector
):
    fake, reference = pack("fake", draw(0, 20)), tmp_path / "ref.npz"
    np.savez(reference, **MU)
    found = score_images(fake, reference, detectors=[detector])
    assert list(found.columns) == ["FID", "sFID", "IS"]
    assert set(found.absent) == {"precision", "recall", "KID"}
    assert all("holds no images" in why for why in found.absent.values())
    for name in ("precision", "recall", "kid"):
        refused(detector, fake, reference, ["holds no images", str(reference)], metrics=["fid", name])
    np.savez(reference, mu=MU["mu"], sigma=MU["sigma"])
    assert "holds no mu_s and sigma_s" in score_images(fake, reference, detectors=[detector]).absent["sFID"]
    refused(detector, fake, reference, ["sFID", "holds no mu_s and sigma_s"], metrics=["sfid"])


def test_a_score_whose_layer_a_detector_has_not_is_refused_by_name_alone(draw, pack, real, make_detector):
    other = make_detector(kind="DINOv2-L", widths={"pool": 5})
    found = score_images(pack("fake", draw(0, 20)), real, detectors=[other])
    assert not [name for name in found.columns if name.startswith(("sFID", "IS", "FID"))]
    refused(other, pack("fake", draw(0, 20)), real, ["sFID (DINOv2-L)", "gives no spatial"], metrics=["sfid"])


def test_two_detectors_are_never_mixed(draw, pack, real, make_detector, tmp_path):
    fake, first, second = pack("fake", draw(0, 20)), make_detector(seed=0), make_detector(seed=1)
    for detector, name in ((first, "one"), (second, "two")):
        score_images(fake, real, detectors=[detector], features=tmp_path / name)
    stored = {
        (side, name): next((tmp_path / name).glob(f"{side}-*")) for side in ("fake", "real") for name in ("one", "two")
    }
    with pytest.raises(
        ValueError, match="features of the reference by .*, of the samples by .*: .* cannot be compared"
    ):
        score_images(stored["fake", "one"], stored["real", "two"])
    refused(second, stored["fake", "one"], stored["real", "two"], ["fake-", "features by detector", "requested"])
    refused(first, fake, stored["real", "two"], ["real-", "cannot be compared"])
    other = make_detector(kind="DINOv2-L", widths={"pool": 5})
    np.savez(tmp_path / "ref.npz", **MU)
    refused(other, fake, tmp_path / "ref.npz", ["mu and sigma of Inception and no images"])


def test_what_can_be_refused_beforehand_is_refused_before_anything_is_looked_at(
    draw, pack, real, tmp_path, make_detector
):
    detector, looked = make_detector(), []
    fake = pack("fake", draw(0, 20))
    score_images(fake, real, detectors=[detector], features=tmp_path / "kept")
    stored = next((tmp_path / "kept").glob("real-*"))
    other = make_detector(seed=1)
    other.network.register_forward_pre_hook(lambda module, given: looked.append(given))
    np.savez(tmp_path / "ref.npz", **MU)
    refused(other, fake, stored, ["cannot be compared"])
    refused(other, fake, tmp_path / "ref.npz", ["holds no images"], metrics=["fid", "recall"])
    refused(other, fake, None, ["FID: needs a reference"], metrics=["fid"])
    refused(other, pack("fake", 0 * draw(0, 20)), real, ["nothing but black"])
    assert not looked


def test_unknown_metrics_are_refused_with_those_there_are(draw, pack, real, detector):
    refused(detector, real, real, ["found fds, expected of fid, clip, fd, sfid, is"], metrics=["fid", "fds"])
    refused(detector, real, real, ["batch", "found 0"], batch=0)


# ---- the command


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing.npz", "--reference", "REAL"], ["missing.npz: no such file"]),
        (["REAL", "--reference", "missing"], ["missing: no such file"]),
        (["REAL", "--reference", "REAL", "--detector", "resnet"], ["resnet", "inception"]),
        (["REAL", "--reference", "REAL", "--weights", "none.pth"], ["none.pth"]),
        (["REAL", "--reference", "REAL", "--metrics", "fid,"], ["metrics: found"]),
        (["REAL", "--reference", "REAL", "--detector", "a=b", "--weights", "c"], ["--weights"]),
        (["REAL", "--reference", "REAL", "--device", "abacus"], ["abacus"]),
        (["REAL", "--reference", "REAL", "--device", "cuda:99"], ["cuda:99"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_the_command_refuses_with_one_message_and_exit_code_2(arguments, words, real, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    arguments = [str(real) if one == "REAL" else one for one in arguments]
    assert cli.main(["score", *arguments]) == 2
    message = capsys.readouterr().err
    assert "haste score: " in message and "Traceback" not in message
    for word in words:
        assert word in message


def test_the_command_scores_compares_and_writes(make_plan, tmp_path, capsys):
    plan, rng = make_plan(), np.random.default_rng(0)
    for name, high in (("a", 256), ("b", 200), ("real", 240)):
        np.savez(tmp_path / f"{name}.npz", arr_0=rng.integers(0, high, (20, 8, 8, 3), np.uint8))
    files = {name: str(tmp_path / name) for name in ("a.npz", "b.npz", "real.npz", "o.json", "o.csv", "kept", "s.npz")}
    common = ["--reference", files["real.npz"], "--detector", plan.detector.opens, "--features", files["kept"]]
    outputs = ["--json", files["o.json"], "--csv", files["o.csv"], "--save-reference", files["s.npz"]]
    assert cli.main(["score", files["a.npz"], files["b.npz"], *common, *outputs, "--compare"]) == 0
    shown = capsys.readouterr().out
    assert "a.npz" in shown and "b.npz" in shown and "FD (cnn)" in shown and "FID" not in shown
    sets = json.loads((tmp_path / "o.json").read_text())["sets"]
    assert [one["samples"]["path"] for one in sets] == [files["a.npz"], files["b.npz"]]
    lines = (tmp_path / "o.csv").read_text().splitlines()
    assert len(lines) == 3 and lines[0].startswith("samples,count,") and "FD (cnn)" in lines[0]
    saved = ["--reference", files["s.npz"], *common[2:]]
    assert cli.main(["score", files["a.npz"], *saved, "--json", files["o.json"]]) == 0
    alone = json.loads((tmp_path / "o.json").read_text())
    assert alone["scores"] == pytest.approx(sets[0]["scores"], rel=1e-9)
    for file in (files["o.json"], files["s.npz"]):
        assert cli.main(["show", file]) == 0
