"""The command `haste`: one subcommand a rule of the workflow, and a few for people.

Exit codes: 0 done, 2 refused (bad input; one message, no traceback, nothing lost), 1 a fault of ours (traceback).
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from haste import plan as plans
    from haste.data.latents import Autoencoder
    from haste.data.prepare import Bad, Source
    from haste.data.store import Store
    from haste.metrics.detectors import Detector
    from haste.plan import Artefact, Evaluation, Judgement, Plan
    from haste.sample import Painter

DEFAULT_CONFIG = "config/digits.yaml"
MOST_IMAGES = 50_000  # what a network that trains in minutes looks at


def main(argv: list[str] | None = None) -> int:
    """Parse, run, and turn refusals into messages. Returns the exit code."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    for noisy in ("httpx", "matplotlib", "PIL"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    _mark(arguments)
    try:
        arguments.run(arguments)
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("HASTE_TRACEBACK"):
            raise
        print(f"haste {arguments.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from what is saved", file=sys.stderr)
        return 130
    return 0


def _mark(arguments: argparse.Namespace) -> None:
    """Note which job of a cluster works for which stage of a workflow.

    Who only waits for another job, and the report, which Snakemake makes itself, may be in the job that Snakemake runs
    in: its hours are no stage's.
    """
    file, command = getattr(arguments, "config", None), arguments.command
    beside = command == "report" or getattr(arguments, "slurm", None) is not None
    if "SLURM_JOB_ID" not in os.environ or not isinstance(file, str) or beside:
        return
    from haste.cluster import accounting

    stage = {"evaluate": "score", "targets": "pca" if getattr(arguments, "fit", False) else "targets"}
    accounting.mark(file, stage.get(command, command))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="haste",
        description="Diffusion transformers trained with representation alignment that stops at the right moment.",
        epilog="Set HASTE_TRACEBACK=1 to see where a refusal comes from.",
    )
    to = _Commands(parser.add_subparsers(dest="command", required=True, metavar="COMMAND"))
    _commands_for_people(to)
    _exchange_commands(to.command)
    _data_commands(to)
    _training_commands(to)
    _judging_commands(to)
    _score_arguments(to.command("score", _score, "score images from anywhere against a reference"))
    return parser


class _Commands:
    """Adds subcommands, each with the function that it runs."""

    def __init__(self, commands: Any):
        self.commands = commands

    def command(self, name: str, run: Callable[[argparse.Namespace], None], words: str) -> argparse.ArgumentParser:
        sub = self.commands.add_parser(name, help=words, description=words[0].upper() + words[1:] + ".")
        sub.set_defaults(run=run)
        return sub

    def rule(self, name: str, run: Callable[[argparse.Namespace], None], words: str) -> argparse.ArgumentParser:
        """A subcommand that works on one configuration."""
        sub = self.command(name, run, words)
        sub.add_argument("-c", "--config", default=DEFAULT_CONFIG, help=f"configuration file ({DEFAULT_CONFIG})")
        return sub


def _shards(sub: argparse.ArgumentParser) -> Any:
    """Ask which part of a store to make; returns the group, for further parts."""
    part = sub.add_mutually_exclusive_group(required=True)
    part.add_argument("--shard", type=int, help="make this shard, counted from 0")
    part.add_argument("--join", action="store_true", help="check all shards and write the manifest")
    return part


def _commands_for_people(to: _Commands) -> None:
    to.rule("plan", _plan, "say what will run, how long, and how much disk, before anything runs")
    live = to.rule("status", _status, "say what every run is doing now")
    live.add_argument("-w", "--watch", nargs="?", type=float, const=5.0, metavar="SECONDS", help="look again and again")
    forget = to.rule("forget", _forget, "remove what only one run needs")
    forget.add_argument("name", metavar="RUN")
    clear = to.command("prune", _prune, "remove what no configuration needs")
    clear.add_argument("-c", "--config", nargs="+", default=[DEFAULT_CONFIG], help="configuration files to keep")
    for sub in (forget, clear):
        sub.add_argument("--yes", action="store_true", help="do it; without this, only say what would go")
    what = "state, store, samples, grid, score, part, report or configuration"
    to.command("show", _show, f"say how a file was made: {what}").add_argument("file", type=Path)
    to.rule("table", _table, "print the result table of a finished report")


