"""A teacher's targets as rows of a store: written once, read at every visit of an image. Needs no encoder to read.

Images are never flipped or cropped anew, so one row an image is enough. Rows are float16: the queries and keys rather
than the maps that they make, which are N / (2 K) times as large.

B images, N = h x w patch tokens, D width of the features, H heads, K head width, P principal components.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from haste.files import artefact
from haste.plan.target_spec import DTYPE, Shape, TargetSpec
from haste.teachers.targets import TeacherTargets

if TYPE_CHECKING:
    from haste.teachers.encoder import Teacher

PART, BASIS = "part.json", "basis.safetensors"


@dataclass(frozen=True)
class PCA:
    """Principal components of a teacher's features.

    mean: (D,) float32; components: (P, D) float32, orthonormal rows, largest variance first; identity: hash of both.
    """

    mean: Tensor
    components: Tensor
    identity: str

    @classmethod
    def load(cls, folder: Path | str) -> PCA:
        """Read what `write_pca` wrote.

        Raises:
            ValueError: missing, foreign or damaged; names the file.
        """
        path = Path(folder) / BASIS
        part = artefact.read_json(Path(folder) / PART, "part")
        try:
            found = load_file(path)
            basis = cls(found["mean"], found["components"], _basis_identity(found))
        except (OSError, KeyError, safetensors.SafetensorError) as error:
            raise ValueError(f"{path}: expected principal components, found {error}") from error
        if basis.identity != part.get("identity"):
            raise ValueError(
                f"{path}: found components {basis.identity[:12]}, expected {str(part.get('identity'))[:12]}"
            )
        return basis

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
    found = {"mean": mean.cpu().float(), "components": (basis * largest.sign()).float().contiguous()}
    explained = float(variances.flip(0)[:components].sum() / variances.sum())
    return PCA(**found, identity=_basis_identity(found)), explained


def write_pca(folder: Path | str, basis: PCA, explained: float, about: Mapping[str, Any]) -> None:
    """Write components as a part: whole or not at all. about: more entries of its description."""
    with artefact.replacing(folder) as aside:
        aside.mkdir()
        with artefact.saving_tensors(aside):
            save_file({"mean": basis.mean, "components": basis.components}, aside / BASIS)
        description = {"schema": artefact.SCHEMA, "kind": "part", "part": "pca", **about}
        description |= {"quality": {"explained variance": explained}, "identity": basis.identity}
        artefact.write_json(aside / PART, description)


def _basis_identity(found: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in ("mean", "components"):
        digest.update(found[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def shape_of(teacher: Teacher) -> Shape:
    """What the size of a loaded teacher's targets follows from."""
    return Shape(teacher.grid[0] * teacher.grid[1], teacher.width, teacher.heads, teacher.depth)


def layout(teacher: Teacher, wanted: TargetSpec, pca: PCA | None) -> dict[str, tuple[tuple[int, ...], str]]:
    """Field -> (shape of a row, dtype): `features` (N, D or P), `queries.LAYER` and `keys.LAYER` (H, N, K).

    Raises:
        ValueError: more heads asked for than the teacher has.
    """
    tokens, width = teacher.grid[0] * teacher.grid[1], teacher.width if pca is None else len(pca.components)
    fields: dict[str, tuple[tuple[int, ...], str]] = {"features": ((tokens, width), DTYPE)} if wanted.features else {}
    for layer, heads in wanted.attention:
        if heads > teacher.heads:
            raise ValueError(f"cache: {heads} heads of layer {layer} asked for, the teacher has {teacher.heads}")
        for what in ("queries", "keys"):
            fields[f"{what}.{layer}"] = ((heads, tokens, teacher.head_width), DTYPE)
    return fields


def rows(teacher: Teacher, images: Tensor, wanted: TargetSpec, pca: PCA | None, first: int) -> dict[str, NDArray]:
    """The rows of a batch of images, uint8 NHWC (B, R, R, 3) on the teacher's device; fields as in `layout`.

    first: number of the batch's first image, for errors.

    Raises:
        ValueError: a target that float16 cannot hold; names the image and the field.
    """
    seen = teacher(images, features=wanted.features, attention=[layer for layer, _ in wanted.attention])
    found: dict[str, Tensor] = {}
    if seen.features is not None:
        found["features"] = seen.features if pca is None else pca.project(seen.features)
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


def targets(stored: Mapping[str, Tensor], grid: tuple[int, int]) -> TeacherTargets:
    """What the fields of a batch's rows say, in the teacher's words."""
    layers = [int(name.partition(".")[2]) for name in stored if name.startswith("queries.")]
    pairs = {layer: (stored[f"queries.{layer}"], stored[f"keys.{layer}"]) for layer in layers}
    return TeacherTargets(stored.get("features"), pairs, grid)
