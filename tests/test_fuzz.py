"""Damaged and made-up input gives a ValueError or what was written, never another exception and never other values."""

import copy
import io
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from haste import config
from haste.files import artefact, provenance
from haste.files.npz import read_npz
from haste.sampling.samples import open_samples
from haste.train import state

TINY = yaml.safe_load(Path(__file__).with_name("tiny.yaml").read_text())
RECIPE = {"model": {"depth": 1}}
quiet = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["vit", "1e-4"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def places(tree, path=()):
    """Every place in a tree of mappings and lists."""
    found = [path] if path else []
    steps = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return found + [place for key, inner in steps for place in places(inner, (*path, key))]


PLACES = places(TINY)


@quiet
@given(st.lists(st.tuples(st.sampled_from(PLACES), values), min_size=1, max_size=2))
def test_a_configuration_with_entries_changed_is_refused_with_a_path_or_resolves_to_itself(changes):
    raw = copy.deepcopy(TINY)
    for place, value in changes:
        part = raw
        for key in place[:-1]:
            part = part[key] if isinstance(part, dict) and key in part else {}
        if isinstance(part, dict):
            part[place[-1]] = value
    try:
        once = config.resolve(raw)
    except ValueError as refusal:
        assert ":" in str(refusal)
    else:
        assert config.resolve(once.model_dump(mode="json")) == once


def damaged(data, content):
    """The bytes cut short, or with some of them changed."""
    content = bytearray(content)
    if data.draw(st.booleans()):
        return bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    return bytes(content)


def samples():
    buffer = io.BytesIO()
    np.savez(buffer, arr_0=np.arange(3 * 4 * 4 * 3, dtype=np.uint8).reshape(3, 4, 4, 3), arr_1=np.arange(3))
    return buffer.getvalue()


@pytest.mark.timeout(120)
@quiet
@given(st.data())
def test_damaged_samples_are_refused_by_name_or_read_as_written(data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "samples.npz")
        path.write_bytes(damaged(data, samples()))
        for read in (
            lambda: read_npz(path, "samples", ["arr_0"])["arr_0"],
            lambda: np.concatenate(list(open_samples(path).batches(2))),
        ):
            try:
                found = read()
            except ValueError as refusal:
                assert "samples.npz" in str(refusal)
            else:
                assert found.tobytes() == np.arange(3 * 4 * 4 * 3, dtype=np.uint8).tobytes()


KEY = artefact.fingerprint(RECIPE)
HEADER = {"schema": artefact.SCHEMA, "kind": provenance.STATE, "key": KEY, "recipe": RECIPE, "step": 8}
STATE = save({"ema/x": torch.arange(4.0)}, metadata={"haste": json.dumps({**HEADER, "inputs": {}, "provenance": {}})})


@pytest.mark.timeout(120)
@quiet
@given(st.data())
def test_the_damaged_header_of_a_state_is_refused_by_name_or_says_the_same(data):
    length = 8 + int.from_bytes(STATE[:8], "little")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "step-00000008.safetensors")
        path.write_bytes(damaged(data, STATE[:length]) + STATE[length:])
        try:
            header, _ = state.read(path, key=KEY)
        except ValueError as refusal:
            assert path.name in str(refusal)
        else:
            assert {name: header[name] for name in HEADER} == HEADER
