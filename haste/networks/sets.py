"""The sets of weights in a file, and what it says besides: where trainers put the model and its average. No torch."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from haste.networks import foreign, headers
from haste.networks.pickles import Namespace, Stored

KIND = "weights"
Tree = dict[str, Stored]

# Where programs put sets of weights, and which of ours each is; None: the average if there is no other.
_SETS = {"model": "model", "ema": "ema", "state_dict": None, "current_model_state": "model"}
_SETS |= {"model_state_dict": "model", "ema_state_dict": "ema", "model_ema": "ema", "module": "model"}
_STEPS = ("steps", "step", "global_step", "global_steps", "train_steps")
_SHOWN = 4  # names in a message
_PATHS = {"linear": "linear", "cosine": "cosine", "gvp": "cosine"}  # REPA's and SiT's names for our interpolants
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxdict, _SHORT.maxlist, _SHORT.maxtuple, _SHORT.maxstring = 3, 100, 100, 100, 1000


def opened(file: str, names: Sequence[str]) -> tuple[dict[str, Tree], dict[str, Any]]:
    """The sets of weights in a file under their names, projectors included, and its other contents.

    names: of the network's weights, by which it is found below the names of what it was a part of.
    """
    held, metadata = headers.contents(file)
    if not isinstance(held, Mapping):
        raise ValueError(f"{file}: expected a dictionary of weights, found {headers.kind(held)}")
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
    args = args.entries if isinstance(args, Namespace) else args if isinstance(args, Mapping) else {}
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
