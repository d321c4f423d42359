"""What a picture takes on disk and of a core, as ways to keep it without loss.

python benchmarks/pictures.py [FOLDER] [--sizes 256 512] [--most 24] [--rounds 3]

Without a folder it takes the photographs that libraries of the environment carry: scikit-learn's china.jpg and
flower.jpg, and matplotlib's grace_hopper.jpg. Every way is undone and compared bit by bit. Times are of one core, the
least of some rounds.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from haste.data import pictures
from haste.files import codecs

PHOTOGRAPHS = {"sklearn": "datasets/images/*.jpg", "matplotlib": "mpl-data/sample_data/grace_hopper.jpg"}
Way = tuple[Callable[[np.ndarray], bytes], Callable[[bytes], np.ndarray]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="of pictures, with those of folders in it")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512], help="pixels")
    parser.add_argument("--most", type=int, default=24, help="pictures, evenly spaced")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    files = _files(arguments.folder)
    files = files[:: -(-len(files) // arguments.most)]
    for size in arguments.sizes:
        _table(files, size, arguments.rounds)


def _table(files: list[Path], size: int, rounds: int) -> None:
    rows = [_cropped(file, size) for file in files]
    print(f"\n{len(rows)} pictures of {size} x {size} px, {rows[0].nbytes:,} bytes of pixels each, one core")
    print(f"{'':28}{'size':>8}{'to write':>12}{'to read':>12}")
    for name, (encode, decode) in _ways().items():
        written, coded = _least(rounds, encode, rows)
        read, found = _least(rounds, decode, coded)
        assert all(np.array_equal(a.reshape(b.shape), b) for a, b in zip(found, rows, strict=True)), name
        share = sum(map(len, coded)) / sum(row.nbytes for row in rows)
        print(f"{name:28}{share:8.1%}{1e3 * written:9.1f} ms{1e3 * read:9.1f} ms")
    took, _ = _least(rounds, lambda file: _cropped(file, size), files)
    share = sum(file.stat().st_size for file in files) / sum(row.nbytes for row in rows)
    print(f"{'its file, cropped anew':28}{share:8.1%}{'':12}{1e3 * took:9.1f} ms")


def _files(folder: Path | None) -> list[Path]:
    if folder is not None:
        kinds = (".png", ".jpg", ".jpeg", ".webp")
        return sorted(file for file in folder.rglob("*") if file.suffix.lower() in kinds)
    places = {name: importlib.util.find_spec(name) for name in PHOTOGRAPHS}
    roots = {name: Path(spec.origin).parent for name, spec in places.items() if spec and spec.origin}
    return [file for name, root in roots.items() for file in sorted(root.glob(PHOTOGRAPHS[name]))]


def _cropped(file: Path, size: int) -> np.ndarray:
    return np.asarray(pictures.centre_crop(pictures.opened(file, pictures.upright_rgb), size))


def _ways() -> dict[str, Way]:
    return {
        "raw": (np.ndarray.tobytes, lambda data: np.frombuffer(data, np.uint8).copy()),
        **{f"PNG, level {level}": (_saved("PNG", compress_level=level), _opened) for level in (1, 6)},
        "WebP, as stored (0, 0)": (codecs.to_webp, _opened),
        "WebP, method 4, quality 75": (_saved("WEBP", lossless=True, method=4, quality=75), _opened),
    }


def _saved(kind: str, **how: Any) -> Callable[[np.ndarray], bytes]:
    def save(row: np.ndarray) -> bytes:
        out = io.BytesIO()
        Image.fromarray(row).save(out, kind, **how)
        return out.getvalue()

    return save


def _opened(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def _least(rounds: int, work: Callable[[Any], Any], items: list[Any]) -> tuple[float, list[Any]]:
    """Seconds of this process for an item, and what the last round gave."""
    times, found = [], list[Any]()
    for _ in range(rounds):
        began = time.process_time()
        found = [work(item) for item in items]
        times.append(time.process_time() - began)
    return min(times) / len(items), found


if __name__ == "__main__":
    main()
