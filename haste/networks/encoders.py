"""Files of vision transformers as their authors save them: which weights are the encoder's, and what lies beside. No
torch.

DINO's hold `teacher` and `student`, whose names begin with `module.` or `backbone.`; MoCov3's `state_dict`, with
`module.base_encoder.` beside a momentum encoder; I-JEPA's `encoder` and `target_encoder`; MAE's `model`, perhaps with
its decoder; those of DINOv2, DINOv3 and timm the encoder alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

_PATCHES = "patch_embed.proj.weight"  # every encoder has it; what stands before it, all its names begin with
# Of several encoders the first of these: averages, as timm's own loader takes them; DINO's teacher, by which its
# authors evaluate; REPA's choice for I-JEPA and MoCov3.
_SETS = ("state_dict_ema", "model_ema", "teacher", "state_dict", "model", "encoder")
_PREFIXES = ("module.base_encoder.", "base_encoder.", "teacher.backbone.")
# Heads and decoders of the training, which a teacher does not have; and what timm passes over itself.
_IGNORED = {"mask_token", "rope_embed.periods"}
_BESIDE = re.compile(r"(head|fc|decoder|predictor|projectors?|\w+_head)\.|decoder_\w+|head_\w+\.")
# Some copies of MoCov3-L have these names.
_MISNAMED = {"13.norm13": "13.norm1", "13.mlp.fc13": "13.mlp.fc1", "14.norm14": "14.norm2", "14.mlp.fc14": "14.mlp.fc2"}


def encoder_in(held: Any) -> tuple[dict[str, Any], list[str]] | None:
    """The encoder's weights in what a file holds, by names without a prefix, and the names of what else is in it, the
    many parts of a module as one.

    None where no weights of patches show which names are the encoder's.

    Raises:
        ValueError: several encoders, none of which is known to be meant; the message is without the file's name.
    """
    found = {(place, prefix): tree for place, tree in _sets(held) for prefix in _prefixes(tree)}
    if not found:
        return None
    ranks = {one: (_rank(one[0], _SETS), _rank(one[1], _PREFIXES)) for one in found}
    first = [one for one in found if ranks[one] == min(ranks.values())]
    if len(first) > 1:
        raise ValueError(f"holds several encoders ({', '.join(map('/'.join, first))}), expected one")
    (place, prefix), tree = first[0], found[first[0]]
    mine = {name.removeprefix(prefix): value for name, value in tree.items() if name.startswith(prefix)}
    beside = {name for name in mine if _BESIDE.match(name)}
    rest = beside | {name for name in tree if not name.startswith(prefix)} | _IGNORED & mine.keys()
    others = {other for other, _ in _sets(held) if other != place}
    return {_renamed(name): mine[name] for name in mine if name not in beside}, sorted({*map(_group, rest)} | others)


def _sets(held: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Sets of weights with their place: "" is the file itself."""
    if isinstance(held, Mapping):
        for place, tree in [("", held), *((str(name), value) for name, value in held.items())]:
            tensors = tree if isinstance(tree, Mapping) else {}
            if own := {str(name): value for name, value in tensors.items() if hasattr(value, "shape")}:
                yield place, own


def _prefixes(tree: Mapping[str, Any]) -> list[str]:
    return [name.removesuffix(_PATCHES) for name in tree if re.search(rf"(^|\.){_PATCHES}$", name)]


def _rank(name: str, order: tuple[str, ...]) -> int:
    return order.index(name) if name in order else len(order)


def _group(name: str) -> str:
    """The part of the training that a weight belongs to."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "module" else parts[0]


def _renamed(name: str) -> str:
    for wrong, right in _MISNAMED.items():
        name = re.sub(rf"^blocks\.{re.escape(wrong)}\.", f"blocks.{right}.", name)
    return name
