"""`measure_speed`: time and memory of a pruned model against the original, which are measured in turns.

Times are compared within one run only, because a machine that slows down slows both. Each round gives one ratio; the
result is the median over rounds with an interval from order statistics, which is more robust on busy machines than a
bootstrapped mean. Prefill is the time to the first token, including the tower.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from sfa_adapters.compat import cache_of_output
from sfa_adapters.errors import RecipeError
from sfa_adapters.eval_mode import evaluating
from sfa_adapters.heads.expected import can_answer, decode_bytes, flops_of
from sfa_adapters.heads.snapshot import Probe, output_of, unpruned
from sfa_adapters.statistics import Interval, median_interval
from sfa_adapters.timing import answer, cache_bytes, call_seconds, peak_of, token_seconds

__all__ = ["LEAST_GAIN", "LEAST_ROUNDS", "Speed", "check_rounds", "measure_speed", "unpruned"]

LEAST_GAIN = 1.02  # smallest expected speed-up that counts: less is lost in the differences between two runs
LEAST_ROUNDS = 5  # fewer give no useful interval: 94% at 5, 95% from 6 on
_DRIFT = 1e-3  # of the largest output: with more it is not the original any more


@dataclass(frozen=True)
class Speed:
    """Seconds and bytes of the original and of the pruned model. Ratios are original / pruned: above 1 is faster.

    Attributes:
        rounds: How often both were timed.
        tokens: Decoded tokens of each timing; 0 if the model does not generate.
        prefill: Median seconds to the first token, or of a forward if the model does not generate.
        prefill_ratio: Median ratio over rounds with its 95% interval.
        expected_prefill: Floating-point operations before over after.
        weights: Bytes of all parameters.
        peak: Peak memory of one answer in bytes, beyond the weights.
        decode: Median seconds from one token to the next.
        decode_ratio: Median ratio of these over rounds with its 95% interval.
        expected_decode: Bytes that one step reads, before over after, with the cache of the prompt.
        cache: Bytes of keys and values of the prompt.
    """

    rounds: int
    tokens: int
    prefill: tuple[float, float]
    prefill_ratio: Interval
    expected_prefill: float
    weights: tuple[int, int]
    peak: tuple[int, int]
    decode: tuple[float, float] | None = None
    decode_ratio: Interval | None = None
    expected_decode: float | None = None
    cache: tuple[int, int] | None = None

    @property
    def _gains(self) -> dict[str, tuple[Interval, float]]:
        """Measured and expected speed-up, by what was timed."""
        if self.decode_ratio is None or self.expected_decode is None:
            return {"a forward": (self.prefill_ratio, self.expected_prefill)}
        return {
            "prefill": (self.prefill_ratio, self.expected_prefill),
            "decoding": (self.decode_ratio, self.expected_decode),
        }

    @property
    def worth(self) -> bool:
        """Whether the pruned model is faster beyond the noise, as expected; accuracy is not considered.

        True if an interval lies above 1 and an expected ratio reaches `LEAST_GAIN`.
        """
        gains = self._gains.values()
        return any(m.low > 1 for m, _ in gains) and any(expected >= LEAST_GAIN for _, expected in gains)

    @property
    def verdict(self) -> str:
        """One sentence on whether pruning is worth it, with the numbers."""
        numbers = " and ".join(
            f"{name} {_times(measured)} (expected {expected:.2f}x)"
            for name, (measured, expected) in self._gains.items()
        )
        if self.worth:
            return f"Worth it for speed: {numbers}."
        if all(expected < LEAST_GAIN for _, expected in self._gains.values()):
            return f"Not worth it for speed, arithmetic promises less than {LEAST_GAIN - 1:.0%}: {numbers}."
        return f"Not worth it for speed on this device, nothing is faster beyond the noise: {numbers}."

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values, with `worth` and `verdict`."""
        return {**asdict(self), "worth": self.worth, "verdict": self.verdict}

    def __str__(self) -> str:
        """A few lines of text."""
        title = "forward" if self.decode is None else "prefill"
        lines = [_line(title, _milliseconds(self.prefill), self.prefill_ratio, self.expected_prefill)]
        if self.decode is not None and self.decode_ratio is not None and self.expected_decode is not None:
            parts = _milliseconds(self.decode) + " per token"
            lines.append(_line("decode", parts, self.decode_ratio, self.expected_decode))
        sizes = {"weights": self.weights, "prompt cache": self.cache, "peak": self.peak}
        parts = ", ".join(f"{name} {_megabytes(pair)}" for name, pair in sizes.items() if pair is not None)
        return "\n".join([*lines, f"{'memory':12}  {parts}", f"{'verdict':12}  {self.verdict}"])


@dataclass(frozen=True)
class _Sizes:
    """Counted, not timed, sizes of one of the two models."""

    flops: int
    weights: int
    peak: int
    cache: int | None
    step: int | None


