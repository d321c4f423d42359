"""Bad input, the whole matrix: every row damages one thing of a finished world and runs the command that meets it.

The command must refuse: exit code 2, one message that names the thing, what was found and what was expected, and no
traceback. Nothing is lost: finished files are as they were, and nothing half-written has a final name.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import shutil
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import safetensors
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from haste import artefact, cli
from haste.data import store

ROOT = Path(__file__).parent.parent
TINY = yaml.safe_load(Path(__file__).with_name("tiny.yaml").read_text())
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


@dataclasses.dataclass(frozen=True)
class Case:
    """A row. name: what is wrong; damage: does it; command: meets it; words: what the message must have."""

    name: str
    damage: Callable[[Any], Any]
    command: Callable[[Any], list[Any]]
    words: list[str]


def refused(world: Any, case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    """Damage the world, run the command, and look at what it says and leaves."""
    case.damage(world)
    command = [str(part) for part in case.command(world)]
    before = world.files()
    capsys.readouterr()
    code = cli.main(command)
    message = capsys.readouterr().err.split(f"haste {command[0]}: ")[-1]
    assert code == 2, message
    assert "Traceback" not in message
    for word in case.words:
        assert word in message
    after = world.files()
    assert {name: after.get(name) for name in before} == before
    # What is new is kept aside for the next try, or whole: samples that no detector could look at.
    assert not {name for name in after.keys() - before.keys() if "/." not in name and not name.endswith(".npz")}


# ---- ways to damage a file


def cut(path: Path, share: float = 0.5) -> None:
    """Keep only the beginning of a file."""
    os.truncate(path, int(path.stat().st_size * share))


def edited(path: Path, **changes: Any) -> None:
    """Change entries of a JSON file; an entry that becomes None is taken out."""
    found = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in found.items() if value is not None}))


def attribute(path: Path, **changes: Any) -> None:
    """Change attributes of a shard, and let the manifest agree with its size."""
    with h5py.File(path, "r+") as file:
        for name, value in changes.items():
            file.attrs[name] = np.bytes_(value.encode()) if isinstance(value, str) else value
    manifest = path.parent / "manifest.json"
    shards = json.loads(manifest.read_text())["shards"]
    changed = [{**entry, "bytes": (path.parent / entry["file"]).stat().st_size} for entry in shards]
    edited(manifest, shards=changed)


def shard(folder: Path, number: int = 1) -> Path:
    """A shard of a store of two."""
    return store.shard_path(folder, number, 2)


def state_edited(path: Path, tensors: Callable[[dict], Any] = lambda found: None, **changes: Any) -> None:
    """Rewrite a state, whole and well-formed, with other tensors or other entries in its header."""
    with safetensors.safe_open(str(path), framework="pt") as file:
        header = json.loads(file.metadata()["haste"])
    found = load_file(path)
    tensors(found)
    header = {name: value for name, value in {**header, **changes}.items() if value is not None}
    save_file(found, path, metadata={"haste": json.dumps(header)})


def state_header(path: Path, text: str) -> None:
    """Give a state another header, whatever it is."""
    save_file(load_file(path), path, metadata={"haste": text})


def weights_edited(folder: Path, change: Callable[[dict], Any], file: str = "model.safetensors") -> None:
    """Change the weights of a part, and let its description agree with them."""
    path = folder / file
    found = load_file(path)
    change(found)
    save_file(found, path)
    edited(folder / "part.json", identity=artefact.file_identity(path))


def architecture_edited(folder: Path, **changes: Any) -> None:
    """Change what a part says of its network; None takes an entry out."""
    found = {**json.loads((folder / "part.json").read_text())["architecture"], **changes}
    edited(folder / "part.json", architecture={name: value for name, value in found.items() if value is not None})


def poisoned(world: Any) -> None:
    """Make the latents anew, well-formed in every way, with a NaN in every image."""
    made, old = world.plan.latents, store.Store.open(world.latents)
    rows = np.arange(old.count)
    moments, labels = old.read("moments", rows), old.read("label", rows)
    moments[:, 0, 0, 0] = np.nan
    manifest = old.manifest
    facts = {name: manifest[name] for name in ("classes", "images", "autoencoder", "channels", "scale", "shift")}
    facts |= {name: manifest[name] for name in ("factor", "size")}
    for number in range(2):
        span = store.shard_range(old.count, number, 2)
        store.write_shard(
            world.latents,
            kind="latents",
            key=made.key,
            recipe=made.recipe,
            shard=number,
            shards=2,
            total=old.count,
            fields={"moments": (moments.shape[1:], moments.dtype), "label": ((), "int64")},
            batches=[{"moments": moments[span.start : span.stop], "label": labels[span.start : span.stop]}],
            provenance={},
            facts=facts,
        )
    common = {"kind": "latents", "key": made.key, "recipe": made.recipe, "shards": 2}
    store.join(world.latents, **common, splits=manifest["splits"], provenance={})
    shutil.rmtree(world.root / "states")


# ---- commands


def plan(world: Any) -> list[Any]:
    return ["plan", "-c", world.file]


def train(world: Any) -> list[Any]:
    return ["train", world.last, "-c", world.file]


def sample(world: Any) -> list[Any]:
    shutil.rmtree(world.row().folder, ignore_errors=True)
    return ["sample", world.row().name, "-c", world.file]


def evaluate(world: Any) -> list[Any]:
    return ["evaluate", world.row().name, "-c", world.file]


def grid(world: Any) -> list[Any]:
    return ["grid", world.row().name, "-c", world.file]


def encode(world: Any) -> list[Any]:
    return ["latents", "--shard", 0, "-c", world.file]


def imported(world: Any) -> list[Any]:
    return ["import", world.folder / "theirs.pt", world.folder / "out.safetensors", "--heads", 2]


def rule(*words: Any) -> Callable[[Any], list[Any]]:
    return lambda world: [*words, "-c", world.file]


# ---- configurations, beyond the schema's own refusals


def text(content: str | bytes) -> Callable[[Any], Any]:
    """Replace the configuration by other text."""
    raw = content if isinstance(content, bytes) else content.encode()
    return lambda world: world.file.write_bytes(raw)


def entry(path: str, value: Any) -> Callable[[Any], Any]:
    """Set one entry of the configuration."""

    def damage(world: Any) -> None:
        raw = yaml.safe_load(world.file.read_text())
        part = raw
        *folders, last = path.split("/")
        for name in folders:
            part = part.setdefault(name, {})
        part[last] = value
        world.file.write_text(yaml.safe_dump(raw))

    return damage


# Nine lists of nine of the list before: 400 bytes that stand for a thousand million entries.
LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
)

CONFIGURATIONS = [
    Case("no file", lambda world: world.file.unlink(), plan, ["tiny.yaml: cannot be read (No such file"]),
    Case(
        "a folder", lambda world: (world.file.unlink(), world.file.mkdir()), plan, ["tiny.yaml: cannot be read (Is a"]
    ),
    Case("empty", text(""), plan, ["tiny.yaml: expected a mapping of keys, found NoneType"]),
    Case("bytes", text(os.urandom(64) + b"\xff"), plan, ["tiny.yaml: not YAML"]),
    Case("a tab", text("runs:\n\ta: {}\n"), plan, ["tiny.yaml: not YAML", "line 2"]),
    Case("python in it", text("name: !!python/object/apply:os.getcwd []\n"), plan, ["not YAML", "python/object"]),
    Case("a merge of nothing", text("<<: 3\nname: a\n"), plan, ["tiny.yaml: not YAML", "merg"]),
    Case("an alias of itself", text("runs: &a {x: *a}\n"), plan, ["tiny.yaml: ", "refers to itself"]),
    Case("aliases of aliases", text(LAUGHS), plan, ["tiny.yaml: ", "entries"]),
    Case("too deep YAML", text("name: " + "[" * 5000 + "]" * 5000), plan, ["tiny.yaml: ", "nested"]),
    Case("too deep JSON", text('{"name": ' + "[" * 90000 + "]" * 90000 + "}"), plan, ["tiny.yaml: ", "nested"]),
    Case("a number without end", text("name: a\nimages: " + "9" * 5000), plan, ["tiny.yaml: ", "4300"]),
    Case(
        "half a pair in a name",
        text(json.dumps({**TINY, "title": "\ud800"})),
        plan,
        ["tiny.yaml: ", "surrogates not allowed"],
    ),
    Case("no results folder", entry("results", ""), plan, ["results: ", "''", "expected a folder"]),
    Case("results at the root", entry("results", "//"), plan, ["results: ", "'//'", "expected a folder"]),
    Case("a NUL in a path", entry("results", "a\0b"), plan, ["results: ", "'a\\x00b'", "expected a folder"]),
    Case(
        "a NUL in the images",
        entry("images", {**TINY["images"], "source": "folder", "path": "a\0b"}),
        plan,
        ["images.path: ", "'a\\x00b'"],
    ),
    Case(
        "results in a file",
        lambda world: entry("results", str(world.file))(world),
        rule("images", "--shard", 0),
        ["tiny.yaml", "Not a directory"],
    ),
    Case("a nameless run", entry("runs/", {"alignment": "HASTE"}), plan, ["runs: ", "''"]),
    Case("a run of two lines", entry("runs/a\nb", {"alignment": "HASTE"}), plan, ["runs: ", "'a\\nb'"]),
    Case(
        "no images folder",
        entry("images", {**TINY["images"], "source": "folder", "path": "/nowhere/at all"}),
        plan,
        ["/nowhere/at all: expected a folder of images, found nothing"],
    ),
]

# ---- stores

STORES = [
    Case(
        "images truncated",
        lambda w: cut(shard(w.images)),
        encode,
        ["shard-00001-of-00002.h5: found", "bytes, expected"],
    ),
    Case(
        "images foreign",
        lambda w: shard(w.images).write_bytes(b"x" * shard(w.images).stat().st_size),
        encode,
        ["shard-00001-of-00002.h5: expected an HDF5 images shard, found a truncated or foreign file"],
    ),
    Case(
        "images of another schema",
        lambda w: attribute(shard(w.images), schema=7),
        encode,
        ["shard-00001-of-00002.h5: schema 7 is newer than this version reads (1)"],
    ),
    Case(
        "images of another key",
        lambda w: attribute(shard(w.images), key="feedbeef0123"),
        encode,
        ["shard-00001-of-00002.h5: does not fit its manifest", "key: found 'feedbeef0123', expected"],
    ),
    Case(
        "an image shard missing",
        lambda w: shard(w.images).unlink(),
        encode,
        ["shard-00001-of-00002.h5: this shard is missing, expected"],
    ),
    Case(
        "a folder for a shard",
        lambda w: (shard(w.images).unlink(), shard(w.images).mkdir()),
        encode,
        ["shard-00001-of-00002.h5: this shard is missing"],
    ),
    Case(
        "the shards swapped",
        lambda w: (
            os.replace(shard(w.images, 0), w.images / "aside"),
            os.replace(shard(w.images), shard(w.images, 0)),
            os.replace(w.images / "aside", shard(w.images)),
        ),
        encode,
        ["shard-00000-of-00002.h5: "],
    ),
    Case(
        "a shard of the latents",
        lambda w: shutil.copy(shard(w.latents), shard(w.images)),
        encode,
        ["shard-00001-of-00002.h5: found", "truncated or replaced"],
    ),
    Case(
        "no manifest",
        lambda w: (w.images / "manifest.json").unlink(),
        encode,
        ["manifest.json: expected a store file, found FileNotFoundError"],
    ),
    Case(
        "half a manifest",
        lambda w: cut(w.images / "manifest.json"),
        encode,
        ["manifest.json: expected a store file, found broken JSON"],
    ),
    Case(
        "a manifest of another kind",
        lambda w: edited(w.images / "manifest.json", store="latents"),
        encode,
        ["manifest.json: a store of latents, expected images"],
    ),
    Case(
        "a manifest of a score",
        lambda w: edited(w.images / "manifest.json", kind="score"),
        encode,
        ["manifest.json: expected kind 'store', found 'score'"],
    ),
    Case(
        "a manifest of the latents",
        lambda w: shutil.copy(w.latents / "manifest.json", w.images),
        encode,
        ["manifest.json: a store of latents, expected images"],
    ),
    Case(
        "another recipe",
        lambda w: edited(w.images / "manifest.json", key="feedbeef0123"),
        encode,
        ["manifest.json: made by another recipe: found key feedbeef0123, expected"],
    ),
    Case(
        "a count edited",
        lambda w: edited(w.images / "manifest.json", count=1798),
        encode,
        ["does not fit its manifest", "total: found 1797, expected 1798"],
    ),
    Case(
        "an identity edited",
        lambda w: edited(w.images / "manifest.json", identity="0" * 64),
        encode,
        ["the shards' identity is", f"expected {'0' * 64}"],
    ),
    Case(
        "no splits",
        lambda w: edited(w.images / "manifest.json", splits=None),
        encode,
        ["manifest.json: not a manifest as `join` makes it; wrong or missing: ['splits']"],
    ),
    Case(
        "a split beyond the end",
        lambda w: edited(w.images / "manifest.json", splits={"train": [0, 9999]}),
        rule("detector"),
        ["manifest.json: ", "splits"],
    ),
    Case(
        "a split that is none",
        lambda w: edited(w.images / "manifest.json", splits={"train": "all"}),
        rule("detector"),
        ["manifest.json: ", "splits"],
    ),
    Case(
        "a split left out",
        lambda w: edited(w.images / "manifest.json", splits={"train": [0, 1700]}),
        rule("detector"),
        ["no split 'held_out', expected one of ['train']"],
    ),
    Case(
        "a field renamed",
        lambda w: edited(w.images / "manifest.json", fields={"picture": {"shape": [8, 8, 3], "dtype": "uint8"}}),
        encode,
        ["does not fit its manifest", "image: found", "picture: found"],
    ),
    Case(
        "a dtype that is none",
        lambda w: edited(
            w.images / "manifest.json",
            fields={"image": {"shape": [8, 8, 3], "dtype": "wood"}, "label": {"shape": [], "dtype": "int64"}},
        ),
        encode,
        ["image: found 'uint8 (8, 8, 3)', expected 'wood"],
    ),
    Case(
        "a key of the manifest lost",
        lambda w: edited(w.latents / "manifest.json", scale=None),
        train,
        ["does not fit its manifest: scale: found ", "expected None"],
    ),
    Case(
        "a scale in words",
        lambda w: edited(w.latents / "manifest.json", scale="big"),
        train,
        ["does not fit its manifest: scale: found ", "expected 'big'"],
    ),
    Case("latents truncated", lambda w: cut(shard(w.latents)), train, ["shard-00001-of-00002.h5: found"]),
    Case("a latents shard missing", lambda w: shard(w.latents).unlink(), train, ["this shard is missing"]),
    Case(
        "no latents at all",
        lambda w: shutil.rmtree(w.latents),
        train,
        ["manifest.json: expected a store file, found FileNot"],
    ),
    Case("NaN in latents", poisoned, train, ["latents-", "not finite"]),
    Case(
        "features of the samples truncated",
        lambda w: cut(Path(w.row().features.shard_files[0])),
        evaluate,
        ["shard-00000-of-00001.h5: expected an HDF5 features shard, found a truncated"],
    ),
    Case(
        "features of the samples gone",
        lambda w: shutil.rmtree(w.row().features.folder),
        evaluate,
        ["shard-00000-of-00001.h5: this shard is missing"],
    ),
    Case(
        "a reference by another detector",
        lambda w: edited(w.reference / "manifest.json", detector="0" * 64),
        rule("floor"),
        ["does not fit its manifest: detector: found ", "expected '0000"],
    ),
    Case(
        "samples truncated",
        lambda w: cut(Path(w.row().sample_file(0))),
        grid,
        ["shard-00000-of-00001.npz: expected samples, found a truncated or foreign file"],
    ),
    Case(
        "samples of a stranger",
        lambda w: np.savez(w.row().sample_file(0), pictures=np.zeros(3)),
        grid,
        ["shard-00000-of-00001.npz: expected samples", "arr_0"],
    ),
    Case(
        "samples pickled",
        lambda w: np.savez(w.row().sample_file(0), arr_0=np.array([{}], object)),
        grid,
        ["shard-00000-of-00001.npz: expected samples", "allow_pickle"],
    ),
    Case(
        "samples of another shape",
        lambda w: np.savez(w.row().sample_file(0), arr_0=np.zeros((20, 8), "u1"), arr_1=np.zeros(20, int)),
        grid,
        ["shard-00000-of-00001.npz: images of shape (20, 8)"],
    ),
    Case(
        "samples without their labels",
        lambda w: np.savez(w.row().sample_file(0), arr_0=np.zeros((20, 8, 8, 3), "u1"), arr_1=np.zeros(3, int)),
        grid,
        ["shard-00000-of-00001.npz: ", "labels of shape (3,)"],
    ),
    Case("a score truncated", lambda w: cut(Path(w.row().score)), rule("table"), ["broken JSON"]),
    Case(
        "a score without scores",
        lambda w: edited(Path(w.row().score), scores=None),
        rule("table"),
        [".json: ", "'scores'"],
    ),
]

# ---- states


def other_shape(found: dict) -> None:
    for kind in ("model", "ema"):
        found[f"{kind}/blocks.0.attn.qkv.weight"] = torch.zeros(3, 3)


STATES = [
    Case(
        "truncated", lambda w: cut(w.state), train, ["step-00000008.safetensors: expected a state, found a truncated"]
    ),
    Case(
        "truncated, sampled", lambda w: cut(w.state), sample, ["step-00000008.safetensors: expected a state, found a t"]
    ),
    Case("empty", lambda w: w.state.write_bytes(b""), sample, ["step-00000008.safetensors: expected a state"]),
    Case(
        "foreign",
        lambda w: w.state.write_bytes(b"\x80\x02" + b"x" * 100),
        sample,
        ["step-00000008.safetensors: expected a st"],
    ),
    Case("missing", lambda w: w.state.unlink(), sample, ["step-00000008.safetensors: this state is missing"]),
    Case(
        "a folder",
        lambda w: (w.state.unlink(), w.state.mkdir()),
        sample,
        ["step-00000008.safetensors: expected a state"],
    ),
    Case(
        "bare weights",
        lambda w: save_file({"x": torch.zeros(2)}, w.state),
        sample,
        ["step-00000008.safetensors: expected kind 'state', found 'a foreign file'"],
    ),
    Case(
        "a header that is no JSON",
        lambda w: state_header(w.state, "{"),
        sample,
        ["expected kind 'state', found 'a foreign"],
    ),
    Case(
        "a header that is a list",
        lambda w: state_header(w.state, "[1]"),
        sample,
        ["expected kind 'state', found 'a foreign"],
    ),
    Case(
        "of another schema", lambda w: state_edited(w.state, schema=9), sample, ["schema 9 is newer than this version"]
    ),
    Case(
        "of another kind",
        lambda w: state_edited(w.state, kind="weights"),
        sample,
        ["expected kind 'state', found 'weights'"],
    ),
    Case(
        "of another trajectory",
        lambda w: state_edited(w.state, key="0123"),
        sample,
        ["a state of trajectory 0123, expected"],
    ),
    Case(
        "of another trajectory, trained on",
        lambda w: state_edited(w.state, key="0123"),
        train,
        ["a state of trajectory 0123, expected"],
    ),
    Case(
        "of another shape",
        lambda w: state_edited(w.state, other_shape),
        train,
        ["does not fit the model", "blocks.0.attn.qkv.weight (found (3, 3), expected (48, 16))"],
    ),
    Case(
        "of another shape, sampled",
        lambda w: state_edited(w.state, other_shape),
        sample,
        ["does not fit the model", "blocks.0.attn.qkv.weight (found (3, 3), expected (48, 16))"],
    ),
    Case(
        "a weight missing",
        lambda w: state_edited(w.state, lambda t: t.pop("ema/blocks.1.mlp.fc1.bias")),
        sample,
        ["does not fit the model", "ema/blocks.1.mlp.fc1.bias (found nothing, expected (64,))"],
    ),
    Case(
        "a weight too many",
        lambda w: state_edited(w.state, lambda t: t.update({"ema/blocks.7.x": torch.ones(2)})),
        sample,
        ["does not fit the model", "ema/blocks.7.x (found (2,), expected nothing)"],
    ),
    Case(
        "NaN in the average",
        lambda w: state_edited(w.state, lambda t: t["ema/final_layer.linear.bias"].fill_(float("nan"))),
        sample,
        ["step-00000008.safetensors", "ema/final_layer.linear.bias", "not finite"],
    ),
    Case(
        "an optimiser that forgot",
        lambda w: state_edited(w.state, lambda t: [t.pop(n) for n in list(t) if "exp_avg/" in n]),
        train,
        ["does not fit the model", "optimizer/exp_avg/"],
    ),
    Case("no recipe", lambda w: state_edited(w.state, recipe=None), sample, ["step-00000008.safetensors", "recipe"]),
    Case("no inputs", lambda w: state_edited(w.state, inputs=None), sample, ["step-00000008.safetensors", "inputs"]),
    Case(
        "no inputs, trained on",
        lambda w: state_edited(w.state, inputs=None),
        train,
        ["step-00000008.safetensors", "inputs"],
    ),
    Case("no step", lambda w: state_edited(w.state, step=None), train, ["step-00000008.safetensors", "step"]),
    Case("another step", lambda w: state_edited(w.state, step=9), train, ["step-00000008.safetensors", "step 9", "8"]),
    Case(
        "no provenance",
        lambda w: state_edited(w.state, provenance=None),
        train,
        ["step-00000008.safetensors", "provenance"],
    ),
    Case(
        "a recipe of another model",
        lambda w: state_edited(w.state, recipe={"model": {"depth": 1}}),
        sample,
        ["step-00000008.safetensors: damaged or edited: its recipe is not that of trajectory"],
    ),
    Case(
        "of other latents",
        lambda w: state_edited(w.state, inputs={"latents": "0" * 64}),
        sample,
        ["holds latents", "but the state was trained on 000000000000"],
    ),
    Case("no such step", lambda w: None, rule("train", "x/00000008"), ["state 'x/00000008': expected TRAJECTORY/STEP"]),
]

# ---- checkpoints of others


class Shell:
    """What a pickle holds that runs code."""

    def __reduce__(self):
        return os.system, ("touch /tmp/this-was-run",)


def theirs(change: Callable[[dict], Any]) -> Callable[[Any], Any]:
    """Change the exported .pt."""

    def damage(world: Any) -> None:
        path = world.folder / "theirs.pt"
        with torch.serialization.safe_globals([argparse.Namespace]):
            found = torch.load(path, weights_only=True)
        change(found)
        torch.save(found, path)

    return damage


def their_file(world: Any) -> Path:
    return world.folder / "theirs.pt"


CHECKPOINTS = [
    Case(
        "truncated",
        lambda w: cut(their_file(w)),
        imported,
        ["theirs.pt: expected a checkpoint, found a truncated or foreign"],
    ),
    Case(
        "empty",
        lambda w: their_file(w).write_bytes(b""),
        imported,
        ["theirs.pt: expected a checkpoint, found a truncated"],
    ),
    Case("missing", lambda w: their_file(w).unlink(), imported, ["theirs.pt: expected a checkpoint, found nothing"]),
    Case(
        "a folder",
        lambda w: (their_file(w).unlink(), their_file(w).mkdir()),
        imported,
        ["theirs.pt: expected a checkpoint, found a folder"],
    ),
    Case(
        "code", theirs(lambda t: t.update(hook=Shell())), imported, ["theirs.pt: refused", "system", "could run code"]
    ),
    Case(
        "a list",
        lambda w: torch.save([torch.zeros(2)], their_file(w)),
        imported,
        ["theirs.pt: expected a dictionary of weights, found list"],
    ),
    Case(
        "another shape",
        theirs(lambda t: t["ema"].update({"blocks.0.attn.qkv.weight": torch.zeros(3, 3)})),
        imported,
        ["theirs.pt: does not fit", "blocks.0.attn.qkv.weight (found (3, 3), expected (48, 16))"],
    ),
    Case(
        "a key missing",
        theirs(lambda t: t["ema"].pop("blocks.1.mlp.fc1.bias")),
        imported,
        ["missing: blocks.1.mlp.fc1.bias"],
    ),
    Case("a key too many", theirs(lambda t: t["ema"].update(extra=torch.ones(1))), imported, ["not known: extra"]),
    Case(
        "NaN",
        theirs(lambda t: t["ema"]["final_layer.linear.bias"].fill_(float("nan"))),
        imported,
        ["not finite: final_layer.linear.bias"],
    ),
    Case(
        "another objective",
        theirs(lambda t: setattr(t["args"], "prediction", "eps")),
        imported,
        ["predicts 'eps', expected velocity"],
    ),
    Case("unknown heads", lambda w: None, lambda w: imported(w)[:3], ["no published size", "heads"]),
    Case(
        "heads that do not divide",
        lambda w: None,
        lambda w: [*imported(w)[:3], "--heads", 3],
        ["3 heads do not divide its width 16"],
    ),
    Case("no heads", lambda w: None, lambda w: [*imported(w)[:3], "--heads", 0], ["theirs.pt: ", "heads"]),
    Case(
        "another model",
        lambda w: None,
        lambda w: [*imported(w)[:3], "--model", "SiT-B/2"],
        ["theirs.pt: not the model", "depth: found 2, expected 12"],
    ),
    Case(
        "the file is there",
        lambda w: (w.folder / "out.safetensors").write_text("mine"),
        imported,
        ["out.safetensors: is there already"],
    ),
    Case(
        "out under a file",
        lambda w: None,
        lambda w: [*imported(w)[:2], w.file / "out.safetensors", "--heads", 2],
        ["File exists", "tiny.yaml"],
    ),
    Case(
        "export of a broken state",
        lambda w: cut(w.state),
        lambda w: ["export", w.state, w.folder / "x.pt", "--format", "repa"],
        ["step-00000008.safetensors: expected a checkpoint, found a truncated"],
    ),
]

# ---- images


def pictures(spoil: Callable[[Path], Any]) -> Callable[[Any], Any]:
    """A folder of twelve pictures as the configuration's images, one of them spoilt."""

    def damage(world: Any) -> None:
        folder = world.folder / "pictures"
        folder.mkdir()
        for i in range(12):
            Image.new("RGB", (12, 10), (20 * i, 0, 0)).save(folder / f"{i:02d}.png")
        spoil(folder / "07.png")
        images = {"source": "folder", "path": str(folder), "resolution": 8, "classes": 1, "holdout": 3}
        world.configure(images=images)

    return damage


