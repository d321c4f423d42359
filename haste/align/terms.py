"""Names of alignment terms: `features`, `attention`, and `features-2`, `features-3`, ... of further teachers."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def kind_of(term: str) -> str:
    """`features` or `attention`."""
    return term.partition("-")[0]


def of_features(terms: Mapping[str, T]) -> dict[str, T]:
    """Those of a set of terms that follow features."""
    return {name: term for name, term in terms.items() if kind_of(name) == "features"}


def named(kind: str, given: Sequence[Any]) -> dict[str, Any]:
    """The terms of one kind by name, in their order."""
    return {kind if place == 1 else f"{kind}-{place}": term for place, term in enumerate(given, start=1)}
