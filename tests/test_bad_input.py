"""Bad input, the whole matrix: every row damages one thing of a finished world and runs the command that meets it.

The command must refuse: exit code 2, one message that names the thing, what was found and what was expected, and no
traceback. Nothing is lost: finished files are as they were, and nothing half-written has a final name.

A row is what is wrong, what does it to the world (None: nothing, the command itself is wrong), and the words that the
message must have. Rows of one table meet the same command; `MATRIX` at the end names the tables.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import os
import shutil
import struct
import zipfile
import zlib
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

from haste.cli import main as cli
from haste.files import artefact, store

TINY = yaml.safe_load(Path(__file__).with_name("tiny.yaml").read_text())
Damage = Callable[[Any], Any] | None


def refused(
    world: Any, damage: Damage, command: Callable[[Any], list[Any]], words: tuple[str, ...], capsys: Any
) -> None:
    """Damage the world, run the command, and look at what it says and leaves."""
    if damage is not None:
        damage(world)
    asked = [str(part) for part in command(world)]
    before = world.files()
    capsys.readouterr()
    code = cli.main(asked)
    message = capsys.readouterr().err.split(f"haste {asked[0]}: ")[-1]
    assert code == 2, message
    assert "Traceback" not in message
    for word in words:
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


def on(file: Callable[[Any], Path], change: Callable[..., Any], *given: Any, **named: Any) -> Damage:
    """A change of one file of the world: change(file, *given, **named)."""
    return lambda world: change(file(world), *given, **named)


def both(*damages: Damage) -> Damage:
    """One after the other."""
    return lambda world: [damage(world) for damage in damages if damage]


def removed(path: Path) -> None:
    """Take a file or folder away."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def a_folder(path: Path) -> None:
    """A folder in the place of a file."""
    path.unlink()
    path.mkdir()


def filled(path: Path, content: bytes | str) -> None:
    """Other content."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def nan(name: str) -> Callable[[dict], Any]:
    """A tensor full of NaN."""
    return lambda found: found[name].fill_(float("nan"))


def gone(name: str) -> Callable[[dict], Any]:
    """A tensor too few."""
    return lambda found: found.pop(name)


def added(name: str) -> Callable[[dict], Any]:
    """A tensor too many."""
    return lambda found: found.update({name: torch.ones(2)})


# ---- commands


def rule(*words: Any) -> Callable[[Any], list[Any]]:
    """A command on the world's configuration."""
    return lambda world: [*words, "-c", world.file]


plan, encode, prepare = rule("plan"), rule("latents", "--shard", 0), rule("images", "--shard", 0)


def train(world: Any) -> list[Any]:
    return ["train", world.last, "-c", world.file]


def sample(world: Any) -> list[Any]:
    shutil.rmtree(world.row().folder, ignore_errors=True)
    return ["sample", world.row().name, "-c", world.file]


def measure(world: Any) -> list[Any]:
    return ["measure", "gradient-cosine", world.plan.state("HASTE", 8), "-c", world.file]


def evaluate(world: Any) -> list[Any]:
    return ["evaluate", world.row().name, "-c", world.file]


def grid(world: Any) -> list[Any]:
    return ["grid", world.row().name, "-c", world.file]


def imported(*options: Any, out: str = "out.safetensors") -> Callable[[Any], list[Any]]:
    return lambda world: ["import", world.folder / "theirs.pt", world.folder / out, *options]


def exported(world: Any) -> list[Any]:
    return ["export", world.state, world.folder / "x.pt", "--format", "repa"]


def scored(name: str) -> Callable[[Any], list[Any]]:
    return lambda world: ["score", world.folder / name, "--detector", world.detector, "--reference", world.images]


# ---- configurations, beyond the schema's own refusals


def text(content: str | bytes) -> Damage:
    """Replace the configuration by other text."""
    return on(configuration, filled, content)


def entry(path: str, value: Any) -> Damage:
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


def pictures_at(path: str) -> Damage:
    return entry("images", {**TINY["images"], "source": "folder", "path": path})


def configuration(world: Any) -> Path:
    return world.file


