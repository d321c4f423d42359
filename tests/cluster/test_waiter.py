"""Who waits never submits blindly or twice, never hangs, and says what happens. Scripts play SLURM."""

import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from safetensors.torch import save_file
from submitit.core.utils import DelayedSubmission

from haste.cli import main as cli
from haste.cluster import job as jobs
from haste.cluster import queue, slurm, waiter
from haste.cluster.job import Resources
from haste.cluster.waiter import Waiter
from haste.files.artefact import SCHEMA


@pytest.fixture
def plan(make_plan):
    return make_plan()


@pytest.fixture
def waiting(plan):
    """A waiter of the vanilla run's first state, and what it told."""
    told: list[str] = []
    found = Waiter(plan, plan.state("vanilla", 8), Resources(poll_s=0, runtime=5), told.append)
    found.told = told
    return found


def finish(waiting, path=None, key=None):
    """What a job leaves behind: a state with the right key."""
    path = path or waiting.path
    path.parent.mkdir(parents=True, exist_ok=True)
    key = key or waiting.plan.trajectories[waiting.state.trajectory].key
    header = f'{{"schema": {SCHEMA}, "kind": "state", "key": "{key}"}}'
    save_file({"x": torch.zeros(1)}, path.with_suffix(".aside"), {"haste": header})
    path.with_suffix(".aside").replace(path)


def running(waiting, number=7, state="RUNNING", nodes="n1", reason="None"):
    return f"{number}|{state}|{nodes}|{reason}|{waiting.name}"


def accepts(cluster, waiting, script="true"):
    """sbatch takes the job, does something, and squeue shows it from then on."""
    cluster.says("squeue", f"[ ! -e live ] || echo '{running(waiting, 12)}'")
    cluster.says("sbatch", f"{script}; touch live; echo Submitted batch job 12")


def test_a_finished_state_asks_slurm_nothing(cluster, waiting):
    finish(waiting)
    assert waiting.make() == waiting.path
    assert not cluster.calls("squeue")
    assert not cluster.calls("sbatch")


def test_a_state_of_another_key_is_refused(cluster, waiting):
    finish(waiting, key="another")
    with pytest.raises(ValueError, match="expected a state of key .*, found another"):
        waiting.make()


def test_a_live_job_of_the_name_is_attached_to_and_none_is_submitted(cluster, waiting):
    cluster.shows(running(waiting))
    threading.Timer(1.0, finish, [waiting]).start()
    waiting.make()
    assert not cluster.calls("sbatch")
    assert any("attached to job 7" in line for line in waiting.told)
    assert any("job 7 RUNNING on n1" in line for line in waiting.told)


def test_a_job_is_submitted_from_within_another_without_its_variables_and_to_the_same_cluster(
    cluster, waiting, monkeypatch
):
    monkeypatch.setenv("SLURM_CONF", "/etc/elsewhere.conf")
    monkeypatch.setenv("SLURM_JOB_ID", "99")
    accepts(cluster, waiting, "env > environment")
    threading.Timer(1.0, finish, [waiting]).start()
    waiting.make()
    lines = (cluster.folder / "environment").read_text().splitlines()
    assert "SLURM_CONF=/etc/elsewhere.conf" in lines
    assert not [line for line in lines if line.startswith("SLURM_JOB_ID=")]
    assert os.environ["SLURM_JOB_ID"] == "99"


def test_without_a_job_one_is_submitted_as_the_profile_says(cluster, waiting):
    waiting.asked = jobs.resources(
        [
            *("nodes=2", "tasks_per_node=4", "gpus_per_node=4", "cpus_per_task=3", "runtime=90", "mem_mb=5000"),
            *("slurm_account=me", "slurm_partition=fast", "qos=high", "constraint=a100", "signal_s=77", "poll_s=1"),
            *("slurm_extra=--exclude=n9 --exclusive", "stage_in=/scratch/$USER"),
        ]
    )
    accepts(cluster, waiting, "cp $1 script")
    threading.Timer(1.0, finish, [waiting]).start()
    waiting.make()
    assert len(cluster.calls("sbatch")) == 1
    script = (cluster.folder / "script").read_text()
    flags = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", script, re.MULTILINE))
    expected = {"nodes": "2", "ntasks-per-node": "4", "gpus-per-node": "4", "cpus-per-task": "3", "time": "90"}
    expected |= {"mem": "5000MB", "account": "me", "partition": "fast", "qos": "high", "constraint": "a100"}
    expected |= {"signal": "USR2@77", "requeue": "", "dependency": "singleton", "job-name": waiting.name}
    expected |= {"exclude": "n9", "exclusive": "", "open-mode": "append"}
    assert {name: flags.get(name, "missing").strip("'") for name in expected} == expected
    assert "srun" in script and "--kill-on-bad-exit=1" in script
    (submitted,) = waiting.folder.glob("*_submitted.pkl")
    assert DelayedSubmission.load(submitted).function.stage_in == "/scratch/$USER"


