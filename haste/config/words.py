"""Faults that the schema finds, in words: where in the file, what was found, what to write. No torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, get_args, get_origin

from haste.config.keys import Strict, nearest
from haste.config.parts import ENCODER_TAGS, TextEncoder
from haste.config.schema import FEATURE_TAGS, STOP_TAGS, TERMS, Config, for_both

_STOP = "a step such as 300000, a trigger such as {trigger: plateau}, or no such key for never"
_SEEDS = "a list such as [0, 1, 2]"


def explain(fault: Any, whole: Collection[tuple[str, str]] = ()) -> str:
    """A fault as one line, with the path in the configuration.

    whole: run and key of each `stop` and `ramp` that was given once for all terms.
    """
    path = list(fault["loc"])
    if path[:1] == ["runs"] and tuple(path[1:3]) in whole and path[3:4] and path[3] in TERMS:
        del path[3]
    where = (
        ".".join(str(part) for part in path if part not in {*STOP_TAGS, *FEATURE_TAGS, *ENCODER_TAGS})
        or "the configuration"
    )
    if fault["type"] == "extra_forbidden":
        return f"{where}: unknown key{nearest(fault['loc'][-1], _keys_at(fault['loc'][:-1]))}"
    if fault["type"] == "missing":
        return f"{where}: missing, and it has no default"
    message = fault["msg"].removeprefix("Value error, ")
    found = "" if fault["type"] == "value_error" else f", found {fault['input']!r}"
    return f"{where}: {message}{found}{_instead(fault, where)}"


def _instead(fault: Any, where: str) -> str:
    """What to write for a value of a wrong type, where that can be told; the end of a message."""
    kind, value, key = fault["type"], fault["input"], where.rpartition(".")[2]
    if kind == "int_type" and (meant := _whole(value)) is not None:
        return f"{', which YAML reads as text' if isinstance(value, str) else ''}; write {meant}"
    if kind == "int_type" and re.search(rf"\.stop(\.({'|'.join(TERMS)}))?$", where):
        return f"; expected {_STOP}"
    if kind == "list_type":
        return f"; expected {_SEEDS if key == 'seeds' else f'a list such as [{value}]'}"
    return ""


def _whole(value: Any) -> int | None:
    """The whole number that was meant by 1e3, 1000.0 or 300K."""
    match = re.fullmatch(r"([\d.]+(?:[eE][+-]?\d\d?)?)\s*([kKmM]?)", str(value))
    try:
        found = float(match[1]) * {"": 1, "k": 1e3, "m": 1e6}[match[2].lower()] if match else 0.5
    except ValueError:
        return None
    return int(found) if found.is_integer() else None


def told(lines: Collection[str], raw: Mapping[str, Any]) -> str:
    """Faults for people, each once: what all rows have wrong from `defaults` is named where it is written.

    Args:
        lines: of the rows with their defaults, as `explain` says them.
        raw: the configuration as it was written.
    """
    defaults, given = (value if isinstance(value := raw.get(key), dict) else {} for key in ("defaults", "runs"))
    runs = {name: row if isinstance(row, dict) else {} for name, row in given.items()}
    found = []
    for line in lines:
        name = max((name for name in runs if line.startswith(f"runs.{name}.")), key=len, default="")
        rest, row = line.removeprefix(f"runs.{name}."), runs.get(name, {})
        of_seeds = "seed" not in row and ("seeds" in row or ("seeds" in defaults and "seed" not in defaults))
        if of_seeds and rest.startswith(("seed: ", "defaults.seed: ")):
            continue  # it is the first of the seeds, which are wrong themselves
        heirs = {f"runs.{name}.{rest}" for name, row in runs.items() if _inherited(rest, row, defaults)}
        found.append(f"defaults.{rest}" if line in heirs and heirs <= {*lines} else line)
    return "\n".join(dict.fromkeys(found))


def _inherited(path: str, row: Mapping[str, Any], defaults: Mapping[str, Any]) -> bool:
    """Whether a row has what is at a path from the defaults."""
    parts = re.match(r"(\w+)(?:\.(\w+))?", path)
    if parts is None or parts[1] not in defaults:
        return False
    if parts[1] not in row:
        return True
    given, above = row[parts[1]], defaults[parts[1]]
    merged = isinstance(given, dict) and isinstance(above, dict) and not for_both(given) and not for_both(above)
    return merged and parts[2] in above and parts[2] not in given


def _keys_at(path: tuple[Any, ...]) -> list[str]:
    """The keys that the schema has at a path, as candidates for the nearest right spelling."""
    inside = path[:2] == ("condition", "encoder")  # whose keys are the condition's own
    kind: Any = TextEncoder if inside else Config
    for part in path[2 * inside :]:
        known = (model.model_fields[part].annotation for model in _models_in(kind) if part in model.model_fields)
        kind = get_args(kind)[1] if get_origin(kind) is dict else next(known, kind)  # pydantic adds words of its own
    return [key for model in _models_in(kind)[:1] for key in model.model_fields]


def _models_in(kind: Any) -> list[type[Strict]]:
    if isinstance(kind, type) and issubclass(kind, Strict):
        return [kind]
    return [model for part in get_args(kind) for model in _models_in(part)]
