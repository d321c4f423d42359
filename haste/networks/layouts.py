"""What weights in a file are: whose layout, which sets, and the size of the SiT that they are of. No torch.

Everything follows from headers (`haste.networks.headers`), so that a plan can refuse what a job would refuse.
Shapes: D model width, p patch size, C channels.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from haste.networks import foreign, headers
from haste.networks.headers import Stored
from haste.networks.spec import sit_shapes

KIND = "weights"
LAYOUTS = ("ours", "REPA", "SiT")
Size = tuple[int, int, int]  # depth, width, heads
Tree = dict[str, Stored]

_PATCHES, _OUT = "x_embedder.proj.weight", "final_layer.linear.weight"
LABELS = "y_embedder.embedding_table.weight"
# Where programs put sets of weights, and which of ours each is; None: the average if there is no other.
_SETS = {"model": "model", "ema": "ema", "state_dict": None, "current_model_state": "model"}
_SETS |= {"model_state_dict": "model", "ema_state_dict": "ema", "model_ema": "ema", "module": "model"}
_STEPS = ("steps", "step", "global_step", "global_steps", "train_steps")
_SHOWN = 4  # names in a message
_PATHS = {"linear": "linear", "cosine": "cosine", "gvp": "cosine"}  # REPA's and SiT's names for our interpolants
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxdict, _SHORT.maxlist, _SHORT.maxtuple, _SHORT.maxstring = 3, 100, 100, 100, 1000


@dataclass(frozen=True)
class Described:
    """Weights in a file, by their headers. Names are ours, shapes and channels still the file's.

    file: its path; layout: one of LAYOUTS; shape: as `haste.models.checkpoints.Checkpoint.shape`.
    sets: "model" and "ema", whichever the file has (a set alone counts as "ema"); projectors: in the file's order.
    facts: other contents of the file, plain data: step, path, args, ...
    """

    file: str
    layout: str
    shape: Mapping[str, Any]
    sets: Mapping[str, Tree]
    projectors: tuple[Tree, ...]
    facts: Mapping[str, Any]


def chosen(file: str, sets: Mapping[str, Any], which: str) -> Any:
    """One set of weights, "model" or "ema".

    Raises:
        ValueError: the file has no such set; the message names those it has.
    """
    if which not in sets:
        raise ValueError(f"{file}: has no {which!r} weights, only {', '.join(map(repr, sets))}")
    return sets[which]


def described(
    file: str, layout: str | None = None, expected: Mapping[str, Any] | None = None, sizes: Iterable[Size] = ()
) -> Described:
    """The weights of a SiT in a file of any known layout. Arguments as for `haste.models.checkpoints.read_checkpoint`.

    Raises:
        ValueError: the file is missing, truncated, foreign or contains code; or weights are missing, of another shape,
            or unknown. The message names the file, what was found and what was expected.
    """
    trees, facts = _opened(file, [_PATCHES])
    tidy = {which: _tidy(tree, file) for which, tree in trees.items()}
    sets = {which: tree for which, (tree, _) in tidy.items()}
    found = _layout(sets, facts, layout, file)
    shape = _shape(next(iter(sets.values())), facts, expected or {}, sizes, file)
    shapes = sit_shapes({**shape, "channels": shape["in_channels"]}, shape["classes"])
    if found == "SiT":
        shapes |= {name: (2 * shapes[name][0], *shapes[name][1:]) for name in (_OUT, "final_layer.linear.bias")}
    for tree in sets.values():
        absent = {"pos_embed"} - tree.keys()  # it is computed
        check_fit(file, "SiT", tree, {name: value for name, value in shapes.items() if name not in absent})
    projectors = next((heads for _, heads in tidy.values() if heads), ())
    return Described(file, found, shape, sets, projectors, facts)


def described_as(file: str, name: str, shapes: Mapping[str, tuple[int, ...]], shape: Mapping[str, Any]) -> Described:
    """The weights of any network in a file: a state, imported weights, or a .pt in REPA's layout.

    Args:
        file: its path.
        name: the architecture's.
        shapes: of its weights, by their names.
        shape: becomes that of the result.

    Raises:
        ValueError: as `described`.
    """
    trees, facts = _opened(file, list(shapes))
    split = {which: _without_projectors(tree) for which, tree in trees.items()}
    for tree, _ in split.values():
        check_fit(file, name, tree, shapes)
    heads = next((heads for _, heads in split.values() if heads), ())
    return Described(file, "ours", shape, {which: tree for which, (tree, _) in split.items()}, heads, facts)


def check_fit(file: str, name: str, tree: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse weights that are not a network's; the message names the missing, unknown and misshapen ones."""
    found = {one: tuple(value.shape) for one, value in tree.items()}
    wrong = {
        "missing": [one for one in shapes if one not in found],
        "not known": [one for one in found if one not in shapes],
        "of another shape": [
            f"{one} (found {found[one]}, expected {shape})"
            for one, shape in shapes.items()
            if found.get(one, shape) != shape
        ],
    }
    if faults := [f"{what}: {some(names)}" for what, names in wrong.items() if names]:
        said = foreign.weights(wrong["not known"]) if wrong["missing"] else None
        raise ValueError(
            f"{file}: does not fit a {name} of this size; {'; '.join(faults)}{f' ({said})' if said else ''}"
        )


