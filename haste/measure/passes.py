"""Hidden states of a network, and features of a teacher, of the same images: made once, kept in stores beside measures.

A row is an image. Latent draw and noise depend on the seed and the image alone, so states, layers and times differ by
nothing else. Every rank makes its share of the shards; what a shard holds does not depend on how many ranks there are.

B images, N tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from haste.data.latents import draw
from haste.files import artefact, locks
from haste.files.store import Store, join, shard_range, write_shard
from haste.measure.hidden import field, layers_in
from haste.networks.spec import each
from haste.plan.names import Artefact
from haste.teachers.targets import load_teacher

if TYPE_CHECKING:
    from haste.measure.subject import Subject
    from haste.teachers.encoder import Teacher

SPAN, MOST_SHARDS = 1024, 64  # images of a shard, at least; shards
AT_ONCE, MOST_BYTES = 64, 2e9  # images a forward pass, at most; of their tokens
FEATURES = "features"

Rows = dict[str, NDArray[np.float32]]
Pass = Callable[[NDArray[np.int64]], Rows]  # indices of images in the stores -> their rows


def hidden(subject: Subject, split: str) -> Store:
    """The store of a network's hidden states, a field a layer and t (`haste.measure.hidden.field`). A collective call.

    Args:
        subject: the network.
        split: of whose images the measure reads them.

    Raises:
        FloatingPointError: a hidden state is not finite.
        ValueError: the store is damaged.
    """
    made = subject.what.hidden[split]
    look, taps = made.recipe["look"], subject.model.taps
    layers = layers_in(look, taps)
    tokens = {layer: taps[f"tokens.{layer}"] for layer in layers}
    sizes = {layer: (tap.grid[0] * tap.grid[1], tap.width) for layer, tap in tokens.items()}
    shapes = {field(m, t): size[1:] if look["pooled"] else size for m, size in sizes.items() for t in look["t"]}
    at_once = max(1, min(AT_ONCE, int(MOST_BYTES / sum(4 * n * width for n, width in sizes.values()))))
    facts = {"latents": subject.batches(split).latents.identity, "weights": subject.weights}
    return _store(subject, made, shapes, facts, lambda chosen: _states(subject, look, layers, chosen), at_once)


def _states(subject: Subject, look: Mapping[str, Any], layers: Any, chosen: NDArray[np.int64]) -> Rows:
    rows = {}
    for t, taps in tapped(subject, look["split"], chosen, look["t"], {f"tokens.{layer}" for layer in layers}):
        for layer in layers:
            tokens = taps[f"tokens.{layer}"]  # (B, N, D)
            tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
            rows[field(layer, t)] = (tokens.mean(dim=1) if look["pooled"] else tokens).float().cpu().numpy()
    return rows


def tapped(
    subject: Subject, split: str, chosen: NDArray[np.int64], times: Sequence[float], names: Collection[str]
) -> Iterator[tuple[float, dict[str, Any]]]:
    """Each t with the network's taps of these names, of some images of a split with the null condition."""
    inputs, model, process, batches = subject.inputs, subject.model, subject.process, subject.batches(split)
    batch = batches.measured(chosen, range(len(chosen))).to(subject.group.device)
    dtype, latents = next(model.parameters()).dtype, batches.latents.manifest
    z = draw(batch.moments, batch.draw, latents["scale"], latents["shift"]).to(dtype)

    def piece(null: NDArray[Any]) -> Tensor:
        told = torch.from_numpy(null).to(z.device)
        return told.to(dtype) if told.is_floating_point() else told

    y = each(piece, batches.condition.null(len(chosen)))
    for t in times:
        at = torch.full_like(batch.t, process.place(t)).to(dtype)
        with torch.inference_mode(), inputs.precision():
            _, taps = model(process.noised(z, batch.noise.to(dtype), at), process.time(at), y, taps=names)
        yield t, taps


def reader(subject: Subject, split: str, beside: Sequence[str]) -> Callable[..., NDArray[np.float32]]:
    """A function from a layer and a t, or from a teacher that is measured beside the state, to what is stored of all
    images: (n, D) or (n, N, D). A collective call; raises as `hidden`."""
    states, teachers = hidden(subject, split), {name: teacher_features(subject, split, name) for name in beside}

    def read(*place: Any) -> NDArray[np.float32]:
        store, name = (teachers[place[0]], FEATURES) if len(place) == 1 else (states, field(*place))
        return store.read(name, np.arange(store.count))

    return read


