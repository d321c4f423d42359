"""The SLURM cluster of the tests here, and the data of the tiny configuration."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import Slurm, name_nodes, watch, why_not


@pytest.fixture(scope="session")
def _cluster(request: pytest.FixtureRequest) -> Iterator[Slurm]:
    reason = why_not()
    if reason:
        if os.environ.get("CI"):
            pytest.fail(f"in CI the SLURM suite must run, but {reason}")
        pytest.skip(f"no SLURM suite here: {reason}")
    folder = Path(tempfile.mkdtemp(prefix="haste-slurm-", dir="/tmp"))  # short: sockets have 108 characters
    folder.chmod(0o755)
    watcher, cluster = watch(folder), Slurm(folder)
    try:
        name_nodes(folder, there=True)
        cluster.up()
        yield cluster
    finally:
        cluster.down()
        watcher.communicate(timeout=60)
        if not request.session.testsfailed:
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def slurm(_cluster: Slurm) -> Iterator[Slurm]:
    """The cluster, idle before the test and after it, however the test ends."""
    yield _cluster
    _cluster.clean()


@pytest.fixture
def data(_finished_data: Path) -> Path:
    """Every store and part of the tiny configuration, made on this machine."""
    return _finished_data