def some(names: Sequence[str]) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def expected_in(recipe: Mapping[str, Any], classes: bool = True) -> dict[str, Any]:
    """A recipe's model in the form of `Described.shape`, without the number of classes where any will do."""
    size = {("in_channels" if name == "channels" else name): value for name, value in recipe["model"].items()}
    return {**size, "classes": recipe["classes"]} if classes else size


def trained_otherwise(facts: Mapping[str, Any], training: Mapping[str, Any]) -> tuple[str, Any] | None:
    """Training settings recorded in a file and in a recipe, where they differ."""
    path, process = facts.get("path"), facts.get("process")
    expected = training.get("path") or training["process"]
    if path is not None and path != expected:
        return f"on the {path} path", expected
    if process is not None and process != expected:
        return f"by {process}", expected
    return None


def check_trained(file: str, facts: Mapping[str, Any], training: Mapping[str, Any]) -> None:
    """Refuse a row's file that says that it was trained otherwise.

    Raises:
        ValueError: names both.
    """
    if said := trained_otherwise(facts, training):
        raise ValueError(f"{file}: was trained {said[0]}, but the row says {said[1]}")


# ---- files


def _opened(file: str, names: Sequence[str]) -> tuple[dict[str, Tree], dict[str, Any]]:
    """The sets of weights in a file under their names, projectors included, and its other contents.

    names: of the network's weights, by which it is found below the names of what it was a part of.
    """
    held, metadata = headers.contents(file)
    if not isinstance(held, Mapping):
        what = "Tensor" if isinstance(held, Stored) else type(held).__name__
        raise ValueError(f"{file}: expected a dictionary of weights, found {what}")
    given, facts = _of_torch(file, held) if metadata is None else _of_safetensors(file, held, metadata)
    sets: dict[str, Tree] = {}
    for which, tree in given:
        for label, prefix, own in _networks(tree, which, names):
            if label in sets:
                raise ValueError(f"{file}: holds several networks, one of them under {prefix!r}; expected one")
            sets[label] = own
    if not any(sets.values()):
        found = foreign.weights(map(str, held)) or ", ".join(repr(str(name)) for name in list(held)[:_SHOWN])
        raise ValueError(
            f"{file}: expected weights, or 'model' or 'ema' with weights in them; found {found or 'nothing'}"
        )
    return sets, facts


def _of_safetensors(
    file: str, held: Mapping[str, Stored], metadata: Mapping[str, str]
) -> tuple[list[tuple[str | None, Tree]], dict[str, Any]]:
    try:
        header = json.loads(metadata.get("haste", "{}"))
        if header.get("kind") not in (None, "state", KIND):
            raise ValueError(f"{file}: expected a state or weights, found kind {header['kind']!r}")
        facts = _facts_of_header(header)
    except (AttributeError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file}: expected a checkpoint, found a damaged header ({error})") from error
    trees: dict[str | None, Tree] = {}
    for name, value in held.items():
        first, slash, rest = name.partition("/")
        if not slash or first in ("model", "ema"):
            trees.setdefault(first if slash else None, {})[rest if slash else name] = value
    for place, term in enumerate(sorted({name.split("/")[1] for name in held if name.startswith("projectors/")})):
        before = f"projectors/{term}/"
        heads = {name.removeprefix(before): value for name, value in held.items() if name.startswith(before)}
        for tree in trees.values():
            tree |= {f"projectors.{place}.{name}": value for name, value in heads.items()}
    return list(trees.items()), facts


def _facts_of_header(header: Mapping[str, Any]) -> dict[str, Any]:
    if not header:
        return {}
    recipe = header.get("recipe") or {}  # of a state; imported weights have the same entries at the top level
    size = {**(header.get("model") or recipe.get("model") or {})}
    training = recipe.get("training") or {}
    facts = {"ours": True, "heads": size.get("heads"), "step": header.get("step"), "source": header.get("source")}
    said = {name: header.get(name) or training.get(name) for name in ("path", "process")}
    return facts | said | {"args": header.get("args")}


