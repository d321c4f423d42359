"""What a shell or YAML makes of what is written: paths are expanded in every key alike, no word changes silently."""

import re
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from haste import config
from haste.config.keys import Place, expanded
from haste.config.schema import Config, Evaluate, Run

PLACES = {
    "results": lambda raw, path: raw.update(results=path),
    "images.path": lambda raw, path: raw["images"].update(source="folder", path=path),
    "images.labels": lambda raw, path: raw["images"].update(source="folder", path="/x", labels=path),
    "images.captions": lambda raw, path: raw["images"].update(source="folder", path="/x", captions=path),
    "autoencoder.pretrained.encode": lambda raw, path: raw.update(
        autoencoder={"pretrained": {"encode": path, "factor": 2}}
    ),
    "autoencoder.pretrained.decode": lambda raw, path: raw.update(
        autoencoder={"pretrained": {"encode": "x/y", "decode": path, "factor": 2}}
    ),
    "teachers.vit.pretrained.name": lambda raw, path: raw["teachers"].update(vit={"pretrained": {"name": path}}),
    "teachers.vit.pretrained.weights": lambda raw, path: raw["teachers"].update(
        vit={"pretrained": {"name": "DINOv2-B", "weights": path}}
    ),
    "detector.fid.pretrained.weights": lambda raw, path: raw.update(
        detector={"fid": {"pretrained": {"name": "inception", "weights": path}}}
    ),
    "detector.fid.reference": lambda raw, path: raw.update(
        detector={"fid": {"pretrained": {"name": "inception"}, "reference": path}}
    ),
    "runs.vanilla.warm_start.file": lambda raw, path: raw["runs"].update(vanilla={"warm_start": path}),
    "evaluate.theirs.checkpoint": lambda raw, path: raw.update(
        evaluate={"theirs": {"checkpoint": path, "model": "dot", "sampling": ["quick"], "step": 8}}
    ),
}


def at(found: Any, key: str) -> Any:
    for name in key.split("."):
        found = found[name] if isinstance(found, dict) else getattr(found, name)
    return found


@pytest.mark.parametrize("key", PLACES)
def test_home_and_variables_are_replaced_in_every_path_of_a_configuration(tiny, monkeypatch, key):
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.setenv("HOME", "/home/me")
    tiny["images"]["resolution"] = 32  # the least that inception reads
    for written, meant in (("~/a", "/home/me/a"), ("$SCRATCH/a", "/scratch/me/a"), ("${SCRATCH}/a", "/scratch/me/a")):
        PLACES[key](tiny, written)
        if key == "teachers.vit.pretrained.name":  # a folder is no name, which is the refusal
            with pytest.raises(ValueError, match=meant):
                config.resolve(tiny)
        else:
            assert at(config.resolve(tiny), key) == meant


@pytest.mark.parametrize("key", PLACES)
@pytest.mark.parametrize("word", ["$NOWHERE_SET", "${NOWHERE_SET}", "~nobody-at-all"])
def test_a_variable_that_is_not_set_is_refused_with_the_keys_path(tiny, key, word):
    PLACES[key](tiny, f"{word}/a")
    with pytest.raises(ValueError, match=re.escape(f"{key}: found '{word}/a', but {word} is not known here")):
        config.resolve(tiny)


def places(kind: type[BaseModel], above: str = "") -> set[str]:
    """The keys of a schema that are paths, by their names alone."""
    found = set()
    for name, field in kind.model_fields.items():
        if any(getattr(mark, "func", None) is expanded for mark in [*field.metadata, *marks(field.annotation)]):
            found.add(f"{above}{name}")
        for inner in (field.annotation, *get_args(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                found |= places(inner, f"{name}.")
    return found


def marks(kind: Any) -> list[Any]:
    return [*getattr(kind, "__metadata__", ()), *(mark for inner in get_args(kind) for mark in marks(inner))]


def test_no_path_of_the_schema_is_left_out_here():
    found = {name.rpartition(".")[2] for kind in (Config, Run, Evaluate) for name in places(kind)}
    assert found == {key.rpartition(".")[2] for key in PLACES}
    assert marks(Place)


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("name: x\nruns:\n  no: {}", 3, "no is False"),
        ("runs:\n  12:30: {}", 2, "12:30 is 750"),
        ("runs: {on: {}}", 1, "on is True"),
        ("runs: {~: {}}", 1, "~ is None"),
        ("runs: {0x10: {}}", 1, "0x10 is 16"),
        ("runs:\n  a: {seed: 010}", 2, "010 is 8"),
        ("runs:\n  a: {seed: 1:30}", 2, "1:30 is 90"),
        ("training: {lr: 0:30.5}", 1, "0:30.5 is 30.5"),
    ],
)
def test_what_yaml_takes_for_something_else_is_refused_with_its_line(tmp_path, text, line, said):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=re.escape(f"a.yaml: line {line}: {said} in YAML")):
        config.read(tmp_path / "a.yaml")