POLICY = "Batch job submission failed: Job violates accounting/QOS policy (job submit limit, user's size and/or time"


@pytest.mark.parametrize(
    ("words", "limit"),
    [
        (f"AssocMaxSubmitJobLimit {POLICY}", "AssocMaxSubmitJobLimit"),
        (f"QOSGrpSubmitJobsLimit {POLICY}", "QOSGrpSubmitJobsLimit"),
        (POLICY, "job submit limit"),  # older versions do not say which
        ("Batch job submission failed: Resource temporarily unavailable", "Resource temporarily"),  # MaxJobCount
    ],
)
def test_a_limit_on_how_many_jobs_may_wait_means_later(cluster, waiting, tmp_path, words, limit):
    finish(waiting, tmp_path / "made.safetensors")
    refuse = f'[ $(wc -l < sbatch.calls) -gt 2 ] || {{ echo "{words}" >&2; exit 1; }}'
    cluster.says("sbatch", f"{refuse}; mv {tmp_path}/made.safetensors {waiting.path}; echo Submitted batch job 12")
    waiting.make()
    assert len(cluster.calls("sbatch")) == 3
    (said,) = [line for line in waiting.told if "takes no more jobs now" in line]
    assert f"({limit})" in said
    assert any("submitted job 12" in line for line in waiting.told)


@pytest.mark.parametrize("limit", ["QOSMaxCpuPerJobLimit", "AssocMaxWallDurationPerJobLimit"])
def test_a_limit_on_what_a_job_may_ask_for_is_a_refusal(cluster, waiting, limit):
    cluster.says("sbatch", f'echo "{limit} {POLICY}" >&2; exit 1')
    with pytest.raises(ValueError, match=f"SLURM did not take the job .*{limit}"):
        waiting.make()
    assert len(cluster.calls("sbatch")) == 1


def test_who_stops_waiting_for_room_is_told_that_no_job_was_submitted(cluster, waiting):
    cluster.says("sbatch", "echo AssocMaxSubmitJobLimit >&2; exit 1")
    threading.Timer(1.0, waiting.detach.set).start()
    with pytest.raises(waiter.Detached, match="no job was submitted"):
        waiting.make()


@pytest.mark.parametrize("trouble", ["exit 1", "echo slurm_load_jobs error >&2; exit 1", "echo garbled"])
def test_when_squeue_fails_nothing_is_submitted_and_it_is_said(cluster, waiting, trouble):
    cluster.says("squeue", trouble)
    with pytest.raises(ValueError, match="does not say whether a job for it exists.*none is submitted"):
        waiting.make()
    assert not cluster.calls("sbatch")


def test_when_squeue_hangs_nothing_is_submitted_and_nothing_hangs(cluster, waiting, monkeypatch):
    monkeypatch.setattr(slurm.ask, "__kwdefaults__", {"timeout": 0.3})
    cluster.says("squeue", "sleep 60")
    started = time.monotonic()
    with pytest.raises(ValueError, match="squeue gave no answer"):
        waiting.make()
    assert time.monotonic() - started < 20
    assert not cluster.calls("sbatch")


def test_a_missing_squeue_is_not_an_empty_queue(cluster, waiting, monkeypatch):
    monkeypatch.setenv("PATH", str(cluster.folder))
    with pytest.raises(ValueError, match="squeue: No such file"):
        waiting.make()


def test_a_controller_that_is_away_for_a_while_costs_nothing_but_a_message(cluster, waiting):
    cluster.shows(running(waiting))
    threading.Timer(0.5, cluster.says, ["squeue", "exit 1"]).start()
    threading.Timer(2.0, finish, [waiting]).start()
    waiting.make()
    assert not cluster.calls("sbatch")
    assert any("SLURM does not answer" in line for line in waiting.told)


