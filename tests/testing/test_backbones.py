"""The contract suite on a third-party package: installed, found by entry point, passed, and failed."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sfa_adapters.testing import BackboneContract, TowerCase, backbone_contract
from tests.support.paths import ROOT
from tests.support.towers import CASES

TEST = """
from sfa_adapters.testing import backbone_contract

TestPage = backbone_contract("page", "pages")
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """An installed package: two modules, and a folder of metadata as pip would write it."""
    for name in ("page_towers.py", "page_cases.py"):
        shutil.copy(ROOT / "tests" / "support" / "outside" / name, tmp_path)
    metadata = tmp_path / "page_towers-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: page-towers\nVersion: 1.0\n", "utf-8")
    (metadata / "entry_points.txt").write_text("[sfa_adapters.backbones]\npage = page_towers\n", "utf-8")
    (tmp_path / "test_page.py").write_text(TEST, "utf-8")
    return tmp_path


def run_pytest(folder: Path, *arguments: str) -> tuple[int, str]:
    """Exit code and output of pytest, run in the folder of the package."""
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"},
        timeout=900,
    )
    return done.returncode, done.stdout + done.stderr


def replace_in(file: Path, old: str, new: str) -> None:
    text = file.read_text("utf-8")
    assert old in text
    file.write_text(text.replace(old, new), "utf-8")


def test_a_package_outside_of_the_repository_runs_the_whole_suite(package: Path) -> None:
    # All of it on one tower; on the other what is special about it: images one at a time, a prefix, another size.
    checks = "pages or description or slow_reference or two_grids or begins_with_an_operation or different_images"
    code, output = run_pytest(package, "test_page.py", "-k", checks)
    assert code == 0, output
    passed = re.search(r"(\d+) passed", output)
    assert passed, output
    assert int(passed[1]) >= 59, output
    reasons = set(re.findall(r"^SKIPPED .*?: (.*)$", output, re.MULTILINE))
    assert reasons == {
        "the inputs of this small tower are one image",
    }


def test_a_wrong_mask_argument_fails_loudly(package: Path) -> None:
    """Run without a test file: the suite finds the towers by the package's entry point."""
    replace_in(package / "page_towers.py", 'mask_argument="extra_logits"', 'mask_argument="unused"')
    code, output = run_pytest(
        package, "--pyargs", "sfa_adapters.testing", "-k", "(bias_changes_every_image or slow_reference) and page"
    )
    assert code == 1, output
    assert "passed" not in output.splitlines()[-1], output
    assert "BiasNotAppliedError: blocks.0.mixer (PageAttention) ran without using its bias" in output


def test_a_class_runs_over_the_towers_that_it_is_given() -> None:
    assert [case.name for case in backbone_contract("siglip").cases] == ["siglip"]
    assert [case.name for case in backbone_contract().cases] == [case.name for case in CASES]
    mine = CASES[0]
    contract = backbone_contract(mine, "siglip")
    assert issubclass(contract, BackboneContract)
    assert contract.cases[0] is mine
    assert all(isinstance(case, TowerCase) for case in contract.cases)
