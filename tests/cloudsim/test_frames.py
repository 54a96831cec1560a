from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudsim import frames
from cloudsim.frames import CLOSE, MESSAGE, PING, PONG, TOO_LARGE, VIOLATION, FrameReader, Part, message_frames
from tests.cloudsim.rawnode import frame, vectors


def read(data: bytes, limit: int = 10**6) -> list[Part]:
    return FrameReader(limit).feed(data)


def test_a_masked_text_frame_is_a_message() -> None:
    assert read(frame(1, b"hello")) == [(MESSAGE, b"hello")]


def test_a_binary_frame_is_taken_as_text() -> None:
    assert read(frame(2, b"hello")) == [(MESSAGE, b"hello")]


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65535, 65536])
def test_every_form_of_length_is_read(size: int) -> None:
    assert read(frame(1, b"x" * size)) == [(MESSAGE, b"x" * size)]


def test_fragments_are_joined_and_control_frames_between_them_come_first() -> None:
    data = frame(1, b"a", final=False) + frame(9, b"p") + frame(0, b"b", final=False) + frame(0, b"", final=True)
    assert read(data) == [(PING, b"p"), (MESSAGE, b"ab")]


def test_a_message_after_a_fragmented_one_stands_alone() -> None:
    data = frame(1, b"a", final=False) + frame(0, b"b") + frame(1, b"c") + frame(10, b"z")
    assert read(data) == [(MESSAGE, b"ab"), (MESSAGE, b"c"), (PONG, b"z")]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\x81\x01x", "bad MASK"),
        (b"\xc1\x80\0\0\0\0", "RSV1 set"),
        (b"\xb1\x80\0\0\0\0", "RSV2 set, RSV3 set"),
        (b"\x83\x80\0\0\0\0", "bad opcode 3"),
        (b"\x89\xfe\0\x7e", "len > 125 for control"),
        (b"\x09\x80\0\0\0\0", "FIN not set on control"),
        (b"\x80\x80\0\0\0\0", "continuation after FIN"),
        (frame(1, b"a", final=False) + frame(1, b"b"), "data before FIN"),
        (frame(8, b"\x03\xed"), "bad close code 1005"),
        (frame(8, b"\x03\xe8\xff"), "invalid utf8 payload in close frame"),
        (b"\x09\x01", "FIN not set on control, bad MASK"),
    ],
)
def test_a_violation_is_named_as_the_real_library_names_it(data: bytes, text: str) -> None:
    assert read(data) == [(VIOLATION, text.encode())]


def test_nothing_is_read_after_a_violation_or_a_close() -> None:
    for end in (b"\x81\x01x", frame(8, b"\x03\xe8bye")):
        reader = FrameReader(100)
        assert reader.feed(frame(1, b"before") + end + frame(1, b"after"))[0] == (MESSAGE, b"before")
        assert reader.feed(frame(1, b"later")) == []


def test_a_close_frame_is_echoed_without_its_text() -> None:
    assert read(frame(8, b"\x03\xe8bye")) == [(CLOSE, b"\x03\xe8bye")]
    assert frames.echoed_close(b"\x03\xe8bye") == b"\x88\x02\x03\xe8"
    assert frames.echoed_close(b"") == b"\x88\x00"


def test_a_message_above_the_limit_ends_before_it_is_held() -> None:
    reader = FrameReader(1000)
    assert reader.feed(frame(1, b"x" * 1001)[:20]) == [(TOO_LARGE, b"")]
    assert reader.held_bytes == 0


def test_the_limit_counts_all_fragments_of_a_message() -> None:
    part = frame(1, b"x" * 600, final=False)
    assert read(part + frame(0, b"x" * 401), 1000) == [(TOO_LARGE, b"")]
    assert read(part + frame(0, b"x" * 400), 1000) == [(MESSAGE, b"x" * 1000)]


PARTS = st.lists(
    st.one_of(
        st.tuples(st.just(MESSAGE), st.binary(max_size=300)),
        st.tuples(st.sampled_from([PING, PONG]), st.binary(max_size=125)),
    ),
    max_size=8,
)


@given(parts=PARTS, cuts=st.lists(st.integers(0, 3000), max_size=10), mask=st.binary(min_size=4, max_size=4))
def test_frames_cut_at_any_place_give_the_same_parts(parts: list[Part], cuts: list[int], mask: bytes) -> None:
    data = b"".join(frame(1 if kind == MESSAGE else kind, payload, mask=mask) for kind, payload in parts)
    reader = FrameReader(10**6)
    found: list[Part] = []
    last = 0
    for cut in [*sorted(cut for cut in cuts if cut < len(data)), len(data)]:
        found += reader.feed(data[last:cut])
        last = cut
    assert found == parts
    assert reader.held_bytes == 0


@given(st.lists(st.binary(max_size=40), max_size=20))
def test_any_bytes_at_all_are_read_without_an_exception(pieces: list[bytes]) -> None:
    reader = FrameReader(1000)
    for piece in pieces:
        for kind, payload in reader.feed(piece):
            assert kind in (MESSAGE, PING, PONG, CLOSE, VIOLATION, TOO_LARGE)
            assert isinstance(payload, bytes)
    assert reader.held_bytes < 2000


def frames_of(data: bytes) -> list[list[object]]:
    """FIN, kind and length of each unmasked frame."""
    found: list[list[object]] = []
    while data:
        size, start = data[1], 2
        if size == 126:
            size, start = int.from_bytes(data[2:4], "big"), 4
        elif size == 127:
            size, start = int.from_bytes(data[2:10], "big"), 10
        found.append([data[0] >> 7, "text" if data[0] & 15 else "continuation", size])
        data = data[start + size :]
    return found


BOUNDARIES = next(
    vector["decoded"]["hub_fragmentation_boundaries(payload_len, frames)"]
    for vector in vectors("measured_behaviour")
    if vector["name"] == "fragmentation_boundaries_and_zombie_probes"
)


@pytest.mark.parametrize(("size", "expected"), BOUNDARIES)
def test_messages_are_cut_into_frames_as_measured(size: int, expected: list[list[object]]) -> None:
    assert frames_of(message_frames(b"x" * size)) == expected
