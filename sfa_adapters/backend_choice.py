"""`choose_backend`: what `backend="auto"` takes, by times that were measured on the same class of device.

The times are in `backend_times.json`; `python -m benchmarks.attention --write-table` measures them again, for the
device that it is given, and leaves those of other devices as they are. The nearest case counts: the same kind of bias,
dtype and pass, then the nearest number of tokens, then the nearest head width.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from sfa_adapters.bias import BiasFactors
from sfa_adapters.lines import lines_fit
from sfa_adapters.phi_tiles import key_order
from sfa_adapters.triton_attention import triton_misfit

__all__ = [
    "CHOICES",
    "TIMES",
    "BiasKind",
    "Case",
    "Choice",
    "choose_backend",
    "device_class",
    "fastest",
    "measured_cases",
]

Choice = Literal["dense", "folded", "blocked", "lines", "triton"]
CHOICES: tuple[Choice, ...] = get_args(Choice)
# Of a bias: the terms row and col on whole grids; other terms on whole grids; tokens of mixed sizes or parts of a grid.
BiasKind = Literal["lines", "grid", "mixed"]

TIMES = Path(__file__).parent / "backend_times.json"
# A matrix over pairs of tokens must be faster than every backend of linear memory by this factor.
MATRIX_GAIN = 1.05
# And it is not taken for more tokens than this many times those that were measured: it grows with their square.
LARGEST_STEP = 2
# Where nothing can be read from the tensors (torch.compile): up to about so many tokens a matrix costs a CPU less than
# the extra channels do.
SHORT_SEQUENCE = 320


@dataclass(frozen=True)
class Case:
    """One measured case.

    Attributes:
        bias: Kind of the bias.
        dtype: `float32` or `half`.
        width: D, the head width.
        tokens: N.
        backward: Whether the backward pass was measured, too.
        ms: Milliseconds of each backend.
    """

    bias: BiasKind
    dtype: Literal["float32", "half"]
    width: int
    tokens: int
    backward: bool
    ms: Mapping[Choice, float]


def choose_backend(query: Tensor, bias: BiasFactors, attention_mask: Tensor | None = None) -> Choice:
    """What `auto` does.

    * A real mask beside a bias without gradients: dense. There is a matrix in any case, so the bias joins it.
    * On a device with measured times: the fastest backend that applies.
    * Else, and inside `torch.compile`: folded. A matrix that needs gradients loses the fused kernels on every device,
      and on CUDA the flash kernel takes no matrix at all. (On a CPU: dense up to 320 tokens.)

    Args:
        query: `[B, H, N, D]`.
        bias: The tables of phi.
        attention_mask: A further mask, as in `attend`.
    """
    if attention_mask is not None and not bias.requires_grad:
        return "dense"
    if torch.compiler.is_compiling() or type(query) not in (Tensor, torch.nn.Parameter):  # fake, distributed, ...
        return "dense" if query.device.type == "cpu" and query.shape[-2] <= SHORT_SEQUENCE else "folded"
    name = device_class(query.device)
    if not measured_cases(name):  # before anything is read from a layout on another device
        return "folded"
    kind: BiasKind = "mixed"
    if attention_mask is None and lines_fit(query, bias):
        kind = "lines"
    elif _fills_grids(bias):
        kind = "grid"
    backward = torch.is_grad_enabled() and (query.requires_grad or bias.requires_grad)
    dtype = "half" if query.dtype in (torch.float16, torch.bfloat16) else "float32"
    misfits: tuple[Choice, ...] = ("triton",) if attention_mask is not None or triton_misfit(query) else ()
    return fastest(name, kind, dtype, query.shape[-1], query.shape[-2], backward, misfits) or "folded"


def device_class(device: torch.device) -> str:
    """The class of a device whose times are alike: `cpu`, `sm90` (compute capability of CUDA devices), `mps`, ..."""
    if device.type != "cuda" or torch.version.hip is not None:
        return device.type
    return "sm{}{}".format(*torch.cuda.get_device_capability(device))


@lru_cache(maxsize=4096)
def fastest(
    device: str,
    bias: BiasKind,
    dtype: Literal["float32", "half"],
    width: int,
    tokens: int,
    backward: bool,
    misfits: tuple[Choice, ...] = (),
) -> Choice | None:
    """The fastest backend in the nearest measured case, or None where there is none.

    Args:
        device: As `device_class` names it.
        bias: Kind of the bias.
        dtype: `float32` or `half`.
        width: D, the head width.
        tokens: N.
        backward: Whether there will be a backward pass.
        misfits: Backends that cannot compute this.
    """
    cases = [
        case for case in measured_cases(device) if (case.bias, case.dtype, case.backward) == (bias, dtype, backward)
    ]
    if not cases:
        return None
    nearest = min(cases, key=lambda case: (abs(math.log(case.tokens / max(tokens, 1))), abs(case.width - width)))
    linear: list[Choice] = [name for name in nearest.ms if name != "dense" and name not in misfits]
    best = min(linear, key=lambda name: nearest.ms[name])
    if tokens > LARGEST_STEP * nearest.tokens:
        return best
    return "dense" if nearest.ms.get("dense", math.inf) * MATRIX_GAIN < nearest.ms[best] else best


@lru_cache(maxsize=16)
def measured_cases(device: str) -> tuple[Case, ...]:
    """All cases measured on a class of devices."""
    devices = json.loads(TIMES.read_text())["devices"]
    return tuple(Case(**case) for case in devices.get(device, {"cases": []})["cases"])


def _fills_grids(bias: BiasFactors) -> bool:
    images = range(1 if bias.layout.batch_size is None else bias.layout.batch_size)
    return all(key_order(bias.layout, image).is_grid for image in images)
