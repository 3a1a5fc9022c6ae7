"""Writes `sfa_adapters/backend_times.json`: what `backend="auto"` goes by on this class of device.

Every kind of bias, two head widths, sequences from a tile of 8 x 8 to a whole page, with and without a backward pass.
On a CPU half precision is measured up to 1,025 tokens only: its kernels are slow there, and the order does not change.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.attention_cases import COMPUTING, AttentionCase, candidates, mixed_layout
from benchmarks.common import compare, hardware
from sfa_adapters import TokenLayout
from sfa_adapters.backend_choice import TIMES, BiasKind, device_class
from sfa_adapters.choices import DEFAULT_TERMS, TERMS

__all__ = ["write_table"]

WIDTHS = (64, 80)
GRIDS = ((8, 8), (16, 16), (24, 24), (32, 32), (48, 48), (72, 80))
KINDS: tuple[BiasKind, ...] = ("lines", "grid", "mixed")
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float32, torch.bfloat16)}
LONG_ON_CPU = 1100


def write_table(device: torch.device, path: Path = TIMES) -> Path:
    """Measures all cases on one device, and replaces those of its class in the file."""
    cases: list[dict[str, Any]] = []
    for dtype in DTYPES.get(device.type, (torch.float32,)):
        for rows, columns in GRIDS:
            for kind in KINDS:
                for width in WIDTHS:
                    for backward in (False, True):
                        if _is_worth(device, dtype, rows * columns, kind):
                            cases.append(_measure(device, dtype, (rows, columns), kind, width, backward))
    table = json.loads(path.read_text()) if path.is_file() else {"devices": {}}
    about = f"{hardware(device)}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    table["devices"][device_class(device)] = {"measured_on": about, "cases": cases}
    path.write_text(_written(table))
    return path


def _is_worth(device: torch.device, dtype: torch.dtype, tokens: int, kind: BiasKind) -> bool:
    if device.type != "cpu":
        return True
    return tokens <= LONG_ON_CPU if dtype != torch.float32 else kind != "mixed" or tokens < 4000


def _measure(
    device: torch.device, dtype: torch.dtype, grid: tuple[int, int], kind: BiasKind, width: int, backward: bool
) -> dict[str, Any]:
    tokens = grid[0] * grid[1]
    layout = mixed_layout(tokens, device) if kind == "mixed" else TokenLayout.regular(*grid, device=device)
    heads = 4 if device.type == "cpu" and tokens > 4000 else 8
    terms = DEFAULT_TERMS if kind == "lines" else TERMS
    case = AttentionCase(layout, f"{grid[0]}x{grid[1]}", terms, dtype, heads, width, 1, backward)
    calls = candidates(case, COMPUTING)
    rounds = 3 if device.type == "cpu" and tokens > 2000 else 9
    rows = compare(calls, rounds, device, f"{kind} {layout.num_tokens} tokens, width {width}, {str(dtype)[6:]}")
    return {
        "bias": kind,
        "dtype": "float32" if dtype == torch.float32 else "half",
        "width": width,
        "tokens": layout.num_tokens,
        "backward": backward,
        # In milliseconds, from ratios to plain attention of the same round: a busy moment slows both.
        "ms": {row.name: round(rows[0].milliseconds * row.ratio, 3) for row in rows if row.name != "plain"},
    }


def _written(table: dict[str, Any]) -> str:
    """One case per line, so that a new measurement can be read as a difference."""
    devices: list[str] = []
    for name, entry in sorted(table["devices"].items()):
        cases = ",\n".join("   " + json.dumps(case) for case in entry["cases"])
        about = json.dumps(entry["measured_on"])
        devices.append(f'  {json.dumps(name)}: {{"measured_on": {about}, "cases": [\n{cases}\n  ]}}')
    return '{"devices": {\n' + ",\n".join(devices) + "\n}}\n"
