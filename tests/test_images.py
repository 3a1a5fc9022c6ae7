"""Images of every usual form become RGB; what cannot be used is a named error."""

import io
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sfa_adapters import images
from sfa_adapters.errors import DataError
from sfa_adapters.images import as_image


def _encoded(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@pytest.fixture
def colours():
    return np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)


def test_every_form_of_one_picture_gives_the_same(colours, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(_encoded(Image.fromarray(colours)))
    tensor = torch.from_numpy(colours).permute(2, 0, 1)
    opaque = np.dstack([colours, np.full((7, 5), 255, np.uint8)])
    forms = [
        path,
        str(path),
        path.read_bytes(),
        memoryview(path.read_bytes()),
        Image.fromarray(colours),
        colours,
        opaque,
    ]
    forms += [colours / 255, (colours / 255).astype(np.float32), colours.astype(np.uint16) * 257, tensor, tensor / 255]
    for form in forms:
        pixels = as_image(form)
        assert pixels.dtype == np.uint8
        np.testing.assert_array_equal(pixels, colours)


def test_the_result_is_a_copy(colours):
    as_image(colours)[:] = 0
    assert colours.any()


def test_gray_is_the_same_in_all_channels():
    gray = np.array([[0, 100, 255]], dtype=np.uint8)
    for form in (gray, gray[..., None], Image.fromarray(gray), torch.from_numpy(gray)[None]):
        pixels = as_image(form)
        assert pixels.shape == (1, 3, 3)
        assert (pixels == gray[..., None]).all()
    assert as_image(gray > 50)[0, :, 1].tolist() == [0, 255, 255]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_white(mode):
    layer = Image.new("RGBA", (2, 1), (200, 0, 0, 255))
    layer.putpixel((1, 0), (0, 0, 0, 0))  # black under full transparency: the picture of many a diagram
    raw = _encoded(layer.convert(mode)) if mode != "P" else _encoded(layer.quantize(4), "PNG")
    pixels = as_image(raw)
    assert pixels[0, 1].tolist() == [255, 255, 255]
    assert pixels[0, 0].tolist() != [255, 255, 255]


def test_half_transparent_arrays_are_mixed():
    assert as_image(np.array([[[0, 0, 0, 128]]], dtype=np.uint8))[0, 0].tolist() == [127] * 3


def test_sixteen_bits_are_scaled_not_cut_off():
    deep = np.array([[0, 257 * 10, 257 * 200, 65535]], dtype=np.uint16)
    for form in (deep, Image.fromarray(deep), _encoded(Image.fromarray(deep)), _encoded(Image.fromarray(deep), "TIFF")):
        assert as_image(form)[0, :, 0].tolist() == [0, 10, 200, 255]


@given(st.integers(0, 65535))
@settings(max_examples=50, deadline=None)
def test_sixteen_bits_round_to_the_nearest(value):
    assert abs(int(as_image(np.array([[value]], dtype=np.uint16))[0, 0, 0]) - value / 257) <= 0.5


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.full((2, 2), np.nan), "nan"),
        (np.full((2, 2, 3), 200.0), "200"),
        (np.full((2, 2, 3), -0.1), "-0.1"),
        (np.zeros((2, 2, 2), np.uint8), r"\(2, 2, 2\)"),
        (np.zeros((3, 4, 5), np.uint8), r"\(3, 4, 5\)"),
        (np.zeros((1, 2, 2, 3), np.uint8), r"\(1, 2, 2, 3\)"),
        (np.zeros((0, 4, 3), np.uint8), "empty"),
        (np.zeros((4, 4), np.int64), "int64"),
        (torch.zeros(4, 4, 3), r"\(4, 4, 3\)"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), "int64"),
        (torch.full((3, 2, 2), float("nan")), "nan"),
        (b"", "cannot be read"),
        (b"text, not a picture", "cannot be read"),
        (None, "NoneType"),
        ([1, 2], "list"),
    ],
)
def test_what_cannot_be_used_is_named(value, message):
    with pytest.raises(DataError, match=f"scan 3.*{message}"):
        as_image(value, "scan 3")


def test_float_pictures_have_no_range():
    with pytest.raises(DataError, match="float image"):
        as_image(Image.new("F", (2, 2)))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF"])
def test_a_truncated_file_is_named(form, tmp_path):
    raw = _encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)), form)
    (tmp_path / "cut").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(DataError, match=f"{re.escape(str(tmp_path))}.*cannot be read"):
        as_image(tmp_path / "cut")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.png"):
        as_image(tmp_path / "none.png")
    with pytest.raises(DataError, match="cannot be read"):
        as_image(tmp_path)


