"""The teacher targets of a plan: which stores hold them, what they take on disk, and whether they may."""

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
    """One store for each teacher that is cached and that a run or a measure asks, with what they ask for together.

    Attributes:
        stores: teacher -> the store of its targets.
        pca: teacher -> the principal components of its features, where the configuration asks for some.
    """

    def __init__(self, config: Config, data: Data):
        self.config, self.data = config, data
        wanted: dict[str, TargetSpec] = {}
        for kind, term in _asked(config):
            if config.teachers[name := term["teacher"]].caches(kind):
                wanted[name] = wanted.get(name, TargetSpec()) | TargetSpec.of(kind, term)
        self.pca = {
            name: data.part("pca", name, {"teacher": data.teacher_key(name), "components": components})
            for name, spec in wanted.items()
            if spec.features and (components := config.teachers[name].pca)
        }
        self.stores = {name: self._store(name, spec) for name, spec in wanted.items()}
        self._held = {name: TargetSpec.read(store.recipe) for name, store in self.stores.items()}

    def _store(self, name: str, wanted: TargetSpec) -> Artefact:
        """A teacher's store: a finished one that holds what is wanted, and perhaps more, else one to be made."""
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
            except (ValueError, KeyError, TypeError, AttributeError):  # nobody's store: a new one is made beside it
                continue
            if fits and manifest.parent.name == f"targets-{key}":
                yield Artefact("targets", key, recipe, f"{root}/stores/targets-{key}", shards)

    def shape(self, name: str) -> Shape | None:
        """What the size of a teacher's targets follows from; None where only loading it can tell."""
        tokens, shape = teacher_tokens(self.config, name), teacher_shape(self.config.teachers[name])
        return Shape(tokens[1], tokens[0], shape[1], shape[0]) if tokens and shape else None

    def bytes_of(self, name: str, images: int, shape: Shape | None = None) -> int | None:
        """Bytes that a teacher's store takes for so many images; None where only loading the teacher can tell."""
        shape, components = shape or self.shape(name), self.config.teachers[name].pca
        return None if shape is None else images * bytes_per_image(self._held[name], shape, components)

    def check(self, images: int | None = None, shapes: Mapping[str, Shape] | None = None) -> None:
        """Refuse cached targets that take more disk than they may.

        Args:
            images: how many there are; None counts them.
            shapes: of teachers that were loaded; the size of others is known by their name or not at all.

        Raises:
            ValueError: beyond `cache.max_bytes`; the message says what each teacher takes and what would fit.
        """
        if not self.stores:
            return
        images = self.data.image_count if images is None else images
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
    """The alignment terms that training or a measure has targets for, by kind."""
    for run, row in config.runs.items():
        yield from ((kind, term) for kind, term in terms_of(config, run).items() if getattr(row.stop, kind) != 0)
    measures = {name: row.measures for rows in (config.runs, config.evaluate) for name, row in rows.items()}
    for name, asked in measures.items():
        for measure in asked:
            yield from measured_terms(config, name, measure).items()
