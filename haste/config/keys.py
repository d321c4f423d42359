"""What every section of a configuration is made of: strictness, kinds of numbers, marks of its keys. No torch."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidatorFunctionWrapHandler, WrapValidator

from haste import extensions


class Strict(BaseModel):
    """A part of the configuration: unknown keys, wrong types, infinity and NaN are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def number(value: Any) -> Any:
    """The number that a text writes; anything else as it is."""
    # YAML 1.1 reads 1e-4 (no dot) as text; users mean the number.
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


Float = Annotated[float, BeforeValidator(number)]
Positive = Annotated[int, Field(ge=1)]
Rate = Annotated[Float, Field(gt=0)]
Share = Annotated[Float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # what every generator takes, and a 64-bit integer holds


def or_added(group: str) -> WrapValidator:
    """Takes, beside the names of the schema, those that other packages add to a group of `haste.extensions`."""

    def check(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        return value if isinstance(value, str) and value in extensions.names(group) else handler(value)

    return WrapValidator(check)


class _Mark:
    """Says of a key how it enters a recipe; see `decides`."""


LATER = _Mark()  # younger than results that people have: at its default it stays out, and their names stay
LABEL = _Mark()  # decides nothing by itself


def decides(kind: type[BaseModel], values: Mapping[str, Any]) -> dict[str, Any]:
    """What of a section enters a recipe, by the marks of its keys.

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
    """Keys that stand beside a name, those that are left to their defaults written out.

    Args:
        kind: their schema, of whatever bears the name.
        given: the keys.

    Raises:
        ValueError: a key that the schema does not know, or a value that it refuses.
    """
    if unknown := [name for name in given if name not in kind.model_fields]:
        raise ValueError(f"unknown key {unknown[0]!r}{nearest(unknown[0], kind.model_fields)}")
    return kind.model_validate(given).model_dump(mode="json")


def nearest(found: Any, known: Any) -> str:
    """What ends a fault of a name that nothing has: the nearest right spelling, or else all of them."""
    spelt = {name.lower(): name for name in sorted(known)}
    close = difflib.get_close_matches(str(found).lower(), spelt, n=1, cutoff=0.5)
    return f"; did you mean {spelt[close[0]]!r}?" if close else f"; known: {', '.join(sorted(known)) or 'none'}"
