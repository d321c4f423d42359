"""The functions behind the rules on images, latents and texts, for a plan. Only what encodes imports torch."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL

from haste.config import condition_entry, condition_in
from haste.data import prepare
from haste.data.prepare import Bad, Source
from haste.files import artefact, listing, locks, walk
from haste.files.sources import SourceRecord
from haste.files.store import Store, join, shard_range, write_shard
from haste.files.texts import Texts
from haste.networks.autoencoder import check_size
from haste.plan.plan import Plan

if TYPE_CHECKING:
    from haste.data.latents import Autoencoder

_TEXTS = 64  # that are encoded at once


def make_images(plan: Plan, shard: int | None, workers: int | None = None) -> None:
    """Write one shard of the images or, without one, check all shards and write the manifest.

    Args:
        plan: of the configuration.
        shard: which one, counted from 0.
        workers: images decoded at once; None is `runtime.threads`.

    Raises:
        ValueError: images that cannot be used; or as `haste.data.prepare`.
    """
    store, workers = plan.images, _workers(plan, workers)
    plan.data.check_source()
    source, skipped = _source(plan)
    common: dict[str, Any] = {"key": store.key, "recipe": store.recipe, "shards": store.shards}
    made = artefact.provenance(key=store.key, recipe=store.recipe)
    if shard is None:
        manifest = prepare.prepare_join(store.folder, source, **common, provenance=made, skipped=skipped)
        _record_source(plan, manifest["identity"])
    else:
        how: dict[str, Any] = {"workers": workers, "stored_as": plan.config.images.stored_as}
        prepare.prepare_shard(store.folder, source, **common, shard=shard, provenance=made, **how)


def _record_source(plan: Plan, identity: str) -> None:
    """Record what the finished store was made from; refuse one that is made again from pixels that were edited."""
    try:
        plan.data.record_source(identity, f"Pillow {PIL.__version__}")
    except ValueError:
        Path(plan.images.manifest).unlink()  # nothing may be made from it
        raise


def update_images(plan: Plan) -> None:
    """Take up what the images' source holds now, under a new name, and print what that means.

    Raises:
        ValueError: as `haste.plan.data.Data.update_source`.
    """
    changing = [(one, one.data.source) for one in plan.image_sets if one.data.source]
    if not changing:
        raise ValueError(f"images: {plan.data.where} are no files that could change")
    with locks.holding(f"{plan.root}/.lock", f"The results folder {plan.root}"):  # names change under no workflow
        for one, source in changing:
            _adopt_first(one, source)
            print(one.data.update_source())


def _adopt_first(plan: Plan, record: SourceRecord) -> None:
    """Record what the first store was made from, if it is older than such records and the source holds just that."""
    manifest = Path(plan.root, "stores", record.name, "manifest.json")
    if not manifest.exists() or (record.read() or {"first": "unknown"})["first"] != "unknown":
        return
    made = artefact.read_json(manifest, "store")
    with contextlib.suppress(ValueError):  # other pictures, or other classes
        source, _ = _source(plan, without=made.get("skipped", []))
        if source.listing == made["listing"]:
            record.adopt(plan.data.where, plan.data.held, made["identity"])


def check_images(plan: Plan, workers: int | None = None) -> None:
    """Print which images cannot be used, and write the list if these are to be left out.

    Raises:
        ValueError: the source has no image files to check.
    """
    if plan.checked_images:
        plan.data.check_source()
    workers, source = _workers(plan, workers), _source(plan, without=[])[0]
    if not isinstance(source, prepare.Folder):
        raise ValueError(f"images: {plan.config.images.source} are read as they are, there is nothing to check")
    kept = plan.checked_images
    with locks.making(kept, anew=True) if kept else contextlib.nullcontext(True) as todo:
        if not todo:
            return
        bad = prepare.check(source, workers)
        print(prepare.told(bad) if bad else f"all {source.count} pictures can be used")
        if source.unused:
            print(walk.told(walk.grouped(source.unused)))
        if kept:
            prepare.write_checked(kept, source, bad, key=plan.images.key)


def _source(plan: Plan, without: Bad | None = None) -> tuple[Source, Bad | None]:
    """The source of the images, without unusable ones if the configuration says so (after `--check` has found them)."""
    spec, options = plan.config.images, dict[str, Any]()
    if plan.checked_images and without is None:
        without = prepare.read_checked(plan.checked_images, _source(plan, without=[])[0])
    if spec.path is not None:
        options = {"path": spec.path, "classes": spec.classes, "labels": spec.labels, "crop": spec.crop}
        options |= {"captions": spec.captions, "reader": spec.reader}
        options |= {"without": frozenset(name for name, _ in without)} if without else {}
    source = prepare.open_source(
        spec.source,
        resolution=spec.resolution,
        holdout=spec.holdout,
        labelled=bool(spec.classes),
        subset=spec.subset,
        **options,
    )
    listing.check_classes(spec.path or spec.source, source.classes, spec.classes)
    return source, without


def _workers(plan: Plan, asked: int | None) -> int:
    """How many images are decoded at once, which only affects the time."""
    if asked is not None and asked < 1:
        raise ValueError(f"--workers {asked}: expected at least 1")
    return asked or plan.config.runtime.threads


def make_latents(plan: Plan, shard: int | None) -> None:
    """Encode one shard of the images or, without one, check all shards and write the manifest.

    Raises:
        ValueError: the autoencoder does not match the configuration; or as `haste.data.latents`.
    """
    store, images = plan.latents, Store.of(plan.images)
    made = artefact.provenance(key=store.key, recipe=store.recipe, inputs={"images": images.identity})
    common: dict[str, Any] = {"key": store.key, "recipe": store.recipe, "shards": store.shards, "provenance": made}
    if shard is None:
        join_latents(store.folder, images, **common)
        return
    from haste.data import latents
    from haste.networks.devices import choose_device

    encoder = latents.Autoencoder.load(plan.encoder, device=str(choose_device(plan.config.runtime.device)))
    check_autoencoder(plan, encoder)
    common |= {"condition": condition_in(condition_entry(plan.config)), "dtype": plan.config.autoencoder.dtype}
    common |= {"flipped": store.recipe.get("flipped", False)}
    latents.encode_shard(store.folder, images, encoder, **common, shard=shard)


def join_latents(
    folder: Path | str,
    images: Store,
    *,
    key: str,
    recipe: Mapping[str, Any],
    shards: int,
    provenance: Mapping[str, Any],
) -> dict[str, Any]:
    """Join the shards of a latents store. No autoencoder is needed, because the shards record what made them.

    The manifest contains the images' splits, and besides the usual entries: classes, images and autoencoder
    (identities), channels, scale, shift, factor, size (h).

    Returns:
        The manifest.

    Raises:
        ValueError: a shard is missing, foreign, made from other images or by another autoencoder.
    """
    return join(
        folder,
        kind="latents",
        key=key,
        recipe=recipe,
        shards=shards,
        splits=images.manifest["splits"],
        provenance=provenance,
        expected_facts={"images": images.identity, "classes": images.manifest["classes"]},
    )


def make_text(plan: Plan, shard: int | None) -> None:
    """Encode one shard of the captions or, without one, check all shards and write the manifest.

    Its rows are the states of every caption, image by image, and then of the empty one.

    Raises:
        ValueError: there is nothing to make; or as `haste.data.text_encoder`.
    """
    store = plan.text
    if store is None:
        raise ValueError("condition: no states of texts are kept, expected captions with cache: true and an encoder")
    texts = Texts.of(plan.images)
    made = artefact.provenance(key=store.key, recipe=store.recipe, inputs={"captions": texts.sha256})
    common: dict[str, Any] = {"kind": store.kind, "key": store.key, "recipe": store.recipe, "shards": store.shards}
    if shard is None:
        splits = {"captions": [0, texts.count], "empty": [texts.count, texts.count + 1]}
        join(store.folder, **common, splits=splits, provenance=made, expected_facts={"captions": texts.sha256})
        return
    condition = condition_in(condition_entry(plan.config)).on(plan)
    said, encoder = [*texts.all(), ""], condition.encoder
    rows = shard_range(len(said), shard, store.shards)
    write_shard(
        store.folder,
        **common,
        shard=shard,
        total=len(said),
        fields={"states": (condition.shape, np.float16)},
        batches=({"states": encoder(said[low : min(low + _TEXTS, rows.stop)])} for low in rows[::_TEXTS]),
        provenance=made,
        facts={"captions": texts.sha256, "encoder": encoder.identities},
    )


def check_autoencoder(plan: Plan, autoencoder: Autoencoder) -> None:
    """Refuse an autoencoder whose channels or factor differ from the configuration.

    Raises:
        ValueError: names both.
    """
    check_size(autoencoder.channels, autoencoder.factor, plan.config.autoencoder)


def check_decoder(plan: Plan, decoder: Autoencoder, encoded: str) -> None:
    """Refuse the plan's decoder if it has other weights than latents were encoded with (`encoded`: the identity of
    these) although the configuration has one autoencoder for both.

    Raises:
        ValueError: names both.
    """
    if plan.decoder == plan.encoder and decoder.identity != encoded:
        raise ValueError(
            f"{plan.decoder}: its weights are {decoder.identity[:12]}, but the latents were encoded with {encoded[:12]}"
        )
