"""`sfa bench ...`: time, memory and accuracy of methods that speed up a host, against the unchanged host in one run."""

from __future__ import annotations

from sfa_adapters.cli.app import CommandApp
from sfa_adapters.cli.options import from_dataclass
from sfa_adapters.recipes.bench.options import BenchConfig, HeadBenchConfig

__all__ = ["app"]

app = CommandApp(
    name="bench",
    help="Measure methods that speed up a host against the unchanged host: tokens, heads.",
)


@app.callback()
def _group() -> None:
    """Measure methods that speed up a host against the unchanged host."""


@app.command(epilog="Example:  sfa bench tokens --selector attention --selector density --keep 0.5 --keep 0.25")
@from_dataclass(BenchConfig, arguments=("images",), names={"selectors": "--selector", "tokens": "--decoded"})
def tokens(config: BenchConfig) -> None:
    """Every selector of FastV at every share of image tokens: time to first token, tokens/s, memory, accuracy."""
    from sfa_adapters.recipes.bench.tokens import run_bench

    run_bench(config)


@app.command(epilog="Example:  sfa bench heads --rate 0.1 --rate 0.3 --plan global --compensation none --method flap")
@from_dataclass(
    HeadBenchConfig,
    arguments=("images",),
    names={
        "rates": "--rate",
        "plans": "--plan",
        "compensations": "--compensation",
        "methods": "--method",
        "tokens": "--decoded",
    },
)
def heads(config: HeadBenchConfig) -> None:
    """Heads removed by every plan at every rate: accuracy, fabricated numbers, MDI, speed, memory."""
    from sfa_adapters.recipes.bench.heads import run_bench_heads

    run_bench_heads(config)
