"""A real SLURM of two nodes on this machine's loopback: accounting, preemption and two make-believe GPUs a node.

It lives in a folder of its own with its own ports, keys and sockets, beside any cluster that is already here, and goes
when the tests end, however they end: a process beside them sees to that.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import psutil

PROGRAMS = ("slurmctld", "slurmd", "slurmdbd", "munged", "mariadbd", "mariadb-install-db", "sbatch", "sacct")
CLIENTS = ("sbatch", "srun", "squeue", "sacct", "scontrol", "scancel", "sinfo", "sacctmgr")
PACKAGES = ("slurm-wlm", "slurmdbd", "munge", "mariadb-server")
NODES = ("haste-n1", "haste-n2")
WATCH = "--sweep-when-the-tests-are-gone"

SLURM_CONF = """
ClusterName=haste-test
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
SlurmdUser=root
SlurmctldPort={ctld}
SlurmdPort={n1}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
FirstJobId={first}
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=5
SlurmdTimeout=60
MessageTimeout=10
BatchStartTimeout=60
MinJobAge=300
SchedulerParameters=batch_sched_delay=0,sched_interval=1
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={dbd}
AccountingStoragePass={folder}/munge.socket
AccountingStorageTRES=gres/gpu
AccountingStorageEnforce=associations,limits,qos
JobAcctGatherType=jobacct_gather/linux
GresTypes=gpu
NodeName=haste-n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={n1} CPUs=4 RealMemory={memory} Gres=gpu:2
NodeName=haste-n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={n2} CPUs=4 RealMemory={memory} Gres=gpu:2
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=12
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
DBD_CONF = """
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={dbd}
SlurmUser=root
PidFile={folder}/slurmdbd.pid
LogFile={folder}/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={sql}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct
"""


