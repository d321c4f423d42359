"""A teacher's targets on disk: jobs of their own make one row an image, training reads it at every visit of the image.

Images are never cropped anew, and a run that flips them takes no stored targets, so one row an image is enough. Rows
are float16: the queries and keys rather than the maps that they make, which are N / (2 K) times as large. Reading needs
neither the teacher nor the images.

B images, N = h x w patch tokens, D width of the features, H heads, K head width, P principal components.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from haste.align.losses import TeacherTargets
from haste.align.terms import kind_of
from haste.config import filter_faults, layer_faults
from haste.files import artefact, locks
from haste.files.progress import Progress
from haste.files.store import Store, join, shard_range, write_shard
from haste.networks.devices import choose_device
from haste.plan.names import Artefact, Segment
from haste.plan.plan import Plan
from haste.plan.target_spec import DTYPE, Shape, TargetSpec, features_of

if TYPE_CHECKING:
    from haste.teachers.encoder import Teacher

log = logging.getLogger("haste.targets")

PART, BASIS = "part.json", "basis.safetensors"
BATCH = 32  # images a pass of the teacher; changes nothing but rounding
PCA_IMAGES = 4096  # evenly spaced training images that components are fitted on; 1M tokens of DINOv2


def load_teacher(plan: Plan, name: str) -> Teacher:
    """A configuration's teacher, on the CPU.

    Raises:
        ValueError: a teacher that is trained here is missing; an alignment asks for a layer, or its filter for
            frequencies, that it does not have; or as `Teacher.load`.
    """
    from haste.teachers.encoder import Teacher  # timm takes seconds to import, and cached training never needs it

    part, chosen = plan.teachers[name], plan.config.teachers[name]
    if part is not None:
        artefact.read_json(part.manifest, "part")  # a folder that is gone would be taken for a name of timm's
        teacher = Teacher.load(part.folder)
    else:
        spec = chosen.pretrained
        assert spec is not None
        teacher = Teacher.load(spec.name, resolution=plan.config.images.resolution, weights=spec.weights)
    teacher.low_pass = chosen.filter.low_pass if chosen.filter else None
    faults = [
        *layer_faults(plan.config, name, teacher.depth),
        *filter_faults(plan.config, name, max(teacher.size)),
    ]
    if faults:  # of a teacher whose size nobody knew before
        raise ValueError("\n".join(faults))
    return teacher


# -- principal components ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class PCA:
    """Principal components of a teacher's features.

    mean: (D,) float32; components: (P, D) float32, orthonormal rows, largest variance first.
    """

    mean: Tensor
    components: Tensor

    @functools.cached_property
    def identity(self) -> str:
        """Hash of mean and components."""
        return hashlib.sha256(self.mean.numpy().tobytes() + self.components.numpy().tobytes()).hexdigest()

    @classmethod
    def load(cls, folder: Path | str) -> PCA:
        """Read what `save` wrote.

        Raises:
            ValueError: missing, foreign or damaged; names the file.
        """
        path, part = Path(folder, BASIS), artefact.read_json(Path(folder, PART), "part")
        try:
            found = load_file(path)
            basis = cls(found["mean"], found["components"])
        except (OSError, KeyError, safetensors.SafetensorError) as error:
            raise ValueError(f"{path}: expected principal components, found {error}") from error
        if basis.identity != part.get("identity"):
            expected = str(part.get("identity"))
            raise ValueError(f"{path}: found components {basis.identity[:12]}, expected {expected[:12]}")
        return basis

    def save(self, folder: Path | str, explained: float, about: Mapping[str, Any]) -> None:
        """Write a part, whole or not at all. explained: share of the variance, 0..1; about: more of its description."""
        with artefact.replacing(folder) as aside:
            aside.mkdir()
            with artefact.saving_tensors(aside):
                save_file({"mean": self.mean, "components": self.components}, aside / BASIS)
            description = {"schema": artefact.SCHEMA, "kind": "part", "part": "pca", **about}
            description |= {"quality": {"explained variance": explained}, "identity": self.identity}
            artefact.write_json(aside / PART, description)

    def project(self, features: Tensor) -> Tensor:
        """Coordinates of features (B, N, D) on the components, (B, N, P) float32."""
        return (features.float() - self.mean.to(features.device)) @ self.components.to(features.device).T


def fit_pca(batches: Iterable[Tensor], components: int) -> tuple[PCA, float]:
    """The components of the largest variance of all tokens, and the share of the variance that they explain, 0..1.

    Mean and covariance in float64, then a symmetric eigendecomposition. Each component's largest entry is positive:
    that makes its sign, which is arbitrary, the same everywhere.

    Args:
        batches: features (B, N, D), any number of batches.
        components: P, at most D.

    Raises:
        ValueError: no features, more components than their width, or features that are not finite.
    """
    count, total, products = 0, None, None
    for features in batches:
        tokens = features.flatten(0, -2).double()  # (B N, D)
        sums, squares = tokens.sum(0), tokens.T @ tokens
        total, products = (sums, squares) if total is None or products is None else (total + sums, products + squares)
        count += len(tokens)
    if total is None or products is None or not bool(products.isfinite().all()):
        raise ValueError("principal components: found no features, or some that are not finite")
    if components > len(total):
        raise ValueError(f"principal components: {components} asked for, but features have a width of {len(total)}")
    mean = total / count
    variances, vectors = torch.linalg.eigh((products / count - torch.outer(mean, mean)).cpu())
    basis = vectors.T.flip(0)[:components]  # eigh gives the smallest first
    largest = basis.gather(1, basis.abs().argmax(1, keepdim=True))
    explained = float(variances.flip(0)[:components].sum() / variances.sum())
    return PCA(mean.cpu().float(), (basis * largest.sign()).float().contiguous()), explained


# -- rows of a store ---------------------------------------------------------------------------------------------------


def shape_of(teacher: Teacher) -> Shape:
    """What the size of a loaded teacher's targets follows from."""
    return Shape(teacher.grid[0] * teacher.grid[1], teacher.width, teacher.heads, teacher.depth)


