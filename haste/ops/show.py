"""`haste show`: how a file was made. No torch."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from haste import config
from haste.files.artefact import SCHEMA
from haste.files.provenance import provenance_of


def print_provenance(path: Path) -> None:
    """Print how a file was made.

    Raises:
        ValueError: the file is missing, or not one that this package made.
    """
    Console().print_json(json.dumps(_without_pictures(_of_configuration(path) or provenance_of(path))))


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
