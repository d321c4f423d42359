"""What weights in a file are: whose layout, which sets, and the size of the SiT, DiT or MM-DiT that they are of. No
torch.

Everything follows from headers (`haste.networks.headers`), so that a plan can refuse what a job would refuse.
Shapes: D model width, p patch size, C channels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from haste.networks import foreign, joint
from haste.networks.pickles import Stored
from haste.networks.sets import Tree, opened
from haste.networks.spec import mlp_ratio, sit_shapes

LAYOUTS = ("ours", "REPA", "SiT", "DiT")
KNOWN = {"sit": "SiT", "dit": "DiT", "mmdit": "MM-DiT"}  # architectures that weights show
# Names under which SiT and DiT publish their files.
_PUBLISHED = re.compile(r"([SD]iT)-(?:S|B|L|XL)-[248]-\d+(?:x\d+)?\.pt")
# The `prediction` that the arguments of either's training name.
_PREDICTION = {"velocity": "SiT", "v": "REPA"}
Size = tuple[int, int, int]  # depth, width, heads

_PATCHES, _OUT = "x_embedder.proj.weight", "final_layer.linear.weight"
LABELS = "y_embedder.embedding_table.weight"
_SHOWN = 4  # names in a message


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
    """The weights of a SiT, DiT or MM-DiT in a file of any known layout.

    Arguments as for `haste.models.checkpoints.read_checkpoint`.

    Raises:
        ValueError: the file is missing, truncated, foreign or contains code; or weights are missing, of another shape,
            or unknown. The message names the file, what was found and what was expected.
    """
    trees, facts = opened(file, [_PATCHES])
    asked = (expected or {}).get("architecture", "sit" if "depth" in (expected or {}) else None)
    if (asked or "mmdit") == "mmdit" and (asked or any(joint.shows(tree) for tree in trees.values())):
        return _described_joint(file, trees, facts, layout, expected or {})
    tidy = {which: _tidy(tree, file) for which, tree in trees.items()}
    sets = {which: tree for which, (tree, _) in tidy.items()}
    found, system = _layout(sets, facts, layout, expected or {}, file)
    shape = _shape(next(iter(sets.values())), facts, expected or {}, sizes, file)
    shape |= {"architecture": "dit"} if system == "DiT" else {}
    shapes = sit_shapes({**shape, "channels": shape["in_channels"]}, shape["classes"])
    if found == "SiT" and len(next(iter(sets.values()))[_OUT]) == 2 * shapes[_OUT][0]:
        shapes |= {name: (2 * shapes[name][0], *shapes[name][1:]) for name in (_OUT, "final_layer.linear.bias")}
    for tree in sets.values():
        absent = {"pos_embed"} - tree.keys()  # it is computed
        check_fit(
            file,
            f"a {system} of this size",
            tree,
            {name: value for name, value in shapes.items() if name not in absent},
        )
    projectors = next((heads for _, heads in tidy.values() if heads), ())
    return Described(file, found, shape, sets, projectors, facts)


def _described_joint(
    file: str, trees: Mapping[str, Tree], facts: Mapping[str, Any], layout: str | None, expected: Mapping[str, Any]
) -> Described:
    """The weights of an MM-DiT, in ours or in REPA's and HASTE's layout, which have the same names."""
    found = "ours" if facts.get("ours") else "REPA"
    if layout not in (None, found):
        raise ValueError(f"{file}: is said to be {layout}'s, but it is an MM-DiT as of {found}; expected no layout")
    split = {which: without_projectors(tree) for which, tree in trees.items()}
    sets = {which: tree for which, (tree, _) in split.items()}
    first = next(iter(sets.values()))
    if not joint.shows(first):
        said = foreign.weights(first) or "other weights"
        raise ValueError(f"{file}: expected the weights of an MM-DiT (joint_blocks.0., ...), found {said}")
    shape: dict[str, Any] = joint.size(first, facts, expected, file)
    shape["input_size"] = _input_size(first.get("pos_embed"), shape["patch_size"], expected.get("input_size"), file)
    _check_expected(file, shape, expected)
    for tree in sets.values():
        shapes = joint.shapes(shape)
        if "pos_embed" not in tree:  # it is computed
            del shapes["pos_embed"]
        check_fit(file, "an MM-DiT of this size", tree, shapes)
    return Described(file, found, shape, sets, next((heads for _, heads in split.values() if heads), ()), facts)


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
    trees, facts = opened(file, list(shapes))
    split = {which: without_projectors(tree) for which, tree in trees.items()}
    for tree, _ in split.values():
        check_fit(file, f"a {name} of this size", tree, shapes)
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
        raise ValueError(f"{file}: does not fit {name}; {'; '.join(faults)}{f' ({said})' if said else ''}")


def some(names: Sequence[str]) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def expected_in(recipe: Mapping[str, Any], told: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's model in the form of `Described.shape`; `told` is what its condition says of it."""
    size = {("in_channels" if name == "channels" else name): value for name, value in recipe["model"].items()}
    return {**size, **told}


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


