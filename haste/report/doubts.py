"""What on the page is too poor to judge by, in words.

The thresholds, which docs/report.md gives with their reasons, only decide what is said; no number changes by them.
"""

from __future__ import annotations

from collections.abc import Iterator

from haste.report.compare import detector_name
from haste.report.content import Part, Report
from haste.report.finding import best_value

LEAST_PSNR = 20.0  # dB: errors of a tenth of the whole range, root mean square
MOST_SHARE = 0.5  # of the way from real images to the best run that may be the autoencoder's


def doubts(report: Report) -> list[str]:
    """A sentence for each part that is too poor; none if all are good enough, or nothing is known of them."""
    return [*_decoding(report), *_distances(report), *(said for part in report.parts for said in _guessing(part))]


def _decoding(report: Report) -> Iterator[str]:
    found = next((one["psnr"] for one in report.reconstructed if one.get("psnr") is not None), None)
    if found is None:
        found = next((part.quality.get("psnr") for part in report.parts if part.part == "autoencoder"), None)
    if found is not None and found < LEAST_PSNR:
        yield (
            f"The autoencoder gives pictures back with a PSNR of {found:.1f} dB only; below {LEAST_PSNR:.0f} dB their "
            "details are lost, in the samples of every run alike. Train it longer, with more channels or a smaller "
            "factor, or take a pretrained one."
        )


def _distances(report: Report) -> Iterator[str]:
    floors = {detector_name(one): one["scores"].get("fd") for one in report.floors}
    for one in report.reconstructed:
        name, own = detector_name(one), one["scores"].get("fd")
        floor, found = floors.get(name), best_value(report, name)
        if own is None or floor is None or found is None or own <= 1.5 * floor or found <= floor:
            continue
        share = (own - floor) / (found - floor)
        if share > MOST_SHARE:
            much = f"{100 * share:.0f} % of the distance" if share < 1 else "the whole distance"
            yield (
                f"By {name}, decoded latents of real images are already at a distance of {own:.3g} from real ones, "
                f"where real ones are at {floor:.3g} and the best run at {found:.3g}: {much} between the "
                "two is the autoencoder's, and runs can hardly be distinguished. Take a better autoencoder."
            )


def _guessing(part: Part) -> Iterator[str]:
    found = part.quality.get("accuracy")
    if part.part not in ("teacher", "detector") or found is None or part.classes < 2:
        return
    chance = 1 / part.classes
    if found < (1 + chance) / 2:
        does = "its features say little about the samples: compare scores with care"
        if part.part == "teacher":
            does = "runs that are aligned with it can hardly gain by it"
        yield (
            f"The {part.part} {part.name} is right on {100 * found:.0f} % of held-out pictures, nearer to guessing "
            f"({100 * chance:.0f} %) than to being always right; {does}. Train it longer, or take a pretrained one."
        )