class Slurm:
    """The cluster, its daemons by name, and ways to ask and to disturb it."""

    def __init__(self, folder: Path):
        self.folder = folder
        ports = dict(zip(("ctld", "n1", "n2", "dbd", "sql"), free_ports(5), strict=True))
        memory = max(1000, psutil.virtual_memory().total // 2**20 * 9 // 10)
        # Jobs of two clusters here have different numbers, from which their processes' ports follow.
        first = ports["ctld"] % 10_000 * 100 + 1
        host = socket.gethostname().split(".")[0]
        self.values = {"folder": folder, "host": host, "memory": memory, "first": first, **ports}
        # The daemons of Debian live in sbin, which not everybody's PATH has.
        path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
        self.own = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": path}
        self.environment = {**self.own, "PATH": f"{folder / 'bin'}:{path}"}  # what users see
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.users: list[subprocess.Popen[bytes]] = []  # started by tests, each in a group of its own

    # -- up and down -------------------------------------------------------------------------------------------------

    def up(self) -> None:
        """From nothing to two idle nodes."""
        self._write_files()
        key, pid = self.folder / "munge.key", self.folder / "munged.pid"
        munge = ["munged", "--foreground", "--force", f"--key-file={key}", f"--pid-file={pid}"]
        munge += [f"--socket={self.folder}/munge.socket", f"--seed-file={self.folder}/munge.seed"]
        self.start("munged", *munge, f"--log-file={self.folder}/munged.log")
        self._start_database()
        self.start_accounting()
        self.ask("sacctmgr", "-i", "add", "cluster", "haste-test")
        self.start_controller()
        for node in NODES:
            self.start_node(node)
        self.ask("sacctmgr", "-i", "add", "account", "haste", "Cluster=haste-test")
        self.ask("sacctmgr", "-i", "add", "user", "root", "Account=haste", "Cluster=haste-test")
        self.until_idle()

    def _write_files(self) -> None:
        (self.folder / "slurm.conf").write_text(SLURM_CONF.format(**self.values))
        (self.folder / "slurmdbd.conf").write_text(DBD_CONF.format(**self.values))
        (self.folder / "slurmdbd.conf").chmod(0o600)
        (self.folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        (self.folder / "munge.key").write_bytes(os.urandom(1024))
        (self.folder / "munge.key").chmod(0o400)
        (self.folder / "state").mkdir()
        (self.folder / "bin").mkdir()
        for name in CLIENTS:
            self._write_client(name)
        devices = []
        for node in NODES:
            for number in range(2):
                device = self.folder / f"{node}-gpu{number}"
                os.mknod(device, 0o20666, os.makedev(1, 3))  # what /dev/null is
                devices.append(f"NodeName={node} Name=gpu File={device}\n")
        (self.folder / "gres.conf").write_text("".join(devices))

    def _write_client(self, name: str) -> None:
        """A program that asks this cluster also where SLURM_CONF is not set: Snakemake takes it from its jobs."""
        real = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
        write_program(self.folder / "bin" / name, f'SLURM_CONF={self.folder}/slurm.conf exec {real} "$@"')

    @contextlib.contextmanager
    def instead(self, name: str, script: str) -> Iterator[None]:
        """Have a shell script in place of a program of SLURM."""
        write_program(self.folder / "bin" / name, script)
        try:
            yield
        finally:
            self._write_client(name)

    def _start_database(self) -> None:
        data, sock, tmp = self.folder / "sql", self.folder / "sql.socket", self.folder / "sql.tmp"
        tmp.mkdir()  # its own: a database that starts removes every temporary table it finds, another's in /tmp too
        places = ["--user=root", f"--datadir={data}", f"--tmpdir={tmp}"]
        self.ask("mariadb-install-db", "--auth-root-authentication-method=normal", "--skip-test-db", *places)
        daemon = ["mariadbd", "--no-defaults", *places, f"--socket={sock}"]
        daemon += [f"--port={self.values['sql']}", "--bind-address=127.0.0.1", f"--pid-file={self.folder}/sql.pid"]
        self.start("mariadbd", *daemon, "--innodb-buffer-pool-size=64M", "--innodb-flush-log-at-trx-commit=0")
        client = ["mariadb", "--no-defaults", f"--socket={sock}", "--user=root"]
        self.until("the database answers", lambda: self.tried(*client, "-e", "select 1"))
        make = "create database slurm_acct; create user slurm@'%' identified by 'slurm'; "
        make += "create user slurm@localhost identified by 'slurm'; "
        make += "grant all on slurm_acct.* to slurm@'%'; grant all on slurm_acct.* to slurm@localhost;"
        self.ask(*client, "-e", make)

    def start_accounting(self) -> None:
        """Start slurmdbd, or start it again."""
        self.start("slurmdbd", "slurmdbd", "-D")
        self.until("the accounting answers", lambda: self.tried("sacctmgr", "-n", "show", "cluster"))

    def start_controller(self) -> None:
        """Start slurmctld, or start it again."""
        self.start("slurmctld", "slurmctld", "-D")
        self.until("the controller answers", lambda: self.tried("sinfo"))

    def start_node(self, node: str) -> None:
        """Start a node's slurmd, or start it again."""
        self.start(node, "slurmd", "-D", "-N", node)

    def start(self, name: str, *command: str) -> None:
        """Start a daemon that dies with us, its output in the cluster's folder."""
        with open(self.folder / f"{name}.out", "ab") as out:
            self.daemons[name] = subprocess.Popen(
                command, stdout=out, stderr=out, env=self.own, preexec_fn=_die_with_parent
            )

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        """Kill a daemon, by default the hard way. A node's jobs run on."""
        self.daemons[name].send_signal(number)
        self.daemons.pop(name).wait(30)

    def node_fails(self, node: str) -> None:
        """A node goes, with everything on it, and SLURM notices: here it is told, instead of waiting for its timer."""
        self.kill(node)
        for process in self.processes(node):
            for each in [*process.children(recursive=True), process]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
        self.ask("scontrol", "update", f"nodename={node}", "state=down", "reason=lost", patience=120)

    def preempt(self) -> None:
        """A job of the higher partition takes both nodes, for a moment."""
        whole = ("--partition=high", "--nodes=2", "--exclusive")
        self.ask("sbatch", *whole, "--output=/dev/null", "--wrap=true", patience=120)

    def ends_soon(self, job: str) -> None:
        """Give a running job one to two minutes more in all: limits are in whole minutes from its start."""
        began = self.ask("squeue", "--noheader", "--jobs", job, "--format=%S", patience=120)
        minutes = int((datetime.now() - datetime.fromisoformat(began.strip())).total_seconds()) // 60 + 2
        self.ask("scontrol", "update", f"jobid={job}", f"timelimit={minutes}", patience=120)

    def processes(self, node: str) -> list[psutil.Process]:
        """The step daemons of a node."""
        found, own = [], (f"{self.folder}/spool.{node}", f"{self.folder}/slurmd.{node}")
        for process in psutil.process_iter(["name"]):
            with contextlib.suppress(psutil.Error):
                if process.info["name"] == "slurmstepd" and any(p.startswith(own) for p in _open_paths(process)):
                    found.append(process)
        return found

    def clean(self) -> None:
        """Whatever a test left: nobody who waits, no job, every daemon, two idle nodes."""
        self.end_users()
        for name, start in (("slurmdbd", self.start_accounting), ("slurmctld", self.start_controller)):
            if name not in self.daemons:
                start()
        for node in NODES:
            if node not in self.daemons:
                self.start_node(node)
        if self.ask("squeue", "--noheader", patience=120):
            self.ask("scancel", "--user=root", patience=120)
            self.until("no job is left", lambda: not self.ask("squeue", "--noheader", patience=120), 240)
        self.until_idle()

    def end_users(self) -> None:
        """Kill what tests started, with everything that it started."""
        for user in self.users:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(user.pid, signal.SIGKILL)
            user.wait()
        self.users.clear()

    def down(self) -> None:
        """Everything ends at once, whatever state it is in: nothing of it is wanted any more."""
        self.end_users()
        sweep(self.folder)
        for daemon in self.daemons.values():
            daemon.wait()

    # -- ask ---------------------------------------------------------------------------------------------------------

    def ask(self, *command: str, patience: float = 0) -> str:
        """What a command prints; it must succeed, within `patience` seconds: a busy controller misses questions."""
        limit = time.monotonic() + patience
        while True:
            done = subprocess.run(command, capture_output=True, text=True, env=self.own, timeout=120)
            if done.returncode == 0:
                return done.stdout
            assert time.monotonic() < limit, f"{' '.join(command)}: {done.stdout}{done.stderr}"
            time.sleep(0.5)

    def tried(self, *command: str) -> bool:
        """Whether a command succeeds."""
        return subprocess.run(command, capture_output=True, env=self.own, timeout=120).returncode == 0

    def text(self, *command: str) -> str:
        """What a command prints, empty where it fails."""
        return subprocess.run(command, capture_output=True, text=True, env=self.own, timeout=120).stdout

    def until(self, what: str, ask: Callable[[], object], seconds: float = 120) -> None:
        """Wait for something to be so, and print how long that took."""
        started = time.monotonic()
        while not ask():
            assert time.monotonic() < started + seconds, f"not within {seconds:.0f} s: {what}\n{self.state()}"
            time.sleep(0.3)
        print(f"{time.strftime('%H:%M:%S')} after {time.monotonic() - started:.1f} s: {what}", flush=True)

    def until_idle(self) -> None:
        """Wait until nothing runs and both nodes can take work."""
        nodes = ",".join(NODES)

        def idle() -> bool:
            states = self.text("sinfo", "--noheader", "--Node", "--partition=main", "--format=%T").split()
            for node in NODES:
                if any(state.startswith(("down", "drain")) for state in states) and node in self.daemons:
                    self.tried("scontrol", "update", f"nodename={node}", "state=resume")
            return states == ["idle"] * 2

        self.until(f"{nodes} are idle", idle, 240)

    def state(self) -> str:
        """What a person would look at first."""
        return self.text("sinfo", "--Node", "--long") + self.text("squeue", "--states=all")

    def accounted(self, *fields: str) -> list[dict[str, str]]:
        """Every attempt of every job, as accounting has it, in order; it hears of things seconds later."""
        text = self.ask("sacct", "-X", "-D", "-n", "-P", "-S", "now-1day", f"--format={','.join(fields)}", patience=60)
        return [dict(zip(fields, line.split("|"), strict=True)) for line in text.splitlines()]


def _open_paths(process: psutil.Process) -> list[str]:
    paths = [file.path for file in process.open_files()]
    return [*paths, *process.cmdline(), process.cwd()]


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def free_ports(count: int) -> list[int]:
    """Ports that nobody uses now, below those that kernels and jobs choose for themselves."""
    found: list[int] = []
    for port in random.SystemRandom().sample(range(10_000, 20_000), 1000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            break
    return found


def write_program(path: Path, script: str) -> None:
    """Put a shell script in place, at once also for who is about to start it."""
    path.parent.mkdir(exist_ok=True)
    aside = path.with_suffix(".aside")
    aside.write_text(f"#!/bin/sh\n{script}\n")
    aside.chmod(0o755)
    aside.replace(path)


def processes_of(folder: Path) -> list[psutil.Process]:
    """Every process of a cluster: daemons, steps, jobs, and those that ask it; not those that only clean up."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and WATCH not in process.cmdline() and _belongs(process, folder):
                found |= {each.pid: each for each in (process, *process.children(recursive=True))}
    return list(found.values())


def _belongs(process: psutil.Process, folder: Path) -> bool:
    if process.environ().get("SLURM_CONF") == f"{folder}/slurm.conf":
        return True
    return any(f"{path}/".startswith(f"{folder}/") for path in _open_paths(process))


def sweep(folder: Path, seconds: float = 120) -> None:
    """Kill every process of a cluster."""
    limit = time.monotonic() + seconds
    while found := [process for process in processes_of(folder) if process.status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < limit, f"still there: {found}"
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(found, timeout=1)


def name_nodes(folder: Path, there: bool) -> None:
    """Make the nodes' names lead to loopback for a cluster, or no longer; others may do the same at the same time."""
    mark = f"# for {folder}"
    with open("/etc/hosts", "r+") as file:  # in place: containers mount this very file
        fcntl.flock(file, fcntl.LOCK_EX)
        kept = [line for line in file.read().splitlines(keepends=True) if mark not in line]
        kept += [f"127.0.0.1 {node} {mark}\n" for node in NODES] if there else []
        file.seek(0)
        file.write("".join(kept))
        file.truncate()


def watch(folder: Path) -> subprocess.Popen[bytes]:
    """A process that sweeps as soon as this one is gone, in whatever way."""
    command = [sys.executable, __file__, WATCH, str(folder)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def why_not() -> str:
    """Why a cluster cannot be brought up here; empty if it can."""
    if os.geteuid() != 0:
        return "a cluster of our own needs root (its daemons change users, its GPUs are device files)"
    where = os.environ["PATH"] + ":/usr/sbin:/sbin"
    missing = [name for name in PROGRAMS if not shutil.which(name, path=where)]
    if missing and shutil.which("apt-get"):
        missing = _install(where)
    return f"{', '.join(missing)} not found; install {', '.join(PACKAGES)}" if missing else ""


def _install(where: str) -> list[str]:
    """Install what is missing, one worker at a time; the programs that are missing still."""
    with open(Path(tempfile.gettempdir()) / "haste-slurm-packages.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if any(not shutil.which(name, path=where) for name in PROGRAMS):
            quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
            subprocess.run(["apt-get", "update", "-q"], capture_output=True, env=quiet, timeout=300)
            install = ["apt-get", "install", "-q", "-y", "--no-install-recommends", *PACKAGES]
            subprocess.run(install, capture_output=True, env=quiet, timeout=900)
    return [name for name in PROGRAMS if not shutil.which(name, path=where)]


if __name__ == "__main__":
    sys.stdin.read()  # until the tests' end of it closes
    sweep(Path(sys.argv[2]))
    name_nodes(Path(sys.argv[2]), there=False)
