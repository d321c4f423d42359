"""The tests' own clusters: nothing of them outlives the tests, whatever ends these."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

TESTS = """
import os, subprocess, sys
from pathlib import Path
from slurm_cluster import watch
folder = Path(sys.argv[1])
watch(folder)
job = ["sh", "-c", "sleep 600 & echo $!; exec sleep 600"]
marked = {**os.environ, "SLURM_CONF": f"{folder}/slurm.conf"}
for marks, where in ((marked, "/"), (os.environ, folder)):
    started = subprocess.Popen(job, env=marks, cwd=where, start_new_session=True, stdout=subprocess.PIPE)
    print(started.pid, started.stdout.readline().decode(), flush=True)
print("all", flush=True)
sys.stdin.read()
"""


def test_what_a_cluster_started_ends_when_the_tests_are_killed(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    tests = subprocess.Popen(
        [sys.executable, "-c", TESTS, str(tmp_path)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    said = "".join(iter(tests.stdout.readline, "all\n"))
    started = [psutil.Process(int(pid)) for pid in said.split()]
    assert len(started) == 4
    stranger = subprocess.Popen(["sleep", "600"])
    tests.send_signal(signal.SIGKILL)
    tests.wait()
    limit = time.monotonic() + 60
    while any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in started):
        assert time.monotonic() < limit, started
        time.sleep(0.1)
    assert stranger.poll() is None
    stranger.kill()
    stranger.wait()
