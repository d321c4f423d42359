"""What other packages add, found by Python's entry points: samplers, metrics, detectors and the rest of GROUPS.

A package that is installed beside this one says in its pyproject.toml what it adds, a line each:

    [project.entry-points."haste.samplers"]
    midpoint = "my_haste:MIDPOINT"

Names are known without importing anything, which a dry run needs; what they name is imported where it is used.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Collection, Iterator, Mapping, MutableMapping
from importlib import metadata
from typing import Any

GROUPS = ("samplers", "metrics", "detectors", "teachers", "models", "triggers", "measures", "processes", "conditions")


@functools.cache  # all installed packages are looked through, and every file that is written says which add something
def _points() -> tuple[metadata.EntryPoint, ...]:
    every = metadata.entry_points()
    return tuple(point for group in GROUPS for point in every.select(group=f"haste.{group}"))


def _found(group: str) -> dict[str, metadata.EntryPoint]:
    assert group in GROUPS, group
    return {point.name: point for point in _points() if point.group == f"haste.{group}"}


def packages() -> dict[str, str]:
    """The packages that add anything, with their versions."""
    return {point.dist.name: point.dist.version for point in _points() if point.dist}


def names(group: str) -> list[str]:
    """What other packages add to a group, by name."""
    return sorted(_found(group))


def at(where: str) -> Any:
    """What "module:attribute" names, imported."""
    module, _, attribute = where.partition(":")
    return getattr(importlib.import_module(module), attribute)


class Table(MutableMapping[str, Any]):
    """What this package has of a group by name, and what other packages add: theirs is imported when it is asked for.

    Not before: whoever's module is being imported may be the one that imports this package.
    """

    def __init__(self, group: str, own: Mapping[str, Any], taken: Collection[str] = ()):
        """
        Args:
            group: one of GROUPS.
            own: what this package has.
            taken: further names that nobody else may have.
        """
        self.group, self.own, self.taken = group, dict(own), taken

    def __getitem__(self, name: str) -> Any:
        """Raises ValueError where it cannot be imported, or has the name of ours; says which package's it is."""
        return one(self.group, name, {*self.own, *self.taken}) if name in _found(self.group) else self.own[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self.own[name] = value

    def __delitem__(self, name: str) -> None:
        del self.own[name]

    def __iter__(self) -> Iterator[str]:
        yield from self.own
        yield from (name for name in _found(self.group) if name not in self.own)

    def __len__(self) -> int:
        return len({*self.own, *_found(self.group)})


def one(group: str, name: str, taken: Collection[str]) -> Any:
    """One of what other packages add to a group, imported; the others are left alone.

    Args:
        group: one of GROUPS.
        name: one of `names(group)`.
        taken: names that this package has itself.

    Raises:
        ValueError: it cannot be imported, for whatever reason, or has the name of ours; says which package's it is.
    """
    point = _found(group)[name]
    where = f"{point.value} (of {point.dist.name if point.dist else 'an unknown package'})"
    if name in taken:
        raise ValueError(f"haste.{group}: {where} is called {name!r}, which is taken; expected another name")
    try:
        return point.load()
    except Exception as error:  # somebody else's code, which may fail in any way
        raise ValueError(
            f"haste.{group}: {name!r} cannot be loaded from {where}: {type(error).__name__}: {error}"
        ) from error
