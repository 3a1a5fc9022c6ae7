"""What other libraries say about themselves on stderr, silenced for the command line; never in the library.

Errors are left alone, and so are warnings of this library, which are shown in one line each. Bars of downloads
stay too: they say how long a person waits.
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
# Set before the libraries are imported; what a person has set already stays.
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
    """Silences other libraries in this process; for the program `sfa`, not for those who call `main` from Python.

    Whoever runs `python -W ...` sees the warnings that they asked for.
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
    """A command that turns the bars of transformers off when it starts to work, and so not for `--help`.

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
