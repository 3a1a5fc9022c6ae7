"""The wheel and the package metadata match the files on disk."""

import re
import tomllib
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import setuptools.build_meta

from tests.support.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
# Where the sources of a package really are; the links inside sfa_adapters/ lead there.
MAPPED = {"sfa_adapters.backbones": ROOT / "backbones", "sfa_adapters.recipes": ROOT / "recipes"}


def _packages_on_disk() -> set[str]:
    packages = set(MAPPED)
    for file in (ROOT / "sfa_adapters").rglob("__init__.py"):
        packages.add(".".join(file.parent.relative_to(ROOT).parts))
    for name, folder in MAPPED.items():
        packages |= {".".join((name, *file.parent.relative_to(folder).parts)) for file in folder.rglob("__init__.py")}
    return packages


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names in the wheel, built from a copy of what git tracks or would track, without a network."""
    import os
    import shutil

    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for part in ("sfa_adapters", "backbones", "recipes"):
        shutil.copytree(ROOT / part, source / part, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / part, source / part)
    here = Path.cwd()
    os.chdir(source)
    try:
        name = setuptools.build_meta.build_wheel(str(folder))
    finally:
        os.chdir(here)
    with zipfile.ZipFile(folder / name) as archive:
        return set(archive.namelist())


def test_the_package_list_is_what_is_on_disk() -> None:
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == _packages_on_disk()


def test_the_links_are_links_to_the_real_folders() -> None:
    for name, folder in MAPPED.items():
        link = ROOT / name.replace(".", "/")
        assert link.is_symlink()
        assert link.resolve() == folder


def test_the_wheel_has_one_top_level_name(wheel: set[str]) -> None:
    tops = {name.partition("/")[0] for name in wheel}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"sfa_adapters"}


def test_the_wheel_holds_every_module_and_the_data(wheel: set[str]) -> None:
    expected = {"sfa_adapters/py.typed", "sfa_adapters/backend_times.json"}
    expected.add("sfa_adapters/recipes/density/debian_packages.json")
    for package in PROJECT["tool"]["setuptools"]["packages"]:
        folder = MAPPED[package] if package in MAPPED else ROOT / package.replace(".", "/")
        files = [file for ending in ("py", "safetensors", "yaml") for file in folder.glob(f"*.{ending}")]
        expected |= {f"{package.replace('.', '/')}/{file.name}" for file in files}
    packaged = {name for name in wheel if name.startswith("sfa_adapters/")}
    assert packaged == expected


def test_every_backbone_file_is_an_entry_point_and_loads() -> None:
    declared = PROJECT["project"]["entry-points"]["sfa_adapters.backbones"]
    files = {file.stem for file in (ROOT / "backbones").glob("*.py")} - {"__init__"}
    assert {target.rpartition(".")[2] for target in declared.values()} == files
    installed = {point.name: point for point in entry_points(group="sfa_adapters.backbones")}
    for name in declared:
        assert installed[name].load().__name__ == declared[name]


def test_the_version_is_the_same_everywhere() -> None:
    import sfa_adapters

    version = PROJECT["project"]["version"]
    assert sfa_adapters.__version__ == version
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_shipped_weights_are_small() -> None:
    shipped = list((ROOT / "recipes").rglob("*.safetensors"))
    assert shipped
    for file in shipped:
        assert file.stat().st_size <= 10 * 2**20, file.name


def _block(marker: str) -> list[str]:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(rf"^<!-- fresh: {marker} -->\n+```\w*\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    assert block, f"README.md has no block under <!-- fresh: {marker} -->"
    return block[1].splitlines()


def test_the_readme_has_the_two_commands() -> None:
    demo, test = "\n".join(_block("demo")), "\n".join(_block("test"))
    assert 'pip install -e ".[demo]"' in demo
    assert "sfa demo" in demo
    assert 'uv pip install --python python -e ".[test]"' in test
    assert "pytest" in test


def test_ci_runs_the_readme_and_nothing_else() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "<!-- fresh: test -->" in script
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100


def test_links_in_the_docs_lead_somewhere() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"