# Nine lists of nine of the list before: 400 bytes that stand for a thousand million entries.
LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
)
ALIGNED = {"alignment": "HASTE"}

CONFIGURATIONS = [
    ("no file", on(configuration, removed), "tiny.yaml: cannot be read (No such file"),
    ("a folder", on(configuration, a_folder), "tiny.yaml: cannot be read (Is a"),
    ("empty", text(""), "tiny.yaml: expected a mapping of keys, found NoneType"),
    ("bytes", text(os.urandom(64) + b"\xff"), "tiny.yaml: not YAML"),
    ("a tab", text("runs:\n\ta: {}\n"), "tiny.yaml: not YAML", "line 2"),
    ("python in it", text("name: !!python/object/apply:os.getcwd []\n"), "not YAML", "python/object"),
    ("a merge of nothing", text("<<: 3\nname: a\n"), "tiny.yaml: not YAML", "merg"),
    ("an alias of itself", text("runs: &a {x: *a}\n"), "tiny.yaml: ", "refers to itself"),
    ("aliases of aliases", text(LAUGHS), "tiny.yaml: ", "entries"),
    ("too deep YAML", text("name: " + "[" * 5000 + "]" * 5000), "tiny.yaml: ", "nested"),
    ("too deep JSON", text('{"name": ' + "[" * 90000 + "]" * 90000 + "}"), "tiny.yaml: ", "nested"),
    ("a number without end", text("name: a\nimages: " + "9" * 5000), "tiny.yaml: ", "4300"),
    ("half a pair in a name", text(json.dumps({**TINY, "title": "\ud800"})), "tiny.yaml: ", "surrogates not allowed"),
    ("no results folder", entry("results", ""), "results: ", "''", "expected a folder"),
    ("results at the root", entry("results", "//"), "results: ", "'//'", "expected a folder"),
    ("a NUL in a path", entry("results", "a\0b"), "results: ", "'a\\x00b'", "expected a folder"),
    ("a NUL in the images", pictures_at("a\0b"), "images.path: ", "'a\\x00b'"),
    ("a nameless run", entry("runs/", ALIGNED), "runs: ", "''"),
    ("a run of two lines", entry("runs/a\nb", ALIGNED), "runs: ", "'a\\nb'"),
    ("no images folder", pictures_at("/nowhere/at all"), "/nowhere/at all: expected a folder of images, found nothing"),
]
RESULTS = [
    ("results in a file", lambda w: entry("results", str(w.file))(w), "tiny.yaml", "Not a directory"),
]

# ---- stores

SHARD = "shard-00001-of-00002.h5"


def images(world: Any) -> Path:
    return shard(world.images)


def latents(world: Any) -> Path:
    return shard(world.latents)


def manifest(world: Any) -> Path:
    return world.images / "manifest.json"


def manifest_of_latents(world: Any) -> Path:
    return world.latents / "manifest.json"


def features(world: Any) -> Path:
    return Path(world.row().features.shard_files[0])


def samples(world: Any) -> Path:
    return Path(world.row().sample_file(0))


def score(world: Any) -> Path:
    return Path(world.row().score)


def swapped(world: Any) -> None:
    """The shards of the images, each under the other's name."""
    first, second = shard(world.images, 0), shard(world.images)
    os.replace(first, world.images / "aside")
    os.replace(second, first)
    os.replace(world.images / "aside", second)


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
        shard(world.latents, number).unlink()
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


def said(**changes: Any) -> Damage:
    """Another manifest of the images."""
    return on(manifest, edited, **changes)


def unmade(**changes: Any) -> Damage:
    """Another manifest of the images, on which the detector is still to be trained."""

    def damage(world: Any) -> None:
        said(**changes)(world)
        removed(world.detector)

    return damage


def drawn(**arrays: Any) -> Damage:
    """Other arrays in the place of the samples."""
    return lambda world: np.savez(samples(world), **arrays)


DRAWN = "shard-00000-of-00001.npz"
PICTURE = {"shape": [8, 8, 3], "dtype": "uint8"}
WOOD = {"image": {**PICTURE, "dtype": "wood"}, "label": {"shape": [], "dtype": "int64"}}
TWENTY = np.zeros((20, 8, 8, 3), "u1")

