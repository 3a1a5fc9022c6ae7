"""`sfa density`: train the density estimator, and draw its density maps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sfa_adapters.cli.app import CommandApp
from sfa_adapters.cli.options import from_dataclass
from sfa_adapters.recipes.density.options import PagesConfig, TrainConfig

__all__ = ["app"]

app = CommandApp(
    name="density",
    help="Train the density estimator, and draw its density maps.",
    epilog="Example:  sfa density map page.png",
)


@app.command(epilog="Example:  sfa density train scans/ --labels edges --out runs/my-density")
@from_dataclass(
    TrainConfig,
    fields=("images", "real", "figures", "start", "out", "labels", "pages", "steps", "batch", "rate", "seed", "every"),
    arguments=("images",),
)
def train(config: TrainConfig) -> None:
    """Train the density estimator on real pages, folders of IMAGES, or rendered pages. Writes OUT/best.safetensors."""
    from sfa_adapters.recipes.density.train import train_density

    done = train_density(config)
    typer.echo(f"best validation loss {done.loss:.6f} (mean squared error)")
    typer.echo(f"weights: {done.path}")


@app.command(name="pages", epilog="Example:  sfa density pages --out real-pages --part test")
@from_dataclass(PagesConfig, fields=("out", "part"))
def real_pages(config: PagesConfig) -> None:
    """Make a set of real pages with the boxes of their words, from documentation packages of Debian (1.2 GB).

    Needs Debian or Ubuntu with apt, poppler-utils and poppler-data, and the extra named ocr.
    """
    from sfa_adapters.recipes.density.real_pages import make_pages

    for what, count in make_pages(config).most_common():
        kept = what.startswith(("train ", "val ", "test "))
        typer.echo(f"{count:5}  {'' if kept else 'pages dropped: '}{what}")
    typer.echo(f"pages are in {config.out}/")


@app.command(name="map", epilog="Example:  sfa density map page.png scan.jpg --out maps")
def draw_maps(
    images: Annotated[list[Path], typer.Argument(help="Images to look at.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the figures; by default beside each image.")] = None,
    source: Annotated[str, typer.Option(help="density (the estimator), edges, or ocr.")] = "density",
    size: Annotated[int, typer.Option(help="Longer side in px of the page in the estimator; 0 keeps its size.")] = 896,
    weights: Annotated[Path | None, typer.Option(help="Weights from `sfa density train`.")] = None,
) -> None:
    """Write the text density of each of IMAGES beside the page, as NAME_density.png."""
    from sfa_adapters.images import as_image
    from sfa_adapters.recipes.density.map import density_map, density_targets, draw_density

    targets = density_targets(images, out)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    pictures = [as_image(path) for path in targets]  # a bad image is reported before any is drawn
    for (path, target), picture in zip(targets.items(), pictures, strict=True):
        density = density_map(picture, source, size, weights)
        draw_density(picture, density, target, title=path.name)
        typer.echo(
            f"{target}: mean density {density.mean():.3f}, {100 * (density > 0.3).mean():.0f}% of the page is text"
        )