# ---- names and shapes


def without_projectors(tree: Tree) -> tuple[Tree, tuple[Tree, ...]]:
    """A network's weights by name, and those of each projector beside them, under names of its own."""
    heads: dict[int, Tree] = {}
    for name, value in tree.items():
        # iREPA's MLP has REPA's layers under a name of its own; its other heads are one layer of that name.
        if match := re.fullmatch(r"projectors\.(\d+)\.(?:projection_layer\.(?=\d))?(.+)", name):
            heads.setdefault(int(match[1]), {})[match[2]] = value
    # SRA aligns the network with itself, through a head that nothing else needs.
    beside = re.compile(r"projectors\.\d+\..|ap_head\.linear[12]\.")
    weights = {name: value for name, value in tree.items() if not beside.match(name)}
    # A run without a teacher leaves a projector of width 0.
    return weights, tuple(heads[i] for i in sorted(heads) if all(math.prod(value.shape) for value in heads[i].values()))


def _tidy(tree: Tree, file: str) -> tuple[Tree, tuple[Tree, ...]]:
    """Weights under our names, and the projectors separately."""
    found, heads = without_projectors(tree)
    count = len({name.split(".")[1] for name in found if name.startswith("blocks.")})
    weights = {}
    for name, value in found.items():
        # Older REPA files number the blocks after the aligned one from 0 again.
        match = re.fullmatch(r"decoder_blocks\.(\d+)\.(.+)", name)
        weights[f"blocks.{count + int(match[1])}.{match[2]}" if match else name] = value
    if _PATCHES not in weights and (said := foreign.weights(weights)):
        raise ValueError(f"{file}: expected the weights of a SiT or DiT, found {said}")
    if joint.shows(weights):
        raise ValueError(f"{file}: the weights of a joint text and image transformer, expected those of a SiT or DiT")
    return weights, heads


def _layout(
    sets: Mapping[str, Tree], facts: Mapping[str, Any], told: str | None, expected: Mapping[str, Any], file: str
) -> tuple[str, str]:
    """The detected layout, checked against the given one, and "SiT" or "DiT", whose network it is."""
    tree = next(iter(sets.values()))
    if told == "ours" and not facts.get("ours"):
        raise ValueError(f"{file}: has no header of ours, expected a state, or weights that were imported")
    patch, out = tree.get(_PATCHES), tree.get(_OUT)
    if patch is None or out is None:
        absent = " and ".join(name for name in (_PATCHES, _OUT) if name not in tree)
        raise ValueError(f"{file}: lacks {absent}, which every SiT and DiT has; found {some(list(tree))}")
    if patch.ndim != 4 or out.ndim != 2:
        shapes = f"{tuple(patch.shape)} and {tuple(out.shape)}"
        raise ValueError(f"{file}: {_PATCHES} and {_OUT} are {shapes}, expected 4 and 2 dimensions")
    entries = math.prod(patch.shape[1:])  # C p p
    if len(out) == entries:
        found, system = _whose_velocity(file, facts, told), "SiT"
    elif len(out) != 2 * entries:
        raise ValueError(f"{file}: {len(out)} output entries a patch, expected {entries} (REPA) or {2 * entries} (SiT)")
    elif facts.get("ours") and facts.get("architecture") == "dit":
        found, system = "ours", "DiT"
    else:
        found = system = _whose(file, told)
    asked = "DiT" if expected.get("architecture") == "dit" else "SiT"
    if "depth" in expected and asked != system:
        raise ValueError(f"{file}: the weights of a {system}, but the model is a {asked}")
    return found, system


