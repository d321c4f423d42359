"""What a file is and how it was made, by its own record. No torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from haste.files import artefact
from haste.networks.headers import safetensors_header

STATE = "state"
STATE_NAME = re.compile(r"step-(\d{8,})\.safetensors$")
RECORDS = ("manifest.json", "part.json", "trajectory.json")  # of a folder


def provenance_of(given: Path) -> dict[str, Any]:
    """The header of any artefact, or of its folder: kind, key, recipe, inputs, code, versions, hardware, time.

    Raises:
        ValueError: the file is missing, or not one that this package made.
    """
    path = given
    if given.is_dir():
        record = _record_in(given)
        if record is None:
            raise ValueError(f"{given}: a folder without {', '.join(RECORDS)} or made-*.json")
        path = record
    if not path.exists():
        raise ValueError(f"{path}: no such file")
    read = {".safetensors": _of_state, ".h5": _of_shard, ".npz": _of_samples, ".json": _of_json, ".png": _of_picture}
    header = read[path.suffix](path) if path.suffix in read else {}
    if "schema" not in header and (beside := _record_in(path.parent, ("part.json",))):
        header = _of_json(beside)  # of weights, of a report's tables: states and shards must have their own
    if "schema" not in header:
        known = f"; expected one of {', '.join(read)}, or a file beside its record" if path.suffix not in read else ""
        raise ValueError(f"{path}: not made by this package, or it does not say how{known}")
    return header


def _record_in(folder: Path, names: Sequence[str] = RECORDS) -> Path | None:
    """The file that records how a folder was made; a report's record is named by its inputs."""
    found = [folder / name for name in names if (folder / name).exists()]
    return next(iter([*found, *sorted(folder.glob("made-*.json"))]), None)


def _of_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: broken JSON") from error
    if not isinstance(found, dict):
        return {}
    return found


def _of_picture(path: Path) -> dict[str, Any]:
    from PIL import Image

    try:
        with Image.open(path, formats=("PNG",)) as image:
            return json.loads(image.info.get("haste", "{}"))
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"{path}: truncated, or no PNG ({error})") from error


def _of_state(path: Path) -> dict[str, Any]:
    try:
        return json.loads(safetensors_header(path)[0]["__metadata__"]["haste"])
    except (ValueError, KeyError, TypeError):
        return {}


def read_header(path: Path | str) -> dict[str, Any]:
    """The header of a state file, read without reading a tensor.

    Raises:
        ValueError: missing, truncated, foreign, or of another schema.
    """
    try:
        found, begin = safetensors_header(path)
        places = [entry["data_offsets"][1] for name, entry in found.items() if name != "__metadata__"]
        if (size := Path(path).stat().st_size) != (expected := begin + max(places, default=0)):
            raise ValueError(f"{size} bytes, expected {expected}")
    except FileNotFoundError:
        raise ValueError(f"{path}: this state is missing") from None
    except (OSError, ValueError, AttributeError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path}: expected a state, found a truncated or foreign file ({error})") from error
    return state_header(path, found.get("__metadata__"))


def state_header(path: Path | str, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    """The header in the metadata of a state file, checked.

    Raises:
        ValueError: foreign, of another schema, or of another step than the file's name states.
    """
    try:
        header = json.loads((metadata or {}).get("haste", "{}"))
    except json.JSONDecodeError:
        header = {}
    artefact.check_header(path, header, STATE)
    artefact.check_entries(path, header, key=str, recipe=dict, step=int, inputs=dict, provenance=dict)
    known = {"triggers": {}, "watched": {}, **header}
    artefact.check_entries(path, known, triggers=dict, watched=dict)
    for record in [*known["triggers"].values(), *known["watched"].values()]:
        artefact.check_entries(path, record, trigger=dict, readings=list, seconds=float)
    name = STATE_NAME.match(Path(path).name)
    if name and int(name[1]) != header["step"]:
        raise ValueError(
            f"{path}: holds the state of step {header['step']}, expected step {int(name[1])}, as its name says"
        )
    return header


def _of_shard(path: Path) -> dict[str, Any]:
    import h5py

    try:
        with h5py.File(path, "r", locking=False) as file:
            header = {name: _plain(value) for name, value in file.attrs.items()}
    except OSError as error:
        raise ValueError(f"{path}: truncated, or not HDF5") from error
    said = ("recipe", "facts", "provenance", "coded")
    return {n: json.loads(v) if n in said else v for n, v in header.items()}


def _plain(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    return value.decode() if isinstance(value, bytes) else value


def _of_samples(path: Path) -> dict[str, Any]:
    from haste.files.npz import read_npz

    try:
        found = read_npz(path, "samples", ["haste"])  # the images may be gigabytes
    except ValueError:
        found = read_npz(path, "samples")  # it is damaged, or not one of ours
    try:
        return json.loads(str(found.get("haste", "{}")))
    except ValueError as error:
        raise ValueError(f"{path}: damaged or edited: 'haste' is not JSON") from error
