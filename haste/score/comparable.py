"""Why scores are not comparable with published ones, or mean nothing at all: one sentence per reason."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from haste.files import walk
from haste.networks.registry import REFERENCES

PUBLISHED = 50_000  # samples behind published scores
PUBLISHED_COCO = (30_000, 40_192, 40_504)  # by pytorch-fid: of U-ViT, of REPA's code, of all validation images
WIDTH = 2048  # width of Inception's features
PICTURES = 10_000  # under arr_0 of ADM's references
HELD = {"arr_0", "mu", "mu_s", "sigma", "sigma_s"}
DIM = 8.0  # mean value of 0..255 below which images are nearly black


def notes(
    samples: Mapping[str, Any],
    reference: Mapping[str, Any] | None,
    detectors: Sequence[Mapping[str, Any]],
    columns: Collection[str],
) -> list[str]:
    """Remarks on scores in these columns; none for 50,000 samples against ADM's reference.

    Args:
        samples, reference: what is known of the two, as in `Scores`.
        detectors: the detectors that were used.
        columns: the scores that were computed.
    """
    coco = all(detector.get("kind") == "pytorch-fid" for detector in detectors)
    found = [*of_images(samples), *_of_count(samples, columns, PUBLISHED_COCO if coco else (PUBLISHED,))]
    found += [
        f"beside the images in {side['path']} there is more, {walk.told(side['unused'])}"
        for side in (samples, reference or {})
        if side.get("unused")
    ]
    found += [
        f"{side['converted']:,} images of {side['path']} were not RGB and were made so as the workflow does: upright, "
        "transparency on white, 16-bit grey by its upper byte"
        for side in (samples, reference or {})
        if side.get("converted")
    ]
    if reference is not None:
        found += _of_reference(reference, detectors)
        if samples["identity"] == reference["identity"] or _same_file(samples["path"], reference["path"]):
            found.append("samples and reference are the same images")
    return found + _of_detectors(detectors)


def _same_file(one: str, other: str) -> bool:
    return Path(one).resolve() == Path(other).resolve()


def of_images(samples: Mapping[str, Any]) -> list[str]:
    """Remarks on the images themselves, by what is known of them: copies, black ones, lossy files."""
    found = []
    if samples.get("copies"):
        found.append(
            f"{samples['copies']:,} of {samples['images']:,} samples are copies of another one, pixel by pixel"
        )
    if samples.get("black"):
        found.append(f"{samples['black']:,} of {samples['images']:,} samples are black")
    if samples.get("brightness", 255) < DIM:
        found.append(
            f"the samples are nearly black, their mean value is {samples['brightness']:.1f} of 255: were floats scaled "
            "before they became bytes?"
        )
    if samples.get("lossy"):
        found.append(
            f"{samples['lossy']:,} samples come from JPEG or WebP files, whose compression moves every score; "
            "published samples are lossless"
        )
    return found


def _of_count(samples: Mapping[str, Any], columns: Collection[str], published: Sequence[int]) -> list[str]:
    count, found = samples["images"], []
    distances = [name for name in columns if name.startswith(("FID", "FD", "sFID"))]
    if count not in published:
        on = " on MS-COCO" if len(published) > 1 else ""
        found.append(f"{count:,} samples; published scores{on} are of {' or '.join(f'{n:,}' for n in published)}")
        if distances and count < min(published):
            found[0] += f"; fewer make {', '.join(distances)} too high, and move recall and IS"
    return found


def _of_reference(reference: Mapping[str, Any], detectors: Sequence[Mapping[str, Any]]) -> list[str]:
    others = [str(detector["name"]) for detector in detectors if detector.get("kind") != "inception"]
    found = []
    by_it = any(detector.get("kind") == "pytorch-fid" for detector in detectors)
    if reference["kind"] == "statistics" and not reference.get("source") and reference.get("holds") == ["mu", "sigma"]:
        whose = "pytorch-fid's" if by_it else "of inception as ADM computes it"
        found.append(
            f"nothing in {reference['path']} says how its mu and sigma were made; they are taken to be {whose}"
        )
    if by_it and len(others) < len(detectors):
        found.append("FID and FID (pytorch-fid) resize images in different ways: neither compares with the other")
    if others and reference.get("pictures"):
        found.append(
            f"scores by {', '.join(others)} are against the {reference['pictures']:,} images in {reference['path']}, "
            "not against those behind its mu and sigma"
        )
    if len(others) == len(detectors) or known_reference(reference):
        return found
    name = reference["path"]
    if reference["kind"] != "statistics":
        held = f"{reference['images']:,} images"
    else:
        held = "statistics of " + (f"{reference['images']:,} images" if reference.get("images") else "unknown images")
    return [
        *found,
        f"the reference {name} ({held}) is none of ADM's for ImageNet, which published scores are taken against; "
        "compare only with scores against the same reference",
    ]


def known_reference(reference: Mapping[str, Any]) -> str | None:
    """The name of ADM's reference whose name and layout this one has. Its content cannot be checked."""
    name = reference["path"].replace("\\", "/").rpartition("/")[2]
    side = REFERENCES.get(name)
    layout = {"holds": sorted(HELD), "pictures": PICTURES, "size": [side, side]}
    fits = set(reference.get("holds", [])) >= HELD and all(
        reference.get(key) == layout[key] for key in ("pictures", "size")
    )
    return name if side and fits else None


def _of_detectors(detectors: Sequence[Mapping[str, Any]]) -> list[str]:
    found = []
    for detector in detectors:
        if detector.get("published") is False:
            found.append(
                f"the weights of {detector['name']} (sha256 {detector['weights'][:12]}) are not those behind published "
                "scores: these numbers compare only with others by the same weights"
            )
    return found
