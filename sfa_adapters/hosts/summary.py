"""`module_table`: what trains, in which precision and where; printed before the first step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from torch import nn

from sfa_adapters.hosts.quantization import four_bit_modules
from sfa_adapters.tuner import injected_layers

if TYPE_CHECKING:
    from sfa_adapters.hosts.prepare import Host

__all__ = ["count", "module_table"]

COLUMNS = ("module", "trainable", "dtype", "4-bit", "adapter", "device")


def count(parameters: Iterable[nn.Parameter]) -> int:
    """How many numbers these parameters hold; of 4-bit ones those that they stand for, not the packed bytes."""
    return sum(_shape(parameter).numel() for parameter in parameters)


def _shape(parameter: Any) -> Any:
    state = getattr(parameter, "quant_state", None)
    return parameter.shape if state is None else state.shape


def module_table(host: Host) -> Table:
    """One line for each part of a host, and one for each kind of adapter in it.

    Args:
        host: A prepared host.

    Returns:
        A table for `rich`: module, trainable (of all) parameters, dtype, linear layers in 4-bit, adapter, device.
    """
    title = f"{type(host.model).__name__}, plan {host.recipe.plan}"
    table = Table(
        *COLUMNS, title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True
    )
    for column in table.columns[1:]:
        column.justify = "right"
    table.columns[0].no_wrap = table.columns[1].no_wrap = True  # the other columns give way: a name is never cut
    rows: dict[str, list[nn.Parameter]] = {}
    for name, parameter in host.model.named_parameters():
        rows.setdefault(_row(host, name), []).append(parameter)
    four_bit = four_bit_modules(host.model)
    linear = [name for name, module in host.model.named_modules() if isinstance(module, nn.Linear)]
    linear = [name for name in linear if host.places.part_of(name) != "lora"]
    for row, parameters in rows.items():
        trained = [p for p in parameters if p.requires_grad]
        inside = [name for name in linear if _row(host, name) == row]
        table.add_row(
            row.partition(" ")[0],
            f"{count(trained):,}\nof {count(parameters):,}",
            _kinds(str(p.dtype).removeprefix("torch.") for p in parameters if p.is_floating_point()) or "-",
            f"{sum(_base(name) in four_bit for name in inside)} of {len(inside)}" if inside else "-",
            _adapter(host, row),
            _kinds(str(p.device) for p in parameters),
        )
    everything = list(host.model.parameters())
    table.add_section()
    table.add_row("all", f"{count(p for p in everything if p.requires_grad):,}\nof {count(everything):,}")
    return table


def _row(host: Host, name: str) -> str:
    """The line of a parameter or a module: the part it is in, and the kind of adapter it belongs to."""
    name = _base(name)
    part = host.places.part_of(name)
    place = max((p for p in host.places.all if name == p or name.startswith(f"{p}.")), key=len)
    return f"{place} {part}" if part in ("sfa", "lora") else place


def _base(name: str) -> str:
    return name.removesuffix(".base_layer")


def _adapter(host: Host, row: str) -> str:
    if row.endswith(" sfa"):
        layers = [layer for _, _, layer in injected_layers(host.model)]
        return f"SFA {' + '.join(host.recipe.sfa_terms)}, {len(layers)} layers"
    if row.endswith(" lora"):
        return f"LoRA r={host.recipe.lora_llm}"
    if row == host.places.tower and host.recipe.adat is not None:
        return f"ADAT {host.recipe.adat:g}"
    return "-"


def _kinds(kinds: Iterable[str]) -> str:
    return ", ".join(kind for kind, _ in Counter(kinds).most_common())
