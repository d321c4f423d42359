"""Commands that draw samples and judge them, and the report."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haste.cli.shared import AN_ID, Commands, plan_of, plan_to_compute, take_gpus
from haste.networks.layouts import LAYOUTS

if TYPE_CHECKING:
    from haste.plan.plan import Plan


def add(to: Commands) -> None:
    """Add these commands."""
    reference = to.rule("reference", _reference, "compute the features of the real images")
    reference.add_argument("--detector", help="name of a detector; all of the configuration")
    sample = to.rule("sample", _sample, "draw one shard of samples, with the features of all detectors")
    evaluate = to.rule("evaluate", _evaluate, "score a set of samples that the workflow drew")
    features = to.rule("features", _features, "compute a detector's features of one shard of samples that are there")
    floor = to.rule("floor", _floor, "score real images against real ones")
    reconstruct = to.rule("reconstruct", _reconstruct, "score decoded latents of real images against real ones")
    grid = to.rule("grid", _grid, "paint a grid of samples by class")
    for sub in (sample, evaluate, features, grid):
        sub.add_argument("draw", help="name of a set of samples")
    for sub in (sample, features):
        sub.add_argument("--shard", type=int, default=0, help="which shard, counted from 0")
    words = "also draw this shard, if it is missing, of later sets of samples that differ only in guidance"
    sample.add_argument("--together", action="store_true", help=f"{words}: with one network and noise, as workflows do")
    evaluate.add_argument("--detector", help="name of a detector; all of the configuration")
    features.add_argument("--detector", required=True, help="name of a detector of the configuration")
    for sub in (floor, reconstruct):
        sub.add_argument("--detector", help="name of a detector; the leading one")
    to.rule("report", _report, "write the report page and its tables")
    _add_score(to.command("score", _score, "score images from anywhere against a reference"))
    _add_draw(to.command("draw", _draw, "draw pictures from a state, or from a checkpoint from elsewhere"))


def _add_score(sub: argparse.ArgumentParser) -> None:
    images = "an .npz with arr_0, a folder or .zip of pictures, a folder of sample shards, an image or features store"
    sub.add_argument("samples", nargs="+", type=Path, help=f"images to score: {images}")
    sub.add_argument(
        "--reference",
        type=Path,
        metavar="REF",
        help="real images, as samples, or an .npz of statistics, such as ADM's VIRTUAL_imagenet256_labeled.npz; "
        "without it only scores that need none",
    )
    sub.add_argument(
        "--detector",
        action="append",
        metavar="NAME[=WEIGHTS]",
        help="the detector: a published one, with its weights file, or the folder of one trained here; again for more "
        "(inception)",
    )
    sub.add_argument("--weights", type=Path, metavar="FILE", help="weights file of the one detector")
    sub.add_argument(
        "--metrics", metavar="A,B", help="of fid, sfid, is, precision, recall, kid, clip (all that can be computed)"
    )
    words = "texts that the images are conditioned on, a line each, in order: CLIP score, by --detector clip[=FOLDER]"
    sub.add_argument("--prompts", type=Path, metavar="FILE", help=words)
    sub.add_argument("--features", type=Path, metavar="FOLDER", help="keep features here, and find them again")
    sub.add_argument("--save-reference", type=Path, metavar="FILE", help="write the reference's statistics, an .npz")
    sub.add_argument("--json", type=Path, metavar="FILE", help="write scores and all that decides comparability")
    sub.add_argument("--csv", type=Path, metavar="FILE", help="write a line for each set of samples")
    sub.add_argument("--compare", action="store_true", help="all sets side by side in one table")
    words = "make pictures RGB that are not, as the workflow does: upright, transparency on white (they are refused)"
    sub.add_argument("--convert", action="store_true", help=words)
    sub.add_argument("--batch", type=int, default=64, help="images that a detector sees at once (64)")
    words = "all (every GPU), auto, cpu, cuda, cuda:1, ... (auto: a GPU if there is one)"
    sub.add_argument("--device", default="auto", help=words)
    sub.add_argument("--seed", type=int, default=2020, help="of KID's subsets (2020, as torch-fidelity's)")


def _add_draw(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "file", help=f"a state, by its file or as TRAJECTORY/STEP, or a checkpoint that can be imported; {AN_ID}"
    )
    sub.add_argument("-c", "--config", help="configuration file (the one whose workflow made the state)")
    sub.add_argument("--class", type=int, action="append", dest="classes", help="of the pictures; again for more")
    sub.add_argument("--prompt", action="append", help="for a network that follows captions; again for more")
    sub.add_argument("--count", type=int, metavar="N", help="pictures in all (4 of each class or prompt, else 16)")
    sub.add_argument("--seed", type=int, help="picture i follows from seed and i (the sampling's seed: 0)")
    ways = "a way of the configuration, or a preset (the row's first; sde-250, of a DiT ddpm-250)"
    sub.add_argument("--sampling", metavar="NAME", help=ways)
    sub.add_argument("--guidance", type=float, metavar="W", help="scale of classifier-free guidance")
    sub.add_argument("--weights", choices=("ema", "model"), help="the averaged weights, or the raw ones (ema)")
    sub.add_argument("--decoder", metavar="VAE", help="folder or hub id of an AutoencoderKL (the configuration's)")
    where = "a grid as .png, an .npz, or the name of a folder for a PNG of each (drawn.png)"
    sub.add_argument("--out", type=Path, default=Path("drawn.png"), help=where)
    sub.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (auto: a GPU if there is one)")
    sub.add_argument("--layout", choices=LAYOUTS, help="the project whose layout it has; required for SiT's and DiT's")
    sub.add_argument("--model", help="the model in a checkpoint from elsewhere (that of its row or its weights)")


def _reference(arguments: argparse.Namespace) -> None:
    from haste.score import jobs

    plan = plan_to_compute(arguments)
    for name in [arguments.detector] if arguments.detector else plan.detectors:
        jobs.make_reference(plan, plan.detector_named(name))


def _sample(arguments: argparse.Namespace) -> None:
    from haste.score import jobs

    plan = plan_to_compute(arguments)
    jobs.sample(plan, plan.evaluation(arguments.draw), arguments.shard, together=arguments.together)


def _features(arguments: argparse.Namespace) -> None:
    from haste.score import jobs

    plan = plan_to_compute(arguments)
    jobs.extract_features(
        plan, plan.evaluation(arguments.draw), plan.detector_named(arguments.detector), arguments.shard
    )


def _evaluate(arguments: argparse.Namespace) -> None:
    from haste.score import jobs

    plan = plan_of(arguments)  # scores use all cores
    take_gpus(plan)
    evaluation = plan.evaluation(arguments.draw)
    names = [plan.detector_named(arguments.detector).name] if arguments.detector else list(plan.detectors)
    for name in names:
        jobs.judge(plan, evaluation, evaluation.judgement(name))
    _track(plan, evaluation, local=True)


def _floor(arguments: argparse.Namespace) -> None:
    from haste.score import jobs

    plan = plan_of(arguments)
    take_gpus(plan)
    jobs.floor_of(plan.detector_named(arguments.detector or plan.detector.name))


def _reconstruct(arguments: argparse.Namespace) -> None:
    from haste.score import reconstructions

    plan = plan_of(arguments)
    take_gpus(plan)
    reconstructions.make(plan, plan.detector_named(arguments.detector or plan.detector.name))


def _grid(arguments: argparse.Namespace) -> None:
    from haste.sampling import grids

    plan = plan_of(arguments)
    grids.paint_grid(plan, plan.evaluation(arguments.draw))


def _report(arguments: argparse.Namespace) -> None:
    from haste.report import page

    plan = plan_of(arguments)
    page.make(plan)
    _track(plan)


def _track(plan: Plan, *about: Any, **how: Any) -> None:
    """Give trackers what they lack. If they do not take it, a score or a page that is made is no worse for it."""
    from haste.train import trackers

    try:
        trackers.update(plan, *about, **how)
    except (ValueError, OSError) as error:
        logging.getLogger("haste.train").warning("%s. `haste track` writes what is missing", error)


def _draw(arguments: argparse.Namespace) -> None:
    from haste import config
    from haste.networks.devices import device_named
    from haste.sampling import drawing

    classes, prompts = arguments.classes or [], arguments.prompt or []
    count = (4 * (len(classes) + len(prompts)) or 16) if arguments.count is None else arguments.count
    if count < 1:
        raise ValueError(f"--count: expected 1 or more, found {count}")
    drawing.check_out(arguments.out)
    asked = {name: getattr(arguments, name) for name in ("sampling", "guidance", "seed", "weights", "decoder")}
    asked |= {"layout": arguments.layout, "model": arguments.model, "device": device_named(arguments.device)}
    made = config.load(arguments.config) if arguments.config else None
    painter = drawing.painter_of_file(arguments.file, config=made, classes=classes, prompts=prompts, **asked)
    drawing.write(arguments.out, painter, count)
    print(f"{arguments.out}: {count} pictures")


def _score(arguments: argparse.Namespace) -> None:
    from haste.score import show
    from haste.score.images import Scorer, detectors_asked

    told = [] if arguments.prompts is None else ["clip"]
    named = arguments.detector or (["inception"] if told and arguments.reference else [])
    scorer = Scorer(
        arguments.reference,
        detectors=detectors_asked(named, arguments.weights, arguments.device, told),
        metrics=None if arguments.metrics is None else arguments.metrics.split(","),
        features=arguments.features,
        prompts=arguments.prompts,
        batch=arguments.batch,
        device=arguments.device,
        seed=arguments.seed,
        convert=arguments.convert,
    )
    if arguments.save_reference is not None and arguments.reference is None:
        raise ValueError("--save-reference: there is no --reference whose statistics could be saved")
    for samples in arguments.samples:
        scorer.check(samples)  # before the first is looked at
    found = []
    for samples in arguments.samples:
        found.append(scorer(samples))
        if not arguments.compare:
            show.table(found[-1:])
        show.write(found, json=arguments.json, csv_file=arguments.csv)  # what is finished is not lost
    if arguments.compare:
        show.table(found)
    if arguments.save_reference is not None:
        scorer.save_reference(arguments.save_reference)
