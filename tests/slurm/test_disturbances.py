"""Training on a real SLURM, disturbed in every way that clusters know: the bits stay the same."""

import os
import signal
import time

import pytest
from slurm_world import World, equal, locally

pytestmark = pytest.mark.timeout(3000)


def test_one_training_survives_everything_that_a_cluster_does_to_it(slurm, data, tmp_path):
    runs = {"HASTE": {"alignment": "HASTE", "milestones": [400]}}
    world = World(tmp_path / "w", data, slurm, runs, train={"nodes": 2, "tasks_per_node": 1})
    what, target = ("HASTE", 400), world.path("HASTE", 400)
    world.brake.write_text("0.3")
    snakemake = world.start(target)
    first = world.gets_on(*what)

    # Snakemake and everything it started die; the same command attaches
    os.killpg(snakemake.pid, signal.SIGKILL)
    snakemake.wait()
    snakemake = world.start(target)
    world.until("it attached", lambda: f"attached to job {first}" in world.log.read_text())
    assert world.gets_on(*what) == first

    # a second Snakemake says who is at work
    log = world.log
    second = world.start(target)
    assert second.wait(120) != 0
    assert "is in use" in world.log.read_text()
    world.log = log

    # a job of the higher partition takes both nodes
    before = world.saved(*what)
    slurm.ask("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 3")
    world.until("it is preempted", lambda: not world.runs(*what))
    world.until("it is saved", lambda: world.saved(*what) >= before)
    world.until("it runs again", lambda: world.runs(*what))
    assert world.gets_on(*what) == first, "preemption ended the job"

    # one process is killed: another job goes on
    world.trainers()[1].kill()
    world.until("another job", lambda: world.runs(*what) not in ([], [first]))
    second = world.gets_on(*what)

    # the controller and a node's daemon die: the job runs on
    slurm.kill("slurmctld")
    slurm.kill("haste-n1")
    time.sleep(5)
    slurm.start_controller()
    slurm.start_node("haste-n1")
    assert world.gets_on(*what) == second

    # a node goes
    slurm.node_fails("haste-n2")
    world.until("SLURM notices", lambda: not world.runs(*what), 180)
    slurm.start_node("haste-n2")
    third = world.gets_on(*what)

    # somebody cancels it: it is not submitted behind their back, the same command goes on
    slurm.ask("scancel", third)
    assert snakemake.wait(120) != 0
    assert "was cancelled" in (world.root / "tiny" / "logs" / f"train-{target.parent.name}-00000400.log").read_text()
    snakemake = world.start(target)
    fourth = world.gets_on(*what)

    # Ctrl-C leaves it running and says so; haste cancel ends it
    os.killpg(snakemake.pid, signal.SIGINT)
    assert snakemake.wait(120) != 0
    assert f"job {fourth} goes on" in world.log.read_text()
    assert f"scancel {fourth}" in world.log.read_text()
    assert world.gets_on(*what) == fourth
    done = world.haste("cancel", "HASTE", "-c", world.file)
    assert f"cancelled job {fourth}" in done.stdout
    world.until("it is gone", lambda: not world.queue(*what))

    # its time is shorter than what is left: back into the queue, by itself
    world.profile(train={"nodes": 2, "tasks_per_node": 1, "runtime": 2, "signal_s": 45})
    world.brake.write_text("1")
    snakemake = world.start(target)
    last = world.gets_on(*what)
    world.until("its time is over", lambda: not world.runs(*what), 240)
    world.until("it runs again", lambda: world.runs(*what))
    assert world.gets_on(*what) == last
    world.brake.unlink()
    world.finish(snakemake)

    plan = locally(world, tmp_path, what)
    equal(target, plan.path(plan.state(*what)))
    attempts = world.attempts(*what)
    print(attempts)
    assert len({number for number, _ in attempts}) == len({first, second, third, fourth, last})
    assert ("PREEMPTED" in dict(attempts).values()) or [a for a in attempts if a == (first, "PREEMPTED")]
    assert attempts[-1] == (last, "COMPLETED")
