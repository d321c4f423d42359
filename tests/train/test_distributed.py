"""Several processes: float rounding apart they change nothing, and what interrupts them changes no bit."""

import datetime
import multiprocessing
import os
import shutil
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from haste.align.triggers import Decision, Plateau
from haste.cli import main as cli
from haste.cluster.inside import TIME_LIMIT, Interruption
from haste.files import journal
from haste.files.provenance import read_header
from haste.files.store import Store
from haste.models.sit import SiT
from haste.train import distributed, loop, stops
from haste.train.distributed import Group

FORK = multiprocessing.get_context("fork")
RUNS = {"HASTE-20": {"alignment": "HASTE", "stop": 20, "milestones": [20, 40]}}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _train(plan, state, rank, size, port, errors, die_after):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if die_after is not None:
        begin = journal.Journal.__enter__

        def armed(self):
            threading.Timer(die_after, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
            return begin(self)

        journal.Journal.__enter__ = armed
    try:
        loop.train(plan, state)
    except BaseException as error:
        errors.put(repr(error))
        raise


def _arrive(rank, seconds, port, joined):
    torch.distributed.distributed_c10d.default_pg_timeout = datetime.timedelta(seconds=1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="3", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    time.sleep(seconds)
    with distributed.joined("cpu") as group:
        joined.put(group.mean([float(rank)]))


def _come_and_go(rank, slow, port):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    for number in range(8):
        with distributed.joined("cpu") as group:
            assert group.broadcast(lambda number=number: number) == number
        time.sleep(0.05 * (rank == slow))


class Sent(TorchDispatchMode):
    """The collective calls that were made, and the type of what they sent."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.calls = [*getattr(self, "calls", []), (func.__name__.partition(".")[0], args[0][0].dtype)]
        return func(*args, **(kwargs or {}))


def test_a_step_sends_gradients_and_no_constants_and_half_the_bytes_if_it_is_asked():
    network = SiT(input_size=4, in_channels=4, patch_size=2, depth=1, width=16, heads=2, classes=5)
    with torch.no_grad():
        network.final_layer.linear.weight.fill_(0.1)
    assert "pos_embed" in dict(network.named_buffers())
    found, x, t = {}, torch.rand(2, 4, 4, 4), torch.rand(2)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        for compress in (None, "bf16"):
            wrapped = distributed.wrap(network, Group(0, 2, torch.device("cpu")), compress)
            network.zero_grad()
            with Sent() as sent:
                wrapped(x, t, torch.zeros(2, dtype=torch.int64))[0].square().sum().backward()
            gradients = torch.cat([p.grad.flatten() for p in network.parameters()])
            found[compress] = gradients.clone(), set(sent.calls)
    finally:
        torch.distributed.destroy_process_group()
    (plain, calls), (rounded, fewer) = found.values()
    assert calls == {("allreduce_", torch.float32)} and fewer == {("allreduce_", torch.bfloat16)}
    assert plain.any() and torch.equal(rounded, plain.bfloat16().float())


@pytest.mark.parametrize("slow", [0, 1])
def test_ranks_that_join_again_find_one_another_though_one_is_still_leaving(slow):
    port = free_port()
    ranks = [FORK.Process(target=_come_and_go, args=(rank, slow, port)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
        rank.kill()
    assert [rank.exitcode for rank in ranks] == [0, 0]


@pytest.mark.parametrize("late", [0, 1])
def test_ranks_wait_for_one_that_comes_much_later_than_any_communication_may_take(late):
    joined, port = FORK.Queue(), free_port()
    ranks = [FORK.Process(target=_arrive, args=(rank, 4 * (rank == late), port, joined)) for rank in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0, 0, 0]
    assert [joined.get() for _ in ranks] == [[1.0]] * 3


def train_with(plan, state, size, die_after=None):
    """Train in `size` forked processes; `die_after` seconds into the steps all are killed. True: they were."""
    errors, port = FORK.Queue(), free_port()
    children = [
        FORK.Process(target=_train, args=(plan, state, rank, size, port, errors, die_after)) for rank in range(size)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    codes = {child.exitcode for child in children}
    if codes == {0}:
        return False
    assert die_after is not None, errors.get(timeout=5)
    return True


def state_of(plan, step):
    return plan.state("HASTE-20", step)


def bits(plan, step):
    return load_file(plan.path(state_of(plan, step)))


def remove_states(plan):
    for file in Path(plan.root, "states").rglob("*"):
        if file.is_file():
            file.unlink()


def test_kills_of_four_processes_before_and_after_the_stop_change_no_bit(make_plan):
    plan = make_plan(runs=RUNS, runtime={"processes": 4, "save_every": 3, "log_every": 3})
    for step in (20, 40):
        assert not train_with(plan, state_of(plan, step), 4)
    expected = {step: bits(plan, step) for step in (20, 40)}
    logs = [Path(plan.path(state_of(plan, step))).parent / "log.jsonl" for step in (20, 40)]
    took = sum(record["seconds"] for log in logs for record in journal.read(log))
    remove_states(plan)
    kills = 0
    for step, share in ((20, 0.15), (20, 0.3), (40, 0.1), (40, 0.25)):
        kills += train_with(plan, state_of(plan, step), 4, die_after=share * took)
    for step in (20, 40):
        train_with(plan, state_of(plan, step), 4)
        for name, value in expected[step].items():
            assert torch.equal(bits(plan, step)[name], value), (step, name)
    assert kills >= 2


@pytest.mark.parametrize(("processes", "accumulate"), [(2, 1), (4, 1), (1, 4), (2, 2)])
def test_processes_and_accumulation_change_float64_training_by_rounding_only(make_plan, processes, accumulate):
    training = {"batch": 8, "lr": 1.0e-3, "ema": 0.9, "precision": "fp64"}
    alone = make_plan(runs=RUNS, training=training)
    loop.train(alone, state_of(alone, 20))
    expected = bits(alone, 20)
    remove_states(alone)
    plan = make_plan(
        runs=RUNS, training=training, runtime={"processes": processes, "accumulate": accumulate, "log_every": 2}
    )
    train_with(plan, state_of(plan, 20), processes)
    found = bits(plan, 20)
    assert found["model/x_embedder.proj.weight"].dtype == torch.float64
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-7, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


def test_two_ranks_that_decode_compressed_pictures_train_the_bits_of_plain_ones_and_say_where_they_did(make_plan, tiny):
    found = {}
    for stored_as in ("raw", "webp"):
        images = {**tiny["images"], "stored_as": stored_as}
        plan = make_plan(runs={"HASTE-20": {"alignment": "HASTE", "milestones": [3]}}, images=images)
        if stored_as == "webp":
            remove_states(plan)
            shutil.rmtree(plan.images.folder)
            for how in (["--shard", "0"], ["--shard", "1"], ["--join"]):
                assert cli.main(["images", "-c", str(plan.file), *how]) == 0
        assert all(("coded" in shard) == (stored_as == "webp") for shard in Store.of(plan.images).manifest["shards"])
        train_with(plan, state_of(plan, 3), 2)
        found[stored_as] = bits(plan, 3)
    assert all(torch.equal(found["webp"][name], value) for name, value in found["raw"].items())
    made = read_header(plan.path(state_of(plan, 3)))["provenance"]
    assert (made["device"], made["processes"], made["hardware"]["threads"]) == ("cpu", 2, plan.config.runtime.threads)


CONTRAST = {
    "far": {
        "features": {
            "teacher": "vit", "depth": 1, "hidden": 16, "similarity": "nt-xent", "negatives": "batch",
            "negative_count": 13, "t_min": 0.3,
        },
        "attention": {"teacher": "vit", "student_layers": [0], "teacher_layers": [1], "t_min": 0.6},
    }
}  # fmt: skip


@pytest.mark.parametrize(("processes", "accumulate"), [(2, 1), (1, 2), (2, 2)])
def test_negatives_of_the_whole_batch_and_samples_that_do_not_count_are_the_same_in_any_cut(
    make_plan, processes, accumulate
):
    """A process sees some of the samples that count, or none; the mean is over all that do, wherever they are."""
    training = {"batch": 8, "lr": 1.0e-3, "ema": 0.9, "precision": "fp64", "timesteps": {"distribution": "lognormal"}}
    common = {"alignments": CONTRAST, "training": training, "runs": {"HASTE-20": {"alignment": "far", "stop": 12}}}
    common["defaults"] = {"model": "dot", "milestones": [12], "sampling": ["quick"]}
    alone = make_plan(**common, runtime={"log_every": 1})
    loop.train(alone, state_of(alone, 12))
    expected, log = bits(alone, 12), Path(alone.path(state_of(alone, 12))).parent / "log.jsonl"
    losses = [[record[kind] for kind in ("features", "attention")] for record in journal.read(log)]
    remove_states(alone)
    plan = make_plan(**common, runtime={"processes": processes, "accumulate": accumulate, "log_every": 1})
    train_with(plan, state_of(plan, 12), processes)
    for name, value in expected.items():
        found = bits(plan, 12)[name]
        torch.testing.assert_close(found, value, rtol=1e-7, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")
    again = [[record[kind] for kind in ("features", "attention")] for record in journal.read(log)]
    assert again == [pytest.approx(pair, rel=1e-9) for pair in losses]


WATCHED = {
    "low": {
        "features": {"teacher": "vit", "depth": 1, "hidden": 16, "t_min": 0.3},
        "attention": {"teacher": "vit", "student_layers": [0], "teacher_layers": [1], "t_min": 0.9},
    }
}
PLATEAU = {"trigger": "plateau", "after": 2, "every": 2, "fast": 0.5, "slow": 0.75, "margin": 0}


def watched_by(make_plan, attention, milestones, ramp=None, **runtime):
    training = {"batch": 4, "lr": 1.0e-3, "ema": 0.9, "precision": "fp64", "timesteps": {"distribution": "lognormal"}}
    run = {"alignment": "low", "stop": {"features": PLATEAU, "attention": attention}, "milestones": milestones}
    run |= {} if ramp is None else {"ramp": ramp}
    return make_plan(alignments=WATCHED, training=training, runs={"HASTE-20": run}, runtime={"log_every": 9, **runtime})


def readings(plan, step):
    found = read_header(plan.path(state_of(plan, step)))["triggers"]
    return {
        kind: [[reading[name] for name in ("step", "fast", "slow")] for reading in record["readings"]]
        for kind, record in found.items()
    }


def test_readings_are_the_same_in_any_cut_and_to_the_bit_over_a_restart(make_plan, monkeypatch):
    """Also where a process has no sample that counts, or nobody has one."""
    monkeypatch.setattr(Plateau, "decide", lambda *_: Decision(False, "only looking"))
    alone = watched_by(make_plan, PLATEAU, [12])
    loop.train(alone, state_of(alone, 12))
    expected = readings(alone, 12)
    steps = {kind: [reading[0] for reading in found] for kind, found in expected.items()}
    assert steps == {"features": [6, 8, 10, 12], "attention": [8, 10, 12]}  # for which nothing counted up to step 6
    remove_states(alone)
    two = watched_by(make_plan, PLATEAU, [12], processes=2, accumulate=2)
    train_with(two, state_of(two, 12), 2)
    for kind, found in readings(two, 12).items():
        assert found == [pytest.approx(reading, rel=1e-9) for reading in expected[kind]]
    whole, end = readings(two, 12), bits(two, 12)
    remove_states(two)
    cut = watched_by(make_plan, PLATEAU, [5, 9, 12], processes=2, accumulate=2)
    for step in (5, 9, 12):
        train_with(cut, state_of(cut, step), 2)
    assert readings(cut, 12) == whole
    assert all(torch.equal(bits(cut, 12)[name], value) for name, value in end.items())
    Path(cut.path(state_of(cut, 12))).unlink()
    loop.train(watched_by(make_plan, PLATEAU, [5, 9, 12]), state_of(cut, 12))
    for kind, found in readings(cut, 12).items():
        assert found == [pytest.approx(reading, rel=1e-9) for reading in expected[kind]]


def test_two_processes_stop_at_one_step_and_go_on_as_after_a_stop_by_hand(make_plan):
    seen = watched_by(make_plan, {**PLATEAU, "margin": 1}, [12], processes=2)  # no average is better by 100 %
    train_with(seen, state_of(seen, 12), 2)
    found, folder = bits(seen, 12), Path(seen.path(state_of(seen, 12))).parent
    stopped = stops.read(folder)["attention"].step
    assert stopped == 8
    by_hand = watched_by(make_plan, stopped, [12], processes=2)
    train_with(by_hand, state_of(by_hand, 12), 2)
    expected = bits(by_hand, 12)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_two_processes_release_a_term_as_a_ramp_by_hand_lets_it_fall(make_plan):
    """And another release goes on from a copy of what they share."""
    seen = watched_by(make_plan, {**PLATEAU, "margin": 1, "release": 0.5}, [12], processes=2)
    train_with(seen, state_of(seen, 12), 2)
    other = watched_by(make_plan, {**PLATEAU, "margin": 1, "release": 0.25}, [12], processes=2)
    train_with(other, state_of(other, 12), 2)
    log = journal.read(Path(other.path(state_of(other, 12))).parent / "log.jsonl")
    assert min(line["step"] for line in log if "seconds" in line) > 8  # where it fired; those before are copied
    by_hand = watched_by(make_plan, 10, [12], {"attention": 2}, processes=2)
    train_with(by_hand, state_of(by_hand, 12), 2)
    expected, found = bits(by_hand, 12), bits(other, 12)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


ANGLE = {"trigger": "gradient-angle", "after": 2, "every": 2, "images": 11, "shards": 3, "times": [0.3, 0.9]}
FAR = {"far": {**CONTRAST["far"], "attention": WATCHED["low"]["attention"] | {"t_min": 0.4}}}


def watching_angles(make_plan, threshold, milestones, **runtime):
    training = {"batch": 4, "lr": 1.0e-3, "ema": 0.9, "precision": "fp64"}
    run = {"alignment": "far", "stop": {**ANGLE, "threshold": threshold}, "milestones": milestones}
    return make_plan(alignments=FAR, training=training, runs={"HASTE-20": run}, runtime={"log_every": 9, **runtime})


def angles(plan, step):
    found = read_header(plan.path(state_of(plan, step)))["triggers"]
    assert found["features"]["readings"] == found["attention"]["readings"]
    return found["features"]["readings"]


def test_angles_are_the_same_in_any_cut_and_to_the_bit_over_a_restart(make_plan):
    """Also with negatives of the whole batch, and where a process has fewer images of a group than another, or none."""
    alone = watching_angles(make_plan, -2, [8])
    loop.train(alone, state_of(alone, 8))
    expected, learnt = angles(alone, 8), bits(alone, 8)
    assert [reading["step"] for reading in expected] == [4, 6, 8]
    remove_states(alone)
    for processes, accumulate in ((2, 2), (4, 1)):
        several = watching_angles(make_plan, -2, [8], processes=processes, accumulate=accumulate)
        train_with(several, state_of(several, 8), processes)
        assert angles(several, 8) == [pytest.approx(reading, rel=1e-7, abs=1e-9) for reading in expected]
        whole, end = angles(several, 8), bits(several, 8)
        remove_states(several)
        cut = watching_angles(make_plan, -2, [5, 8], processes=processes, accumulate=accumulate)
        for step in (5, 8):
            train_with(cut, state_of(cut, step), processes)
        assert angles(cut, 8) == whole
        assert all(torch.equal(bits(cut, 8)[name], value) for name, value in end.items())
        assert end.keys() == learnt.keys()
        remove_states(cut)


def test_two_processes_that_measure_angles_train_as_those_that_do_not_up_to_the_stop_and_behind_it(make_plan):
    found = {}
    for threshold in (-2, 1):  # at the first reading, or never
        plan = watching_angles(make_plan, threshold, [8], processes=2)
        train_with(plan, state_of(plan, 8), 2)
        found[threshold] = bits(plan, 8)
    for threshold, stop in {-2: None, 1: 4}.items():
        run = {"alignment": "far", "stop": stop, "milestones": [8]}
        training = {"batch": 4, "lr": 1.0e-3, "ema": 0.9, "precision": "fp64"}
        plan = make_plan(alignments=FAR, training=training, runs={"HASTE-20": run}, runtime={"processes": 2})
        train_with(plan, state_of(plan, 8), 2)
        for name, value in bits(plan, 8).items():
            assert torch.equal(found[threshold][name], value), name


def test_going_on_with_another_number_of_processes_is_allowed_and_recorded(make_plan, caplog):
    runtime = {"processes": 2, "log_every": 2, "compress_gradients": "bf16"}
    plan = make_plan(runs=RUNS, runtime=runtime)
    train_with(plan, state_of(plan, 20), 2)
    loop.train(make_plan(runs=RUNS), state_of(plan, 40))
    assert "was made by 2 processes, going on with 1" in caplog.text
    headers = [read_header(plan.path(state_of(plan, step))) for step in (20, 40)]
    assert [header["provenance"]["processes"] for header in headers] == [2, 1]
    assert [header["provenance"].get("compress_gradients") for header in headers] == ["bf16", None]


def test_the_launcher_trains_and_passes_on_a_refusal_with_exit_code_2(make_plan, capfd):
    plan = make_plan(runs=RUNS, runtime={"processes": 2, "log_every": 2})
    assert cli.main(["train", str(state_of(plan, 20)), "-c", str(plan.file)]) == 0
    path = Path(plan.path(state_of(plan, 20)))
    path.write_bytes(path.read_bytes()[:-1])
    assert cli.main(["train", str(state_of(plan, 40)), "-c", str(plan.file)]) == 2
    message = capfd.readouterr().err.splitlines()[-1]
    assert message.startswith("haste train: ")
    assert str(path) in message
    assert "truncated" in message


def test_rows_of_all_processes_are_the_batch_in_order():
    device = torch.device("cpu")
    assert [row for rank in range(3) for row in Group(rank, 3, device).rows(24, 4)] == list(range(24))
    with pytest.raises(ValueError, match="a batch of 24 cannot be cut into 5 processes times 1"):
        Group(0, 5, device).rows(24, 1)


def _interrupted(plan, state, rank, port, reasons, answers):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    asked = iter(reasons)
    try:
        loop.train(plan, state, interrupted=lambda: next(asked, 0))
        answers.put((rank, "finished"))
    except loop.Interrupted as stop:
        answers.put((rank, (stop.step, stop.reason)))


def test_what_interrupts_one_process_stops_all_one_step_later_together_which_is_saved_and_changes_no_bit(make_plan):
    plan = make_plan(runs=RUNS, runtime={"processes": 2, "save_every": 100, "log_every": 3})
    train_with(plan, state_of(plan, 20), 2)
    expected = bits(plan, 20)
    remove_states(plan)
    for reasons, said in (([[], [0, 0, 0, 2]], (5, 2)), ([[0, 1], [0, 2]], (8, 2)), ([[], []], "finished")):
        answers, port = FORK.Queue(), free_port()
        children = [
            FORK.Process(target=_interrupted, args=(plan, state_of(plan, 20), rank, port, reasons[rank], answers))
            for rank in range(2)
        ]
        for child in children:
            child.start()
        assert sorted(answers.get(timeout=60) for _ in children) == [(0, said), (1, said)]
        for child in children:
            child.join(60)
    for name, value in expected.items():
        assert torch.equal(bits(plan, 20)[name], value), name


def _signalled(plan, state, rank, port, answers):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="4")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    interruption = Interruption()
    interruption.listen()
    try:
        loop.train(plan, state, interrupted=lambda: interruption.reason)
    except loop.Interrupted as stop:
        answers.put((rank, stop.step, stop.reason))


def test_a_signal_to_one_process_alone_stops_all_at_one_step_which_is_saved(make_plan):
    plan = make_plan(runs={"HASTE-20": {"stop": None, "milestones": [100_000]}}, runtime={"log_every": 1})
    state, answers, port = state_of(plan, 100_000), FORK.Queue(), free_port()
    folder = Path(plan.path(state)).parent
    children = [FORK.Process(target=_signalled, args=(plan, state, rank, port, answers)) for rank in range(4)]
    for child in children:
        child.start()
    try:
        deadline = time.monotonic() + 120
        while not journal.read(folder / "log.jsonl") and time.monotonic() < deadline:
            assert all(child.is_alive() for child in children)
            time.sleep(0.05)
        os.kill(children[2].pid, signal.SIGUSR2)
        found = sorted(answers.get(timeout=60) for _ in children)
    finally:
        for child in children:
            child.join(5)
            child.kill()
    step = found[0][1]
    assert found == [(rank, step, TIME_LIMIT) for rank in range(4)]
    assert (folder / "rolling" / f"step-{step:08d}.safetensors").exists()


class Slow:
    """Work that is done when it is waited for."""

    def __init__(self, waited, number):
        self.waited, self.number = waited, number

    def wait(self):
        self.waited.append(self.number)


def test_no_step_waits_for_what_is_said_after_it_and_all_is_heard_in_the_end(monkeypatch):
    sent, waited = [], []

    def all_reduce(value, op, async_op):
        assert async_op, "a step would wait here"
        assert value.device.type == "cpu", "a GPU would be waited for here"
        sent.append(value)
        return Slow(waited, len(sent))

    monkeypatch.setattr(distributed.dist, "all_reduce", all_reduce)
    agreement = distributed.Agreement(Group(0, 2, torch.device("cpu")))
    for step, said in enumerate((0, 0, 7, 0), start=1):
        heard = agreement.largest(said)
        assert heard == (7 if step == 3 + distributed.LAG else 0)
        assert waited == list(range(1, step)), "what was said after a step is heard after the next one, and no sooner"
    agreement.settle()
    assert waited == [1, 2, 3, 4]
