"""One training on a real SLURM, disturbed at random moments in random ways; `make soak`, not part of `make test`.

Nobody looks whether training goes on before the next blow: many hit a job that is still starting. Whoever waits and
is gone is started again by the same command, as a person would. SEED repeats the blows of another run, BLOWS tells
how many there are.
"""

import collections
import contextlib
import os
import random
import signal
import threading
import time

import psutil
import pytest
from slurm_cluster import NODES
from slurm_world import World, equal, locally

BLOWS = int(os.environ.get("BLOWS", "20"))
STEPS = 2000
WHAT = ("HASTE", STEPS)
# How who waits may end; anything else is a fault.
WORDS = ("was cancelled", "goes on; the same command attaches", "without getting beyond step", "so none is submitted")


class Witness(threading.Thread):
    """Looks all the time whether there is ever more than one job of the name, or trainers of more than one attempt."""

    def __init__(self, world):
        super().__init__(daemon=True)
        self.world, self.wrong, self.looks, self.over = world, [], 0, threading.Event()
        self.answers = 0

    def run(self):
        while not self.over.wait(0.3):
            self.looks += 1
            attempts = set()
            for process in self.world.trainers():
                with contextlib.suppress(psutil.Error):
                    values = process.environ()
                    attempts.add((values["SLURM_JOB_ID"], values.get("SLURM_RESTART_COUNT", "0")))
            if len(attempts) > 1:
                self.wrong.append(f"trainers of {sorted(attempts)}")
            with contextlib.suppress(AssertionError):
                live = self.world.queue(*WHAT, patience=0)
                self.answers += 1
                if len(live) > 1:
                    self.wrong.append(f"jobs {live}")


