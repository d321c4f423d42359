"""Each room imports only from lower floors, and what a dry run needs never imports torch."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import haste
from haste import config

ROOT = Path(haste.__file__).parent
FLOORS = [
    {"archives", "artefact", "extensions", "hub", "network", "npz", "public"},
    {"models", "diffusion", "align", "metrics", "journal", "cache", "listing"},
    {"config"},
    {"data", "teachers", "diagnose", "plan", "report"},
    {"train", "sample", "score", "exchange", "gather", "status", "live", "prune", "cluster", "termination"},
    {"cli"},
]
HEIGHT = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
# What composes may lean on its neighbours: score and sample are one floor with train, gather with all of them.
TOGETHER = {4}


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "haste":
            rooms |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("haste."):
            rooms.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            rooms |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("haste.")}
    return rooms & set(HEIGHT)


def test_every_file_lives_in_a_room_that_has_a_floor():
    assert {room_of(path) for path in ROOT.rglob("*.py")} - {"__init__"} == set(HEIGHT)


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_only_from_lower_floors(path):
    room = room_of(path)
    if room == "__init__":
        assert not imported_rooms(path)
        return
    height = HEIGHT[room]
    too_high = {
        other
        for other in imported_rooms(path) - {room}
        if HEIGHT[other] > height or (HEIGHT[other] == height and height not in TOGETHER)
    }
    assert not too_high, f"{path}: {room} imports {too_high}"


def test_the_files_of_the_configuration_import_only_from_those_above_them_in_its_list():
    order = re.findall(r"^    (\w+) {2,}", config.__doc__, re.MULTILINE)
    files = {path.stem: path for path in Path(ROOT, "config").glob("*.py") if path.stem != "__init__"}
    assert sorted(order) == sorted(files)
    for place, name in enumerate(order):
        nodes = [node for node in ast.walk(ast.parse(files[name].read_text())) if isinstance(node, ast.ImportFrom)]
        named = {alias.name for node in nodes if node.module == "haste" for alias in node.names}
        modules = [node.module or "" for node in nodes]
        inside = {module.split(".")[2] for module in modules if module.startswith("haste.config.")}
        assert "config" not in named and inside <= set(order[:place]), name


@pytest.mark.parametrize(
    "module",
    [
        *("config", "plan", "status", "live", "prune", "gather", "report.page", "journal", "termination", "cli"),
        *("cluster.waiter", "cluster.queue", "cluster.check"),
    ],
)
def test_what_a_dry_run_needs_imports_no_torch(module):
    code = f"import sys, haste.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_workflow_imports_only_the_plan_its_ground_and_what_asks_the_cluster():
    files = [Path(ROOT.parent, "workflow", "Snakefile"), *Path(ROOT.parent, "workflow", "rules").glob("*.smk")]
    lines = [line for file in files for line in file.read_text().splitlines() if "haste" in line and "import " in line]
    ground = ["from haste import artefact, config as configuration", "from haste.plan import Plan, State"]
    assert lines == [*ground, "from haste.cluster import check"]


def test_the_snakefile_can_be_read_in_one_look():
    assert len(Path(ROOT.parent, "workflow", "Snakefile").read_text().splitlines()) < 60
