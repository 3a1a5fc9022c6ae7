"""Converts images of any usual form (files, bytes, PIL, arrays, tensors) to uint8 RGB, or raises a `DataError`.

An encoded image is not decoded before the size in its header was checked.
"""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sfa_adapters.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["MAX_BYTES", "MAX_PIXELS", "as_image", "read_image"]

MAX_PIXELS = 50_000_000
MAX_BYTES = 20_000_000
HEAD = 1024  # bytes, in which a PDF names itself
WHITE_IS_ZERO = 0  # of the TIFF tag that says what gray levels mean
ORIENTATION = 0x0112  # EXIF tag: how a camera was held; 1 is upright


def as_image(value: Any, where: str = "image") -> np.ndarray:
    """Converts an image of any usual form to uint8 RGB.

    Gray becomes RGB, transparency is composited on white, CMYK is converted without a color profile, 16 bits of gray
    are scaled to 8 (value / 257), not clipped at 255. Of 16 bits per color in a file, Pillow reads the upper 8. A
    picture of a turned camera (EXIF orientation) is turned upright, as transformers does it.

    Args:
        value: A path; an encoded file as bytes; a PIL image; an array `[H, W]` or `[H, W, 1|3|4]` of uint8, uint16,
            bool, or float in [0, 1]; or a tensor `[3|1, H, W]` of uint8, or float in [0, 1].
        where: Named in errors.

    Returns:
        uint8 `[H, W, 3]`.

    Raises:
        DataError: Not an image, a PDF, truncated, empty, of another shape or type, NaN or outside [0, 1], more than 20
            MB encoded, or more than 50 million pixels.
    """
    if isinstance(value, str | os.PathLike):
        path = Path(value)
        return read_image(_read_file(path, where), str(path) if where == "image" else f"{where}: {path}")
    if isinstance(value, bytes | bytearray | memoryview):
        return read_image(bytes(value), where)
    if isinstance(value, torch.Tensor):
        return _from_tensor(value, where)
    if isinstance(value, np.ndarray):
        return _from_array(value, where)
    if type(value).__module__.partition(".")[0] == "PIL":
        _check_pixels(value.width, value.height, where)
        return _decode(value, where)
    raise DataError(
        f"{where}: found {type(value).__name__}, expected a path, encoded bytes, a PIL image, an array [H, W] or "
        "[H, W, 3], or a tensor [3, H, W]."
    )