def png(width: int, height: int, colour: int = 2) -> bytes:
    """A PNG's beginning that promises so many pixels."""
    import zlib

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


def saved(image: Image.Image, kind: str) -> Callable[[Path], Any]:
    return lambda path: image.save(path, format=kind)


prepare = rule("images", "--shard", 0)
IMAGES = [
    Case("zero bytes", pictures(lambda p: p.write_bytes(b"")), prepare, ["07.png: not a picture that can be read"]),
    Case(
        "not a picture", pictures(lambda p: p.write_text("hello")), prepare, ["07.png: not a picture that can be read"]
    ),
    Case("half a picture", pictures(lambda p: cut(p)), prepare, ["07.png: not a picture that can be read"]),
    Case(
        "a bomb",
        pictures(lambda p: p.write_bytes(png(60000, 60000))),
        prepare,
        ["07.png: not a picture that can be read", "3600000000 pixels"],
    ),
    Case(
        "a picture of floats",
        pictures(saved(Image.new("F", (9, 9)), "TIFF")),
        prepare,
        ["07.png: not a picture", "not a picture that can be read"],
    ),
    Case(
        "a link to nothing",
        pictures(lambda p: (p.unlink(), p.symlink_to("nowhere.png"))),
        prepare,
        ["07.png: not a picture that can be read"],
    ),
    Case("a folder with a picture's name", pictures(lambda p: (p.unlink(), p.mkdir())), prepare, ["07.png"]),
    Case(
        "no pictures",
        pictures(lambda p: [other.unlink() for other in p.parent.iterdir()]),
        prepare,
        ["pictures: found no pictures, expected .png"],
    ),
    Case(
        "another number of classes",
        lambda w: (pictures(lambda p: None)(w), entry("images/classes", 3)(w)),
        prepare,
        ["images.classes: 3, but ", "has 1"],
    ),
    Case(
        "all held out",
        lambda w: (pictures(lambda p: None)(w), entry("images/holdout", 12)(w)),
        prepare,
        ["12 pictures to hold out of 12, expected 0..11"],
    ),
]

