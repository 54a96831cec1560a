"""viaduct's framing: the golden vectors both ways, every cut of a stream, hostile bytes."""

from __future__ import annotations

import base64
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime import viaduct
from runtime.errors import InvalidMessage, MalformedMessage
from runtime.message import BYTES, JSON, TEXT, Message, content_as_json
from runtime.viaduct import MissingPart, OtherUse, Oversized, PackageReader, ViaductFault

VECTORS = Path(__file__).parent.parent / "vectors" / "cloudlink"


def vectors(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((VECTORS / f"{name}.json").read_text())["vectors"]
    return found


def named(prefix: str) -> list[Any]:
    return [
        pytest.param(vector, id=vector["name"])
        for vector in vectors("quic_framing")
        if vector["name"].startswith(prefix)
    ]


def message_of(cloud: dict[str, Any], content_type: str) -> Message:
    """A vector's input as the value that goes into the encoder."""
    header, route, content = cloud["header"], cloud["route"], cloud["content"]
    if content_type == "[]uint8":
        kind, data = BYTES, base64.b64decode(content)
    elif content_type == "string":
        kind, data = TEXT, content.encode()
    else:
        kind, data = JSON, json.dumps(content, separators=(",", ":")).encode()
    return Message(
        id=header["msg_id"],
        parent_id=header.get("parent_msg_id", ""),
        timestamp=header["timestamp"],
        sync=header.get("sync", False),
        resource_version=header.get("resourceversion", ""),
        type=header.get("type", ""),
        source=route.get("source", ""),
        destination=route.get("destination", ""),
        group=route.get("group", ""),
        operation=route.get("operation", ""),
        resource=route.get("resource", ""),
        kind=kind,  # type: ignore[arg-type]
        content=data.replace(b"1e+21", b"1e21"),
    )


def cloud_form(message: Message) -> dict[str, Any]:
    """A decoded message as the vectors tell it."""
    header: dict[str, Any] = {"msg_id": message.id, "timestamp": message.timestamp}
    if message.parent_id:
        header["parent_msg_id"] = message.parent_id
    if message.sync:
        header["sync"] = True
    parts = {
        "source": message.source,
        "group": message.group,
        "operation": message.operation,
        "resource": message.resource,
    }
    return {
        "header": header,
        "route": {name: value for name, value in parts.items() if value},
        "content": json.loads(content_as_json(message)),
    }


# --- the golden vectors ----------------------------------------------------------------------------


@pytest.mark.parametrize("vector", named("package_header_len"))
def test_a_package_header_is_that_of_the_vector(vector: dict[str, Any]) -> None:
    raw, size = bytes.fromhex(vector["raw_hex"]), vector["decoded"]["payload_len"]
    assert viaduct.package_header(size) == raw
    (whole,) = PackageReader().receive(raw + bytes(size))
    assert whole == bytes(size)


@pytest.mark.parametrize(
    "vector", [each for each in named("package_") if not each.values[0]["name"].startswith("package_header_len")]
)
def test_a_package_is_that_of_the_vector(vector: dict[str, Any]) -> None:
    raw, payload, decoded = bytes.fromhex(vector["raw_hex"]), bytes.fromhex(vector["protobuf_hex"]), vector["decoded"]
    message = message_of(decoded["input_as_json"], decoded["input_content_go_type"])
    if b"1e+21" in payload:
        message = Message(**{**fields(message), "content": b"[1,2.5,1e+21,true,null]"})
    assert viaduct.encode_message(message) == payload
    assert viaduct.packages([payload]) == raw
    (whole,) = PackageReader().receive(raw)
    assert whole == payload
    assert cloud_form(viaduct.decode_message(payload)) == decoded["message_after_the_trip"]


def fields(message: Message) -> dict[str, Any]:
    return {name: getattr(message, name) for name in Message.__struct_fields__}


@pytest.mark.parametrize("vector", named("reader_case"))
def test_the_reader_does_as_in_the_vector(vector: dict[str, Any]) -> None:
    raw, decoded = bytes.fromhex(vector["raw_hex"]), vector["decoded"]
    reader = PackageReader()
    if "exceeds" in decoded["error"]:
        with pytest.raises(ViaductFault, match=decoded["error"]):
            reader.receive(raw)
    elif decoded["error"]:
        assert reader.receive(raw) == []
        assert not reader.is_between_packages  # an end of the stream here is unexpected
    else:
        assert reader.receive(raw) == [bytes.fromhex(decoded["payload_hex"])]
        assert reader.is_between_packages


@pytest.mark.parametrize("vector", named("protobuf_decode_case"))
def test_protobuf_decodes_as_in_the_vector(vector: dict[str, Any]) -> None:
    raw, decoded = bytes.fromhex(vector["raw_hex"]), vector["decoded"]
    if "panic" in decoded:
        with pytest.raises(MissingPart):
            viaduct.decode_message(raw)
    elif "err" in decoded:
        with pytest.raises(MalformedMessage):
            viaduct.decode_message(raw)
    else:
        assert cloud_form(viaduct.decode_message(raw)) == decoded["msg"]


def test_the_writers_limit_is_that_of_the_vectors() -> None:
    text = json.loads((VECTORS / "quic_framing.json").read_text())["write_over_max_error"]
    with pytest.raises(InvalidMessage, match=text):
        viaduct.package_header(viaduct.MAX_PAYLOAD_BYTES + 1)


def streams() -> list[Any]:
    """Both directions of each stream of the live sessions: (the bytes, whether they start with a use type)."""
    found: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for vector in vectors("quic_live_sessions"):
        if vector["transport"] == "quic stream" and vector["raw_hex"]:
            key = (vector["name"].split("_")[0], vector["stream_id"], vector["direction"])
            found.setdefault(key, []).append(vector)
    return [pytest.param(each, id=f"{session}-{stream}-{way}") for (session, stream, way), each in found.items()]


@pytest.mark.parametrize("writes", streams())
@pytest.mark.parametrize("step", [1, 7, 1200, 1 << 20])
def test_a_live_stream_of_the_vectors_reads_and_writes_back(writes: list[dict[str, Any]], step: int) -> None:
    raw = b"".join(map(complete, writes))
    has_use_type = writes[0]["decoded"] == "use type prefix"
    payloads = [complete(each) for each in writes if each["decoded"] == "protobuf payload"]
    reader = PackageReader(has_use_type=has_use_type)
    read = [whole for at in range(0, len(raw), step) for whole in reader.receive(raw[at : at + step])]
    assert read == payloads
    assert reader.is_between_packages
    messages = [viaduct.decode_message(payload) for payload in payloads]
    assert [viaduct.encode_message(message) for message in messages] == payloads
    prefix = viaduct.MESSAGES if has_use_type else b""
    assert prefix + viaduct.packages(map(viaduct.encode_message, messages)) == raw


def complete(vector: dict[str, Any]) -> bytes:
    start, cut, _ = vector["raw_hex"].partition("...")
    raw = bytes.fromhex(start)
    if cut:  # of the large one the vector has the start and the length, which leave room for just this
        whole = Message(
            id=raw[4:40].decode(),
            timestamp=1795453214402,
            source="eventbus",
            group="user",
            operation="upload",
            resource="big",
            kind=TEXT,
            content=b"x" * 2**20,
        )
        assert viaduct.encode_message(whole).startswith(raw)
        raw = viaduct.encode_message(whole)
    assert len(raw) == vector["length"]
    return raw


def test_the_header_message_is_that_of_the_vectors() -> None:
    payload = next(bytes.fromhex(each["raw_hex"]) for each in vectors("quic_live_sessions") if each["name"] == "q1_1")
    recorded = viaduct.decode_message(payload)
    ours = viaduct.header_message(
        [("node_id", "edge-f"), ("project_id", "e632aba927ea4ac2b575ec1603d56f10")],
    )
    assert ours.content == recorded.content
    assert (ours.source, ours.group, ours.operation, ours.resource) == ("", "", "header", "header")
    assert (recorded.source, recorded.group, recorded.operation, recorded.resource) == ("", "", "header", "header")
    assert viaduct.headers_of(recorded) == {
        "Node_id": ["edge-f"],
        "Project_id": ["e632aba927ea4ac2b575ec1603d56f10"],
    }


# --- any message, any cut --------------------------------------------------------------------------

texts = st.text(max_size=40)
messages = st.builds(
    Message,
    id=texts,
    parent_id=texts,
    timestamp=st.integers(-(2**63), 2**63 - 1),
    sync=st.booleans(),
    source=texts,
    group=texts,
    resource=texts,
    operation=texts,
    kind=st.just(BYTES),
    content=st.binary(min_size=1, max_size=200),
)


@given(messages)
def test_what_was_encoded_decodes_to_the_same(message: Message) -> None:
    assert viaduct.decode_message(viaduct.encode_message(message)) == message


@given(st.lists(st.binary(max_size=300), max_size=20), st.data())
def test_packages_are_found_however_they_are_cut(payloads: list[bytes], data: st.DataObject) -> None:
    raw = viaduct.MESSAGES + viaduct.packages(payloads)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=30)))
    reader = PackageReader(has_use_type=True)
    read = []
    for start, stop in zip([0, *cuts], [*cuts, len(raw)], strict=True):
        read += reader.receive(raw[start:stop])
    assert read == payloads
    assert reader.is_between_packages


