"""Hints for installing are commands that run: they repeat the way in which the library was installed."""

import json
import re
import tomllib
from email.message import Message
from pathlib import Path

import pytest

from sfa_adapters import install
from sfa_adapters.cli.errors import EXTRAS
from tests.support.paths import ROOT

EXTRAS_OF_PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]


class Installed:
    """An installed distribution, as importlib.metadata gives it."""

    def __init__(self, origin: dict | None, urls: tuple[str, ...] = (), place: str = "/nowhere") -> None:
        self.origin, self.place = origin, place
        self.metadata = Message()
        for url in urls:
            self.metadata["Project-URL"] = url

    def locate_file(self, path: str) -> Path:
        return Path(self.place) / path

    def read_text(self, name: str) -> str | None:
        assert name == "direct_url.json"
        return None if self.origin is None else json.dumps(self.origin)


@pytest.mark.parametrize(
    ("installed", "command"),
    [
        (None, 'pip install -e ".[demo]" (in the clone)'),
        (Installed(None), 'pip install "sfa-adapters[demo]"'),
        (Installed(None, place=str(ROOT)), f'pip install -e "{ROOT}[demo]"'),
        (
            Installed({"url": "file:///home/me/my%20clone", "dir_info": {"editable": True}}),
            'pip install -e "/home/me/my clone[demo]"',
        ),
        (
            Installed({"url": "https://e.org/x.git", "vcs_info": {"vcs": "git", "commit_id": "ab12"}}),
            'pip install "sfa-adapters[demo] @ git+https://e.org/x.git@ab12"',
        ),
        (
            Installed({"url": "file:///tmp/x-1-py3-none-any.whl", "archive_info": {}}),
            'pip install "sfa-adapters[demo] @ file:///tmp/x-1-py3-none-any.whl"',
        ),
        (Installed({"url": "file:///tmp/x", "dir_info": {}}), 'pip install "sfa-adapters[demo] @ file:///tmp/x"'),
    ],
    ids=["on the path", "index", "in the clone", "clone", "repository", "wheel", "folder"],
)
def test_the_command_is_the_way_it_was_installed(
    installed: Installed | None, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install, "_installed", lambda: installed)
    assert install.install_command("demo") == command


def test_the_command_here_names_a_place_that_exists() -> None:
    command = install.install_command("demo")
    found = re.search(r'"(.*)\[demo\]"', command)
    assert found is not None
    assert (Path(found[1]) / "pyproject.toml").is_file() or "sfa-adapters" in found[1]


def test_others_install_from_the_repository_where_it_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "_installed", lambda: Installed(None, ("Repository, https://e.org/x", "Docs, d")))
    assert install.install_for_others() == 'pip install "sfa-adapters @ git+https://e.org/x"'
    monkeypatch.setattr(install, "_installed", lambda: Installed(None))
    assert install.install_for_others() == "pip install -e .        # in a clone of sfa-adapters"


def _texts() -> list[Path]:
    folders = ("docs", "sfa_adapters", "backbones", "recipes", "benchmarks", "scripts", ".github")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*") if file.is_file()]
    files += [file for file in ROOT.iterdir() if file.is_file() and file.name != ".git"]
    endings = {".py", ".md", ".ipynb", ".yaml", ".yml", ".toml", ".sh", ""}
    skipped = {"_build", "api", "hosts", "project", "results"}
    return [f for f in files if f.suffix in endings and f.relative_to(ROOT).parts[1:2] not in [(s,) for s in skipped]]


def test_no_hint_names_the_library_as_if_an_index_had_it() -> None:
    """Until it is on the index, `pip install sfa-adapters` does not resolve, or resolves to somebody else's package."""
    texts = _texts()
    assert len(texts) > 300
    wrong = re.compile(r"""pip install (?:-\S+ )*["']?sfa[-_]adapters(?!.*@)""")
    found = {
        str(file.relative_to(ROOT)): hits
        for file in texts
        if (hits := wrong.findall(file.read_text(encoding="utf-8", errors="ignore")))
    }
    assert found == {}


def test_every_extra_in_a_hint_exists() -> None:
    pattern = re.compile(r"""install_command\("(\w+)"\)|pip install [^\n]*?\.\[([\w,]+)\]""")
    names = {
        name
        for file in _texts()
        for pair in pattern.findall(file.read_text(encoding="utf-8", errors="ignore"))
        for name in "".join(pair).split(",")
    }
    assert len(names) > 5
    assert names | set(EXTRAS.values()) <= set(EXTRAS_OF_PROJECT)
