"""Imports: cheap, downward only, and each module under one name."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.fresh import errors_of
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
        "from sfa_adapters.vlm.records import registered_vlms\n"
        "assert len(registered_backbones()) >= 6\n"
        "assert len(registered_vlms()) >= 14\n"
        "main.main(['recipes'])\n"
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


CHECK = "from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as known\nassert 'SFA' in known"
IN_NEW_PROCESSES = {
    "every public name is found when it is used": """
import sfa_adapters
assert set(sfa_adapters.__all__) <= set(dir(sfa_adapters))
for name in sfa_adapters.__all__: assert callable(getattr(sfa_adapters, name)), name
assert sfa_adapters.observe.__name__ == "observe"
try: sfa_adapters.nonsense
except AttributeError as error: assert "nonsense" in str(error)
else: raise SystemExit("nonsense is there")
""",
    "observe is the function also where its module was imported first": """
import sfa_adapters.observe
from sfa_adapters import observe
import torch
from sfa_adapters.errors import SFAError
try: observe(torch.nn.Linear(2, 2), lambda call: None).__enter__()
except SFAError: pass
else: raise SystemExit("observed nothing in silence")
""",
    "peft knows SFA whose configuration came first": f"from sfa_adapters import SFAConfig; import peft\n{CHECK}",
    "peft knows SFA that was imported behind it": f"import peft; import sfa_adapters\n{CHECK}",
    "peft knows SFA that was imported before": f"from sfa_adapters import inject_sfa; import peft\n{CHECK}",
    "using the library checks the versions and importing it does not": """
import sys, importlib.metadata as m; real = m.version
m.version = lambda name: "9.9" if name == "peft" else real(name)
import sfa_adapters, warnings
assert "sfa_adapters.compat" not in sys.modules
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    from sfa_adapters import inject_sfa, observe
    import sfa_adapters.heads, sfa_adapters.adat
texts = [str(w.message) for w in seen if w.category.__name__ == "UntestedVersionWarning"]
assert str(texts).count("peft 9.9 is installed") == 1, texts
""",
}


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return errors_of(IN_NEW_PROCESSES, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("what", IN_NEW_PROCESSES)
def test_in_a_new_process(what: str, errors: dict[str, str]) -> None:
    assert errors.get(what) is None


def test_an_error_in_a_new_process_is_seen(tmp_path: Path) -> None:
    """Else the tests above could not fail."""
    codes = {"fine": "", "wrong": "assert False, 'it is wrong'", "killed": "import os; os.kill(os.getpid(), 9)"}
    errors = errors_of(codes, tmp_path, first=())
    assert errors.keys() == {"wrong", "killed"}
    assert "it is wrong" in errors["wrong"]
