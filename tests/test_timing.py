"""How answers are timed, and the interval of a few measurements."""

from __future__ import annotations

import itertools

import pytest
import torch

from sfa_adapters.compat import cache_of_output
from sfa_adapters.errors import RecipeError
from sfa_adapters.statistics import Interval, median_interval
from sfa_adapters.timing import answer_seconds, cache_bytes, call_seconds, peak_bytes, peak_of, token_seconds
from tests.support.pruning import language_model, text_inputs

PLAIN = text_inputs(padded=False)


def test_an_answer_is_timed_token_by_token() -> None:
    model = language_model()
    seconds = token_seconds(model, PLAIN, 4)
    assert len(seconds) == 4
    assert min(seconds) > 0
    first, rest = answer_seconds(model, PLAIN, 4)
    assert min(first, rest) > 0
    model.generation_config.max_time = 1e-9
    with pytest.raises(RecipeError, match="after 1 of 4 tokens"):
        token_seconds(model, PLAIN, 4)


def test_a_call_is_timed_and_its_memory_is_read() -> None:
    cpu = torch.device("cpu")
    assert 0 < call_seconds(lambda: torch.ones(10), cpu) < 5
    # Two blocks of 4 MB, never both at a time, and one of 1 MB beside each.
    megabyte = 2**20 // 4

    def work() -> None:
        small = torch.ones(megabyte)
        for _ in range(2):
            _ = torch.ones(4 * megabyte)
            del _
        del small

    assert 5 * 2**20 <= peak_of(work, cpu) < 5.1 * 2**20


def test_memory_of_an_answer_grows_with_its_cache() -> None:
    model = language_model(kv=2)
    cache = cache_of_output(model(**PLAIN, use_cache=True))
    assert cache_bytes(cache) == 4 * 2 * (2 * 2 * 2 * 9 * 8)  # bytes, layers, keys and values of 2 rows and 2 heads
    assert peak_bytes(model, PLAIN, 2) > cache_bytes(cache)


@pytest.mark.parametrize("count", [5, 6, 9, 13])
def test_the_interval_of_a_median_holds_it_as_often_as_it_says(count: int) -> None:
    """Every value is above or below the true median with equal chance: of all 2^n ways, 95% must lie around it."""
    held = total = 0
    for signs in itertools.product((-1.0, 1.0), repeat=count):
        interval = median_interval(signs)
        held, total = held + (interval.low < 0 < interval.high), total + 1
    assert held / total >= (0.95 if count > 5 else 0.93)
    wide = median_interval([float(value) for value in range(count)])
    assert (wide.low, wide.high) == {5: (0, 4), 6: (0, 5), 9: (1, 7), 13: (2, 10)}[count]


def test_one_slow_round_moves_no_end() -> None:
    assert median_interval([1.1, 1.0, 1.3, 1.2, 1.15, 1.25, 1.05, 1.12, 50.0]) == Interval(1.15, 1.05, 1.3)