def _whose_velocity(file: str, facts: Mapping[str, Any], told: str | None) -> str:
    """Whose weights with as many output channels as input channels are: ours, REPA's, or SiT's without variance."""
    by = "ours" if facts.get("ours") else _PREDICTION.get(str((facts.get("args") or {}).get("prediction")))
    if told == "DiT":
        raise ValueError(f"{file}: as many output channels as input channels; expected twice as many in DiT's")
    if told == "SiT" and by not in (None, "SiT"):
        raise ValueError(
            f"{file}: is said to be SiT's, but its header says that it is {by if by == 'ours' else f'of {by}'}"
        )
    return by if by == "ours" else told or by or "REPA"


def _whose(file: str, told: str | None) -> str:
    """Whether weights with twice as many output channels are SiT's or DiT's, which have the same names and shapes."""
    match = _PUBLISHED.fullmatch(Path(file).name)
    named = match[1] if match else None
    if told in ("ours", "REPA"):
        raise ValueError(f"{file}: twice as many output channels as input channels, and as many in {told} files")
    if told is not None:
        if named not in (None, told):
            raise ValueError(f"{file}: is said to be {told}'s, but {named} publishes a file of this name")
        return told
    if named is None:
        raise ValueError(
            f"{file}: twice as many output channels as input channels, which the files of SiT and of DiT have. Give "
            "its layout: SiT (a velocity), or DiT (noise and its variance); for warm_start make it a "
            "file of ours by `haste import FILE OUT --layout ...`"
        )
    return named


def _shape(
    tree: Tree, facts: Mapping[str, Any], told: Mapping[str, Any], sizes: Iterable[Size], file: str
) -> dict[str, Any]:
    """Arguments of `SiT` or `DiT`, from the shapes of the weights; given values are checked."""
    needed = (LABELS, "blocks.0.mlp.fc1.weight", _PATCHES)
    missing = [name for name in needed if name not in tree or tree[name].ndim < 2]
    if missing:
        raise ValueError(f"{file}: does not hold {', '.join(missing)}, expected the weights of a SiT or DiT")
    width, channels, patch, _ = tree[_PATCHES].shape
    places = {int(match[1]) for name in tree if (match := re.match(r"blocks\.(\d+)\.", name))}
    depth = len(places)
    if places != set(range(depth)):
        raise ValueError(f"{file}: {depth} blocks up to block {max(places)}, expected all from 0 on")
    if not min(width, channels, patch):
        raise ValueError(f"{file}: {_PATCHES} is {tree[_PATCHES].shape}, expected (width, channels, patch, patch)")
    shape: dict[str, Any] = {"depth": depth, "width": width, "patch_size": patch, "in_channels": channels}
    shape["classes"] = len(tree[LABELS]) - 1
    shape["mlp_ratio"] = mlp_ratio(len(tree[needed[1]]), width)
    shape["heads"] = facts.get("heads") or told.get("heads") or _heads(depth, width, sizes, file)
    shape["input_size"] = _input_size(tree.get("pos_embed"), patch, told.get("input_size"), file)
    known = {name: value for name, value in told.items() if name != "architecture"}
    _check_expected(file, shape, known)
    if width % shape["heads"]:
        raise ValueError(f"{file}: {shape['heads']} heads do not divide its width {width}")
    return shape


def _check_expected(file: str, shape: Mapping[str, Any], told: Mapping[str, Any]) -> None:
    """Refuse weights of another size than was told, by all that they show."""
    pairs = [(name, shape[name], value) for name, value in told.items() if name in shape]
    if wrong := [f"{name}: found {own}, expected {value}" for name, own, value in pairs if own != value]:
        raise ValueError(f"{file}: not the model that was asked for; {'; '.join(wrong)}")


def _heads(depth: int, width: int, sizes: Iterable[Size], file: str) -> int:
    known = {(layers, wide): count for layers, wide, count in sizes}
    if (depth, width) not in known:
        raise ValueError(
            f"{file}: {depth} blocks of width {width} are no published size, and the weights do not show their "
            "heads: give their number"
        )
    return known[depth, width]


def _input_size(positions: Stored | None, patch: int, told: int | None, file: str) -> int:
    if positions is None:
        if told is None:
            raise ValueError(f"{file}: holds no pos_embed, so the side of its latent grid must be given")
        return told
    side = math.isqrt(positions.shape[1]) if positions.ndim == 3 else 0
    if side * side != (positions.shape[1] if positions.ndim == 3 else -1):
        raise ValueError(f"{file}: pos_embed is {positions.shape}, expected (1, a square number, width)")
    return side * patch