@given(st.binary(max_size=400))
def test_any_bytes_are_packages_or_a_fault(raw: bytes) -> None:
    try:
        PackageReader().receive(raw)
    except ViaductFault:
        pass


@given(st.binary(max_size=400))
def test_any_payload_is_a_message_or_malformed(raw: bytes) -> None:
    try:
        message = viaduct.decode_message(raw)
    except MalformedMessage:
        return
    assert viaduct.decode_message(viaduct.encode_message(message)) == Message(**{**fields(message), "type": ""})


# --- limits ----------------------------------------------------------------------------------------


def test_a_payload_over_the_limit_is_passed_over_while_it_streams() -> None:
    raw = viaduct.packages([b"a" * 10, b"b" * 500_000, b"c" * 100])
    reader = PackageReader(max_payload_bytes=100)
    read: list[viaduct.Package] = []
    tracemalloc.start()
    try:
        for at in range(0, len(raw), 1000):
            read += reader.receive(raw[at : at + 1000])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert read == [b"a" * 10, Oversized(500_000), b"c" * 100]
    assert peak < 50_000


def test_a_claimed_length_allocates_nothing() -> None:
    reader = PackageReader()
    tracemalloc.start()
    try:
        assert reader.receive(viaduct.package_header(viaduct.MAX_PAYLOAD_BYTES) + b"x") == []
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10_000


