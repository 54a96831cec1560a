"""The byte window and the token bucket, on links that are arithmetic."""

import pytest

from modules.edgehub.window import FLOOR_BYTES, START_BYTES, TARGET_SECONDS, ByteWindow, RateProbe, TokenBucket


def push(window: ByteWindow, *, rate: float, rtt: float, rounds: int, message: int = 500) -> float:
    """Keep a link of `rate` bytes/s and `rtt` full for some barriers; returns the last barrier's seconds."""
    now, unconfirmed, seconds = 100.0, 0, 0.0
    window.wrote(10, now=now)
    window.barrier_sent(now=now)
    now += rtt
    window.barrier_passed(now=now)  # the greeting: an empty link's round trip
    for _ in range(rounds):
        written = 0
        while window.room(unconfirmed + written) > 0:
            written += message
        window.wrote(written, now=now)
        window.barrier_sent(now=now)
        seconds = rtt + written / rate
        now += seconds
        window.barrier_passed(now=now)
    return seconds


def test_it_begins_small() -> None:
    window = ByteWindow(8 * 2**20)
    assert window.size_bytes == window.room(0) == START_BYTES
    assert window.room(START_BYTES) == 0


@pytest.mark.parametrize("rtt", [0.0003, 0.02, 0.6])
@pytest.mark.parametrize("rate", [10_000, 100_000, 1_000_000])
def test_on_a_slow_link_about_a_quarter_of_a_second_is_queued(rate: float, rtt: float) -> None:
    window = ByteWindow(8 * 2**20)
    push(window, rate=rate, rtt=rtt, rounds=60)
    queued = window.size_bytes / rate
    assert TARGET_SECONDS / 5 <= queued <= 2 * TARGET_SECONDS


def test_on_a_fast_link_it_grows_to_its_limit() -> None:
    window = ByteWindow(8 * 2**20)
    push(window, rate=1e9, rtt=0.05, rounds=12)
    assert window.size_bytes == 8 * 2**20


def test_it_does_not_grow_while_it_is_not_what_holds_the_sender_up() -> None:
    window = ByteWindow(8 * 2**20)
    for now in range(50):
        window.wrote(100, now=now)
        window.barrier_sent(now=now)
        window.barrier_passed(now=now + 0.001)
    assert window.size_bytes == START_BYTES


def test_a_link_that_turns_slow_shrinks_it_within_a_few_barriers() -> None:
    window = ByteWindow(8 * 2**20)
    push(window, rate=1e8, rtt=0.01, rounds=12)
    push(window, rate=20_000, rtt=0.01, rounds=12)
    assert FLOOR_BYTES <= window.size_bytes <= 20_000


