"""OCR with `rapidocr`, whose models come with its package, so that it runs offline. Imported only when used."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from sfa_adapters.images import as_image
from sfa_adapters.install import install_command

__all__ = ["ocr_engine", "ocr_texts"]


@cache
def ocr_engine() -> Any:
    """The OCR engine, built at the first call: loading its three networks takes seconds.

    Raises:
        ModuleNotFoundError: `rapidocr` or `onnxruntime` is missing; the text says how to install them.
    """
    try:
        import onnxruntime  # noqa: F401  # rapidocr would fail only later, with a less clear error
        from rapidocr import RapidOCR
    except ModuleNotFoundError as error:
        message = f"{error.name} is not installed. Run: {install_command('ocr')}"
        raise ModuleNotFoundError(message, name=error.name) from error
    return RapidOCR(params={"Global.log_level": "error"})


def ocr_texts(image: Any) -> tuple[str, ...]:
    """Reads the lines of text on an image.

    Args:
        image: Anything that `sfa_adapters.images.as_image` takes. A side longer than 2000 px is made smaller by the
            engine, so very small print on a very large page is lost.

    Returns:
        One text per line that was read with at least the engine's threshold of confidence (0.5); empty where there is
        none.

    Raises:
        DataError: The image cannot be used.
        ModuleNotFoundError: `rapidocr` or `onnxruntime` is missing; the text says how to install them.
    """
    picture = as_image(image)
    # All three steps, angle correction too: without it, vertical labels (rotated ticks) are read upside down.
    texts = ocr_engine()(np.ascontiguousarray(picture[..., ::-1]), use_det=True, use_cls=True, use_rec=True).txts
    return tuple(texts or ())