class Blows:
    """Ways to disturb; each returns a word on what it met."""

    def __init__(self, world, chance):
        self.world, self.slurm, self.chance = world, world.slurm, chance

    def kinds(self):
        return [name for name in vars(Blows) if not name.startswith("_") and name not in ("kinds", "someone")]

    def someone(self):
        """The number of the job, if there is one."""
        live = self.world.queue(*WHAT)
        return live[0][0] if live else None

    # -- who waits

    def snakemake_is_killed(self):
        self._signal(signal.SIGKILL)

    def ctrl_c(self):
        self._signal(signal.SIGINT)

    def the_connection_is_gone(self):
        self._signal(signal.SIGHUP)

    def a_second_snakemake(self):
        first, log = self.world.user, self.world.log
        second = self.world.start(self.world.path(*WHAT))
        if first.poll() is None:
            second.wait(240)
            if first.poll() is None:
                assert "is in use" in self.world.log.read_text(), self.world.log.read_text()
            self.world.user, self.world.log = first, log

    def _signal(self, number):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.world.user.pid, number)
        if number != signal.SIGHUP:
            self.world.user.wait(240)

    # -- the job

    def preempted(self):
        self.slurm.preempt()

    def a_process_is_killed(self):
        self._to_a_trainer(signal.SIGKILL)

    def a_process_sleeps(self):
        process = self._to_a_trainer(signal.SIGSTOP)
        time.sleep(self.chance.uniform(1, 6))
        with contextlib.suppress(psutil.Error):
            _ = process and process.send_signal(signal.SIGCONT)

    def _to_a_trainer(self, number):
        found = self.world.trainers()
        if not found:
            return None
        process = self.chance.choice(found)
        with contextlib.suppress(psutil.Error):
            process.send_signal(number)
        return process

    def time_is_over(self):
        self._of_the_job("scancel", "--signal=USR2")

    def requeued_by_hand(self):
        self._of_the_job("scontrol", "requeue")

    def cancelled(self):
        self._of_the_job("scancel")

    def haste_cancel(self):
        self.world.haste("cancel", "HASTE", "-c", self.world.file)

    def suspended(self):
        self._of_the_job("scontrol", "suspend")
        time.sleep(self.chance.uniform(1, 6))
        self._of_the_job("scontrol", "resume")

    def _of_the_job(self, *command):
        number = self.someone()
        if number:
            self.slurm.tried(*command, number)  # it may have ended meanwhile

    # -- the cluster

    def the_controller_dies(self):
        self.slurm.kill("slurmctld")
        time.sleep(self.chance.uniform(0, 15))
        self.slurm.start_controller()

    def a_node_daemon_dies(self):
        node = self.chance.choice(NODES)
        self.slurm.kill(node)
        time.sleep(self.chance.uniform(0, 8))
        self.slurm.start_node(node)

    def a_node_is_lost(self):
        node = self.chance.choice(NODES)
        self.slurm.node_fails(node)
        time.sleep(self.chance.uniform(0, 8))
        self.slurm.start_node(node)

    def a_node_is_drained(self):
        node = self.chance.choice(NODES)
        self.slurm.ask("scontrol", "update", f"nodename={node}", "state=drain", "reason=soak", patience=120)
        time.sleep(self.chance.uniform(0, 10))
        self.slurm.ask("scontrol", "update", f"nodename={node}", "state=resume", patience=120)

    def the_accounting_dies(self):
        self.slurm.kill("slurmdbd")
        time.sleep(self.chance.uniform(0, 10))
        self.slurm.start_accounting()

    def squeue_fails(self):
        with self.slurm.instead("squeue", "echo slurm_load_jobs error >&2; exit 1"):
            time.sleep(self.chance.uniform(2, 10))

    def squeue_hangs(self):
        with self.slurm.instead("squeue", "exec sleep 600"):
            time.sleep(self.chance.uniform(2, 10))

    # -- the disk

    def the_newest_state_is_damaged(self):
        found = sorted(self.world.path(*WHAT).parent.glob("rolling/step-*.safetensors"))
        if len(found) > 1:
            with contextlib.suppress(FileNotFoundError):
                os.truncate(found[-1], found[-1].stat().st_size // 2)


@pytest.mark.timeout(7200)
def test_random_disturbances_never_make_two_jobs_and_end_in_the_same_bits(slurm, data, tmp_path):
    seed = int(os.environ.get("SEED", random.SystemRandom().randrange(10**6)))
    print(f"\nSEED={seed} BLOWS={BLOWS}")
    train = {"nodes": 2, "tasks_per_node": 1, "runtime": 3, "signal_s": 60}
    runs = {"HASTE": {"alignment": "HASTE", "milestones": [STEPS]}}
    world = World(tmp_path / "w", data, slurm, runs, {"save_every": 2}, train=train)
    local, expected = locally(world, tmp_path / "local", *WHAT)
    world.brake(pace=0.3, ceiling=STEPS - 10)
    chance, target, ends = random.Random(seed), world.path(*WHAT), []
    blows, met, witness = Blows(world, chance), collections.Counter(), Witness(world)
    deck = chance.sample(blows.kinds(), len(blows.kinds()))
    started = time.monotonic()
    witness.start()
    world.start(target)
    for number in range(BLOWS):
        time.sleep(chance.uniform(0, 30))
        kind = deck[number % len(deck)]
        print(f"{time.strftime('%H:%M:%S')} {number + 1}. {kind}; step {world.saved(*WHAT)}, {world.queue(*WHAT)}")
        getattr(blows, kind)()
        met[kind] += 1
        again(world, target, ends)
    world.release()
    while not target.exists():
        assert time.monotonic() - started < 5400, "it does not end"
        again(world, target, ends)
        time.sleep(1)
    world.leaves(world.user, 0)
    witness.over.set()
    witness.join(60)
    world.leaves(local, 0)
    equal(target, expected)
    world.until("all is accounted", lambda: world.attempts(*WHAT)[-1][1] == "COMPLETED")
    attempts = collections.Counter(state for _, state in world.attempts(*WHAT))
    print(f"{time.monotonic() - started:.0f} s; blows {dict(met)}; attempts by their end {dict(attempts)}")
    print(f"who waited was started {len(ends) + 1} times; {witness.looks} looks, {witness.answers} at the queue")
    assert not witness.wrong


def again(world, target, ends):
    """Who waits and is gone is started again by the same command; but first, what made it go."""
    code = world.user.poll()
    if code is None or target.exists():
        return
    if code > 0:
        said = world.log.read_text() + world.told(*WHAT)
        assert any(word in said for word in WORDS), said
        assert "Traceback" not in said, said
    ends.append(code)
    world.start(target)
