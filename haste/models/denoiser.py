"""What every denoising network has in common: what the trainer, the samplers and the alignment losses ask of it.

Shapes: B batch, C channels, N tokens, D width of the tokens, H heads, K head width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from haste.models.layers import AttentionTap, fill_normal, fill_xavier
from haste.networks.spec import Facts, Tap, each

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


class Denoiser(nn.Module):
    """A denoising network. A subclass is an architecture: `forward`, `taps`, and the keys of a configuration.

    It is made as `Class(input_size=, in_channels=, classes=, **settings)`, the settings as `Settings` has checked them;
    of another condition than labels, with that one's `arguments` in the place of `classes`.
    Its forward pass draws no random numbers and changes nothing; what it computes of an image depends on no other image
    of the batch; every parameter takes part in it. Otherwise a run that was killed would not end in the same bits.

    Settings            a `haste.config.Strict`: the keys of `models.NAME`, with their types, ranges and defaults
    input_size          height and width of the latents
    in_channels         their channels, C
    process             the name of the process that it is for, which says what it predicts and what it is given as t
    condition           the name of the condition that it understands, which says what it is given as y
    null_class          the label that stands for none: `classes`, the number of labels; 0 of another condition
    taps                what `forward` hands out when asked, by name
    block_list          its blocks, where they can be told apart
    can_checkpoint      whether it follows `checkpoint_blocks`: a configuration that asks others for it is refused
    checkpoint_blocks   True asks to keep only the blocks' inputs for the backward pass, as `through` does
    own_logsumexp       True asks tapped attention for its logsumexp; to follow is up to the network
    """

    Settings: ClassVar[Any] = None
    process: ClassVar[str] = "interpolant"
    condition: ClassVar[str] = "labels"
    can_checkpoint: ClassVar[bool] = False
    taps: Mapping[str, Tap]

    def __init__(self, *, input_size: int, in_channels: int, classes: int = 0):
        super().__init__()
        self.input_size, self.in_channels = input_size, in_channels
        self.classes = self.null_class = classes
        self.taps = {}
        self.checkpoint_blocks = self.own_logsumexp = False

    def forward(self, x: Tensor, t: Tensor, y: Any, taps: Collection[str] = ()) -> tuple[Tensor, dict[str, Any]]:
        """What it predicts at x (B, C, H, W), t (B,) and y, and the taps asked for.

        Of `interpolant` it predicts the velocity, (B, C, H, W), and t lies in [0, 1], where 0 is data; of another
        `haste.diffusion.process.Process` `outputs(C)` channels, and t is what its `time` gives. y is (B,) int64
        of `labels`; of another `haste.data.condition.Condition` what its `told` gives, as tensors.
        A tap "tokens.m" is (B, N, D), rows of the grid first; "attention.i" is an `AttentionTap`.
        """
        raise NotImplementedError(f"{type(self).__name__}.forward")

    def through(self, block: Callable[..., Any], *inputs: Any) -> Any:
        """What a block makes of its inputs; with `checkpoint_blocks` they alone are kept for the backward pass."""
        if self.checkpoint_blocks and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
        return block(*inputs)

    @property
    def block_list(self) -> Sequence[nn.Module]:
        """Its blocks in order, block 1 first: out of block m comes the tap "tokens.m".

        Those in `blocks`, where that is an `nn.ModuleList`, else none: then no gradient can be taken by block.
        """
        found = getattr(self, "blocks", None)
        return list(found) if isinstance(found, nn.ModuleList) else []

    def initialise(self, generator: torch.Generator) -> None:
        """First numbers, from `generator` alone: Xavier-uniform weights, N(0, 0.02^2) tables, zero biases.

        A network that begins otherwise, or has parameters outside linear, convolution, embedding and norm layers,
        extends this.

        Raises:
            ValueError: a layer's parameters are of no kind that this knows.
        """
        for name, layer in self.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                fill_xavier(layer, generator)
            elif isinstance(layer, nn.Embedding):
                fill_normal(layer.weight, 0.02, generator)
            elif isinstance(layer, _NORMS):
                layer.reset_parameters()
            elif own := [key for key, _ in layer.named_parameters(recurse=False)]:
                where = f"{type(self).__name__}{'.' if name else ''}{name}"
                raise ValueError(f"{where}: {', '.join(own)} would begin as anything, expected an `initialise` for it")

    @classmethod
    def facts(
        cls, settings: Mapping[str, Any], *, process: Any, condition: Any, input_size: int, in_channels: int
    ) -> Facts:
        """Taps, parameters and operations, from a network without memory; its answer is checked on the way.

        Args:
            settings: as `Settings` has checked them.
            process: the `haste.diffusion.process.Process` that it is for.
            condition: the `haste.data.condition.Condition` that it understands.
            input_size: as the class is made with.
            in_channels: as the class is made with.

        Raises:
            ValueError: settings that do not go with the latents; or outputs or taps are not of the shape that they
                are said to be.
        """
        y = each(lambda piece: torch.from_numpy(piece).to("meta"), condition.null(1))
        with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
            model = cls(input_size=input_size, in_channels=in_channels, **condition.arguments, **settings)
            x, t = torch.empty(1, in_channels, input_size, input_size), torch.empty(1)
            predicted, tapped = model(x, process.time(t), y, taps=set(model.taps))
        what = "velocity" if cls.process == "interpolant" else "output"
        _check(cls.__name__, what, predicted, (1, process.outputs(in_channels), input_size, input_size))
        for name, tap in model.taps.items():
            _check_tap(cls.__name__, name, tapped.get(name), tap)
        parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return Facts(dict(model.taps), parameters, float(counter.get_total_flops()), len(model.block_list))


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
