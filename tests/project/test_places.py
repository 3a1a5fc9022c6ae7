"""Each module has a test file of its name, or an entry in `COVERED_BY`."""

from pathlib import Path

from tests.covered_by import COVERED_BY
from tests.support.paths import ROOT

# Folders of tests that are no packages of the library.
OTHERS = {"project", "support"}


def _modules() -> dict[str, Path]:
    """Modules by their path in the package, without the ending."""
    package = ROOT / "sfa_adapters"
    roots = [(package, "")] + [(ROOT / name, f"{name}/") for name in ("backbones", "recipes")]
    return {
        f"{prefix}{file.relative_to(root).with_suffix('').as_posix()}": file
        for root, prefix in roots
        for file in root.rglob("*.py")
        # The links in the package lead to the folders beside it; `__init__` files hold names of others.
        if file.name != "__init__.py" and (prefix or file.relative_to(package).parts[0] not in ("backbones", "recipes"))
    }


def _own_test(module: str) -> str:
    folder, _, name = module.rpartition("/")
    return f"{folder}/test_{name}".removeprefix("/")


def _there(test: str) -> bool:
    return (ROOT / "tests" / f"{test}.py").is_file()


def test_every_module_has_a_test_of_its_name_or_is_in_the_table() -> None:
    modules = _modules()
    assert len(modules) > 250
    without = {module for module in modules if not _there(_own_test(module))}
    assert without - COVERED_BY.keys() == set(), "Add a test file of that name, or a line to tests/covered_by.py."


def test_the_table_has_no_line_too_many() -> None:
    modules = _modules()
    for module, test in COVERED_BY.items():
        assert module in modules, f"There is no module {module} any more."
        assert not _there(_own_test(module)), f"{module} has a test of its own name now."
        assert _there(test), f"There is no tests/{test}.py, which is to test {module}."
    assert list(COVERED_BY) == sorted(COVERED_BY)


def test_folders_of_tests_have_names_of_packages() -> None:
    packages = {module.rpartition("/")[0] for module in _modules()}
    packages |= {parent.as_posix() for package in packages for parent in Path(package).parents}
    for folder in {file.parent.relative_to(ROOT / "tests") for file in (ROOT / "tests").rglob("test_*.py")}:
        assert folder.as_posix() in packages | OTHERS, f"sfa_adapters has no package {folder}."
        assert (ROOT / "tests" / folder / "__init__.py").is_file()


def test_no_test_lies_among_the_helpers() -> None:
    assert not list((ROOT / "tests" / "support").rglob("test_*.py"))
