"""Files of Debian packages, documentation above all: downloaded by apt, checked by SHA-256, unpacked, not installed.

The list `debian_packages.json` names every package with its version, its SHA-256 and its part (train, val or test). No
page of them is in this repository: whoever wants the set makes it from the list.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from sfa_adapters.errors import DataError
from sfa_adapters.recipes.synthetic.tables import Split

__all__ = ["LIST", "DebianPackage", "Kind", "check_tools", "download", "read_list", "run_tool", "unpack"]

LIST = Path(__file__).with_name("debian_packages.json")
Kind = Literal["pages", "fonts", "photographs"]
ENDINGS: dict[Kind, tuple[str, ...]] = {
    "pages": (".pdf", ".pdf.gz"),
    "fonts": (".ttf", ".otf", ".ttc"),
    "photographs": (".jpg", ".jpeg", ".png", ".webp"),
}
# The program, and the Debian package that has it.
TOOLS = {"apt-get": "apt", "dpkg-deb": "dpkg", "pdftoppm": "poppler-utils", "pdftotext": "poppler-utils"}
MINUTES = 10  # for one call of a program; a package of 100 MB takes seconds
LARGEST = 200_000_000  # bytes of one PDF; larger ones are left out


@dataclass(frozen=True)
class DebianPackage:
    """One package of the list.

    Attributes:
        name: Name of the package.
        version: Its Debian version.
        sha256: SHA-256 of the .deb file.
        part: train, val or test; all pages of a package are in one part.
        kind: What is taken out of it: pages of its PDF files, its fonts (for text drawn in training and in tests of
            handwriting-like print), or its photographs (for pictures without text).
    """

    name: str
    version: str
    sha256: str
    part: Split
    kind: Kind = "pages"


def read_list(path: Path = LIST) -> tuple[DebianPackage, ...]:
    """Reads the list of packages.

    Args:
        path: A JSON file; by default the list of the library.

    Raises:
        DataError: The file cannot be read, an entry is incomplete, or a package is named twice.
    """
    try:
        entries = json.loads(path.read_text())
        packages = tuple(DebianPackage(**entry) for entry in entries)
    except (OSError, json.JSONDecodeError, TypeError) as error:
        raise DataError(f"{path} is not a list of packages with name, version, sha256 and part ({error}).") from error
    names = [package.name for package in packages]
    for package in packages:
        if package.part not in get_args(Split) or package.kind not in get_args(Kind) or names.count(package.name) > 1:
            raise DataError(
                f"{path}: {package.name} has part {package.part!r}, kind {package.kind!r}, or is there twice."
            )
    return packages


def check_tools(names: Sequence[str] = tuple(TOOLS)) -> None:
    """Checks that the programs are there, before the first download.

    Raises:
        DataError: One is missing; says which package of Debian has it.
    """
    missing = [name for name in names if shutil.which(name) is None]
    if missing:
        packages = sorted({TOOLS[name] for name in missing})
        raise DataError(
            f"{', '.join(missing)} not found. Real pages are made on Debian or Ubuntu with: apt install "
            f"{' '.join(packages)} poppler-data"
        )


def run_tool(*command: str | Path, folder: Path | None = None) -> str:
    """Runs a program and returns what it prints.

    Args:
        command: The program and its arguments; no shell reads them.
        folder: Its working folder.

    Raises:
        DataError: It fails or takes too long; with the first line that it wrote.
    """
    words = [str(word) for word in command]
    # The language of the system must not change what the program prints.
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}
    try:
        done = subprocess.run(  # noqa: S603
            words, cwd=folder, env=environment, capture_output=True, timeout=60 * MINUTES, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise DataError(f"{words[0]} took longer than {MINUTES} minutes: {' '.join(words)}") from error
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise DataError(f"{' '.join(words)} failed: {lines[0] if lines else f'exit code {done.returncode}'}")
    return done.stdout.decode(errors="replace")


def download(package: DebianPackage, folder: Path) -> Path:
    """Downloads a package with apt, in the listed version, and checks its SHA-256.

    Args:
        package: Which one.
        folder: Where .deb files are kept; one that is there already is checked and used.

    Returns:
        The .deb file.

    Raises:
        DataError: apt cannot download this version, or the file has another SHA-256.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pattern = f"{package.name}_{package.version.replace(':', '%3a')}_*.deb"
    if not sorted(folder.glob(pattern)):
        try:
            run_tool("apt-get", "download", "-q", f"{package.name}={package.version}", folder=folder)
        except DataError as error:
            raise DataError(
                f"{package.name} {package.version} cannot be downloaded ({error}). The list is of Debian 12; run "
                "`apt-get update`, or add its archive of old versions to the sources of apt."
            ) from error
    files = sorted(folder.glob(pattern))
    if not files:
        raise DataError(f"apt-get downloaded no {pattern} into {folder}.")
    with files[0].open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != package.sha256:
        raise DataError(f"{files[0]} has SHA-256 {digest}, the list says {package.sha256}. Delete it and try again.")
    return files[0]


def unpack(archive: Path, folder: Path, kind: Kind = "pages") -> list[Path]:
    """Unpacks a package, without installing it or running its scripts, and lists the files of one kind.

    Args:
        archive: The .deb file.
        folder: Folder to unpack into; other files are deleted again.
        kind: Which files are wanted.

    Returns:
        The files, sorted by path; compressed ones (`.pdf.gz`) are unpacked.

    Raises:
        DataError: The archive cannot be unpacked.
    """
    root = folder / archive.stem
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    run_tool("dpkg-deb", "-x", archive.resolve(), root)
    for path in sorted(root.rglob("*"), reverse=True):
        # A link may lead out of the folder.
        if path.is_symlink() or (path.is_file() and not path.name.casefold().endswith(ENDINGS[kind])):
            path.unlink()
        elif path.is_file() and path.suffix == ".gz":
            _gunzip(path)
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    return sorted(path for path in root.rglob("*") if path.is_file() and path.stat().st_size <= LARGEST)


def _gunzip(path: Path) -> None:
    """Unpacks a file; what is beyond the largest size of a PDF is cut off, so that it cannot be opened: left out."""
    with gzip.open(path, "rb") as packed:
        content = packed.read(LARGEST + 1)
    path.unlink()
    path.with_suffix("").write_bytes(content)
