"""The teacher targets of a plan: which stores hold them, their size on disk, and whether it is allowed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from haste.config import Config, measured_terms, teacher_shape, teacher_tokens, terms_of
from haste.files import artefact, units
from haste.plan.data import Data
from haste.plan.names import RECIPE, Artefact
from haste.plan.target_spec import DTYPE, Shape, TargetSpec, bytes_per_image, fitting


class Targets:
    """One store for each cached teacher that a run or a measure uses, with everything that they need.

    Attributes:
        stores: teacher -> the store of its targets.
        pca: teacher -> the principal components of its features, if the configuration asks for some.
    """

    def __init__(self, config: Config, data: Data):
        self.config, self.data = config, data
        wanted: dict[str, TargetSpec] = {}
        for kind, term in _asked(config):
            if config.teachers[name := term["teacher"]].caches(kind):
                wanted[name] = wanted.get(name, TargetSpec()) | TargetSpec.of(kind, term)
        self.pca = {
            name: data.part("pca", name, self._components(name, spec))
            for name, spec in wanted.items()
            if spec.layers and config.teachers[name].pca
        }
        self.stores = {name: self._store(name, spec) for name, spec in wanted.items()}
        self._held = {name: TargetSpec.read(store.recipe) for name, store in self.stores.items()}

    def _components(self, name: str, wanted: TargetSpec) -> dict[str, Any]:
        """What decides a teacher's principal components: they are of one layer's features.

        Raises:
            ValueError: several layers are asked for.
        """
        first, *more = wanted.layers
        if more:
            several = ", ".join("the last" if layer is None else str(layer) for layer in wanted.layers)
            raise ValueError(
                f"teachers.{name}.pca: runs follow its layers {several}, but components are of one; expected another "
                "entry of teachers for each"
            )
        found = {"teacher": self.data.teacher_key(name), "components": self.config.teachers[name].pca}
        return found if first is None else {**found, "layer": first}

    def _store(self, name: str, wanted: TargetSpec) -> Artefact:
        """A teacher's store: a finished one that holds at least what is needed, else a new one."""
        pca = self.pca[name].key if name in self.pca else None
        base = {"recipe": RECIPE, "images": self.data.images.key, "teacher": self.data.teacher_key(name)}
        base |= {"pca": pca, "dtype": DTYPE}
        new = self.data.store("targets", {**base, **wanted.recipe()}, self.config.cache.shards)
        finished = {made.folder: made for made in self._finished(base, wanted)}
        if not finished or new.folder in finished:
            return finished.get(new.folder, new)
        return min(finished.values(), key=lambda made: (len(TargetSpec.read(made.recipe).fields), made.key))

    def _finished(self, base: dict[str, Any], wanted: TargetSpec) -> Iterator[Artefact]:
        root = self.data.root
        for manifest in sorted(Path(root, "stores").glob("targets-*/manifest.json")):
            try:
                found = artefact.read_json(manifest, "store")
                recipe, key, shards = found["recipe"], found["key"], len(found["shards"])
                fits = base.items() <= recipe.items() and TargetSpec.read(recipe).covers(wanted)
            except (ValueError, KeyError, TypeError, AttributeError):  # not one of our stores: make a new one beside it
                continue
            if fits and manifest.parent.name == f"targets-{key}":
                yield Artefact("targets", key, recipe, f"{root}/stores/targets-{key}", shards)

    def shape(self, name: str) -> Shape | None:
        """The shape that determines the size of a teacher's targets; None if only loading it can tell."""
        tokens, shape = teacher_tokens(self.config, name), teacher_shape(self.config.teachers[name])
        return Shape(tokens[1], tokens[0], shape[1], shape[0]) if tokens and shape else None

    def bytes_of(self, name: str, images: int, shape: Shape | None = None) -> int | None:
        """Bytes of a teacher's store for a number of images; None if only loading the teacher can tell."""
        shape, components = shape or self.shape(name), self.config.teachers[name].pca
        return None if shape is None else images * bytes_per_image(self._held[name], shape, components)

    def check(self, images: int | None = None, shapes: Mapping[str, Shape] | None = None) -> None:
        """Refuse cached targets that take more disk than allowed.

        Args:
            images: their number; None counts them, as far as they are there.
            shapes: of teachers that were loaded; the size of others is known by their name or not at all.

        Raises:
            ValueError: beyond `cache.max_bytes`; the message lists each teacher's size and settings that would fit.
        """
        if not self.stores:
            return
        images = self.data.count if images is None else images
        if images is None:
            return
        known = {name: (shapes or {}).get(name) or self.shape(name) for name in self.stores}
        taken = {name: self.bytes_of(name, images, shape) or 0 for name, shape in known.items()}
        room = self.config.cache.max_bytes
        left = room - sum(taken.values())
        if left >= 0:
            return
        lines = [f"cache.max_bytes: {room} allows {units.readable(room)}, but for {images:,} images"]
        for name, size in taken.items():
            setting, shape = self.config.teachers[name], known[name]
            fits = shape and list(fitting(self._held[name], shape, setting.pca, images, left + size))
            lines.append(
                f"teachers.{name}.cache: {setting.cache} takes {units.readable(size)}; "
                f"what would fit: {' or '.join(fits or ['cache: off'])}"
            )
        raise ValueError("\n".join(lines))


def _asked(config: Config) -> Iterator[tuple[str, dict[str, Any]]]:
    """The alignment terms for which training or a measure has targets, by kind."""
    for run, row in config.runs.items():
        yield from ((kind, term) for kind, term in terms_of(config, run).items() if row.stop.of(kind) != 0)
    measures = {name: row.measures for rows in (config.runs, config.evaluate) for name, row in rows.items()}
    for name, asked in measures.items():
        for measure in asked:
            yield from measured_terms(config, name, measure).items()
