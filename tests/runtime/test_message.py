"""Messages: the golden vectors of a real CloudHub, the three kinds of content, batches, ids."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.errors import InvalidMessage, MalformedMessage, UsageError
from runtime.message import (
    BYTES,
    JSON,
    TEXT,
    Message,
    decode_batch,
    encode_message,
    from_cloud_json,
    join_batch,
    new_id,
    split_batch,
    to_cloud_json,
)

VECTORS = Path(__file__).parent.parent / "vectors" / "cloudlink"


def golden() -> list[tuple[str, str]]:
    found = []
    for file, key in (("message_json", "raw_text"), ("ws_session", "text")):
        for vector in json.loads((VECTORS / f"{file}.json").read_text())["vectors"]:
            if vector.get(key):
                found.append((vector["name"], vector[key]))
    assert len(found) > 40
    return found


GOLDEN = golden()


@pytest.mark.parametrize("text", [text for _, text in GOLDEN], ids=[name for name, _ in GOLDEN])
def test_a_golden_message_survives_both_ways(text: str) -> None:
    message = from_cloud_json(text.encode())
    expected = json.loads(text)
    header, route = expected["header"], expected["route"]
    assert (message.id, message.timestamp) == (header["msg_id"], header["timestamp"])
    assert message.parent_id == header.get("parent_msg_id", "")
    assert message.resource_version == header.get("resourceversion", "")
    assert message.type == header.get("type", "")
    assert (message.source, message.group) == (route.get("source", ""), route.get("group", ""))
    assert (message.operation, message.resource) == (route.get("operation", ""), route.get("resource", ""))
    assert message.destination == route.get("destination", "")
    if isinstance(expected["content"], str):
        assert (message.kind, message.content.decode()) == (TEXT, expected["content"])
    else:
        assert message.kind == JSON
        assert message.json() == expected["content"]
    expected["header"].pop("sync", None)  # never true on the cloud's wire
    sent = to_cloud_json(message)
    assert json.loads(sent) == expected
    assert sent.endswith(b"\n")
    (again,) = decode_batch(join_batch([encode_message(message)]))
    assert again == message


def test_json_content_is_never_rewritten_on_the_way() -> None:
    content = b'{"z": 9007199254740993, "a":1.50, "e": 1E400, "dup": 1,  "dup": 2, "u": "\\u00e9"}'
    text = b'{"header":{"msg_id":"a","timestamp":1},"route":{},"content":' + content + b"}"
    message = from_cloud_json(text)
    assert message.content == content
    (message,) = decode_batch(join_batch([encode_message(message)]))
    assert content in to_cloud_json(message)


def shown(value: object) -> str:
    """For a test's name, which is the same in every process."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


@pytest.mark.parametrize(
    ("content", "kind", "data"),
    [
        (None, JSON, b"null"),
        ({"a": 1}, JSON, b'{"a":1}'),
        (2**60 + 1, JSON, b"1152921504606846977"),
        ([1.5, True, None], JSON, b"[1.5,true,null]"),
        ("text é 😀", TEXT, "text é 😀".encode()),
        ("", TEXT, b""),
        (b"", BYTES, b""),
        (b"\x00\xff", BYTES, b"\x00\xff"),
        (bytearray(b"x"), BYTES, b"x"),
        (memoryview(b"x"), BYTES, b"x"),
    ],
    ids=shown,
)
def test_python_values_become_content(content: Any, kind: str, data: bytes) -> None:
    message = Message.build(content=content)
    assert (message.kind, message.content) == (kind, data)


@pytest.mark.parametrize(
    "content",
    [
        float("nan"),
        {"a": [1, float("inf")]},
        {"a": None, "b": {"c": -float("inf")}},
        (None, float("nan")),
        object(),
        {"a": object()},
        {1j: 1},
        "lone surrogate \ud800",
        {"lone": "\udfff"},
    ],
    ids=shown,
)
def test_what_json_cannot_hold_is_refused(content: Any) -> None:
    with pytest.raises(InvalidMessage):
        Message.build(content=content)


def test_a_list_that_holds_itself_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(InvalidMessage):
        Message.build(content=loop)


def test_an_mqtt_payload_of_any_bytes_survives() -> None:
    for payload in (b"", b"\xff\xfe not UTF-8 \x00", os.urandom(64), b"x" * (8 * 2**20)):
        message = Message.build(content=payload)
        (again,) = decode_batch(join_batch([encode_message(message)]))
        assert again.content == payload
        assert again.kind == BYTES


@pytest.mark.parametrize("content", ['"\\ud800 alone"', '{"a":"\\udfff"}'])
def test_a_lone_surrogate_is_refused(content: str) -> None:
    """No Go program writes one: encoding/json replaces it by U+FFFD."""
    with pytest.raises(MalformedMessage):
        from_cloud_json('{"header":{},"route":{},"content":' + content + "}")


def test_text_that_is_not_utf8_is_refused_before_it_goes_up() -> None:
    with pytest.raises(InvalidMessage, match="not UTF-8"):
        to_cloud_json(Message(kind=TEXT, content=b"\xff"))


