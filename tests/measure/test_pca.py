"""Pictures of principal components: of planted patterns, unchanged by rotation, of the right images, layer and grid."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from measure_cells import cells, tokens_of
from safetensors.torch import load_file
from toy_gradients import tapped

from haste.cli import main as cli
from haste.config import resolve
from haste.data import order
from haste.data.latents import Autoencoder, to_pixels
from haste.files.store import Store
from haste.measure import passes
from haste.measure.measure import read
from haste.measure.pca import coloured
from haste.teachers import targets

PCA = {"measure": "pca", "images": 3, "t": [0.25, 0.75], "layers": [1, 3]}


def written_out(tokens):
    """Levels of the first three principal components of tokens (B, N, D), by a singular value decomposition."""
    flat = np.asarray(tokens, np.float64).reshape(-1, np.shape(tokens)[-1])
    flat = flat - flat.mean(0)
    scores = flat @ np.linalg.svd(flat, full_matrices=False)[2][:3].T
    for column in scores.T:
        column *= np.sign(column[np.abs(column).argmax()])
    return (255 * (scores - scores.min(0)) / np.ptp(scores, axis=0)).reshape(*np.shape(tokens)[:-1], 3)


def planted(seed, noise=0.05):
    """Tokens of 2 images of 6 x 8: three smooth maps of falling size along orthogonal directions, and noise."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:6, 0:8] / 8
    maps = [np.stack([np.cos(3 * x + i) * 4, np.sin(4 * y + i) * 2, np.cos(5 * (x + y) + i)], -1) for i in (0, 1)]
    directions = np.linalg.qr(random.normal(size=(20, 20)))[0][:3]
    tokens = np.stack(maps).reshape(2, 48, 3) @ directions + noise * random.normal(size=(2, 48, 20)) + 7
    return np.float32(tokens), np.stack(maps)


def test_planted_maps_are_the_colours_up_to_sign_and_the_furthest_token_is_bright():
    tokens, maps = planted(0)
    pictures, explained = coloured(tokens, (6, 8))
    assert [one.shape for one in pictures] == [(6, 8, 3)] * 2 and 0.98 < explained < 1
    found = np.stack(pictures).reshape(-1, 3) / 255
    assert found.min() == 0 and found.max() == 1
    scores = written_out(tokens).reshape(-1, 3) / 255
    np.testing.assert_allclose(found, scores, atol=1.01 / 255)
    first = maps[..., 0].ravel() - maps[..., 0].mean()  # by far the largest: it is the first component alone
    first *= np.sign(first[np.abs(first).argmax()])
    assert np.corrcoef(found[:, 0], first)[0, 1] > 0.99


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_rotation_shift_and_scale_of_the_features_change_no_picture(seed):
    tokens, _ = planted(seed)
    random = np.random.default_rng(seed)
    turned = np.float32(tokens @ np.linalg.qr(random.normal(size=(20, 20)))[0] * 3 + random.normal(size=20))
    one, other = (np.stack(coloured(some, (6, 8))[0]).astype(int) for some in (tokens, turned))
    assert np.abs(one - other).max() <= 1


def test_a_picture_shows_the_decoded_images_beside_their_tokens_and_a_teacher_s(toy, measured, monkeypatch):
    plan = toy(pca=PCA | {"beside": ["vit"]})
    found = measured(plan, "pca")
    with Store.open(plan.images.folder) as images, Store.open(plan.latents.folder) as latents:
        held_out = images.range("held_out")
        chosen = held_out.start + order.choice(0, "measured images", 0, 3, len(held_out))
        mean, std = torch.from_numpy(latents.read("moments", chosen)).float().chunk(2, dim=1)
        n = torch.from_numpy(order.normals(0, "measured latent draw", 0, chosen.tolist(), mean.shape[1:]))
        decoded = to_pixels(Autoencoder.load(plan.decoder).decode(mean + std * n, scale=1.0, shift=0.0)).numpy()
        seen = targets.load_teacher(plan, "vit")(torch.from_numpy(images.read("image", chosen)), features=True)
    assert [one["title"] for one in found["pictures"]] == ["t 0.25", "t 0.75"]
    tensors = load_file(plan.path(plan.state("plain", 8)))
    for t, picture in zip((0.25, 0.75), found["pictures"], strict=True):
        assert picture["columns"] == ["image", "1", "3", "vit"]
        shown = cells(picture, 3)
        for cell, image in zip(shown["image"], decoded, strict=True):
            assert np.abs(tokens_of(cell, 8).astype(int) - image.reshape(-1, 3)).max() <= 1
        states = {f"{m}": [tapped(plan, tensors, i, t, f"tokens.{m}")[0].numpy() for i in chosen] for m in (1, 3)}
        for name, side, tokens in (("1", 4, states["1"]), ("3", 4, states["3"]), ("vit", 2, seen.features)):
            levels = np.stack([tokens_of(cell, side) for cell in shown[name]])
            np.testing.assert_allclose(levels, written_out(tokens), atol=1.01)
    assert found["teachers"]["vit"]["explained"] <= 1 and len(found["rows"]) == 4
    assert found["provenance"]["inputs"].keys() == {"latents", "teacher vit", "decoder"}
    shutil.rmtree(Path(plan.root, "measures"))
    monkeypatch.setattr(passes, "AT_ONCE", 1)
    for one, other in zip(found["pictures"], measured(plan, "pca")["pictures"], strict=True):
        pairs = zip(cells(one, 3).values(), cells(other, 3).values(), strict=True)
        assert max(np.abs(np.subtract(a, b, dtype=int)).max() for a, b in pairs) <= 1


def test_pictures_are_written_beside_what_is_said_and_a_damaged_one_is_refused(world, capsys, tmp_path):
    runs = {"HASTE": {"alignment": "HASTE", "measures": ["pca"]}}
    world.configure(measures={"pca": PCA | {"layers": [2]}}, runs=runs)
    what = next(one.measurement for one in world.plan.measured if one.step == 8)
    files = world.plan.measured_from(what)
    assert set(world.plan.autoencoder.files) < set(files) and not any("teacher" in file for file in files)
    written = tmp_path / "pictures"
    for more in ([], ["--pictures", str(written)]):
        assert cli.main(["measure", "pca", what.name, "-c", str(world.file), *more]) == 0
    assert "2 pictures: --pictures FOLDER writes them" in capsys.readouterr().out
    assert sorted(path.name for path in written.iterdir()) == ["pca-t-0.25.png", "pca-t-0.75.png"]
    found = json.loads(Path(what.file).read_text())
    found["pictures"][1]["png"] = found["pictures"][1]["png"][:-64]
    Path(what.file).write_text(json.dumps(found))
    with pytest.raises(ValueError, match=rf"{what.file}: damaged or edited: the picture 't 0.75' is no PNG"):
        read(what.file)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"images": 17}, "measures.it.images: Input should be less than or equal to 16"),
        ({"beside": ["vot"]}, "measures.it.beside: vot, expected teachers; did you mean 'vit'?"),
        ({"beside": ["vit", "vit"]}, "measures.it: beside ['vit', 'vit'] has a value more than once"),
        ({"layers": [3]}, "measures.it.layers: [3], expected of those that dot has, 1 to 2"),
    ],
)
def test_what_has_no_picture_is_refused_by_its_key(tiny, spec, words):
    with pytest.raises(ValueError) as refused:
        resolve({**tiny, "measures": {"it": {"measure": "pca", **spec}}, "runs": {"plain": {"measures": ["it"]}}})
    assert words in str(refused.value)
