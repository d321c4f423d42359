"""`haste show`: how a file was made. No torch."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from haste import config
from haste.files import artefact
from haste.files.artefact import SCHEMA
from haste.files.provenance import STATE_NAME, provenance_of
from haste.networks import layouts
from haste.networks.hub_files import check_whole, local, origin

WEIGHTS = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")


def print_provenance(given: Path) -> None:
    """Print how a file was made; of weights from elsewhere, what they are.

    Args:
        given: the file, or the id of one of the hub.

    Raises:
        ValueError: the file is missing, or neither one that this package made nor weights.
    """
    path = local(given)
    try:
        found = _of_configuration(path) or provenance_of(path)
    except ValueError:
        if not path.is_file() or path.suffix not in WEIGHTS or STATE_NAME.match(path.name):
            raise
        found = _of_weights(path)
    Console().print_json(json.dumps(_without_pictures(found)))


def _of_weights(path: Path) -> dict[str, Any]:
    """What a checkpoint from elsewhere holds, by its header."""
    identity = artefact.file_identity(path)
    check_whole(path, identity)
    found = layouts.described(str(path), sizes=config.SIZES.values())
    said = {name: value for name, value in found.facts.items() if value is not None}
    whose = {"file": origin(path), "sha256": identity, "layout": found.layout}
    shown = {"model": dict(found.shape), "weights": sorted(found.sets), "projectors": len(found.projectors)}
    return {"kind": "checkpoint from elsewhere", **whose, **shown, **said}


def _without_pictures(found: Any) -> Any:
    """JSON with pictures, which are base64, by their size alone."""
    if isinstance(found, dict):
        return {
            key: f"{len(value):,} characters" if key == "png" and isinstance(value, str) else _without_pictures(value)
            for key, value in found.items()
        }
    return [*map(_without_pictures, found)] if isinstance(found, list) else found


def _of_configuration(path: Path) -> dict[str, Any] | None:
    """A resolved configuration, which has no provenance of its own; None for any other file."""
    if path.suffix != ".json" or not path.is_file():
        return None
    try:
        found = json.loads(path.read_text())
        name = config.resolve(found).name
    except (ValueError, AttributeError, TypeError):  # other JSON, or none
        return None
    made = datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.UTC).isoformat(timespec="seconds")
    how = "resolved by the workflow when it last started; all of its jobs read it"
    return {"schema": SCHEMA, "kind": "configuration", "name": name, "how": how, "made": made, "configuration": found}
