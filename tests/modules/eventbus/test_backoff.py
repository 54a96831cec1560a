from __future__ import annotations

from random import Random

from modules.eventbus.backoff import Backoff


def test_the_first_delay_is_below_a_second_and_none_exceeds_the_cap() -> None:
    for seed in range(200):
        backoff = Backoff(Random(seed), cap_seconds=30.0)
        delays = [backoff.next_delay() for _ in range(12)]
        assert 0 <= delays[0] <= 1.0
        assert all(delay <= 30.0 for delay in delays)
        for index, delay in enumerate(delays):
            assert delay <= min(2.0**index, 30.0)


def test_delays_use_the_whole_range_below_the_bound() -> None:
    late = [Backoff(Random(seed)) for seed in range(300)]
    for backoff in late:
        for _ in range(8):
            backoff.next_delay()
    delays = [backoff.next_delay() for backoff in late]
    assert min(delays) < 3.0
    assert max(delays) > 27.0


def test_reset_begins_anew() -> None:
    backoff = Backoff(Random(1))
    for _ in range(9):
        backoff.next_delay()
    backoff.reset()
    assert backoff.next_delay() <= 1.0
