"""What a job sees to by itself: it does not burn hours without end where nothing is ever saved."""

import pytest

from haste.cluster import inside
from haste.cluster import job as jobs


@pytest.fixture
def attempt(make_plan, monkeypatch):
    """A function that begins another attempt of a job, after this step was saved."""
    plan = make_plan()
    state = plan.state("vanilla", 8)
    jobs.folder(plan, state).mkdir(parents=True)
    rolling = jobs.folder(plan, state).with_name("rolling")
    rolling.mkdir()

    def begin(number, saved):
        monkeypatch.setenv("SLURM_JOB_ID", number)
        if saved:
            (rolling / f"step-{saved:08d}.safetensors").touch()
        inside._refuse_if_futile(plan, state)

    return begin


def refused(attempt, number, saved):
    try:
        attempt(number, saved)
    except ValueError:
        return True
    return False


def test_the_third_attempt_in_a_row_from_one_step_is_refused_with_what_helps(attempt):
    for saved in (0, 0, 3, 3):
        attempt("7", saved)
    words = r"put back into the queue 2 times without getting beyond step 3.*save_every \(now 3\).*tries again"
    with pytest.raises(ValueError, match=words):
        attempt("7", 3)


def test_attempts_that_get_on_are_never_refused(attempt):
    assert not any(refused(attempt, "7", saved) for saved in (0, 0, 1, 2, 2, 3, 4, 5, 5, 6))


def test_the_same_command_again_is_another_job_and_starts_anew(attempt):
    assert not any(refused(attempt, number, 0) for number in ("7", "7", "8", "8", "9"))
    assert refused(attempt, "7", 0)
