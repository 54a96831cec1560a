from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cloudsim.impairment import Pipe


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
