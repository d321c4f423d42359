"""Costs of a training step that papers print (HASTE's replies to reviewers; REPA, Appendix D), as if they were found by
the measure: a run of their own, named by its source, behind what was measured of the same model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from haste.config import MAPPINGS
from haste.report.content import Measured, Report
from haste.report.papers import is_like, lines_of

MEMORY, SPEED = "overhead.csv", "throughput.csv"
MEASURE, RESOLUTION, TEACHER = "cost", 256, "DINOv2-B"
TERMS = {"REPA": "features", "HASTE": "features + attention"}  # in the measure's words, by method


def with_published(report: Report, ones: Sequence[Measured]) -> Iterator[Measured]:
    """The files of one measure, and behind them what papers print for the models of some, whatever the measure."""
    yield from ones
    rows, found = {row.run: row for row in report.rows}, dict[str, Measured]()
    for one in ones:
        row = rows.get(one.run)
        known = (
            row and report.benchmark and is_like(row, report.benchmark) and report.benchmark.resolution == RESOLUTION
        )
        if one.found["measure"] == MEASURE and row and known and _is_published(one.found["terms"], row.model):
            found.setdefault(row.model, one)
    for model, like in found.items():
        yield from _published(model, like)


def _is_published(terms: Mapping[str, Mapping[str, object]], model: str) -> bool:
    """Whether the measured terms have the teacher and the pairs of layers of the published ones."""
    layers = terms.get("attention", {}).get("student_layers")
    teachers = {str(term["teacher"]).partition(" from ")[0] for term in terms.values()}
    return teachers == {TEACHER} and layers in (
        None,
        MAPPINGS.get(model, [0, 0])[1],
    )


def _published(model: str, like: Measured) -> Iterator[Measured]:
    """Of the batch that was measured: memory and the teacher's operations, and the speed."""
    batches, rows = {str(row["batch"]) for row in like.found["rows"]}, dict[tuple[str, int], list[dict[str, object]]]()
    for line in lines_of(MEMORY):
        if line["model"] == model and line["local_batch"] in batches:
            costs = {"peak MB": line["peak_cuda_memory_mb"], "teacher GMAC": line["teacher_forward_gflops"]}
            rows.setdefault((line["source"], 2), []).append(_row(line["method"], line["local_batch"], costs))
    for line in lines_of(SPEED):
        batch = str(int(line["global_batch"]) // int(line["hardware"].partition("x")[0]))
        if line["model"] == model and batch in batches:
            where = f"{line['source']}, {line['hardware']}, {line['precision']}"
            rows.setdefault((where, 1), []).append(
                _row(line["system"], batch, {"images/s": line["images_per_s_per_gpu"]})
            )
    for (source, digits), some in rows.items():
        found = {**like.found, "rows": some, "notes": []}
        yield Measured(like.name, f"{source}: {model}", 0, like.step, found, printed=digits)


def _row(method: str, batch: str, costs: Mapping[str, str]) -> dict[str, object]:
    return {"terms": TERMS[method], "batch": int(batch), **{name: float(value) for name, value in costs.items()}}
