"""A host from a third-party package: the one file of docs/adding_a_host.md, and its contract suite."""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.support.paths import ROOT


def _package(folder: Path) -> Path:
    """The files of the page, as an installed package that says its entry point."""
    text = (ROOT / "docs" / "adding_a_host.md").read_text(encoding="utf-8")
    for name, code in re.findall(r"```python\n# file: (\w+\.py)\n(.*?)```", text, re.S):
        (folder / name).write_text(code, encoding="utf-8")
    info = folder / "aya_host-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: aya-host\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[sfa_adapters.hosts]\naya_vision = aya_host\n")
    return folder


def _suite(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-c",
        os.devnull,
        "--rootdir",
        ".",
        *options,
    ]
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *options, "test_aya.py"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def test_a_host_from_outside_passes_the_suite(tmp_path: Path) -> None:
    result = _suite(_package(tmp_path))
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


def test_a_wrong_record_fails_the_suite(tmp_path: Path) -> None:
    """Here one that forgets what the host never reads; a run of the suite takes long, so it is one mistake only."""
    file = _package(tmp_path) / "aya_host.py"
    code, right = file.read_text(), 'unread=("post_layernorm", "head"),'
    assert right in code
    file.write_text(code.replace(right, ""))
    result = _suite(tmp_path, "-k", "training")
    assert result.returncode == 1, result.stdout[-3000:]
    assert "post_layernorm.weight" in result.stdout
