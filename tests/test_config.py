"""The configuration refuses what cannot run, with the path, what was found and what was expected."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from haste import config

TINY = yaml.safe_load(Path(__file__).with_name("tiny.yaml").read_text())


def changed(raw, path, value):
    """The configuration with one entry set; a path that ends in "-" removes it."""
    *folders, last = path.split(".")
    part = raw
    for name in folders:
        part = part.setdefault(name, {})
    part[last] = value
    return raw


REFUSALS = [
    ("imagess", {}, ["imagess: unknown key", "did you mean 'images'"]),
    ("images.resolutoin", 8, ["images.resolutoin: unknown key", "'resolution'"]),
    ("autoencoder.trained.stepz", 8, ["autoencoder.trained.stepz: unknown key", "'steps'"]),
    ("teachers.vit.trained.widht", 8, ["teachers.vit.trained.widht: unknown key", "'width'"]),
    ("alignments.REPA.features.deth", 8, ["alignments.REPA.features.deth: unknown key", "'depth'"]),
    ("runs.vanilla", {"milestone": [3]}, ["runs.vanilla.milestone: unknown key", "'milestones'"]),
    ("runs.HASTE.stop", {"feature": 3}, ["runs.HASTE.stop.feature: unknown key", "'features'"]),
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
    ("alignments.HASTE.attention.teacher_layers", [0, 1], ["[0]", "[0, 1]", "pair up"]),
    ("alignments.HASTE.attention.heads", 3, ["alignments.HASTE.attention.heads: 3", "has 2"]),
    ("alignments.REPA.features.teacher", "vitt", ["'vitt'", "did you mean 'vit'"]),
    ("alignments.REPA.features.depth", None, ["dot has no published mapping", "1 to 2"]),
    ("images.resolution", 9, ["images.resolution: 9", "factor 2"]),
    ("images.resolution", "big", ["images.resolution", "'big'"]),
    ("models.dot.patch_size", 3, ["runs.vanilla.model", "patches of 3"]),
    ("models.dot.heads", 3, ["models.dot", "width 16", "heads 3"]),
    ("autoencoder.pretrained", {"encode": "x"}, ["autoencoder", "exactly one of trained and pretrained"]),
    ("training.ema", 1.0, ["training.ema", "less than 1"]),
    ("training.batch", 0, ["training.batch", "0"]),
    ("training.batch", True, ["training.batch", "True"]),
    ("name", "../elsewhere", ["name", "../elsewhere"]),
]


@pytest.mark.parametrize(("path", "value", "words"), REFUSALS, ids=[f"{p}={v}" for p, v, _ in REFUSALS])
def test_a_bad_entry_is_refused_with_its_path_and_what_was_expected(tiny, path, value, words):
    with pytest.raises(ValueError) as refusal:
        config.resolve(changed(tiny, path, value))
    for word in words:
        assert word in str(refusal.value)


def test_all_faults_are_told_at_once(tiny):
    tiny["imagess"], tiny["training"]["bach"] = {}, 3
    with pytest.raises(ValueError, match=r"(?s)bach.*imagess"):
        config.resolve(tiny)


def test_a_resolved_configuration_resolves_to_itself(tiny):
    once = config.resolve(tiny)
    assert config.resolve(once.model_dump(mode="json")) == once


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