def test_a_barrier_over_a_part_of_the_window_does_not_widen_it_on_a_slow_link() -> None:
    window = ByteWindow(8 * 2**20)
    window.barrier_sent(now=0.0)
    window.barrier_passed(now=0.001)  # as behind the greeting
    for begun in range(1, 20):
        now = float(begun)
        window.wrote(START_BYTES // 2, now=now)
        window.barrier_sent(now=now)
        window.room(START_BYTES)  # full
        window.barrier_passed(now=now + 0.001 + START_BYTES / 2 / 100_000)
    assert window.size_bytes == START_BYTES


def test_the_rate_is_measured_in_bytes_per_second() -> None:
    window = ByteWindow(8 * 2**20)
    push(window, rate=200_000, rtt=0.05, rounds=30)
    assert window.rate_bytes_per_second == pytest.approx(200_000, rel=0.2)
    assert window.is_too_slow_for(4_000_000, 15.0)
    assert not window.is_too_slow_for(2_000_000, 15.0)


def test_nothing_is_too_large_for_a_link_that_was_never_measured() -> None:
    assert not ByteWindow(8 * 2**20).is_too_slow_for(10**9, 15.0)


def verdict(rate: float, needed: float, *, hiccup_seconds: float = 0.0) -> tuple[bool, int]:
    """What is found out about a link of `rate`, and with how many bytes."""
    probe, sent = RateProbe(needed), 0
    while probe.is_fast is None:
        size = probe.size_bytes
        sent += size
        probe.measured(size, size / rate + hiccup_seconds)
    return probe.is_fast, sent


@pytest.mark.parametrize(
    ("rate", "needed", "is_fast", "sent"),
    [
        (1e9, 1e6, True, 16 * 1024),
        (10_000, 5_000, True, 16 * 1024),
        (10_000, 800_000, False, 16 * 1024),
        (100_000, 800_000, False, 80 * 1024),
        (700_000, 800_000, False, 336 * 1024),
    ],
)
def test_a_few_bytes_tell_whether_a_link_is_fast_enough(rate: float, needed: float, is_fast: bool, sent: int) -> None:
    assert verdict(rate, needed) == (is_fast, sent)


def test_a_hiccup_makes_no_fast_link_slow() -> None:
    assert verdict(1e8, 800_000, hiccup_seconds=0.25) == (True, 336 * 1024)


def test_the_last_sample_is_what_the_last_barrier_took_beyond_the_round_trip() -> None:
    window = ByteWindow(8 * 2**20)
    assert window.last_sample is None
    window.barrier_sent(now=0.0)
    window.barrier_passed(now=0.1)
    window.wrote(16_384, now=1.0)
    window.barrier_sent(now=1.0)
    window.barrier_passed(now=2.1)
    assert window.last_sample == (16_384, pytest.approx(1.0))


def test_an_idle_ping_follows_a_path_that_became_longer() -> None:
    window = ByteWindow(8 * 2**20)
    for rtt in [0.01] + [0.4] * 30:
        window.barrier_sent(now=0.0)
        window.barrier_passed(now=rtt)
    push(window, rate=1e9, rtt=0.4, rounds=12)
    assert window.size_bytes == 8 * 2**20


def test_a_pong_that_nobody_waits_for_changes_nothing() -> None:
    window = ByteWindow(8 * 2**20)
    window.barrier_passed(now=5.0)
    assert window.rtt_seconds is None


def test_the_bucket_gives_a_burst_and_then_the_rate() -> None:
    bucket = TokenBucket(30, 60)
    assert bucket.available(now=0.0) == 60
    bucket.take(60)
    assert bucket.available(now=0.0) == 0
    assert bucket.next_at() == pytest.approx(1 / 30)
    assert bucket.available(now=1 / 30) == 1
    assert bucket.available(now=1.0) == 30
    assert bucket.available(now=1000.0) == 60


def test_a_burst_of_zero_is_the_rate_and_a_rate_of_zero_is_no_limit() -> None:
    assert TokenBucket(30, 0).available(now=0.0) == 30
    assert TokenBucket(0.5, 0).available(now=0.0) == 1
    unlimited = TokenBucket(0, 60)
    assert unlimited.available(now=0.0) is None
    assert unlimited.next_at() is None
    unlimited.take(10**6)
    assert unlimited.available(now=0.0) is None


def test_waiting_until_next_at_always_gives_a_token() -> None:
    bucket, now = TokenBucket(7, 1), 0.0
    bucket.available(now=now)
    bucket.take(1)
    for _ in range(1000):
        now = bucket.next_at() or 0.0
        assert bucket.available(now=now) == 1
        bucket.take(1)


def test_a_path_that_becomes_longer_under_load_does_not_stay_mistaken_for_a_queue() -> None:
    """Satellite hand-over: the round trip grows from 1 to 300 ms while there is always something to write."""
    window = ByteWindow(8 * 2**20)
    now = 0.0
    sent_after = 0
    for turn in range(120):
        rtt = 0.001 if turn < 20 else 0.3
        size = max(window.room(0), 1)
        window.wrote(size, now=now)
        window.barrier_sent(now=now)
        window.filled()
        now += rtt
        window.barrier_passed(now=now)
        if turn >= 90:
            sent_after += size
    assert sent_after / 30 > 1 * 2**20, "a window of bytes, not of kilobytes, is under way again"
