"""The ramp after an outage, and what the classes may send."""

import itertools
import random

from modules.edgehub.governor import JITTER, Pace, Ramp
from modules.edgehub.link import LinkLost
from modules.edgehub.outbox import Class, Outbox, OutboxLimits
from modules.edgehub.window import TokenBucket
from runtime.emp import Priority
from tests.modules.edgehub.fakes import FakeCloud, hand_over, running, upload
from tests.modules.edgehub.test_hub import config, until_served
from tests.support.aio import run, until


def drain(ramp: Ramp, seconds: float, step: float = 0.05) -> list[int]:
    """Take all that is allowed, for so long; how many in each second."""
    counts = [0] * int(seconds)
    now = 0.0
    ramp.begin(now=now)
    while now < seconds - step:
        available = ramp.available(now=now)
        assert available is not None
        ramp.take(available)
        counts[int(now)] += available
        now += step
    return counts


def test_without_an_outage_nothing_is_limited() -> None:
    ramp = Ramp(random.Random(1), start_rate=100, seconds=10)
    assert ramp.available(now=5.0) is None
    assert ramp.next_at() is None


def test_after_an_outage_the_rate_grows_until_nothing_limits_it() -> None:
    ramp = Ramp(random.Random(1), start_rate=100, seconds=6)
    counts = drain(ramp, 6)
    assert 60 < counts[0] < 250
    assert all(later > 1.4 * earlier for earlier, later in itertools.pairwise(counts))
    assert ramp.available(now=6.0) is None
    assert ramp.rate(now=6.0) is None


def test_the_next_message_is_due_when_one_is_available_and_not_before() -> None:
    ramp = Ramp(random.Random(3), start_rate=20, seconds=10)
    ramp.begin(now=0.0)
    for _ in range(200):
        due = ramp.next_at()
        assert due is not None
        assert ramp.available(now=due - 0.0005) == 0
        assert ramp.available(now=due + 1e-6) == 1
        ramp.take(1)


def test_two_nodes_do_not_climb_in_step() -> None:
    totals = [sum(drain(Ramp(random.Random(seed), start_rate=100, seconds=5), 5)) for seed in range(50)]
    assert max(totals) > 1.5 * min(totals)
    rates = []
    for seed in range(50):
        ramp = Ramp(random.Random(seed), start_rate=100, seconds=5)
        ramp.begin(now=0.0)
        rates.append(ramp.rate(now=0.0) or 0.0)
    assert all(100 * (1 - JITTER) <= rate <= 100 * (1 + JITTER) for rate in rates)


def test_no_seconds_no_ramp() -> None:
    ramp = Ramp(random.Random(1), start_rate=1, seconds=0)
    ramp.begin(now=0.0)
    assert ramp.available(now=0.0) is None


def test_the_ramp_and_message_qps_hold_for_data_only_and_the_lower_one_wins() -> None:
    pace = Pace(TokenBucket(0, 0), TokenBucket(5, 5), Ramp(random.Random(1), start_rate=1000, seconds=5))
    pace.ramp.begin(now=0.0)
    assert pace.available(Class.SIGNAL, now=0.0) is None
    assert pace.available(Class.DATA, now=0.0) == 0
    assert pace.available(Class.DATA, now=1.0) == 5
    pace.take(signals=100, data=5)
    assert pace.available(Class.DATA, now=1.0) == 0
    assert pace.next_at(Class.DATA) == 1.2
    assert pace.next_at(Class.SIGNAL) is None


def test_signals_have_a_bucket_of_their_own() -> None:
    pace = Pace(TokenBucket(10, 2), TokenBucket(0, 0), Ramp(random.Random(1), start_rate=1, seconds=0))
    assert pace.available(Class.SIGNAL, now=0.0) == 2
    pace.take(signals=2, data=1000)
    assert pace.available(Class.SIGNAL, now=0.0) == 0
    assert pace.available(Class.DATA, now=0.0) is None


def test_after_an_outage_data_goes_up_on_the_ramp_and_signals_at_once() -> None:
    async def scenario() -> None:
        cloud = FakeCloud()
        cloud.faults = [LinkLost("refused")] * 3
        settings = config(ramp_after_seconds=0.1, ramp_start_rate=40.0, ramp_seconds=1.0, retry_cap_seconds=0.2)
        async with running(settings, factory=cloud) as (hub, _):
            uploads = [await hand_over(hub, upload(number)) for number in range(200)]
            hub._down_since -= 0.2  # it has been away for long
            await until_served(hub)
            signal = await hand_over(hub, upload(1000), priority=Priority.SIGNAL)
            assert hub.link_status()["is_ramping"]
            await until(lambda: signal and signal.outcome == "done", "the signal")
            assert uploads[-1] is not None
            assert uploads[-1].outcome is None, "uploads wait for the ramp"
            await until(lambda: all(each and each.outcome == "done" for each in uploads), "the backlog")
            assert not hub.link_status()["is_ramping"]
            numbers = [m.json()["number"] for m in cloud.written()]
            assert [n for n in numbers if n < 1000] == list(range(200))

    run(scenario())


def test_signals_without_tokens_do_not_hold_up_data() -> None:
    box: Outbox[str] = Outbox(OutboxLimits(100, 10_000))
    box.put(b"signal", "signal", Class.SIGNAL)
    box.put(b"data", "data", Class.DATA)
    taken = box.take(1000, max_messages=10, max_data=None, max_signals=0)
    assert [entry.token for entry in taken] == ["data"]


def test_signals_may_be_a_window_ahead_of_the_pong_and_data_not() -> None:
    box: Outbox[str] = Outbox(OutboxLimits(100, 10_000))
    box.put(b"x" * 100, "under way", Class.DATA)
    box.take(100, max_messages=10, max_data=None)
    box.put(b"s" * 60, "signal", Class.SIGNAL)
    box.put(b"s" * 60, "second", Class.SIGNAL)
    box.put(b"d", "data", Class.DATA)
    taken = box.take(0, max_messages=10, max_data=None, signal_bytes=100)
    assert [entry.token for entry in taken] == ["signal"]
    box.put(b"d", "data", Class.DATA)
    assert box.take(-60, max_messages=10, max_data=None, max_signals=0, signal_bytes=100) == []
