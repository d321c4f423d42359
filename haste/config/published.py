"""Published names of models, teachers and layers, and their definitions. No torch."""

from __future__ import annotations

from typing import Literal

from haste.align.terms import kind_of
from haste.config.parts import Model, OtherModel, Teacher
from haste.config.schema import Alignment, Config
from haste.networks.registry import TEACHERS, least_low_pass

# Published sizes of DiT (its Table 1) and SiT. L, D, H; the number behind the slash is the patch size.
SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
_SYSTEMS: dict[str, Literal["sit", "dit"]] = {"SiT": "sit", "DiT": "dit"}
MODELS: dict[str, Model | OtherModel] = {
    f"{system}-{name}/{patch}": Model(architecture=kind, depth=depth, width=width, heads=heads, patch_size=patch)
    for system, kind in _SYSTEMS.items()
    for name, (depth, width, heads) in SIZES.items()
    for patch in (2, 4, 8)
}
MODELS["MM-DiT"] = OtherModel(architecture="mmdit")  # the text-to-image model of REPA's Table 12 and HASTE

# HASTE Table 5, and its code for MM-DiT: feature depth (from 1), student layers (from 0), teacher layers (from 0, a
# 12-layer ViT-B).
_DEEP = (8, [4, 5, 6, 7], [8, 9, 10, 11])
MAPPINGS = {"SiT-B/2": (5, [2, 3, 4], [7, 9, 11])}
MAPPINGS |= dict.fromkeys(("SiT-L/2", "SiT-XL/2", "DiT-XL/2", "MM-DiT"), _DEEP)
REPA_DEPTH = {**{name: depth for name, (depth, *_) in MAPPINGS.items()}, "SiT-B/2": 4}
ALIGNED_HEADS = 12


def model_named(config: Config, name: str) -> Model | OtherModel:
    """The size of a model by its name: the configuration's own first, then the published ones."""
    return config.models.get(name) or MODELS[name]


def alignment_named(config: Config, name: str) -> Alignment:
    """The terms of an alignment by its name; `vanilla` needs no entry."""
    return config.alignments.get(name) or Alignment()


def teacher_shape(teacher: Teacher) -> tuple[int, int] | None:
    """(blocks, heads) of a teacher, or None for a timm name that is not in `TEACHERS`."""
    if teacher.trained:
        return teacher.trained.depth, teacher.trained.heads
    assert teacher.pretrained
    found = TEACHERS.get(teacher.pretrained.name)
    return None if found is None else (found.depth, found.heads)


def teacher_side(config: Config, name: str) -> int | None:
    """Side in pixels of the images that enter a teacher, or None for a timm name that is not in `TEACHERS`."""
    teacher, resolution = config.teachers[name], config.images.resolution
    if teacher.trained:
        return resolution
    assert teacher.pretrained
    found = TEACHERS.get(teacher.pretrained.name)
    return None if found is None else found.size * resolution // 256


def filter_faults(config: Config, name: str, side: int) -> list[str]:
    """A filter of a teacher's images, of a side in pixels, that leaves nothing of them but their mean."""
    found, least = config.teachers[name].filter, least_low_pass(side)
    if found is None or found.low_pass >= 2 / side:
        return []
    return [
        f"teachers.{name}.filter.low_pass: {found.low_pass:g} is below the first wave of its images of {side} px and "
        f"leaves their mean alone; expected {least:g} or more"
    ]


def layer_faults(config: Config, teacher: str, depth: int) -> list[str]:
    """Layers that alignments ask of a teacher with fewer layers."""
    found = []
    for name, alignment in config.alignments.items():
        for which, term in alignment.terms.items():
            key = "layer" if kind_of(which) == "features" else "teacher_layers"
            asked = getattr(term, key)
            wrong = [one for one in (asked if isinstance(asked, list) else [asked]) if one is not None and one >= depth]
            if wrong and term.teacher == teacher:
                at = f"alignments.{name}.{alignment.path(which)}.{key}"
                found.append(f"{at}: {wrong}, but {teacher} has layers 0 to {depth - 1}")
    return found


def teacher_tokens(config: Config, name: str) -> tuple[int, int] | None:
    """(width, tokens per image) of a teacher, or None for a timm name that is not in `TEACHERS`."""
    teacher, resolution = config.teachers[name], config.images.resolution
    if teacher.trained:
        return teacher.trained.width, (resolution // teacher.trained.patch) ** 2
    assert teacher.pretrained
    found = TEACHERS.get(teacher.pretrained.name)
    return None if found is None else (found.width, found.tokens(resolution))
