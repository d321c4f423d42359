"""What a training job does inside the cluster, in processes with the environment that srun would give them."""

import pytest

from haste.cluster import job as jobs
from haste.cluster.job import Resources
from haste.cluster.waiter import Waiter
from haste.train import loop, state


@pytest.fixture
def plan(make_plan):
    return make_plan(runtime={"trackers": [], "save_every": 3, "log_every": 2})


def fill_the_disk_at(monkeypatch, step):
    """From the save of a step on nothing more fits."""
    whole = state.files.save_file

    def full(tensors, path, metadata):
        if f"step-{step:08d}" not in str(path):
            return whole(tensors, path, metadata)
        path.write_bytes(b"half")
        raise state.files.safetensors.SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )

    monkeypatch.setattr(state.files, "save_file", full)


def test_a_full_disk_is_a_refusal_which_keeps_the_last_good_state_and_is_not_tried_again(
    plan, cluster, start_job, monkeypatch
):
    target = plan.state("vanilla", 8)
    with monkeypatch.context() as patch:
        fill_the_disk_at(patch, 6)
        assert start_job(plan, target).ended() == [1]
    folder = jobs.folder(plan, target).parent
    assert [path.name for path in folder.rglob("*step-*")] == ["step-00000003.safetensors"]
    cluster.says("sbatch", "echo Submitted batch job 12")
    cluster.says("sacct", "echo FAILED")
    with pytest.raises(ValueError, match="job 12 refused: .*No space left on device.*step-00000006") as refusal:
        Waiter(plan, target, Resources(poll_s=0, runtime=5)).make()
    assert "make room, and the same command goes on" in str(refusal.value)
    assert len(cluster.calls("sbatch")) == 1
    loop.train(plan, target)


def test_a_full_disk_that_takes_not_even_the_refusal_ends_after_two_attempts(plan, cluster, start_job, monkeypatch):
    target = plan.state("vanilla", 8)
    with monkeypatch.context() as patch:
        fill_the_disk_at(patch, 3)
        patch.setattr(jobs, "refusal", lambda *_: folder / "nowhere" / "refused.txt")
        folder = jobs.folder(plan, target)
        folder.mkdir(parents=True)
        (folder / "nowhere").symlink_to("missing")  # nothing can be written there
        job = start_job(plan, target)
        assert job.ended() == [1]
    assert "No space left on device" in job.errors.get(timeout=10)[1], "what went wrong first is what is said"
    cluster.says("sbatch", "echo Submitted batch job 12")
    cluster.says("sacct", "echo FAILED")
    with pytest.raises(ValueError, match="2 attempts ended .FAILED. without getting beyond step 0"):
        Waiter(plan, target, Resources(poll_s=0, runtime=5)).make()
    assert len(cluster.calls("sbatch")) == 2
