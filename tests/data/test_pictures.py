"""What stands beside a picture's pixels decides nothing, whatever it is; and a strip costs what its square costs."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from haste.data import pictures
from haste.data.prepare import open_source

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)


def encoded(form, **options):
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, form, **options)
    return file.getvalue()


def read(content):
    return np.asarray(pictures.opened(io.BytesIO(content), pictures.upright_rgb))


def exif(orientation, *entries, tail=b""):
    """A block with an orientation and other entries as they stand: tag, type, count and value."""
    entries = sorted([(0x112, 3, 1, struct.pack("<H", orientation)), *entries])
    body = b"".join(struct.pack("<HHL", *entry[:3]) + entry[3].ljust(4, b"\0") for entry in entries)
    return b"Exif\0\0II*\0" + struct.pack("<LH", 8, len(entries)) + body + struct.pack("<L", 0) + tail


def segment(marker, data):
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def riff(name, data):
    return name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)


JPEG, PNG = encoded("JPEG"), encoded("PNG")
WEBP = encoded("WEBP", lossless=True, exif=exif(1), xmp=b"<x/>", icc_profile=bytes(60))


def in_jpeg(*segments):
    return JPEG[:2] + b"".join(segments) + JPEG[2:]


def in_png(*chunks, behind=False):
    at = len(PNG) - 12 if behind else 33
    return PNG[:at] + b"".join(chunks) + PNG[at:]


DAMAGED = {  # entries beside the orientation; what the file says of them is wrong
    "a resolution of -1/0": ([(0x11A, 10, 1, struct.pack("<L", 38))], struct.pack("<ll", -1, 0)),
    "a date as a number": ([(0x132, 11, 1, struct.pack("<f", 2.0))], b""),
    "a resolution as text": ([(0x11A, 2, 4, b"72\0\0")], b""),
    "a value far behind the end": ([(0x8769, 4, 1, b"\xff\xff\xff\x7f")], b""),
}


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_a_picture_is_turned_whatever_else_its_exif_says(name, form):
    entries, tail = DAMAGED[name]
    block = exif(6, *entries, tail=tail)
    plain = {"JPEG": JPEG, "PNG": PNG, "WEBP": encoded("WEBP", lossless=True)}[form]
    whole = {
        "JPEG": lambda: in_jpeg(segment(0xE1, block)),
        "PNG": lambda: in_png(chunk(b"eXIf", block[6:])),
        "WEBP": lambda: encoded("WEBP", lossless=True, exif=block),
    }[form]()
    assert np.array_equal(read(whole), np.rot90(read(plain), -1))


# ---- thousands of things beside the pixels

EDITS = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255), st.sampled_from("sscx")), max_size=5)


def edited(data, edits):
    """Some bytes set, the rest cut off, or something added."""
    data = bytearray(data)
    for at, byte, how in edits:
        if how == "s" and data:
            data[at % len(data)] = byte
        elif how == "c":
            data = data[: at % (len(data) + 1)]
        elif how == "x":
            data += bytes([byte]) * (at % 9)
    return bytes(data)


SEGMENTS = [
    (0xE0, b"JFIF\0\1\1\0\0\1\0\1\0\0"),
    (0xE1, exif(1, (0x11A, 5, 1, struct.pack("<L", 38)), tail=struct.pack("<LL", 72, 1))),
    (0xE1, b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta tiff:x='1'/>"),
    (0xE2, b"ICC_PROFILE\0\1\1" + bytes(60)),
    (0xE2, b"MPF\0II*\0\10\0\0\0\1\0\1\xb0\4\0\1\0\0\0\2\0\0\0\0\0\0\0" + bytes(32)),
    (0xED, b"Photoshop 3.0\08BIM\3\xed\0\0\0\0\0\x10" + bytes(16)),
    (0xEE, b"Adobe\0\x64\0\0\0\0\1"),
    (0xFE, b"a comment"),
]
CHUNKS = [
    *((b"iCCP", b"x\0\0" + zlib.compress(bytes(60))), (b"gAMA", bytes(4)), (b"cHRM", bytes(32)), (b"sRGB", b"\0")),
    *((b"pHYs", bytes(9)), (b"tEXt", b"a\0b"), (b"zTXt", b"a\0\0" + zlib.compress(b"x")), (b"tIME", bytes(7))),
    *((b"iTXt", b"a\0\1\0\0\0" + zlib.compress(bytes(2_000_000))), (b"bKGD", bytes(6)), (b"sBIT", b"\10\10\10")),
    *((b"eXIf", exif(1)[6:]), (b"hIST", b"xx"), (b"prVt", b"x"), (b"fcTL", bytes(26))),
]


def turned(pixels):
    """The ways in which an orientation, which may be what was edited, turns a picture."""
    sides = [pixels, pixels[:, ::-1], pixels[::-1, ::-1], pixels[::-1]]
    return [*sides, *(side.transpose(1, 0, 2) for side in sides)]


def is_one_of(found, expected):
    return any(found.shape == one.shape and np.array_equal(found, one) for one in expected)


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=2000, deadline=None)
@given(which=st.integers(0, len(SEGMENTS) - 1), edits=EDITS)
def test_a_jpeg_is_its_pixels_whatever_stands_beside_them(which, edits):
    marker, data = SEGMENTS[which]
    data = edited(data, edits)
    if marker == 0xEE and len(data) >= 12:  # these bytes say what the colours mean
        data = data[:11] + b"\1" + data[12:]
    assert is_one_of(read(in_jpeg(segment(marker, data))), turned(read(JPEG)))


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=2000, deadline=None)
@given(which=st.integers(0, len(CHUNKS) - 1), edits=EDITS, flip=st.integers(0, 3), behind=st.booleans())
def test_a_png_is_its_pixels_whatever_stands_beside_them(which, edits, flip, behind):
    name, data = CHUNKS[which]
    whole = bytearray(chunk(name, edited(data, edits)))
    whole[-1] ^= flip  # a wrong checksum, mostly
    assert is_one_of(read(in_png(bytes(whole), behind=behind)), turned(PIXELS))


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=1000, deadline=None)
@given(name=st.sampled_from([b"EXIF", b"ICCP", b"XMP "]), edits=EDITS)
def test_a_webp_is_its_pixels_whatever_stands_beside_them(name, edits):
    at = WEBP.index(name)
    size = struct.unpack_from("<I", WEBP, at + 4)[0]
    body = WEBP[8:at] + riff(name, edited(WEBP[at + 8 : at + 8 + size], edits)) + WEBP[at + 8 + size + size % 2 :]
    assert is_one_of(read(riff(b"RIFF", body)), turned(PIXELS))


@settings(max_examples=300, deadline=None)
@given(form=st.sampled_from([JPEG, PNG, WEBP]), edits=EDITS.filter(bool))
def test_damage_anywhere_leaves_bare_pixels_no_longer_than_the_file(form, edits):
    content = edited(form, edits)
    plain = pictures.bare(content)
    assert len(plain) <= len(content) and pictures.bare(plain) == plain


def test_an_animation_is_none_whatever_is_damaged_in_it():
    frames = [Image.fromarray(np.roll(PIXELS, i)) for i in range(3)]
    file = io.BytesIO()
    frames[0].save(file, "PNG", save_all=True, append_images=frames[1:])
    whole = file.getvalue()
    with pytest.raises(ValueError, match="animated: 3 pictures, expected one"):
        read(whole)
    at = whole.index(b"fcTL")
    with pytest.raises(Exception, match="APNG|broken|fcTL|identify"):
        read(whole[: at + 4] + b"\xff" * 4 + whole[at + 8 :])


# ---- shapes


@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000), (3, 5_000)])
def test_a_strip_costs_what_its_square_costs(size):
    strip = Image.new("RGB", size, (9, 99, 200))
    sides = []
    resize = Image.Image.resize
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image.Image, "resize", lambda *given: (sides.append(given[1]), resize(*given))[1])
        square = np.asarray(pictures.centre_crop(strip, 256))
    assert square.shape == (256, 256, 3) and np.unique(square.reshape(-1, 3), axis=0).tolist() == [[9, 99, 200]]
    assert max(width * height for width, height in sides) <= 64 * 256 * 256


@pytest.mark.parametrize("turn", [False, True])
def test_of_a_strip_the_centre_is_taken_as_if_nothing_had_been_cut(turn):
    level = np.linspace(0, 255, 1000).astype(np.uint8)
    strip = np.repeat(np.repeat(level[None, :], 2, 0)[..., None], 3, -1)
    whole = Image.fromarray(strip).resize((1000 * 4, 8), Image.Resampling.BICUBIC)
    expected = np.asarray(whole)[:, 1996:2004]
    found = np.asarray(pictures.centre_crop(Image.fromarray(strip.transpose(1, 0, 2) if turn else strip), 8))
    assert np.array_equal(found.transpose(1, 0, 2) if turn else found, expected)


def test_a_picture_of_usual_shape_is_cut_nowhere(monkeypatch):
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (7, 64 * 7, 3), dtype=np.uint8))
    crop, boxes = Image.Image.crop, []
    monkeypatch.setattr(Image.Image, "crop", lambda self, box: (boxes.append(box), crop(self, box))[1])
    pictures.centre_crop(image, 8)
    assert len(boxes) == 1  # that of the square


def test_a_reason_holds_neither_a_path_nor_an_address():
    with pytest.raises(Exception, match="cannot identify") as error:
        read(b"no picture")
    assert pictures.reason(error.value) == "cannot identify image file"
    assert pictures.reason(OSError("[Errno 5] I/O: 'a/b.png'"), "a/b.png") == "[Errno 5] I/O"
    assert pictures.reason(MemoryError()) == "MemoryError"


# ---- the reader of ADM


RGB8 = np.random.default_rng(4).integers(0, 256, (70, 90, 3), dtype=np.uint8)
RGB8[20:50, 30:60] = (10, 20, 30)
WHOLE, CLEAR = Image.fromarray(RGB8), Image.fromarray(RGB8[..., 0])
PALETTE, TWO = WHOLE.quantize(7), WHOLE.convert("1")
DEEP = (np.arange(70 * 90).reshape(70, 90) * 10).astype(np.uint16)
ALPHA = Image.merge("RGBA", [*WHOLE.split(), CLEAR])


def saved(image, form, **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def deep_rgb():
    """A PNG of 16 bits a channel, which Pillow does not write."""
    rows = np.repeat(RGB8[..., None], 2, axis=-1)
    rows[..., 1] = 77  # the lower byte
    header = struct.pack(">IIBBBBB", 90, 70, 16, 2, 0, 0, 0)
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def turned_jpeg():
    tags = Image.Exif()
    tags[0x112] = 6
    return saved(WHOLE, "JPEG", exif=tags)


ODD = {  # a file's name and content; whether both readers say the same, as the table in config/README.md has it
    "grey": ("a.png", lambda: saved(CLEAR, "PNG"), True),
    "two-coloured": ("a.png", lambda: saved(TWO, "PNG"), True),
    "palette": ("a.png", lambda: saved(PALETTE, "PNG"), True),
    "16-bit RGB": ("a.png", deep_rgb, True),
    "CMYK": ("a.JPEG", lambda: saved(WHOLE.convert("CMYK"), "JPEG"), True),
    "PNG named JPEG": ("a.JPEG", lambda: saved(WHOLE, "PNG"), True),
    "EXIF": ("a.jpg", turned_jpeg, False),
    "RGBA": ("a.png", lambda: saved(ALPHA, "PNG"), False),
    "grey with alpha": ("a.png", lambda: saved(Image.merge("LA", [CLEAR, CLEAR]), "PNG"), False),
    "palette with alpha": ("a.png", lambda: saved(PALETTE, "PNG", transparency=0), False),
    "one transparent colour": ("a.png", lambda: saved(WHOLE, "PNG", transparency=(10, 20, 30)), False),
    "16-bit grey": ("a.png", lambda: saved(Image.fromarray(DEEP), "PNG"), False),
}


@pytest.mark.parametrize("size", [16, 60])
@pytest.mark.parametrize("name", ODD)
def test_odd_pictures_come_out_as_adms_own_reader_has_them_and_otherwise_as_they_look(tmp_path, name, size):
    file, content, same = ODD[name]
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / file).write_bytes(content())
    source = {"path": tmp_path, "resolution": size, "holdout": 0}
    found = {how: open_source("folder", reader=how, **source).load(0)[0] for how in pictures.READERS}

    image = Image.open(tmp_path / "class" / file)  # ADM: image_datasets.py
    image.load()
    image = image.convert("RGB")
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.BOX)
    scale = size / min(*image.size)
    pixels = np.array(image.resize(tuple(round(x * scale) for x in image.size), resample=Image.BICUBIC))
    down, across = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    expected = pixels[down : down + size, across : across + size]
    np.testing.assert_array_equal(found["adm"], expected)
    assert np.array_equal(found["upright"], expected) == same


def test_sixteen_bits_of_grey_keep_their_upper_byte_unless_adms_reader_is_asked_for():
    content = saved(Image.fromarray(DEEP), "PNG")
    for reader, expected in (("upright", DEEP >> 8), ("adm", np.minimum(DEEP, 255))):
        image = pictures.opened(io.BytesIO(content), pictures.READERS[reader])
        np.testing.assert_array_equal(np.asarray(image), np.repeat(expected[..., None], 3, axis=-1))
