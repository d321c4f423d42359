"""Download the weights that a configuration names by hub id: compute nodes often have no internet."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

from haste.networks.text import WORDS
from haste.plan.plan import Plan

# What is downloaded, the key that takes a local file instead, and the function that downloads it and returns its path.
TargetSpec = tuple[str, str, Callable[[], object]]


def fetch(plan: Plan) -> Iterator[str]:
    """Download all public weights that a configuration needs and that are missing; one line each, with the path.

    Raises:
        ValueError: some are missing and cannot be downloaded; raised after all others are downloaded.
    """
    missing = []
    for what, key, load in [
        *_autoencoders(plan),
        *_text_encoders(plan),
        *_teachers(plan),
        *_detectors(plan),
        *_checkpoints(plan),
    ]:
        try:
            yield f"{what}: {load() or 'it has what it needs'}"
        except ValueError as error:
            missing.append(f"{str(error).rstrip('.')}. In the configuration that is {key}.")
    if missing:
        raise ValueError("\n".join(missing))


def _autoencoders(plan: Plan) -> Iterator[TargetSpec]:
    if plan.config.autoencoder.pretrained is None:
        return
    from haste.data import latents

    places = {plan.decoder: "decode", plan.encoder: "encode"}  # the same name for both is downloaded once
    for where, key in reversed(places.items()):
        yield f"autoencoder {where}", f"autoencoder.pretrained.{key}", functools.partial(latents.fetch, where)


def _text_encoders(plan: Plan) -> Iterator[TargetSpec]:
    where = plan.config.condition.encoder
    if isinstance(where, str) and where != WORDS:
        from haste.networks import hub

        load = functools.partial(hub.text_folder, where, "text encoder")
        yield f"text encoder {where}", "condition.encoder", load


def _teachers(plan: Plan) -> Iterator[TargetSpec]:
    for name, spec in plan.config.teachers.items():
        if (public := spec.pretrained) is not None and public.weights is None:
            from haste.teachers import encoder

            key = f"teachers.{name}.pretrained.weights"
            yield f"teacher {name} ({public.name})", key, functools.partial(encoder.weight_file, public.name)


def _detectors(plan: Plan) -> Iterator[TargetSpec]:
    for name, spec in plan.config.detector.items():
        if (public := spec.pretrained) is not None and (public.weights is None or public.name == "clip"):
            from haste.metrics import detectors

            key = f"detector.{name}.pretrained.weights"
            load = functools.partial(detectors.weight_file, public.name, public.weights)
            yield f"detector {name} ({public.name})", key, load


def _checkpoints(plan: Plan) -> Iterator[TargetSpec]:
    from haste.networks import hub_files

    for file, of in plan.data.outside.hub.items():
        yield f"checkpoint {file}", plan.data.outside.keys[file], functools.partial(hub_files.fetch, of)
