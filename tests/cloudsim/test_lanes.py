from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudsim.lanes import Broken, Control, ControlEnded, Freed, LaneEvent, Lanes, Package
from runtime.viaduct import packages

HELD_BYTES = 1000


def lanes(*, is_serving: bool = True) -> Lanes:
    made = Lanes(random.Random(1), HELD_BYTES)
    if is_serving:
        list(made.serve())
    return made


def receive(made: Lanes, stream: int, data: bytes, *, ended: bool = False) -> list[LaneEvent]:
    return list(made.receive(stream, data, ended))


def test_the_first_stream_of_the_node_is_the_control_stream_and_has_no_use_type() -> None:
    made = lanes(is_serving=False)
    assert receive(made, 0, packages([b"headers", b"more"])) == [Control(b"headers"), Control(b"more")]


def test_packages_come_whole_wherever_they_are_cut() -> None:
    data = b"msg" + packages([b"one", b"", b"three"])
    for cut in range(len(data)):
        made = lanes()
        assert receive(made, 4, data[:cut]) + receive(made, 4, data[cut:]) == [
            Package(4, b"one"),
            Package(4, b""),
            Package(4, b"three"),
        ]


def test_messages_wait_until_the_headers_have_come() -> None:
    made = lanes(is_serving=False)
    assert receive(made, 4, b"msg" + packages([b"early"])) == []
    assert list(made.serve()) == [Package(4, b"early")]


def test_streams_are_accepted_by_number_each_waiting_for_the_use_type_of_the_one_before() -> None:
    made = lanes()
    assert receive(made, 8, b"msg" + packages([b"second"])) == []
    assert receive(made, 4, b"ms") == []
    assert receive(made, 4, b"g" + packages([b"first"])) == [Package(4, b"first"), Package(8, b"second")]


def test_a_stream_that_ends_before_its_use_type_ends_the_connection() -> None:
    assert receive(lanes(), 4, b"ms", ended=True) == [Broken("stream 4 ended before its use type")]


@pytest.mark.parametrize("use", [b"str", b"xyz"])
def test_a_stream_of_another_use_is_never_read(use: bytes) -> None:
    made = lanes()
    assert receive(made, 4, use + packages([b"raw"])) == []
    assert receive(made, 4, packages([b"raw"])) == []
    assert made.taken_from(4) == 3
    assert receive(made, 8, b"msg" + packages([b"m"])) == [Package(8, b"m")]
    assert made.pick() == 8


def test_streams_in_one_direction_are_never_accepted() -> None:
    made = lanes()
    assert receive(made, 2, b"msg" + packages([b"m"])) == []
    assert made.pick() is None


def test_the_hub_writes_on_streams_of_either_side_and_opens_one_only_when_there_is_none() -> None:
    made = lanes()
    assert made.pick() is None
    made.opened(1)
    assert made.pick() == 1
    assert receive(made, 1, packages([b"answer"])) == [Package(1, b"answer")]
    receive(made, 4, b"msg")
    assert {made.pick() for _ in range(50)} == {1, 4}


def test_at_99_streams_the_hub_opens_no_more() -> None:
    made = lanes()
    for number in range(98):
        receive(made, 4 + 4 * number, b"str")
    assert made.may_open
    made.opened(1)
    assert not made.may_open


def test_a_package_above_32_mib_frees_its_stream_and_no_other() -> None:
    made = lanes()
    receive(made, 8, b"")
    receive(made, 4, b"msg")
    bad = packages([b"good"]) + bytes.fromhex("01010100010002000001")
    assert receive(made, 4, bad) == [
        Package(4, b"good"),
        Freed(4, "payload length 33554433 exceeds maximum 33554432"),
    ]
    assert receive(made, 4, packages([b"late"])) == []
    assert receive(made, 8, b"msg" + packages([b"m"])) == [Package(8, b"m")]
    assert made.pick() == 8


@pytest.mark.parametrize(
    ("data", "reason"),
    [(packages([b"m"]), "the node ended the stream"), (packages([b"m"])[:-1], "unexpected EOF")],
)
def test_the_end_of_a_stream_frees_it(data: bytes, reason: str) -> None:
    made = lanes()
    assert receive(made, 4, b"msg" + data, ended=True)[-1] == Freed(4, reason)
    assert made.pick() is None


def test_the_end_of_the_control_stream_is_told_and_messages_go_on() -> None:
    made = lanes()
    assert receive(made, 0, b"", ended=True) == [ControlEnded("the node ended the stream")]
    assert receive(made, 4, b"msg" + packages([b"m"])) == [Package(4, b"m")]


def test_a_stream_given_up_over_a_package_yields_none_of_those_behind_it() -> None:
    made = lanes()
    receive(made, 4, b"msg")
    found = made.receive(4, packages([b"bad", b"behind"]), False)
    assert next(found) == Package(4, b"bad")
    assert made.free(4, "undecodable") == Freed(4, "undecodable")
    assert list(found) == []


def test_incomplete_packages_of_all_streams_together_are_bounded() -> None:
    made = lanes()
    head = packages([b"x" * 600])[:-1]
    assert receive(made, 4, b"msg" + head) == []
    assert receive(made, 4, b"x") == [Package(4, b"x" * 600)]
    assert receive(made, 4, head) == []
    assert receive(made, 8, b"msg" + head) == [Broken("incomplete packages of more than 1000 bytes")]


def test_only_what_has_been_read_counts_for_flow_control() -> None:
    made = lanes(is_serving=False)
    receive(made, 4, b"msg12345")
    assert (made.taken, made.taken_from(4), made.taken_from(8)) == (0, 0, 0)
    list(made.serve())
    assert (made.taken, made.taken_from(4)) == (8, 8)
    made.free(4, "")
    receive(made, 4, b"late")
    assert made.taken == 12


@given(st.lists(st.tuples(st.sampled_from([0, 1, 2, 3, 4, 8, 12]), st.binary(max_size=40), st.booleans()), max_size=40))
def test_any_bytes_on_any_stream_yield_events_and_hold_no_more_than_allowed(
    pieces: list[tuple[int, bytes, bool]],
) -> None:
    made = lanes()
    made.opened(1)
    for stream, data, ended in pieces:
        for event in made.receive(stream, data, ended):
            assert isinstance(event, Control | Package | ControlEnded | Freed | Broken)
            if isinstance(event, Broken):
                return
    assert 0 <= made._held <= HELD_BYTES
    assert made.taken <= sum(len(data) for _, data, _ in pieces)


@given(st.lists(st.binary(max_size=30), max_size=8), st.data())
def test_packages_survive_any_cut(payloads: list[bytes], data: st.DataObject) -> None:
    stream = b"msg" + packages(payloads)
    made = lanes()
    found: list[LaneEvent] = []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        found += receive(made, 4, stream[:size])
        stream = stream[size:]
    assert found == [Package(4, payload) for payload in payloads]
