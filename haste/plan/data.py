"""Images that a plan counts."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from haste.files import artefact, listing

if TYPE_CHECKING:
    from haste.plan.plan import Plan


@functools.cache  # a large folder takes minutes to walk
def image_count(plan: Plan) -> int:
    """Images of the store, or, before there is one, of its source, which is looked at as the first job will.

    Raises:
        ValueError: the source is missing, has no pictures, fewer than are held out, or other classes.
    """
    manifest, spec = Path(plan.images.manifest), plan.config.images
    if manifest.exists():
        return artefact.read_json(manifest, "store")["count"]
    where, (count, classes) = spec.path or spec.source, listing.survey(spec.source, spec.path, bool(spec.classes))
    listing.checked_holdout(where, spec.holdout, count)
    if classes is not None:
        listing.check_classes(where, classes, spec.classes)
    return count
