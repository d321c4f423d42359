"""A learner (model, its average, projectors, optimiser) and its state on disk.

A state is one safetensors file, which cannot contain executable code. Tensors are named
    model/NAME  ema/NAME  projectors/TERM/NAME  optimizer/{exp_avg,exp_avg_sq,step}/PARAMETER  scaler/{scale,growth}
    readings/TERM
and the header (metadata entry "haste", JSON) holds schema, key, recipe, step, input identities and provenance.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from haste.data import order
from haste.files import artefact
from haste.files import tensors as files
from haste.files.provenance import STATE, state_header
from haste.models.build import build_model
from haste.models.denoiser import Denoiser
from haste.models.heads import head_of

Network = TypeVar("Network", bound=nn.Module)

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclasses.dataclass
class Learner:
    """Everything that training changes.

    `projectors` has one head per active term that needs one; `scaler` multiplies the loss in fp16, else is disabled.
    """

    model: Denoiser
    ema: Denoiser
    projectors: nn.ModuleDict
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler

    def parameters(self) -> dict[str, nn.Parameter]:
        """Name -> parameter, model first: the optimiser's order."""
        return _named(self.model, self.projectors)


def _named(model: nn.Module, projectors: nn.ModuleDict) -> dict[str, nn.Parameter]:
    pairs = [(f"model/{name}", p) for name, p in model.named_parameters() if p.requires_grad]
    pairs += [
        (f"projectors/{term}/{name}", p) for term, head in projectors.items() for name, p in head.named_parameters()
    ]
    return dict(pairs)


def _seeded(seed: int, purpose: str) -> torch.Generator:
    # Each network has its own stream: adding a projector does not change the model's initial weights.
    return torch.Generator().manual_seed(int(order.generator(seed, purpose).integers(2**63)))


def new_learner(
    recipe: Mapping[str, Any],
    terms: Mapping[str, Mapping[str, Any]],
    widths: Mapping[str, int],
    device: torch.device | str = "cpu",
) -> Learner:
    """A learner before its first step.

    Args:
        recipe: a trajectory's recipe.
        terms: the active alignment terms.
        widths: teacher's name -> width of its tokens, for the terms that project onto them.
        device: where it is placed; the initial weights are the same everywhere.
    """
    model = build_model(recipe)
    model.initialise(_seeded(recipe["seed"], "initialise model"))
    projectors = nn.ModuleDict()
    if "features" in terms:
        term = terms["features"]
        head = head_of(term, model.taps[f"tokens.{term['depth']}"].width, widths[term["teacher"]])
        head.initialise(_seeded(recipe["seed"], "initialise projector features"), model.fill)
        projectors["features"] = head
    settings = recipe["training"]
    dtype = torch.float64 if settings["precision"] == "fp64" else torch.float32
    at = torch.device(device)
    model, projectors = _placed(model, at, dtype), _placed(projectors, at, dtype)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(
        list(_named(model, projectors).values()),
        lr=settings["lr"],
        betas=tuple(settings["betas"]),
        eps=settings["eps"],
        weight_decay=settings["weight_decay"],
        fused=True,
    )
    scaler = torch.amp.GradScaler(torch.device(device).type, enabled=settings["precision"] == "fp16")
    return Learner(model, ema, projectors, optimizer, scaler)


def _placed(network: Network, device: torch.device, dtype: torch.dtype) -> Network:
    """A network on a device in a precision; one that is so already is left alone: fake tensors cannot be moved."""
    moved = any(p.device != device or p.dtype != dtype for p in network.parameters())
    return network.to(device, dtype) if moved else network


def tensors_of(learner: Learner) -> dict[str, Tensor]:
    """All tensors of a state by their names in the file."""
    tensors = {f"model/{name}": value for name, value in learner.model.state_dict().items()}
    tensors |= {f"ema/{name}": value for name, value in learner.ema.state_dict().items()}
    for term, head in learner.projectors.items():
        tensors |= {f"projectors/{term}/{name}": value for name, value in head.state_dict().items()}
    for name, parameter in learner.parameters().items():
        for moment, value in learner.optimizer.state[parameter].items():
            tensors[f"optimizer/{moment}/{name}"] = value
    if learner.scaler.is_enabled():
        kept = learner.scaler.state_dict()
        tensors["scaler/scale"] = torch.tensor(kept["scale"], dtype=torch.float64)
        tensors["scaler/growth"] = torch.tensor(kept["_growth_tracker"])
    return {name: value.detach() for name, value in tensors.items()}


