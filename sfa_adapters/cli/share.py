"""`sfa share` and `sfa export`: puts an adapter on the hub, or writes a model that loads without this library."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sfa_adapters.cli.app import CommandApp
from sfa_adapters.errors import RecipeError

__all__ = ["app"]

app = CommandApp()


@app.command(epilog="Example:  sfa share runs/internvl3_5_8b --repo me/chart-adapter --results --dry-run")
def share(
    run: Annotated[Path, typer.Argument(help="Folder of a run, or of its trained adapter.")],
    repo: Annotated[str | None, typer.Option(help="user/name on the hub; without it only the card is written.")] = None,
    results: Annotated[bool, typer.Option("--results", help="Send tables, predictions and pictures too.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and list the files; send nothing.")] = False,
    private: Annotated[bool | None, typer.Option(help="Of a new repository; your account's default otherwise.")] = None,
    licence: Annotated[str | None, typer.Option("--license", help="As the hub names it, e.g. apache-2.0.")] = None,
) -> None:
    """Write the model card of RUN and send the adapter to the Hugging Face hub."""
    from sfa_adapters.evaluation.open_host import find_run
    from sfa_adapters.sharing.hub import share as send

    if repo is None and (results or dry_run):
        raise RecipeError("--results and --dry-run say what goes to the hub: give --repo user/name too.")
    adapter = find_run(run)
    if adapter is None:
        raise RecipeError(f"{run} holds no trained adapter (recipe.json). Give the folder of a finished run.")
    done = send(adapter, repo, results=run if results else None, licence=licence, private=private, dry_run=dry_run)
    for name, size in done.files.items():
        typer.echo(f"{size / 1e6:>10.3f} MB  {name}")
    for warning in done.warnings:
        typer.echo(f"note: {warning}", err=True)
    if done.sent:
        typer.echo(f"sent: {done.url}")
    elif repo is not None:
        typer.echo(f"dry run: nothing was sent to {repo}")
    else:
        typer.echo(f"card: {adapter / 'README.md'}")


@app.command(epilog="Example:  sfa export runs/internvl3_5_8b --out standalone")
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run, or of an SFA adapter.")],
    out: Annotated[Path, typer.Option(help="Folder to write; must not be there yet.")],
    model: Annotated[str | None, typer.Option(help="Base model; that of the run by default.")] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of --model; without --model that of the run.")] = None,
    tables: Annotated[
        bool, typer.Option("--tables", help="Write the small tables that the bias is made of, not its matrices.")
    ] = False,
    engine: Annotated[
        bool,
        typer.Option("--engine", help="For vLLM or SGLang: plain weights, and the bias in sfa/ (docs/serving.md)."),
    ] = False,
) -> None:
    """Write the whole model of RUN with its bias baked in: it loads with transformers, without this library."""
    from sfa_adapters.sharing.engine_export import export_for_engine
    from sfa_adapters.sharing.export import export_baked

    if engine and tables:
        raise RecipeError(
            "--tables is for a model with its bias baked in; with --engine the adapter is written. Give one."
        )
    host, options = _open(run, model, revision)
    if engine:
        typer.echo(str(export_for_engine(host, out)))
        return
    done = export_baked(host, out, form="tables" if tables else "dense", **options)
    typer.echo(str(done))
    typer.echo(f"{out}/load_baked.py loads it; {out}/README.md says how.")


def _open(run: Path, model: str | None, revision: str | None) -> tuple[Any, dict[str, Any]]:
    """Loads the adapted model in 16 bits (or as its recipe says) on the CPU, and the options of the export."""
    from sfa_adapters.evaluation.open_host import find_run, open_host
    from sfa_adapters.training.checkpoints import saved_recipe

    if revision is not None and model is None:
        raise RecipeError(f"--revision {revision} is of --model: give both.")
    trained = find_run(run)
    if trained is not None:
        saved = saved_recipe(trained)
        if saved.plan == "nf4":
            typer.echo(
                "note: it was trained over a language model in 4 bits and is written with one in 16 bits. Evaluate the "
                "exported model again.",
                err=True,
            )
        options: dict[str, Any] = {"device": "cpu", "plan": "bf16"}
        if model is None:
            return open_host(trained, **options), {}
        return open_host(model, trained, revision=revision, **options), {}
    if not (run / "adapter_config.json").is_file():
        if not run.is_dir():
            raise RecipeError(f"{run} is no folder. Give the folder of a run, or of an SFA adapter.")
        raise RecipeError(f"{run} has neither recipe.json (a run) nor adapter_config.json (an SFA adapter).")
    if model is None:
        raise RecipeError(f"{run} is an adapter alone: name its base with --model.")
    from sfa_adapters.sharing.base_model import load_adapted

    return load_adapted(model, run, revision)
