from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from cloudsim.impairment import DatagramPipe, Pipe


def test_a_clear_pipe_delivers_at_once() -> None:
    pipe = Pipe()
    assert pipe.is_clear
    pipe.push(b"abc", 1.0)
    assert pipe.next_deadline() == 1.0
    assert pipe.pop(1.0) == b"abc"
    assert pipe.held_bytes == 0


def test_latency_delays_every_byte_by_the_same_time() -> None:
    pipe = Pipe()
    pipe.latency_seconds = 0.5
    pipe.push(b"a", 0.0)
    pipe.push(b"b", 0.2)
    assert pipe.pop(0.49) == b""
    assert pipe.pop(0.5) == b"a"
    assert pipe.pop(0.7) == b"b"


def test_a_throttled_pipe_delivers_at_its_rate() -> None:
    pipe = Pipe()
    pipe.bytes_per_second = 10_000.0
    pipe.push(b"x" * 20_000, 0.0)
    total = 0
    for tenth in range(1, 21):
        total += len(pipe.pop(tenth / 10))
        assert abs(total - tenth * 1000) <= 200
    assert total + len(pipe.pop(2.001)) == 20_000  # sums of floats


def test_an_idle_throttled_pipe_saves_nothing_up() -> None:
    pipe = Pipe()
    pipe.bytes_per_second = 1000.0
    pipe.push(b"x" * 100, 100.0)
    assert len(pipe.pop(100.05)) <= 64


def test_clearing_lets_everything_arrive() -> None:
    pipe = Pipe()
    pipe.bytes_per_second, pipe.latency_seconds = 10.0, 5.0
    pipe.push(b"x" * 1000, 0.0)
    pipe.clear_rules(1.0)
    assert pipe.pop(1.0) == b"x" * 1000
    assert pipe.is_clear


@given(
    st.lists(
        st.tuples(st.binary(min_size=1, max_size=300), st.floats(0, 1), st.floats(0, 2), st.integers(1, 5000)),
        max_size=10,
    )
)
def test_bytes_keep_their_order_whatever_changes(steps: list[tuple[bytes, float, float, int]]) -> None:
    pipe = Pipe()
    now, sent, got = 0.0, b"", b""
    for data, wait, latency, rate in steps:
        pipe.latency_seconds, pipe.bytes_per_second = latency, float(rate)
        pipe.push(data, now)
        sent += data
        now += wait
        got += pipe.pop(now)
    while (deadline := pipe.next_deadline()) is not None:
        got += pipe.pop(deadline)
    assert got == sent


def datagrams(**settings: float) -> DatagramPipe[bytes]:
    pipe: DatagramPipe[bytes] = DatagramPipe(random.Random(7))
    for name, value in settings.items():
        setattr(pipe, name, value)
    return pipe


def test_datagrams_arrive_whole_and_in_order_after_the_latency() -> None:
    pipe = datagrams(latency_seconds=0.5)
    pipe.push(b"a", 1, 1.0)
    pipe.push(b"bc", 2, 1.2)
    assert pipe.next_deadline() == 1.5
    assert pipe.pop(1.4) == []
    assert pipe.pop(1.6) == [b"a"]
    assert pipe.pop(2.0) == [b"bc"]
    assert pipe.next_deadline() is None


def test_a_line_loses_the_part_of_its_datagrams_that_it_is_told() -> None:
    pipe = datagrams(loss=0.25)
    assert not pipe.is_clear
    for number in range(1000):
        pipe.push(b"%d" % number, 1, 0.0)
    arrived = pipe.pop(0.0)
    assert 700 < len(arrived) < 800
    assert arrived == sorted(arrived, key=int)


def test_a_slow_line_delays_datagrams_and_drops_those_that_its_queue_does_not_hold() -> None:
    pipe = datagrams(bytes_per_second=100_000.0)
    for _ in range(100):
        pipe.push(b"x", 1000, 0.0)
    assert len(pipe.pop(0.1)) == 10
    assert len(pipe.pop(10.0)) == 15  # 250 ms in all
    pipe.clear_rules(10.0)
    assert pipe.is_clear


def test_what_a_cleared_line_holds_arrives_at_once() -> None:
    pipe = datagrams(latency_seconds=60.0)
    pipe.push(b"x", 1, 0.0)
    pipe.clear_rules(1.0)
    assert pipe.pop(1.0) == [b"x"]
    assert pipe.is_clear