STORES = [
    ("images truncated", on(images, cut), f"{SHARD}: found", "bytes, expected"),
    (
        "images foreign",
        lambda w: filled(images(w), b"x" * images(w).stat().st_size),
        f"{SHARD}: expected an HDF5 images shard, found a truncated or foreign file",
    ),
    (
        "images of another schema",
        on(images, attribute, schema=7),
        f"{SHARD}: schema 7 is newer than this version reads (1)",
    ),
    (
        "images of another key",
        on(images, attribute, key="feedbeef0123"),
        f"{SHARD}: does not fit its manifest",
        "key: found 'feedbeef0123', expected",
    ),
    ("an image shard missing", on(images, removed), f"{SHARD}: this shard is missing, expected"),
    ("a folder for a shard", on(images, a_folder), f"{SHARD}: this shard is missing"),
    ("the shards swapped", swapped, "shard-00000-of-00002.h5: "),
    (
        "a shard of the latents",
        lambda w: shutil.copy(latents(w), images(w)),
        f"{SHARD}: found",
        "truncated or replaced",
    ),
    ("no manifest", on(manifest, removed), "manifest.json: expected a store file, found FileNotFoundError"),
    ("half a manifest", on(manifest, cut), "manifest.json: expected a store file, found broken JSON"),
    ("a manifest of another kind", said(store="latents"), "manifest.json: a store of latents, expected images"),
    ("a manifest of a score", said(kind="score"), "manifest.json: expected kind 'store', found 'score'"),
    (
        "a manifest of the latents",
        lambda w: shutil.copy(manifest_of_latents(w), manifest(w)),
        "manifest.json: a store of latents, expected images",
    ),
    (
        "another recipe",
        said(key="feedbeef0123"),
        "manifest.json: made by another recipe: found key feedbeef0123, expected",
    ),
    ("a count edited", said(count=1798), "does not fit its manifest", "total: found 1797, expected 1798"),
    ("an identity edited", said(identity="0" * 64), "the shards' identity is", f"expected {'0' * 64}"),
    ("no splits", said(splits=None), "manifest.json: not a manifest as `join` makes it; wrong or missing: ['splits']"),
    ("a field renamed", said(fields={"picture": PICTURE}), "not fit its manifest", "image: found", "picture: found"),
    ("a dtype that is none", said(fields=WOOD), "image: found 'uint8 (8, 8, 3)', expected 'wood"),
]
SPLITS = [
    ("a split beyond the end", unmade(splits={"train": [0, 9999]}), "manifest.json: ", "splits"),
    ("a split that is none", unmade(splits={"train": "all"}), "manifest.json: ", "splits"),
    ("a split left out", unmade(splits={"train": [0, 1700]}), "no split 'held_out', expected one of ['train']"),
]
SCALE = "does not fit its manifest: scale: found "
LATENTS = [
    ("a key of the manifest lost", on(manifest_of_latents, edited, scale=None), SCALE, "expected None"),
    ("a scale in words", on(manifest_of_latents, edited, scale="big"), SCALE, "expected 'big'"),
    ("latents truncated", on(latents, cut), f"{SHARD}: found"),
    ("a latents shard missing", on(latents, removed), "this shard is missing"),
    ("no latents at all", lambda w: removed(w.latents), "manifest.json: expected a store file, found FileNot"),
    ("NaN in latents", poisoned, "latents-", "not finite"),
]
FEATURES = [
    (
        "features of the samples truncated",
        on(features, cut),
        "shard-00000-of-00001.h5: expected an HDF5 features shard, found a truncated",
    ),
    ("features of the samples gone", on(features, removed), "shard-00000-of-00001.h5: this shard is missing"),
]
OTHER_DETECTOR = [
    (
        "a reference by another detector",
        lambda w: edited(w.reference / "manifest.json", detector="0" * 64),
        "does not fit its manifest: detector: found ",
        "expected '0000",
    ),
]
SAMPLES = [
    ("samples truncated", on(samples, cut), f"{DRAWN}: expected an .npz, found a truncated or foreign file"),
    ("samples of a stranger", drawn(pictures=np.zeros(3)), f"{DRAWN}: expected images under arr_0, found pictures"),
    ("samples pickled", drawn(arr_0=np.array([{}], object)), f"{DRAWN}: arr_0 is pickled, which is never read"),
    (
        "samples of another shape",
        drawn(arr_0=TWENTY[:, :, 0, 0], arr_1=np.zeros(20, int)),
        f"{DRAWN}: arr_0 has shape (20, 8), expected (N, H, W, 3)",
    ),
    ("samples without their labels", drawn(arr_0=TWENTY, arr_1=np.zeros(3, int)), f"{DRAWN}: ", "labels of shape (3,)"),
]
SCORES = [
    ("a score truncated", on(score, cut), "broken JSON"),
    ("a score without scores", on(score, edited, scores=None), ".json: ", "'scores'"),
]

