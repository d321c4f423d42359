"""The house: each room imports only from lower floors, no files import one another in a circle, and what a dry run
needs never imports torch."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import haste

ROOT = Path(haste.__file__).parent
FLOORS = [
    {"moved", "extensions"},
    {"networks", "align"},
    {"config"},
    {"files"},
    {"plan"},
    {"diffusion", "models", "metrics", "data", "teachers"},
    {"train"},
    {"sampling"},
    {"score"},
    {"measure"},
    {"cluster"},
    {"ops"},
    {"report"},
    {"cli"},
]
HEIGHT = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
FILES = {
    ".".join(("haste", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}
# What an `__init__` may import: the configuration is one room with one face, and old names are told by a table.
FACES = {"haste": {"haste.moved"}, "haste.config": set(FILES)} | {
    room: {"haste.moved"} for room in ("haste.models", "haste.plan", "haste.score")
}


def imported(path: Path) -> set[str]:
    """The modules of this package that a file imports, wherever in it: also for types alone, and inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "haste":
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= whole & set(FILES) or {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & set(FILES)
    return found


def room_of(module: str) -> str:
    return [*module.split("."), ""][1]


def test_every_file_lives_in_a_room_that_has_a_floor():
    assert {room_of(module) for module in FILES} - {""} <= set(HEIGHT)


@pytest.mark.parametrize("module", sorted(FILES))
def test_a_room_imports_only_from_lower_floors(module):
    room = room_of(module)
    others = {room_of(other) for other in imported(FILES[module])} - {room, ""}
    too_high = {other for other in others if room and HEIGHT[other] >= HEIGHT[room]}
    assert not too_high, f"{module} imports {too_high}"


@pytest.mark.parametrize("module", sorted(name for name, path in FILES.items() if path.name == "__init__.py"))
def test_a_rooms_init_imports_nothing(module):
    assert imported(FILES[module]) <= FACES.get(module, set())


def test_no_files_import_one_another_in_a_circle():
    try:
        TopologicalSorter({module: imported(path) - {module} for module, path in FILES.items()}).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


# Each in a child of a Python that has what is large and imports no torch by itself.
EACH = """
import os, sys
import matplotlib.figure, pandas, pydantic, rich, snakemake.cli
assert not {"haste", "torch"} & set(sys.modules)
for module in sys.argv[1:]:
    child = os.fork()
    if not child:
        __import__(f"haste.{module}")
        os._exit("torch" in sys.modules)
    if os.waitpid(child, 0)[1]:
        print(module)
"""


def test_what_a_dry_run_needs_imports_no_torch():
    modules = ["config", "plan.plan", "plan.inputs", "ops.cost", "ops.status", "ops.prune", "ops.show", "report.page"]
    modules += ["files.journal", "files.provenance", "networks.headers", "train.stops", "cli.main"]
    modules += ["cluster.waiter", "cluster.queue", "cluster.check", "ops.new"]
    done = subprocess.run([sys.executable, "-c", EACH, *modules], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


PLANS = """
import sys
from haste import config
from haste.ops import cost
from haste.plan.plan import Plan
for path in sys.argv[2:]:
    plan = Plan(config.resolve({**config.read(path), "results": sys.argv[1]}), ahead=True)
    for trajectory in plan.trajectories.values():
        cost.parameters(trajectory.recipe), config.facts_in(trajectory.recipe)
    if "torch" in sys.modules:
        print(path)
"""


def test_planning_any_configuration_that_is_shipped_imports_no_torch(tmp_path):
    files = sorted(Path(ROOT.parent, "config").rglob("*.yaml"))
    assert len(files) > 15
    done = subprocess.run([sys.executable, "-c", PLANS, str(tmp_path), *files], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_what_few_jobs_need_and_takes_seconds_to_import_is_imported_where_it_is_used():
    slow, found = {"transformers", "diffusers", "sklearn", "torchvision"}, set()
    for module, path in FILES.items():
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found |= {(module, name) for name in names if name.split(".")[0] in slow}
    assert not found


def test_training_imports_no_teacher_before_it_asks_one():
    code = "import sys, haste.train.loop; sys.exit(bool({'timm', 'haste.teachers.encoder'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_workflow_imports_only_the_plan_its_ground_and_what_asks_the_cluster():
    files = [Path(ROOT.parent, "workflow", "Snakefile"), *sorted(Path(ROOT.parent, "workflow", "rules").glob("*.smk"))]
    lines = [line for file in files for line in file.read_text().splitlines() if "haste" in line and "import " in line]
    ground = ["from haste import config as configuration", "from haste.files import artefact, locks"]
    plan = ["from haste.plan.names import State", "from haste.plan.plan import Plan"]
    asks = [
        "from haste.cluster import gpus",
        "from haste.cluster import check, queue",
        "    from haste.cluster import executor",
    ]
    assert lines == [*ground, *plan, *asks]


def test_the_snakefile_can_be_read_in_one_look():
    assert len(Path(ROOT.parent, "workflow", "Snakefile").read_text().splitlines()) < 60
