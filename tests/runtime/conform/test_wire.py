"""The second opinion on frames: it agrees with the codec, and says what is wrong in words."""

from __future__ import annotations

import re
from pathlib import Path

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime import emp
from runtime.conform import wire
from runtime.errors import MalformedFrame

PAGE = (Path(__file__).parents[3] / "docs" / "emp.md").read_text()
ANY = wire.FROM_MODULE | wire.FROM_BROKER

EXAMPLES = [
    [
        bytes.fromhex("".join(line.partition(";")[0] for line in part.splitlines()))
        for part in re.split(r"^--- .*\n", block, flags=re.M)[1:]
    ]
    for block in re.findall(r"^```emp\n(.*?)^```", PAGE, re.M | re.S)
]

GOOD = {
    "HELLO/1": ["probe", ["twin"], b"i" * 16, 0, 15000, "page/1", 2048, 8388608, 1],
    "WELCOME/1": [b"e" * 8, 1, 1, 5000, False, [1, 1, 1, 1, 1]],
    "SEND/1": ["@hub", 3, 1, 1, 1, 0, None, None, "key", 1],
    "DELIVER/1": [1, 1, "probe", b"i" * 16, 1, "x", 3, 1, 1, 1, 1, [[1, "no"]], 0, 5, b"r" * 16, "key", [1, 2]],
    "ACK/1": [1, [[1, 1, [[1, "no"]]]]],
    "SETTLED/1": ["x", 3, 1, [[1, "no", None]], [[1, 1, ["y"]]]],
    "PING/1": [1, {"n": 1}, [["x", 3, 1]]],
}


def frames_of(verb: str, header: object) -> list[bytes]:
    body = [b"\x91\x90"] if verb in wire.BODY_REQUIRED else []
    return [verb.encode(), msgpack.packb(header), *body]


@pytest.mark.parametrize("frames", EXAMPLES, ids=[f"{number}" for number in range(len(EXAMPLES))])
def test_the_pages_examples_are_good(frames: list[bytes]) -> None:
    assert wire.fault_of(frames, ANY) is None
    if wire.verb_of(frames) in wire.BODY_REQUIRED:
        count = msgpack.unpackb(frames[1])[3 if wire.verb_of(frames) == "SEND/1" else 8]
        assert wire.body_fault(frames[2], count) is None
        assert len(wire.sizes_of(frames[2])) == len(wire.messages_of(frames[2])) == count
    assert wire.verb_of(frames) in wire.describe(frames)


def test_the_fields_are_those_of_the_page() -> None:
    for verb, fields in wire.HEADERS.items():
        section = re.search(rf"^### {verb.removesuffix('/1')}\n(.*?)(?=^###? |\Z)", PAGE, re.M | re.S)
        assert section is not None, verb
        rows = re.findall(r"^\| (\w+) \| ([^|]*) \|", section[1], re.M)[1:]
        assert [name for name, _ in rows] == [field.name for field in fields], verb
        assert ["opt" in re.split(r"[ ,]+", kind) for _, kind in rows] == [field.optional for field in fields], verb


WRONG = st.sampled_from([None, True, -1, 0, 1, 2**63, 1.5, "", "text", b"", b"i" * 16, [], [1], {}, "x" * 70, "@", "-"])


@given(verb=st.sampled_from(sorted(GOOD)), place=st.integers(0, 16), value=WRONG)
def test_both_readers_are_of_one_opinion(verb: str, place: int, value: object) -> None:
    """The codec lets some text pass that only a second look can judge; nothing that it refuses is good."""
    header = list(GOOD[verb])
    header[place % len(header)] = value
    frames = frames_of(verb, header)
    try:
        emp.decode(frames)
    except MalformedFrame:
        assert wire.fault_of(frames, ANY) is not None


@pytest.mark.parametrize(
    ("frames", "said"),
    [
        ([], "0 frames"),
        ([b"PING/1"], "1 frames"),
        ([b"NEWS/1", b"\x90"], "'NEWS/1' is no verb"),
        ([b"PING/1", b"\x91\x01", b""], "PING/1 with a body"),
        ([b"SEND/1", b"\x90"], "SEND/1 with no body"),
        ([b"PING/1", b"\xc1"], "no MessagePack"),
        ([b"PING/1", b"\x80"], "no array"),
        ([b"PING/1", b"\x90"], "'nonce' is missing"),
        ([b"PING/1", b"\x91\xcb" + bytes(8)], "'nonce' is 0.0"),
        ([b"PING/1", msgpack.packb([1, {"x" * 300_000: 1}])], "a header of 3000"),
        ([b"BYE/1", b"\x91\x01"], "'leaving' is 1"),
        ([b"ACK/1", msgpack.packb([1, [[1, 1, [[1, "No!"]]]]])], "'lanes'"),
        ([b"HELLO/1", msgpack.packb(["n", [], "i" * 16, 0, 15000, ""])], "'incarnation'"),
    ],
)
def test_what_is_wrong_is_said(frames: list[bytes], said: str) -> None:
    assert said in (wire.fault_of(frames, ANY) or "")
    assert wire.read(frames, ANY)[1]


def test_a_verb_of_the_other_side_is_none_of_this_one() -> None:
    frames = frames_of("PING/1", [1])
    assert wire.read(frames, wire.FROM_MODULE)[1] is None
    assert wire.read(frames, wire.FROM_BROKER) == (None, "'PING/1' is no verb of this side")


@pytest.mark.parametrize(
    ("body", "count", "said"),
    [
        (b"\xc1", 1, "no MessagePack"),
        (b"\x90", 1, "no array of 1"),
        (b"\x91\x01", 1, "a message is no array"),
        (msgpack.packb([["id", 1]]), 1, "'parent_id' is 1"),
        (msgpack.packb([["id", "", 0, False, "", "", "", "", "", "yaml"]]), 1, "'kind'"),
    ],
)
def test_what_is_wrong_with_a_body_is_said(body: bytes, count: int, said: str) -> None:
    assert said in (wire.body_fault(body, count) or "")
    assert wire.messages_of(b"\xc1") == wire.sizes_of(b"\xc1") == []


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(0, 2**63) | st.text(max_size=40) | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=4),
)


@given(value=VALUES)
def test_the_wide_form_is_the_same_value(value: object) -> None:
    assert msgpack.unpackb(wire.packed_wide(value)) == value


@given(messages=st.lists(st.lists(st.binary(max_size=300), max_size=3), max_size=40))
def test_the_sizes_are_those_of_the_messages(messages: list[list[bytes]]) -> None:
    assert wire.sizes_of(msgpack.packb(messages)) == [len(msgpack.packb(each)) for each in messages]


@given(frames=st.lists(st.binary(max_size=60), max_size=4))
def test_whatever_comes_can_be_read_and_shown(frames: list[bytes]) -> None:
    wire.read(frames, ANY)
    assert len(wire.describe(frames)) < 2000


def test_long_values_are_cut() -> None:
    frames = frames_of("PING/1", [1, {f"counter-{number}": number for number in range(200)}, []])
    assert len(wire.describe(frames)) < 400
    assert wire.describe([]) == "(no frames)"
    assert "…" in wire.shown("x" * 100)
    assert wire.shown(b"\0" * 100) == f"h'{'00' * 20}…'"
    assert wire.shown([True, None, 7]) == "[true, nil, 7]"
