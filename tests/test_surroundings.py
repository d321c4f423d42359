"""What the package takes for granted, tried without it; docs/surroundings.md lists all of it."""

import os
import re
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from haste.cli import main as cli
from haste.train import loop

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


@pytest.fixture
def two(make_plan):
    """A plan whose training takes two processes."""
    return make_plan(runs={"vanilla": {"milestones": [4]}}, runtime={"processes": 2, "log_every": 2})


def train(plan, before="", **environment):
    """`haste train` in a shell that first does something, in mount and name spaces of its own: (code, what it said)."""
    words = f"{before}exec {sys.executable} -m haste.cli train {plan.state('vanilla', 4)} -c {plan.file}"
    command = ["unshare", "--mount", "--uts", "sh", "-c", words] if before else ["sh", "-c", words]
    settings = {name: value for name, value in {**os.environ, **environment}.items() if value is not None}
    done = subprocess.run(command, capture_output=True, text=True, env=settings, timeout=120)
    return done.returncode, done.stdout + done.stderr


spaces = pytest.mark.skipif(
    subprocess.run(["unshare", "--mount", "--uts", "true"], capture_output=True).returncode != 0,
    reason="needs the right to make name spaces",
)


@spaces
@pytest.mark.timeout(150)
def test_several_processes_need_no_name_of_this_machine_no_interface_of_a_cluster_and_no_room_in_tmpdir(two):
    folder = two.file.parent / "full"
    fill = f"hostname nowhere-known; mkdir {folder}; mount -t tmpfs -o size=4k,nr_inodes=1 tmpfs {folder}; "
    started = time.monotonic()
    code, said = train(two, fill, GLOO_SOCKET_IFNAME="eth9", MASTER_ADDR="nowhere-known", TMPDIR=str(folder))
    assert code == 0, said
    assert time.monotonic() - started < 110


@spaces
def test_a_full_dev_shm_is_named_where_several_processes_need_it(two):
    fill = "mount -t tmpfs -o size=4k tmpfs /dev/shm; head -c 9999 /dev/zero > /dev/shm/x 2> /dev/null; "
    code, said = train(two, fill)
    assert code == 2 and "No space left on device" in said and "/dev/shm" in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        (
            {"WORLD_SIZE": "4"},
            "WORLD_SIZE is 4 in the environment, as a launcher of several processes sets it, but not RANK",
        ),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, "but not MASTER_PORT: unset WORLD_SIZE"),
    ],
)
def test_what_a_launcher_left_behind_only_in_part_is_refused(make_plan, monkeypatch, capsys, environment, words):
    plan = make_plan()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["train", str(plan.state("vanilla", 8)), "-c", str(plan.file)]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("variable", [None, "no-such-compiler -O2"])
def test_compiling_without_a_compiler_is_refused_with_what_was_looked_for(make_plan, monkeypatch, variable):
    plan = make_plan(runtime={"compile": True})
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("CXX", variable) if variable else monkeypatch.delenv("CXX", raising=False)
    looked = "no-such-compiler" if variable else r"g\+\+, clang\+\+"
    with pytest.raises(ValueError, match=f"runtime.compile: true needs a compiler on a cpu, found none of {looked} on"):
        loop.train(plan, plan.state("vanilla", 8))


def test_a_disk_without_locks_is_refused_by_name_with_the_setting_that_does_without(make_plan, tmp_path):
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    (tmp_path / "noflock.c").write_text("#include <errno.h>\nint flock(int f, int h) { errno = 37; return -1; }\n")
    library = str(tmp_path / "noflock.so")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, str(tmp_path / "noflock.c")], check=True)
    plan = make_plan(runs={"vanilla": {"milestones": [4]}})
    path = Path(plan.path(plan.state("vanilla", 4)))
    code, said = train(plan, LD_PRELOAD=library)
    assert code == 2 and ": this disk has no locks (flock: No locks available)" in said, said
    assert str(path.parent) in said and "HASTE_LOCKS=none" in said and "Traceback" not in said


def test_the_workflow_finds_its_command_where_its_environment_is_not_activated_and_without_a_home(make_plan, tmp_path):
    plan = make_plan(runs={"vanilla": {"milestones": [4]}})
    target = plan.path(plan.state("vanilla", 4))
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "workflow" / "Snakefile"), target]
    command += [
        "--workflow-profile",
        str(ROOT / "profiles" / "default"),
        "--configfile",
        str(plan.file),
        "--cores",
        "1",
    ]
    bare = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=tmp_path, env=bare, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert Path(target).exists()


def test_a_file_system_that_offers_less_is_done_without(world, monkeypatch):
    def refused(*_, **__):
        raise OSError(95, "Operation not supported")

    whole = os.fsync
    for name in ("link", "fchmod"):
        monkeypatch.setattr(os, name, refused)
    monkeypatch.setattr(os, "fsync", lambda file: refused() if stat.S_ISDIR(os.fstat(file).st_mode) else whole(file))
    for path in world.root.glob("samples/*/*.npz"):
        path.unlink()
    assert cli.main(["sample", world.row().name, "-c", str(world.file)]) == 0
    assert cli.main(["train", world.last, "-c", str(world.file)]) == 0


def test_every_row_of_the_document_names_a_test_that_is_there():
    told = re.findall(r"`(test_\w+)`", (ROOT / "docs" / "surroundings.md").read_text())
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert told and not [name for name in told if f"def {name}(" not in sources]


def test_files_of_a_whole_workflow_follow_the_umask(world):
    odd = [
        path for path in world.root.rglob("*") if path.is_file() and stat.S_IMODE(path.stat().st_mode) & 0o044 != 0o044
    ]
    assert not odd