def _data_commands(to: _Commands) -> None:
    images = to.rule("images", _images, "prepare the images: a store of uint8 RGB crops")
    _shards(images).add_argument("--check", action="store_true", help="only list the pictures that cannot be used")
    images.add_argument("--workers", type=int, help="pictures that are decoded at once (runtime.threads)")
    to.rule("autoencoder", _autoencoder, "train the small autoencoder")
    _shards(to.rule("latents", _latents, "encode the images: a store of latent means and standard deviations"))
    to.rule("teacher", _teacher, "train a small teacher").add_argument("name")
    targets = to.rule("targets", _targets, "keep a teacher's targets on disk")
    targets.add_argument("name")
    _shards(targets).add_argument("--fit", action="store_true", help="fit the principal components of its features")
    detector = to.rule("detector", _detector, "train a small detector that the scores use")
    detector.add_argument("name", nargs="?", help="which one; the only one that is trained")


def _training_commands(to: _Commands) -> None:
    train = to.rule("train", _train, "train up to a state, continuing from the newest one on the way")
    train.add_argument("state", help="TRAJECTORY/STEP")
    slurm = "as a job of the SLURM cluster with these resources (docs/slurm.md): submit it, or attach to the one there"
    train.add_argument("--slurm", nargs="*", metavar="KEY=VALUE", help=slurm)
    train.add_argument("--terminal", type=int, metavar="FD", help="file descriptor to tell a person on what happens")
    to.rule("fetch", _fetch, "load weights that the configuration names by hub id into this machine's caches")
    cancel = to.rule("cancel", _cancel, "end the cluster's training jobs of a run; what is saved stays")
    cancel.add_argument("name", help="a run of the configuration, or TRAJECTORY/STEP")


def _judging_commands(to: _Commands) -> None:
    to.rule("reference", _reference, "compute the features of the real images")
    sample = to.rule("sample", _sample, "draw one shard of samples, with the features of all detectors")
    evaluate = to.rule("evaluate", _evaluate, "score a set of samples that the workflow drew")
    features = to.rule("features", _features, "compute a detector's features of one shard of samples that are there")
    floor = to.rule("floor", _floor, "score real images against real ones")
    grid = to.rule("grid", _grid, "paint a grid of samples by class")
    for sub in (sample, evaluate, features, grid):
        sub.add_argument("draw", help="name of a set of samples")
    for sub in (sample, features):
        sub.add_argument("--shard", type=int, default=0, help="which shard, counted from 0")
    evaluate.add_argument("--detector", help="name of a detector; all of the configuration")
    features.add_argument("--detector", required=True, help="name of a detector of the configuration")
    floor.add_argument("--detector", help="name of a detector; the leading one")
    to.rule("report", _report, "write the report page and its tables")


def _exchange_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    took = command("import", _import, "make a checkpoint of REPA, HASTE, SiT or this package a file of weights of ours")
    took.add_argument("file", type=Path, help="a .pt of REPA, HASTE or SiT, or a state")
    took.add_argument("out", type=Path, help="the .safetensors file to write")
    took.add_argument("--layout", choices=("ours", "REPA", "SiT"), help="whose file it is; SiT's must be told")
    size = took.add_mutually_exclusive_group()
    size.add_argument("--model", help="what the weights must be, such as SiT-XL/2")
    size.add_argument("--heads", type=int, help="attention heads, for sizes that were not published")
    took.add_argument("--input-size", type=int, help="side of the latent grid, where the file does not show it")
    gave = command("export", _export, "write the weights of a state for other programs")
    gave.add_argument("file", type=Path, help="a state, or any file that can be imported")
    gave.add_argument("out", type=Path, help="the file to write")
    gave.add_argument("--format", choices=("safetensors", "repa"), required=True, help="bare weights, or REPA's .pt")
    gave.add_argument("--weights", choices=("ema", "model"), default="ema", help="which, for safetensors (ema)")


