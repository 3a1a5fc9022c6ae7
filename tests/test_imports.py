"""Imports: light, in the right direction, under one name."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, cwd=ROOT, timeout=300
    )


def test_importing_the_library_needs_no_extra_and_touches_no_gpu() -> None:
    optional = ["timm", "cv2", "matplotlib", "datasets", "PIL", "torchvision", "pandas", "bitsandbytes"]
    done = _python(
        f"import sys\nfor name in {optional}: sys.modules[name] = None\n"
        "import sfa_adapters, torch\n"
        "from sfa_adapters import cli, figures, metrics\n"
        "from sfa_adapters.registry import registered_backbones\n"
        "assert len(registered_backbones()) >= 6\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("folder", ["backbones", "recipes"])
def test_the_mapped_folders_refuse_their_short_name(folder: str) -> None:
    done = _python(f"import {folder}")
    assert done.returncode != 0
    assert f"Import sfa_adapters.{folder}, not {folder}. Run: pip install -e ." in done.stderr


def test_no_import_runs_upward() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_the_code_is_clean() -> None:
    folders = ["sfa_adapters", "backbones", "recipes", "benchmarks", "tests"]
    command = [sys.executable, "-m", "ruff", "check", *(folder for folder in folders if (ROOT / folder).is_dir())]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