# ---- states

STEP = "step-00000008.safetensors"
FOREIGN = "expected kind 'state', found 'a foreign"
UNFIT = "does not fit the model"
SHAPE = (UNFIT, "blocks.0.attn.qkv.weight (found (3, 3), expected (48, 16))")


def state(world: Any) -> Path:
    return world.state


def stated(tensors: Callable[[dict], Any] = lambda found: None, **changes: Any) -> Damage:
    """Another state, whole and well-formed."""
    return on(state, state_edited, tensors, **changes)


def other_shape(found: dict) -> None:
    for kind in ("model", "ema"):
        found[f"{kind}/blocks.0.attn.qkv.weight"] = torch.zeros(3, 3)


def without_moments(found: dict) -> None:
    for name in [name for name in found if "exp_avg/" in name]:
        del found[name]


STATES_MEASURED = [
    ("truncated, measured", on(state, cut), f"{STEP}: expected a state, found a t"),
    ("missing, measured", on(state, removed), f"{STEP}: this state is missing"),
    ("a weight missing, measured", stated(gone("model/blocks.1.mlp.fc1.bias")), UNFIT, "model/blocks.1.mlp.fc1.bias"),
    ("NaN, measured", stated(nan("model/final_layer.linear.bias")), "model/final_layer.linear.bias is not finite"),
    ("without features, and a teacher lost", on(lambda world: world.teacher, removed), "part.json: expected a part"),
]
STATES_SAMPLED = [
    ("truncated, sampled", on(state, cut), f"{STEP}: expected a state, found a t"),
    ("empty", on(state, filled, b""), f"{STEP}: expected a state"),
    ("foreign", on(state, filled, b"\x80\x02" + b"x" * 100), f"{STEP}: expected a st"),
    ("missing", on(state, removed), f"{STEP}: this state is missing"),
    ("a folder", on(state, a_folder), f"{STEP}: expected a state"),
    ("bare weights", lambda w: save_file({"x": torch.zeros(2)}, w.state), f"{STEP}: {FOREIGN} file'"),
    ("a header that is no JSON", on(state, state_header, "{"), FOREIGN),
    ("a header that is a list", on(state, state_header, "[1]"), FOREIGN),
    ("of another schema", stated(schema=9), "schema 9 is newer than this version"),
    ("of another kind", stated(kind="weights"), "expected kind 'state', found 'weights'"),
    ("of another trajectory", stated(key="0123"), "a state of trajectory 0123, expected"),
    ("of another shape, sampled", stated(other_shape), *SHAPE),
    (
        "a weight missing",
        stated(gone("ema/blocks.1.mlp.fc1.bias")),
        UNFIT,
        "ema/blocks.1.mlp.fc1.bias (found nothing, expected (64,))",
    ),
    ("a weight too many", stated(added("ema/blocks.7.x")), UNFIT, "ema/blocks.7.x (found (2,), expected nothing)"),
    (
        "NaN in the average",
        stated(nan("ema/final_layer.linear.bias")),
        STEP,
        "ema/final_layer.linear.bias",
        "not finite",
    ),
    ("no recipe", stated(recipe=None), STEP, "recipe"),
    ("no inputs", stated(inputs=None), STEP, "inputs"),
    (
        "a recipe of another model",
        stated(recipe={"model": {"depth": 1}}),
        f"{STEP}: damaged or edited: its recipe is not that of trajectory",
    ),
    (
        "of other latents",
        stated(inputs={"latents": "0" * 64}),
        "holds latents",
        "but the state was trained on 000000000000",
    ),
]
STATES_TRAINED_ON = [
    ("truncated", on(state, cut), f"{STEP}: expected a state, found a truncated"),
    ("of another trajectory, trained on", stated(key="0123"), "a state of trajectory 0123, expected"),
    ("of another shape", stated(other_shape), *SHAPE),
    ("an optimiser that forgot", stated(without_moments), UNFIT, "optimizer/exp_avg/"),
    ("no inputs, trained on", stated(inputs=None), STEP, "inputs"),
    ("no step", stated(step=None), STEP, "step"),
    ("another step", stated(step=9), STEP, "step 9", "8"),
    ("no provenance", stated(provenance=None), STEP, "provenance"),
]
NO_STATE = [("no such step", None, "state 'x/00000008': expected TRAJECTORY/STEP")]

