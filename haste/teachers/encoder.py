"""Teachers: frozen vision transformers that return features, and the queries and keys of their attention.

B images, R their resolution, S the teacher's input size in pixels, N = h x w patch tokens, D width, H heads,
K head width. Class and register tokens never leave this file.
Layers are counted from 0.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError
from timm.layers import Attention, apply_rot_embed_cat, create_feature_extractor
from timm.models.eva import Eva, EvaAttention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional

from haste import extensions
from haste.align.losses import TeacherTargets
from haste.files import artefact
from haste.networks import hub
from haste.networks.registry import TEACHERS, Encoder
from haste.teachers import filters

DESCRIPTION, WEIGHTS = "part.json", "model.safetensors"

REFUSED = {
    "swin": "it attends within shifted windows and merges tokens, so it has no attention between all patches to align",
    "convnext": "it is a convolutional network, without attention to align and with features on a coarse grid",
}


# Networks of timm, and their attention, whose queries and keys can be read.
PLAIN = {(VisionTransformer, Attention), (Eva, EvaAttention)}


class Teacher:
    """A frozen timm VisionTransformer or Eva, with the preparation of its input.

    Attributes:
        low_pass: it sees only the spatial frequencies up to this share of Nyquist's at its input's size, as
            `haste.teachers.filters.low_pass`; None shows it the images as they are.
    """

    low_pass: float | None = None
    _graph_of: Callable[[int | None, tuple[int, ...]], Any] | None = None  # once compiled

    def __init__(
        self,
        network: VisionTransformer | Eva,
        *,
        identity: str,
        norm: tuple[Sequence[float], Sequence[float]],
        final_norm: bool = True,
        resize_first: bool = False,
    ) -> None:
        self.network = network.eval().requires_grad_(False)
        self.identity, self.final_norm, self.resize_first = (
            identity,
            final_norm,
            resize_first,
        )
        self.size = cast(tuple[int, int], network.patch_embed.img_size)
        self.mean = torch.tensor(norm[0]).view(1, 3, 1, 1)
        self.std = torch.tensor(norm[1]).view(1, 3, 1, 1)

    @classmethod
    def load(
        cls,
        where: str | Path,
        *,
        resolution: int = 256,
        weights: str | Path | None = None,
        device: torch.device | str = "cpu",
    ) -> Teacher:
        """Load a teacher from a folder that the pipeline made, or a public one by its name in TEACHERS or timm.

        Args:
            where: a folder with `part.json` and `model.safetensors`, or a name.
            resolution: side of the images in pixels, which sets a public teacher's input size and grid. A folder's
                teacher reads images of the size it was trained on and resizes others.
            weights: for a public teacher, its weights in a local file (timm's layout or the authors'); None: the hub.
            device: where it runs.

        Raises:
            ValueError: an unknown or unsuitable encoder, weights that are missing, truncated, unfitting or cannot be
                fetched, or a resolution that does not give whole patches.
        """
        if Path(where).is_dir():
            if weights is not None:
                raise ValueError(f"{where}: a folder has weights of its own, found weights {weights} beside it")
            teacher = _from_folder(Path(where))
        elif str(where) in ADDED:
            teacher = ADDED[str(where)](resolution, weights)
        else:
            teacher = _from_timm(str(where), resolution, weights)
        return teacher.to(device)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Teacher:
        """Move to a device, and the network to a dtype if one is given; returns itself.

        Images are prepared in float32 at least: half precision would round them before they enter the network.
        """
        self.network.to(device, dtype)
        precise = None if dtype is None else torch.promote_types(dtype, torch.float32)
        self.mean, self.std = self.mean.to(device, precise), self.std.to(device, precise)
        return self

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self.network.blocks)

    @property
    def heads(self) -> int:
        """Number of attention heads."""
        return self._attention(0).num_heads

    @property
    def width(self) -> int:
        """Width of the features."""
        return self.network.embed_dim

    @property
    def head_width(self) -> int:
        """Width of one head's queries and keys."""
        return self._attention(0).head_dim

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w), the grid of patch tokens."""
        return cast(tuple[int, int], self.network.patch_embed.grid_size)

    def prepare(self, images: Tensor) -> Tensor:
        """Images uint8 NHWC (B, R, R, 3), 0..255 -> the network's input, NCHW (B, 3, S, S), normalised, in its dtype.

        Resized by bicubic interpolation without antialiasing. Its weights sum to one, so that resizing first and
        normalising first differ by rounding only; each encoder keeps its authors' order. Then filtered, if it has a
        filter.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"teacher: expected uint8 NHWC images, found {images.dtype} {tuple(images.shape)}")
        x = images.permute(0, 3, 1, 2).to(self.mean.dtype) / 255
        ready = (
            (self._resize(x) - self.mean) / self.std if self.resize_first else self._resize((x - self.mean) / self.std)
        )
        ready = ready if self.low_pass is None else filters.low_pass(ready, self.low_pass)
        return ready.to(self.network.patch_embed.proj.weight.dtype)  # type: ignore[union-attr, arg-type]

    def _resize(self, x: Tensor) -> Tensor:
        if x.shape[-2:] == self.size:
            return x
        return functional.interpolate(x, self.size, mode="bicubic", align_corners=False, antialias=False)

    def __call__(
        self, images: Tensor, *, features: bool, layer: int | None = None, attention: Sequence[int] = ()
    ) -> TeacherTargets:
        """Targets for a batch of clean images, uint8 NHWC (B, R, R, 3).

        Args:
            images: 0..255, on the teacher's device.
            features: whether to return the features of a layer.
            layer: which one's; None is the last. Those of all layers pass the last norm, if those of the last do.
            attention: layers whose queries and keys to return. Layers after the last one needed are not run.

        Raises:
            ValueError: nothing is requested, or a layer that the teacher does not have.
        """
        layer = self.depth - 1 if layer is None else layer
        with torch.inference_mode():
            found = self._forward(images, layer if features else None, attention)

        # Losses save targets for their backward pass, which inference-mode tensors do not allow: copy them.
        pairs = {layer: (q.clone(), k.clone()) for layer, (q, k) in found.attention.items()}
        return TeacherTargets(None if found.features is None else found.features.clone(), pairs, self.grid)

    def _forward(self, images: Tensor, layer: int | None, attention: Sequence[int]) -> TeacherTargets:
        """layer: whose tokens are the features; None if none are requested."""
        needed, x = self._needed(layer, attention), self.prepare(images)
        if self._graph_of is not None:
            outputs = self._graph_of(layer, tuple(sorted(set(attention))))(x)
            tokens = None if layer is None else self._finished(outputs["tokens"])
            taps = {one: {name: outputs[f"{name}.{one}"] for name in ("q", "k")} for one in sorted(set(attention))}
        else:
            tokens, taps = self._looked_at(x, needed, layer is not None and self.final_norm, attention)
        found = {one: self._queries_and_keys(one, tap) for one, tap in taps.items()}
        return TeacherTargets(None if layer is None else tokens, found, self.grid)

    def _looked_at(
        self, x: Tensor, needed: Sequence[int], norm: bool, attention: Sequence[int]
    ) -> tuple[Tensor, dict[int, dict[str, Any]]]:
        """Patch tokens of the first of the needed blocks, that of the features if they are requested; and layer -> what
        `_tapped` sees of its attention."""
        how: Any = {"stop_early": True, "output_fmt": "NLC", "intermediates_only": True}
        with contextlib.ExitStack() as hooks:
            taps = {one: hooks.enter_context(_tapped(self._attention(one))) for one in sorted(set(attention))}
            blocks = self.network.forward_intermediates(x, indices=list(needed), norm=norm, **how)
        return cast(list[Tensor], blocks)[0], taps

    def _finished(self, tokens: Tensor) -> Tensor:
        """A block's tokens (B, prefix + N, D) -> features (B, N, D)."""
        return (self.network.norm(tokens) if self.final_norm else tokens)[:, self.network.num_prefix_tokens :]

    def compile(self, **how: Any) -> None:
        """Compile what is asked of it from now on; `how` as for `torch.compile`. One with rotary positions stays as it
        is.

        A compiler sees neither `forward_intermediates`, since it takes a network's own call, nor hooks. So a graph of
        the network up to the last layer needed, with these outputs, is made for each kind of request.
        """

        def graph_of(layer: int | None, attention: tuple[int, ...]) -> Any:
            outputs = {f"blocks.{one}.attn.{name}_norm": f"{name}.{one}" for one in attention for name in ("q", "k")}
            outputs |= {} if layer is None else {f"blocks.{layer}": "tokens"}
            graph = create_feature_extractor(self.network, outputs)
            graph.compile(**how)
            return graph

        if not isinstance(self.network, Eva):  # their positions would be another output of the graph
            self._graph_of = functools.cache(graph_of)

    def _attention(self, layer: int) -> Attention | EvaAttention:
        return cast(Attention | EvaAttention, self.network.blocks[layer].attn)

    def _needed(self, layer: int | None, attention: Sequence[int]) -> list[int]:
        """The blocks whose tokens are asked of the network: that of the features, and the last that has to run."""
        asked = [*([] if layer is None else [layer]), *attention]
        if wrong := [one for one in asked if not 0 <= one < self.depth]:
            raise ValueError(f"teacher: layers {wrong} requested, it has layers 0..{self.depth - 1}")
        if not asked:
            raise ValueError("teacher: neither features nor the attention of any layer requested")
        return [max(asked)] if layer is None else sorted({layer, max(asked)})

    def _queries_and_keys(self, layer: int, tap: dict[str, Any]) -> tuple[Tensor, Tensor]:
        prefix, rope = self.network.num_prefix_tokens, tap.get("rope")
        pair = [tap[name][:, :, prefix:] for name in ("q", "k")]  # B H (prefix + N) K -> B H N K
        if rope is not None:  # positions turn patch tokens alone
            half = cast(EvaAttention, self._attention(layer)).rotate_half
            pair = [apply_rot_embed_cat(one, rope, half=half).type_as(one) for one in pair]
        return pair[0].contiguous(), pair[1].contiguous()


