import json
import os
import stat
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from haste.files import artefact, provenance, tensors
from haste.train import state

RECIPE = {"model": {"depth": 1}}
KEY = artefact.fingerprint(RECIPE)
HEADER = {"schema": artefact.SCHEMA, "kind": provenance.STATE, "key": KEY, "recipe": RECIPE, "step": 8}
HEADER |= {"inputs": {}, "provenance": {}}
NAME = "step-00000008.safetensors"


def some(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    names = [f"{part}/{name}" for part in ("model", "ema", "optimizer/exp_avg") for name in "abc"]
    return {name: torch.rand(40, 30, generator=generator).add(1).to(dtype) for name in names}


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_4_kb_of_zeros_anywhere_in_a_state_are_refused_by_name_by_every_reader_of_what_they_hit(data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, NAME)
        tensors.write(path, some(), HEADER)
        content = path.read_bytes()
        place = data.draw(st.integers(0, len(content) - 4096))
        path.write_bytes(content[:place] + bytes(4096) + content[place + 4096 :])
        with pytest.raises(ValueError, match=NAME):
            state.read(path, key=KEY)
        try:
            _, found = state.read(path, key=KEY, prefixes=("ema/",))
        except ValueError as refusal:
            assert NAME in str(refusal)
        else:
            assert len(found) == 3 and all(torch.equal(value, some()[name]) for name, value in found.items())
        with pytest.raises(ValueError, match=NAME):
            tensors.check(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64])
def test_what_is_written_is_read_whatever_its_type_also_scalars_and_nothing(tmp_path, dtype):
    wanted = {**some(dtype), "one": torch.tensor(3).to(dtype), "none": torch.zeros(0, 4, dtype=dtype)}
    tensors.write(tmp_path / NAME, wanted, HEADER)
    with tensors.opened(tmp_path / NAME, "state") as file:
        found = tensors.read(tmp_path / NAME, file, wanted)
    assert all(torch.equal(found[name], value) and found[name].dtype == dtype for name, value in wanted.items())


def test_a_state_of_an_earlier_version_is_read_and_its_lack_of_digests_is_said(tmp_path, caplog):
    save_file(some(), tmp_path / NAME, metadata={"haste": json.dumps(HEADER)})
    with caplog.at_level("INFO"):
        _, found = state.read(tmp_path / NAME, key=KEY)
    assert all(torch.equal(found[name], value) for name, value in some().items())
    assert f"{tmp_path / NAME}: written by an earlier version, without digests" in caplog.text


@pytest.mark.parametrize("text", ["{", "[1]", "{}", "null"])
def test_digests_that_are_damaged_themselves_are_refused_by_name(tmp_path, text):
    tensors.write(tmp_path / NAME, some(), HEADER)
    save_file(load_file(tmp_path / NAME), tmp_path / NAME, {"haste": json.dumps(HEADER), "digests": text})
    with pytest.raises(ValueError, match=f"{NAME}: damaged"):
        state.read(tmp_path / NAME, key=KEY)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o027, 0o640), (0o077, 0o600)])
def test_files_and_folders_of_tensors_follow_the_umask(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        tensors.write(tmp_path / NAME, some(), HEADER)
        with artefact.replacing(tmp_path / "part") as aside:
            aside.mkdir()
            save_file(some(), aside / "model.safetensors")
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in (NAME, "part/model.safetensors")} == {mode}
