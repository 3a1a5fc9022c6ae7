"""The command that installs this library with an extra, for messages about a missing package.

It is the way in which the library was installed, which pip and uv write down (PEP 610): the folder of a clone, or the
address of a repository or file. So the command runs as it stands, and names a package index only if the library came
from one.
"""

from __future__ import annotations

import json
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

__all__ = ["install_command", "install_for_others"]

NAME = "sfa-adapters"


def _installed() -> Distribution | None:
    try:
        return distribution(NAME)
    except PackageNotFoundError:
        return None


def install_command(extra: str) -> str:
    """The command that brings the packages of an extra.

    Args:
        extra: Name of the extra in pyproject.toml, such as "demo".

    Returns:
        One line, such as `pip install -e "/home/me/clone[demo]"`.
    """
    installed = _installed()
    if installed is None:  # run from a clone that is only on the path
        return f'pip install -e ".[{extra}]" (in the clone)'
    origin = json.loads(installed.read_text("direct_url.json") or "null")
    if origin is None:
        clone = Path(str(installed.locate_file("")))
        if (clone / "pyproject.toml").is_file():  # the metadata that an editable install leaves in the clone
            return f'pip install -e "{clone.resolve()}[{extra}]"'
        return f'pip install "{NAME}[{extra}]"'
    url: str = origin["url"]
    if origin.get("dir_info", {}).get("editable"):
        return f'pip install -e "{url2pathname(unquote(urlsplit(url).path))}[{extra}]"'
    if version_control := origin.get("vcs_info"):
        url = f"{version_control['vcs']}+{url}@{version_control['commit_id']}"
    return f'pip install "{NAME}[{extra}] @ {url}"'


def install_for_others() -> str:
    """The command for somebody who does not have the library yet, for model cards.

    Returns:
        One line: from the repository that the package's metadata names, else from a clone.
    """
    installed = _installed()
    urls = (installed.metadata.get_all("Project-URL") or []) if installed else []
    addresses = dict(entry.split(", ", 1) for entry in urls)
    if "Repository" in addresses:
        return f'pip install "{NAME} @ git+{addresses["Repository"]}"'
    return f"pip install -e .        # in a clone of {NAME}"