def test_a_fault_brings_what_was_read_before_it() -> None:
    with pytest.raises(ViaductFault) as caught:
        PackageReader().receive(viaduct.packages([b"first"]) + b"\xff" * 10)
    assert caught.value.packages == [b"first"]


@pytest.mark.parametrize("start", [b"str", b"m3g", b"x"])
def test_another_use_type_is_told_apart(start: bytes) -> None:
    with pytest.raises(OtherUse, match="use type"):
        PackageReader(has_use_type=True).receive(start)


def test_the_use_is_known_after_three_bytes() -> None:
    reader = PackageReader(has_use_type=True)
    for at in range(3):
        assert not reader.is_use_known
        assert reader.receive(viaduct.MESSAGES[at : at + 1]) == []
    assert reader.is_use_known
    assert PackageReader().is_use_known


# --- content and names -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "content", "wire"),
    [
        (JSON, b"null", b""),
        (JSON, b'"a \\u00e9"', "a é".encode()),
        (JSON, b'"\\ud800"', b'"\\ud800"'),  # a lone surrogate has no UTF-8 form: it goes as JSON
        (JSON, b'{"a": 1}', b'{"a": 1}'),
        (TEXT, b"null", b"null"),
        (BYTES, b"\x00\xff", b"\x00\xff"),
    ],
)
def test_content_on_the_wire(kind: Any, content: bytes, wire: bytes) -> None:
    message = viaduct.decode_message(viaduct.encode_message(Message(kind=kind, content=content)))
    assert (message.kind, message.content) == ((BYTES, wire) if wire else (JSON, b"null"))


@pytest.mark.parametrize("message", [Message(timestamp=2**63), Message(resource="\ud800")])
def test_what_has_no_wire_form_is_refused(message: Message) -> None:
    with pytest.raises(InvalidMessage):
        viaduct.encode_message(message)


@pytest.mark.parametrize(
    ("name", "canonical"), [("node_id", "Node_id"), ("ConnectionUse", "Connectionuse"), ("x-a-B", "X-A-B")]
)
def test_header_names_are_spelled_as_go_spells_them(name: str, canonical: str) -> None:
    assert viaduct.canonical_name(name) == canonical


@pytest.mark.parametrize("content", [b"", b"[]", b'{"Node_id": "edge"}', b"\xff"])
def test_headers_that_are_none_are_malformed(content: bytes) -> None:
    with pytest.raises(MalformedMessage):
        viaduct.headers_of(Message(kind=BYTES, content=content))
