"""The denoising loss on held-out images: against a loss that is computed image by image in float64."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from toy_gradients import ALIGNED, Toy

from haste import config
from haste.data import order
from haste.files.store import Store
from haste.measure import jobs
from haste.measure.subject import opened
from haste.train import loop
from haste.train.distributed import Group

SPEC = {"measure": "denoising", "images": 21, "groups": 8, "t": [0.1, 0.625]}


@pytest.fixture
def plan(make_plan, monkeypatch):
    """Of a toy in float64 whose states after 4 and 8 steps are there."""
    monkeypatch.setitem(config.DENOISERS, "Toy", "toy_gradients:Toy")
    measures = {"loss": SPEC, "raw": {**SPEC, "weights": "model"}, "all": {**SPEC, "images": 5000}}
    made = make_plan(
        models={"dot": {"architecture": "Toy", "width": 16}},
        alignments={"HASTE": ALIGNED},
        training={"batch": 4, "lr": 1.0e-3, "ema": 0.5, "precision": "fp64"},
        measures=measures,
        runs={"HASTE": {"alignment": "HASTE", "milestones": [4, 8], "measures": list(measures)}},
    )
    for state in made.planned():
        loop.train(made, state)
    return made


def measured(plan, label, step=8):
    (what,) = (one.measurement for one in plan.measured if (one.measurement.label, one.step) == (label, step))
    return jobs.measure(plan, what, keep=False)


def losses(plan, image, times, prefix, step=8):
    """Of one image at some times, of weights in a state; knows how the toy and the path are computed, no more."""
    tensors = load_file(plan.path(plan.state("HASTE", step)))
    model = Toy(input_size=4, in_channels=4, classes=10, width=16).double()
    model.load_state_dict({k.removeprefix(prefix): v.double() for k, v in tensors.items() if k.startswith(prefix)})
    with Store.open(plan.latents.folder) as latents:
        mean, std = torch.from_numpy(latents.read("moments", [image])).double().chunk(2, dim=1)
        label = torch.from_numpy(latents.read("label", [image]))
        scale, shift = latents.manifest["scale"], latents.manifest["shift"]
    n, eps = (
        torch.from_numpy(order.normals(0, purpose, 0, [image], mean.shape[1:])).double()
        for purpose in ("measured latent draw", "measured noise")
    )
    z, found = (mean + std * n - shift) * scale, []
    for t in (float(np.float32(t)) for t in times):  # times are float32
        with torch.no_grad():
            velocity = model((1 - t) * z + t * eps, torch.tensor([t], dtype=torch.float64), label)[0]
        found.append(float((velocity - (eps - z)).square().mean()))
    return found


@pytest.mark.parametrize(("label", "prefix"), [("loss", "ema/"), ("raw", "model/")])
def test_a_group_has_the_mean_loss_of_its_images_computed_one_by_one(plan, label, prefix):
    held = Store.open(plan.latents.folder).range("held_out")
    images = held.start + order.choice(0, "measured images", 0, 21, len(held))
    assert all(1700 <= image < 1797 for image in images)  # the last 97 of the digits are held out
    each = np.array([losses(plan, image, SPEC["t"], prefix) for image in images])  # (21, T)
    sizes = [2, 3, 2, 3, 3, 2, 3, 3]
    groups = np.split(each, np.cumsum(sizes)[:-1])
    rows = {(row["t"], row["group"]): row["loss"] for row in measured(plan, label)["rows"]}
    assert len(rows) == 16
    for number, group in enumerate(groups):
        for place, t in enumerate(SPEC["t"]):
            assert rows[t, number] == pytest.approx(group[:, place].mean(), rel=3e-7), (t, number)


def test_two_states_see_the_same_images_and_noise_so_that_their_difference_is_far_less_noisy_than_a_loss(plan):
    first, second = (np.array([r["loss"] for r in measured(plan, "loss", s)["rows"] if r["t"] == 0.1]) for s in (4, 8))
    assert (first - second).std() < 0.3 * first.std()


def test_all_held_out_images_are_used_where_there_are_fewer_than_asked(plan):
    rows = [row for row in measured(plan, "all")["rows"] if row["t"] == 0.1]
    held = Store.open(plan.latents.folder).range("held_out")
    each = [losses(plan, image, [0.1], "ema/")[0] for image in held]
    sizes = np.diff([97 * number // 8 for number in range(9)])
    assert np.average([row["loss"] for row in rows], weights=sizes) == pytest.approx(np.mean(each), rel=1e-6)


def test_each_rank_takes_its_share_of_the_images_and_all_together_are_what_one_finds(plan, monkeypatch):
    (what,) = (one.measurement for one in plan.measured if (one.measurement.label, one.step) == ("loss", 8))
    kind, summed = plan.config.measures["loss"].made, []
    monkeypatch.setattr(Group, "total", lambda self, values: summed.append(values.clone()) or values)
    for size in (1, 3):
        for rank in range(size):
            subject, _ = opened(plan, what, kind.weights, kind.seed, Group(rank, size, torch.device("cpu")))
            list(kind.run(subject))
    whole, *parts = summed
    assert [int((part[0] != 0).sum()) for part in parts] == [7, 7, 7]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=0)