def check_rounds(rounds: int, tokens: int) -> None:
    """Checks `rounds` and `tokens` of `measure_speed`.

    Raises:
        RecipeError: One is too small; names it and its value.
    """
    if rounds < LEAST_ROUNDS:
        raise RecipeError(f"rounds={rounds} must be at least {LEAST_ROUNDS} for an interval, or 0 to measure no time.")
    if tokens < 2:
        raise RecipeError(f"tokens={tokens} must be at least 2: the time from one token to the next is measured.")


def measure_speed(probe: Probe, model: nn.Module, rounds: int = 5, tokens: int = 16) -> Speed:
    """Times a pruned model against itself with all its heads, in turns.

    A model that answers is timed on an answer to the probe batch, others on a forward. Both are warmed up; which of the
    two comes first changes from round to round.

    Args:
        probe: From `take_probe` of the same model before.
        model: The pruned model itself.
        rounds: How often both are timed, at least 5. More make the interval narrower.
        tokens: Decoded tokens of each timing, at least 2.

    Raises:
        RecipeError: An option cannot be used, the original cannot be put back (modules, device, dtype or weights
            changed since the probe was taken), or the model cannot answer to the inputs of the probe.
    """
    check_rounds(rounds, tokens)
    answers = can_answer(model)
    times: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    with evaluating(model):
        with unpruned(probe, model):
            _check_original(probe, output_of(model, probe.inputs))
            before = _sizes(probe.inputs, model, tokens)
        after = _sizes(probe.inputs, model, tokens)
        for number in range(rounds + 1):  # the first warms up
            for original in (number % 2 == 0, number % 2 == 1):
                with unpruned(probe, model) if original else nullcontext():
                    seconds = _seconds(probe.inputs, model, tokens)
                if number:
                    times[original].append(seconds)
    first, decode = ([[pair[part] for pair in times[key]] for key in (True, False)] for part in (0, 1))
    speed = {
        "prefill": _medians(first),
        "prefill_ratio": _ratio(first),
        "expected_prefill": before.flops / after.flops,
        "weights": (before.weights, after.weights),
        "peak": (before.peak, after.peak),
    }
    if not answers or before.cache is None or after.cache is None or before.step is None or after.step is None:
        return Speed(rounds, 0, **speed)
    expected = (before.step + before.cache) / (after.step + after.cache)
    cache = (before.cache, after.cache)
    return Speed(rounds, tokens, **speed, decode=_medians(decode), decode_ratio=_ratio(decode),
                 expected_decode=expected, cache=cache)  # fmt: skip


def _sizes(inputs: Mapping[str, Any], model: nn.Module, tokens: int) -> _Sizes:
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    if not can_answer(model):
        return _Sizes(flops_of(model, inputs), weights, peak_of(lambda: model(**inputs), _device(model)), None, None)
    try:
        cache = cache_bytes(cache_of_output(answer(model, inputs, 1)))
    except (ValueError, TypeError) as error:
        raise RecipeError(
            f"{type(model).__name__} cannot answer to the inputs of the probe ({error}). Take the probe with what "
            "generate takes, or measure no time (rounds=0)."
        ) from error
    peak = peak_of(lambda: answer(model, inputs, tokens), _device(model))
    return _Sizes(flops_of(model, inputs), weights, peak, cache, decode_bytes(model))


def _seconds(inputs: Mapping[str, Any], model: nn.Module, tokens: int) -> tuple[float, float]:
    """Seconds to the first token and from one to the next; or seconds of a forward and NaN."""
    if not can_answer(model):
        return call_seconds(lambda: model(**inputs), _device(model)), math.nan
    first, *later = token_seconds(model, inputs, tokens)
    # The median, because a token that was delayed by other work of the machine says nothing about the model.
    return first, statistics.median(later)


def _check_original(probe: Probe, output: torch.Tensor) -> None:
    drift = float((output - probe.output).abs().max()) if output.shape == probe.output.shape else math.inf
    if not drift <= _DRIFT * max(1.0, float(probe.output.abs().max())):
        raise RecipeError(
            f"With its heads back the model differs from the probe by {drift:g}: it was trained or loaded into since "
            "the probe was taken. Take the receipt right after pruning, or measure no time (rounds=0)."
        )


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _medians(pair: Iterable[list[float]]) -> tuple[float, float]:
    before, after = (statistics.median(times) for times in pair)
    return before, after


def _ratio(pair: list[list[float]]) -> Interval:
    return median_interval([before / after for before, after in zip(*pair, strict=True)])


def _times(ratio: Interval) -> str:
    return f"{ratio.value:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}]"


def _line(title: str, name: str, measured: Interval, expected: float) -> str:
    return f"{title:12}  {name}, {_times(measured)} as fast, expected {expected:.2f}x"


def _milliseconds(pair: tuple[float, float]) -> str:
    return f"{1e3 * pair[0]:.3g} -> {1e3 * pair[1]:.3g} ms"


def _megabytes(pair: tuple[int, int]) -> str:
    return f"{pair[0] / 2**20:.3g} -> {pair[1] / 2**20:.3g} MB"
