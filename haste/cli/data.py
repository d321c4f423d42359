"""Commands that make data: images, latents, targets, and the small networks that are trained on the images."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from haste.cli.shared import Commands, plan_of, plan_to_compute, shards
from haste.config import EVALUATION

if TYPE_CHECKING:
    from haste.plan.plan import Plan


def add(to: Commands) -> None:
    """Add these commands."""
    images = to.rule("images", _images, "prepare the images: a store of uint8 RGB crops")
    which = shards(images)
    which.add_argument("--check", action="store_true", help="only list the pictures that cannot be used")
    which.add_argument("--update", action="store_true", help="use what was added, removed or changed, under a new name")
    images.add_argument("--evaluation", action="store_true", help="of the images that only measures see")
    images.add_argument("--workers", type=int, help="pictures that are decoded at once (runtime.threads)")
    to.rule("autoencoder", _autoencoder, "train the small autoencoder")
    encoded = to.rule("latents", _latents, "encode the images: a store of latent means and standard deviations")
    which = encoded.add_mutually_exclusive_group()
    which.add_argument("--evaluation", action="store_true", help="of the images that only measures see")
    which.add_argument("--flipped", action="store_true", help="of training's images mirrored, for training.flip")
    shards(encoded)
    to.rule("text-encoder", _text_encoder, "train the small text encoder")
    said = to.rule("text", _text, "encode the captions: a store of the states of their tokens")
    said.add_argument("--evaluation", action="store_true", help="of the images that only measures see")
    shards(said)
    to.rule("teacher", _teacher, "train a small teacher").add_argument("name")
    targets = to.rule("targets", _targets, "keep a teacher's targets on disk")
    targets.add_argument("name")
    shards(targets).add_argument("--fit", action="store_true", help="fit the principal components of its features")
    detector = to.rule("detector", _detector, "train a small detector that the scores use")
    detector.add_argument("name", nargs="?", help="which one; the only one that is trained")


def _images(arguments: argparse.Namespace) -> None:
    from haste.data import jobs

    if arguments.update:
        jobs.update_images(plan_of(arguments))
        return
    plan = _about(plan_of(arguments), arguments)
    if arguments.check:
        jobs.check_images(plan, arguments.workers)
    else:
        jobs.make_images(plan, None if arguments.join else arguments.shard, arguments.workers)


def _about(plan: Plan, arguments: argparse.Namespace) -> Plan:
    if not arguments.evaluation:
        return plan
    if plan.data.evaluation is None:
        raise ValueError("--evaluation: the configuration has no section `evaluation`, with images for measures")
    return plan.of(EVALUATION)


def _latents(arguments: argparse.Namespace) -> None:
    from haste.data import jobs

    plan = (plan_of if arguments.join else plan_to_compute)(arguments)
    about = plan.mirrored if arguments.flipped else _about(plan, arguments)
    jobs.make_latents(about, None if arguments.join else arguments.shard)


def _text(arguments: argparse.Namespace) -> None:
    from haste.data import jobs

    plan = (plan_of if arguments.join else plan_to_compute)(arguments)
    jobs.make_text(_about(plan, arguments), None if arguments.join else arguments.shard)


def _autoencoder(arguments: argparse.Namespace) -> None:
    from haste.train import jobs

    jobs.train_autoencoder(plan_to_compute(arguments, gpu=False))


def _text_encoder(arguments: argparse.Namespace) -> None:
    from haste.train import jobs

    jobs.train_text_encoder(plan_to_compute(arguments, gpu=False))


def _teacher(arguments: argparse.Namespace) -> None:
    from haste.train import jobs

    jobs.train_teacher(plan_to_compute(arguments, gpu=False), arguments.name)


def _detector(arguments: argparse.Namespace) -> None:
    from haste.train import jobs

    jobs.train_detector(plan_to_compute(arguments, gpu=False), arguments.name)


def _targets(arguments: argparse.Namespace) -> None:
    from haste.teachers import targets

    plan = (plan_of if arguments.join else plan_to_compute)(arguments)
    if arguments.fit:
        targets.fit(plan, arguments.name)
    elif arguments.join:
        targets.join_shards(plan, arguments.name)
    else:
        targets.make_shard(plan, arguments.name, arguments.shard)
