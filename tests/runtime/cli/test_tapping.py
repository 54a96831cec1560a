"""`edgezmq tap` and `send`: what is shown of a message, and what is made of an argument."""

import json
from typing import Any

import pytest

from runtime.cli.sending import parse_destination, read_content
from runtime.cli.tapping import as_line, as_object, content_text, matches, message_object, messages_of
from runtime.errors import InvalidName
from runtime.message import Message, encode_message, join_batch
from runtime.names import Group


def message(content: Any = None, **more: Any) -> Message:
    return Message.build(
        **{"source": "s", "group": "user", "resource": "a/b", "operation": "upload", **more}, content=content
    )


def answer(*messages: Message, **more: Any) -> dict[str, Any]:
    body = join_batch([encode_message(each) for each in messages]) if messages else b""
    return {
        "sender": "cam",
        "destination": "@hub",
        "priority": 3,
        "first": 5,
        "count": len(messages),
        "body": body,
        "body_bytes": len(body),
        "dropped": 0,
        **more,
    }


def test_each_message_of_a_batch_has_its_lane_number() -> None:
    first, second = message(1), message(2)
    assert list(messages_of(answer(first, second))) == [(first, 5), (second, 6)]


@pytest.mark.parametrize("body", [b"", b"\xc1", b"\x91\x01"])
def test_a_body_that_is_left_out_or_strange_is_shown_as_its_header(body: bytes) -> None:
    shown = answer(body=body, count=9, body_bytes=2_000_000)
    assert list(messages_of(shown)) == [(None, 5)]
    assert as_line(shown, None, 5, 0).endswith("cam > @hub data #5 (9 messages, 2000000 bytes)")


def test_a_line_has_route_group_operation_resource_and_content() -> None:
    line = as_line(answer(), message({"t": 21}), 5, 100)
    assert line.partition(" ")[2] == 'cam > @hub data #5 user upload a/b {"t":21}'


def test_long_content_is_cut_and_its_size_told() -> None:
    assert content_text(message("x" * 500), 10) == "x" * 10 + "… (500 bytes)"


def test_content_cannot_move_the_cursor() -> None:
    assert content_text(message("a\x1b[2J\nb"), 0) == "a\\x1b[2J\\x0ab"


def test_bytes_are_shown_in_base64() -> None:
    assert content_text(message(b"\xff\x00"), 0) == "(2 bytes) /wA="
    assert message_object(message(b"\xff\x00")) | {"id": "", "timestamp": 0} == {
        "id": "",
        "parent_id": "",
        "timestamp": 0,
        "source": "s",
        "group": "user",
        "resource": "a/b",
        "operation": "upload",
        "kind": "bytes",
        "content": "/wA=",
    }


def test_a_json_line_holds_the_content_as_json() -> None:
    record = json.loads(as_object(answer(), message({"t": [1, None]}), 6))
    assert (record["content"], record["number"], record["priority"]) == ({"t": [1, None]}, 6, "data")


def test_filters_are_patterns_for_resources_and_whole_words_for_operations() -> None:
    one = message(resource="default/cam/1", operation="upload")
    assert matches(one, "", "")
    assert matches(one, "default/*", "upload")
    assert not matches(one, "default", "")
    assert not matches(one, "", "up")
    assert matches(None, "", "")
    assert not matches(None, "*", "")


def test_a_destination_is_a_module_a_group_or_the_cloud() -> None:
    assert parse_destination("edgehub") == "edgehub"
    assert parse_destination("@twin") == Group("twin")
    assert parse_destination("cloud") == Group("hub")
    with pytest.raises(InvalidName):
        parse_destination("a b")


@pytest.mark.parametrize(
    ("text", "kind", "data"),
    [
        ('{"n": 12345678901234567890123}', "json", b'{"n": 12345678901234567890123}'),
        ("1.10", "json", b"1.10"),
        ("21 degrees", "text", b"21 degrees"),
        ('"quoted"', "text", b"quoted"),
        ("", "text", b""),
        ("NaN", "text", b"NaN"),
    ],
)
def test_content_is_json_as_it_was_written_else_text(text: str, kind: str, data: bytes) -> None:
    built = message(read_content(text, None))
    assert (built.kind, built.content) == (kind, data)