def rows(teacher: Teacher, images: Tensor, wanted: TargetSpec, pca: PCA | None, first: int) -> dict[str, NDArray]:
    """The rows of a batch of images, uint8 NHWC (B, R, R, 3) on the teacher's device; fields as in `TargetSpec.layout`.

    first: number of the batch's first image, for errors.

    Raises:
        ValueError: a target that float16 cannot hold; names the image and the field.
    """
    once = wanted.layers[0] if wanted.layers else None  # the layer whose pass attention shares
    attention = [layer for layer, _ in wanted.attention]
    seen = teacher(images, features=bool(wanted.layers), layer=once, attention=attention)
    found: dict[str, Tensor] = {}
    for layer in wanted.layers:
        told = seen if layer == once else teacher(images, features=True, layer=layer)
        assert told.features is not None
        found[features_of(layer)] = told.features if pca is None else pca.project(told.features)
    for layer, heads in wanted.attention:
        found[f"queries.{layer}"], found[f"keys.{layer}"] = (x[:, :heads] for x in seen.attention[layer])
    made = {}
    for name, value in found.items():
        with np.errstate(over="ignore"):  # an overflow is found and named below
            made[name] = value.float().cpu().numpy().astype(DTYPE)
        broken = np.flatnonzero(~np.isfinite(made[name]).reshape(len(images), -1).all(axis=1))
        if len(broken):
            raise ValueError(f"cache: {name} of image {first + int(broken[0])} are not finite in {DTYPE}")
    return made


def merged(seen: TeacherTargets, stored: Mapping[str, Tensor]) -> TeacherTargets:
    """What a teacher says now, perhaps nothing, and beside it or in its place what the fields of a batch's rows say."""
    layers = [int(name.partition(".")[2]) for name in stored if name.startswith("queries.")]
    pairs = {layer: (stored[f"queries.{layer}"], stored[f"keys.{layer}"]) for layer in layers}
    features = next((value for name, value in stored.items() if name.startswith("features")), seen.features)
    return TeacherTargets(features, {**seen.attention, **pairs}, seen.grid)


# -- the jobs that make them -------------------------------------------------------------------------------------------


def cached(plan: Plan, name: str) -> Artefact:
    """The store of a teacher's targets.

    Raises:
        ValueError: this configuration caches nothing of it.
    """
    if name not in plan.targets:
        raise ValueError(f"targets of {name!r}: not cached here, but {', '.join(sorted(plan.targets)) or 'nothing'}")
    return plan.targets[name]


def fit(plan: Plan, name: str) -> None:
    """Fit and write the principal components of a teacher's features.

    They are fitted on training images that lie evenly in the store: a function of position, the same everywhere.

    Raises:
        ValueError: this configuration has no components of that teacher; or as `fit_pca`.
    """
    cached(plan, name)
    if name not in plan.pca:
        raise ValueError(f"targets of {name!r}: teachers.{name}.pca is not set, there is nothing to fit")
    with locks.making(plan.pca[name].folder, done=plan.pca[name].manifest) as todo:
        if todo:
            _fit(plan, name)


