import multiprocessing
import shutil
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from haste.files import artefact


def _write_for_ever(path):
    big = {"x": torch.zeros(20_000_000)}
    while True:
        with artefact.replacing(path) as aside:
            save_file(big, aside)


def test_sweep_removes_all_that_a_killed_writer_leaves_also_what_safetensors_itself_writes_aside(tmp_path):
    kept = [tmp_path / "log.jsonl", tmp_path / ".lock"]
    for file in kept:
        file.write_text("kept")
    writer = multiprocessing.get_context("fork").Process(target=_write_for_ever, args=(tmp_path / "state",))
    writer.start()
    end = time.monotonic() + 60
    while writer.is_alive() and not list(tmp_path.glob(".tmp*")) and time.monotonic() < end:
        time.sleep(0.001)
    writer.kill()
    writer.join()
    assert set(tmp_path.iterdir()) - {*kept, tmp_path / "state"}
    artefact.sweep(tmp_path, locked=True)
    assert set(tmp_path.iterdir()) - {tmp_path / "state"} == set(kept)


def test_an_edit_of_any_file_of_the_package_is_another_code(tmp_path, monkeypatch):
    package = Path(artefact.__file__).parents[1]
    shutil.copytree(package, tmp_path / "haste", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(artefact, "__file__", str(tmp_path / "haste" / "files" / "artefact.py"))
    before = artefact.code_version.__wrapped__()
    assert before == artefact.code_version()
    for file in ("files/store.py", "train/step.py", "__init__.py"):
        (tmp_path / "haste" / file).write_text("# edited")
        after = artefact.code_version.__wrapped__()
        assert after["source"] != before["source"], file
        before = after
