"""Weights that a configuration names by hub id, into this machine's caches: compute nodes often have no internet."""

from __future__ import annotations

from collections.abc import Iterator

from haste.plan import Plan


def fetch(plan: Plan) -> Iterator[str]:
    """Load everything public that a configuration needs, unless it is there; a line for each, saying where it lies.

    Raises:
        ValueError: something is neither here nor to be had.
    """
    if plan.config.autoencoder.pretrained is not None:
        from haste.data import latents

        for where in dict.fromkeys([plan.encoder, plan.decoder]):
            yield f"autoencoder {where}: {latents.fetch(where)}"
    for name, teacher in plan.config.teachers.items():
        if teacher.pretrained is not None and teacher.pretrained.weights is None:
            from haste.teachers import encoder

            yield f"teacher {name} ({teacher.pretrained.name}): {encoder.weight_file(teacher.pretrained.name)}"
