"""`CommandApp`: the common settings of all groups of commands of `sfa`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer

from sfa_adapters.cli.quiet import QuietCommand

__all__ = ["CommandApp"]


class CommandApp(typer.Typer):
    """A `typer.Typer` with the settings of this program.

    Args:
        options: As for `typer.Typer`.
    """

    def __init__(self, **options: Any) -> None:
        fixed: dict[str, Any] = {"no_args_is_help": True, "rich_markup_mode": "rich", "pretty_exceptions_enable": False}
        super().__init__(**{**fixed, **options})

    def command(self, name: str | None = None, **options: Any) -> Callable[[Any], Any]:
        """As `typer.Typer.command`, with this program's command class.

        Args:
            name: Name of the command; by default that of the function.
            options: As for `typer.Typer.command`.
        """
        return super().command(name, **{"cls": QuietCommand, **options})
