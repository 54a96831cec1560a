from modules.edgehub.liveness import Liveness


def alive() -> Liveness:
    return Liveness(silence_seconds=5.0, limit_seconds=30.0, now=0.0)


def dead_at(
    liveness: Liveness,
    now: float,
    *,
    is_awaited: bool = True,
    queued: int = 0,
    rate: float | None = None,
    rtt: float | None = None,
) -> float | None:
    return liveness.dead_at(is_awaited=is_awaited, queued_bytes=queued, rate=rate, rtt_seconds=rtt, now=now)


def test_an_idle_link_cannot_be_dead() -> None:
    assert dead_at(alive(), 1000.0, is_awaited=False) is None


def test_silence_counts_from_when_something_was_first_awaited() -> None:
    liveness = alive()
    assert dead_at(liveness, 100.0) == 105.0
    assert dead_at(liveness, 103.0) == 105.0


def test_any_progress_puts_it_off() -> None:
    liveness = alive()
    dead_at(liveness, 100.0)
    liveness.progress(now=104.0)
    assert dead_at(liveness, 104.0) == 109.0
    liveness.barrier_sent(acknowledged_bytes=500, unconfirmed_bytes=10_000)
    liveness.acknowledged(1000, now=108.0)
    assert dead_at(liveness, 108.0) == 113.0


def test_acknowledgements_that_do_not_grow_are_no_progress() -> None:
    liveness = alive()
    dead_at(liveness, 100.0)
    liveness.barrier_sent(acknowledged_bytes=0, unconfirmed_bytes=10_000)
    liveness.acknowledged(1000, now=101.0)
    liveness.acknowledged(1000, now=104.0)
    assert dead_at(liveness, 104.0) == 106.0


def test_acknowledgements_of_what_follows_the_awaited_pong_are_no_progress() -> None:
    """A CloudHub that hangs has a kernel that acknowledges what trickles in."""
    liveness = alive()
    dead_at(liveness, 100.0)
    liveness.barrier_sent(acknowledged_bytes=50_000, unconfirmed_bytes=300)
    for second in range(1, 30):
        liveness.acknowledged(50_000 + 400 * second, now=100.0 + second)
    due = dead_at(liveness, 129.0)
    assert due is not None
    assert due <= 112.0


def test_an_answer_begins_the_count_anew() -> None:
    liveness = alive()
    dead_at(liveness, 100.0)
    assert dead_at(liveness, 101.0, is_awaited=False) is None
    assert dead_at(liveness, 200.0) == 205.0


def test_what_is_queued_on_a_slow_link_adds_its_time() -> None:
    assert dead_at(alive(), 100.0, queued=100_000, rate=10_000.0) == 115.0


def test_a_long_round_trip_is_allowed_eight_times() -> None:
    assert dead_at(alive(), 100.0, rtt=1.5) == 112.0


def test_it_is_never_more_than_the_keepalive_limit() -> None:
    assert dead_at(alive(), 100.0, queued=10**9, rate=1.0, rtt=100.0) == 130.0
