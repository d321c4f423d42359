"""GPUs by name: what they compute at most and what they hold, by their makers' public data sheets. No torch."""

from __future__ import annotations

import dataclasses
import re

from haste.config.keys import nearest

SHARE = 0.35  # of the peak that training reaches: an aim, until it was measured
PUBLISHED = 0.12  # of an H100's peak in 16 bits, which REPA's published speed is: 173 images/s of SiT-XL/2


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU.

    memory: 10^9 bytes; half, tf32, single: dense products of matrices, 10^12 operations a second, in 16 bits, in TF32
    and in float32 proper; bf16: whether its 16 bits may be bfloat16. What a chip does not have, it does in float32.
    """

    memory: float
    half: float
    tf32: float
    single: float
    bf16: bool = True

    def peak(self, precision: str) -> float:
        """Operations a second at most, two per multiplication; fp64 is taken for half of float32."""
        if precision == "fp64":
            return self.single / 2 * 1e12
        if precision == "fp16" or (precision == "bf16" and self.bf16):
            return self.half * 1e12
        return (self.tf32 if precision == "tf32" else self.single) * 1e12


#: NVIDIA's data sheets of each product, and the white papers of the GeForce cards (tensor cores with float32 sums).
GPUS = {
    "B200": Gpu(180, 2250, 1125, 75),
    "H200": Gpu(141, 989, 494, 67),
    "H100": Gpu(80, 989, 494, 67),
    "H100-PCIe": Gpu(80, 756, 378, 51),
    "A100-80": Gpu(80, 312, 156, 19.5),
    "A100-40": Gpu(40, 312, 156, 19.5),
    "L40S": Gpu(48, 362, 183, 91.6),
    "V100": Gpu(32, 125, 15.7, 15.7, bf16=False),
    "RTX4090": Gpu(24, 165, 82.6, 82.6),
    "RTX3090": Gpu(24, 71, 35.6, 35.6),
}
_ALSO = {"a100": "A100-80", "h100sxm": "H100", "h200sxm": "H200", "4090": "RTX4090", "3090": "RTX3090"}


@dataclasses.dataclass(frozen=True)
class Machine:
    """Some equal GPUs; share: of the peak that is reached."""

    count: int
    name: str
    share: float = SHARE

    @property
    def gpu(self) -> Gpu:
        """One of them."""
        return GPUS[self.name]

    def __str__(self) -> str:
        return f"{self.count} x {self.name}"

    def pace(self, precision: str) -> float:
        """Operations a second that one of them is taken to reach."""
        return self.share * self.gpu.peak(precision)


def machine(text: str, share: float = SHARE) -> Machine:
    """What `8xH100` or `H100` names; case, spaces, hyphens and underscores do not matter.

    Raises:
        ValueError: an unknown GPU, no GPU at all, or a share that is not above 0 and at most 1.
    """
    found = re.fullmatch(r"(?:(\d+)\s*[xX*]\s*)?(.+)", text.strip())
    known = {_plain(name): name for name in GPUS} | _ALSO
    if not found or _plain(found[2]) not in known or found[1] == "0":
        raise ValueError(f"--as {text}: expected GPUs such as 8xH100{nearest(found[2] if found else text, GPUS)}")
    if not 0 < share <= 1:
        raise ValueError(f"--share {share:g}: expected the share of the peak that is reached, above 0 and at most 1")
    return Machine(int(found[1] or 1), known[_plain(found[2])], share)


def gpu_of(device: str) -> str | None:
    """The name here of a GPU that CUDA calls so, such as `NVIDIA A100-SXM4-80GB`; None for one that is not here."""
    words = re.findall(r"[A-Z0-9]+", device.upper().replace("RTX ", "RTX").replace("GB", " "))
    for name in sorted(GPUS, key=len, reverse=True):  # H100-PCIe before H100
        if all(part in words for part in name.upper().split("-")) and not {"LAPTOP", "D", "NVL", "MAX", "MIG"} & {
            *words
        }:
            return name
    return None


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]|nvidia|geforce|gb$", "", name.lower())
