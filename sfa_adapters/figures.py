"""The learned bias as a figure and as a table. matplotlib is imported only to draw."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfa_adapters.bias import bias_factors
from sfa_adapters.errors import InjectionError
from sfa_adapters.inject import describe
from sfa_adapters.layer import SFALayer
from sfa_adapters.layout import TokenLayout
from sfa_adapters.tuner import injected_layers

__all__ = ["bias_around", "bias_table", "plot_bias", "write_bias_table"]

# A figure of more panels than this cannot be read; layers and heads are then sampled evenly.
MOST_ROWS, MOST_COLUMNS = 6, 8


def _layers(model: nn.Module, adapter_name: str) -> list[SFALayer]:
    layers = [layer for _, _, layer in injected_layers(model) if adapter_name in layer.configs]
    if not layers:
        raise InjectionError(f"{type(model).__name__} has no SFA adapter named {adapter_name!r} to draw.")
    return layers


def bias_table(model: nn.Module, adapter_name: str = "default") -> list[dict[str, float]]:
    """The learned scalars, one row per layer and head.

    Args:
        model: A model with SFA.
        adapter_name: Which adapter.

    Returns:
        Rows with `layer`, `head`, `w_row`, `w_col`, `w_dist` (logits) and `e0`, `e1`, ... (their products are logits);
        terms that are off are left out.

    Raises:
        InjectionError: The model has no such adapter.
    """
    rows: list[dict[str, float]] = []
    for layer in _layers(model, adapter_name):
        weights = layer.weights(adapter_name)
        named = {"w_row": weights.row, "w_col": weights.col, "w_dist": weights.dist}
        for head in range(layer.num_heads):
            row: dict[str, float] = {"layer": layer.index, "head": head}
            row |= {name: values[head].item() for name, values in named.items() if values is not None}
            if weights.block is not None:
                row |= {f"e{number}": value.item() for number, value in enumerate(weights.block[head])}
            rows.append(row)
    return rows


def write_bias_table(model: nn.Module, path: Path, adapter_name: str = "default") -> Path:
    """Writes `bias_table` as CSV, rounded to six decimals.

    Args:
        model: A model with SFA.
        path: The file.
        adapter_name: Which adapter.

    Returns:
        `path`.

    Raises:
        InjectionError: The model has no such adapter.
    """
    rows = bias_table(model, adapter_name)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows({key: round(value, 6) for key, value in row.items()} for row in rows)
    return path


@torch.no_grad()
def bias_around(
    layer: SFALayer, adapter_name: str, grid: tuple[int, int], centre: tuple[int, int] | None = None
) -> Tensor:
    """The bias phi from one query token to every token of a page.

    Args:
        layer: An adapted layer.
        adapter_name: Which adapter.
        grid: Rows and columns of the page.
        centre: Row and column of the query; the middle of the page by default.

    Returns:
        Logits, `[heads, rows, columns]`.
    """
    rows, columns = grid
    row, column = centre or (rows // 2, columns // 2)
    layout = TokenLayout.regular(rows, columns, 0, layer.configs[adapter_name].block_map_tensor())
    weights = layer.weights(adapter_name)
    on_cpu = type(weights)(*(None if w is None else w.cpu() for w in vars(weights).values()))
    phi = bias_factors([on_cpu], layout, layer.num_heads).dense()[0]
    return phi[:, row * columns + column].reshape(-1, rows, columns)


def _spaced(count: int, most: int) -> list[int]:
    return list(range(count)) if count <= most else torch.linspace(0, count - 1, most).round().int().tolist()


def plot_bias(
    model: nn.Module, path: Path, adapter_name: str = "default", grid: tuple[int, int] | None = None, title: str = ""
) -> Path:
    """Draws the bias phi around the middle of the page, one panel per layer and head.

    Each panel shows how much the bias alone pushes a query in the middle (ringed) towards (red) or away from (blue)
    every other token.

    Args:
        model: A model with SFA.
        path: Where the picture goes; the ending chooses the format.
        adapter_name: Which adapter.
        grid: Rows and columns of the page; the tower's own by default.
        title: Title of the figure.

    Returns:
        `path`.

    Raises:
        InjectionError: The model has no such adapter, or takes images of any size and `grid` is missing.
    """
    from matplotlib.figure import Figure

    layers = _layers(model, adapter_name)
    grid = grid or describe(model).grid
    if grid is None:
        raise InjectionError("This tower takes images of any size; say which page to draw with grid=(rows, columns).")
    shown = _spaced(len(layers), MOST_ROWS)
    heads = _spaced(max(layers[number].num_heads for number in shown), MOST_COLUMNS)
    maps = {number: bias_around(layers[number], adapter_name, grid) for number in shown}
    limit = max(float(phi[[h for h in heads if h < len(phi)]].abs().max()) for phi in maps.values()) or 1.0
    width, height = 2.0 * len(heads) + 1.6, 2.35 * len(shown) + 0.9
    figure = Figure(figsize=(width, height), dpi=160, layout="constrained")
    axes: Any = figure.subplots(len(shown), len(heads), squeeze=False)
    image = None
    for number, line in zip(shown, axes, strict=True):
        weights = layers[number].weights(adapter_name)
        for head, axis in zip(heads, line, strict=True):
            if head >= layers[number].num_heads:  # removed from this layer
                axis.set_visible(False)
                continue
            image = axis.imshow(maps[number][head].numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
            axis.plot(grid[1] // 2, grid[0] // 2, "o", markersize=7, markerfacecolor="none", markeredgecolor="black")
            axis.set(xticks=[], yticks=[])
            scalars = {"row": weights.row, "col": weights.col, "dist": weights.dist}
            labels = [f"{name} {values[head].item():+.2f}" for name, values in scalars.items() if values is not None]
            axis.set_xlabel("\n".join((" ".join(labels[:2]), *labels[2:])), fontsize=12, labelpad=2)
            if number == next(n for n in shown if layers[n].num_heads > head):
                axis.set_title(f"head {head}", fontsize=13)
        line[0].set_ylabel(f"layer {layers[number].index}", fontsize=13)
    assert image is not None
    bar = figure.colorbar(image, ax=axes, shrink=0.7, aspect=30)
    bar.set_label("bias on the attention logits", fontsize=13)
    bar.ax.tick_params(labelsize=11)
    figure.suptitle(title or "Learned bias from the middle of the page (ringed) to every token", fontsize=14)
    figure.savefig(path)
    return path