def _score_arguments(sub: argparse.ArgumentParser) -> None:
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
        help="who looks: a published detector, with its weights file, or the folder of one trained here; again for "
        "more (inception)",
    )
    sub.add_argument("--weights", type=Path, metavar="FILE", help="weights file of the one detector")
    sub.add_argument("--metrics", metavar="A,B", help="of fid, sfid, is, precision, recall, kid (all that can be had)")
    sub.add_argument("--features", type=Path, metavar="FOLDER", help="keep features here, and find them again")
    sub.add_argument("--save-reference", type=Path, metavar="FILE", help="write the reference's statistics, an .npz")
    sub.add_argument("--json", type=Path, metavar="FILE", help="write scores and all that decides comparability")
    sub.add_argument("--csv", type=Path, metavar="FILE", help="write a line for each set of samples")
    sub.add_argument("--compare", action="store_true", help="all sets side by side in one table")
    sub.add_argument("--batch", type=int, default=64, help="images that a detector sees at once (64)")
    sub.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (auto: a GPU if there is one)")
    sub.add_argument("--seed", type=int, default=2020, help="of KID's subsets (2020, as torch-fidelity's)")


# Heavy imports live inside the commands, so that `haste plan` and `haste --help` answer at once.


def _plan_of(arguments: argparse.Namespace) -> Plan:
    from haste import config
    from haste.plan import Plan

    return Plan(config.load(arguments.config))


def _threads(plan: Plan) -> None:
    import torch

    torch.set_num_threads(plan.config.runtime.threads)


def _plan(arguments: argparse.Namespace) -> None:
    from haste import status

    status.print_plan(_plan_of(arguments))


def _status(arguments: argparse.Namespace) -> None:
    from haste import live

    live.show(lambda: _plan_of(arguments), arguments.watch)


def _forget(arguments: argparse.Namespace) -> None:
    from haste import config, prune

    prune.forget(config.load(arguments.config), arguments.name, arguments.yes)


def _prune(arguments: argparse.Namespace) -> None:
    from haste import config, prune

    prune.prune([config.load(path) for path in arguments.config], arguments.yes)


def _show(arguments: argparse.Namespace) -> None:
    from haste import status

    status.print_provenance(arguments.file)


def _import(arguments: argparse.Namespace) -> None:
    from haste import exchange
    from haste.config import MODELS

    if arguments.model is not None and arguments.model not in MODELS:
        raise ValueError(f"--model {arguments.model!r}: expected one of {', '.join(MODELS)}")
    model = MODELS.get(arguments.model)
    options = {"layout": arguments.layout, "heads": arguments.heads, "input_size": arguments.input_size}
    found = exchange.import_weights(arguments.file, arguments.out, model=model, **options)
    shape = ", ".join(f"{name} {value:g}" for name, value in found.shape.items())
    print(f"{arguments.out}: {' and '.join(found.weights)} of {arguments.file} ({found.layout}'s layout; {shape})")


def _export(arguments: argparse.Namespace) -> None:
    from haste import exchange

    exchange.export_weights(arguments.file, arguments.out, form=arguments.format, which=arguments.weights)
    print(f"{arguments.out}: written")


def _table(arguments: argparse.Namespace) -> None:
    from haste import gather
    from haste.report import page

    plan = _plan_of(arguments)
    print(page.text(gather.report(plan)))
    print(f"Report: {plan.report}")


def _images(arguments: argparse.Namespace) -> None:
    from haste import artefact
    from haste.data import prepare

    plan = _plan_of(arguments)
    store, workers = plan.images, _workers(plan, arguments.workers)
    if arguments.check:
        _check_images(plan, workers)
        return
    source, skipped = _source(plan)
    common: dict[str, Any] = {"key": store.key, "recipe": store.recipe, "shards": store.shards}
    made = artefact.provenance(key=store.key, recipe=store.recipe)
    if arguments.join:
        prepare.prepare_join(store.folder, source, **common, provenance=made, skipped=skipped)
    else:
        prepare.prepare_shard(store.folder, source, **common, shard=arguments.shard, provenance=made, workers=workers)


