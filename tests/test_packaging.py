"""What `pip install .` brings is enough: pyproject.toml, the sources and the pinned set agree. Installs nothing."""

import ast
import re
import sys
import tomllib
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DEPENDENCIES = [Requirement(line) for line in PROJECT["project"]["dependencies"]]
DEVELOPMENT = [Requirement(line) for line in PROJECT["project"]["optional-dependencies"]["dev"]]
PINS = {
    canonicalize_name(name): version
    for name, version in re.findall(r"^([\w.-]+)==([^\s;]+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
}
OPTIONAL = {"wandb", "pyarrow"}  # whoever asks for one without having it is told to install it


def imported(path: Path) -> set[str]:
    """Top-level modules that a file imports anywhere, in functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def test_every_foreign_module_that_the_package_imports_is_of_a_dependency_that_pyproject_names():
    named = {canonicalize_name(one.name) for one in DEPENDENCIES}
    owners = metadata.packages_distributions()
    known = sys.stdlib_module_names | OPTIONAL | {"haste"}
    modules = set().union(*(imported(path) for path in (ROOT / "haste").rglob("*.py"))) - known
    assert {"torch", "torch_fidelity"} <= modules, "imports are not found"
    missing = {name for name in modules if not named & {canonicalize_name(one) for one in owners.get(name, [])}}
    assert not missing


def test_every_file_of_the_package_that_is_no_module_is_package_data():
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["haste"]
    files = [path.relative_to(ROOT / "haste") for path in (ROOT / "haste").rglob("*") if path.is_file()]
    others = [str(file) for file in files if file.suffix != ".py" and "__pycache__" not in file.parts]
    assert others
    assert not [name for name in others if not any(fnmatch(name, pattern) for pattern in patterns)]


@pytest.mark.parametrize("requirement", DEPENDENCIES, ids=lambda one: one.name)
def test_every_dependency_has_a_lower_bound_that_the_pinned_version_meets(requirement):
    assert ">=" in {one.operator for one in requirement.specifier}
    assert requirement.specifier.contains(PINS[canonicalize_name(requirement.name)])


def test_everything_for_development_is_in_the_pinned_set():
    assert {canonicalize_name(one.name) for one in DEVELOPMENT} <= PINS.keys()


def test_the_workflow_asks_for_the_lowest_snakemake_that_pyproject_claims():
    (asked,) = re.findall(r'^min_version\("(.+)"\)$', (ROOT / "workflow" / "Snakefile").read_text(), re.MULTILINE)
    (claimed,) = (str(one.specifier) for one in DEPENDENCIES if one.name == "snakemake")
    assert claimed == f">={asked}"
