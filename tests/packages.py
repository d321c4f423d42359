"""Packages of other people that add to this one: those of the page on extending, installed as they stand there."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from haste import config, extensions

PAGE = Path(__file__).parent.parent / "docs" / "extending.md"


def section(title: str) -> str:
    """A section of the page, without its heading."""
    return PAGE.read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]


def block(language: str, text: str) -> str:
    """The one fenced block of a language in a text."""
    (found,) = re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
    return found


def install(site: Path, text: str) -> str:
    """The package that a text shows, laid out as pip does; its module's name."""
    about = tomllib.loads(block("toml", text))["project"]
    module = about["name"].replace("-", "_")
    meta = site / f"{module}-{about['version']}.dist-info"
    meta.mkdir(parents=True)
    (site / f"{module}.py").write_text(block("python", text))
    (meta / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {about['name']}\nVersion: {about['version']}\n")
    groups = about["entry-points"].items()
    lines = [
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in added.items()) for group, added in groups
    ]
    (meta / "entry_points.txt").write_text("\n".join(lines))
    return module


@contextmanager
def installed(site: Path, monkeypatch: pytest.MonkeyPatch, *texts: str) -> Iterator[Path]:
    """The packages of texts where Python finds them."""
    modules = [install(site, text) for text in texts]
    monkeypatch.syspath_prepend(site)
    extensions._points.cache_clear()
    yield site
    extensions._points.cache_clear()
    config.facts_of_other.cache_clear()
    for name in modules:
        sys.modules.pop(name, None)
