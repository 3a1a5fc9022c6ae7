"""`sfa calibrate dymu`: thresholds for DyMU from a folder of images, on a model of the user or on the nano host.

    sfa calibrate dymu pages/*.png --model llava-hf/llava-1.5-7b-hf --keep 0.33 --out adapter

Time: one pass of the tower over the images. Expect the printed tokens per image to come out near `--keep`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from sfa_adapters.errors import DataError
from sfa_adapters.images import as_image
from sfa_adapters.reduction.dymu.calibrate import calibrate_dymu, see_images
from sfa_adapters.reduction.dymu.config import DyMUConfig, save_dymu
from sfa_adapters.reduction.dymu.inject import eject_dymu, inject_dymu, token_counts
from sfa_adapters.tower_search import find_tower

__all__ = ["run_calibrate_dymu"]


def run_calibrate_dymu(
    out: Path,
    images: Sequence[Path] = (),
    model: str | None = None,
    keep: float = 0.5,
    language: str = "logical_rope",
    charts: int = 128,
    batch: int = 64,
) -> DyMUConfig:
    """Calibrates thresholds, saves and prints them.

    Args:
        out: Folder for `dymu.safetensors` and `dymu_config.json`, e.g. that of an adapter.
        images: Pages, needed with `model`.
        model: A vision-language model or a tower, an id or a folder; by default the nano host on charts.
        keep: Share of the tokens that should be left on average.
        language: What the language model does later, as in `DyMUConfig`.
        charts: Number of charts, without `model`.
        batch: Images that share their merges.

    Returns:
        The saved configuration.

    Raises:
        DataError: Images without a model or the other way round, or something that cannot be loaded.
        RecipeError: An option cannot be used.
        InjectionError: The tower cannot merge tokens.
    """
    if batch < 1 or charts < 1:
        raise DataError(f"--batch {batch} and --charts {charts} must be at least 1.")
    if (model is None) != (not images):
        raise DataError("Give images together with --model; without both, the nano host looks at charts.")
    options = DyMUConfig(language=language)  # pyright: ignore[reportArgumentType]
    host, batches = _charts(charts, batch) if model is None else _pages(model, images, batch)
    seen = list(batches)
    config = calibrate_dymu(host, seen, keep=keep, config=options)
    save_dymu(config, out)
    _print_counts(host, seen, config, out)
    return config


def _charts(charts: int, batch: int) -> tuple[nn.Module, Iterator[Any]]:
    from sfa_adapters.recipes.nano.encode import encode
    from sfa_adapters.recipes.nano.models import load_nano
    from sfa_adapters.recipes.synthetic.chart_questions import chart_samples

    host = load_nano("llava_onevision")
    samples = chart_samples("train", charts)
    parts = (samples[start : start + batch] for start in range(0, len(samples), batch))
    return host.model, (encode(host, [s.image for s in part], [s.question for s in part]) for part in parts)


def _pages(model: str, images: Sequence[Path], batch: int) -> tuple[nn.Module, Iterator[Any]]:
    from transformers import AutoImageProcessor, AutoModel, AutoModelForImageTextToText

    pages = [as_image(path) for path in images]  # a bad one is an error before a model is loaded
    try:
        processor: Any = AutoImageProcessor.from_pretrained(model)
        try:
            host = AutoModelForImageTextToText.from_pretrained(model).eval()
        except ValueError:  # a tower by itself
            host = AutoModel.from_pretrained(model).eval()
    except (OSError, ValueError) as error:
        raise DataError(f"--model {model} cannot be loaded: {str(error).splitlines()[0]}") from error
    parts = (pages[start : start + batch] for start in range(0, len(pages), batch))
    return host, (dict(processor(images=part, return_tensors="pt")) for part in parts)


def _print_counts(host: nn.Module, batches: Sequence[Any], config: DyMUConfig, out: Path) -> None:
    """Runs the tower once more with the thresholds, and prints what is left."""
    import torch

    before = after = images = 0
    inject_dymu(host, DyMUConfig(thresholds=config.thresholds, language="off", side=config.side))
    try:
        with torch.no_grad():
            for batch in batches:
                see_images(find_tower(host).tower, batch)
                counts = token_counts(host)
                before, after = before + sum(counts.before), after + sum(counts.after)
                images += len(counts.before)
    finally:
        eject_dymu(host)
    assert isinstance(config.thresholds, tuple)
    table = Table("place", "threshold")
    for place, threshold in enumerate(config.thresholds):
        table.add_row(f"{place} | {place + 1}", f"{threshold:.4f}")
    console = Console()
    console.print(table)
    console.print(f"{after / images:.1f} of {before / images:.1f} tokens per picture are left ({after / before:.1%})")
    console.print(f"dymu.safetensors and dymu_config.json are in {out}/")