def test_content_is_decoded_on_demand_or_refused() -> None:
    assert Message(kind=TEXT, content=b'{"a":1}').json() == {"a": 1}
    assert Message(kind=JSON, content=b'{"a":1}').text() == '{"a":1}'
    with pytest.raises(MalformedMessage, match="no JSON"):
        Message(kind=BYTES, content=b"\xff").json()
    with pytest.raises(MalformedMessage, match="no JSON"):
        Message(kind=JSON, content=b"[" * 100_000).json()
    with pytest.raises(MalformedMessage, match="not UTF-8"):
        Message(kind=BYTES, content=b"\xff").text()


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"\xff",
        b'"text"',
        b'{"header":1}',
        b'{"header":{"timestamp":"1"}}',
        b'{"route":{"source":1}}',
        b'{"content":NaN}',
        b'{"content":1}x',
        b'{"content":' + b"[" * 100_000,
    ],
    ids=lambda text: text[:30].decode(errors="replace"),
)
def test_what_is_no_message_is_refused(text: bytes) -> None:
    with pytest.raises(MalformedMessage):
        from_cloud_json(text)


def test_missing_fields_are_empty_and_unknown_ones_ignored() -> None:
    message = from_cloud_json(b'{"more":1,"header":{"msg_id":"a","x":2}}')
    assert message == Message(id="a")
    assert message.content == b"null"


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_decoders_of_messages_are_total(data: bytes) -> None:
    for decode in (decode_batch, from_cloud_json):
        try:
            decode(data)
        except MalformedMessage:
            pass
    split_batch(data, 0)


@pytest.mark.parametrize(
    "body",
    [
        b"\xdd\xff\xff\xff\xff",
        b"\x91\xdd\xff\xff\xff\xff",
        b"\x91\x91\xdb\xff\xff\xff\xff",
        b"\x91\x9b" + b"\xa0" * 2 + b"\xc6\xff\xff\xff\xff",
        b"\x91" * 100_000,
        b"\xc1",
        b"",
        b"\x90\x90",
        b"\x91\x91\xa1\xff",
        b"\x91" + msgpack.packb(["id", "", 0, False, "", "", "", "", "", "unknown kind", b""]),
        b"\x91" + msgpack.packb(["id", "", 0, False, "", "", "", "", "", "json", "no bytes"]),
    ],
    ids=lambda body: body[:10].hex(),
)
def test_hostile_batches_are_refused(body: bytes) -> None:
    with pytest.raises(MalformedMessage):
        decode_batch(body)


@pytest.mark.parametrize("count", [0, 1, 15, 16, 1024, 70_000])
def test_a_batch_of_any_count_joins_and_decodes(count: int) -> None:
    encoded = [encode_message(Message(id=str(number))) for number in range(count)]
    assert [message.id for message in decode_batch(join_batch(encoded))] == [str(number) for number in range(count)]


def test_split_batch_copies_one_message_as_it_stands() -> None:
    strange = b"\xc7\x01\x05x"  # an extension type that no message has
    body = join_batch([encode_message(Message(id="first")), strange, encode_message(Message(id="last"))])
    assert decode_batch(split_batch(body, 0) or b"") == [Message(id="first")]
    assert split_batch(body, 1) == b"\x91" + strange
    assert decode_batch(split_batch(body, 2) or b"") == [Message(id="last")]


def test_split_batch_of_large_messages() -> None:
    body = join_batch([encode_message(Message(id=name, content=b"x" * 3_000_000)) for name in ("a", "b")])
    assert [message.id for message in decode_batch(split_batch(body, 1) or b"")] == ["b"]


@pytest.mark.parametrize(
    ("body", "index"),
    [
        (b"\x91\x90", 1),
        (b"\x91\x90", -1),
        (b"\x90", 0),
        (b"", 0),
        (b"\xc1", 0),
        (b"\x92\x90", 1),
        (b"\x01", 0),
        (b"\xdd\xff\xff\xff\xff\x90", 1),
        (b"\x91" * 10_000, 0),
    ],
    ids=repr,
)
def test_split_batch_of_no_such_message_is_none(body: bytes, index: int) -> None:
    assert split_batch(body, index) is None


def test_ids_look_like_uuids_and_never_repeat() -> None:
    ids = [new_id() for _ in range(1000)]
    assert len(set(ids)) == 1000
    for each in ids[:10]:
        parts = each.split("-")
        assert [len(part) for part in parts] == [8, 4, 4, 4, 12]
        assert parts[2][0] == "4"
        assert parts[3][0] in "89ab"


def test_a_forked_child_gives_other_ids() -> None:
    ours = new_id()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, new_id().encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        theirs = pipe.read()
    os.waitpid(child, 0)
    assert len(theirs) == len(ours)
    assert theirs[:24] != ours[:24]


def test_a_reply_copies_the_route_as_kubeedge_does() -> None:
    request = Message(id="q", source="edgecontroller", group="resource", resource="r", operation="query", type="t")
    reply = request.response({"a": 1})
    assert (reply.parent_id, reply.source, reply.group, reply.resource, reply.operation, reply.type) == (
        "q",
        "edgecontroller",
        "resource",
        "r",
        "response",
        "t",
    )
    assert reply.id not in ("", "q")
    error = request.error("boom", source="metamanager")
    assert (error.operation, error.source, error.text(), error.parent_id) == ("error", "metamanager", "boom", "q")


def test_delivery_and_defer_are_there_only_inside_a_handler() -> None:
    message = Message.build()
    with pytest.raises(UsageError):
        _ = message.delivery
    with pytest.raises(UsageError):
        message.defer()
