"""Weights that a configuration names by hub id, into this machine's caches: compute nodes often have no internet."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

from haste.plan.plan import Plan

# What is loaded, the key that a file of one's own goes to, and what loads it and says where it lies.
TargetSpec = tuple[str, str, Callable[[], object]]


def fetch(plan: Plan) -> Iterator[str]:
    """Load everything public that a configuration needs, unless it is there; a line for each, saying where it lies.

    Raises:
        ValueError: something is neither here nor to be had; all else is loaded before that is said.
    """
    missing = []
    for what, key, load in [*_autoencoders(plan), *_teachers(plan), *_detectors(plan)]:
        try:
            yield f"{what}: {load() or 'it has what it needs'}"
        except ValueError as error:
            missing.append(f"{error} In the configuration that is {key}.")
    if missing:
        raise ValueError("\n".join(missing))


def _autoencoders(plan: Plan) -> Iterator[TargetSpec]:
    if plan.config.autoencoder.pretrained is None:
        return
    from haste.data import latents

    places = {plan.decoder: "decode", plan.encoder: "encode"}  # one name for both is loaded once
    for where, key in reversed(places.items()):
        yield f"autoencoder {where}", f"autoencoder.pretrained.{key}", functools.partial(latents.fetch, where)


def _teachers(plan: Plan) -> Iterator[TargetSpec]:
    for name, spec in plan.config.teachers.items():
        if (public := spec.pretrained) is not None and public.weights is None:
            from haste.teachers import encoder

            key = f"teachers.{name}.pretrained.weights"
            yield f"teacher {name} ({public.name})", key, functools.partial(encoder.weight_file, public.name)


def _detectors(plan: Plan) -> Iterator[TargetSpec]:
    for name, spec in plan.config.detector.items():
        if (public := spec.pretrained) is not None and public.weights is None:
            from haste.metrics import detectors

            key = f"detector.{name}.pretrained.weights"
            yield f"detector {name} ({public.name})", key, functools.partial(detectors.weight_file, public.name)
