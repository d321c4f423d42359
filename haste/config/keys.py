"""Building blocks of every section of a configuration: strictness, kinds of numbers, marks of keys. No torch."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

from haste import extensions
from haste.networks.hub_files import hub_file


class Strict(BaseModel):
    """A section of the configuration: unknown keys, wrong types, infinity and NaN are errors; frozen, no coercion."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def number(value: Any) -> Any:
    """A number written as text; anything else unchanged."""
    # YAML 1.1 reads 1e-4 (no dot) as text; users mean the number.
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def expanded(path: str) -> str:
    """A path with ~ and $VARIABLES replaced, as a shell does it: every job then has the same, wherever it runs.

    Raises:
        ValueError: a variable that is not set here, or an unknown user.
    """
    found = os.path.expandvars(os.path.expanduser(path))
    if unset := re.search(r"^~[^/]*|\$(\w+|\{\w+\})", found):
        raise ValueError(f"found {path!r}, but {unset[0]} is not known here; expected a folder or variable that is")
    return found


def known(place: str) -> str:
    """A path, or an id of the hub's that is well formed; raises ValueError."""
    hub_file(place)
    return place


Place = Annotated[str, AfterValidator(expanded)]  # of a file or a folder
Weights = Annotated[Place, AfterValidator(known)]  # of a file, or the id of one of the hub
Float = Annotated[float, BeforeValidator(number)]
Positive = Annotated[int, Field(ge=1)]
Rate = Annotated[Float, Field(gt=0)]
Share = Annotated[Float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # every generator accepts it, and it fits into a 64-bit integer


def or_added(group: str) -> WrapValidator:
    """Accepts, besides the names of the schema, those that other packages add to a group of `haste.extensions`."""

    def check(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        return value if isinstance(value, str) and value in extensions.names(group) else handler(value)

    return WrapValidator(check)


class _Mark:
    """Marks how a key enters a recipe; see `decides`."""


LATER = _Mark()  # newer than existing results: at its default it stays out of recipes, so that their names stay
LABEL = _Mark()  # decides nothing by itself


def decides(kind: type[BaseModel], values: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a section in a recipe, by the marks of its keys.

    Args:
        kind: the section's schema.
        values: the section as plain data; keys that the schema does not know are kept.
    """
    kept = dict(values)
    for name, field in kind.model_fields.items():
        default = field.default.model_dump() if isinstance(field.default, Strict) else field.default
        if name in kept and (LABEL in field.metadata or (LATER in field.metadata and kept[name] == default)):
            del kept[name]
    return kept


def completed(kind: type[BaseModel], given: Mapping[str, Any]) -> dict[str, Any]:
    """Keys beside a name, with omitted ones set to their defaults.

    Args:
        kind: the schema of the keys.
        given: the keys.

    Raises:
        ValueError: an unknown key, or a value that the schema refuses.
    """
    if unknown := [name for name in given if name not in kind.model_fields]:
        raise ValueError(f"unknown key {unknown[0]!r}{nearest(unknown[0], kind.model_fields)}")
    return kind.model_validate(given).model_dump(mode="json")


def nearest(found: Any, known: Any) -> str:
    """The end of a message about an undefined name: the nearest right spelling, or else all of them."""
    spelt = {name.lower(): name for name in sorted(known)}
    close = difflib.get_close_matches(str(found).lower(), spelt, n=1, cutoff=0.5)
    return f"; did you mean {spelt[close[0]]!r}?" if close else f"; known: {', '.join(sorted(known)) or 'none'}"
