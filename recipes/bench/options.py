"""Options of `sfa bench tokens` and `sfa bench heads`. Nothing heavy is imported: `sfa --help` reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from sfa_adapters.errors import DataError

__all__ = ["BenchConfig", "HeadBenchConfig"]

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Options of `sfa bench tokens`; empty `selectors` mean all of them.

    Attributes:
        images: Pages, with --model; charts by default.
        model: A model id or folder; the nano host by default.
        question: The question to --model about each page.
        out: Folder for table and figure.
        selectors: Only these selectors; all by default.
        keep: Shares of image tokens that stay.
        layer: Tokens are dropped before this layer.
        questions: Questions about charts; 0 measures time only.
        rounds: How often every arm is timed.
        tokens: Decoded tokens of each timing.
        device: cpu or cuda.
        dtype: float32, bfloat16 or float16.

    Raises:
        DataError: Names the option and the value.
    """

    images: tuple[Path, ...] = ()
    model: str | None = None
    question: str | None = None
    out: Path = Path("sfa-bench")
    selectors: tuple[str, ...] = ()
    keep: tuple[float, ...] = (0.75, 0.5, 0.25)
    layer: int = 2
    questions: int = 150
    rounds: int = 5
    tokens: int = 16
    device: str = "cpu"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        from sfa_adapters.reduction.fastv.selectors import Selector

        _model_or_charts(self.model, self.images, self.question)
        wrong = [share for share in self.keep if not 0 < share <= 1]
        if wrong or not self.keep:
            raise DataError(f"--keep {wrong[0] if wrong else ''} must be a share of the image tokens, above 0 up to 1.")
        _known("selector", self.selectors, get_args(Selector))
        object.__setattr__(self, "selectors", self.selectors or get_args(Selector))
        _at_least({"questions": (self.questions, 0), "rounds": (self.rounds, 1), "decoded": (self.tokens, 2)})
        _device_and_dtype(self.device, self.dtype)


@dataclass(frozen=True, kw_only=True)
class HeadBenchConfig:
    """Options of `sfa bench heads`; empty `plans` and empty `compensations` mean all of them.

    Attributes:
        images: Pages, with --model; charts by default.
        model: A model id or folder; the nano host with 16 heads a layer by default.
        question: The question to --model about each page.
        out: Folder for table and figure.
        rates: Shares of the heads that are pruned; five by default.
        plans: uniform, adaptive, early_skip, global; all.
        compensations: none, absorb, bias, residual; all.
        methods: s4 (default), gate, flap, random.
        draws: Draws of random heads, averaged.
        charts: Training charts that heads are scored on.
        questions: Questions about test charts; 0 measures time only.
        rounds: How often every arm is timed.
        tokens: Decoded tokens of each timing.
        device: cpu or cuda.
        dtype: float32, bfloat16 or float16.

    Raises:
        DataError: Names the option and the value.
    """

    images: tuple[Path, ...] = ()
    model: str | None = None
    question: str | None = None
    out: Path = Path("sfa-bench-heads")
    rates: tuple[float, ...] = (0.05, 0.1, 0.15, 0.2, 0.3)
    plans: tuple[str, ...] = ()
    compensations: tuple[str, ...] = ()
    methods: tuple[str, ...] = ("s4",)
    draws: int = 3
    charts: int = 100
    questions: int = 150
    rounds: int = 5
    tokens: int = 16
    device: str = "cpu"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        from sfa_adapters.heads.calibrate import Method
        from sfa_adapters.heads.compensation import COMPENSATIONS
        from sfa_adapters.heads.plan import Kind
        from sfa_adapters.heads.speed import LEAST_ROUNDS

        _model_or_charts(self.model, self.images, self.question)
        wrong = [rate for rate in self.rates if not 0 < rate < 1]
        if wrong or not self.rates:
            raise DataError(f"--rate {wrong[0] if wrong else ''} must be a share of the heads, between 0 and 1.")
        _known("plan", self.plans, get_args(Kind))
        _known("compensation", self.compensations, COMPENSATIONS)
        _known("method", self.methods or ("",), get_args(Method))
        object.__setattr__(self, "plans", self.plans or get_args(Kind))
        object.__setattr__(self, "compensations", self.compensations or COMPENSATIONS)
        _at_least({"draws": (self.draws, 1), "charts": (self.charts, 1), "questions": (self.questions, 0)})
        _at_least({"rounds": (self.rounds, LEAST_ROUNDS), "decoded": (self.tokens, 2)})
        _device_and_dtype(self.device, self.dtype)


def _model_or_charts(model: str | None, images: Sequence[Path], question: str | None) -> None:
    given = (model is not None, bool(images), question is not None)
    if any(given) and not all(given):
        raise DataError("Give --model, --question and an image together; without them, the nano host reads charts.")


def _known(option: str, chosen: Sequence[str], known: Sequence[str]) -> None:
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise DataError(f"--{option} {' '.join(unknown)} must be one of {', '.join(known)}.")


def _at_least(options: Mapping[str, tuple[int, int]]) -> None:
    for name, (value, least) in options.items():
        if value < least:
            raise DataError(f"--{name} {value} must be at least {least}.")


def _device_and_dtype(device: str, dtype: str) -> None:
    from sfa_adapters.recipes.bench.device import require_device

    require_device(device)
    if dtype not in DTYPES:
        raise DataError(f"--dtype {dtype} must be float32, bfloat16 or float16.")
