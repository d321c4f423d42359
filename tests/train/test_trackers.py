"""A journal's records reach TensorBoard, an interrupted stretch only once."""

from pathlib import Path

import pytest

from haste import config
from haste.files import journal
from haste.train import loop
from haste.train.trackers import TRACKERS, open_tracker


def test_tensorboard_has_what_the_journal_has_after_an_interruption(make_plan):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    plan = make_plan(runtime={"trackers": ["tensorboard"], "log_every": 2, "save_every": 3})
    path = Path(plan.path(plan.state("HASTE", 8)))
    loop.train(plan, plan.state("HASTE", 8))
    path.unlink()
    loop.train(plan, plan.state("HASTE", 8))
    events = EventAccumulator(str(path.parent / "tensorboard"))
    events.Reload()
    records = journal.read(path.parent / "log.jsonl")
    assert [record["step"] for record in records] == [2, 4, 6, 8]
    for term in ("denoising", "features", "attention", "grad_norm", "images_per_s", "waiting", "memory_mb"):
        found = {event.step: event.value for event in events.Scalars(term)}
        assert found == pytest.approx({record["step"]: record[term] for record in records}, rel=1e-6), term
        assert len(events.Scalars(term)) == len(records), "an interrupted stretch shows twice"


def test_every_tracker_of_the_configuration_exists_and_none_else():
    (choices,) = [field for name, field in config.Runtime.model_fields.items() if name == "trackers"]
    assert set(choices.annotation.__args__[0].__args__) == set(TRACKERS)


def test_a_tracker_that_is_not_installed_is_refused_with_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(ValueError, match=r"wandb is not installed \(`pip install wandb`\)"):
        open_tracker("wandb", tmp_path, name="x", config={}, begin=0)
