"""Code in processes that have not imported this library or PEFT yet, but already what these import.

Importing torch and transformers takes most of the time of such a process. So one process imports them, and a fork of it
runs each piece of code.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.support.paths import ROOT

__all__ = ["errors_of"]

LIBRARIES = ("torch", "accelerate", "bitsandbytes", "transformers.modeling_utils", "transformers.models.auto")
_FORKS = """
import contextlib, importlib, json, os, sys, traceback
for name in sys.argv[1:]:
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
assert not {"peft", "sfa_adapters"} & set(sys.modules)
for name, code in json.load(open("codes.json")).items():
    if os.fork() == 0:
        status = 1
        try:
            exec(code, {"__name__": "__main__"})
            status = 0
        except BaseException:
            open(name + ".error", "w").write(traceback.format_exc())
        os._exit(status)
    status = os.wait()[1]
    if status and not os.path.exists(name + ".error"):
        open(name + ".error", "w").write(f"ended with {status}")
"""


def errors_of(codes: Mapping[str, str], folder: Path, first: Sequence[str] = LIBRARIES) -> dict[str, str]:
    """Runs each piece of code in a fork.

    Args:
        codes: Python code by name.
        folder: An empty folder.
        first: Modules that are imported before.

    Returns:
        By name, the traceback of each that failed.
    """
    (folder / "codes.json").write_text(json.dumps(codes))
    done = subprocess.run(
        [sys.executable, "-c", _FORKS, *first],
        check=False,
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return {file.stem: file.read_text() for file in folder.glob("*.error")}
