"""One picture: from the bytes of a file to a square of uint8 RGB.

What stands beside the pixels (dates, places, profiles, previews) decides nothing but the orientation, and that only
where it can be read.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import ExifTags, Image

from haste.files.archives import MOST

T = TypeVar("T")

# The accepted formats, whatever a file is called. Pillow knows more, and some of them start other programs.
FORMATS = ("PNG", "JPEG", "WEBP")
_LONGEST = 64  # sides of a picture, one to the other; of a longer one the ends would be cut off anyway
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class AnimatedError(ValueError):
    """Several pictures where one is expected."""


def opened(file: Path | io.BytesIO, then: Callable[[Image.Image], T], formats: tuple[str, ...] = FORMATS) -> T:
    """What `then` makes of the image in a file, such as `upright_rgb`.

    Where what stands beside the pixels is damaged, the pixels alone are read.

    Raises:
        Exception: of many classes, if it is no such image. Whoever calls this adds the file's name.
    """
    try:
        return _made(file, then, formats)
    except AnimatedError:
        raise
    except Exception:
        whole = _content(file)
        if (plain := bare(whole)) == whole:
            raise
    return _made(io.BytesIO(plain), then, formats)


def reason(error: Exception, *paths: Path | str) -> str:
    """What is wrong with an image, without its path: reasons are compared, counted and stored."""
    words = re.sub(r" <[^<>]* at 0x\w+>", "", str(error))
    for path in map(str, paths):
        words = words.replace(repr(path), "").replace(path, "")
    return words.strip(" :") or type(error).__name__


def _made(file: Path | io.BytesIO, then: Callable[[Image.Image], T], formats: tuple[str, ...]) -> T:
    with Image.open(file, formats=formats) as image:
        # A camera's MPO is a JPEG with a preview after it.
        if image.format != "MPO" and getattr(image, "is_animated", False):
            raise AnimatedError(f"animated: {getattr(image, 'n_frames', 'several')} pictures, expected one")
        return then(image)


def _content(file: Path | io.BytesIO) -> bytes:
    if isinstance(file, io.BytesIO):
        return file.getvalue()
    return file.read_bytes() if file.stat().st_size <= MOST else b""


def bare(content: bytes) -> bytes:
    """A PNG or JPEG without what stands beside its pixels, except EXIF, which is read with care; others as they are."""
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return _bare_png(content)
    return _bare_jpeg(content) if content.startswith(b"\xff\xd8\xff") else content


def _bare_png(content: bytes) -> bytes:
    kept, place = [content[:8]], 8
    while place + 12 <= len(content):
        size, name = struct.unpack_from(">I4s", content, place)
        chunk = content[place : place + 12 + size]
        if name == b"fdAT":  # a frame of an animation
            return content
        if name == b"eXIf":
            chunk = chunk[:-4] + struct.pack(">I", zlib.crc32(chunk[4:-4]))
        if name in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf"):
            kept.append(chunk)
        place += 12 + size
    return b"".join(kept) + content[place:]


def _bare_jpeg(content: bytes) -> bytes:
    # Those of the application segments that say what the colours mean need so many bytes, with their own length.
    least = {0xE0: 16, 0xE1: 2, 0xEE: 14}
    kept, place = [content[:2]], 2
    while place + 4 <= len(content):
        start, marker, size = struct.unpack_from(">BBH", content, place)
        if start != 0xFF or marker in (0xFF, 0xDA):  # damaged, filled up, or the pixels
            break
        beside = marker == 0xFE or 0xE0 <= marker <= 0xEF
        if not beside or size >= least.get(marker, 1 << 16):
            kept.append(content[place : place + 2 + size])
        place += 2 + size
    return b"".join(kept) + content[place:]


def upright_rgb(image: Image.Image) -> Image.Image:
    """An image as RGB, rotated by its EXIF orientation, transparency on white, 16-bit grey by its upper byte.

    White, because most transparent images are drawn for a page; on black, dark drawings would vanish. CMYK is converted
    to RGB by Pillow's formula; colour profiles are not applied, as in ADM's preparation.
    """
    image.load()  # PNG may have its EXIF behind the pixels
    turn = _TURNS.get(_orientation(image))
    image = image if turn is None else image.transpose(turn)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode!r} has no known range, expected 8 or 16 bits a channel")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def is_plain(image: Image.Image) -> bool:
    """Whether `upright_rgb` leaves an image as it is."""
    return image.mode == "RGB" and not image.has_transparency_data and _orientation(image) not in _TURNS


def plain_rgb(image: Image.Image) -> Image.Image:
    """An image as ADM's reader has it: Pillow's RGB, unturned, transparency dropped, 16-bit grey clipped at 255."""
    image.load()
    return image.convert("RGB")


READERS = {"upright": upright_rgb, "adm": plain_rgb}


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # of many classes, for what one wrong byte beside the pixels did
        return 1


def centre_square(image: Image.Image, size: int) -> Image.Image:
    """U-ViT's crop: the centre square, then LANCZOS to size."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop: halve with BOX while the short side is at least 2 x size, BICUBIC to size, crop the centre.

    Of a picture that is more than 64 times as long as it is wide, the ends are cut off before.
    """
    most = _LONGEST * min(image.size)
    if (spare := max(image.size) - most) > 0:  # otherwise a strip would be enlarged to gigabytes
        begin = spare // 2
        wide = image.width > most
        box = (begin, 0, begin + most, image.height) if wide else (0, begin, image.width, begin + most)
        image = image.crop(box)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


CROPS = {"adm": centre_crop, "centre-lanczos": centre_square}