def _chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_header(width, height):
    """And the beginning of its pixels, of which there are none in the file."""
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + _chunk(b"IDAT", b"")


def _tiff_header(width, height):
    """One strip of gray levels, of which there are none in the file."""
    tags = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: 0}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize("header", [png_header, _tiff_header])
@pytest.mark.parametrize("side", [8_000, 20_000, 60_000])
def test_a_scan_of_too_many_pixels_is_refused_by_its_header(header, side, monkeypatch, tmp_path):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    path = tmp_path / "scan"
    path.write_bytes(header(side, side))
    assert path.stat().st_size < 200
    for form in (path, path.read_bytes()):
        with pytest.raises(DataError, match=r"at most 50,000,000 pixels are decoded.*Make it smaller\.$"):
            as_image(form)


def test_too_many_pixels_are_refused_before_decoding(monkeypatch, colours):
    raw = _encoded(Image.fromarray(colours))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    monkeypatch.setattr(images, "MAX_PIXELS", 34)
    for form in (raw, colours, torch.from_numpy(colours).permute(2, 0, 1), Image.fromarray(colours)):
        with pytest.raises(DataError, match="5 x 7 pixels"):
            as_image(form)


def test_too_many_bytes_are_refused_before_reading(monkeypatch, tmp_path, colours):
    path = tmp_path / "a.png"
    path.write_bytes(_encoded(Image.fromarray(colours)))
    monkeypatch.setattr(images, "MAX_BYTES", 50)
    for form in (path, path.read_bytes()):
        with pytest.raises(DataError, match="bytes, at most 50"):
            as_image(form)


# -- documents, and what a scanner or a print shop saves --------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (b"%PDF-1.7\n%\xe2\xe3\n", "this is a PDF file.* images, render them: pdftoppm -r 150 -png FILE page$"),
        (b"junk of a mail gateway\n" + b"%PDF-1.4\n", "this is a PDF file"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", r"PostScript file.*ps2pdf FILE\), then render"),
        (b"\xc5\xd0\xd3\xc6\x20\0\0\0", "PostScript file"),
    ],
)
def test_documents_are_refused_with_what_to_do(head, message, tmp_path, monkeypatch):
    path = tmp_path / "report.png"
    path.write_bytes(head + bytes(3000))
    for form in (path, str(path), path.read_bytes()):
        with pytest.raises(DataError, match=message) as error:
            as_image(form)
        assert "\n" not in str(error.value)
    monkeypatch.setattr(images, "MAX_BYTES", 50)
    with pytest.raises(DataError, match=r"report\.png: this is a"):  # and not that it is too large
        as_image(path)


