"""Samplers, metrics, detectors, teachers, models and triggers of other packages, found by Python's entry points.

A package that is installed beside this one says in its pyproject.toml what it adds, a line each:

    [project.entry-points."haste.samplers"]
    midpoint = "my_haste:MIDPOINT"

Names are known without importing anything, which a dry run needs; what they name is imported where it is used.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Collection
from importlib import metadata
from typing import Any

GROUPS = ("samplers", "metrics", "detectors", "teachers", "models", "triggers")


@functools.cache
def _found(group: str) -> dict[str, metadata.EntryPoint]:
    assert group in GROUPS, group
    return {point.name: point for point in metadata.entry_points(group=f"haste.{group}")}


def names(group: str) -> list[str]:
    """What other packages add to a group, by name."""
    return sorted(_found(group))


def at(where: str) -> Any:
    """What "module:attribute" names, imported."""
    module, _, attribute = where.partition(":")
    return getattr(importlib.import_module(module), attribute)


def loaded(group: str, taken: Collection[str]) -> dict[str, Any]:
    """What other packages add to a group, imported.

    Args:
        group: one of GROUPS.
        taken: names that this package has itself.

    Raises:
        ValueError: one of them cannot be imported, or has the name of ours; says which package's it is.
    """
    return {name: one(group, name, taken) for name in _found(group)}


def one(group: str, name: str, taken: Collection[str]) -> Any:
    """One of what other packages add to a group, imported; the others are left alone.

    Raises:
        ValueError: as `loaded`.
    """
    point = _found(group)[name]
    where = f"{point.value} (of {point.dist.name if point.dist else 'an unknown package'})"
    if name in taken:
        raise ValueError(f"haste.{group}: {where} is called {name!r}, which is taken; expected another name")
    try:
        return point.load()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"haste.{group}: {name!r} cannot be had from {where}: {error}") from error
