"""The kernels compile for GPUs that are not here, and the interpreter leaves no trace."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from sfa_adapters import StructuralBias, TokenLayout, attend
from sfa_adapters.triton_launch import KERNELS, Tile, interpreting, tile_of
from tests.support.triton import interpret

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset")
STATES = ("query", "key", "value", "out", "above", "of_query", "of_key", "of_value")
SUMS = ("level", "middle", "line_sums", "block_sums", "kind_sums")
PHI = ("*i32", "*i32", "*i32", "*fp32", "*fp32", "*fp32", "*fp32")
# Of shared memory a program may take: the smallest of the GPUs that the backend is for, compute capability 8.6 and 8.9.
SHARED_BYTES = 99 * 2**10


def compiled(kernel: str, width: int, lines: bool, capability: int) -> Any:
    """A kernel in machine code, with the sizes that a launch would take, for states in bf16."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(KERNELS), kernel)
    channels = 64 if width == 64 else 128
    tile: Tile = tile_of(kernel, channels, torch.bfloat16, lines)
    constants = {
        "WIDTH": width, "CHANNELS": channels, "M": tile.kept, "N": tile.step, "LINES": lines,
        "ADAPTERS": int(not lines), "SLOTS": 1, "WIDEN": False, "PRECISION": "tf32", "KINDS": 128,
    }  # fmt: skip
    types: dict[str, Any] = {}
    types |= dict.fromkeys(STATES, ("*bf16", "i32", "i32", "i32")) | dict.fromkeys(SUMS, "*fp32")
    types |= {"phi": PHI, "sizes": ("i32",) * 6, "scale": "fp32", "factor": "fp32"}
    types |= dict.fromkeys(("first_head", "kinds", "first_kind"), "i32") | dict.fromkeys(constants, "constexpr")
    names = function.arg_names
    aligned = {}
    for number, name in enumerate(names):  # as launches find pointers and steps of towers: multiples of 16
        inner = range(4) if name in STATES else range(7) if name == "phi" else None
        paths = [(number, i) for i in inner] if inner else [(number,)] if name in SUMS else []
        aligned |= {path: [["tt.divisibility", 16]] for path in paths}
    source = ASTSource(
        function,
        {name: types[name] for name in names},
        {name: value for name, value in constants.items() if name in names},
        aligned,
    )
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.parametrize(
    ("kernel", "width", "lines", "capability"),
    [
        ("forward_kernel", 72, True, 80),
        ("query_kernel", 72, True, 80),
        ("key_kernel", 72, True, 80),
        ("forward_kernel", 64, True, 90),
        ("query_kernel", 64, False, 90),
        ("key_kernel", 64, False, 90),
        ("kind_kernel", 64, False, 80),
    ],
)
def test_they_compile(
    kernel: str, width: int, lines: bool, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert not interpreting()
    program = compiled(kernel, width, lines, capability)
    assert program.asm["cubin"]
    assert program.metadata.shared <= SHARED_BYTES
    # Atomic sums come in another order each time.
    assert re.search(r"\b(atom|red)\.", program.asm["ptx"]) is None


def test_the_interpreter_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Later code of this process, such as what torch.compile makes, is compiled as ever."""
    pytest.importorskip("triton")
    import triton.language as tl
    from triton.runtime.jit import JITFunction

    places = (tl, tl.core, tl.math, tl.tensor, tl.standard)
    before = [(place, name, item) for place in places for name, item in vars(place).items()]
    with monkeypatch.context() as patch:
        interpret(patch)
        states = torch.randn(1, 2, 6, 16, requires_grad=True)
        attend(
            states, states, states, StructuralBias(2).factors(TokenLayout.regular(2, 3)), backend="triton"
        ).sum().backward()
    assert not interpreting()
    assert [name for place, name, item in before if vars(place)[name] is not item] == []
    assert isinstance(importlib.import_module(KERNELS).forward_kernel, JITFunction)