def test_the_same_words_in_quotes_and_numbers_as_people_write_them_are_kept(tmp_path):
    (tmp_path / "a.yaml").write_text("{'no': '010', '12:30': 0, 2: 1_000, 0.5: 1e-4, true: no, none: 0.05, x: '0:30'}")
    found = config.read(tmp_path / "a.yaml")
    assert found == {"no": "010", "12:30": 0, 2: 1000, 0.5: "1e-4", True: False, "none": 0.05, "x": "0:30"}


# ---- a configuration that extends another


def written(folder, **files):
    for name, text in files.items():
        path = folder / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


BASE = "name: base\ntitle: T\nimages: {resolution: 256, holdout: 0}\nruns: {a: {}}\nforks: {f: {}}\nevaluate: {e: {}}\n"


def test_a_file_takes_all_but_the_table_of_the_file_that_it_extends_and_its_own_keys_come_first(tmp_path):
    written(
        tmp_path,
        base=BASE,
        **{"deep/own": "extends: ../base.yaml\nname: own\nimages: {resolution: 512}\nruns: {b: {}}\n"},
    )
    expected = {"name": "own", "images": {"resolution": 512, "holdout": 0}, "runs": {"b": {}}}
    assert config.read(tmp_path / "deep" / "own.yaml") == expected
    (tmp_path / "deep" / "third.yaml").write_text("extends: own.yaml\nname: third\nimages: {holdout: 5}\n")
    found = config.read(tmp_path / "deep" / "third.yaml")
    assert found == {"name": "third", "images": {"resolution": 512, "holdout": 5}}


def test_a_workflow_has_the_same_and_what_its_command_line_says_comes_first(tmp_path):
    written(tmp_path, base=BASE, own="extends: base.yaml\nname: own\nruns: {b: {}}\n", more="runs: {c: {}}\n")
    files = [tmp_path / "own.yaml", tmp_path / "more.yaml"]
    given = {"extends": "base.yaml", "name": "own", "runs": {"b": {}, "c": {}}, "images": {"holdout": 7}}
    expected = {"name": "own", "runs": {"b": {}, "c": {}}, "images": {"resolution": 256, "holdout": 7}}
    assert config.of_workflow(given, files) == expected


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"own": "extends: gone.yaml"}, r"own\.yaml: extends: .*gone\.yaml: cannot be read \(No such file"),
        ({"own": "extends: 3"}, r"own\.yaml: extends: expected the path of a configuration.*; found 3"),
        ({"own": "extends: own.yaml"}, r"own\.yaml: extends: own\.yaml leads back to itself"),
        (
            {"own": "extends: a.yaml", "a": "extends: own.yaml"},
            r"own\.yaml: extends: .*a\.yaml: extends: own\.yaml leads",
        ),
        ({"own": "extends: a.yaml", "a": "x: 1\nx: 2"}, r"own\.yaml: extends: .*a\.yaml: line 2: key 'x' is already"),
        ({"own": "extends: $NOWHERE/a.yaml"}, r"\$NOWHERE is not known here"),
    ],
)
def test_what_cannot_be_extended_is_refused_by_the_files_names(tmp_path, files, said):
    written(tmp_path, **files)
    with pytest.raises(ValueError, match=said):
        config.read(tmp_path / "own.yaml")
