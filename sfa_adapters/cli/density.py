"""`sfa density`: train the density estimator, and draw what it sees."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sfa_adapters.cli.app import CommandApp

__all__ = ["app"]

app = CommandApp(
    name="density",
    help="Train the density estimator, and draw what it sees.",
    epilog="Example:  sfa density map page.png",
)


@app.command(epilog="Example:  sfa density train scans/ --labels edges --out runs/my-density")
def train(
    images: Annotated[list[Path] | None, typer.Argument(help="Folders of images; rendered pages when none.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the run; one that was cut off goes on.")] = Path("runs/density"),
    labels: Annotated[
        str | None, typer.Option(help="boxes, edges, mix or ocr; by default boxes, and edges for folders.")
    ] = None,
    pages: Annotated[int | None, typer.Option(help="Number of rendered pages.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    batch: Annotated[int | None, typer.Option(help="Crops per step.")] = None,
    rate: Annotated[float | None, typer.Option(help="Highest learning rate.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first weights and of the order of the pages.")] = 0,
    every: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
) -> None:
    """Train the density estimator on folders of IMAGES, or on rendered pages. Writes OUT/best.safetensors."""
    from sfa_adapters.recipes.density.train import TrainConfig, train_density

    options: dict[str, Any] = {"labels": labels, "pages": pages, "steps": steps, "batch": batch, "rate": rate}
    options |= {"every": every, "out": out, "images": tuple(images or ()), "seed": seed}
    if labels is None and images:
        options["labels"] = "edges"
    done = train_density(TrainConfig(**{name: value for name, value in options.items() if value is not None}))
    typer.echo(f"best validation loss {done.loss:.6f} (mean squared error)")
    typer.echo(f"weights: {done.path}")


@app.command(name="map", epilog="Example:  sfa density map page.png scan.jpg --out maps")
def draw_maps(
    images: Annotated[list[Path], typer.Argument(help="Images to look at.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the figures; by default beside each image.")] = None,
    source: Annotated[str, typer.Option(help="density (the estimator), edges, or ocr.")] = "density",
    size: Annotated[int, typer.Option(help="Longer side in px at which the estimator sees a page; 0 as it is.")] = 896,
    weights: Annotated[Path | None, typer.Option(help="Weights from `sfa density train`.")] = None,
) -> None:
    """Write the text density of each of IMAGES beside the page, as NAME_density.png."""
    from sfa_adapters.images import as_image
    from sfa_adapters.recipes.density.map import density_map, density_targets, draw_density

    targets = density_targets(images, out)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    pictures = [as_image(path) for path in targets]  # a bad one is told before any is drawn
    for (path, target), picture in zip(targets.items(), pictures, strict=True):
        density = density_map(picture, source, size, weights)
        draw_density(picture, density, target, title=path.name)
        typer.echo(
            f"{target}: mean density {density.mean():.3f}, {100 * (density > 0.3).mean():.0f}% of the page is text"
        )