def test_silence_ends_in_a_message(cluster, waiting, monkeypatch):
    monkeypatch.setattr(waiter, "SILENCE", 0.5)
    cluster.shows(running(waiting))
    threading.Timer(0.5, cluster.says, ["squeue", "exit 1"]).start()
    with pytest.raises(ValueError, match="no answer from SLURM .* Job 7 may go on; the same command attaches"):
        waiting.make()


def test_a_job_that_is_away_for_less_than_four_looks_is_not_submitted_again(cluster, waiting, monkeypatch):
    monkeypatch.setattr(waiter, "GONE", 4)
    cluster.says("squeue", f"echo >> looks; n=$(wc -l < looks); (( n % 4 )) || echo '{running(waiting)}'")
    (cluster.folder / "looks").write_text("\n" * 3)
    threading.Timer(2.0, finish, [waiting]).start()
    waiting.make()
    assert not cluster.calls("sbatch")


def test_a_requeued_job_does_not_wait_two_minutes(cluster, waiting):
    cluster.shows(running(waiting, state="PENDING", nodes="", reason="BeginTime"))
    threading.Timer(1.0, finish, [waiting]).start()
    waiting.make()
    assert "update jobid=7 StartTime=now" in cluster.calls("scontrol")


def test_a_failed_job_is_submitted_again_while_it_gets_on_and_no_longer(cluster, waiting):
    # each of the first three attempts saves one more step; the others fail at once
    rolling = waiting.path.parent / "rolling"
    rolling.mkdir(parents=True)
    script = f"n=$(wc -l < sbatch.calls); (( n > 3 )) || touch {rolling}/step-0000000$n.safetensors; "
    cluster.says("sbatch", f"{script} echo Submitted batch job $n")
    cluster.says("sacct", "echo FAILED")
    waiting.folder.mkdir(parents=True)
    (waiting.folder / "5_0_log.out").write_text("what it died of")
    with pytest.raises(ValueError, match="2 attempts ended .FAILED. without getting beyond step 3") as error:
        waiting.make()
    assert len(cluster.calls("sbatch")) == 3 + 2
    assert "what it died of" in str(error.value)


def test_a_cancelled_job_is_not_submitted_again(cluster, waiting):
    cluster.says("sbatch", "echo Submitted batch job 12")
    cluster.says("sacct", "echo CANCELLED by 1000")
    with pytest.raises(ValueError, match="job 12 was cancelled, with step 0 saved. The same command submits another"):
        waiting.make()
    assert len(cluster.calls("sbatch")) == 1


def test_without_accounting_the_controller_is_asked_how_a_job_ended(cluster, waiting):
    cluster.says("sbatch", "echo Submitted batch job 12")
    cluster.says("sacct", "echo Slurm accounting storage is disabled >&2; exit 1")
    cluster.says("scontrol", "echo JobId=12 JobName=x JobState=CANCELLED Reason=None")
    with pytest.raises(ValueError, match="was cancelled"):
        waiting.make()


def test_an_accounting_that_is_late_is_not_believed(cluster, waiting):
    cluster.says("sbatch", "echo Submitted batch job 12")
    cluster.says("sacct", "echo RUNNING")
    cluster.says("scontrol", "echo JobId=12 JobName=x JobState=CANCELLED Reason=None")
    with pytest.raises(ValueError, match="was cancelled"):
        waiting.make()


@pytest.mark.parametrize(
    ("reason", "advice"),
    [
        ("PartitionTimeLimit", "it will not start like this; look at runtime in the profile, `scancel 7`"),
        ("QOSMaxGRESPerJob", "look at nodes, gpus_per_node, cpus_per_task and mem_mb in the profile"),
        ("JobHeldUser", "held: `scontrol release 7` lets it go on"),
    ],
)
def test_a_job_that_waits_in_vain_is_said_with_what_helps(cluster, waiting, reason, advice):
    cluster.shows(running(waiting, state="PENDING", nodes="", reason=reason))
    threading.Timer(1.0, finish, [waiting]).start()
    waiting.make()
    assert any(advice in line for line in waiting.told)


def test_a_job_that_waits_its_turn_is_left_alone(cluster, waiting):
    cluster.shows(running(waiting, state="PENDING", nodes="", reason="QOSMaxJobsPerUserLimit"))
    threading.Timer(1.0, finish, [waiting]).start()
    waiting.make()
    assert any(line.endswith("PENDING (QOSMaxJobsPerUserLimit)") for line in waiting.told)


