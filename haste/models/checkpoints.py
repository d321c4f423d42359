"""Weights of a SiT from other projects' files, and ours for other programs.

Supported layouts:
    ours    states and imported weights: safetensors with a header
    REPA    files of REPA and HASTE: a .pt of {"model", "ema", "opt", "args", "steps"}, or one bare set of weights
    SiT     files of SiT: the same, with twice the output channels, of which the first half is used, and time from
            noise (t = 0) to data (t = 1)
The file's name does not matter. Nothing in a file is executed: a .pt is read by torch's restricted unpickler, which
builds tensors and plain data, and only the class `argparse.Namespace`. Anything else in it is refused by name.

The result has our names (which are REPA's), our time (t = 0 is data) and as many output channels as input channels.
Shapes: D model width, p patch size, C channels, F = 256 timestep features.
"""

from __future__ import annotations

import argparse
import errno
import json
import math
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from haste.files import artefact
from haste.files import tensors as files
from haste.models.sit import SiT

KIND = "weights"
LAYOUTS = ("ours", "REPA", "SiT")
SETS = ("model", "ema")
Weights = Mapping[str, Tensor]
Size = tuple[int, int, int]  # depth, width, heads

_WRAPPERS = ("module.", "_orig_mod.")  # prefixes that DDP and torch.compile add to every name
_MOST_HEADER = 100_000_000  # bytes; safetensors' own limit
_SHOWN = 4  # names in a message
_PATHS = {"linear": "linear", "cosine": "cosine", "gvp": "cosine"}  # REPA's and SiT's names for our interpolants


