import random

from runtime.backoff import FLOOR_SECONDS, Backoff


def test_the_first_retry_comes_within_a_second() -> None:
    backoff = Backoff(random.Random(1), cap_seconds=60.0)
    assert all(FLOOR_SECONDS <= backoff.delay(0) <= 1.0 for _ in range(1000))


def test_the_pause_doubles_up_to_the_cap_and_no_further() -> None:
    backoff = Backoff(random.Random(2), cap_seconds=60.0)
    for failures, longest in [(1, 2.0), (3, 8.0), (5, 32.0), (6, 60.0), (50, 60.0), (10**9, 60.0)]:
        delays = [backoff.delay(failures) for _ in range(1000)]
        assert max(delays) <= longest
        assert max(delays) > longest * 0.9, "jitter is over the whole range"
        assert min(delays) < longest * 0.1


def test_a_regular_pause_is_a_quarter_longer_or_shorter_by_chance() -> None:
    backoff = Backoff(random.Random(3), cap_seconds=60.0)
    pauses = [backoff.about(100.0) for _ in range(1000)]
    assert 75.0 <= min(pauses) < 80.0
    assert 120.0 < max(pauses) <= 125.0


def test_two_nodes_do_not_come_back_in_step() -> None:
    one, other = (Backoff(random.Random(seed), cap_seconds=60.0) for seed in (1, 2))
    assert [one.delay(n) for n in range(8)] != [other.delay(n) for n in range(8)]
