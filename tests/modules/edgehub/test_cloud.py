"""What CloudHub speaks, against the recorded traffic; nothing that goes up is of the kind it cuts links for."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudsim.wire import Undecodable, decode, decode_as_go
from modules.edgehub import cloud
from modules.edgehub.config import EdgeHubConfig, Endpoint
from modules.edgehub.dialect import CURRENT, TREE_2019
from runtime.emp import Priority
from runtime.errors import InvalidMessage
from runtime.message import Message, from_cloud_json

VECTORS = Path(__file__).parents[2] / "vectors" / "cloudlink"
CONFIG = EdgeHubConfig(node_name="edge-a", endpoints=(Endpoint("127.0.0.1", 11000),))
DEPTH = 512


def recorded(name: str) -> list[dict[str, Any]]:
    vectors: list[dict[str, Any]] = json.loads((VECTORS / name).read_text())["vectors"]
    return vectors


def json_message(content: bytes) -> Message:
    return Message(id="m", timestamp=5, source="bus", group="user", resource="r", operation="upload", content=content)


def test_url_and_headers_are_the_recorded_ones() -> None:
    (request, _) = recorded("ws_handshake.json")
    lines = request["raw_text"].split("\r\n")
    assert lines[0] == f"GET {cloud.path(CONFIG)} HTTP/1.1"
    assert cloud.url(CONFIG, Endpoint("127.0.0.1", 11000)) == f"wss://127.0.0.1:11000{cloud.path(CONFIG)}"
    theirs = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
    for name, value in cloud.headers(CONFIG):
        assert theirs[name.lower()] == value


def test_an_ipv6_endpoint_has_brackets_in_the_url() -> None:
    assert cloud.url(CONFIG, Endpoint("::1", 10000)).startswith("wss://[::1]:10000/")


def test_the_keepalive_is_the_recorded_one() -> None:
    (vector,) = [v for v in recorded("ws_session.json") if v["name"] == "keepalive.up.1"]
    ours = json.loads(cloud.encode_up(cloud.keepalive(), DEPTH))
    assert ours["route"] == vector["decoded"]["route"]
    assert ours["content"] == vector["decoded"]["content"]
    assert set(ours["header"]) == set(vector["decoded"]["header"])


def test_the_greeting_is_a_query_of_the_cluster_ca() -> None:
    greeting = json.loads(cloud.encode_up(cloud.greeting(), DEPTH))
    assert greeting["route"] | {"source": ""} == {
        "source": "",
        "group": "meta",
        "operation": "query",
        "resource": "k8s/ca.crt",
    }
    assert greeting["content"] is None


def test_the_connection_event_is_kubeedges() -> None:
    event = cloud.connection_event(CURRENT, "twin", is_connected=False)
    assert (event.source, event.group, event.resource, event.operation, event.text()) == (
        "edgehub",
        "twin",
        "node/connection",
        "connect",
        "cloud_disconnected",
    )
    assert cloud.connection_event(CURRENT, "bus", is_connected=True).text() == "cloud_connected"
    assert cloud.connection_event(TREE_2019, "bus", is_connected=True).operation == "publish"


@pytest.mark.parametrize("vector", recorded("ws_session.json"), ids=lambda v: v["name"])
def test_recorded_messages_survive_the_way_in_and_out(vector: dict[str, Any]) -> None:
    message = from_cloud_json(vector["text"])
    assert json.loads(cloud.encode_up(message, DEPTH)) == json.loads(vector["text"])


@pytest.mark.parametrize("vector", recorded("message_json.json"), ids=lambda v: v["name"])
def test_every_message_form_survives_the_way_in_and_out(vector: dict[str, Any]) -> None:
    theirs = json.loads(vector["raw_text"])
    theirs["header"].pop("sync", None)  # cleared by every sender
    assert json.loads(cloud.encode_up(from_cloud_json(vector["raw_text"]), DEPTH)) == theirs


def test_our_ack_is_the_recorded_one() -> None:
    session = [v["decoded"] for v in recorded("ws_session.json")]
    acks = [m for m in session if m["route"].get("operation") == "response" and m["content"] == "OK"]
    asked = {m["header"]["msg_id"]: m for m in session}
    checked = 0
    for ack in acks:
        request = asked.get(ack["header"].get("parent_msg_id", ""))
        if request is None or request["route"]["source"] == "edged":
            continue
        ours = json.loads(cloud.encode_up(cloud.ack(from_cloud_json(json.dumps(request))), DEPTH))
        assert ours["route"] == ack["route"]
        assert ours["header"]["parent_msg_id"] == ack["header"]["parent_msg_id"]
        assert ours["content"] == "OK"
        checked += 1
    assert checked


@pytest.mark.parametrize(
    ("group", "operation", "wanted"),
    [
        ("resource", "insert", True),
        ("resource", "update", True),
        ("resource", "delete", True),
        ("resource", "patch", True),
        ("resource", "response", True),
        ("resource", "applicationResponse", False),
        ("resource", "query", False),
        ("user", "publish", False),
        ("twin", "update", False),
        ("taskmanager", "upgrade", False),
    ],
)
def test_objects_and_answers_are_acknowledged_and_nothing_else(group: str, operation: str, wanted: bool) -> None:
    assert cloud.wants_ack(Message(id="m", group=group, operation=operation)) is wanted
    assert not cloud.wants_ack(Message(id="", group=group, operation=operation)), "without an id there is no ACK"


@pytest.mark.parametrize(
    ("message", "priority", "signal"),
    [
        (Message(group="user", operation="upload", source="bus"), Priority.DATA, False),
        (Message(group="user", operation="response", source="bus"), Priority.DATA, False),
        (Message(group="user", operation="upload", source="bus"), Priority.SIGNAL, True),
        (Message(group="resource", operation="response"), Priority.DATA, True),
        (Message(group="resource", operation="error"), Priority.DATA, True),
        (Message(group="resource", operation="keepalive"), Priority.DATA, True),
        (Message(group="resource", operation="update", source="twin"), Priority.DATA, True),
        (Message(group="meta", operation="update", source="edged", resource="default/lease/n"), Priority.DATA, True),
        (Message(group="meta", operation="patch", source="edged", resource="default/nodepatch/n"), Priority.DATA, True),
        (Message(group="meta", operation="update", source="metamanager", resource="ns/node/n"), Priority.DATA, True),
        (Message(group="meta", operation="insert", source="edged", resource="default/event/e"), Priority.DATA, False),
        (Message(group="meta", operation="update", source="edged", resource="lease"), Priority.DATA, False),
    ],
)
def test_which_messages_go_before_uploads(message: Message, priority: int, signal: bool) -> None:
    assert cloud.is_signal(message, priority) is signal


def test_the_connection_layers_ack_proves_no_session_and_all_else_does() -> None:
    for vector in recorded("ws_anomalies.json"):
        if vector["name"].startswith("control_op_"):
            reply = vector["decoded"]["hub_reaction"][0].partition(" {")
            assert not cloud.proves_session(from_cloud_json("{" + reply[2]))
    for vector in recorded("ws_session.json"):
        if vector["direction"] == "cloud->edge":
            assert cloud.proves_session(from_cloud_json(vector["text"]))


CUTS_THE_LINK = [
    b"",
    b"hello",
    b'{"a":',
    b"[1,]",
    b"{'a':1}",
    b"NaN",
    b"[Infinity]",
    b'{"a":-Infinity}',
    b"01",
    b"1.",
    b".5",
    b"+1",
    b"1e400",
    b"[-1e999]",
    b"9" * 310,
    b"[" + b"1" + b"0" * 309 + b"]",
    b'{"x":"' + b"1" * 400 + b'","y":' + b"7" * 400 + b"}",
    b'"a\x01b"',
    b'"\t"',
    b'"\\x41"',
    b'"unfinished',
    b"1 2",
    b"[1]x",
    b"[" * 513 + b"]" * 513,
    b"[" * 20000 + b"]" * 20000,
]


@pytest.mark.parametrize("content", CUTS_THE_LINK, ids=lambda c: c[:24].decode("latin1"))
def test_what_cloudhub_cannot_read_is_refused(content: bytes) -> None:
    with pytest.raises(InvalidMessage):
        cloud.encode_up(json_message(content), DEPTH)


@pytest.mark.parametrize("content", [b'"\xff"', b'"\\ud800"', b"\xef\xbb\xbf1", b'"\xed\xa0\x80"'])
def test_text_that_go_would_change_in_silence_is_refused_too(content: bytes) -> None:
    with pytest.raises(InvalidMessage):
        cloud.encode_up(json_message(content), DEPTH)


@pytest.mark.parametrize(
    "content",
    [
        b"null",
        b" {} ",
        b"[1.7976931348623157e308]",
        b"9" * 308,
        b"123456789012345678901234567890",
        b"1e-999",
        b'{"a":1,"a":2}',
        b'"\\u0000\\ud83d\\ude00"',
        b"[" * 512 + b"]" * 512,
        b"[" + b",".join([b'{"a":[1]}'] * 2000) + b"]",
        b'"' + b"[" * 5000 + b'\\"{"',
    ],
    ids=lambda c: c[:24].decode("latin1"),
)
def test_what_cloudhub_can_read_goes_up_as_it_is(content: bytes) -> None:
    text = cloud.encode_up(json_message(content), DEPTH)
    assert b'"content":' + content + b"}" in text
    decode(text)


def test_text_that_is_not_utf8_and_wild_timestamps_are_refused() -> None:
    with pytest.raises(InvalidMessage, match="UTF-8"):
        cloud.encode_up(Message(id="m", kind="text", content=b"\xff"), DEPTH)
    with pytest.raises(InvalidMessage, match="64 bits"):
        cloud.encode_up(Message(id="m", timestamp=2**63), DEPTH)


def test_bytes_go_up_as_base64() -> None:
    text = cloud.encode_up(Message(id="m", kind="bytes", content=b"\x00\x01\xfe\xff"), DEPTH)
    assert json.loads(text)["content"] == "AAH+/w=="


@given(st.binary(max_size=60) | st.text(max_size=40).map(str.encode))
def test_any_bytes_that_say_json_are_refused_or_readable(content: bytes) -> None:
    try:
        text = cloud.encode_up(json_message(content), DEPTH)
    except InvalidMessage:
        return
    try:
        decode_as_go(text)
    except Undecodable as fault:
        raise AssertionError(f"CloudHub would cut the link on {content!r}") from fault


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=20,
    )
)
def test_any_value_is_refused_or_readable(value: Any) -> None:
    content = json.dumps(value).encode()
    try:
        text = cloud.encode_up(json_message(content), DEPTH)
    except InvalidMessage:
        return
    assert not any(word in content for word in (b"NaN", b"Infinity")) or b'"' in content
    decode_as_go(text)


@given(st.text(max_size=30), st.text(max_size=30), st.binary(max_size=30))
def test_any_names_and_contents_are_readable(resource: str, operation: str, content: bytes) -> None:
    for kind in ("text", "bytes"):
        message = Message(id="m", resource=resource, operation=operation, kind=kind, content=content)
        try:
            text = cloud.encode_up(message, DEPTH)
        except InvalidMessage:
            continue
        decoded = decode_as_go(text)
        assert (decoded.route.resource, decoded.route.operation) == (resource, operation)


@pytest.mark.parametrize(
    ("content", "deepest"),
    [(b"1", 0), (b"[]", 1), (b'{"a":[1,[2]],"b":{}}', 3), (b'"[[["', 0), (b'["\\"[",[]]', 2)],
)
def test_depth_counts_brackets_outside_strings(content: bytes, deepest: int) -> None:
    assert cloud.depth(content) == deepest


def dropped_by_the_hub() -> list[bytes]:
    """The text payloads on which the genuine hub cut the connection."""
    payloads = []
    for vector in recorded("ws_anomalies.json"):
        reaction = vector["decoded"]["hub_reaction"]
        if reaction and reaction[0].startswith("TCP EOF") and vector["sent_payloads"][0][0] == "text":
            payloads.append(vector["sent_payloads"][0][2].encode())
    return payloads


def test_nothing_we_send_is_in_the_class_that_the_hub_cuts_links_for() -> None:
    assert len(dropped_by_the_hub()) >= 8
    for payload in dropped_by_the_hub():
        with pytest.raises(Undecodable):
            decode_as_go(payload)  # the double knows the class …
        try:
            content = payload.partition(b'"content":')[2].removesuffix(b"}") or payload
            text = cloud.encode_up(json_message(content), DEPTH)
        except InvalidMessage:
            continue
        decode_as_go(text)  # … and what we make of such content is not in it


# --- content over QUIC -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b'{"a": 1}', "json"),
        (b" [1]", "text"),
        (b"[1]", "json"),
        (b"[1", "text"),
        (b"42", "text"),
        (b"[" * 100_000, "text"),
        ("grün".encode(), "text"),
        (b'{"a": "\xff"}', "bytes"),
        (b"\x00\xff", "bytes"),
    ],
)
def test_content_that_came_as_bytes_gets_the_kind_that_it_has_over_the_websocket(content: bytes, kind: str) -> None:
    message = cloud.with_kind(Message(id="m", kind="bytes", content=content))
    assert (message.kind, message.content, message.id) == (kind, content, "m")


@given(st.binary(max_size=200))
def test_any_content_gets_a_kind_that_holds_it(content: bytes) -> None:
    message = cloud.with_kind(Message(kind="bytes", content=content))
    assert message.content == content
    if message.kind == "json":
        json.loads(content)
    elif message.kind == "text":
        content.decode()


@pytest.mark.parametrize(
    "message", [Message(kind="text", content=b"\xff"), Message(timestamp=2**63), Message(content=b"{")]
)
def test_what_cannot_be_read_is_refused_in_either_form(message: Message) -> None:
    with pytest.raises(InvalidMessage):
        cloud.check_up(message, DEPTH)
