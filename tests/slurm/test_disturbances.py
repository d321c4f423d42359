"""Training on a real SLURM, disturbed in every way that clusters know: the bits stay the same."""

import os
import re
import signal

import pytest
from slurm_cluster import write_program
from slurm_world import World, equal, locally

pytestmark = pytest.mark.timeout(3000)

HASTE = {"HASTE": {"alignment": "HASTE", "milestones": [300]}, "vanilla": {"milestones": [8]}}
SHORT = {"vanilla": {"milestones": [20]}}


def test_one_training_survives_everything_that_a_cluster_does_to_it(slurm, data, tmp_path):
    two_nodes = {"nodes": 2, "tasks_per_node": 1}
    world = World(tmp_path / "w", data, slurm, HASTE, {"save_every": 2}, train=two_nodes)
    what, target = ("HASTE", 300), world.path("HASTE", 300)
    local, expected = locally(world, tmp_path / "local", *what)
    write_program(tmp_path / "hangs" / "squeue", "exec sleep 600")
    unheard, unheard_log = world.train("vanilla", 8, first=tmp_path / "hangs"), world.log
    world.brake(pace=0.4, ceiling=290)
    snakemake = world.start(target)
    world.until("a job is there", lambda: world.queue(*what))

    # a colleague's Snakemake, in a clone of his own, says who is at work
    log, colleague = world.log, world.start(target, clone=world.clone())
    first = world.gets_on(*what)
    world.leaves(colleague)
    assert "is in use" in world.log.read_text()
    world.log = log

    # Snakemake and everything it started die; the same command attaches
    os.killpg(snakemake.pid, signal.SIGKILL)
    snakemake.wait()
    snakemake = world.start(target)
    world.until("it attached", lambda: f"attached to job {first}" in world.log.read_text())
    assert world.gets_on(*what) == first

    # a job of the higher partition takes both nodes
    slurm.preempt()
    world.until("it is preempted", lambda: (first, "PREEMPTED") in world.attempts(*what))
    world.until("it runs again", lambda: world.runs(*what))
    assert world.gets_on(*what) == first, "preemption ended the job"
    assert re.search(r"step (\d+) is saved; ending", world.said(*what))

    # one process is killed: another job goes on
    world.trainers()[1].kill()
    world.until("another job", lambda: world.runs(*what) not in ([], [first]))
    second = world.gets_on(*what)

    # the controller and a node's daemon die: the job runs on, and who waits says that nobody answers
    slurm.kill("slurmctld")
    slurm.kill("haste-n1")
    world.until("it is said", lambda: "SLURM does not answer" in world.log.read_text())
    slurm.start_controller()
    slurm.start_node("haste-n1")
    assert world.gets_on(*what) == second

    # a node goes
    slurm.node_fails("haste-n2")
    world.until("SLURM notices", lambda: not world.runs(*what))
    slurm.start_node("haste-n2")
    assert world.gets_on(*what) == second, "a lost node ended the job"

    # somebody cancels it, while the accounting hangs: it is not submitted behind their back
    with slurm.instead("sacct", "exec sleep 600"):
        slurm.ask("scancel", second, patience=120)
        world.leaves(snakemake)
    assert "was cancelled" in world.told(*what)

    # the same command goes on, and nobody waits for it after Ctrl-C
    world.profile(train={**two_nodes, "signal_s": 75})
    snakemake = world.start(target)
    third = world.gets_on(*what)
    os.killpg(snakemake.pid, signal.SIGINT)
    world.leaves(snakemake)
    assert f"job {third} goes on" in world.log.read_text()
    assert f"scancel {third}" in world.log.read_text()

    # its time is over: back into the queue, by itself; who comes then does not wait for long
    slurm.ends_soon(third)
    world.until("its time is over", lambda: world.queue(*what) == [(third, "PENDING")])
    assert re.search(r"step (\d+) is saved; back into the queue", world.said(*what))
    slurm.ask("scontrol", "update", f"jobid={third}", "timelimit=60", patience=120)
    snakemake = world.start(target)
    world.until("it runs again", lambda: world.runs(*what))
    world.release()
    world.finish(snakemake)

    # who got no answer all this time submitted nothing
    world.leaves(unheard, 2)
    assert "squeue gave no answer in 30 s" in unheard_log.read_text()
    assert "none is submitted" in unheard_log.read_text()
    assert not world.attempts("vanilla", 8)

    world.leaves(local, 0)
    equal(target, expected)
    world.until("all is accounted", lambda: world.attempts(*what)[-1] == (third, "COMPLETED"))
    attempts = world.attempts(*what)
    assert list(dict.fromkeys(number for number, _ in attempts)) == [first, second, third]
    ends = [[state for job, state in attempts if job == number] for number in (first, second, third)]
    assert ends == [["PREEMPTED", "FAILED"], ["NODE_FAIL", "CANCELLED"], ["REQUEUED", "COMPLETED"]]


