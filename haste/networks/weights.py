"""Weights of public networks before they are loaded: where they lie on this machine, and whose they are. No torch."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from haste.networks import foreign, headers
from haste.networks.pickles import Stored
from haste.networks.registry import Encoder

# A block's attention, as timm, the authors of DINO, MAE and I-JEPA, and OpenAI's CLIP name it.
_BLOCK = re.compile(r"(?:^|\.)(?:res)?blocks\.(?:\d+\.)?(\d+)\.attn\.(?:qkv\.|in_proj_)weight$")
_PATCHES = re.compile(r"(?:^|\.)(?:patch_embed\.proj|visual\.conv1|v\.conv1)\.weight$")
_INCEPTION = {"fc.weight": (1008, 2048), "Mixed_6d.branch1x1.conv.weight": (192, 768, 1, 1)}


def check_transformer(file: Path, called: str, spec: Encoder | None) -> int | None:
    """Refuse a file that does not hold a vision transformer, or one of another size.

    Args:
        file: safetensors, a file of torch's, or big_vision's .npz, which is left to timm.
        called: its name in messages, such as "teacher DINOv2-B".
        spec: the expected size; None for one that is only known once timm has made it.

    Returns:
        The number of its blocks; None if the header does not tell.

    Raises:
        ValueError: the message names the file, what was found and what was expected.
    """
    if not file.is_file():
        raise headers.MissingError(f"{file}: expected the weights of {called}, found no file")
    if file.suffix in (".npz", ".npy"):
        return None
    trees = list(_trees(headers.contents(file, f"the weights of {called}")[0]))
    names = [name for tree in trees for name in tree]
    said = foreign.weights(names) if names else "no tensors by name"
    if said not in (None, foreign.VISION):
        raise ValueError(f"{file}: expected the weights of {called}, found {said}")
    depths = set()
    for tree in trees:
        blocks = {int(match[1]): tree[name].shape for name in tree if (match := _BLOCK.search(name))}
        patches = [value.shape[-1] for name, value in tree.items() if _PATCHES.search(name)]
        depths |= {max(blocks) + 1} if blocks else set()
        if blocks and spec:
            found = (max(blocks) + 1, blocks[max(blocks)][-1], *patches[:1])
            expected = (spec.depth, spec.width, *[spec.patch for _ in patches[:1]])
            if found != expected:
                words = ("{} blocks of width {}" + ", patches of {} px" * len(patches[:1])).format
                raise ValueError(
                    f"{file}: these are not weights of {called}: found {words(*found)}, expected {words(*expected)}"
                )
    return depths.pop() if len(depths) == 1 else None


def _trees(held: Any, depth: int = 0) -> Iterator[Mapping[str, Stored]]:
    """The sets of tensors in what a file holds, at any of its upper levels."""
    if isinstance(held, Mapping):
        if own := {str(name): value for name, value in held.items() if isinstance(value, Stored)}:
            yield own
        for value in held.values() if depth < 2 else ():
            yield from _trees(value, depth + 1)


def check_inception(file: Path) -> None:
    """Refuse a file that does not hold torch-fidelity's Inception v3, or a machine without torch-fidelity.

    Raises:
        ValueError: the message names the file, what was found and what was expected.
    """
    if importlib.util.find_spec("torch_fidelity") is None:
        raise ValueError("the detector inception needs torch-fidelity, which is not installed")
    if not file.is_file():
        raise headers.MissingError(f"{file}: expected the weights of inception, found no file")
    held, _ = headers.contents(file, "the weights of inception")
    if not isinstance(held, Mapping) or not all(isinstance(value, Stored) for value in held.values()):
        raise ValueError(f"{file}: expected tensors by name, found {headers.kind(held)}")
    for name, shape in _INCEPTION.items():
        found = held[name].shape if name in held else foreign.weights(held) or "none"
        if found != shape:
            raise ValueError(
                f"{file}: expected torch-fidelity's Inception v3, found other weights: {name} is {found}, "
                f"expected {shape}"
            )


def check_timm_name(name: str) -> None:
    """Refuse a name that none of timm's files defines; timm itself is not imported, because that takes seconds.

    Raises:
        ValueError: nothing there is called so.
    """
    spec = importlib.util.find_spec("timm")
    folders = spec.submodule_search_locations if spec else []
    sources = [path for folder in folders or [] for path in sorted(Path(folder, "models").glob("*.py"))]
    made = f"def {name.partition('.')[0]}("
    if sources and not any(made in path.read_text(encoding="utf-8") for path in sources):
        raise ValueError(f"teacher {name}: neither a folder, nor in timm, nor one of this package's names")


def why_not(error: Exception) -> str:
    """Why the hub's client does not give what is asked for, in few words: its own text is of its own arguments."""
    from huggingface_hub import constants, errors

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE forbids it"
    if isinstance(error, errors.GatedRepoError):
        return "its repository is gated: ask for access on its page, then `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the hub shows no such repository"
    if isinstance(error, errors.RevisionNotFoundError):
        return "its repository has no such revision"
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def in_cache(repository: str, called: str, *files: str) -> Path | None:
    """The first of these files of the hub's that lies on this machine; None if a job will fetch it.

    Args:
        repository: a hub id, or `ID@REVISION`.
        called: its name in messages.
        files: in order of preference.

    Raises:
        ValueError: it is not here, and HF_HUB_OFFLINE forbids to fetch it.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    of, _, revision = repository.partition("@")
    for file in files:
        if isinstance(found := try_to_load_from_cache(of, file, revision=revision or None), str):
            return Path(found)
    if constants.HF_HUB_OFFLINE:
        raise headers.MissingError(
            f"{called}: its weights ({repository}) are not on this machine, and HF_HUB_OFFLINE forbids to fetch them. "
            "Run `haste fetch` without it where there is a network, or give a local file"
        )
    return None
