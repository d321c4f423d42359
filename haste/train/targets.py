"""Targets on disk: made by jobs of their own, read by training, which then needs neither teacher nor images."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from haste.files import artefact
from haste.files.store import Store, join, shard_range, write_shard
from haste.files.units import clock
from haste.networks.devices import choose_device
from haste.plan.names import Artefact, Segment
from haste.plan.plan import Plan
from haste.plan.target_spec import TargetSpec
from haste.teachers import cache
from haste.teachers.targets import TeacherTargets

if TYPE_CHECKING:
    from haste.teachers.encoder import Teacher

log = logging.getLogger("haste.targets")

BATCH = 32  # images a pass of the teacher; changes nothing but rounding
PCA_IMAGES = 4096  # evenly spaced training images that components are fitted on; 1M tokens of DINOv2
SHOWN_EVERY = 10.0  # seconds between lines of the log


def load_teacher(plan: Plan, name: str) -> Teacher:
    """A configuration's teacher, on the CPU.

    Raises:
        ValueError: as `Teacher.load`.
    """
    from haste.teachers.encoder import Teacher  # timm takes seconds to import, and cached training never needs it

    part = plan.teachers[name]
    if part is not None:
        return Teacher.load(part.folder)
    spec = plan.config.teachers[name].pretrained
    assert spec is not None
    return Teacher.load(spec.name, resolution=plan.config.images.resolution, weights=spec.weights)


# -- making ------------------------------------------------------------------------------------------------------------


def cached(plan: Plan, name: str) -> Artefact:
    """The store of a teacher's targets.

    Raises:
        ValueError: this configuration caches nothing of it.
    """
    if name not in plan.targets:
        raise ValueError(f"targets of {name!r}: not cached here, but {', '.join(sorted(plan.targets)) or 'nothing'}")
    return plan.targets[name]


def _images(plan: Plan) -> Store:
    made = plan.images
    return Store.of(made)


def _ready(plan: Plan, name: str) -> Teacher:
    return load_teacher(plan, name).to(choose_device(plan.config.runtime.device, 0))


def _looked_at(images: Store, chosen: range, teacher: Teacher) -> Iterator[tuple[int, Tensor]]:
    """(number of the first, uint8 NHWC on the teacher's device) of batches of the chosen images."""
    for low in range(0, len(chosen), BATCH):
        part = chosen[low : low + BATCH]
        yield part[0], torch.from_numpy(images.read("image", part)).to(teacher.mean.device)


def fit(plan: Plan, name: str) -> None:
    """Fit and write the principal components of a teacher's features.

    They are fitted on training images that lie evenly in the store: a function of position, the same everywhere.

    Raises:
        ValueError: this configuration has no components of that teacher; or as `haste.teachers.cache.fit_pca`.
    """
    cached(plan, name)
    if name not in plan.pca:
        raise ValueError(f"targets of {name!r}: teachers.{name}.pca is not set, there is nothing to fit")
    started, part, images, teacher = time.monotonic(), plan.pca[name], _images(plan), _ready(plan, name)
    train = images.range("train")
    chosen = train[:: -(-len(train) // PCA_IMAGES)]
    said = _progress("components", name)
    batches = (
        said(number, len(chosen), seen.features)
        for number, (_, shown) in enumerate(_looked_at(images, chosen, teacher))
        if (seen := teacher(shown, features=True)).features is not None
    )
    basis, explained = cache.fit_pca(batches, part.recipe["components"])
    log.info("%s: %d components explain %.1f %%", name, len(basis.components), 100 * explained)
    inputs = {"images": images.identity, "teacher": teacher.identity}
    seconds = time.monotonic() - started
    made = artefact.provenance(key=part.key, recipe=part.recipe, inputs=inputs, seconds=seconds)
    about = {"name": name, "key": part.key, "recipe": part.recipe, "images": len(chosen), "provenance": made}
    cache.write_pca(part.folder, basis, explained, about)


def make_shard(plan: Plan, name: str, shard: int) -> Path:
    """Write one shard of a teacher's targets: a row an image, in the images' order.

    Raises:
        ValueError: nothing of this teacher is cached, a shard that is not one of them, or more bytes than
            `cache.max_bytes`.
    """
    made, images = cached(plan, name), _images(plan)
    chosen = shard_range(images.count, shard, made.shards)
    teacher, wanted = _ready(plan, name), TargetSpec.read(made.recipe)
    plan.check_cache(images.count, {name: cache.shape_of(teacher)})
    pca = cache.PCA.load(plan.pca[name].folder) if name in plan.pca else None
    inputs = {"images": images.identity, "teacher": teacher.identity, **({"pca": pca.identity} if pca else {})}
    said = _progress("targets", name)
    return write_shard(
        made.folder,
        kind="targets",
        key=made.key,
        recipe=made.recipe,
        shard=shard,
        shards=made.shards,
        total=images.count,
        fields=cache.layout(teacher, wanted, pca),
        batches=(cache.rows(teacher, shown, wanted, pca, at) for at, shown in _looked_at(images, chosen, teacher)),
        provenance=artefact.provenance(key=made.key, recipe=made.recipe, inputs=inputs),
        facts={"pca": None, **inputs, "grid": list(teacher.grid)},
        progress=lambda done, count: said(done, count, None),
    )


def join_shards(plan: Plan, name: str) -> dict[str, Any]:
    """Check the shards of a teacher's targets and write the manifest. No teacher is needed.

    Raises:
        ValueError: a shard is missing, damaged, or was made from other images or by another teacher than the rest.
    """
    made, images = cached(plan, name), _images(plan)
    return join(
        made.folder,
        kind="targets",
        key=made.key,
        recipe=made.recipe,
        shards=made.shards,
        splits=images.manifest["splits"],
        provenance=artefact.provenance(key=made.key, recipe=made.recipe, inputs={"images": images.identity}),
        expected_facts={"images": images.identity},
    )


def _progress(what: str, name: str) -> Callable[..., Any]:
    """A function of (done, of, value) that now and then logs how far it is, and returns the value."""
    started = shown = time.monotonic()

    def say(done: int, of: int, value: Any) -> Any:
        nonlocal shown
        now = time.monotonic()
        if done and (now - shown > SHOWN_EVERY or done == of):
            shown = now
            log.info("%s of %s: %d/%d  %s to go", what, name, done, of, clock((now - started) / done * (of - done)))
        return value

    return say


# -- reading -----------------------------------------------------------------------------------------------------------


class Cached:
    """The stores that a segment reads targets from, by teacher.

    Attributes:
        stores: teacher -> its store.
        fields: teacher -> the fields that the segment's terms ask for.
    """

    def __init__(self, plan: Plan, segment: Segment):
        """
        Raises:
            ValueError: a store is missing, damaged, or made by another teacher than the one that the configuration
                names now.
        """
        self.stores: dict[str, Store] = {}
        self.fields: dict[str, list[str]] = {}
        for name in segment.targets:
            made = cached(plan, name)
            store = Store.of(made)
            _check_teacher(plan, name, store)
            wanted = TargetSpec()
            for kind in segment.cached:
                if segment.terms[kind]["teacher"] == name:
                    wanted |= TargetSpec.of(kind, segment.terms[kind])
            self.stores[name], self.fields[name] = store, wanted.fields

    def inputs(self, name: str, kind: str) -> dict[str, str]:
        """Identities that a state trained with a teacher's stored targets must carry on with."""
        manifest = self.stores[name].manifest
        found = {f"teacher of {kind}": manifest["teacher"]}
        return {**found, f"components of {kind}": manifest["pca"]} if kind == "features" and manifest["pca"] else found

    def width(self, name: str) -> int | None:
        """Width of a teacher's stored features, D or P; None if there are none."""
        return self.stores[name].fields["features"][0][-1] if "features" in self.fields[name] else None

    def with_stored(
        self, seen: Mapping[str, TeacherTargets], rows: Mapping[tuple[str, str], Tensor]
    ) -> dict[str, TeacherTargets]:
        """What teachers say now, and what they said to the disk: one teacher may do both.

        Args:
            seen: by teacher, asked now.
            rows: (teacher, field) -> rows of the batch, as `Batch.targets` has them.
        """
        found = dict(seen)
        for name, store in self.stores.items():
            mine = {field: value for (owner, field), value in rows.items() if owner == name}
            stored, online = cache.targets(mine, tuple(store.manifest["grid"])), found.get(name)
            if online is not None:
                both = {**online.attention, **stored.attention}
                features = stored.features if stored.features is not None else online.features
                stored = dataclasses.replace(stored, features=features, attention=both)
            found[name] = stored
        return found


def _check_teacher(plan: Plan, name: str, store: Store) -> None:
    """Compare the teacher in a store with the configuration's, where that lies at hand and asks for no download."""
    part, spec, expected = plan.teachers[name], plan.config.teachers[name].pretrained, None
    if part is not None and Path(part.manifest).exists():
        expected = artefact.read_json(part.manifest, "part")["identity"]
    elif spec is not None and spec.weights is not None and Path(spec.weights).is_file():
        expected = artefact.file_identity(spec.weights)
    found = store.manifest["teacher"]
    if expected is not None and found != expected:
        raise ValueError(
            f"{store.folder}: holds targets of teacher {found[:12]}, but {name} is now {expected[:12]}. "
            "Bring the earlier one back, or remove this folder to make its targets anew."
        )
