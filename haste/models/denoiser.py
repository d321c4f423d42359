"""The interface of every denoising network, used by the trainer, the samplers and the alignment losses.

Shapes: B batch, C channels, N tokens, D width of the tokens, H heads, K head width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from haste.models.layers import AttentionTap, fill_normal, fill_xavier
from haste.networks.spec import Facts, Tap, each

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


class Denoiser(nn.Module):
    """A denoising network. A subclass is an architecture: `forward`, `taps`, and the keys of a configuration.

    It is constructed as `Class(input_size=, in_channels=, classes=, **settings)`, with settings checked by `Settings`;
    for a condition other than labels, with that condition's `arguments` instead of `classes`.
    Its forward pass draws no random numbers and changes no state; an image's output does not depend on the others of
    the batch; every parameter takes part in it. Otherwise a run that was killed would not end with the same bits.

    Settings            a `haste.config.Strict`: the keys of `models.NAME`, with their types, ranges and defaults
    input_size          height and width of the latents
    in_channels         their channels, C
    process             the name of its process, which defines its prediction and its time input t
    condition           the name of its condition, which defines its input y
    null_class          the label of the null condition: `classes`, the number of labels; 0 for another condition
    taps                the taps that `forward` can return, by name
    block_list          its blocks, if they can be distinguished
    can_checkpoint      whether it supports `checkpoint_blocks`; if not, configurations that request it are refused
    checkpoint_blocks   True requests that only the blocks' inputs are kept for the backward pass, as in `through`
    own_logsumexp       True requests the logsumexp of tapped attention; a network may ignore it
    can_precise_time    whether it supports `precise_time`; if not, configurations that request it are refused
    precise_time        True requests that the layers of the time alone leave autocast, as in `TimestepEmbedding`
    fill                initialises a linear layer or a convolution, also of the projectors trained with it
    """

    Settings: ClassVar[Any] = None
    process: ClassVar[str] = "interpolant"
    condition: ClassVar[str] = "labels"
    can_checkpoint: ClassVar[bool] = False
    can_precise_time: ClassVar[bool] = False
    fill: ClassVar[Any] = staticmethod(fill_xavier)
    taps: Mapping[str, Tap]

    def __init__(self, *, input_size: int, in_channels: int, classes: int = 0):
        super().__init__()
        self.input_size, self.in_channels = input_size, in_channels
        self.classes = self.null_class = classes
        self.taps = {}
        self.checkpoint_blocks = self.own_logsumexp = self.precise_time = False

    def forward(self, x: Tensor, t: Tensor, y: Any, taps: Collection[str] = ()) -> tuple[Tensor, dict[str, Any]]:
        """The prediction at x (B, C, H, W), t (B,) and y, and the requested taps.

        For `interpolant` it is the velocity, (B, C, H, W), and t is in [0, 1], where 0 is data; for another
        `haste.diffusion.process.Process` it has `outputs(C)` channels, and t is the result of its `time`. y is (B,)
        int64 for `labels`; for another `haste.data.condition.Condition` it is the result of its `told`, as tensors.
        A tap "tokens.m" is (B, N, D), rows of the grid first; "attention.i" is an `AttentionTap`.
        """
        raise NotImplementedError(f"{type(self).__name__}.forward")

    def through(self, block: Callable[..., Any], *inputs: Any) -> Any:
        """The output of a block; with `checkpoint_blocks` only its inputs are kept for the backward pass."""
        if self.checkpoint_blocks and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
        return block(*inputs)

    @property
    def block_list(self) -> Sequence[nn.Module]:
        """Its blocks in order, block 1 first: the output of block m is the tap "tokens.m".

        Those in `blocks`, if that is an `nn.ModuleList`, else none: then gradients by block are not possible.
        """
        found = getattr(self, "blocks", None)
        return list(found) if isinstance(found, nn.ModuleList) else []

    def initialise(self, generator: torch.Generator) -> None:
        """Initialise from `generator` alone: layers by `fill` (Xavier-uniform weights, zero biases), N(0, 0.02^2)
        tables.

        A network with another initialisation, or with parameters outside linear, convolution, embedding and norm
        layers, extends this.
        extends this.

        Raises:
            ValueError: a layer has parameters of an unknown kind.
        """
        for name, layer in self.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                self.fill(layer, generator)
            elif isinstance(layer, nn.Embedding):
                fill_normal(layer.weight, 0.02, generator)
            elif isinstance(layer, _NORMS):
                layer.reset_parameters()
            elif own := [key for key, _ in layer.named_parameters(recurse=False)]:
                where = f"{type(self).__name__}{'.' if name else ''}{name}"
                raise ValueError(
                    f"{where}: {', '.join(own)} would start with arbitrary values, expected an `initialise` for it"
                )

    @classmethod
    def facts(
        cls, settings: Mapping[str, Any], *, process: Any, condition: Any, input_size: int, in_channels: int
    ) -> Facts:
        """Taps, parameters and operations, from a network on the meta device; also checks the shapes of its outputs.

        Args:
            settings: as checked by `Settings`.
            process: its `haste.diffusion.process.Process`.
            condition: its `haste.data.condition.Condition`.
            input_size: as for the constructor.
            in_channels: as for the constructor.

        Raises:
            ValueError: settings that do not fit the latents; or outputs or taps that do not have their declared
                shapes.
        """
        from torch.utils.flop_counter import FlopCounterMode  # not above: with it comes Triton

        y = each(lambda piece: torch.from_numpy(piece).to("meta"), condition.like(1))
        with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
            model = cls(input_size=input_size, in_channels=in_channels, **condition.arguments, **settings)
            x, t = torch.empty(1, in_channels, input_size, input_size), torch.empty(1)
            predicted, tapped = model(x, process.time(t), y, taps=set(model.taps))
        what = "velocity" if cls.process == "interpolant" else "output"
        _check(cls.__name__, what, predicted, (1, process.outputs(in_channels), input_size, input_size))
        for name, tap in model.taps.items():
            _check_tap(cls.__name__, name, tapped.get(name), tap)
        parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        return Facts(dict(model.taps), parameters, float(counter.get_total_flops()), len(model.block_list), shapes)


def _check_tap(owner: str, name: str, found: Any, tap: Tap) -> None:
    tokens = tap.grid[0] * tap.grid[1]
    if tap.heads is None:
        _check(owner, f"tap {name}", found, (1, tokens, tap.width))
        return
    if not isinstance(found, AttentionTap):
        raise ValueError(f"{owner}: tap {name} is {type(found).__name__}, expected an AttentionTap")
    for part in ("q", "k"):
        _check(owner, f"{part} of tap {name}", getattr(found, part), (1, tap.heads, tokens, tap.width // tap.heads))


def _check(owner: str, what: str, found: Any, expected: tuple[int, ...]) -> None:
    shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
    if shape != expected:
        raise ValueError(f"{owner}: {what} is {shape}, expected {expected}")