def _source(plan: Plan, without: Bad | None = None) -> tuple[Source, Bad | None]:
    """The pictures, and those that are left out where this is asked for (after `--check` has found them)."""
    from haste import listing
    from haste.data import prepare

    spec, options = plan.config.images, dict[str, Any]()
    if plan.checked_images and without is None:
        without = prepare.read_checked(plan.checked_images, _source(plan, without=[])[0])
    if spec.path is not None:
        options = {"path": spec.path} | ({"without": frozenset(name for name, _ in without)} if without else {})
    source = prepare.open_source(
        spec.source, resolution=spec.resolution, holdout=spec.holdout, labelled=bool(spec.classes), **options
    )
    listing.check_classes(spec.path or spec.source, source.classes, spec.classes)
    return source, without


def _workers(plan: Plan, asked: int | None) -> int:
    """How many pictures are decoded at once, which changes nothing but the time it takes."""
    if asked is not None and asked < 1:
        raise ValueError(f"--workers {asked}: expected at least 1")
    return asked or plan.config.runtime.threads


def _check_images(plan: Plan, workers: int) -> None:
    from haste.data import prepare

    source = _source(plan, without=[])[0]
    if not isinstance(source, prepare.Folder):
        raise ValueError(f"images: {plan.config.images.source} are read as they are, there is nothing to check")
    bad = prepare.check(source, workers, progress=_progress("pictures checked"))
    print(prepare.told(bad) if bad else f"all {source.count} pictures can be used")
    if plan.checked_images:
        prepare.write_checked(plan.checked_images, source, bad, key=plan.images.key)


def _progress(what: str) -> Callable[[int, int], None]:
    log = logging.getLogger("haste")
    return lambda done, count: log.info("%s: %d of %d", what, done, count) if done % 6400 < 64 else None


def _autoencoder(arguments: argparse.Namespace) -> None:
    from haste.train import parts

    plan = _plan_of(arguments)
    part, trained = plan.autoencoder, plan.config.autoencoder.trained
    if part is None or trained is None:
        raise ValueError("autoencoder: this configuration uses a pretrained one, there is nothing to train")
    _threads(plan)
    data = _training_images(plan)
    images = {name: data[name] for name in ("images", "held_out")}
    parts.train_autoencoder(**images, **trained.model_dump(), **_about(part))


def _teacher(arguments: argparse.Namespace) -> None:
    from haste.train import parts

    plan = _plan_of(arguments)
    part = plan.teachers.get(arguments.name)
    if part is None:
        raise ValueError(f"teacher {arguments.name!r}: not one that this configuration trains")
    trained = plan.config.teachers[arguments.name].trained
    assert trained is not None
    _threads(plan)
    parts.train_teacher(**_training_images(plan), **trained.model_dump(), **_about(part))


def _targets(arguments: argparse.Namespace) -> None:
    from haste.train import targets

    plan = _plan_of(arguments)
    _threads(plan)
    if arguments.fit:
        targets.fit(plan, arguments.name)
    elif arguments.join:
        targets.join_shards(plan, arguments.name)
    else:
        targets.make_shard(plan, arguments.name, arguments.shard)


def _detector(arguments: argparse.Namespace) -> None:
    from haste.train import parts

    plan = _plan_of(arguments)
    mine = {name: detector.part for name, detector in plan.detectors.items() if detector.part}
    name = arguments.name or (next(iter(mine)) if len(mine) == 1 else None)
    if name not in mine:
        found = "no name" if name is None else f"{name!r}"
        raise ValueError(f"detector: {found} given, expected one that is trained here: {', '.join(mine) or 'none is'}")
    trained = plan.config.detector[name].trained
    assert trained is not None
    _threads(plan)
    turns = not plan.config.images.classes
    parts.train_detector(**_training_images(plan), **trained.model_dump(), **_about(mine[name]), turns=turns)


def _about(part: Artefact) -> dict[str, Any]:
    return {"out": Path(part.folder), "name": part.name, "key": part.key, "recipe": part.recipe}


def _training_images(plan: Plan) -> dict[str, Any]:
    """Images in memory for the small networks: all of a small set, evenly spaced ones of a large set."""
    from haste.train.parts import quarter_turns

    store, found = _open(plan.images), {}
    for split, images, labels in (("train", "images", "labels"), ("held_out", "held_out", "held_out_labels")):
        rows = _spread(store.range(split))
        found[images], found[labels] = store.read("image", rows), store.read("label", rows)
        if not plan.config.images.classes:  # without labels, a task that needs none
            found[images], found[labels] = quarter_turns(found[images])
    return found


