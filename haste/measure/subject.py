"""The subject of a measure: a network, opened with its images and teachers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from haste.align.terms import of_features
from haste.config import EVALUATION, condition_in, process_in
from haste.data.batches import Batch, Batches
from haste.data.captions import CAPTIONS
from haste.data.jobs import check_autoencoder, check_decoder
from haste.data.latents import Autoencoder, draw, to_pixels
from haste.diffusion.process import Process
from haste.files.store import Store
from haste.measure.pictures import Picture
from haste.models.build import build_model
from haste.networks.hub_files import origin
from haste.plan.measures import Measurement
from haste.plan.plan import Plan
from haste.train import state as states
from haste.train.distributed import Group
from haste.train.gradient_angles import Gradients
from haste.train.inputs import Inputs
from haste.train.state import Learner
from haste.train.warm_start import checkpoint_elsewhere, numbered, projectors_in

Place = TypeVar("Place", bound=tuple[Any, ...])


@dataclasses.dataclass
class Subject:
    """The measured network. Its images are prepared as in training, with noise and latent draws of their own.

    Attributes:
        learner: the network, `learner.model`, on the device and in training precision; its projectors. It is not
            trained, and has no average.
        inputs: the inputs of measuring: `batches`, `precision`, teachers' `targets`.
        asked: the alignment terms to compare with, with their layers and weights.
        terms: those of them that are possible: a feature loss needs a projector.
        group: the ranks; each takes its share of the images.
        part: images per forward pass.
        notes: sentences on what was left out.
        projected: the feature terms whose projector is the state's; others have a new one.
        pictures: what the file shows beside the numbers.
        teachers: teacher -> value columns -> what was found of it in place of the network.
        plan: with the paths of all files.
        what: the measurement, with the stores of hidden states that it reads.
    """

    learner: Learner
    inputs: Inputs
    asked: Mapping[str, Mapping[str, Any]]
    group: Group
    part: int
    notes: list[str]
    plan: Plan
    what: Measurement
    projected: frozenset[str] = frozenset()
    pictures: list[Picture] = dataclasses.field(default_factory=list)
    teachers: dict[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    @property
    def model(self) -> Any:
        """The network, a `haste.models.denoiser.Denoiser`."""
        return self.learner.model

    @property
    def terms(self) -> Mapping[str, Mapping[str, Any]]:
        """See the class."""
        return self.inputs.terms

    @property
    def process(self) -> Process:
        """The network's training objective; its `place` maps times t in [0, 1] to its own."""
        return process_in(self.inputs.recipe)

    @functools.cached_property
    def weights(self) -> str:
        """The identity of its weights."""
        return states.weights_identity(self.model)

    def with_terms(self, kinds: Collection[str]) -> Subject:
        """The network as training begins it, with new weights, and some of its terms alone."""
        terms = {kind: self.inputs.terms[kind] for kind in kinds}
        return _with_terms(self.plan, self.what, self.inputs.recipe, terms, self.group)

    def images(self, split: str) -> NDArray[np.int64]:
        """The places in the stores of the images whose hidden states are read, (n,)."""
        return self.batches(split).reading_indices(self.what.hidden[split].recipe["look"]["images"], split)

    def labels(self, split: str) -> NDArray[np.int64]:
        """The classes of these images, (n,).

        Raises:
            ValueError: images of `evaluation` have other classes than those of training.
        """
        found, ours = (one.latents for one in (self.batches(split), self.inputs.batches))
        if found.manifest["classes"] != ours.manifest["classes"]:
            raise ValueError(f"{found.folder}: has other classes than {ours.folder}, expected the same names")
        return found.read("label", self.images(split))

    def batches(self, split: str) -> Batches:
        """Those that have the images of a split: of training's inputs, or of `evaluation`.

        Raises:
            ValueError: a store is missing or damaged, or was encoded by another autoencoder or from other images.
        """
        return self._others if split == EVALUATION else self.inputs.batches

    @functools.cached_property
    def _others(self) -> Batches:
        found, ours = Store.of(self.plan.of(EVALUATION).latents), self.inputs.batches.latents
        if found.manifest["autoencoder"] != ours.manifest["autoencoder"]:
            raise ValueError(f"{found.folder}: was encoded by another autoencoder than {ours.folder}")
        told = condition_in(self.inputs.recipe).opened(self.plan.of(EVALUATION))
        for name, identity in told.identities.items():
            if name != CAPTIONS and self.inputs.identities[name] != identity:
                raise ValueError(f"evaluation: its captions were encoded by another {name} than those of training")
        made = {"latents": found.identity, **told.identities}
        self.inputs.identities |= {f"{name} of evaluation": made[name] for name in made.keys() & {"latents", CAPTIONS}}
        images = Store.of(self.plan.of(EVALUATION).images) if self.inputs.teachers else None
        return self.inputs.batches.of_all(found, told, images)

    def decoded(self, split: str, chosen: NDArray[np.int64]) -> NDArray[np.uint8]:
        """The latents of some images of a split before noise, decoded: (n, R, R, 3). A collective call.

        Raises:
            ValueError: the decoder is missing, damaged or of other latents.
            FloatingPointError: pixels are not finite.
        """
        pixels, self.inputs.identities["decoder"] = self.group.broadcast(lambda: self._decoded(split, chosen))
        return pixels

    def _decoded(self, split: str, chosen: NDArray[np.int64]) -> tuple[NDArray[np.uint8], str]:
        decoder = Autoencoder.load(self.plan.decoder, device=str(self.group.device))
        check_autoencoder(self.plan, decoder)
        batches = self.batches(split)
        batch, latents = batches.measured(chosen, range(len(chosen))), batches.latents.manifest
        check_decoder(self.plan, decoder, latents["autoencoder"])
        scaling = {"scale": latents["scale"], "shift": latents["shift"]}
        z = draw(batch.moments, batch.draw, **scaling)
        decoded = torch.cat([decoder.decode(one, **scaling) for one in z.split(1)])
        if not decoded.isfinite().all():
            raise FloatingPointError(f"{self.plan.decoder}: decodes latents to pixels that are not finite numbers")
        return to_pixels(decoded).cpu().numpy(), decoder.identity

    def shared(
        self, places: Sequence[Place], values: Callable[..., Sequence[float]]
    ) -> Iterator[tuple[Place, list[float]]]:
        """Each place with its values; every rank computes some of them. A collective call."""
        mine = {number: values(*places[number]) for number in range(self.group.rank, len(places), self.group.size)}
        width = max(self.group.broadcast(lambda: [len(one) for one in mine.values()]))
        found = torch.zeros(len(places), width, dtype=torch.float64, device=self.group.device)
        for number, value in mine.items():
            found[number] = torch.tensor(value, dtype=torch.float64)
        yield from zip(places, self.group.total(found).tolist(), strict=True)

    def by_image(
        self,
        chosen: NDArray[np.int64],
        times: Sequence[float],
        count: int,
        look: Callable[[Batch], Callable[[Tensor], Tensor]],
        split: str = "train",
    ) -> NDArray[np.float64]:
        """Values of each image at each time, (T, V, M) on all ranks; each computes those of its share of the images. A
        collective call.

        Args:
            chosen: (M,), indices of images in the stores.
            times: T times in [0, 1]; every image is used at each of them.
            count: V.
            look: of a batch, what gives the values of its images, (V, B), at the process's times t (B,).
            split: whose images these are.
        """
        group = self.group
        found = torch.zeros(len(times), count, len(chosen), dtype=torch.float64, device=group.device)
        low, high = (len(chosen) * rank // group.size for rank in (group.rank, group.rank + 1))
        for start in range(low, high, self.part):
            rows = range(start, min(start + self.part, high))
            batch = self.batches(split).measured(chosen, rows).to(group.device)
            with torch.no_grad(), self.inputs.precision():
                at = look(batch)
                for place, t in enumerate(times):
                    found[place, :, rows.start : rows.stop] = at(torch.full_like(batch.t, self.process.place(t)))
        return group.total(found).cpu().numpy()

    def gradients(self) -> Gradients:
        """Gradients of its losses by its blocks."""
        scale: Any = self.learner.scaler.scale
        return Gradients(self.inputs.objective(self.learner), self.inputs, part=self.part, scale=scale)


def opened(plan: Plan, what: Measurement, weights: str, seed: int, group: Group) -> tuple[Subject, dict[str, Any]]:
    """Open the network of a trained or imported state; also returns notes for the result.

    Args:
        plan: with the paths of all files.
        what: the state, and the alignment to compare with.
        weights: `model` or `ema`.
        seed: of the choice of images, and of their noise.
        group: the ranks.

    Raises:
        ValueError: the state, a store or a teacher is missing, damaged, or not the one the state was trained with.
    """
    source = (_elsewhere if what.state.trajectory in plan.elsewhere else _own)(plan, what, weights)
    recipe = {**source.recipe, "seed": seed}
    subject = _with_terms(plan, what, recipe, what.terms, group)
    named = "named alignment" in plan.config.measures[what.label].made.needs
    if features := of_features(subject.terms):
        heads = projectors_in(source.projectors, subject.learner.projectors)
        heads = {term: head for term, head in heads.items() if not named or _follows(source, subject, term)}
        if not named and (lacking := [term for term in features if term not in heads]):
            subject = _with_terms(plan, what, recipe, {k: v for k, v in what.terms.items() if k not in lacking}, group)
            subject.notes += [f"{term} left out: there is no projector" for term in lacking]
        for term, head in heads.items():
            subject.learner.projectors[term].load_state_dict(dict(head))
        subject.projected = frozenset(heads)
    for name, identity in subject.inputs.identities.items():
        of_training = not named or name == "latents"  # a named alignment need not be the one that it was trained with
        if of_training and (found := source.inputs.get(name, identity)) != identity:
            raise ValueError(
                f"{source.about['file']}: was trained with {name} {found[:12]}, but {name} is now {identity[:12]}. "
                "Bring the earlier one back, or measure with another alignment."
            )
    subject.learner.model.load_state_dict(dict(source.weights))
    if source.scale is not None:
        kept = {"scale": source.scale, "_growth_tracker": 0}
        subject.learner.scaler.load_state_dict({**subject.learner.scaler.state_dict(), **kept})
    return subject, source.about


@dataclasses.dataclass(frozen=True)
class _Source:
    """A network's entries in a file: its recipe, weights and possible projectors by term or number, the loss scale of
    fp16, identities of its training inputs, and notes."""

    recipe: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    projectors: Mapping[str, Mapping[str, Tensor]]
    scale: float | None
    inputs: Mapping[str, str]
    about: dict[str, Any]


def _own(plan: Plan, what: Measurement, which: str) -> _Source:
    path, trajectory = Path(plan.path(what.state)), plan.trajectories[what.state.trajectory]
    prefixes = (f"{which}/", "projectors/", "scaler/scale")
    header, tensors = states.read(path, key=trajectory.key, prefixes=prefixes)
    with torch.device("meta"):
        like = build_model(trajectory.recipe)
    weights, heads = states.weights_in(tensors, which, like, path), dict[str, dict[str, Tensor]]()
    for name, value in tensors.items():
        if name.startswith("projectors/"):
            _, term, own = name.split("/", 2)
            heads.setdefault(term, {})[own] = value
    about = {"trajectory": trajectory.name, "step": what.state.step, "file": str(path), "weights": which}
    scale = tensors["scaler/scale"].item() if "scaler/scale" in tensors else None
    return _Source(trajectory.recipe, weights, heads, scale, header["inputs"], about)


def _elsewhere(plan: Plan, what: Measurement, which: str) -> _Source:
    spec, trajectory = plan.elsewhere[what.state.trajectory], plan.trajectories[what.state.trajectory]
    found = checkpoint_elsewhere(plan, trajectory.name)
    which = which if which in found.weights else next(iter(found.weights))
    about = {"trajectory": trajectory.name, "step": spec.step, "file": origin(found.file), "weights": which}
    training = {**plan.config.training.model_dump(exclude={"process"}), **trajectory.recipe["training"]}
    recipe = {**trajectory.recipe, "training": training}
    return _Source(recipe, found.weights[which], numbered(found.projectors), None, {}, about | {"sha256": found.sha256})


def _with_terms(
    plan: Plan, what: Measurement, recipe: Mapping[str, Any], terms: Mapping[str, dict[str, Any]], group: Group
) -> Subject:
    cached = tuple(kind for kind in what.cached if kind in terms)
    recipe = {**recipe, "training": {**recipe["training"], "flip": False}}  # measures are of images as they are
    inputs = Inputs(plan, dataclasses.replace(what.segment, terms=dict(terms), cached=cached), recipe, group)
    runtime, batch = plan.config.runtime, recipe["training"]["batch"]
    part = max(1, batch // (runtime.processes * runtime.accumulate))
    return Subject(inputs.learner(), inputs, what.terms, group, part, [], plan, what)


def _follows(source: _Source, subject: Subject, term: str) -> bool:
    """Whether the state's projector of a term is of the block and the teacher of the alignment to compare with, as far
    as its file says."""
    trained, depth = source.recipe.get("terms", {}).get(term), subject.terms[term]["depth"]
    if trained is None:
        subject.notes.append(f"the projector is taken to be of block {depth}: its file does not say of which it is")
        return True
    others = of_features(subject.terms).keys() - {term}
    ours = {k: v for k, v in subject.inputs.identities.items() if k.partition(" of ")[2] not in others}
    same = all(source.inputs.get(name, own) == own for name, own in ours.items())
    if trained["depth"] != depth or not same:
        subject.notes.append("the state's projector is of another block or teacher, and not used")
        return False
    return True
