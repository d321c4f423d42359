"""GPUs by name."""

import pytest

from haste.plan.machines import GPUS, machine


@pytest.mark.parametrize(
    ("text", "count", "name"),
    [
        ("8xH100", 8, "H100"), ("h100", 1, "H100"), ("4 x RTX 4090", 4, "RTX4090"), 
        ("2xa100-40gb", 2, "A100-40"), ("A100", 1, "A100-80"),
    ],
)  # fmt: skip
def test_a_machine_is_found_however_it_is_spelt(text, count, name):
    found = machine(text)
    assert (found.count, found.name, str(found)) == (count, name, f"{count} x {name}")


@pytest.mark.parametrize("text", ["8xH10", "0xH100", "8x", "x", "", "8 TPU"])
def test_an_unknown_machine_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match="8xH100"):
        machine(text)


def test_a_share_is_one():
    assert machine("H100", 0.5).pace("bf16") == 0.5 * 989e12
    for share in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="--share"):
            machine("H100", share)


def test_what_a_chip_does_not_have_it_computes_in_float32():
    v100 = GPUS["V100"]
    assert (v100.peak("bf16"), v100.peak("fp16"), v100.peak("tf32")) == (15.7e12, 125e12, 15.7e12)
    for gpu in GPUS.values():
        assert gpu.half >= gpu.tf32 >= gpu.single > 0 and gpu.peak("fp64") < gpu.peak("fp32")
