"""Where the triton kernels run in tests: under triton's interpreter, and on a GPU where there is one."""

from __future__ import annotations

import pytest
import torch

from sfa_adapters.triton_launch import has_triton

__all__ = ["ON_GPU", "interpret"]

ON_GPU = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # Triton 3.9 announces another default of its compiler.
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset"),
)


def interpret(patch: pytest.MonkeyPatch) -> None:
    """Switches the interpreter on for a test, or skips it where there is no triton."""
    if not has_triton():
        pytest.skip("triton is not installed")
    # First: if it were imported with the interpreter on, the functions of its language would stay interpreted, also for
    # the code that torch.compile makes.
    import triton.language  # noqa: F401

    patch.setenv("TRITON_INTERPRET", "1")
