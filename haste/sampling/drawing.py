"""Pictures of a state or a checkpoint, asked for by its file alone: `haste draw`, and `haste.load` in Python.

N pictures, R pixels per side.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from pydantic import ValidationError

from haste import config as configuration
from haste.config import MODELS, PRESETS, Config, Sampling, condition_in, process_in
from haste.data.condition import Condition
from haste.data.latents import Autoencoder
from haste.files import artefact
from haste.files.npz import ADM
from haste.files.progress import Progress
from haste.files.provenance import STATE_NAME, provenance_of
from haste.models.exchange import open_weights
from haste.networks.devices import device_named
from haste.networks.hub_files import local
from haste.plan.outside import Outside
from haste.plan.plan import Plan
from haste.sampling.grids import class_grid, write_png
from haste.sampling.painter import Painter, painter_of
from haste.train.named import file_named, put_row, run_through, state_named

log = logging.getLogger("haste.sample")

KIND = "drawing"
USUAL = {"interpolant": "sde-250", "ddpm": "ddpm-250"}  # by the network's process, where no row says another way
BATCH = 32  # changes pictures by float rounding only
LEAST = 64  # pixels per side of a picture in a grid; smaller ones are enlarged


@dataclasses.dataclass(frozen=True)
class _Subject:
    """What a file holds: its recipe, ways to sample by name, the usual one, and what makes its painter."""

    file: str
    recipe: Mapping[str, Any]
    ways: Mapping[str, Sampling]
    usual: str
    painter: Callable[[Sampling], Painter]

    def painter_as(
        self,
        sampling: str | Sampling | None,
        classes: Sequence[int],
        prompts: Sequence[str],
        changes: Mapping[str, Any],
    ) -> Painter:
        """The painter of what is asked for."""
        _check_asked(self.file, self.recipe, classes, prompts)
        way = sampling if isinstance(sampling, Sampling) else _way(self, sampling)
        changes = {key: value for key, value in changes.items() if value is not None}
        changes |= {"labels": list(classes)} if classes else {}
        changes |= {"prompts": list(prompts)} if prompts else {}
        count = {"count": max(way.count, len(classes), len(prompts))}  # which decides nothing here
        try:
            return self.painter(Sampling.model_validate({**way.model_dump(), **count, **changes}))
        except ValidationError as error:
            said = "; ".join(f"sampling.{configuration.explain(fault)}" for fault in error.errors())
            raise ValueError(said) from error


class Loaded:
    """A network that is ready to draw; `haste.load` makes it."""

    def __init__(self, subject: _Subject):
        self._subject = subject

    def draw(
        self,
        labels: Sequence[int] = (),
        *,
        prompts: Sequence[str] = (),
        count: int | None = None,
        sampling: str | None = None,
        **changes: Any,
    ) -> list[Image.Image]:
        """Pictures, each R x R pixels in RGB.

        Args:
            labels: picture i is of the class in place i, counted round; none leaves it to `sampling`.
            prompts: likewise, for a network that follows captions.
            count: number of pictures; None is one of each label or prompt, else 16.
            sampling: a way of the configuration, or a preset; None is the row's first, or the papers'.
            changes: of the sampling, such as steps, guidance, seed, sampler: the keys of `sampling.NAME`.

        Raises:
            ValueError: what is asked for is refused; the message says what to do.
        """
        classes = [operator.index(one) for one in labels]  # NumPy's and torch's integers too
        number = (len(classes) or len(prompts) or 16) if count is None else count
        if number < 1:
            raise ValueError(f"count: found {count}, expected 1 or more")
        found = pictures(self._subject.painter_as(sampling, classes, prompts, changes), number)
        return [Image.fromarray(one) for one in found["image"]]


def load(
    file: Path | str,
    *,
    config: Config | None = None,
    decoder: str | None = None,
    device: str = "auto",
    layout: Literal["ours", "REPA", "SiT", "DiT"] | None = None,
    model: str | None = None,
) -> Loaded:
    """A state, or any checkpoint that can be imported, ready to draw.

    Args, errors: as `painter_of_file`; device also "auto", a GPU if there is one.
    """
    return Loaded(_subject(file, config, decoder, device_named(device), model, layout))


def painter_of_file(
    file: Path | str,
    *,
    config: Config | None = None,
    sampling: str | Sampling | None = None,
    classes: Sequence[int] = (),
    prompts: Sequence[str] = (),
    decoder: str | None = None,
    device: str = "cpu",
    layout: Literal["ours", "REPA", "SiT", "DiT"] | None = None,
    model: str | None = None,
    **changes: Any,
) -> Painter:
    """The painter of a state, or of any checkpoint that can be imported.

    With the configuration of a state its pictures are those that the workflow draws in the same way: its decoder, its
    latents' scale. Without one they need a decoder, whose scale is taken.

    Args:
        file: a state, by its file or, with a configuration, as TRAJECTORY/STEP; or a checkpoint from elsewhere, by its
            file or an id of the hub's.
        config: None is the configuration that made the state, by the record that a workflow leaves in the same results
            folder.
        sampling: a name in the configuration, a preset, or the settings themselves; None is the first of the row that
            the file belongs to, else the papers' (`USUAL`).
        classes: sample i is of the class in place i, counted round; none leaves it to `sampling`.
        prompts: likewise, for a network that follows captions.
        decoder: folder or hub id of an AutoencoderKL; None is the configuration's.
        device: torch's name of it.
        layout, model: of a checkpoint, as for `haste.models.exchange.open_weights`; the model by its name.
        changes: of `sampling`, such as guidance, seed, weights.

    Raises:
        ValueError: the file, the decoder or what is asked for is refused; the message says what to do.
    """
    found = _subject(file, config, decoder, device, model, layout, changes.get("weights"))
    return found.painter_as(sampling, classes, prompts, changes)


def _subject(
    file: Path | str,
    config: Config | None,
    decoder: str | None,
    device: str,
    model: str | None,
    layout: str | None,
    weights: str | None = None,
) -> _Subject:
    file = file_named(Outside(config, config.results), file) if config else str(local(file))
    config = config or _made_by(Path(file))
    told = (file, decoder, device, model, layout)
    return _alone(*told) if config is None else _configured(config, *told, weights=weights)


def _made_by(file: Path) -> Config | None:
    """The configuration of a state in a results folder: of those that a workflow ran there, the latest that has it."""
    root = file.absolute().parent.parent.parent
    if not STATE_NAME.match(file.name) or not file.is_file():
        return None
    records = sorted(root.glob("*/config.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for record in records:
        try:
            # Its paths are as seen from the folder in which it ran.
            found = configuration.resolve({**configuration.read(record), "results": str(root)})
            if state_named(Plan(found), str(file)) is not None:
                return found
        except ValueError as error:  # another one may have the state
            log.warning("%s", error)
    return None


def _configured(
    config: Config,
    file: str,
    decoder: str | None,
    device: str,
    model: str | None,
    layout: str | None,
    weights: str | None,
) -> _Subject:
    plan = Plan(config)
    state = state_named(plan, file)
    if state is not None:
        ways = config.runs[run_through(plan, state)].sampling
    else:
        raw = config.model_dump(mode="json") | {"forks": {}}  # their branches are rows already
        row = put_row(raw, plan, file, model, layout)
        ways = config.evaluate[row].sampling if row in config.evaluate else []
        raw["evaluate"][row] |= {"weights": weights} if weights else {}
        plan = Plan(configuration.resolve(raw))
        state = next(one.evaluation.state for one in plan.rows if one.run == row)
    recipe = plan.trajectories[state.trajectory].recipe

    kept: dict[Any, Painter] = {}  # network and decoder are loaded once

    def painter(sampling: Sampling) -> Painter:
        which = sampling.weights, bool(sampling.prompts)
        if which not in kept:
            kept[which] = painter_of(plan, state, sampling, decoder=decoder, device=device)
        return dataclasses.replace(kept[which], sampling=sampling)

    return _Subject(file, recipe, config.sampling, ways[0] if ways else _usual(recipe), painter)


def _alone(file: str, decoder: str | None, device: str, model: str | None, layout: Any) -> _Subject:
    """A checkpoint of a SiT or DiT without a configuration."""
    if model is not None and model not in MODELS:
        raise ValueError(f"model {model!r}: expected one of {', '.join(MODELS)}, or a configuration that has it")
    found = open_weights(file, layout=layout, model=MODELS[model] if model else None)
    shape, facts = dict(found.shape), found.facts
    if "classes" not in shape:
        raise ValueError(
            f"{file}: was trained with captions; name a configuration with their encoder and its `condition`"
        )
    ddpm = shape.get("architecture") == "dit"
    recipe = {
        "model": {("channels" if k == "in_channels" else k): v for k, v in shape.items() if k != "classes"},
        "classes": shape["classes"],
        "training": {"process": {"name": "ddpm"}} if ddpm else {"path": facts.get("path") or "linear"},
    }
    if decoder is None:
        raise ValueError(
            f"{file}: nothing says its decoder. Name one, as by --decoder stabilityai/sd-vae-ft-ema (a folder or hub "
            "id of an AutoencoderKL), or a configuration that has the file, by -c CONFIG"
        )

    network_of = functools.cache(lambda weights: found.model(weights).to(device))
    decoding = functools.cache(lambda: Autoencoder.load(decoder, device=device))

    def painter(sampling: Sampling) -> Painter:
        network, vae = network_of(sampling.weights), decoding()
        if vae.channels != network.in_channels:
            raise ValueError(f"{decoder}: of {vae.channels} channels, but {file} of {network.in_channels}")
        return Painter(network, sampling, vae, process_in(recipe), condition_in(recipe), vae.scale, vae.shift)

    return _Subject(file, recipe, {}, _usual(recipe), painter)


def _usual(recipe: Mapping[str, Any]) -> str:
    return USUAL.get((recipe["training"].get("process") or {"name": "interpolant"})["name"], "")


def _way(found: _Subject, name: str | None) -> Sampling:
    """A way to sample by its name."""
    wanted = name or found.usual
    if wanted in found.ways:
        return found.ways[wanted]
    if wanted not in PRESETS:
        known = ", ".join({**found.ways, **PRESETS})
        raise ValueError(f"sampling {wanted!r}: expected one of {known}")
    return Sampling.model_validate({"preset": wanted})


def _check_asked(file: str, recipe: Mapping[str, Any], classes: Sequence[int], prompts: Sequence[str]) -> None:
    """Refuse what the network does not follow."""
    name, known = (recipe.get("condition") or {"name": "labels"})["name"], recipe["classes"]
    reads = type(condition_in(recipe)).words is not Condition.words
    if classes and prompts:
        raise ValueError("found classes and prompts, expected one of the two")
    if classes and name != "labels":
        instead = "; ask for prompts" if reads else ""
        raise ValueError(f"{file}: was trained with {name} and knows no classes{instead}")
    if prompts and not reads:
        instead = f", but classes 0 to {known - 1}; ask for these" if name == "labels" and known else ""
        raise ValueError(f"{file}: was trained with {name} and follows no prompts{instead}")
    if outside := [one for one in classes if not 0 <= one < known]:
        expected = f"0 to {known - 1}" if known else "none: it was trained without labels"
        raise ValueError(f"{file}: has no class {outside[0]}, expected {expected}")


def pictures(painter: Painter, count: int) -> dict[str, np.ndarray]:
    """The first samples of a painter, as `Painter.draw`: `image` (N, R, R, 3) uint8, the condition's rows, `nfe`."""
    watch, found = Progress("pictures", count, "pictures"), []
    for low in range(0, count, BATCH):
        rows = range(low, min(low + BATCH, count))

        def begun(share: float, size: int = len(rows)) -> None:
            watch.partly(share * size)

        found.append(painter.draw(rows, begun))
        watch.add(len(rows))
    return {name: np.concatenate([one[name] for one in found]) for name in found[0]}


