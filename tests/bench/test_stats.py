from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.stats import Summary, count_for, per_day, percentile, ratio, summarise


def test_a_summary_is_median_and_range() -> None:
    assert summarise([5.0, 1.0, 3.0]) == Summary(median=3.0, low=1.0, high=5.0, rounds=3)


def test_no_rounds_have_no_summary_rather_than_zeroes() -> None:
    assert summarise([]) is None


@pytest.mark.parametrize(("share", "value"), [(0.5, 50), (0.99, 99), (1.0, 100), (0.0, 1), (0.001, 1)])
def test_a_percentile_is_a_value_that_was_measured(share: float, value: float) -> None:
    assert percentile(range(100, 0, -1), share) == value


@given(st.lists(st.floats(0, 1e9), min_size=1), st.floats(0, 1))
def test_at_least_its_share_of_values_does_not_exceed_a_percentile(values: list[float], share: float) -> None:
    assert sum(value <= percentile(values, share) for value in values) >= share * len(values)


def test_a_percentile_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="no values"):
        percentile([], 0.5)


def test_a_share_beyond_one_is_an_error() -> None:
    with pytest.raises(ValueError, match="99 is not between"):
        percentile([1.0], 99)


def test_counts_follow_the_probe_within_their_bounds() -> None:
    assert count_for(1000, 0.1, 1.5, least=100, most=1_000_000) == 15_000
    assert count_for(1000, 100.0, 1.5, least=100, most=1_000_000) == 100
    assert count_for(1000, 0.1, 1.5, least=100, most=5_000) == 5_000


def test_a_probe_that_took_no_time_does_not_ask_for_endless_messages() -> None:
    assert count_for(1000, 0.0, 1.0, least=1, most=10**9) == 20_000


def test_a_ratio_needs_both_sides() -> None:
    three, two = summarise([3.0]), summarise([2.0])
    assert ratio(three, two) == 1.5
    assert ratio(three, None) is None
    assert ratio(None, two) is None


def test_a_day_has_86400_seconds() -> None:
    assert per_day(10, 20) == 43_200
