"""Rows of teacher targets: what is in them, how large they are, and the components of features."""

import numpy as np
import pytest
import timm
import torch
from sklearn import decomposition
from timm.models.vision_transformer import VisionTransformer

from haste import config
from haste.align.losses import TeacherTargets
from haste.plan.target_spec import Shape, TargetSpec, bytes_per_image
from haste.teachers import targets
from haste.teachers.encoder import TEACHERS, Teacher

TEACHER_LAYERS = TargetSpec((None,), attention=((0, 1), (2, 3)))


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(3)
    network = VisionTransformer(img_size=8, patch_size=4, embed_dim=12, depth=3, num_heads=3, num_classes=0)
    return Teacher(network, identity="abc", norm=((0.5,) * 3, (0.5,) * 3))


@pytest.fixture(scope="module")
def images():
    return torch.from_numpy(np.random.default_rng(5).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8))


def features_of(seed, *shape):
    """Features with directions of very different variance, not centred."""
    draw = np.random.default_rng(seed)
    mixed = draw.standard_normal(shape) @ np.diag(2.0 ** -np.arange(shape[-1])) @ draw.standard_normal((shape[-1],) * 2)
    return torch.from_numpy(mixed + draw.standard_normal(shape[-1])).float()


def test_rows_are_what_the_teacher_says_to_half_precision_and_as_large_as_planned(teacher, images):
    layout = TEACHER_LAYERS.layout(targets.shape_of(teacher), None)
    rows = targets.rows(teacher, images, TEACHER_LAYERS, None, first=0)
    assert {name: (value.shape[1:], value.dtype.name) for name, value in rows.items()} == layout
    assert sum(value[0].nbytes for value in rows.values()) == bytes_per_image(
        TEACHER_LAYERS, targets.shape_of(teacher), None
    )
    said = teacher(images, features=True, attention=[0, 2])
    nothing = TeacherTargets(None, {}, teacher.grid)
    stored = targets.merged(nothing, {name: torch.from_numpy(value) for name, value in rows.items()})
    half = {"rtol": 2.0**-11, "atol": 1e-7, "check_dtype": False}
    torch.testing.assert_close(stored.features, said.features, **half)
    for layer, heads in TEACHER_LAYERS.attention:
        for found, expected in zip(stored.attention[layer], said.attention[layer], strict=True):
            torch.testing.assert_close(found, expected[:, :heads], **half)
    assert stored.grid == said.grid


def test_a_target_beyond_half_precision_is_refused_with_its_image(teacher, images):
    class Loud(Teacher):
        def __call__(self, *given, **asked):
            seen = super().__call__(*given, **asked)
            seen.attention[2][1][4] *= 1e9
            return seen

    loud = Loud(teacher.network, identity="abc", norm=((0.5,) * 3, (0.5,) * 3))
    with pytest.raises(ValueError, match=r"keys\.2 of image 104 are not finite in float16"):
        targets.rows(loud, images, TEACHER_LAYERS, None, first=100)


def test_components_are_those_of_scikit_learn_with_signs_of_our_own():
    features = features_of(1, 40, 5, 7)
    basis, explained = targets.fit_pca(features.split(9), 3)
    oracle = decomposition.PCA(3, svd_solver="full").fit(features.flatten(0, 1).double().numpy())
    np.testing.assert_allclose(basis.mean, oracle.mean_, rtol=1e-5, atol=1e-6)
    assert explained == pytest.approx(oracle.explained_variance_ratio_.sum(), rel=1e-5)
    signs = np.sign((basis.components.numpy() * oracle.components_).sum(1, keepdims=True))
    np.testing.assert_allclose(basis.components, signs * oracle.components_, atol=1e-4)
    assert all(row[row.abs().argmax()] > 0 for row in basis.components)
    expected = signs.T * oracle.transform(features[0].double().numpy())
    np.testing.assert_allclose(basis.project(features[:1])[0], expected, atol=1e-3)


def test_components_do_not_depend_on_how_the_images_are_cut_into_batches():
    features = features_of(2, 30, 4, 6)
    whole, cut = (targets.fit_pca(features.split(size), 4)[0] for size in (30, 7))
    torch.testing.assert_close(whole.components, cut.components, atol=1e-6, rtol=0)


def test_components_are_read_back_and_a_changed_file_is_refused(tmp_path):
    basis, explained = targets.fit_pca([features_of(3, 9, 4, 6)], 2)
    basis.save(tmp_path / "pca", explained, {"name": "x"})
    found = targets.PCA.load(tmp_path / "pca")
    assert torch.equal(found.components, basis.components) and found.identity == basis.identity
    path = tmp_path / "pca" / targets.BASIS
    path.write_bytes(path.read_bytes()[:-4] + b"\1\2\3\4")
    with pytest.raises(ValueError, match=r"basis\.safetensors: found components \w+, expected \w+"):
        targets.PCA.load(tmp_path / "pca")
    path.write_bytes(b"rubbish")
    with pytest.raises(ValueError, match=r"basis\.safetensors: expected principal components"):
        targets.PCA.load(tmp_path / "pca")


def test_more_components_than_features_are_wide_are_refused():
    with pytest.raises(ValueError, match="9 asked for, but features have a width of 6"):
        targets.fit_pca([features_of(3, 9, 4, 6)], 9)


@pytest.mark.parametrize("name", config.TEACHERS)
def test_the_sizes_that_the_plan_reckons_with_are_those_of_the_networks(name):
    spec = TEACHERS[name]
    with torch.device("meta"):
        network = timm.create_model(spec.timm, img_size=spec.size, num_classes=0)
    assert (spec.width, spec.tokens(256)) == (network.embed_dim, network.patch_embed.num_patches)
    assert (spec.depth, spec.heads) == (len(network.blocks), network.blocks[0].attn.num_heads)


def test_imagenet_takes_what_arithmetic_says():
    """1.28 M images, DINOv2-B, fp16: 0.5 TB of features; 4 TB of queries and keys of four layers and 12 heads."""
    shape = Shape(tokens=256, width=768, heads=12, depth=12)
    images = 1_281_167
    assert images * bytes_per_image(TargetSpec((None,)), shape, None) == pytest.approx(0.504e12, rel=1e-3)
    four = TargetSpec(attention=tuple((layer, 12) for layer in (8, 9, 10, 11)))
    assert images * bytes_per_image(four, shape, None) == pytest.approx(4.03e12, rel=1e-3)
    assert images * bytes_per_image(TargetSpec((None,)), shape, 96) == pytest.approx(0.063e12, rel=1e-2)


def test_what_only_a_loaded_teacher_tells_is_refused_by_key_where_it_is_loaded(teacher, make_plan, monkeypatch):
    """Of timm's networks outside TEACHERS, whose depth and input nobody knows before."""
    public = {"pretrained": {"name": "vit_tiny_patch4_8"}, "filter": {"low_pass": 0.2}}
    features = {"teacher": "vit", "depth": 1, "hidden": 16, "layer": 3}
    plan = make_plan(teachers={"vit": public}, alignments={"A": {"features": features}}, runs={"a": {"alignment": "A"}})
    monkeypatch.setattr(Teacher, "load", lambda *_, **__: teacher)
    with pytest.raises(ValueError) as refused:
        targets.load_teacher(plan, "vit")
    assert "alignments.A.features.layer: [3], but vit has layers 0 to 2" in str(refused.value)
    assert "teachers.vit.filter.low_pass: 0.2 is below the first wave of its images of 8 px" in str(refused.value)