def write(out: Path | str, painter: Painter, count: int) -> None:
    """Draw the first samples and write them: a `.png` with all, an `.npz` like ADM's, or a folder of PNGs.

    Each file has a record of how it was made, which `haste show` prints.

    Raises:
        ValueError: another suffix; or there is a file that is no drawing, or a folder with files.
    """
    out = Path(out)
    check_out(out)
    found = pictures(painter, count)
    rows = {name: found[name] for name in painter.condition.fields}
    told = painter.condition.words(rows) or rows.get("label", np.arange(count)).tolist()
    about = {"schema": artefact.SCHEMA, "kind": KIND, "sampling": painter.sampling.model_dump(exclude={"count"})}
    about |= {"pictures": told, "provenance": artefact.provenance(inputs=painter.inputs)}
    if out.suffix == ".npz":
        arrays = {"arr_0": found["image"], "nfe": found["nfe"], **{ADM.get(name, name): rows[name] for name in rows}}
        with artefact.replacing(out) as aside, open(aside, "wb") as file:
            np.savez(file, **arrays, haste=np.array(artefact.canonical(about)))  # type: ignore[arg-type]
    elif out.suffix == ".png":
        write_png(out, _grid(painter, found["image"]), about)
    else:
        out.mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(found["image"]):
            write_png(out / f"{number:06d}.png", Image.fromarray(image), {**about, "pictures": told[number]})


def _grid(painter: Painter, images: np.ndarray) -> Image.Image:
    """All pictures: a column per class or prompt, if these were asked for, else about as many columns as rows."""
    columns = len(painter.sampling.prompts or painter.sampling.chosen) or math.ceil(math.sqrt(len(images)))
    columns = min(columns, len(images))
    place, scale = np.arange(len(images)) % columns, max(1, LEAST // images.shape[1])
    rows = -(-len(images) // columns)
    return class_grid(images, place, per_class=rows, scale=scale, classes=range(columns))


def check_out(out: Path) -> None:
    """Refuse a place for drawings that would overwrite something else; raises ValueError."""
    if out.suffix not in (".png", ".npz", ""):
        raise ValueError(f"{out}: expected a .png, an .npz, or a folder, whose name has no suffix")
    if out.is_dir() and (out.suffix or any(out.iterdir())):
        raise ValueError(f"{out}: is a folder{'' if out.suffix else ' with files'}; expected another name")
    if out.is_file():
        try:
            kind = provenance_of(out).get("kind")
        except ValueError:
            kind = None
        if kind != KIND:
            raise ValueError(f"{out}: is there already and is no drawing; remove it, or give another name")
