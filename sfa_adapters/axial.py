"""Initial values of the structural scalars: "normal", near zero, or "axial", some heads along rows and columns.

Under Adam a scalar moves by at most about its learning rate per step, so a scalar that starts near zero needs many
steps to reach the few logits from which it has an effect. The axial start gives a third of the heads
`w_row = strength` and as many others `w_col = strength`; all other scalars are drawn as for "normal".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sfa_adapters.choices import AXES, INITS, Init
from sfa_adapters.errors import InjectionError

__all__ = [
    "AXES",
    "INITS",
    "Init",
    "LayerHeads",
    "check_heads",
    "check_start",
    "first_heads",
    "read_heads",
    "start_values",
]

# Heads of one layer by axis, e.g. {"row": [0, 3], "col": [1]}.
LayerHeads = dict[str, list[int]]


def first_heads(num_heads: int) -> LayerHeads:
    """The default choice: the first third of the heads for rows, the next third for columns; none of a single head."""
    count = max(1, num_heads // 3)
    return {"row": list(range(count)), "col": list(range(count, 2 * count))} if num_heads > 1 else {}


def start_values(
    shapes: Mapping[str, tuple[int, ...]],
    std: float,
    heads: Mapping[str, Sequence[int]],
    strength: float,
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """Draws the initial scalars of one layer, fp32.

    The random numbers are the same with and without strong heads, so that runs can be compared in pairs.

    Args:
        shapes: Shape of each term.
        std: Standard deviation of the normal distribution.
        heads: Heads that start at `strength`, by term; terms without a shape are ignored.
        strength: In logits.
        device: Device of the result.

    Returns:
        One tensor per term, of the given shape.
    """
    values: dict[str, Tensor] = {}
    for term, shape in shapes.items():
        values[term] = nn.init.normal_(torch.empty(shape, device=device, dtype=torch.float32), std=std)
        if heads.get(term):
            values[term][list(heads[term])] = strength
    return values


def check_start(init: Any, strength: Any, terms: Sequence[str]) -> None:
    """Checks the options of the initialisation.

    Raises:
        InjectionError: An option is out of range, or "axial" has neither rows nor columns; names the field and value.
    """
    if init not in INITS:
        raise InjectionError(f"init={init!r} must be one of {list(INITS)}.")
    number = isinstance(strength, int | float) and not isinstance(strength, bool)
    if not number or not 0 < strength < math.inf:
        raise InjectionError(f"init_strength={strength!r} must be a number of logits above 0.")
    if init == "axial" and not set(AXES) & set(terms):
        raise InjectionError(
            f"init='axial' needs the term 'row' or 'col', but terms={list(terms)}. Add one, or use init='normal'."
        )


def read_heads(given: Any) -> dict[int, LayerHeads]:
    """Checks `init_heads` and gives it integer keys, which JSON turns into text.

    Args:
        given: `{layer: {"row": [heads], "col": [heads]}}`.

    Returns:
        The same mapping, sorted by layer, with both axes in every layer.

    Raises:
        InjectionError: It has another form, or names a head twice; names the field and the value.
    """
    if not isinstance(given, Mapping):
        raise InjectionError(
            f'init_heads={given!r:.80} must be a mapping {{layer: {{"row": [heads], "col": [heads]}}}}, as '
            "calibrate_axial returns it."
        )
    heads: dict[int, LayerHeads] = {}
    for key, axes in given.items():
        layer = int(key) if isinstance(key, str) and key.isdecimal() else key
        if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
            raise InjectionError(f"init_heads has the key {key!r}; keys are numbers of layers, counted from 0.")
        if layer in heads:
            raise InjectionError(f"init_heads names layer {layer} twice, as a number and as text.")
        heads[layer] = _read_layer(layer, axes)
    return dict(sorted(heads.items()))


def _read_layer(layer: int, axes: Any) -> LayerHeads:
    where = f"init_heads[{layer}]={axes!r:.80}"
    if not isinstance(axes, Mapping) or not set(axes) <= set(AXES):
        raise InjectionError(f'{where} must be a mapping with the keys "row" and "col".')
    chosen: LayerHeads = {}
    for axis in AXES:
        numbers = axes.get(axis, [])
        if isinstance(numbers, str) or not isinstance(numbers, Sequence):
            raise InjectionError(f"{where}: {axis!r} must be a list of heads.")
        if any(isinstance(head, bool) or not isinstance(head, int) or head < 0 for head in numbers):
            raise InjectionError(f"{where}: heads are numbers, counted from 0.")
        chosen[axis] = list(numbers)
    together = chosen["row"] + chosen["col"]
    if len(set(together)) < len(together):
        twice = next(head for head in together if together.count(head) > 1)
        raise InjectionError(f"{where} names head {twice} twice; a head starts along rows or along columns, once.")
    return chosen


def check_heads(
    given: Mapping[int, LayerHeads] | None, terms: Sequence[str], num_heads: Sequence[int], layers: Sequence[int]
) -> None:
    """Checks whether a choice of heads fits a tower.

    Args:
        given: `init_heads`; None for the first heads of each layer.
        terms: Terms that are on.
        num_heads: Heads of each layer of the tower.
        layers: The layers that get a bias.

    Raises:
        InjectionError: A layer or head does not exist, or no head would start strong.
    """
    if given is None:
        if all(num_heads[layer] < 2 for layer in layers):
            raise InjectionError(
                f"init='axial' shares heads between rows and columns, but no layer of {list(layers)} has two heads. "
                "Use init='normal', or say which heads start strong with init_heads={layer: {'row': [0]}}."
            )
        return
    for layer, axes in given.items():
        where = f"init_heads={{{layer}: {axes}}}"
        if layer >= len(num_heads):
            raise InjectionError(f"{where} names layer {layer}; the tower has layers 0..{len(num_heads) - 1}.")
        if layer not in layers:
            raise InjectionError(f"{where} names layer {layer}, which gets no bias; layers with one: {list(layers)}.")
        outside = [head for heads in axes.values() for head in heads if head >= num_heads[layer]]
        if outside:
            raise InjectionError(
                f"{where} names head {outside[0]}, but layer {layer} has heads 0..{num_heads[layer] - 1}."
            )
    if not any(axes[axis] for axes in given.values() for axis in AXES if axis in terms):
        raise InjectionError(
            f"init_heads={given} names no head for a term that is on (terms={list(terms)}): nothing would start "
            "strong. Name some, leave init_heads out, or use init='normal'."
        )