# ---- archives of samples


def archive(entries: dict[str, bytes], modes: dict[str, int] | None = None) -> Callable[[Any], Any]:
    """A zip of these entries; `modes` are file modes, of symbolic links say."""

    def damage(world: Any) -> None:
        with zipfile.ZipFile(world.folder / "samples.zip", "w") as file:
            for name, content in entries.items():
                about = zipfile.ZipInfo(name)
                about.external_attr = (modes or {}).get(name, 0o100644) << 16
                file.writestr(about, content)

    return damage


def picture(mode: str = "RGB", size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "PNG")
    return buffer.getvalue()


def npz(**arrays: Any) -> Callable[[Any], Any]:
    return lambda world: np.savez(world.folder / "samples.npz", **arrays)


def raw_npz(header: str, data: bytes = b"") -> Callable[[Any], Any]:
    """An .npz whose arr_0 has any header."""
    whole = header.encode() + b" " * (-(len(header) + 11) % 64) + b"\n"
    array = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(whole)) + whole + data

    def damage(world: Any) -> None:
        with zipfile.ZipFile(world.folder / "samples.npz", "w") as file:
            file.writestr("arr_0.npy", array)

    return damage


def scored(name: str) -> Callable[[Any], list[Any]]:
    return lambda world: ["score", world.folder / name, "--detector", world.detector, "--reference", world.images]


