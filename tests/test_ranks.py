"""Ranks: an exact sum, within the bounds, in proportion."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from losa.ranks import apportion

anything = st.one_of(st.floats(), st.sampled_from([0.0, math.inf, math.nan, 5e-324, 1e-100, 1e308]))


@given(
    weights=st.lists(anything, max_size=20), mean=st.floats(0, 40), smallest=st.integers(0, 3), more=st.integers(0, 20)
)
@settings(deadline=None)
def test_sum_is_exact_and_bounds_hold(weights: list[float], mean: float, smallest: int, more: int) -> None:
    count, largest = len(weights), smallest + more
    ranks = apportion(weights, mean, largest, smallest)
    assert len(ranks) == count
    assert all(type(rank) is int and smallest <= rank <= largest for rank in ranks)
    assert sum(ranks) == min(largest * count, max(smallest * count, round(mean * count)))


@given(weights=st.lists(st.floats(0.1, 10), min_size=1, max_size=20), mean=st.integers(1, 30))
@settings(deadline=None)
def test_proportional_within_one_where_no_bound_binds(weights: list[float], mean: int) -> None:
    ranks = apportion(weights, mean, largest=10**6, smallest=0)
    total = mean * len(weights)
    assert all(abs(rank - total * w / sum(weights)) < 1 + 1e-6 for rank, w in zip(ranks, weights, strict=True))


@given(weights=st.lists(st.just(0.0) | st.floats(1e-150, 1e150), min_size=2, max_size=12), mean=st.floats(1, 16))
@settings(deadline=None)
def test_a_larger_weight_never_gets_less(weights: list[float], mean: float) -> None:
    ranks = apportion(weights, mean, largest=16)
    pairs = sorted(zip(weights, ranks, strict=True))
    assert all(r <= s for (v, r), (w, s) in itertools.pairwise(pairs) if v < w * (1 - 1e-6))


@pytest.mark.parametrize(
    ("weights", "mean", "ranks"),
    [
        ([1.0, 2.0, 3.0], 6, [3, 6, 9]),
        ([1.0, 1.0, 1.0], 4 / 3, [2, 1, 1]),  # a tie goes to the earlier
        ([100.0, 1.0, 1.0], 10, [16, 7, 7]),  # what the first cannot take goes to the others
        ([0.0, 1.0, 3.0], 3, [1, 2, 6]),  # and what it must take comes from them
        ([1e-100, 1.0, 3.0], 3, [1, 2, 6]),
        ([1e-200, 3e-200, 1.0], 8, [2, 6, 16]),
        ([1e308, 1e308], 4, [4, 4]),
        ([5e-324, 1e-323], 6, [4, 8]),
        ([0.0, 0.0], 4, [4, 4]),
        ([math.nan, math.inf, -1.0], 4, [4, 4, 4]),
        ([math.nan, 1.0], 5, [1, 9]),
        ([1.0, 2.0], 0, [1, 1]),  # a mean outside the bounds is brought to the nearer
        ([1.0, 2.0], 99, [16, 16]),
        ([], 6, []),
    ],
)
def test_by_hand(weights: list[float], mean: float, ranks: list[int]) -> None:
    assert apportion(weights, mean, largest=16) == ranks