def teacher_features(subject: Subject, split: str, beside: str | None = None) -> Store:
    """The store of a teacher's features of the same images, in float32: the mean over its patch tokens, (D,), or
    each, (N, D), as hidden states are asked for. A collective call.

    Args:
        subject: says which teacher is compared with.
        split: as for `hidden`.
        beside: a teacher that is measured beside the state, in place of that one.

    Raises:
        FloatingPointError, ValueError: as `hidden`; or as `haste.teachers.targets.load_teacher`.
    """
    name = beside or subject.what.teacher
    assert name is not None
    made, expected = subject.what.seen[name][split], {"images": subject.batches(split).latents.manifest["images"]}
    there = subject.group.broadcast(lambda: _fits(made, expected))
    store = Store.of(made) if there else _teacher_store(subject, name, split)
    subject.inputs.identities[f"teacher {beside}" if beside else "teacher"] = store.manifest["teacher"]
    return store


def teacher_and_images(subject: Subject, name: str, split: str) -> tuple[Teacher, Store]:
    """A teacher on the device, and the store of the images of a split whose latents are read.

    Raises:
        ValueError: the teacher or the store is missing or damaged, or holds other images.
    """
    images, expected = Store.of(subject.plan.of(split).images), subject.batches(split).latents.manifest["images"]
    if images.identity != expected:
        found = f"holds images {images.identity[:12]}, expected those of the latents {expected[:12]}"
        raise ValueError(f"{images.folder}: {found}")
    return load_teacher(subject.plan, name).to(subject.group.device), images


def _teacher_store(subject: Subject, name: str, split: str) -> Store:
    (teacher, images), made = teacher_and_images(subject, name, split), subject.what.seen[name][split]
    pooled = made.recipe["look"].get("pooled", True)

    def rows(chosen: NDArray[np.int64]) -> Rows:
        shown = torch.from_numpy(images.read("image", chosen)).to(subject.group.device)
        features = teacher(shown, features=True).features  # (B, N, D)
        assert features is not None
        return {FEATURES: (features.float().mean(dim=1) if pooled else features.float()).cpu().numpy()}

    facts: dict[str, Any] = {"images": images.identity, "teacher": teacher.identity}
    facts |= {} if pooled else {"grid": list(teacher.grid)}
    shape = (teacher.width,) if pooled else (math.prod(teacher.grid), teacher.width)
    return _store(subject, made, {FEATURES: shape}, facts, rows, AT_ONCE)


def _store(
    subject: Subject, made: Artefact, shapes: Mapping[str, Any], facts: dict[str, Any], rows: Pass, at_once: int
) -> Store:
    """The store, after making it if it is not there or if its facts are others. A collective call."""
    look, group = made.recipe["look"], subject.group
    batches = subject.batches(look["split"])
    indices = batches.reading_indices(look["images"], look["split"])
    if len(indices) < (look["images"] or 1):
        folder, asked = batches.latents.folder, look["images"] or 1
        raise ValueError(
            f"{folder}: has {len(indices):,} images of {look['split']}, but measured are {asked:,}; ask for fewer"
        )
    shards = max(1, min(MOST_SHARDS, len(indices) // SPAN))
    described: dict[str, Any] = {"kind": made.kind, "key": made.key, "recipe": made.recipe, "shards": shards}
    provenance = artefact.provenance(key=made.key, recipe=made.recipe, inputs=facts)
    stale = group.broadcast(lambda: not _fits(made, facts))
    with locks.making(made.folder, done=made.manifest, anew=stale, ask=group.broadcast) as todo:
        for shard in range(group.rank, shards, group.size) if todo else ():
            mine = indices[shard_range(len(indices), shard, shards)]
            where: dict[str, Any] = {"shard": shard, "total": len(indices), "facts": facts, "provenance": provenance}
            fields = {name: (shape, np.float32) for name, shape in shapes.items()}
            write_shard(made.folder, **described, **where, fields=fields, batches=_batches(made, mine, rows, at_once))
        group.wait()
        if todo and group.is_first:
            join(made.folder, **described, splits={look["split"]: [0, len(indices)]}, provenance=provenance)
        group.wait()
    return Store.of(made)


def _fits(made: Artefact, facts: Mapping[str, Any]) -> bool:
    """Whether the store is there, and made from what is there now."""
    if not Path(made.manifest).exists():
        return False
    manifest = artefact.read_json(made.manifest, "store")
    return all(manifest.get(name) == value for name, value in facts.items())


def _batches(made: Artefact, indices: NDArray[np.int64], rows: Pass, at_once: int) -> Iterator[Rows]:
    for low in range(0, len(indices), at_once):
        chosen = indices[low : low + at_once]
        found = rows(chosen)
        for name, values in found.items():
            if len(broken := np.flatnonzero(~np.isfinite(values.reshape(len(chosen), -1)).all(axis=1))):
                raise FloatingPointError(f"{made.folder}: {name} of image {chosen[broken[0]]} is not finite")
        yield found