@dataclass(frozen=True)
class Checkpoint:
    """Weights of a SiT, as read from a file.

    file: its path; sha256: of the file; layout: one of LAYOUTS.
    shape: arguments of `SiT`: depth, width, heads, patch_size, mlp_ratio, input_size, in_channels, classes; for another
        architecture its name, its settings and the last three.
    weights: "model" and "ema", whichever the file has (a bare set counts as "ema"), each name -> tensor.
    projectors: heads onto teachers' features, in the file's order, each name -> tensor.
    facts: other contents of the file, plain data: step, path, args, ...
    """

    file: str
    sha256: str
    layout: str
    shape: Mapping[str, Any]
    weights: Mapping[str, Weights]
    projectors: tuple[Weights, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    def chosen(self, which: str) -> Weights:
        """One set of weights, "model" or "ema".

        Raises:
            ValueError: the file has no such set; the message names those it has.
        """
        if which not in self.weights:
            raise ValueError(f"{self.file}: has no {which!r} weights, only {', '.join(map(repr, self.weights))}")
        return self.weights[which]

    def model(self, which: str = "ema") -> SiT:
        """The model with one set of weights, float32, frozen."""
        model = SiT(**self.shape)
        model.load_state_dict(dict(self.chosen(which)))
        return model.requires_grad_(False).eval()


def read_checkpoint(
    path: Path | str,
    *,
    layout: Literal["ours", "REPA", "SiT"] | None = None,
    expected: Mapping[str, Any] | None = None,
    sizes: Iterable[Size] = (),
) -> Checkpoint:
    """Read the weights of a SiT from a file of any known layout.

    Args:
        path: the file.
        layout: whose file it is; None detects it from the content. SiT's must be given: DiT's have the same names.
        expected: known entries of `Checkpoint.shape`; a file that differs is refused. The number of attention heads,
            which weights do not show, comes from here, from the file's header or, by depth and width, from `sizes`;
            input_size comes from here if the file holds no positions.
        sizes: known (depth, width, heads).

    Raises:
        ValueError: the file is missing, truncated, foreign or contains code; or weights are missing, of another shape,
            not finite or unknown. The message names the file, what was found and what was expected.
    """
    trees, facts = _opened(Path(path))
    where = str(path)
    tidy = {name: _tidy(tree, where) for name, tree in trees.items()}
    projectors = next((heads_ for _, heads_ in tidy.values() if heads_), ())
    weights = {name: tree for name, (tree, _) in tidy.items()}
    found = _layout(weights, facts, layout, where)
    shape = _shape(next(iter(weights.values())), facts, expected or {}, sizes, where)
    if found == "SiT":
        weights = {name: _turned(tree, shape) for name, tree in weights.items()}
    with torch.device("meta"):
        fits = SiT(**shape)
    weights = {name: _checked(_with_positions(tree, shape), fits, where) for name, tree in weights.items()}
    return Checkpoint(where, artefact.file_identity(path), found, shape, weights, projectors, facts)


def read_weights_of(path: Path | str, model: nn.Module, shape: Mapping[str, Any]) -> Checkpoint:
    """Read the weights of any network from a file: a state, imported weights, or a .pt in REPA's layout.

    Names must be those of `model`, apart from the prefixes of DDP and torch.compile.

    Args:
        path: the file.
        model: the network, on any device.
        shape: becomes `Checkpoint.shape`.

    Raises:
        ValueError: as `read_checkpoint`.
    """
    trees, facts = _opened(Path(path))
    weights: dict[str, Weights] = {}
    heads: dict[str, dict[str, Tensor]] = {}
    for which, tree in trees.items():
        bare = {_unwrapped(name): value for name, value in tree.items()}
        mine = {name: value for name, value in bare.items() if not re.match(r"projectors\.\d+\.", name)}
        weights[which] = _checked(mine, model, str(path))
        for name in bare.keys() - mine.keys():
            _, place, rest = name.split(".", 2)
            heads.setdefault(place, {})[rest] = bare[name]
    ordered = tuple(heads[place] for place in sorted(heads, key=int))
    return Checkpoint(str(path), artefact.file_identity(path), "ours", shape, weights, ordered, facts)


# ---- files


def _opened(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The sets of weights in a file under its own names (projectors included), and its other contents."""
    if not path.is_file():
        raise ValueError(f"{path}: expected a checkpoint, found {'a folder' if path.exists() else 'nothing'}")
    with open(path, "rb") as file:
        start = file.read(9)
    # safetensors files begin with the length of their JSON header.
    is_safetensors = len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") < _MOST_HEADER
    return _from_safetensors(path) if is_safetensors else _from_torch(path)


def _from_safetensors(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    with files.opened(path, "checkpoint") as file:
        kept = [name for name in file.keys() if not name.startswith(("optimizer/", "scaler/"))]  # noqa: SIM118
        tensors = files.read(path, file, kept)
        try:
            header = json.loads((file.metadata() or {}).get("haste", "{}"))
        except ValueError as error:
            raise ValueError(f"{path}: expected a checkpoint, found a damaged header ({error})") from error
    if header.get("kind") not in (None, "state", KIND):
        raise ValueError(f"{path}: expected a state or weights, found kind {header['kind']!r}")
    trees: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        first, _, rest = name.partition("/")
        if not rest:
            trees.setdefault("ema", {})[name] = value
        elif first in SETS:
            trees.setdefault(first, {})[rest] = value
    for place, term in enumerate(sorted({name.split("/")[1] for name in tensors if name.startswith("projectors/")})):
        before = f"projectors/{term}/"
        heads = {name.removeprefix(before): value for name, value in tensors.items() if name.startswith(before)}
        for tree in trees.values():
            tree |= {f"projectors.{place}.{name}": value for name, value in heads.items()}
    _check_trees(path, trees, tensors)
    return trees, _facts_of_header(header)


def _facts_of_header(header: Mapping[str, Any]) -> dict[str, Any]:
    if not header:
        return {}
    recipe = header.get("recipe") or {}  # of a state; imported weights have the same entries at the top level
    size = {**(header.get("model") or recipe.get("model") or {})}
    training = recipe.get("training") or {}
    facts = {"ours": True, "heads": size.get("heads"), "step": header.get("step"), "source": header.get("source")}
    said = {name: header.get(name) or training.get(name) for name in ("path", "process")}
    return facts | said | {"args": header.get("args")}


def _from_torch(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    # A mapped file is read on access, so the optimiser, most of such a file, is never read.
    options: dict[str, Any] = {"map_location": "cpu", "weights_only": True, "mmap": zipfile.is_zipfile(path)}
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            found = torch.load(path, **options)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path}: refused: {_refused(str(error))}") from error
    except Exception as error:  # the unpickler raises all kinds of errors on bytes that are no checkpoint
        first = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(f"{path}: expected a checkpoint, found a truncated or foreign file ({first})") from error
    if not isinstance(found, Mapping):
        raise ValueError(f"{path}: expected a dictionary of weights, found {type(found).__name__}")
    sets = {name: found[name] for name in SETS if isinstance(found.get(name), Mapping)}
    trees = {name: _tensors(tree) for name, tree in (sets or {"ema": found}).items()}
    _check_trees(path, trees, found)
    args = vars(found["args"]) if isinstance(found.get("args"), argparse.Namespace) else {}
    facts: dict[str, Any] = {"args": {str(name): _plain(value) for name, value in args.items()} or None}
    facts["step"] = next((found[name] for name in ("steps", "step") if isinstance(found.get(name), int)), None)
    return trees, facts | {"path": _path_said(path, args)}


def _path_said(path: Path, args: Mapping[str, Any]) -> str | None:
    """The interpolant in a run's arguments, if they name one.

    Raises:
        ValueError: the model was trained on another interpolant than ours, or predicts something other than velocity.
    """
    predicts, name = args.get("prediction"), args.get("path_type")
    if predicts not in (None, "v", "velocity"):
        raise ValueError(f"{path}: predicts {predicts!r}, expected velocity ('v' or 'velocity')")
    if name is not None and str(name).lower() not in _PATHS:
        raise ValueError(f"{path}: trained with path_type {name!r}, expected one of {', '.join(_PATHS)}")
    return None if name is None else _PATHS[str(name).lower()]


def _refused(message: str) -> str:
    """The unpickler's error, without its advice to load the file anyway."""
    match = re.search(r"GLOBAL ([\w.]+)", message)
    if match:
        return (
            f"it holds {match[1]}, which could run code; expected tensors, plain data and, of classes, "
            "argparse.Namespace alone"
        )
    words = message.rpartition("WeightsUnpickler error: ")[2].split("\n")[0].strip()
    return f"expected tensors and plain data, found something else ({words[:200]})"


def _tensors(tree: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {str(name): value for name, value in tree.items() if isinstance(value, Tensor)}


def _plain(value: Any) -> Any:
    """Plain data unchanged; anything else as its text."""
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _check_trees(path: Path, trees: Mapping[str, Mapping[str, Tensor]], found: Mapping[Any, Any]) -> None:
    if not any(trees.values()):
        names = ", ".join(repr(str(name)) for name in list(found)[:_SHOWN]) or "nothing"
        raise ValueError(f"{path}: expected weights, or 'model' or 'ema' with weights in them; found {names}")


# ---- names, shapes and time


def _tidy(tree: Mapping[str, Tensor], where: str) -> tuple[dict[str, Tensor], tuple[Weights, ...]]:
    """Weights under our names, and the projectors separately."""
    bare = {_unwrapped(name): value for name, value in tree.items()}
    count = len({name.split(".")[1] for name in bare if name.startswith("blocks.")})
    weights: dict[str, Tensor] = {}
    heads: dict[int, dict[str, Tensor]] = {}
    for name, value in bare.items():
        if match := re.fullmatch(r"projectors\.(\d+)\.(.+)", name):
            heads.setdefault(int(match[1]), {})[match[2]] = value
        elif match := re.fullmatch(r"decoder_blocks\.(\d+)\.(.+)", name):
            # Older REPA files number the blocks after the aligned one from 0 again.
            weights[f"blocks.{count + int(match[1])}.{match[2]}"] = value
        else:
            weights[name] = value
    if any("norm1_" in name or name.startswith(("joint_blocks.", "context_embedder.")) for name in weights):
        raise ValueError(f"{where}: the weights of a joint text and image transformer, expected those of a SiT")
    # A run without a teacher leaves a projector of width 0.
    return weights, tuple(heads[i] for i in sorted(heads) if all(value.numel() for value in heads[i].values()))


def _unwrapped(name: str) -> str:
    while name.startswith(_WRAPPERS):
        name = name.split(".", 1)[1]
    return name


def _layout(weights: Mapping[str, Weights], facts: Mapping[str, Any], told: str | None, where: str) -> str:
    """The detected layout, checked against the given one."""
    tree = next(iter(weights.values()))
    if told == "ours" and not facts.get("ours"):
        raise ValueError(f"{where}: has no header of ours, expected a state, or weights that were imported")
    patch, out = tree.get("x_embedder.proj.weight"), tree.get("final_layer.linear.weight")
    if patch is None or out is None or patch.ndim != 4 or out.ndim != 2:
        some = ", ".join(repr(name) for name in list(tree)[:_SHOWN])
        raise ValueError(
            f"{where}: expected a SiT's x_embedder.proj.weight and final_layer.linear.weight; found {some}, ..."
        )
    entries = patch.shape[1] * patch.shape[2] * patch.shape[3]  # C p p
    if len(out) == entries:
        if told == "SiT":
            raise ValueError(f"{where}: as many output channels as input channels; expected twice as many in SiT's")
        return "ours" if facts.get("ours") else "REPA"
    if len(out) != 2 * entries:
        raise ValueError(
            f"{where}: {len(out)} output entries a patch, expected {entries} (REPA) or {2 * entries} (SiT)"
        )
    if told != "SiT":
        raise ValueError(
            f"{where}: twice as many output channels as input channels, which SiT's files have and DiT's. If it is "
            "SiT's, say so (layout SiT). DiT's predict noise and are not read"
        )
    return "SiT"


def _shape(
    tree: Weights,
    facts: Mapping[str, Any],
    told: Mapping[str, Any],
    sizes: Iterable[Size],
    where: str,
) -> dict[str, Any]:
    """Arguments of `SiT`, from the shapes of the weights; given values are checked."""
    needed = ("y_embedder.embedding_table.weight", "blocks.0.mlp.fc1.weight", "x_embedder.proj.weight")
    missing = [name for name in needed if name not in tree or tree[name].ndim < 2]
    if missing:
        raise ValueError(f"{where}: does not hold {', '.join(missing)}, expected the weights of a SiT")
    width, channels, patch, _ = tree["x_embedder.proj.weight"].shape
    places = {int(match[1]) for name in tree if (match := re.match(r"blocks\.(\d+)\.", name))}
    depth = len(places)
    if places != set(range(depth)):
        raise ValueError(f"{where}: {depth} blocks up to block {max(places)}, expected all from 0 on")
    shape: dict[str, Any] = {"depth": depth, "width": width, "patch_size": patch, "in_channels": channels}
    shape["classes"] = len(tree[needed[0]]) - 1
    ratio = len(tree[needed[1]]) / width
    exact = int(width * ratio) == len(tree[needed[1]])  # the division may have rounded down
    shape["mlp_ratio"] = ratio if exact else math.nextafter(ratio, math.inf)
    shape["heads"] = facts.get("heads") or told.get("heads") or _heads(depth, width, sizes, where)
    shape["input_size"] = _input_size(tree.get("pos_embed"), patch, told.get("input_size"), where)
    wrong = [f"{name}: found {shape[name]}, expected {value}" for name, value in told.items() if shape[name] != value]
    if wrong:
        raise ValueError(f"{where}: not the model that was asked for; {'; '.join(wrong)}")
    if width % shape["heads"]:
        raise ValueError(f"{where}: {shape['heads']} heads do not divide its width {width}")
    return shape


def _heads(depth: int, width: int, sizes: Iterable[Size], where: str) -> int:
    known = {(layers, wide): count for layers, wide, count in sizes}
    if (depth, width) not in known:
        raise ValueError(
            f"{where}: {depth} blocks of width {width} are no published size, and the weights do not show their "
            "heads: say how many"
        )
    return known[depth, width]


def _input_size(positions: Tensor | None, patch: int, told: int | None, where: str) -> int:
    if positions is None:
        if told is None:
            raise ValueError(f"{where}: holds no pos_embed, so the side of its latent grid must be said")
        return told
    side = math.isqrt(positions.shape[1]) if positions.ndim == 3 else 0
    if side * side != (positions.shape[1] if positions.ndim == 3 else -1):
        raise ValueError(f"{where}: pos_embed is {tuple(positions.shape)}, expected (1, a square number, width)")
    return side * patch


def _with_positions(tree: Weights, shape: Mapping[str, Any]) -> Weights:
    """A set with positions, which are computed if the file omits them."""
    if "pos_embed" in tree:
        return tree
    model = SiT(**{**shape, "depth": 1})  # one block is enough for its positions
    return {**tree, "pos_embed": model.pos_embed}


def _turned(tree: Weights, shape: Mapping[str, Any]) -> dict[str, Tensor]:
    """SiT's weights for our time: v(x, t) = -v_SiT(x, 1 - t), with the first C output channels.

    Time enters as the features [cos t w | sin t w], and those of 1 - t are a rotation of those of t:
        cos((1 - t) w) = cos w cos t w + sin w sin t w,   sin((1 - t) w) = sin w cos t w - cos w sin t w.
    So the rotation goes into the weights of the first linear layer and the sign into the last; all others stay.
    """
    turned = dict(tree)
    first = tree["t_embedder.mlp.0.weight"].double()  # (D, F)
    of_cos, of_sin = first.chunk(2, dim=1)  # 2 of (D, F / 2)
    half = of_cos.shape[1]
    w = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    on_cos, on_sin = of_cos * w.cos() + of_sin * w.sin(), of_cos * w.sin() - of_sin * w.cos()
    turned["t_embedder.mlp.0.weight"] = torch.cat([on_cos, on_sin], dim=1).float()
    channels = shape["in_channels"]
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        out = tree[name]
        rows = out.view(-1, 2 * channels, *out.shape[1:])  # within a patch channels come last: (p p, 2 C, ...)
        turned[name] = -rows[:, :channels].flatten(0, 1)
    return turned


def _checked(tree: Weights, model: nn.Module, where: str) -> dict[str, Tensor]:
    """A set that fits the model, with half precision converted to float32.

    Raises:
        ValueError: names the missing, unknown and misshapen weights, and those that are not finite.
    """
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in tree.items()}
    wrong = {
        "missing": [name for name in expected if name not in found],
        "not known": [name for name in found if name not in expected],
        "of another shape": [
            f"{name} (found {found[name]}, expected {expected[name]})"
            for name in expected
            if name in found and found[name] != expected[name]
        ],
        "not finite": [name for name in expected if name in found and not _finite(tree[name])],
    }
    faults = [f"{what}: {_some(names)}" for what, names in wrong.items() if names]
    if faults:
        raise ValueError(f"{where}: does not fit a {type(model).__name__} of this size; {'; '.join(faults)}")
    return {name: _widened(tree[name]) for name in expected}


def _finite(value: Tensor) -> bool:
    return value.is_floating_point() and value.layout == torch.strided and bool(value.isfinite().all())


def _widened(value: Tensor) -> Tensor:
    return value.detach().to(torch.promote_types(value.dtype, torch.float32)).contiguous()


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


# ---- writing


def save_imported(path: Path | str, checkpoint: Checkpoint, provenance: Mapping[str, Any]) -> None:
    """Write everything that was read as one safetensors file: `model/NAME`, `ema/NAME`, `projectors/I/NAME`, a header.

    Raises:
        OSError: the disk is full or the folder is not writable; an existing file stays as it was.
    """
    tensors = {f"{which}/{name}": value for which, tree in checkpoint.weights.items() for name, value in tree.items()}
    for place, head in enumerate(checkpoint.projectors):
        tensors |= {f"projectors/{place}/{name}": _widened(value) for name, value in head.items()}
    _save(path, tensors, checkpoint, provenance)


def save_bare(path: Path | str, checkpoint: Checkpoint, which: str, provenance: Mapping[str, Any]) -> None:
    """Write one set of weights as safetensors under REPA's bare names, for any `load_state_dict`.

    Raises:
        ValueError: the checkpoint has no such set.
        OSError: the disk is full or the folder is not writable.
    """
    _save(path, dict(checkpoint.chosen(which)), checkpoint, provenance)


def _save(path: Path | str, tensors: dict[str, Tensor], checkpoint: Checkpoint, made: Mapping[str, Any]) -> None:
    shape = dict(checkpoint.shape)
    header = {
        "schema": artefact.SCHEMA,
        "kind": KIND,
        "model": {name: shape[name] for name in shape if name != "classes"},
        "classes": shape["classes"],
        "time": "t = 0 is data",
        **{name: checkpoint.facts.get(name) for name in ("step", "path", "process", "args")},
        "source": checkpoint.facts.get("source")
        or {"file": Path(checkpoint.file).name, "sha256": checkpoint.sha256, "layout": checkpoint.layout},
        "provenance": dict(made),
    }
    files.write(path, {name: value.clone() for name, value in tensors.items()}, header)  # no shared memory


def save_repa(path: Path | str, checkpoint: Checkpoint, args: Mapping[str, Any]) -> None:
    """Write a .pt like REPA's: {"model", "ema", "args": Namespace, "steps"}, projectors in both sets.

    Projectors have no average, so both sets contain the same ones. A set that the checkpoint lacks is left out.

    Args:
        path: the file to write.
        checkpoint: what to write.
        args: becomes the Namespace.

    Raises:
        OSError: the disk is full or the folder is not writable.
    """
    heads = {f"projectors.{i}.{name}": v for i, head in enumerate(checkpoint.projectors) for name, v in head.items()}
    found: dict[str, Any] = {which: {**tree, **heads} for which, tree in checkpoint.weights.items()}
    found["args"] = argparse.Namespace(**args)
    if checkpoint.facts.get("step") is not None:
        found["steps"] = checkpoint.facts["step"]
    with artefact.replacing(path) as aside:
        try:
            torch.save(found, aside)
        except RuntimeError as error:  # torch's writer raises it on a full disk, without saying so
            if not shutil.disk_usage(aside.parent).free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
            raise OSError(f"{path}: could not be written: {error}") from error
