"""Weights of a SiT, DiT or MM-DiT from other projects' files, and ours for other programs.

Supported layouts:
    ours    states and imported weights: safetensors with a header
    REPA    files of REPA and HASTE: a .pt of {"model", "ema", "opt", "args", "steps"}, or one bare set of weights
    SiT     files of SiT: the same, with twice the output channels, of which the first half is used, and time from
            noise (t = 0) to data (t = 1)
    DiT     files of DiT: as SiT's, with the noise and its variance as output channels, and integer steps as time
The file's name does not matter. Nothing in a file is executed: `haste.networks.headers` finds the tensors' places, and
here the numbers are read from there.

The result has our names (which are REPA's), our time (t = 0 is data) and, for a SiT, as many output channels as input
channels.
Shapes: D model width, p patch size, C channels, F = 256 timestep features.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from haste.files import artefact
from haste.files import tensors as files
from haste.models.dit import DiT
from haste.models.layers import sincos_positions
from haste.models.mmdit import MMDiT
from haste.models.sit import SiT
from haste.models.transformer import Transformer
from haste.networks import hub_files, layouts
from haste.networks.layouts import Described, Size
from haste.networks.sets import KIND
from haste.networks.tensors import placed

Weights = Mapping[str, Tensor]
_KINDS: dict[str, type[Transformer]] = {"sit": SiT, "dit": DiT, "mmdit": MMDiT}


@dataclass(frozen=True)
class Checkpoint:
    """Weights of a SiT, DiT or MM-DiT, as read from a file.

    file: its path; sha256: of the file; layout: one of `layouts.LAYOUTS`.
    shape: arguments of `SiT`: depth, width, heads, patch_size, mlp_ratio, input_size, in_channels, classes; for another
        architecture its name and its constructor's arguments.
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
        return layouts.chosen(self.file, self.weights, which)

    def model(self, which: str = "ema") -> Transformer:
        """The model with one set of weights, float32, frozen."""
        kind = _KINDS[self.shape.get("architecture", "sit")]
        model = kind(**{name: value for name, value in self.shape.items() if name != "architecture"})
        model.load_state_dict(dict(self.chosen(which)))
        return model.requires_grad_(False).eval()


def read_checkpoint(
    path: Path | str,
    *,
    layout: Literal["ours", "REPA", "SiT", "DiT"] | None = None,
    expected: Mapping[str, Any] | None = None,
    sizes: Iterable[Size] = (),
) -> Checkpoint:
    """Read the weights of a SiT, DiT or MM-DiT from a file of any known layout.

    Args:
        path: the file, or the id of one of the hub.
        layout: whose file it is; None detects it from the content. SiT's and DiT's have the same names and shapes, so
            they must be given, unless the file has the name under which they publish it.
        expected: known entries of `Checkpoint.shape`; a file that differs is refused. The number of attention heads,
            which weights do not show, comes from here, from the file's header or, by depth and width, from `sizes`;
            input_size comes from here if the file holds no positions.
        sizes: known (depth, width, heads).

    Raises:
        ValueError: the file is missing, truncated, foreign or contains code; or weights are missing, of another shape,
            not finite or unknown. The message names the file, what was found and what was expected.
    """
    described = layouts.described(str(hub_files.local(path)), layout, expected, sizes)
    found = _read(described, layouts.KNOWN[described.shape.get("architecture", "sit")])
    if described.layout != "SiT":
        return found
    return dataclasses.replace(found, weights={n: _turned(tree, described.shape) for n, tree in found.weights.items()})


def read_weights_of(
    path: Path | str, name: str, shapes: Mapping[str, tuple[int, ...]], shape: Mapping[str, Any]
) -> Checkpoint:
    """Read the weights of any network from a file: a state, imported weights, or a .pt in REPA's layout.

    Args:
        path: the file.
        name: the architecture's.
        shapes: of its weights, by their names, which may have prefixes in the file.
        shape: becomes `Checkpoint.shape`.

    Raises:
        ValueError: as `read_checkpoint`.
    """
    return _read(layouts.described_as(str(hub_files.local(path)), name, shapes, shape), name)


def _read(what: Described, name: str) -> Checkpoint:
    """The numbers of described weights, as float32 or float64."""
    identity = artefact.file_identity(what.file)
    hub_files.check_whole(Path(what.file), identity)
    if what.facts.get("ours"):
        files.check(what.file, but=("optimizer/", "scaler/"))
    place = placed(what.file)
    weights = {which: {name: place(value) for name, value in tree.items()} for which, tree in what.sets.items()}
    heads = tuple({name: place(value) for name, value in head.items()} for head in what.projectors)
    for tree in weights.values():
        if name in layouts.KNOWN.values() and "pos_embed" not in tree:
            side = what.shape["input_size"] // what.shape["patch_size"]
            tree["pos_embed"] = sincos_positions(what.shape["width"], (side, side))[None]
    weights = {which: finite(what.file, name, tree) for which, tree in weights.items()}
    facts = dict(what.facts)
    return Checkpoint(what.file, identity, what.layout, what.shape, weights, heads, facts)


def finite(file: str, name: str, tree: Weights) -> dict[str, Tensor]:
    """Weights as float32 or float64. ValueError if they are not finite; it says which file and network's they are."""
    if broken := [one for one, value in tree.items() if not value.is_floating_point() or not value.isfinite().all()]:
        raise ValueError(f"{file}: does not fit a {name} of this size; not finite: {layouts.some(broken)}")
    return {one: _widened(value) for one, value in tree.items()}


def _widened(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32)).contiguous()


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
    channels, patch = shape["in_channels"], shape["patch_size"]
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        out = tree[name]
        # Within a patch channels come last: (p p, 2 C, ...), or C where it was trained without a variance.
        rows = out.view(patch**2, -1, *out.shape[1:])
        turned[name] = -rows[:, :channels].flatten(0, 1)
    return turned


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
    shape, named = dict(checkpoint.shape), hub_files.origin(checkpoint.file)
    named = Path(named).name if named == checkpoint.file else named
    header = {
        "schema": artefact.SCHEMA,
        "kind": KIND,
        "model": {name: shape[name] for name in shape if name != "classes"},
        "classes": shape.get("classes"),
        "time": "t = 0 is data",
        **{name: checkpoint.facts.get(name) for name in ("step", "path", "process", "args")},
        "source": checkpoint.facts.get("source")
        or {"file": named, "sha256": checkpoint.sha256, "layout": checkpoint.layout},
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
