"""One-line messages for errors that the user can fix, shown without a stack trace."""

from __future__ import annotations

import errno

from sfa_adapters.errors import SFAError
from sfa_adapters.install import install_command

__all__ = ["EXTRAS", "one_line"]

# Packages that a command may need, and the extra that installs them.
EXTRAS = {
    "PIL": "demo",
    "accelerate": "recipes",
    "bitsandbytes": "recipes",
    "cv2": "vision",
    "datasets": "recipes",
    "matplotlib": "demo",
    "onnxruntime": "ocr",
    "rapidocr": "ocr",
    "skimage": "recipes",
    "timm": "timm",
    "torchvision": "recipes",
}
FULL = (errno.ENOSPC, errno.EDQUOT)


def one_line(error: BaseException) -> str | None:
    """The message for an error of the user or of the machine (path, disk, network, missing package).

    Args:
        error: The exception that a command raised.

    Returns:
        One line, or None for a bug of this library, whose stack trace is needed.
    """
    if isinstance(error, SFAError):
        text = str(error)
    elif isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
        text = f"{error.name} is not installed. Run: {install_command(EXTRAS[error.name])}"
    elif isinstance(error, OSError):
        text = _of_system(error)
    elif _is_disk(error):
        text = f"A file could not be written: {error}"
    else:
        return None
    return " | ".join(line.strip() for line in text.splitlines() if line.strip()) or type(error).__name__


def _of_system(error: OSError) -> str:
    where = error.filename2 or error.filename
    if error.errno in FULL:
        return (
            f"The disk is full{f': {where} could not be written' if where else ''}. Free some space and run it again."
        )
    if error.errno is None:  # the clients of the hub and of datasets raise theirs with a text of their own
        return str(error)
    reason = error.strerror or str(error)
    return f"{where} cannot be read or written: {reason}." if where else reason


def _is_disk(error: BaseException) -> bool:
    from sfa_adapters.files import is_disk_error

    return isinstance(error, Exception) and is_disk_error(error)
