"""`sfa`: the command line. Each command imports what it needs, so that `sfa --help` stays quick.

Mistakes of the user end with one line on stderr, the text of the error, and exit code 2.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Annotated, Any

import typer

from sfa_adapters.cli.analyze import app as analyze_app
from sfa_adapters.cli.app import CommandApp
from sfa_adapters.cli.bench import app as bench_app
from sfa_adapters.cli.calibrate import app as calibrate_app
from sfa_adapters.cli.density import app as density_app
from sfa_adapters.cli.errors import one_line
from sfa_adapters.cli.evaluate import app as eval_app
from sfa_adapters.cli.options import from_dataclass
from sfa_adapters.cli.quiet import silence_others
from sfa_adapters.cli.share import app as share_app
from sfa_adapters.cli.study import app as study_app
from sfa_adapters.cli.train import app as train_app
from sfa_adapters.moved import OldMain
from sfa_adapters.recipes.demo.options import DemoConfig

__all__ = ["app", "main"]

app = CommandApp(
    name="sfa",
    help="Structural attention bias for the vision tower of any vision-language model.",
    epilog="Examples:  sfa demo   |   sfa inspect google/siglip-so400m-patch14-384   |   sfa --install-completion",
)
app.add_typer(analyze_app)
app.add_typer(bench_app)
app.add_typer(calibrate_app)
app.add_typer(density_app)
app.add_typer(train_app)
app.add_typer(eval_app)
app.add_typer(share_app)  # no name: its commands stand beside `demo`
app.add_typer(study_app)
# The base class of all errors of usage; typer exports only this subclass by name.
_UsageError: type[Exception] = typer.BadParameter.__base__ or typer.BadParameter


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"sfa-adapters {version('sfa-adapters')}")
        raise typer.Exit


@app.callback()
def _group(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Structural attention bias for the vision tower of any vision-language model."""


@app.command(epilog="Example:  sfa inspect vit_base_patch16_siglip_384")
def inspect(
    model: Annotated[str, typer.Argument(help="A Hugging Face model id, a folder, a run, a recipe, or a timm name.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the modelling code that comes with the model.")
    ] = False,
) -> None:
    """Show the vision tower of MODEL and what SFA would add to it. Reads only its configuration, no weights."""
    from sfa_adapters.recipes.inspect_model import inspect_model

    inspection = inspect_model(model, trust_remote_code)
    if as_json:
        typer.echo(json.dumps(inspection.as_dict(), indent=2))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    summary = Table.grid(padding=(0, 2))
    summary.add_row("model", inspection.model)
    summary.add_row("class", f"{inspection.model_class}, {inspection.model_parameters:,} parameters")
    for line in str(inspection.sfa).splitlines():
        label, _, text = line.partition(" ")
        if label != "adapters":
            summary.add_row("SFA adds" if label == "parameters" else label, text.strip())
    summary.columns[-1].overflow = "fold"  # a folder may be longer than a line
    console.print(summary)
    layers = Table("layer", "path in the tower", "attention", "parameters", box=box.SIMPLE_HEAD)
    layers.columns[1].overflow = layers.columns[2].overflow = "fold"  # names are never cut
    layers.columns[0].justify = layers.columns[-1].justify = "right"
    for layer in inspection.layers:
        count = f"{layer.parameters:,}" if layer.parameters else "not read by the host"
        path = layer.path.removeprefix(f"{inspection.sfa.tower}.")  # below the tower, so that it fits a line
        layers.add_row(str(layer.index), path, layer.attention.rpartition(".")[2], count)
    layers.add_section()
    layers.add_row("", "", "all", f"{inspection.sfa.num_parameters:,}")
    console.print(layers)


@app.command(epilog="Example:  sfa demo --steps 100 --out my-demo   |   sfa demo --task charts")
@from_dataclass(DemoConfig, fields=("task", "host", "steps", "seed", "out", "weights", "questions"))
def demo(config: DemoConfig) -> None:
    """Teach a small pretrained model to read real tables, with SFA and without, and compare."""
    from sfa_adapters.recipes.demo.run import run_demo

    run_demo(config)


def main(arguments: list[str] | None = None) -> None:
    """Runs `sfa` and exits: 0 on success, 2 on a mistake of the user, 130 when interrupted.

    Args:
        arguments: Command-line arguments; by default those of the process. If they are given, settings of warnings and
            logging are not changed.
    """
    # Otherwise torch's profiler, which measures peak memory on a CPU, would write into the tables.
    os.environ.setdefault("KINETO_LOG_LEVEL", "10")
    if arguments is None:
        silence_others()
    try:
        code = app(arguments, standalone_mode=False, prog_name="sfa")
    except _UsageError as error:
        message = getattr(error, "format_message", error.__str__)()
        if not message:  # no command at all: the help is on the screen already
            sys.exit(2)
        context: Any = getattr(error, "ctx", None)
        _fail(f"{message} (see: {context.command_path if context else 'sfa'} --help)")
    except (typer.Abort, KeyboardInterrupt):
        typer.echo("interrupted", err=True)
        sys.exit(130)
    except BrokenPipeError:  # the reader of a pipe, e.g. `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        message = one_line(error)
        if message is None:
            raise
        _fail(message)
    else:
        sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> None:
    typer.echo("sfa: " + " | ".join(line.strip() for line in message.splitlines()), err=True)
    sys.exit(2)


sys.modules[__name__].__class__ = OldMain
