"""Images of every usual form become RGB; what cannot be used is a named error."""

import io
import re
import struct
import zlib

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


def test_too_many_pixels_are_refused_before_decoding(monkeypatch, colours):
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    raw = _encoded(Image.fromarray(colours))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(DataError, match="image:"):
        as_image(bomb)
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
