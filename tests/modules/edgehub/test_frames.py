"""Frames: written for a batch, read wherever they are cut, too large ones passed over."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modules.edgehub.frames import (
    BINARY,
    CLOSE,
    CONTINUATION,
    PING,
    PONG,
    TEXT,
    Close,
    FrameFault,
    FrameReader,
    FrameWriter,
    Ping,
    Pong,
    Skipped,
    Text,
)

VECTORS = Path(__file__).parents[2] / "vectors" / "cloudlink"
LIMIT = 100_000


def xor(data: bytes, key: bytes) -> bytes:
    return bytes(byte ^ key[i % 4] for i, byte in enumerate(data))


def counting(size: int) -> bytes:
    return bytes(i % 251 for i in range(size))


def server_frame(opcode: int, payload: bytes, *, fin: bool = True) -> bytes:
    first = (0x80 if fin else 0) | opcode
    if len(payload) < 126:
        return bytes((first, len(payload))) + payload
    if len(payload) < 65536:
        return struct.pack("!BBH", first, 126, len(payload)) + payload
    return struct.pack("!BBQ", first, 127, len(payload)) + payload


def unmask(stream: bytes) -> list[tuple[int, bytes]]:
    """The (first byte, payload) of each masked frame, as a server reads them."""
    frames = []
    while stream:
        first, second = stream[0], stream[1]
        assert second & 0x80, "a client's frame must be masked"
        size, at = second & 0x7F, 2
        if size == 126:
            size, at = int.from_bytes(stream[2:4], "big"), 4
        elif size == 127:
            size, at = int.from_bytes(stream[2:10], "big"), 10
        key, body = stream[at : at + 4], stream[at + 4 : at + 4 + size]
        frames.append((first, xor(body, key)))
        stream = stream[at + 4 + size :]
    return frames


def recorded(name: str) -> list[dict[str, Any]]:
    vectors: list[dict[str, Any]] = json.loads((VECTORS / name).read_text())["vectors"]
    return vectors


@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 65535, 65536, 70000])
def test_a_written_frame_is_masked_and_whole(size: int) -> None:
    payload = counting(size)
    stream = b"".join(FrameWriter(counting, xor).texts([payload, b"next"]))
    assert unmask(stream) == [(0x80 | TEXT, payload), (0x80 | TEXT, b"next")]


def test_each_frame_of_a_batch_has_a_mask_of_its_own() -> None:
    pieces = FrameWriter(counting, xor).texts([b"a", b"b"])
    assert pieces[1] != pieces[4]


def test_a_control_frame_holds_125_bytes_and_no_more() -> None:
    writer = FrameWriter(counting, xor)
    assert unmask(writer.control(PING, b"x" * 125)) == [(0x80 | PING, b"x" * 125)]
    with pytest.raises(ValueError, match="125"):
        writer.control(PING, b"x" * 126)
    assert unmask(writer.close(1000, "r" * 200)) == [(0x80 | CLOSE, b"\x03\xe8" + b"r" * 123)]


@pytest.mark.parametrize("vector", [v for v in recorded("ws_session.json") if v["direction"] == "cloud->edge"])
def test_recorded_frames_of_cloudhub_are_read(vector: dict[str, Any]) -> None:
    data = bytes.fromhex(vector["frame_hex"])
    assert FrameReader(LIMIT).receive(data) == [Text(vector["text"].encode())]


@pytest.mark.parametrize("vector", [v for v in recorded("ws_session.json") if v["direction"] == "edge->cloud"])
def test_our_frame_of_a_recorded_message_is_the_recorded_frame(vector: dict[str, Any]) -> None:
    key = bytes.fromhex(vector["frame"]["mask"])
    assert b"".join(FrameWriter(lambda n: key, xor).texts([vector["text"].encode()])).hex() == vector["frame_hex"]


@pytest.mark.parametrize(
    "vector",
    [v for v in recorded("ws_large_and_fragmented.json") if v["direction"] == "cloud->edge"],
    ids=lambda v: v["name"],
)
def test_cloudhubs_fragments_become_one_message(vector: dict[str, Any]) -> None:
    payload = counting(vector["payload_len"])
    stream, at = b"", 0
    for frame in vector["frames"]:
        stream += bytes.fromhex(frame["header_hex"]) + payload[at : at + frame["payload_len"]]
        at += frame["payload_len"]
    reader = FrameReader(16 * 2**20)
    events = [event for i in range(0, len(stream), 65536) for event in reader.receive(stream[i : i + 65536])]
    assert events == [Text(payload)]
    assert reader.held_bytes == 0


STREAM = (
    server_frame(TEXT, b"one")
    + server_frame(TEXT, b"tw", fin=False)
    + server_frame(PING, b"mid")
    + server_frame(CONTINUATION, b"o", fin=False)
    + server_frame(PONG, b"7")
    + server_frame(CONTINUATION, b"")
    + server_frame(BINARY, b"three" * 40)
    + server_frame(TEXT, b"")
    + server_frame(CLOSE, b"\x03\xe8bye")
)
EVENTS = [Text(b"one"), Ping(b"mid"), Pong(b"7"), Text(b"two"), Text(b"three" * 40), Text(b""), Close(1000, "bye")]


@pytest.mark.parametrize("step", [1, 2, 3, 5, 7, 50, 10_000])
def test_the_same_events_come_wherever_the_bytes_are_cut(step: int) -> None:
    reader = FrameReader(LIMIT)
    events = [event for i in range(0, len(STREAM), step) for event in reader.receive(STREAM[i : i + step])]
    assert events == EVENTS


@pytest.mark.parametrize("cut", range(1, len(STREAM)))
def test_one_cut_at_every_place(cut: int) -> None:
    reader = FrameReader(LIMIT)
    assert reader.receive(STREAM[:cut]) + reader.receive(STREAM[cut:]) == EVENTS


@pytest.mark.parametrize("parts", [[2001], [1000, 1000, 1], [1, 2000, 0], [5000, 5000]])
@pytest.mark.parametrize("step", [1, 997, 100_000])
def test_a_message_beyond_the_limit_is_passed_over_and_not_kept(parts: list[int], step: int) -> None:
    stream = b""
    for i, size in enumerate(parts):
        opcode = TEXT if i == 0 else CONTINUATION
        stream += server_frame(opcode, counting(size), fin=i == len(parts) - 1) + server_frame(PING, b"p")
    stream += server_frame(TEXT, b"after")
    reader, events, most = FrameReader(2000), [], 0
    for i in range(0, len(stream), step):
        events += reader.receive(stream[i : i + step])
        most = max(most, reader.held_bytes)
    assert [event for event in events if event != Ping(b"p")] == [Skipped(sum(parts)), Text(b"after")]
    assert events.count(Ping(b"p")) == len(parts)
    assert most <= 2000 + 14


def test_a_message_of_exactly_the_limit_is_read() -> None:
    assert FrameReader(2000).receive(server_frame(TEXT, counting(2000))) == [Text(counting(2000))]


@pytest.mark.parametrize(
    ("stream", "words"),
    [
        (server_frame(CONTINUATION, b"x"), "without a beginning"),
        (server_frame(TEXT, b"x", fin=False) + server_frame(TEXT, b"y"), "before the end"),
        (server_frame(3, b"x"), "opcode 3"),
        (server_frame(PING, b"x", fin=False), "control"),
        (server_frame(PING, b"x" * 126), "control"),
        (b"\xc1\x01x", "reserved"),
        (b"\x81\x81abcdx", "masked"),
        (server_frame(CLOSE, b"\x03"), "half a code"),
    ],
)
def test_a_broken_frame_is_a_fault_that_keeps_what_came_before(stream: bytes, words: str) -> None:
    with pytest.raises(FrameFault, match=words) as fault:
        FrameReader(LIMIT).receive(server_frame(TEXT, b"good") + stream)
    assert fault.value.events == [Text(b"good")]


@given(st.binary(max_size=300))
def test_any_bytes_give_events_or_a_fault(data: bytes) -> None:
    try:
        FrameReader(100).receive(data)
    except FrameFault:
        pass


@given(st.lists(st.binary(max_size=400), max_size=8), st.lists(st.integers(1, 100), min_size=1, max_size=20))
def test_messages_come_as_they_were_sent(payloads: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(server_frame(TEXT, payload) for payload in payloads)
    reader, events, i = FrameReader(1000), [], 0
    while stream:
        size = cuts[i % len(cuts)]
        events += reader.receive(stream[:size])
        stream, i = stream[size:], i + 1
    assert events == [Text(payload) for payload in payloads]