def _of_torch(file: str, held: Mapping[Any, Any]) -> tuple[list[tuple[str | None, Tree]], dict[str, Any]]:
    trees = [(which, _tensors(held[name])) for name, which in _SETS.items() if isinstance(held.get(name), Mapping)]
    trees = [(which, tree) for which, tree in trees if tree] or [(None, _tensors(held))]
    args = held.get("args")
    args = args.entries if isinstance(args, headers.Namespace) else args if isinstance(args, Mapping) else {}
    facts: dict[str, Any] = {"args": {str(name): _plain(value) for name, value in args.items()} or None}
    facts["step"] = next((held[name] for name in _STEPS if isinstance(held.get(name), int)), None)
    return trees, facts | {"path": _path_said(file, args)}


def _tensors(tree: Mapping[Any, Any]) -> Tree:
    return {str(name): value for name, value in tree.items() if isinstance(value, Stored)}


def _plain(value: Any) -> Any:
    """Plain data unchanged; anything else as its text."""
    return value if value is None or isinstance(value, bool | int | float | str) else _SHORT.repr(value)


def _path_said(file: str, args: Mapping[str, Any]) -> str | None:
    """The interpolant in a run's arguments, if they name one.

    Raises:
        ValueError: the model was trained on another interpolant than ours, or predicts something other than velocity.
    """
    predicts, name = args.get("prediction"), args.get("path_type")
    if predicts not in (None, "v", "velocity"):
        raise ValueError(f"{file}: predicts {predicts!r}, expected velocity ('v' or 'velocity')")
    if name is not None and str(name).lower() not in _PATHS:
        raise ValueError(f"{file}: trained with path_type {name!r}, expected one of {', '.join(_PATHS)}")
    return None if name is None else _PATHS[str(name).lower()]


def _networks(tree: Tree, which: str | None, names: Sequence[str]) -> Iterator[tuple[str, str, Tree]]:
    """The network in a set, and its average where both are in it, each with its label and prefix.

    Wrappers put prefixes before all names: module. (DDP), _orig_mod. (torch.compile), model. (Lightning), ema_model.
    and online_model. (ema_pytorch). Latent-diffusion's average is model_ema., whose names have no dots.
    """
    anchor = max(names, key=len)
    prefixes = {name.removesuffix(anchor) for name in tree if name.endswith(anchor)}
    prefixes = {one for one in prefixes if not one or one.endswith(".")}
    prefixes = {one for one in prefixes if 2 * sum(one + name in tree for name in names) >= len(names)}
    dotless = {name.removeprefix("model_ema."): value for name, value in tree.items() if name.startswith("model_ema.")}
    if not prefixes:
        yield which or "ema", "", tree
    for prefix in sorted(prefixes):
        inner = tuple(one for one in prefixes if one != prefix and one.startswith(prefix))
        own = {name for name in tree if name.startswith(prefix) and not (inner and name.startswith(inner))}
        found = (
            {name.removeprefix(prefix): tree[name] for name in own}
            if prefix
            else {n: tree[n] for n in tree if n in own}
        )
        spelt = {name.replace(".", ""): name for name in found}
        averages = {spelt[name]: value for name, value in dotless.items() if name in spelt}
        averaged = "ema" in re.split(r"[._]", prefix)
        yield "ema" if averaged else which or ("model" if averages or len(prefixes) > 1 else "ema"), prefix, found
        if averages:
            yield "ema", "model_ema.", averages


# ---- names and shapes


def _without_projectors(tree: Tree) -> tuple[Tree, tuple[Tree, ...]]:
    heads: dict[int, Tree] = {}
    for name, value in tree.items():
        if match := re.fullmatch(r"projectors\.(\d+)\.(.+)", name):
            heads.setdefault(int(match[1]), {})[match[2]] = value
    weights = {name: value for name, value in tree.items() if not re.match(r"projectors\.\d+\..", name)}
    # A run without a teacher leaves a projector of width 0.
    return weights, tuple(heads[i] for i in sorted(heads) if all(math.prod(value.shape) for value in heads[i].values()))


def _tidy(tree: Tree, file: str) -> tuple[Tree, tuple[Tree, ...]]:
    """Weights under our names, and the projectors separately."""
    found, heads = _without_projectors(tree)
    count = len({name.split(".")[1] for name in found if name.startswith("blocks.")})
    weights = {}
    for name, value in found.items():
        # Older REPA files number the blocks after the aligned one from 0 again.
        match = re.fullmatch(r"decoder_blocks\.(\d+)\.(.+)", name)
        weights[f"blocks.{count + int(match[1])}.{match[2]}" if match else name] = value
    if _PATCHES not in weights and (said := foreign.weights(weights)):
        raise ValueError(f"{file}: expected the weights of a SiT, found {said}")
    if any("norm1_" in name or name.startswith(("joint_blocks.", "context_embedder.")) for name in weights):
        raise ValueError(f"{file}: the weights of a joint text and image transformer, expected those of a SiT")
    return weights, heads