# ---- checkpoints of others


class Shell:
    """What a pickle holds that runs code."""

    def __reduce__(self):
        return os.system, ("touch /tmp/this-was-run",)


def their_file(world: Any) -> Path:
    return world.folder / "theirs.pt"


def theirs(change: Callable[[dict], Any]) -> Damage:
    """Change the exported .pt."""

    def damage(world: Any) -> None:
        with torch.serialization.safe_globals([argparse.Namespace]):
            found = torch.load(their_file(world), weights_only=True)
        change(found)
        torch.save(found, their_file(world))

    return damage


def their_weights(change: Callable[[dict], Any]) -> Damage:
    return theirs(lambda found: change(found["ema"]))


CHECKPOINTS = [
    ("truncated", on(their_file, cut), "theirs.pt: expected a checkpoint, found a truncated file"),
    ("empty", on(their_file, filled, b""), "theirs.pt: expected a checkpoint, found an empty file"),
    ("missing", on(their_file, removed), "theirs.pt: expected a checkpoint, found nothing"),
    ("a folder", on(their_file, a_folder), "theirs.pt: expected a checkpoint, found a folder"),
    ("code", theirs(lambda t: t.update(hook=Shell())), "theirs.pt: refused", "system", "could run code"),
    (
        "a list",
        lambda w: torch.save([torch.zeros(2)], their_file(w)),
        "theirs.pt: expected a dictionary of weights, found list",
    ),
    (
        "another shape",
        their_weights(lambda t: t.update({"blocks.0.attn.qkv.weight": torch.zeros(3, 3)})),
        "theirs.pt: does not fit",
        SHAPE[1],
    ),
    ("a key missing", their_weights(gone("blocks.1.mlp.fc1.bias")), "missing: blocks.1.mlp.fc1.bias"),
    ("a key too many", their_weights(added("extra")), "not known: extra"),
    ("NaN", their_weights(nan("final_layer.linear.bias")), "not finite: final_layer.linear.bias"),
    (
        "another objective",
        theirs(lambda t: setattr(t["args"], "prediction", "eps")),
        "predicts 'eps', expected velocity",
    ),
    (
        "the file is there",
        lambda w: (w.folder / "out.safetensors").write_text("mine"),
        "out.safetensors: is there already",
    ),
]
UNKNOWN_HEADS = [("unknown heads", None, "no published size", "heads")]
THREE_HEADS = [("heads that do not divide", None, "3 heads do not divide its width 16")]
NO_HEADS = [("no heads", None, "theirs.pt: ", "heads")]
OTHER_MODEL = [("another model", None, "theirs.pt: not the model", "depth: found 2, expected 12")]
UNDER_A_FILE = [("out under a file", None, "File exists", "tiny.yaml")]
EXPORT = [("export of a broken state", on(state, cut), f"{STEP}: expected a checkpoint, found a truncated")]

# ---- images