def test_two_results_folders_of_one_user_train_the_same_at_once_and_stay_apart(slurm, data, tmp_path):
    what = ("vanilla", 20)
    worlds = [World(tmp_path / name, data, slurm, SHORT) for name in ("a", "b")]
    for world in worlds:
        world.brake(pace=0, ceiling=5)
        world.train(*what)
    for world in worlds:
        world.until("step 5 is saved", lambda: world.saved(*what) == 5)  # noqa: B023
    a, b = worlds
    numbers = [*a.runs(*what), *b.runs(*what)]
    assert len(set(numbers)) == 2

    # haste cancel ends the one and says so; the other goes on
    done = a.haste("cancel", "vanilla", "-c", a.file)
    assert f"cancelled job {numbers[0]}" in done.stdout
    a.leaves(a.user, 2)
    assert "was cancelled, with step 5 saved" in a.log.read_text()
    assert b.runs(*what) == [numbers[1]]
    for world in worlds:
        world.release()
    a.train(*what)
    for world in worlds:
        world.leaves(world.user, 0)
    equal(a.path(*what), b.path(*what))
    a.until("all is accounted", lambda: [len(world.attempts(*what)) for world in worlds] == [2, 1])


def test_a_job_that_is_preempted_before_it_can_listen_is_requeued(slurm, data, tmp_path):
    what = ("vanilla", 20)
    world = World(tmp_path / "w", data, slurm, SHORT)
    world.brake(pace=0, ceiling=5)
    world.train(*what)
    world.until("it runs", lambda: world.runs(*what))
    slurm.preempt()
    world.until("it is preempted", lambda: "PREEMPTED" in [end for _, end in world.attempts(*what)])
    world.release()
    world.leaves(world.user, 0)
    world.until("all is accounted", lambda: [end for _, end in world.attempts(*what)] == ["PREEMPTED", "COMPLETED"])
    assert len({number for number, _ in world.attempts(*what)}) == 1


def test_a_job_that_is_requeued_without_getting_on_stops_and_says_why(slurm, data, tmp_path):
    what = ("vanilla", 20)
    world = World(tmp_path / "w", data, slurm, SHORT)
    world.brake(pace=0, ceiling=0)
    world.train(*what)
    for times in (1, 2):
        world.until(f"attempt {times} trains", lambda: world.said(*what).count("aligning nothing") == times)  # noqa: B023
        (number,) = world.runs(*what)
        slurm.ask("scontrol", "requeue", number, patience=120)
    world.leaves(world.user, 2)
    said = world.log.read_text()
    assert f"job {number} refused: it was put back into the queue 2 times without getting beyond step 0" in said
    assert "save_every" in said
    assert {job for job, _ in world.attempts(*what)} == {number}


def test_what_the_cluster_cannot_do_is_refused_with_the_key_to_look_at(slurm, data, tmp_path):
    write_program(tmp_path / "fails" / "squeue", "echo slurm_load_jobs error: Unable to contact >&2; exit 1")
    wrong = {
        "slurm_account": ({"slurm_account": "nobody"}, "Invalid account"),
        "slurm_partition": ({"slurm_partition": "nowhere"}, "invalid partition"),
        "gpus_per_node": ({"gpus_per_node": 3}, "node configuration is not available"),
        "none is submitted": ({"first": tmp_path / "fails"}, "Unable to contact"),
    }
    world = World(tmp_path / "w", data, slurm, SHORT)
    users = [(world.train("vanilla", 20, **asked), world.log) for asked, _ in wrong.values()]
    for (key, (_, words)), (user, log) in zip(wrong.items(), users, strict=True):
        world.leaves(user, 2)
        said = log.read_text()
        assert words in said, key
        assert key in said.split(words, 1)[1], said
        assert "Traceback" not in said
    assert not list(world.path("vanilla", 20).parent.glob("jobs/*_submitted.sh"))

    # SLURM takes what may be allowed later; who waits is told
    world.train("vanilla", 20, nodes=4)
    world.until("it is said", lambda: "look at nodes in the profile" in world.log.read_text())
    ((number, state),) = world.queue("vanilla", 20)
    assert f"job {number} PENDING (PartitionNodeLimit): it will not start like this" in world.log.read_text()
    assert state == "PENDING"
    assert f"cancelled job {number}" in world.haste("cancel", "vanilla", "-c", world.file).stdout
    world.leaves(world.user, 2)