def _layout(sets: Mapping[str, Tree], facts: Mapping[str, Any], told: str | None, file: str) -> str:
    """The detected layout, checked against the given one."""
    tree = next(iter(sets.values()))
    if told == "ours" and not facts.get("ours"):
        raise ValueError(f"{file}: has no header of ours, expected a state, or weights that were imported")
    patch, out = tree.get(_PATCHES), tree.get(_OUT)
    if patch is None or out is None or patch.ndim != 4 or out.ndim != 2:
        names = ", ".join(repr(name) for name in list(tree)[:_SHOWN])
        raise ValueError(f"{file}: expected a SiT's {_PATCHES} and {_OUT}; found {names}, ...")
    entries = math.prod(patch.shape[1:])  # C p p
    if len(out) == entries:
        if told == "SiT":
            raise ValueError(f"{file}: as many output channels as input channels; expected twice as many in SiT's")
        return "ours" if facts.get("ours") else "REPA"
    if len(out) != 2 * entries:
        raise ValueError(f"{file}: {len(out)} output entries a patch, expected {entries} (REPA) or {2 * entries} (SiT)")
    if told != "SiT":
        raise ValueError(
            f"{file}: twice as many output channels as input channels, which SiT's files have and DiT's. If it is "
            "SiT's, say so (layout SiT). DiT's predict noise and are not read"
        )
    return "SiT"


def _shape(
    tree: Tree, facts: Mapping[str, Any], told: Mapping[str, Any], sizes: Iterable[Size], file: str
) -> dict[str, Any]:
    """Arguments of `SiT`, from the shapes of the weights; given values are checked."""
    needed = (LABELS, "blocks.0.mlp.fc1.weight", _PATCHES)
    missing = [name for name in needed if name not in tree or tree[name].ndim < 2]
    if missing:
        raise ValueError(f"{file}: does not hold {', '.join(missing)}, expected the weights of a SiT")
    width, channels, patch, _ = tree[_PATCHES].shape
    places = {int(match[1]) for name in tree if (match := re.match(r"blocks\.(\d+)\.", name))}
    depth = len(places)
    if places != set(range(depth)):
        raise ValueError(f"{file}: {depth} blocks up to block {max(places)}, expected all from 0 on")
    if not min(width, channels, patch):
        raise ValueError(f"{file}: {_PATCHES} is {tree[_PATCHES].shape}, expected (width, channels, patch, patch)")
    shape: dict[str, Any] = {"depth": depth, "width": width, "patch_size": patch, "in_channels": channels}
    shape["classes"] = len(tree[LABELS]) - 1
    ratio = len(tree[needed[1]]) / width
    exact = int(width * ratio) == len(tree[needed[1]])  # the division may have rounded down
    shape["mlp_ratio"] = ratio if exact else math.nextafter(ratio, math.inf)
    shape["heads"] = facts.get("heads") or told.get("heads") or _heads(depth, width, sizes, file)
    shape["input_size"] = _input_size(tree.get("pos_embed"), patch, told.get("input_size"), file)
    wrong = [f"{name}: found {shape[name]}, expected {value}" for name, value in told.items() if shape[name] != value]
    if wrong:
        raise ValueError(f"{file}: not the model that was asked for; {'; '.join(wrong)}")
    if width % shape["heads"]:
        raise ValueError(f"{file}: {shape['heads']} heads do not divide its width {width}")
    return shape


def _heads(depth: int, width: int, sizes: Iterable[Size], file: str) -> int:
    known = {(layers, wide): count for layers, wide, count in sizes}
    if (depth, width) not in known:
        raise ValueError(
            f"{file}: {depth} blocks of width {width} are no published size, and the weights do not show their "
            "heads: say how many"
        )
    return known[depth, width]


def _input_size(positions: Stored | None, patch: int, told: int | None, file: str) -> int:
    if positions is None:
        if told is None:
            raise ValueError(f"{file}: holds no pos_embed, so the side of its latent grid must be said")
        return told
    side = math.isqrt(positions.shape[1]) if positions.ndim == 3 else 0
    if side * side != (positions.shape[1] if positions.ndim == 3 else -1):
        raise ValueError(f"{file}: pos_embed is {positions.shape}, expected (1, a square number, width)")
    return side * patch