@contextlib.contextmanager
def _tapped(attention: Attention | EvaAttention) -> Iterator[dict[str, Any]]:
    """While it lasts: q and k of all tokens (B, H, prefix + N, K), normalised, and the rotation that follows, if any.

    Hooks are on what the attention calls before it attends, so that it stays fused itself.
    """
    seen: dict[str, Any] = {}
    handles = [
        attention.register_forward_pre_hook(
            lambda module, given, named: seen.update(rope=named.get("rope")), with_kwargs=True
        ),
        attention.q_norm.register_forward_hook(lambda module, given, out: seen.update(q=out)),
        attention.k_norm.register_forward_hook(lambda module, given, out: seen.update(k=out)),
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def weight_file(name: str) -> Path:
    """The weights of a public teacher in the hub's local cache, fetched if they are missing.

    Raises:
        ValueError: unknown name, or the weights are not in the cache and cannot be fetched.
    """
    spec = known(name)
    if spec.by_file:
        raise ValueError(spec.asked(f"teacher {name}"))
    return hub.timm_weights(spec.timm, f"teacher {name}")


def known(name: str) -> Encoder:
    """A public teacher by its name in TEACHERS or in timm.

    A plain ViT or Eva of timm that is not in TEACHERS gets an input of 16 x 16 patches for images of 256 px, timm's
    channel normalisation, and its last norm.

    Raises:
        ValueError: unknown, or an encoder that cannot be a teacher, with the reason.
    """
    for short, spec in TEACHERS.items():
        if name == short or (name == spec.timm and not spec.by_file):
            return spec
    for family, reason in REFUSED.items():
        if family in name.lower():
            raise ValueError(f"teacher {name}: refused, {reason}")
    try:
        with torch.device("meta"):  # only the shapes
            network = timm.create_model(name, num_classes=0)
    except (RuntimeError, ValueError) as error:
        names = ", ".join(sorted(TEACHERS))
        raise ValueError(f"teacher {name}: neither a folder, nor in timm, nor one of {names}") from error
    if not isinstance(network, VisionTransformer | Eva) or (type(network), type(network.blocks[0].attn)) not in PLAIN:
        raise ValueError(f"teacher {name}: refused, timm's {type(network).__name__} is not a plain vision transformer")
    source, (patch, _) = cast(dict[str, Any], network.pretrained_cfg), network.patch_embed.patch_size
    heads = cast(Attention | EvaAttention, network.blocks[0].attn).num_heads
    norm = (source["mean"], source["std"])
    return Encoder(name, patch, 16 * patch, len(network.blocks), heads, network.embed_dim, norm)


def with_any_weights(name: str, resolution: int = 256) -> Teacher:
    """A public teacher with the network that its weights would be loaded into, on torch's default device: what it costs
    follows from no weights. Raises ValueError as `known`, and for a resolution that does not give whole patches."""
    spec = known(name)
    options = {"img_size": spec.side(name, resolution), "num_classes": 0, **spec.overrides}
    network = cast(VisionTransformer, timm.create_model(spec.timm, pretrained=False, **options))
    how = {"final_norm": spec.final_norm, "resize_first": spec.resize_first}
    return Teacher(network, identity="any", norm=spec.norm, **how)


# Teachers of other packages: a function of the images' resolution and a weights file or None.
ADDED = extensions.Table("teachers", {}, taken=TEACHERS)


def _from_timm(name: str, resolution: int, weights: str | Path | None) -> Teacher:
    spec = known(name)
    side = spec.side(name, resolution)
    path = weight_file(name) if weights is None else Path(weights)
    return Teacher(
        hub.timm_transformer(spec.timm, path, f"teacher {name}", img_size=side, **spec.overrides),
        identity=artefact.file_identity(path),
        norm=spec.norm,
        final_norm=spec.final_norm,
        resize_first=spec.resize_first,
    )


def _from_folder(folder: Path) -> Teacher:
    part = artefact.read_json(folder / DESCRIPTION, "part")
    if part.get("part") != "teacher":
        raise ValueError(f"{folder / DESCRIPTION}: expected a teacher, found {part.get('part')!r}")
    artefact.check_entries(folder / DESCRIPTION, part, identity=str, architecture=dict)
    artefact.check_entries(folder / DESCRIPTION, part["architecture"], kwargs=dict, mean=list, std=list)
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise ValueError(f"{weights}: expected the teacher's weights, found no file")
    if (found := artefact.file_identity(weights)) != part["identity"]:
        raise ValueError(f"{weights}: expected the weights {part['identity'][:12]}, found {found[:12]}")
    architecture = part["architecture"]
    try:
        network = VisionTransformer(**architecture["kwargs"])
        network.load_state_dict(hub.finite(weights, safetensors.torch.load_file(weights)))
    except (SafetensorError, RuntimeError, TypeError) as error:
        raise ValueError(f"{weights}: these weights do not fit {architecture}: {error}") from error
    return Teacher(
        network,
        identity=part["identity"],
        norm=(architecture["mean"], architecture["std"]),
    )