SHAPE = "{'descr': '%s', 'fortran_order': False, 'shape': %s, }"
ARCHIVES = [
    Case(
        "a zip that climbs out",
        archive({"../../climbed.png": b"x"}),
        scored("samples.zip"),
        ["samples.zip:../../climbed.png: "],
    ),
    Case(
        "an absolute name",
        archive({"/tmp/climbed.png": b"x"}),
        scored("samples.zip"),
        ["samples.zip:/tmp/climbed.png: "],
    ),
    Case(
        "a link in a zip",
        archive({"a.png": b"/etc/passwd"}, {"a.png": 0o120777}),
        scored("samples.zip"),
        ["samples.zip:a.png: cannot be read as an image"],
    ),
    Case(
        "no pictures in a zip",
        archive({"a.txt": b"x"}),
        scored("samples.zip"),
        ["samples.zip: found no images, expected"],
    ),
    Case(
        "half a zip",
        lambda w: (archive({"a.png": picture()})(w), cut(w.folder / "samples.zip")),
        scored("samples.zip"),
        ["samples.zip: expected a .zip"],
    ),
    Case(
        "no zip",
        lambda w: (w.folder / "samples.zip").write_bytes(b"PK"),
        scored("samples.zip"),
        ["samples.zip: expected a .zip"],
    ),
    Case(
        "a bomb in a zip",
        archive({"a.png": png(60000, 60000)}),
        scored("samples.zip"),
        ["samples.zip:a.png: ", "3600000000 pixels"],
    ),
    Case(
        "grey pictures",
        archive({"a.png": picture("L")}),
        scored("samples.zip"),
        ["samples.zip:a.png: mode L, expected RGB"],
    ),
    Case(
        "pictures of two sizes",
        archive({"a.png": picture(), "b.png": picture(size=(9, 9))}),
        scored("samples.zip"),
        ["samples.zip:b.png: ", "(9, 9)"],
    ),
    Case(
        "an .npz of floats",
        npz(arr_0=np.zeros((9, 8, 8, 3))),
        scored("samples.npz"),
        ["samples.npz: arr_0 holds float64, expected uint8"],
    ),
    Case(
        "an .npz of objects",
        npz(arr_0=np.array([{}], object)),
        scored("samples.npz"),
        ["samples.npz: arr_0 is pickled, which is never read"],
    ),
    Case("an .npz of something", npz(x=np.zeros(2)), scored("samples.npz"), ["samples.npz: ", "found x"]),
    Case(
        "half an .npz",
        lambda w: (npz(arr_0=np.zeros((9, 8, 8, 3), "u1"))(w), cut(w.folder / "samples.npz")),
        scored("samples.npz"),
        ["samples.npz: expected"],
    ),
    Case(
        "an .npz of fewer than none",
        raw_npz(SHAPE % ("|u1", "(-1, 8, 8, 3)")),
        scored("samples.npz"),
        ["samples.npz: arr_0 has shape (-1, 8, 8, 3)"],
    ),
    Case(
        "an .npz of too many",
        raw_npz(SHAPE % ("|u1", "(9, 8000000000, 8000000000, 3)")),
        scored("samples.npz"),
        ["samples.npz: "],
    ),
    Case("an .npz of no header", raw_npz("{" * 60), scored("samples.npz"), ["samples.npz: expected an .npz"]),
    Case("an .npz without images", raw_npz(SHAPE % ("|u1", "(0, 8, 8, 3)")), scored("samples.npz"), ["samples.npz: "]),
    Case("nothing", lambda w: None, scored("samples.npz"), ["samples.npz: no such file or folder"]),
]