def test_a_job_that_refuses_is_not_tried_again_and_its_reason_is_passed_on(cluster, waiting):
    cluster.says("sbatch", "echo Submitted batch job 12")
    cluster.says("sacct", "echo FAILED")
    waiting.folder.mkdir(parents=True)
    jobs.refusal(waiting.plan, waiting.state, "12").write_text("the latents are others\n")
    with pytest.raises(ValueError, match="job 12 refused: the latents are others"):
        waiting.make()
    assert len(cluster.calls("sbatch")) == 1


@pytest.mark.parametrize(
    ("words", "key"),
    [
        ("Invalid account or account/partition combination specified", "slurm_account"),
        ("invalid partition specified: nowhere", "slurm_partition"),
        ("Batch job submission failed: Requested node configuration is not available", "gpus_per_node"),
    ],
)
def test_what_sbatch_refuses_is_passed_on_with_the_line_to_look_at(cluster, waiting, words, key):
    cluster.says("sbatch", f"echo 'sbatch: error: {words}' >&2; exit 1")
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        waiting.make()
    assert key in str(error.value).split("Look at ")[1]


def test_a_batch_that_the_processes_do_not_divide_is_refused_before_anything_is_submitted(cluster, waiting):
    waiting.asked = Resources(nodes=3, runtime=5)
    with pytest.raises(ValueError, match="a batch of 8 cannot be cut into 3 processes"):
        waiting.make()
    assert not cluster.calls("squeue")


def test_two_results_folders_have_two_names_and_two_ways_to_one_folder_have_one(plan, tmp_path):
    state = plan.state("vanilla", 8)
    name = jobs.name(plan, state)
    (tmp_path / "link").symlink_to(plan.root)
    real = plan.root
    plan.root = str(tmp_path / "link")
    assert jobs.name(plan, state) == name
    plan.root = f"{real}-2"
    assert jobs.name(plan, state) != name


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_detaches_says_how_to_cancel_and_cancels_nothing(cluster, plan, number):
    state = plan.state("vanilla", 8)
    cluster.shows(f"7|RUNNING|n1|None|{jobs.name(plan, state)}")
    command = [sys.executable, "-m", "haste.cli", "train", str(state), "-c", str(plan.file)]
    waiter = subprocess.Popen(
        [*command, "--terminal", "2", "--slurm", "runtime=5", "poll_s=1"], stderr=subprocess.PIPE, text=True
    )
    while not cluster.calls("squeue"):
        time.sleep(0.05)
    time.sleep(0.5)
    waiter.send_signal(number)
    _, said = waiter.communicate(timeout=30)
    assert waiter.returncode == 130
    assert "job 7 goes on; the same command attaches to it, `scancel 7` ends it" in said
    assert "Traceback" not in said
    assert not cluster.calls("scancel")


def test_cancel_ends_the_jobs_of_the_run_and_no_other(cluster, plan, capsys):
    states = {run: plan.state(run, 16) for run in ("vanilla", "REPA")}
    cluster.shows(*(f"{n}|RUNNING|n1|None|{jobs.name(plan, s)}" for n, s in enumerate(states.values(), start=1)))
    assert queue.training(plan)[states["REPA"]].id == "2"
    assert cli.main(["cancel", "vanilla", "-c", str(plan.file)]) == 0
    assert cluster.calls("scancel") == ["1"]
    assert "cancelled job 1, which trained" in capsys.readouterr().out
    assert cli.main(["cancel", "nobody", "-c", str(plan.file)]) == 2
    cluster.says("squeue", "exit 1")
    assert cli.main(["cancel", "vanilla", "-c", str(plan.file)]) == 2
    assert "nothing is known to be cancelled" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("node=2", "expected KEY=VALUE with one of nodes"),
        ("nodes", "expected KEY=VALUE"),
        ("nodes=0", "at least 1"),
        ("runtime=1h", "whole number"),
        ("stage_in=yes", "expected true, false, or a folder"),
        ("runtime=2", "signal_s is 120, but the job has 2 minutes"),
    ],
)
def test_resources_that_make_no_sense_are_refused(setting, words):
    with pytest.raises(ValueError, match=words):
        jobs.resources([setting])
    with pytest.raises(ValueError, match="each needs its own"):
        jobs.resources(["tasks_per_node=4", "gpus_per_node=2"])