def read_image(raw: bytes, where: str) -> np.ndarray:
    """Decodes an encoded image after checking the size in its header.

    Args:
        raw: The encoded file.
        where: Named in errors.

    Returns:
        uint8 `[H, W, 3]`, converted as by `as_image`.

    Raises:
        DataError: More than 20 MB, more than 50 million pixels, truncated, a PDF, or not an image.
    """
    from PIL import Image, UnidentifiedImageError

    _refuse_documents(raw[:HEAD], where)
    if len(raw) > MAX_BYTES:
        raise DataError(f"{where}: the image has {len(raw):,} bytes, at most {MAX_BYTES:,} are read. Make it smaller.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(raw)) as image:  # reads the header only
                _check_pixels(*image.size, where)
                return _decode(image, where)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(
            f"{where}: the image is too large, at most {MAX_PIXELS:,} pixels are decoded ({error}). Make it smaller."
        ) from error
    except UnidentifiedImageError as error:  # its text holds a memory address, which differs every time
        raise DataError(f"{where}: the image cannot be read (no known format). Download or export it again.") from error
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{where}: the image cannot be read ({error}). Download or export it again.") from error


def _read_file(path: Path, where: str) -> bytes:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            _refuse_documents(file.read(HEAD), str(path) if where == "image" else f"{where}: {path}")
        if size > MAX_BYTES:
            raise DataError(f"{where}: {path} has {size:,} bytes, at most {MAX_BYTES:,} are read. Make it smaller.")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{where}: {path} cannot be read ({error.strerror or error}). Give an image file.") from error


def _refuse_documents(head: bytes, where: str) -> None:
    """Refuses files of pages: Pillow reads no PDF, and gives PostScript to Ghostscript, which would run it."""
    if b"%PDF-" in head:
        kind = "PDF"
    elif head.startswith((b"%!", b"\xc5\xd0\xd3\xc6")):
        kind = "PostScript"
    else:
        return
    first = "" if kind == "PDF" else "make a PDF of it (ps2pdf FILE), then "
    raise DataError(
        f"{where}: this is a {kind} file, and images are read. To give its pages as images, {first}render them: "
        "pdftoppm -r 150 -png FILE page"
    )


def _check_pixels(width: int, height: int, where: str) -> None:
    if width * height > MAX_PIXELS:
        raise DataError(
            f"{where}: the image is {width} x {height} pixels, at most {MAX_PIXELS:,} pixels are decoded. "
            "Make it smaller."
        )
    if width < 1 or height < 1:
        raise DataError(f"{where}: the image is {width} x {height} pixels, it is empty.")


def _decode(image: Image.Image, where: str) -> np.ndarray:
    from PIL import Image, ImageOps

    try:
        tags: Any = getattr(image, "tag_v2", {})  # of a TIFF; a turned image has none
        if image.getexif().get(ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # `convert` would cut 16 bits off at 255
            deep = np.asarray(image)
            if deep.min() < 0 or deep.max() > 65_535:
                raise DataError(f"{where}: 32-bit values from {deep.min()} to {deep.max()}; save it with 8 or 16 bits.")
            return _from_array(_black_is_zero(image, tags, deep.astype(np.uint16)), where)
        if image.mode == "F":
            raise DataError(f"{where}: a float image has no fixed range; save it with 8 or 16 bits.")
        if image.has_transparency_data:
            layer = image.convert("RGBA")
            return np.array(Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB"))
        return np.array(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{where}: the image cannot be read ({error}). Download or export it again.") from error


def _black_is_zero(image: Image.Image, tags: Any, deep: np.ndarray) -> np.ndarray:
    """16-bit gray levels with white as the largest, and white where a PNG is transparent: Pillow leaves both as is."""
    if tags.get(262) == WHITE_IS_ZERO:
        return 65_535 - deep
    clear = image.info.get("transparency")
    return deep if clear is None else np.where(deep == clear, np.uint16(65_535), deep)


def _from_tensor(tensor: torch.Tensor, where: str) -> np.ndarray:
    if tensor.ndim != 3 or tensor.shape[0] not in (1, 3):
        raise DataError(f"{where}: a tensor of shape {tuple(tensor.shape)}, expected [3, H, W] or [1, H, W].")
    if tensor.dtype != torch.uint8 and not tensor.is_floating_point():
        raise DataError(f"{where}: a tensor of {tensor.dtype}, expected uint8, or float in [0, 1].")
    values = tensor.detach().cpu()
    return _from_array((values.float() if values.is_floating_point() else values).permute(1, 2, 0).numpy(), where)


def _from_array(array: np.ndarray, where: str) -> np.ndarray:
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        raise DataError(f"{where}: an array of shape {array.shape}, expected [H, W] or [H, W, 1, 3 or 4].")
    height, width, channels = array.shape
    _check_pixels(width, height, where)
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif array.dtype == np.uint16:
        array = (array.astype(np.uint32) + 128) // 257
    elif np.issubdtype(array.dtype, np.floating):
        low, high = float(array.min()), float(array.max())
        if not (low >= 0.0 and high <= 1.0):  # also NaN
            raise DataError(f"{where}: float values from {low:g} to {high:g}, expected [0, 1] without NaN.")
        array = np.round(array * 255.0)
    elif array.dtype != np.uint8:
        raise DataError(f"{where}: an array of {array.dtype}, expected uint8, uint16, bool, or float in [0, 1].")
    array = array.astype(np.uint8)
    if channels == 4:
        alpha = array[..., 3:].astype(np.uint32)
        return ((array[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    return np.repeat(array, 3, axis=2) if channels == 1 else array.copy()