# ---- weights of the small networks


def gone(name: str) -> Callable[[dict], Any]:
    return lambda found: found.pop(name)


def added(found: dict) -> None:
    found["extra.weight"] = torch.zeros(2)


def autoencoder_edited(world: Any, change: Callable[[dict], Any]) -> None:
    weights_edited(world.autoencoder, change, "diffusion_pytorch_model.safetensors")


WEIGHTS = [
    Case(
        "teacher: a key missing",
        lambda w: weights_edited(w.teacher, gone("pos_embed")),
        train,
        ["model.safetensors: these weights do not fit", "pos_embed"],
    ),
    Case(
        "teacher: a key too many",
        lambda w: weights_edited(w.teacher, added),
        train,
        ["model.safetensors: these weights do not fit", "extra.weight"],
    ),
    Case(
        "teacher: truncated",
        lambda w: cut(w.teacher / "model.safetensors"),
        train,
        ["model.safetensors: expected the weights"],
    ),
    Case(
        "teacher: no weights",
        lambda w: (w.teacher / "model.safetensors").unlink(),
        train,
        ["model.safetensors: expected the teacher's weights, found no file"],
    ),
    Case(
        "teacher: another part",
        lambda w: shutil.copy(w.detector / "part.json", w.teacher),
        train,
        ["part.json: expected a teacher, found 'detector'"],
    ),
    Case(
        "teacher: half a description",
        lambda w: cut(w.teacher / "part.json"),
        train,
        ["part.json: expected a part file, found broken JSON"],
    ),
    Case(
        "teacher: no identity",
        lambda w: edited(w.teacher / "part.json", identity=None),
        train,
        ["part.json: ", "identity"],
    ),
    Case(
        "teacher: no arguments", lambda w: architecture_edited(w.teacher, kwargs=None), train, ["part.json: ", "kwargs"]
    ),
    Case("teacher: no mean", lambda w: architecture_edited(w.teacher, mean=None), train, ["part.json: ", "mean"]),
    Case(
        "teacher: NaN",
        lambda w: weights_edited(w.teacher, lambda t: t["pos_embed"].fill_(float("nan"))),
        train,
        ["model.safetensors: the weights pos_embed are not finite"],
    ),
    Case(
        "detector: a key missing",
        lambda w: weights_edited(w.detector, gone("head.bias")),
        sample,
        ["model.safetensors: these weights do not fit", "head.bias"],
    ),
    Case(
        "detector: a key too many",
        lambda w: weights_edited(w.detector, added),
        sample,
        ["model.safetensors: these weights do not fit", "extra.weight"],
    ),
    Case(
        "detector: truncated",
        lambda w: cut(w.detector / "model.safetensors"),
        sample,
        ["model.safetensors: expected the weights"],
    ),
    Case(
        "detector: no identity",
        lambda w: edited(w.detector / "part.json", identity=None),
        sample,
        ["part.json: ", "identity"],
    ),
    Case("detector: no name", lambda w: edited(w.detector / "part.json", name=None), sample, ["part.json: ", "name"]),
    Case("detector: no width", lambda w: architecture_edited(w.detector, width=None), sample, ["part.json: ", "width"]),
    Case(
        "detector: a width in words",
        lambda w: architecture_edited(w.detector, width="8"),
        sample,
        ["part.json: ", "'8'"],
    ),
    Case(
        "detector: NaN",
        lambda w: weights_edited(w.detector, lambda t: t["head.bias"].fill_(float("nan"))),
        sample,
        ["model.safetensors: ", "head.bias", "not finite"],
    ),
    Case(
        "autoencoder: a key missing",
        lambda w: autoencoder_edited(w, gone("decoder.conv_in.bias")),
        encode,
        ["diffusion_pytorch_model.safetensors: the weights do not fit", "decoder.conv_in.bias"],
    ),
    Case(
        "autoencoder: a key too many",
        lambda w: autoencoder_edited(w, added),
        encode,
        ["diffusion_pytorch_model.safetensors: the weights do not fit", "extra.weight"],
    ),
    Case(
        "autoencoder: truncated",
        lambda w: cut(w.autoencoder / "diffusion_pytorch_model.safetensors"),
        encode,
        ["diffusion_pytorch_model.safetensors: cannot be loaded"],
    ),
    Case(
        "autoencoder: no weights",
        lambda w: (w.autoencoder / "diffusion_pytorch_model.safetensors").unlink(),
        encode,
        ["found no diffusion_pytorch_model.safetensors"],
    ),
    Case(
        "autoencoder: no configuration",
        lambda w: (w.autoencoder / "config.json").unlink(),
        encode,
        ["config.json: expected an AutoencoderKL configuration, found FileNotFoundError"],
    ),
    Case(
        "autoencoder: half a configuration",
        lambda w: cut(w.autoencoder / "config.json"),
        encode,
        ["config.json: expected an AutoencoderKL configuration, found JSONDecodeError"],
    ),
    Case(
        "autoencoder: a key of it lost",
        lambda w: edited(w.autoencoder / "config.json", block_out_channels="8"),
        encode,
        ["config.json: block_out_channels is '8', expected list"],
    ),
    Case(
        "autoencoder: a scale in words",
        lambda w: edited(w.autoencoder / "config.json", scaling_factor="big"),
        encode,
        ["config.json: ", "scaling_factor", "'big'"],
    ),
    Case(
        "autoencoder: NaN",
        lambda w: autoencoder_edited(w, lambda t: t["encoder.conv_in.bias"].fill_(float("nan"))),
        encode,
        ["latents of image 0 are not finite"],
    ),
    Case(
        "autoencoder: other weights than encoded",
        lambda w: autoencoder_edited(w, lambda t: t["decoder.conv_in.bias"].add_(1)),
        sample,
        ["its weights are", "but the latents were encoded with"],
    ),
    Case(
        "autoencoder: its quality lost",
        lambda w: edited(w.detector / "part.json", quality=None),
        rule("floor"),
        ["part.json: ", "quality"],
    ),
]


MATRIX = {
    "configuration": CONFIGURATIONS,
    "store": STORES,
    "state": STATES,
    "checkpoint": CHECKPOINTS,
    "image": IMAGES,
    "archive": ARCHIVES,
    "weights": WEIGHTS,
}
ROWS = [pytest.param(case, id=f"{kind}: {case.name}") for kind, cases in MATRIX.items() for case in cases]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", ROWS)
def test_it_is_refused_by_name_and_nothing_is_lost(world, case, capsys):
    refused(world, case, capsys)