def save(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write a state atomically.

    Args:
        path: the file.
        tensors: those of a learner (`tensors_of`), and others beside them.
        header: the entries of the header, except schema and kind.

    Raises:
        OSError: the disk is full or the folder is not writable; an existing file stays as it was.
    """
    files.write(path, tensors, {"schema": artefact.SCHEMA, "kind": STATE, **header})


def read(path: Path | str, *, key: str, prefixes: tuple[str, ...] = ("",)) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a state; only tensors whose names start with one of `prefixes`.

    Raises:
        ValueError: missing, truncated, damaged, foreign, of another schema, or of another trajectory than `key`.
    """
    with files.opened(path, "state") as file:
        header = state_header(path, file.metadata())
        if header.get("key") != key:
            raise ValueError(f"{path}: a state of trajectory {header.get('key')}, expected {key}")
        if artefact.fingerprint(header["recipe"]) != key:
            raise ValueError(f"{path}: damaged or edited: its recipe is not that of trajectory {key}")
        names = [name for name in file.keys() if name.startswith(prefixes)]  # noqa: SIM118 - it is not a mapping
        return header, files.read(path, file, names)


def restore(learner: Learner, tensors: Mapping[str, Tensor], path: Path | str) -> None:
    """Load a state's tensors into a learner. Projectors that the learner no longer has are skipped.

    Raises:
        ValueError: a tensor is missing or has another shape; the message names the first ones.
    """
    expected = {name: value for name, value in tensors_of(learner).items() if not name.startswith("optimizer/")}
    expected |= {
        f"optimizer/{moment}/{name}": torch.zeros(()) if moment == "step" else parameter
        for name, parameter in learner.parameters().items()
        for moment in _MOMENTS
    }
    _check_fit(path, {name: value for name, value in tensors.items() if name in expected}, expected)
    with torch.no_grad():
        for name, value in expected.items():
            if not name.startswith(("optimizer/", "scaler/")):
                value.copy_(tensors[name])
    for name, parameter in learner.parameters().items():
        moments = {m: tensors[f"optimizer/{m}/{name}"] for m in _MOMENTS}
        learner.optimizer.state[parameter] = {m: value.to(parameter.device).clone() for m, value in moments.items()}
    if learner.scaler.is_enabled():
        kept = {"scale": tensors["scaler/scale"].item(), "_growth_tracker": int(tensors["scaler/growth"])}
        learner.scaler.load_state_dict({**learner.scaler.state_dict(), **kept})


def _check_fit(path: Path | str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are missing, unknown, or of another shape; the message names the first ones."""
    wrong = [
        f"{name} (found {_shape(found.get(name))}, expected {_shape(expected.get(name))})"
        for name in dict.fromkeys([*expected, *found])
        if name not in found or name not in expected or found[name].shape != expected[name].shape
    ]
    if wrong:
        raise ValueError(f"{path}: does not fit the model: {', '.join(wrong[:3])}{' ...' if len(wrong) > 3 else ''}")


def _shape(tensor: Tensor | None) -> str:
    return "nothing" if tensor is None else str(tuple(tensor.shape))


def trained_model(path: Path | str, *, key: str, weights: str = "ema") -> tuple[Denoiser, dict[str, Any]]:
    """The averaged (EMA) model of a state, frozen, or the raw one (`model`), and the state's header.

    Raises:
        ValueError: as `read`; or its weights do not fit its recipe, or are not finite.
    """
    header, tensors = read(path, key=key, prefixes=(f"{weights}/",))
    model = build_model(header["recipe"])
    model.load_state_dict(weights_in(tensors, weights, model, path))
    return model.requires_grad_(False).eval(), header


def weights_in(tensors: Mapping[str, Tensor], which: str, like: nn.Module, path: Path | str) -> dict[str, Tensor]:
    """One set of a state's weights, `model` or `ema`, under the model's own parameter names.

    Raises:
        ValueError: they do not fit the model, or are not finite.
    """
    found = {name: value for name, value in tensors.items() if name.startswith(f"{which}/")}
    _check_fit(path, found, {f"{which}/{name}": value for name, value in like.state_dict().items()})
    if broken := [name for name, value in found.items() if not value.isfinite().all()]:
        raise ValueError(f"{path}: {broken[0]} is not finite, expected numbers: nothing can be drawn from it")
    return {name.removeprefix(f"{which}/"): value for name, value in found.items()}


def weights_identity(model: nn.Module) -> str:
    """sha256 over names and bytes of a model's tensors: equal for equal weights, whatever file they came from."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + b"\0" + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
