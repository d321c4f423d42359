"""The pictures of a report: grids of samples, and beside them real pictures and their reconstructions. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from haste import config
from haste.files import artefact
from haste.files.provenance import provenance_of
from haste.measure.pictures import Picture
from haste.plan.plan import Plan
from haste.report.content import Grid, Real


def grids(plan: Plan) -> list[Grid]:
    """The grids that are there, of the first seed of every run."""
    shown, found, apart, names = set(plan.shown), [], config.branches(plan.config), class_names(plan)
    for row in plan.rows:
        path = Path(row.evaluation.grid)
        if row.run not in apart and row.evaluation.grid in shown and path.exists():
            made = provenance_of(path)  # which classes have samples, the picture knows
            artefact.check_entries(path, made, classes=list)
            titled = made.get("titled", plan.config.images.classes > 0)  # pictures that are older do not say it
            labels = [_name(names, label) for label in made["classes"]] if titled else []
            artefact.check_entries(path, {"words": [], **made}, words=list)
            width, words = len(made["classes"]), list(map(str, made.get("words", [])))
            found.append(Grid(row.run, row.step, path, labels, row.evaluation.sampling_name, width, words))
    return found


def class_names(plan: Plan) -> list[str]:
    """The images' classes by label, as their manifest names them, with their labels where two have one name, such as
    ImageNet's cranes; none before there is one."""
    manifest = Path(plan.images.manifest)
    names = artefact.read_json(manifest, "store").get("classes", []) if manifest.exists() else []
    times = Counter(names)
    return [name if times[name] == 1 else f"{name} ({label})" for label, name in enumerate(names)]


def _name(names: Sequence[str], label: Any) -> str:
    """The name of a label; other titles are shown as they are."""
    return names[label] if isinstance(label, int) and 0 <= label < len(names) else str(label)


def named(plan: Plan, score: Mapping[str, Any]) -> dict[str, Any]:
    """A score whose chosen classes are called by their names."""
    sampling = score.get("sampling") or {}
    if not isinstance(sampling.get("labels"), list):
        return dict(score)
    names = class_names(plan)
    return {**score, "sampling": {**sampling, "labels": [_name(names, label) for label in sampling["labels"]]}}


def real(plan: Plan, decoded: Mapping[str, Mapping[str, Any]]) -> Real | None:
    """Real pictures and their reconstructions, which every detector's score of these has; None without any.

    Args:
        decoded: such scores by their files.

    Raises:
        ValueError: a file has no pictures, or damaged ones.
    """
    if not decoded:
        return None
    path, score = next(iter(decoded.items()))
    artefact.check_entries(path, score, pictures=dict)
    found, names = score["pictures"], class_names(plan)
    artefact.check_entries(path, found, classes=list)
    picture = Picture.read(path, {"title": "real and decoded", "columns": [], "alt": "", "png": found.get("png")})
    return Real(picture.png, [_name(names, label) for label in found["classes"]])


def enlarged(plan: Plan) -> list[str]:
    """A note on pictures that were smaller than what they were made, if the store counted them."""
    found = []
    for one in plan.image_sets:
        manifest = Path(one.images.manifest)
        made = artefact.read_json(manifest, "store") if manifest.exists() else {}
        if (few := made.get("enlarged")) and few["count"]:
            found.append(
                f"{few['count']:,} of {made['count']:,} pictures of {one.data.where} were enlarged: median "
                f"{few['median']:g} px along the shorter side, made {made['resolution']}. They have no finer details, "
                "and samples that are like them have none either."
            )
    return found
