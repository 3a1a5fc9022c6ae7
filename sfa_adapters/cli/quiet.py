"""Silences the warnings and logs of other libraries in the command line; never when this library is imported.

Errors are still shown, and so are warnings of this library, in one line each. Progress bars of downloads stay too: they
show how long it takes.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import Any, ClassVar, TextIO

import typer
from typer.core import TyperCommand

from sfa_adapters.errors import SFAWarning

__all__ = ["QuietCommand", "silence_others"]

OURS = "sfa_adapters"
# Set before the libraries are imported; variables that are set already are kept.
VARIABLES = {
    "DATASETS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TRANSFORMERS_VERBOSITY": "error",
}
LOGGERS = ("absl", "bitsandbytes", "datasets", "huggingface_hub", "matplotlib", "peft", "PIL", "torch", "transformers")


def silence_others() -> None:
    """Silences other libraries in this process; for the program `sfa`, not for calls of `main` from Python.

    With `python -W ...` the warnings chosen there are shown.
    """
    QuietCommand.quiet = True
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
        # By class, too: a warning may point at the caller, which is torch or a trainer.
        warnings.simplefilter("default", SFAWarning)
        warnings.filterwarnings("default", module=rf"{OURS}(\.|$)")
        warnings.showwarning = _show


def _show(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    del category, filename, lineno, file, line
    typer.echo("note: " + " ".join(str(message).split()), err=True)


class QuietCommand(TyperCommand):
    """A command that turns off the progress bars of transformers before it runs (not for `--help`, which stays quick).

    Attributes:
        quiet: Whether other libraries are silenced in this process.
    """

    quiet: ClassVar[bool] = False

    def invoke(self, ctx: Any) -> Any:
        """Runs the command.

        Args:
            ctx: Its context.
        """
        if self.quiet:
            from transformers.utils.logging import disable_progress_bar

            disable_progress_bar()
        return super().invoke(ctx)