def pictures(spoil: Callable[[Path], Any] = lambda path: None, **changes: Any) -> Damage:
    """A folder of twelve pictures as the configuration's images, one of them spoilt."""

    def damage(world: Any) -> None:
        folder = world.folder / "pictures"
        folder.mkdir()
        for i in range(12):
            Image.new("RGB", (12, 10), (20 * i, 0, 0)).save(folder / f"{i:02d}.png")
        spoil(folder / "07.png")
        images = {"source": "folder", "path": str(folder), "resolution": 8, "classes": 1, "holdout": 3}
        world.configure(images={**images, **changes})

    return damage


def png(width: int, height: int, colour: int = 2) -> bytes:
    """A PNG's beginning that promises so many pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    data = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"\0" * 1000)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(data)


def a_broken_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere.png")


def emptied(path: Path) -> None:
    """All pictures beside it go, and it too."""
    for other in path.parent.iterdir():
        other.unlink()


UNREADABLE, BOMB = "07.png: not a picture that can be read", png(60000, 60000)
IMAGES = [
    ("zero bytes", pictures(lambda p: filled(p, b"")), UNREADABLE),
    ("not a picture", pictures(lambda p: filled(p, "hello")), UNREADABLE),
    ("half a picture", pictures(cut), UNREADABLE),
    ("a bomb", pictures(lambda p: filled(p, BOMB)), UNREADABLE, "3600000000 pixels"),
    ("a picture of floats", pictures(lambda p: Image.new("F", (9, 9)).save(p, format="TIFF")), UNREADABLE),
    ("a link to nothing", pictures(a_broken_link), UNREADABLE),
    ("a folder with a picture's name", pictures(a_folder), "07.png"),
    ("no pictures", pictures(emptied), "pictures: found no pictures, expected .png"),
    ("another number of classes", pictures(classes=3), "images.classes: 3, but ", "has 1"),
    ("all held out", pictures(holdout=12), "12 pictures to hold out of 12, expected 0..11"),
]

# ---- archives of samples


def archive(entries: dict[str, bytes], modes: dict[str, int] | None = None) -> Damage:
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


def npz(**arrays: Any) -> Damage:
    return lambda world: np.savez(world.folder / "samples.npz", **arrays)


def raw_npz(header: str, data: bytes = b"") -> Damage:
    """An .npz whose arr_0 has any header."""
    whole = header.encode() + b" " * (-(len(header) + 11) % 64) + b"\n"
    array = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(whole)) + whole + data

    def damage(world: Any) -> None:
        with zipfile.ZipFile(world.folder / "samples.npz", "w") as file:
            file.writestr("arr_0.npy", array)

    return damage


def bytes_of(shape: str) -> str:
    """The header of an array of bytes."""
    return f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}"


def zipped(world: Any) -> Path:
    return world.folder / "samples.zip"


def packed(world: Any) -> Path:
    return world.folder / "samples.npz"


TWO_SIZES = {"a.png": picture(), "b.png": picture(size=(9, 9))}
LINK = archive({"a.png": b"/etc/passwd"}, {"a.png": 0o120777})
ZIPS = [
    ("a zip that climbs out", archive({"../../climbed.png": b"x"}), "samples.zip: '../../climbed.png' leads out of"),
    ("an absolute name", archive({"/tmp/climbed.png": b"x"}), "samples.zip: '/tmp/climbed.png' leads out of"),
    ("a link in a zip", LINK, "samples.zip:a.png: cannot be read as an image"),
    ("no pictures in a zip", archive({"a.txt": b"x"}), "samples.zip: found no pictures, expected"),
    ("half a zip", both(archive({"a.png": picture()}), on(zipped, cut)), "samples.zip: expected a .zip"),
    ("no zip", on(zipped, filled, b"PK"), "samples.zip: expected a .zip"),
    ("a bomb in a zip", archive({"a.png": BOMB}), "samples.zip:a.png: ", "3600000000 pixels"),
    ("grey pictures", archive({"a.png": picture("L")}), "samples.zip:a.png: mode L", "expected RGB"),
    ("pictures of two sizes", archive(TWO_SIZES), "samples.zip:b.png: ", "9 x 9 px", "8 x 8 px"),
]
NPZS = [
    ("an .npz of floats", npz(arr_0=np.zeros((9, 8, 8, 3))), "samples.npz: arr_0 holds float64, expected uint8"),
    ("an .npz of objects", npz(arr_0=np.array([{}], object)), "samples.npz: arr_0 is pickled, which is never read"),
    ("an .npz of something", npz(x=np.zeros(2)), "samples.npz: ", "found x"),
    ("half an .npz", both(npz(arr_0=TWENTY), on(packed, cut)), "samples.npz: expected"),
    ("an .npz of fewer than none", raw_npz(bytes_of("(-1, 8, 8, 3)")), "samples.npz: arr_0 has shape (-1, 8, 8, 3)"),
    ("an .npz of too many", raw_npz(bytes_of("(9, 8000000000, 8000000000, 3)")), "samples.npz: "),
    ("an .npz of no header", raw_npz("{" * 60), "samples.npz: expected an .npz"),
    ("an .npz without images", raw_npz(bytes_of("(0, 8, 8, 3)")), "samples.npz: "),
    ("nothing", None, "samples.npz: no such file or folder"),
]

# ---- weights of the small networks

MODEL, VAE = "model.safetensors", "diffusion_pytorch_model.safetensors"
MISFIT, VAE_MISFIT = f"{MODEL}: these weights do not fit", f"{VAE}: does not fit the AutoencoderKL of its config.json"
CONFIG = "config.json: expected an AutoencoderKL configuration, found"


def part(kind: str) -> Callable[[Any], Path]:
    """The folder of a small network."""
    return lambda world: getattr(world, kind)


def within(kind: str, name: str) -> Callable[[Any], Path]:
    """A file of a small network."""
    return lambda world: getattr(world, kind) / name


def weights(kind: str, change: Callable[[dict], Any], file: str = MODEL) -> Damage:
    return on(part(kind), weights_edited, change, file)


def network(kind: str, **changes: Any) -> Damage:
    return on(part(kind), architecture_edited, **changes)


def about(kind: str, **changes: Any) -> Damage:
    return on(within(kind, "part.json"), edited, **changes)


def vae(change: Callable[[dict], Any]) -> Damage:
    return weights("autoencoder", change, VAE)


def vae_config(**changes: Any) -> Damage:
    return on(within("autoencoder", "config.json"), edited, **changes)


def shifted(found: dict) -> None:
    found["decoder.conv_in.bias"].add_(1)


def a_detector_for_a_teacher(world: Any) -> None:
    shutil.copy(world.detector / "part.json", world.teacher)


TEACHERS = [
    ("teacher: a key missing", weights("teacher", gone("pos_embed")), MISFIT, "pos_embed"),
    ("teacher: a key too many", weights("teacher", added("extra.weight")), MISFIT, "extra.weight"),
    ("teacher: truncated", on(within("teacher", MODEL), cut), f"{MODEL}: expected the weights"),
    (
        "teacher: no weights",
        on(within("teacher", MODEL), removed),
        f"{MODEL}: expected the teacher's weights, found no file",
    ),
    ("teacher: another part", a_detector_for_a_teacher, "part.json: expected a teacher, found 'detector'"),
    (
        "teacher: half a description",
        on(within("teacher", "part.json"), cut),
        "part.json: expected a part file, found broken JSON",
    ),
    ("teacher: no identity", about("teacher", identity=None), "part.json: ", "identity"),
    ("teacher: no arguments", network("teacher", kwargs=None), "part.json: ", "kwargs"),
    ("teacher: no mean", network("teacher", mean=None), "part.json: ", "mean"),
    ("teacher: NaN", weights("teacher", nan("pos_embed")), f"{MODEL}: the weights pos_embed are not finite"),
]
DETECTORS = [
    ("detector: a key missing", weights("detector", gone("head.bias")), MISFIT, "head.bias"),
    ("detector: a key too many", weights("detector", added("extra.weight")), MISFIT, "extra.weight"),
    ("detector: truncated", on(within("detector", MODEL), cut), f"{MODEL}: expected the weights"),
    ("detector: no identity", about("detector", identity=None), "part.json: ", "identity"),
    ("detector: no name", about("detector", name=None), "part.json: ", "name"),
    ("detector: no width", network("detector", width=None), "part.json: ", "width"),
    ("detector: a width in words", network("detector", width="8"), "part.json: ", "'8'"),
    ("detector: NaN", weights("detector", nan("head.bias")), f"{MODEL}: ", "head.bias", "not finite"),
    ("autoencoder: other weights than encoded", vae(shifted), "its weights are", "but the latents were encoded with"),
]
AUTOENCODERS = [
    ("autoencoder: a key missing", vae(gone("decoder.conv_in.bias")), VAE_MISFIT, "decoder.conv_in.bias"),
    ("autoencoder: a key too many", vae(added("extra.weight")), VAE_MISFIT, "extra.weight"),
    ("autoencoder: truncated", on(within("autoencoder", VAE), cut), f"{VAE}: expected the weights of an autoencoder"),
    ("autoencoder: no weights", on(within("autoencoder", VAE), removed), f"found no {VAE}"),
    ("autoencoder: no configuration", on(within("autoencoder", "config.json"), removed), f"{CONFIG} FileNotFoundError"),
    ("autoencoder: half a configuration", on(within("autoencoder", "config.json"), cut), f"{CONFIG} JSONDecodeError"),
    (
        "autoencoder: a key of it lost",
        vae_config(block_out_channels="8"),
        "config.json: block_out_channels is '8', expected list",
    ),
    ("autoencoder: a scale in words", vae_config(scaling_factor="big"), "config.json: ", "scaling_factor", "'big'"),
    ("autoencoder: NaN", vae(nan("encoder.conv_in.bias")), "are not finite, expected numbers"),
]
QUALITY = [("autoencoder: its quality lost", about("detector", quality=None), "part.json: ", "quality")]


heads = functools.partial(imported, "--heads")
MATRIX = [  # kind, the command that meets what is damaged, rows
    ("configuration", plan, CONFIGURATIONS),
    ("configuration", prepare, RESULTS),
    ("store", encode, STORES),
    ("store", rule("detector"), SPLITS),
    ("store", train, LATENTS),
    ("store", evaluate, FEATURES),
    ("store", rule("floor"), OTHER_DETECTOR),
    ("store", grid, SAMPLES),
    ("store", rule("table"), SCORES),
    ("state", sample, STATES_SAMPLED),
    ("state", train, STATES_TRAINED_ON),
    ("state", measure, STATES_MEASURED),
    ("state", rule("train", "x/00000008"), NO_STATE),
    ("checkpoint", heads(2), CHECKPOINTS),
    ("checkpoint", imported(), UNKNOWN_HEADS),
    ("checkpoint", heads(3), THREE_HEADS),
    ("checkpoint", heads(0), NO_HEADS),
    ("checkpoint", imported("--model", "SiT-B/2"), OTHER_MODEL),
    ("checkpoint", heads(2, out="tiny.yaml/out.safetensors"), UNDER_A_FILE),
    ("checkpoint", exported, EXPORT),
    ("image", prepare, IMAGES),
    ("archive", scored("samples.zip"), ZIPS),
    ("archive", scored("samples.npz"), NPZS),
    ("weights", train, TEACHERS),
    ("weights", sample, DETECTORS),
    ("weights", encode, AUTOENCODERS),
    ("weights", rule("floor"), QUALITY),
    ("weights", rule("reconstruct"), AUTOENCODERS[:1]),
    ("store", rule("reconstruct"), [LATENTS[2], LATENTS[5]]),
]
ROWS = [
    pytest.param(damage, command, words, id=f"{kind}: {name}")
    for kind, command, rows in MATRIX
    for name, damage, *words in rows
]


@pytest.mark.timeout(60, func_only=True)  # what is waited for; the world may take longer to make
@pytest.mark.parametrize(("damage", "command", "words"), ROWS)
def test_it_is_refused_by_name_and_nothing_is_lost(world, damage, command, words, capsys):
    refused(world, damage, command, words, capsys)
