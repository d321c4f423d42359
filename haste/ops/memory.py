"""The memory of training, before a GPU is asked for: `haste memory`. No torch, which the measuring processes load.

`haste plan` only reads what is measured here: it answers at once, and writes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from haste.data.ahead import cores
from haste.files import artefact
from haste.files.units import readable
from haste.plan import memory
from haste.plan.memory import GB, Need
from haste.plan.plan import Plan


def show(plan: Plan) -> None:
    """Measure what is not measured yet, and print all of it."""
    measure(plan)
    found = list(lines(memory.needs(plan), plan.config.runtime.gpu_memory_gb, "haste memory"))
    print("\n".join(found or ["nothing is left to train on a GPU"]))


def measure(plan: Plan) -> None:
    """Measure what is not measured yet, a process for each kind of training."""
    todo = {memory.file_of(plan, one.recipe): one.recipe for one in memory.needs(plan) if one.recipe and not one.memory}
    with ProcessPoolExecutor(min(len(todo), cores()) or 1) as pool:
        list(pool.map(_write, todo, todo.values()))


def _write(path: str, recipe: Mapping[str, Any]) -> None:
    import torch

    from haste.train.memory import measured

    torch.set_num_threads(1)
    started, key = time.monotonic(), artefact.fingerprint(recipe)
    try:
        found = measured(recipe)
    except RuntimeError as error:  # a network of another package may ask a tensor for its numbers
        name, why = recipe["model"].get("architecture", "sit"), str(error).splitlines()[0]
        raise ValueError(f"{name}: a step of it cannot be taken on tensors without numbers ({why})") from error
    made = artefact.provenance(key=key, recipe=recipe, seconds=time.monotonic() - started)
    artefact.write_json(path, {"schema": artefact.SCHEMA, "kind": "memory", "key": key, **found, "provenance": made})


def lines(needs: Iterable[Need], gigabytes: float | None, command: str, gpus: bool = True) -> Iterator[str]:
    """What each kind of training takes of a GPU, and how many images at once would fit.

    Args:
        needs: of a plan.
        gigabytes: of a GPU's memory, if that is known.
        command: that measures what is not measured yet.
        gpus: whether it is to train on some; else only what was measured is said.
    """
    needs, unmeasured = [one for one in needs if gpus or one.memory], []
    for one in needs:
        if one.memory is None or one.peak is None:
            unmeasured.append(one)
            continue
        way, images = one.way, one.way.images(one.batch)
        how = ", blocks checkpointed" if way.checkpoint_blocks else ""
        most = f"; {one.memory.most(way, gigabytes * GB / 1e6)} fit into {gigabytes:g} GB" if gigabytes else ""
        yield f"GPU memory of {one.who}: {readable(one.peak * 1e6)} a rank with {images} images at once{how}{most}."
    if needs:
        state = readable(max(one.state for one in needs) * 1e6)
        yield f"While a state is saved, rank 0 has a copy of it in its host's memory, page-locked: {state}."
    if any(one.recipe for one in unmeasured):
        yield f"GPU memory is not measured yet: `{command}` does it, without a GPU."
    for one in unmeasured:
        if one.recipe is None:
            yield f"GPU memory of {one.who} is not known before its teacher is loaded."