def png(rows, bits, colour, transparent=b""):
    """A PNG of one pixel column per value, from packed rows: Pillow writes no colour of 16 bits."""
    width = len(rows[0]) * 8 // bits // (3 if colour == 2 else 1)
    header = struct.pack(">IIBBBBB", width, len(rows), bits, colour, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    marks = _chunk(b"tRNS", transparent) if transparent else b""
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + marks + _chunk(b"IDAT", body) + _chunk(b"IEND", b"")


def tiff(samples, bits, photometric, endian="<"):
    """A TIFF of one row; `samples` are the values of each pixel."""
    flat = np.asarray(samples).reshape(-1)
    data = flat.astype(f"{endian}u{bits // 8}").tobytes()
    channels = len(flat) // len(samples)
    shorts = struct.pack(f"{endian}{channels}H", *[bits] * channels)
    tags = [
        (256, 4, 1, len(samples)), (257, 4, 1, 1), (258, 3, channels, None), (259, 3, 1, 1), (262, 3, 1, photometric),
        (273, 4, 1, 200), (277, 3, 1, channels), (278, 4, 1, 1), (279, 4, 1, len(data)),
    ]  # fmt: skip
    out = (b"II*\0" if endian == "<" else b"MM\0*") + struct.pack(f"{endian}IH", 8, len(tags))
    for tag, kind, count, value in tags:
        if value is None:
            packed = shorts.ljust(4, b"\0") if len(shorts) <= 4 else struct.pack(f"{endian}I", 180)
        else:
            packed = struct.pack(f"{endian}I", value) if kind == 4 else struct.pack(f"{endian}HH", value, 0)
        out += struct.pack(f"{endian}HHI", tag, kind, count) + packed
    return (out + bytes(4)).ljust(180, b"\0") + shorts.ljust(20, b"\0") + data


INKS = {(0, 0, 0, 0): (255, 255, 255), (0, 255, 255, 0): (255, 0, 0), (255, 0, 255, 0): (0, 255, 0)}
INKS |= {(255, 255, 0, 0): (0, 0, 255), (0, 0, 0, 255): (0, 0, 0), (0, 0, 0, 128): (127, 127, 127)}


def scans():
    """Name, file and the colours of its pixels from left to right."""
    cmyk = Image.new("CMYK", (len(INKS) * 16, 16))
    for k, ink in enumerate(INKS):
        cmyk.paste(ink, (k * 16, 0, k * 16 + 16, 16))
    yield "cmyk.tif", _encoded(cmyk, "TIFF"), [colour for colour in INKS.values() for _ in range(16)]
    yield "cmyk.jpg", _encoded(cmyk, "JPEG", quality=100, subsampling=0), [c for c in INKS.values() for _ in range(16)]
    yield "cmyk16.tif", tiff([[v * 257 for v in ink] for ink in INKS], 16, 5), list(INKS.values())
    bits, black, white = Image.new("1", (16, 1), 1), (0, 0, 0), (255, 255, 255)
    bits.putpixel((3, 0), 0)
    ink = [black if k == 3 else white for k in range(16)]
    yield "bits.png", _encoded(bits), ink
    yield "fax.tif", _encoded(bits, "TIFF", compression="group4"), ink
    yield "clear_bits.png", png([b"\xf0"], 1, 0, b"\0\0"), [white] * 8  # black is transparent
    deep, gray = [0, 257 * 100, 65535], [(0,) * 3, (100,) * 3, (255,) * 3]
    yield "gray16.tif", tiff(deep, 16, 1), gray
    yield "gray16_big.tif", tiff(deep, 16, 1, ">"), gray
    yield "gray16_white_is_zero.tif", tiff(deep, 16, 0), [(255 - v,) * 3 for v, _, _ in gray]
    yield "gray16.png", png([struct.pack(">3H", *deep)], 16, 0), gray
    yield "gray16_clear.png", png([struct.pack(">3H", *deep)], 16, 0, struct.pack(">H", 0)), [white, gray[1], white]
    colours = [(255, 0, 10), (20, 200, 128), (0, 0, 255)]
    wide = [[v * 257 for v in colour] for colour in colours]
    yield "colour16.png", png([np.asarray(wide, ">u2").tobytes()], 16, 2), colours
    yield "colour16.tif", tiff(wide, 16, 2), colours
    yield "colour16_big.tif", tiff(wide, 16, 2, ">"), colours
    palette = Image.new("P", (3, 1))
    palette.putpalette([200, 0, 0, 0, 100, 0, 0, 0, 0])
    palette.putdata([0, 1, 2])
    yield "palette.png", _encoded(palette, transparency=2), [(200, 0, 0), (0, 100, 0), white]
    yield "palette.gif", _encoded(palette, "GIF", transparency=2), [(200, 0, 0), (0, 100, 0), white]
    half = _encoded(palette, transparency=bytes([255, 255, 128]))
    yield "half_clear_palette.png", half, [(200, 0, 0), (0, 100, 0), (127, 127, 127)]


@pytest.mark.parametrize(("name", "raw", "colours"), [pytest.param(*scan, id=scan[0]) for scan in scans()])
def test_scans_of_every_mode_have_their_colours(name, raw, colours):
    pixels = as_image(raw)
    assert pixels.shape[1] == len(colours)
    far = 6 if name.endswith("jpg") else 1 if "16" in name or "half" in name else 0
    np.testing.assert_allclose(pixels.astype(int), np.broadcast_to(colours, pixels.shape), atol=far)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_of_a_turned_camera_is_turned_upright(kind: str, orientation: int, tmp_path: Path) -> None:
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :24] = 255  # the upper left quarter is white
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.swapaxes(0, 1), 6: np.rot90(upright),
        7: upright[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(upright, -1),
    }  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"page.{kind.lower()}"
    Image.fromarray(np.ascontiguousarray(stored[orientation])).save(path, kind, exif=exif)
    for value in (path, path.read_bytes(), Image.open(path)):
        assert np.abs(as_image(value).astype(int) - upright).max() < 40  # JPEG


def test_turned_16_bit_scans_keep_their_gray_levels(tmp_path: Path) -> None:
    deep = np.zeros((4, 6), np.uint16)
    deep[:2, :3] = 65_535
    turned = np.ascontiguousarray(np.rot90(deep))
    Image.fromarray(turned).save(tmp_path / "scan.tiff", tiffinfo={0x0112: 6})
    assert np.array_equal(as_image(tmp_path / "scan.tiff")[..., 0], (deep // 257).astype(np.uint8))
