"""The sign test against a count of all outcomes. Intervals are tested in test_timing.py and with the studies."""

import itertools

import pytest

from sfa_adapters.statistics import sign_test


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (1, 0), (5, 0), (3, 1), (5, 5), (2, 9), (10, 2)])
def test_the_sign_test_counts_all_outcomes(better: int, worse: int) -> None:
    n, far = better + worse, abs(better - worse)
    outcomes = itertools.product((1, -1), repeat=n)
    share = sum(abs(sum(outcome)) >= far for outcome in outcomes) / 2**n
    assert sign_test(better, worse) == pytest.approx(share)


def test_the_sign_test_of_many_rows() -> None:
    assert sign_test(0, 30_000) == 0.0
    assert sign_test(10_000, 10_000) == 1.0
    # The normal approximation is good there.
    assert sign_test(5_150, 4_850) == pytest.approx(0.0027, abs=2e-4)


def test_five_seeds_cannot_go_below_a_sixteenth() -> None:
    """What docs/results.md says of studies with five seeds."""
    assert sign_test(5, 0) == sign_test(0, 5) == 0.0625
