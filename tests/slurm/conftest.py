"""The SLURM cluster of the tests here, and the data of the tiny configuration."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import NODES, Slurm, why_not


@pytest.fixture(scope="session")
def _hosts() -> Iterator[None]:
    """The nodes' names lead to loopback while the tests run."""
    path, mark = Path("/etc/hosts"), f"# of the test cluster of process {os.getpid()}"
    lines = "".join(f"127.0.0.1 {node} {mark}\n" for node in NODES)
    with open(path, "a") as file:
        file.write(lines)
    yield
    kept = [line for line in path.read_text().splitlines(keepends=True) if mark not in line]
    path.write_text("".join(kept))  # in place: containers mount this very file


@pytest.fixture(scope="session")
def slurm(request: pytest.FixtureRequest) -> Iterator[Slurm]:
    """The cluster, idle."""
    if not {"CI", "HASTE_SLURM"} & set(os.environ):
        pytest.skip(
            "`make test-slurm` runs this: it takes minutes, and installs SLURM's packages where they are missing"
        )
    reason = why_not()
    if reason:
        if os.environ.get("CI"):
            pytest.fail(f"in CI the SLURM suite must run, but {reason}")
        pytest.skip(f"no SLURM suite here: {reason}")
    request.getfixturevalue("_hosts")
    folder = Path(tempfile.mkdtemp(prefix="haste-slurm-", dir="/tmp"))  # short: sockets have 108 characters
    folder.chmod(0o755)
    cluster = Slurm(folder)
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()
        if not request.session.testsfailed:
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def data(_finished_data: Path) -> Path:
    """Every store and part of the tiny configuration, made on this machine."""
    return _finished_data
