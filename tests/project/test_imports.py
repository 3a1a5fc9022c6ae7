"""Imports: cheap, downward only, and each module under one name."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, cwd=ROOT, timeout=300
    )


def test_importing_the_library_needs_no_extra_and_touches_no_gpu() -> None:
    optional = ["timm", "cv2", "matplotlib", "datasets", "PIL", "torchvision", "pandas", "bitsandbytes"]
    done = _python(
        f"import sys\nfor name in {optional}: sys.modules[name] = None\n"
        "import sfa_adapters, torch\n"
        "from sfa_adapters import figures, metrics\n"
        "from sfa_adapters.cli import main\n"
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


HEAVY = ("torch", "transformers", "peft", "numpy", "timm", "PIL", "huggingface_hub", "accelerate")


@pytest.mark.parametrize(
    "arguments", [None, ["--help"], ["train", "--help"], ["calibrate", "heads", "--help"], ["bench", "heads", "--help"]]
)
def test_importing_and_help_wait_for_no_heavy_package(arguments: list[str] | None) -> None:
    call = f"from sfa_adapters.cli.main import main\ntry: main({arguments})\nexcept SystemExit: pass\n"
    use = "assert 'sfa_adapters.moved' not in sys.modules\n" if arguments is None else call
    done = _python(f"import sys\nimport sfa_adapters\n{use}print(sorted(sys.modules.keys() & set({HEAVY})))")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_every_public_name_is_found_when_it_is_used() -> None:
    done = _python(
        "import sfa_adapters\n"
        "assert set(sfa_adapters.__all__) <= set(dir(sfa_adapters))\n"
        "for name in sfa_adapters.__all__: assert callable(getattr(sfa_adapters, name)), name\n"
        "assert sfa_adapters.observe.__name__ == 'observe'\n"
        "try: sfa_adapters.nonsense\n"
        "except AttributeError as error: assert 'nonsense' in str(error)\n"
        "else: raise SystemExit('nonsense is there')\n"
    )
    assert done.returncode == 0, done.stderr


def test_observe_is_the_function_also_where_its_module_was_imported_first() -> None:
    done = _python(
        "import sfa_adapters.observe\n"
        "from sfa_adapters import observe\n"
        "import torch\n"
        "from sfa_adapters.errors import SFAError\n"
        "try: observe(torch.nn.Linear(2, 2), lambda call: None).__enter__()\n"
        "except SFAError: pass\n"
        "else: raise SystemExit('observed nothing in silence')\n"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "imports",
    [
        "from sfa_adapters import SFAConfig; import peft",
        "import peft; import sfa_adapters",
        "from sfa_adapters import inject_sfa; import peft",
    ],
)
def test_peft_knows_the_method(imports: str) -> None:
    check = "from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as known\nassert 'SFA' in known"
    done = _python(f"{imports}\n{check}")
    assert done.returncode == 0, done.stderr
