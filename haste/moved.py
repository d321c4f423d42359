"""Old places of what the documentation has shown: importing from there works, and warns once with the new place."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

#: Files that are elsewhere now.
FILES = {
    "haste.artefact": "haste.files.artefact",
    "haste.data.store": "haste.files.store",
    "haste.hub": "haste.networks.hub",
    "haste.public": "haste.networks.registry",
    "haste.sample": "haste.sampling.painter",
    "haste.termination": "haste.train.stops",
}
#: Names that are in another file of their room now, by where they were.
NAMES = {
    "haste.models": {
        "AttentionTap": "haste.models.layers",
        "Denoiser": "haste.models.denoiser",
        "Projector": "haste.models.heads",
        "SiT": "haste.models.sit",
        "Tap": "haste.networks.spec",
    },
    "haste.plan": {"Plan": "haste.plan.plan", "RECIPE": "haste.plan.names", "State": "haste.plan.names"},
    "haste.score": {
        "Scorer": "haste.score.images",
        "Scores": "haste.score.images",
        "floor": "haste.score.workflow",
        "score": "haste.score.workflow",
        "score_images": "haste.score.images",
        "statistics": "haste.score.workflow",
        "values": "haste.score.workflow",
    },
}


def _warn(old: str, new: str) -> None:
    warnings.warn(f"{old} is {new} now; the old name will go", FutureWarning, stacklevel=3)


def names(room: str) -> Callable[[str], Any]:
    """A room's `__getattr__`: what was there and is in a file of its own now."""

    def get(name: str) -> Any:
        if name not in NAMES[room]:
            raise AttributeError(f"module {room!r} has no attribute {name!r}")
        _warn(f"{room}.{name}", f"{NAMES[room][name]}.{name}")
        return getattr(importlib.import_module(NAMES[room][name]), name)

    return get


class Finder(MetaPathFinder, Loader):
    """Finds the old places of files."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Known to FILES, or nobody's."""
        return ModuleSpec(fullname, self) if fullname in FILES else None

    def exec_module(self, module: ModuleType) -> None:
        """A module that hands out what is in the new place."""
        new = FILES[module.__name__]
        _warn(module.__name__, new)
        found = importlib.import_module(new)
        module.__getattr__ = lambda name: getattr(found, name)  # type: ignore[method-assign]
