"""diffusers' folders: a transformer, its scheduler and, of a DiT, the pipeline that loads them; out and in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from haste.files import artefact
from haste.models import diffusers_dit, diffusers_sd3
from haste.models.checkpoints import Checkpoint, finite
from haste.networks import headers, layouts
from haste.networks.tensors import placed

CONFIG, WEIGHTS, SCHEDULER = "config.json", "diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"
KINDS: dict[str, Any] = {"dit": diffusers_dit, "mmdit": diffusers_sd3}


def write(
    folder: Path,
    weights: Mapping[str, Tensor],
    shape: Mapping[str, Any],
    autoencoder: Path | None = None,
    labels: Sequence[str] | None = None,
) -> None:
    """Write the folder of a DiT, which `DiTPipeline.from_pretrained` loads, or of an MM-DiT.

    Args:
        folder: to be made; it must not exist. The network lies in `transformer`, its scheduler in `scheduler`.
        weights: ours.
        shape: as `haste.models.checkpoints.Checkpoint.shape`.
        autoencoder: a folder of an AutoencoderKL, copied as `vae`; None leaves it out, to be given to the loader.
        labels: of a DiT, names of the classes, in order; None numbers them.

    Raises:
        ValueError: a network that diffusers does not have, or no autoencoder there.
        OSError: the folder exists, or cannot be written.
    """
    kind = KINDS[shape["architecture"]]
    transformer = kind.config_of(shape)
    if autoencoder is not None and not (autoencoder / CONFIG).is_file():
        raise ValueError(f"{autoencoder}: expected the folder of an AutoencoderKL, with {CONFIG}")
    folder.mkdir(parents=True)
    for name in ("transformer", "scheduler"):
        (folder / name).mkdir()
    tensors = {name: value.contiguous() for name, value in kind.to_diffusers(weights, shape).items()}
    file = folder / "transformer" / WEIGHTS
    with artefact.replacing(file) as aside, artefact.saving_tensors(file):
        save_file(tensors, aside, metadata={"format": "pt"})
    artefact.write_json(folder / "transformer" / CONFIG, transformer)
    artefact.write_json(folder / SCHEDULER, kind.SCHEDULER)
    if autoencoder:
        shutil.copytree(autoencoder, folder / "vae")
    if index := kind.index(shape, labels, autoencoder is not None):
        artefact.write_json(folder / "model_index.json", index)  # last: without it nothing loads


def read(folder: Path, expected: Mapping[str, Any]) -> Checkpoint:
    """The DiT or MM-DiT in diffusers' folder of a pipeline, or of its transformer.

    Args:
        folder: the folder.
        expected: known entries of `Checkpoint.shape`.

    Raises:
        ValueError: there is none, another network, or weights that are not finite; the message names the file.
    """
    place = folder / "transformer" if (folder / "transformer").is_dir() else folder
    config, file = place / CONFIG, place / WEIGHTS
    beside = [above / SCHEDULER for above in (folder, place.absolute().parent)]
    if not config.is_file() or not file.is_file():
        raise ValueError(f"{folder}: expected diffusers' folder of a DiT or MM-DiT, with {CONFIG} and {WEIGHTS}")
    held, _ = headers.contents(str(file))
    said = _read(config)
    name = "mmdit" if isinstance(said, dict) and said.get("_class_name") == diffusers_sd3.CLASS else "dit"
    kind, called, place_of = KINDS[name], layouts.KNOWN[name], placed(str(file))
    if scheduler := next((path for path in beside if path.is_file()), None):
        _told(scheduler, kind.check_scheduler, _read(scheduler))
    shape = _told(config, kind.shape_of, said)
    if missing := sorted(kind.names(shape) - held.keys()):
        raise ValueError(f"{file}: does not hold {layouts.some(missing)}, expected the weights of a {kind.CLASS}")
    found = _told(file, kind.from_diffusers, {key: place_of(value) for key, value in held.items()}, shape)
    layouts.check_fit(str(file), f"a {called} of this size", found, kind.shapes(shape))
    shape["architecture"] = name
    pairs = ((key, shape.get(key), value) for key, value in expected.items())
    if wrong := [f"{key}: found {own}, expected {value}" for key, own, value in pairs if own != value]:
        raise ValueError(f"{file}: not the model that was asked for; {'; '.join(wrong)}")
    weights = finite(str(file), called, found)
    return Checkpoint(str(file), artefact.file_identity(file), "diffusers", shape, {"ema": weights})


def _read(file: Path) -> Any:
    return _told(file, lambda: json.loads(file.read_text()))


def _told(file: Path, look: Any, *given: Any) -> Any:
    """The result of a function; what it refuses is said with the file's name."""
    try:
        return look(*given)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: {error}") from error