def _spread(rows: range) -> range:
    return rows[:: -(-len(rows) // MOST_IMAGES) or 1]


def _open(made: Artefact) -> Store:
    from haste.data.store import Store

    return Store.open(made.folder, kind=made.kind, key=made.key, recipe=made.recipe)


def _latents(arguments: argparse.Namespace) -> None:
    from haste import artefact
    from haste.data import latents
    from haste.train.distributed import choose_device

    plan = _plan_of(arguments)
    _threads(plan)
    store, images = plan.latents, _open(plan.images)
    made = artefact.provenance(key=store.key, recipe=store.recipe, inputs={"images": images.identity})
    common: dict[str, Any] = {"key": store.key, "recipe": store.recipe, "shards": store.shards, "provenance": made}
    if arguments.join:
        latents.encode_join(store.folder, images, **common)
        return
    spec = plan.config.autoencoder
    encoder = latents.Autoencoder.load(plan.encoder, device=str(choose_device(plan.config.runtime.device, 0)))
    _check_autoencoder(plan, encoder)
    latents.encode_shard(store.folder, images, encoder, **common, shard=arguments.shard, dtype=spec.dtype)


def _check_autoencoder(plan: Plan, autoencoder: Autoencoder) -> None:
    spec = plan.config.autoencoder
    if (autoencoder.channels, autoencoder.factor) != (spec.channels, spec.factor):
        raise ValueError(
            f"autoencoder: has {autoencoder.channels} channels and factor {autoencoder.factor}, "
            f"the configuration says {spec.channels} and {spec.factor}"
        )


def _train(arguments: argparse.Namespace) -> None:
    plan = _plan_of(arguments)
    if arguments.slurm is not None:
        from haste.cluster import job, waiter

        try:
            waiter.make(plan, plan.parse(arguments.state), job.resources(arguments.slurm), arguments.terminal)
        except waiter.Detached as left:
            print(f"haste train: {left}", file=sys.stderr)
            sys.exit(130)
        return
    from haste.train.launch import launch

    launch(plan, plan.parse(arguments.state))


def _fetch(arguments: argparse.Namespace) -> None:
    from haste.cluster.fetch import fetch

    line = ""
    for line in fetch(_plan_of(arguments)):
        print(line, flush=True)
    if not line:
        print("nothing to fetch: the configuration names no weights by hub id")


def _cancel(arguments: argparse.Namespace) -> None:
    from haste.cluster import queue

    for line in queue.cancel(_plan_of(arguments), arguments.name):
        print(line)


def _load_detector(plan: Plan, detector: plans.Detector) -> Detector:
    from haste.metrics.detectors import open_detector
    from haste.train.distributed import choose_device

    device = choose_device(plan.config.runtime.device, 0)
    return open_detector(detector.opens, detector.weights, called=detector.name, device=device)


def _detector_named(plan: Plan, name: str) -> plans.Detector:
    if name not in plan.detectors:
        raise ValueError(f"detector {name!r}: not in this configuration, which has {', '.join(plan.detectors)}")
    return plan.detectors[name]


def _reference(arguments: argparse.Namespace) -> None:
    from haste import artefact
    from haste.data import store
    from haste.sample import reference_of_file, reference_shard

    plan = _plan_of(arguments)
    _threads(plan)
    for detector in plan.detectors.values():
        made = detector.reference
        if Path(made.manifest).exists():
            continue
        common: dict[str, Any] = {"key": made.key, "recipe": made.recipe}
        judge, folder = _load_detector(plan, detector), Path(made.folder)
        if detector.reference_file is None:
            reference_shard(_open(plan.images), judge, folder=folder, **common)
        else:
            reference_of_file(Path(detector.reference_file), judge, folder=folder, **common)
        provenance = artefact.provenance(**common)
        store.join(made.folder, kind="features", shards=1, splits={}, provenance=provenance, **common)


def _evaluation(plan: Plan, name: str) -> Evaluation:
    if name not in plan.evaluations:
        raise ValueError(
            f"samples {name!r}: not in this configuration, which has {', '.join(sorted(plan.evaluations))}"
        )
    return plan.evaluations[name]


def _sample(arguments: argparse.Namespace) -> None:
    from haste.data import drawn
    from haste.data.store import shard_range
    from haste.sample import draw_shard
    from haste.train.state import weights_identity

    plan = _plan_of(arguments)
    _threads(plan)
    evaluation = _evaluation(plan, arguments.draw)
    painter = _painter(plan, evaluation)
    draw_shard(
        painter,
        path=Path(evaluation.sample_file(arguments.shard)),
        key=evaluation.key,
        recipe=evaluation.recipe,
        shard=arguments.shard,
        shards=evaluation.shards,
        batch=plan.config.runtime.sample_batch,
        inputs={"weights": weights_identity(painter.model), "autoencoder": painter.autoencoder.identity},
    )
    for name in plan.detectors:
        _look(plan, evaluation, name, arguments.shard)
    # Not before: a workflow that is killed between the two throws the shard away and calls this again.
    mine = shard_range(evaluation.sampling.count, arguments.shard, evaluation.shards)
    drawn.forget(drawn.folder_of(Path(evaluation.folder)), mine)


def _features(arguments: argparse.Namespace) -> None:
    plan = _plan_of(arguments)
    _threads(plan)
    _look(plan, _evaluation(plan, arguments.draw), _detector_named(plan, arguments.detector).name, arguments.shard)


def _look(plan: Plan, evaluation: Evaluation, detector: str, shard: int) -> None:
    """Let a detector look at one shard of samples."""
    from haste.sample import feature_shard

    made = evaluation.judgement(detector).features
    feature_shard(
        _load_detector(plan, plan.detectors[detector]),
        Path(evaluation.sample_file(shard)),
        folder=Path(made.folder),
        key=made.key,
        recipe=made.recipe,
        shard=shard,
        shards=made.shards,
        total=evaluation.sampling.count,
        batch=plan.config.runtime.sample_batch,
    )


def _painter(plan: Plan, evaluation: Evaluation) -> Painter:
    """What draws an evaluation's samples: its model and decoder, and the scale of the model's latents."""
    from haste.data.latents import Autoencoder
    from haste.sample import Painter
    from haste.train.distributed import choose_device
    from haste.train.state import ema_model

    device = choose_device(plan.config.runtime.device, 0)
    trajectory = plan.trajectories[evaluation.state.trajectory]
    decoder = Autoencoder.load(plan.decoder, device=str(device))
    path = trajectory.recipe["training"]["path"]
    if trajectory.name in plan.elsewhere:
        from haste.exchange import model_elsewhere

        _check_autoencoder(plan, decoder)
        model = model_elsewhere(plan, trajectory.name).to(device)
        return Painter(model, evaluation.sampling, decoder, path, decoder.scale, decoder.shift)
    model, header = ema_model(plan.path(evaluation.state), key=trajectory.key)
    manifest = _open(plan.latents).manifest
    _check_same_latents(plan, header, manifest, decoder)
    return Painter(model.to(device), evaluation.sampling, decoder, path, manifest["scale"], manifest["shift"])


def _check_same_latents(plan: Plan, header: dict[str, Any], manifest: dict[str, Any], decoder: Autoencoder) -> None:
    """A state is sampled with the latents' scale and the decoder that it was trained for, or not at all."""
    trained, found = header["inputs"]["latents"], manifest["identity"]
    if trained != found:
        raise ValueError(
            f"{plan.latents.folder}: holds latents {found[:12]}, but the state was trained on {trained[:12]}"
        )
    if plan.decoder == plan.encoder and decoder.identity != manifest["autoencoder"]:
        raise ValueError(
            f"{plan.decoder}: its weights are {decoder.identity[:12]}, but the latents were encoded with "
            f"{manifest['autoencoder'][:12]}"
        )


def _evaluate(arguments: argparse.Namespace) -> None:
    plan = _plan_of(arguments)
    evaluation = _evaluation(plan, arguments.draw)
    names = [_detector_named(plan, arguments.detector).name] if arguments.detector else list(plan.detectors)
    for name in names:
        _judge(plan, evaluation, evaluation.judgement(name))


def _judge(plan: Plan, evaluation: Evaluation, judgement: Judgement) -> None:
    """Score a set of samples by what one detector sees in them."""
    from haste import artefact
    from haste.data import drawn, store
    from haste.diffusion.samplers import nfe
    from haste.score import score

    features, detector = judgement.features, judgement.detector
    common: dict[str, Any] = {"key": features.key, "recipe": features.recipe, "shards": features.shards}
    provenance = artefact.provenance(key=features.key, recipe=features.recipe)
    store.join(features.folder, kind="features", splits={}, provenance=provenance, **common)
    state, sampling = evaluation.state, evaluation.sampling
    counted = drawn.mean_nfe([evaluation.sample_file(shard) for shard in range(features.shards)])
    drawn.close(drawn.folder_of(Path(evaluation.folder)))
    elsewhere = plan.elsewhere.get(state.trajectory)
    whose: dict[str, Any] = {"trajectory": state.trajectory, "step": state.step, "file": plan.path(state)}
    if elsewhere:
        whose |= {"step": elsewhere.step, "sha256": plan.identity_of(elsewhere.checkpoint)}
    weights = elsewhere.weights if elsewhere else "ema"
    said = {"name": evaluation.sampling_name, "weights": weights, "decoder": evaluation.recipe["decoder"]}
    about = {
        "state": whose,
        "sampling": {**sampling.model_dump(), **said},
        "nfe": nfe(sampling.sampler, sampling.steps) if counted is None else counted,
    }
    path = Path(judgement.score)
    score(_open(features), _open(detector.reference), detector=detector.name, about=about, key=path.stem, path=path)


def _score(arguments: argparse.Namespace) -> None:
    from haste.score import Scorer, show

    device = _device(arguments.device)
    scorer = Scorer(
        arguments.reference,
        detectors=_detectors_asked(arguments, device),
        metrics=None if arguments.metrics is None else arguments.metrics.split(","),
        features=arguments.features,
        batch=arguments.batch,
        device=device,
        seed=arguments.seed,
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


def _device(name: str) -> str:
    """A device that is there. Raises ValueError for one that is not."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device: {name!r} is not there: {str(error).splitlines()[0]}") from error
    return name


def _detectors_asked(arguments: argparse.Namespace, device: str) -> list[Detector] | None:
    from haste.metrics.detectors import open_detector

    asked = [name.partition("=")[::2] for name in arguments.detector or []]
    if arguments.weights is not None:
        if len(asked) > 1 or any(weights for _, weights in asked):
            raise ValueError("--weights: is for one detector without weights of its own, see --detector NAME=WEIGHTS")
        asked = [(asked[0][0] if asked else "inception", str(arguments.weights))]
    return [open_detector(name, weights or None, device=device) for name, weights in asked] or None


def _floor(arguments: argparse.Namespace) -> None:
    from haste import artefact
    from haste.score import floor

    plan = _plan_of(arguments)
    detector = _detector_named(plan, arguments.detector or plan.detector.name)
    path, part = Path(detector.floor), detector.part
    accuracy = None
    if part:
        made = artefact.read_json(part.manifest, "part")
        artefact.check_entries(part.manifest, made, quality=dict)
        accuracy = made["quality"].get("accuracy")
    floor(_open(detector.reference), detector=detector.name, held_out_accuracy=accuracy, key=path.stem, path=path)


def _grid(arguments: argparse.Namespace) -> None:
    from haste import gather

    plan = _plan_of(arguments)
    gather.paint_grid(plan, _evaluation(plan, arguments.draw))


def _report(arguments: argparse.Namespace) -> None:
    from haste import artefact, gather
    from haste.cluster import accounting
    from haste.report import page

    plan = _plan_of(arguments)
    accounting.update(plan)
    found = gather.report(plan)
    folder = Path(plan.report).parent
    header = {"schema": artefact.SCHEMA, "kind": "report", "configuration": plan.config.model_dump(mode="json")}
    page.write(found, folder)
    for old in folder.glob("made-*.json"):
        old.unlink()
    artefact.write_json(plan.report_made, {**header, "provenance": found.provenance})


if __name__ == "__main__":
    sys.exit(main())