def _fit(plan: Plan, name: str) -> None:
    started, part, images, teacher = time.monotonic(), plan.pca[name], Store.of(plan.images), _ready(plan, name)
    train = images.range("train")
    chosen = train[:: -(-len(train) // PCA_IMAGES)]
    features = _features(teacher, images, chosen, name, part.recipe.get("layer"))
    basis, explained = fit_pca(features, part.recipe["components"])
    log.info("%s: %d components explain %.1f %%", name, len(basis.components), 100 * explained)
    inputs = {"images": images.identity, "teacher": teacher.identity}
    seconds = time.monotonic() - started
    made = artefact.provenance(key=part.key, recipe=part.recipe, inputs=inputs, seconds=seconds)
    about = {"name": name, "key": part.key, "recipe": part.recipe, "images": len(chosen), "provenance": made}
    basis.save(part.folder, explained, about)


def make_shard(plan: Plan, name: str, shard: int) -> Path:
    """Write one shard of a teacher's targets: a row an image, in the images' order.

    Raises:
        ValueError: nothing of this teacher is cached, a shard that is not one of them, or more bytes than
            `cache.max_bytes`.
    """
    made, images = cached(plan, name), Store.of(plan.images)
    chosen = shard_range(images.count, shard, made.shards)
    teacher, wanted = _ready(plan, name), TargetSpec.read(made.recipe)
    shape = shape_of(teacher)
    plan.check_cache(images.count, {name: shape})
    pca = PCA.load(plan.pca[name].folder) if name in plan.pca else None
    inputs = {"images": images.identity, "teacher": teacher.identity, **({"pca": pca.identity} if pca else {})}
    return write_shard(
        made.folder,
        **_described(made),
        shard=shard,
        total=images.count,
        fields=wanted.layout(shape, len(pca.components) if pca else None),
        batches=(rows(teacher, shown, wanted, pca, at) for at, shown in _looked_at(images, chosen, teacher)),
        provenance=artefact.provenance(key=made.key, recipe=made.recipe, inputs=inputs),
        facts={"pca": None, **inputs, "grid": list(teacher.grid)},
    )


def join_shards(plan: Plan, name: str) -> dict[str, Any]:
    """Check the shards of a teacher's targets and write the manifest. No teacher is needed.

    Raises:
        ValueError: a shard is missing, damaged, or was made from other images or by another teacher than the rest.
    """
    made, images = cached(plan, name), Store.of(plan.images)
    return join(
        made.folder,
        **_described(made),
        splits=images.manifest["splits"],
        provenance=artefact.provenance(key=made.key, recipe=made.recipe, inputs={"images": images.identity}),
        expected_facts={"images": images.identity},
    )


def _described(made: Artefact) -> dict[str, Any]:
    return {"kind": made.kind, "key": made.key, "recipe": made.recipe, "shards": made.shards}


def _ready(plan: Plan, name: str) -> Teacher:
    return load_teacher(plan, name).to(choose_device(plan.config.runtime.device, 0))


def _looked_at(images: Store, chosen: range, teacher: Teacher) -> Iterator[tuple[int, Tensor]]:
    """(number of the first, uint8 NHWC on the teacher's device) of batches of the chosen images."""
    for low in range(0, len(chosen), BATCH):
        part = chosen[low : low + BATCH]
        yield part[0], torch.from_numpy(images.read("image", part)).to(teacher.mean.device)


def _features(teacher: Teacher, images: Store, chosen: range, name: str, layer: int | None) -> Iterator[Tensor]:
    """A layer's features (B, N, D) of batches of the chosen images."""
    progress = Progress(f"components of {name}", len(chosen))
    for _, shown in _looked_at(images, chosen, teacher):
        seen = teacher(shown, features=True, layer=layer).features
        assert seen is not None
        yield seen
        progress.add(len(shown))


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
            store = Store.of(cached(plan, name))
            _check_teacher(plan, name, store)
            mine = {kind: segment.terms[kind] for kind in segment.cached if segment.terms[kind]["teacher"] == name}
            wanted = functools.reduce(TargetSpec.__or__, (TargetSpec.of(kind, term) for kind, term in mine.items()))
            self.stores[name], self.fields[name] = store, wanted.fields

    def inputs(self, name: str, kind: str) -> dict[str, str]:
        """Identities that a state trained with a teacher's stored targets must carry on with."""
        manifest = self.stores[name].manifest
        found = {f"teacher of {kind}": manifest["teacher"]}
        return (
            {**found, f"components of {kind}": manifest["pca"]}
            if kind_of(kind) == "features" and manifest["pca"]
            else found
        )

    def width(self, name: str) -> int | None:
        """Width of a teacher's stored features, D or P; None if there are none."""
        field = next((field for field in self.fields[name] if field.startswith("features")), None)
        return None if field is None else self.stores[name].fields[field][0][-1]

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
            nothing = TeacherTargets(None, {}, tuple(store.manifest["grid"]))
            found[name] = merged(seen.get(name, nothing), mine)
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
