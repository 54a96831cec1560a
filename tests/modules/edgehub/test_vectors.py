"""Our side of the cloud's wire against every golden vector of a real CloudHub.

Here stands what the edge sends and what it makes of what comes. `NOT_HERE` names the vectors that are not checked
in this file, with the reason; tests/test_vectors.py sees to it that none is forgotten.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cloudsim.wire import decode_as_go, encode
from modules.edgehub import cloud
from modules.edgehub.config import EdgeHubConfig, Endpoint
from modules.edgehub.frames import PING as PING_FRAME
from modules.edgehub.frames import Close, FrameReader, FrameWriter, Ping, Pong, Text
from modules.edgehub.websocket import WebSocketLink
from runtime import viaduct
from runtime.enrolment import (
    BAD_CERTIFICATE,
    CLOUD_FAILED,
    NODE_NAME,
    NOT_A_CLOUDHUB,
    TOKEN_EXPIRED,
    TOKEN_REJECTED,
    Token,
    judge_ca,
    judge_certificate,
    parse_token,
    request_head,
)
from runtime.errors import InvalidMessage, MalformedMessage, NotEnrolled
from runtime.http_answer import Answer, AnswerReader, MalformedAnswer
from runtime.message import BYTES, JSON, TEXT, Message, from_cloud_json
from runtime.viaduct import PackageReader, ViaductFault
from tests.modules.edgehub.test_frames import server_frame, unmask, xor
from tests.sockets.test_edgehub_link import config, serving
from tests.support.aio import run
from tests.support.vectors import Vector, every, matching, of_file

DEPTH = 512
LIMIT = 16 * 2**20
HUBS_OWN = "the hub's own doing: nothing of it is decided, read or written at the edge"

QUIC_LINK = "tests/sockets/test_edgehub_quic.py"

NOT_HERE = {
    "quic_live_sessions/q2_55_event": f"{QUIC_LINK}::test_a_stream_of_the_cloud_that_ends_is_not_written_on",
    "quic_live_sessions/q1_38_event": f"{QUIC_LINK}::test_a_close_of_the_cloud_is_noticed_at_once",
    "quic_live_sessions/q1_39_event": f"{QUIC_LINK}::test_a_close_of_the_cloud_is_noticed_at_once",
    "quic_live_sessions/q1_40_event": f"{QUIC_LINK}::test_a_close_of_the_cloud_is_noticed_at_once",
    "quic_live_sessions/q2_56_event": f"{QUIC_LINK}::test_a_close_of_the_cloud_is_noticed_at_once",
    "quic_live_sessions/q2_57_event": f"{QUIC_LINK}::test_a_close_of_the_cloud_is_noticed_at_once",
    "quic_version/*": "what Google's QUIC looks like below the streams; the edge does not speak it",
    "bootstrap_http/answers/GET /": "nothing that the edge asks for",
    "bootstrap_http/answers/token_accepted_twice": HUBS_OWN,
    "bootstrap_http/jwt_hmac_key_is_ca_private_key_der": "with what the cloud signs is no matter of the edge",
    "measured_behaviour/tls_and_identity_authorization_off/python VERIFY_X509_STRICT": "tests/modules/edgehub/"
    "test_tls.py::test_the_context_verifies_the_server_and_offers_no_alpn",
    "measured_behaviour/tls_and_identity_authorization_off/hostname mismatch": "tests/sockets/"
    "test_edgehub_identity.py::test_the_name_in_the_hubs_certificate_counts",
    "measured_behaviour/fragmentation_boundaries_and_zombie_probes/k8s_ca_answer_repeated_without_ack": HUBS_OWN,
    "measured_behaviour/ack_*": HUBS_OWN,
    "measured_behaviour/keepalive/*": HUBS_OWN,
    "measured_behaviour/session_and_ordering/alpn_*": "the edge offers no ALPN: tests/modules/edgehub/test_tls.py::"
    "test_the_context_verifies_the_server_and_offers_no_alpn",
    "measured_behaviour/session_and_ordering/*": HUBS_OWN,
    "measured_behaviour/tls_*": HUBS_OWN,
    "measured_behaviour/message_admission*": HUBS_OWN,
}
_PREFERRED = {
    "measured_behaviour/ack_variants_large_messages_reconnect_race/downstream_64MiB",
    "measured_behaviour/ack_variants_large_messages_reconnect_race/ack_variant_plain",
    "measured_behaviour/session_and_ordering/pong_after_300",
    "measured_behaviour/session_and_ordering/kick_eof",
}
"Checked here although a pattern above says that others like them are not."

HERE = [vector for vector in every() if str(vector) in _PREFERRED or matching(vector, NOT_HERE) is None]


@pytest.mark.parametrize("vector", HERE, ids=str)
def test_a_vector_holds_for_the_edge(tmp_path: Path, vector: Vector) -> None:
    CHECKS[vector.file](vector, tmp_path)


def up(message: Message) -> Any:
    """A message as it goes up, decoded."""
    return json.loads(cloud.encode_up(message, DEPTH))


def frames_of(data: bytes) -> list[Any]:
    """What our reader makes of the hub's bytes, in two cuts."""
    reader = FrameReader(LIMIT)
    return reader.receive(data[: len(data) // 2]) + reader.receive(data[len(data) // 2 :])


# --- the websocket -----------------------------------------------------------------------------------


def handshake(vector: Vector, directory: Path) -> None:
    """Our request says what the recorded one says, and the recorded answer opens the link."""
    request, response = (each.value for each in of_file("ws_handshake"))
    said: list[str] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        said.append((await reader.readuntil(b"\r\n\r\n")).decode())
        key = next(
            line.split(": ")[1] for line in said[0].split("\r\n") if line.lower().startswith("sec-websocket-key")
        )
        magic = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        accept = base64.b64encode(hashlib.sha1(key.encode() + magic).digest()).decode()
        recorded = response["raw_text"].split("Sec-WebSocket-Accept: ")[1].split("\r\n")[0]
        writer.write(response["raw_text"].replace(recorded, accept).encode())
        await writer.drain()
        await reader.read()

    async def scenario() -> None:
        async with serving(directory, talk) as server:
            settings = config(server)
            link = WebSocketLink(settings)
            await link.open(settings.endpoints[0])
            await link.close(is_polite=False)

    run(scenario())
    ours, theirs = headers_of(said[0]), headers_of(request["raw_text"])
    assert said[0].split(" ")[1].split("/")[0] == ""
    for name in ("connection", "upgrade", "sec-websocket-version", "project_id", "connectionuse"):
        assert ours[name].lower() == theirs[name].lower()
    assert ours["node_id"] == settings_node(said[0])
    assert "sec-websocket-extensions" not in ours
    assert "sec-websocket-protocol" not in ours


def headers_of(request: str) -> dict[str, str]:
    lines = (line.partition(": ") for line in request.split("\r\n")[1:])
    return {name.lower(): value for name, _, value in lines if name}


def settings_node(request: str) -> str:
    """The node in the path, `/<project>/<node>/events`."""
    return request.split(" ")[1].split("/")[2]


def session_entry(vector: Vector, _directory: Path) -> None:
    text, value = vector.value["text"], vector.value
    message = from_cloud_json(text)
    assert up(message) == json.loads(text)
    if value["direction"] == "edge->cloud":
        key = bytes.fromhex(value["frame"]["mask"])
        assert b"".join(FrameWriter(lambda _: key, xor).texts([text.encode()])).hex() == value["frame_hex"]
        _our_own(vector.name, value["decoded"])
        return
    assert frames_of(bytes.fromhex(value["frame_hex"])) == [Text(text.encode())]
    # The genuine edge acknowledged it: so do we, in the same words.
    for each in of_file("ws_session"):
        sent = each.value["decoded"]
        if sent["header"].get("parent_msg_id") == message.id and sent["route"]["operation"] == "response":
            assert cloud.wants_ack(message)
            ours = up(cloud.ack(message))
            assert (ours["route"], ours["content"]) == (sent["route"], sent["content"])
            assert ours["header"]["parent_msg_id"] == message.id
            return
    # There is no ACK of it among the recorded ones.
    assert not cloud.wants_ack(message)


def _our_own(name: str, recorded: dict[str, Any]) -> None:
    if name.startswith("keepalive"):
        ours = up(cloud.keepalive())
        assert (ours["route"], ours["content"]) == (recorded["route"], recorded["content"])
        assert ours["header"].keys() == recorded["header"].keys()


def large(vector: Vector, _directory: Path) -> None:
    size = int(vector.name.split("_")[2].split(".")[0])
    content = ("0123456789abcdef" * (size // 16 + 1))[:size]
    value = vector.value
    header, route = value["header"], value["route"]
    message = Message(id=header["msg_id"], timestamp=header["timestamp"], kind=TEXT, content=content.encode(), **route)
    # Our text differs in nothing but, perhaps, the order of keys: the cloud's own words give the recorded hash.
    payload = encode(decode_as_go(cloud.encode_up(message, DEPTH)))
    assert hashlib.sha256(payload).hexdigest() == value["payload_sha256"]
    if value["direction"] == "edge->cloud":
        written = b"".join(FrameWriter(bytes, xor_nothing).texts([payload]))
        assert unmask_plain(written) == [(0x81, payload)]
        return
    data, at = b"", 0
    for frame in value["frames"]:
        data += bytes.fromhex(frame["header_hex"]) + payload[at : at + frame["payload_len"]]
        at += frame["payload_len"]
    assert frames_of(data) == [Text(payload)]
    assert from_cloud_json(payload) == message


def xor_nothing(data: bytes, _key: bytes) -> bytes:
    return data


def unmask_plain(stream: bytes) -> list[tuple[int, bytes]]:
    """The one frame of a stream whose mask is nought."""
    start = {126: 4, 127: 10}.get(stream[1] & 0x7F, 2) + 4
    return [(stream[0], stream[start:])]


def anomaly(vector: Vector, _directory: Path) -> None:
    """What the hub answers is read; what it cuts the link for is never sent."""
    value = vector.value["decoded"]
    for reaction in value["hub_reaction"]:
        words = reaction.split(" ")
        if words[0] == "close":
            code, reason = _close(bytes.fromhex(words[3]) if len(words) > 3 else b"")
            assert frames_of(server_frame(8, bytes.fromhex(words[3]) if len(words) > 3 else b"")) == [
                Close(code, reason)
            ]
        elif words[0] == "pong":
            payload = bytes.fromhex(words[3]) if len(words) > 3 else b""
            assert frames_of(server_frame(10, payload)) == [Pong(payload)]
        elif words[0] == "text":
            answer = from_cloud_json(reaction.split(" ", 3)[3])
            # The connection layer answers rejected connections as well: that proves nothing.
            assert cloud.proves_session(answer) is (answer.source == "cloudhub")
    if vector.name in NEVER_SENT:
        NEVER_SENT[vector.name]()
    else:
        assert not value["hub_reaction"] or not value["hub_reaction"][0].startswith("TCP EOF")


def _close(payload: bytes) -> tuple[int, str]:
    return (int.from_bytes(payload[:2], "big"), payload[2:].decode()) if payload else (1005, "")


def _refused(content: bytes) -> Callable[[], None]:
    def check() -> None:
        with pytest.raises(InvalidMessage):
            cloud.encode_up(Message(id="m", timestamp=1, kind=JSON, content=content), DEPTH)

    return check


def _whole_objects_only() -> None:
    """Whatever a message holds, its text is one object with header and route of the right types."""
    for message in (
        Message(),
        Message(kind=BYTES, content=b"\xff"),
        Message(kind=TEXT, content=b"{"),
        cloud.keepalive(),
    ):
        sent = cloud.encode_up(message, DEPTH)
        assert decode_as_go(sent).header.timestamp == json.loads(sent)["header"]["timestamp"]


def _integers_only() -> None:
    with pytest.raises((InvalidMessage, TypeError)):
        cloud.encode_up(Message(timestamp=2**63), DEPTH)
    _whole_objects_only()


def _masked_frames_only() -> None:
    writer = FrameWriter(lambda count: b"\1" * count, xor)
    stream = b"".join(writer.texts([b"a", b"", b"b" * 70_000])) + writer.control(PING_FRAME, b"p") + writer.close(1000)
    assert [first for first, _ in unmask(stream)] == [0x81, 0x81, 0x81, 0x89, 0x88]


NEVER_SENT: dict[str, Callable[[], None]] = {
    "malformed_json_text": _refused(b'{"a":'),
    "not_json": _refused(b"hello"),
    "NaN_content": _refused(b"NaN"),
    "json_array": _whole_objects_only,
    "empty_text_frame": _whole_objects_only,
    "json_wrong_type_header_string": _whole_objects_only,
    "json_wrong_type_timestamp_string": _integers_only,
    "json_float_timestamp": _integers_only,
    "unmasked_frame": _masked_frames_only,
    "rsv1_set": _masked_frames_only,
    "reserved_opcode_3": _masked_frames_only,
    "ping_126_bytes": _masked_frames_only,
    "fragmented_ping": _masked_frames_only,
    "continuation_without_start": _masked_frames_only,
    "new_text_inside_fragments": _masked_frames_only,
    "close_bad_code_1005": _masked_frames_only,
    "close_1000": _masked_frames_only,
    "close_1001": _masked_frames_only,
    "close_empty": _masked_frames_only,
}
"For which input the hub ends the connection, and why none of ours is like it."


def forwarding(vector: Vector, _directory: Path) -> None:
    """What the genuine edge sent goes through our hands unchanged, and the cloud module would get the same."""
    if not vector.value["raw_text"]:
        assert "disconnected" in vector.name, "what the hub tells its own controller"
        return
    sent = json.loads(vector.value["raw_text"])
    assert up(from_cloud_json(vector.value["raw_text"])) == sent
    expected = vector.value["decoded"]["message"]
    assert expected["route"]["resource"].endswith(sent["route"]["resource"])


def message_form(vector: Vector, _directory: Path) -> None:
    text = vector.value["raw_text"]
    expected = json.loads(text)
    message = from_cloud_json(text)
    expected["header"].pop("sync", None)  # cleared by every sender
    assert up(message) == expected
    if vector.name.startswith(("response_built", "error_built")):
        request = from_cloud_json(
            next(each.value["raw_text"] for each in of_file("message_json") if each.name == "json_full_string")
        )
        reply = request.response("OK") if vector.name.startswith("response") else request.error("boom")
        ours = up(reply)
        assert ours["header"]["parent_msg_id"] == expected["header"]["parent_msg_id"]
        assert ours["content"] == expected["content"]
        # Who replies is the source of an error; everything else is copied.
        source = {"source": ours["route"]["source"]} if vector.name.startswith("error") else {}
        assert ours["route"] == expected["route"] | source


# --- QUIC ----------------------------------------------------------------------------------------------


def framing(vector: Vector, _directory: Path) -> None:
    name, value = vector.name, vector.value
    if name == "write_over_max_error":
        with pytest.raises(InvalidMessage, match=value):
            viaduct.package_header(viaduct.MAX_PAYLOAD_BYTES + 1)
        return
    data = bytes.fromhex(value["raw_hex"])
    told = value["decoded"]
    if name.startswith("package_header"):
        assert viaduct.package_header(told["payload_len"]) == data
    elif name.startswith("reader_case"):
        reader = PackageReader()
        if "exceeds" in told["error"]:
            with pytest.raises(ViaductFault, match=told["error"]):
                reader.receive(data)
            return
        assert b"".join(reader.receive(data)).hex() == told["payload_hex"]  # type: ignore[arg-type]  # none is too large
        assert reader.is_between_packages is (told["error"] == "")
    elif name.startswith("protobuf_decode_case"):
        if "msg" not in told:
            with pytest.raises(MalformedMessage):
                viaduct.decode_message(data)
        else:
            assert viaduct.decode_message(data) == from_cloud_json(json.dumps(told["msg"]))
    else:
        _trip(value)


def _trip(value: dict[str, Any]) -> None:
    told, payload = value["decoded"], bytes.fromhex(value["protobuf_hex"])
    assert PackageReader().receive(bytes.fromhex(value["raw_hex"])) == [payload]
    given = from_cloud_json(json.dumps(told["input_as_json"], separators=(",", ":")).replace("1e+21", "1e21"))
    if told["input_content_go_type"] == "[]uint8":
        given = _with(given, BYTES, base64.b64decode(told["input_as_json"]["content"]))
    if told["input_as_json"]["header"].get("sync"):
        given = _sync(given)
    # We write 1e21, the same number in fewer bytes than Go's 1e+21.
    assert viaduct.encode_message(given) == payload or b"1e+21" in payload
    arrived = viaduct.decode_message(payload)
    expected = from_cloud_json(json.dumps(told["message_after_the_trip"]))
    if arrived.kind == BYTES:
        expected = _with(expected, BYTES, base64.b64decode(told["message_after_the_trip"]["content"]))
    assert arrived == _sync(expected) if arrived.sync else arrived == expected


def _with(message: Message, kind: Any, content: bytes) -> Message:
    return Message(**{**_fields(message), "kind": kind, "content": content})


def _sync(message: Message) -> Message:
    return Message(**{**_fields(message), "sync": True})


def _fields(message: Message) -> dict[str, Any]:
    return {name: getattr(message, name) for name in Message.__struct_fields__}


def live_session(vector: Vector, _directory: Path) -> None:
    """Recorded bytes of either side pass through our reader and writer and come out the same."""
    value = vector.value
    if vector.name.endswith("_event"):
        _session_event(value["decoded"])
        return
    text = value["raw_hex"]
    if value["decoded"] == "use type prefix":
        assert bytes.fromhex(text) == viaduct.MESSAGES
    elif value["decoded"] == "package header":
        payload = of_file("quic_live_sessions")[of_file("quic_live_sessions").index(vector) + 1]
        assert viaduct.package_header(payload.value["length"]) == bytes.fromhex(text)
    elif text.endswith("..."):
        assert value["length"] <= viaduct.MAX_PAYLOAD_BYTES  # only its beginning was kept
    else:
        payload_bytes = bytes.fromhex(text)
        message = viaduct.decode_message(payload_bytes)
        assert viaduct.encode_message(message) == payload_bytes
        if value["stream_id"] == 3:
            _control(message)


def _control(message: Message) -> None:
    if message.operation != "header":
        assert (message.operation, message.content) == ("response", viaduct.ACK.encode())
        return
    node = EdgeHubConfig(node_name="edge-f", endpoints=(Endpoint("h", 1),))
    ours = viaduct.decode_message(viaduct.encode_message(viaduct.header_message(cloud.headers(node))))
    theirs = viaduct.headers_of(message)
    assert (ours.source, ours.group, ours.operation, ours.resource) == (
        message.source,
        message.group,
        message.operation,
        message.resource,
    )
    assert {name: viaduct.headers_of(ours)[name] for name in theirs} == theirs


def _session_event(told: dict[str, Any]) -> None:
    """The ack of the headers, as the genuine edge saw it."""
    assert from_cloud_json(json.dumps(told["msg"])).content == base64.b64encode(viaduct.ACK.encode())
    assert told["content_text"] == viaduct.ACK


# --- the certificate API ---------------------------------------------------------------------------------

_TOKEN = Token("0" * 64, "a.b.c", 1.0)

REFUSALS = {
    "token_expired": TOKEN_EXPIRED,
    "rotate_wrong_NodeName": NODE_NAME,
    "rotate_no_NodeName": NODE_NAME,
}
"Answers with a meaning of their own; the others are told by their status."


def enrolment(vector: Vector, _directory: Path) -> None:
    name, value = vector.name, vector.value
    if name == "token":
        token = parse_token(value["token"])
        assert token.ca_sha256 == value["token"].split(".")[0]
        assert token.expires_at is not None
    elif name.startswith("bootstrap_"):
        _exchange(vector)
    elif isinstance(value, str):
        with pytest.raises(MalformedAnswer):  # the connection closed without a response
            AnswerReader().end()
    elif name == "answers/GET /ca.crt":
        body = b"\x30\x82certificate"
        pinned = Token(hashlib.sha256(body).hexdigest(), "a.b.c", None)
        assert judge_ca(_answer(value, body), pinned, "s") == body
    elif name.startswith("answers/GET /node/"):
        assert value["status"] in (200, 404)  # the edge does not ask
    else:
        _judged(name.removeprefix("answers/"), value)


def _answer(value: dict[str, Any], body: bytes) -> Answer:
    head = "".join(f"{key}: {each}\r\n" for key, each in value["headers"].items() if key != "Content-Length")
    data = f"HTTP/1.1 {value['status']} Said\r\n{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    answer = AnswerReader().feed(data)
    assert answer is not None
    return answer


def _judged(name: str, value: dict[str, Any]) -> None:
    is_renewal = name.startswith("rotate")
    body = value["body"].encode() if "body" in value else b"\x30\x82certificate"
    answer = _answer(value, body)
    token = None if is_renewal else _TOKEN
    if value["status"] == 200:
        assert judge_certificate(answer, "s", node_name="edge-a", token=token, now=0.0) == body
        return
    by_status = {401: BAD_CERTIFICATE if is_renewal else TOKEN_REJECTED, 405: NOT_A_CLOUDHUB, 500: CLOUD_FAILED}
    with pytest.raises(NotEnrolled) as refusal:
        judge_certificate(answer, "s", node_name="edge-a", token=token, now=0.0)
    assert refusal.value.code == REFUSALS.get(name, by_status[value["status"]])


def _exchange(vector: Vector) -> None:
    head, body = vector.value["head_text"], bytes.fromhex(vector.value["body_hex"] or "")
    if head.startswith("HTTP/1.1"):
        answer = AnswerReader().feed(head.encode() + body)
        assert answer is not None
        assert (answer.status, answer.body) == (200, body)
        return
    path = head.split(" ")[1]
    theirs = headers_of(head)
    sent = [(name, theirs[name.lower()]) for name in ("Authorization", "NodeName") if name.lower() in theirs]
    ours = request_head("h", 10002, path, headers=sent, length=len(body)).decode()
    assert ours.split("\r\n")[0] == head.split("\r\n")[0]
    missing = {"accept-encoding", "user-agent", "host", "transfer-encoding", "content-length"}
    assert {name: value for name, value in headers_of(ours).items() if name not in missing | {"connection"}} == {
        name: value for name, value in theirs.items() if name not in missing | {"connection"}
    }


# --- measured behaviour: what of it meets the edge ---------------------------------------------------------


def measured(vector: Vector, _directory: Path) -> None:
    name, value = vector.name.split("/", 1)[1], vector.value
    if name.startswith("hub_fragmentation"):
        for size, frames in value:
            payload, at, data = bytes(itertools.islice(itertools.cycle(range(251)), size)), 0, b""
            for final, kind, length in frames:
                opcode = {"text": 1, "continuation": 0}[kind]
                data += server_frame(opcode, payload[at : at + length], fin=bool(final))
                at += length
            assert frames_of(data) == [Text(payload)]
    elif name == "zombie_probes":
        assert not cloud.proves_session(from_cloud_json(json.dumps(value["control_ping"])))
    elif name == "k8s_ca_probe_with_session":
        answer = {key: value[key] for key in ("header", "route")} | {"content": value["content_first"]}
        assert cloud.proves_session(from_cloud_json(json.dumps(answer)))
        assert up(cloud.greeting())["route"]["resource"] == value["route"]["resource"]
    elif name == "downstream_64MiB":
        # Beyond our limit it is passed over while it comes, and the link stays.
        reader, events = FrameReader(LIMIT), []
        events += reader.receive(b"\x01\x7f" + value["got"].to_bytes(8, "big"))
        for _ in range(value["got"] // 2**20):
            events += reader.receive(bytes(2**20))
            assert reader.held_bytes <= 2**20
        events += reader.receive(b"\x80\x00" + server_frame(1, b"next"))
        assert [type(event).__name__ for event in events] == ["Skipped", "Text"]
    elif name == "ack_variant_plain":
        down = Message(id="first", group="resource", operation="insert", resource=value[0][1])
        assert cloud.wants_ack(down)
        assert (cloud.ack(down).parent_id, cloud.ack(down).operation) == ("first", "response")
    elif name == "pong_after_300":
        writer = FrameWriter(lambda count: b"\1" * count, xor)
        assert unmask(writer.control(PING_FRAME, b"sync")) == [(0x89, b"sync")]
        assert frames_of(server_frame(10, b"sync")) == [Pong(b"sync")]
        assert frames_of(server_frame(9, b"sync")) == [Ping(b"sync")]
    else:
        assert name == "kick_eof"
        assert frames_of(b"") == []  # no close frame comes: the end of the connection is the news


CHECKS: dict[str, Callable[[Vector, Path], None]] = {
    "ws_handshake": handshake,
    "ws_session": session_entry,
    "ws_large_and_fragmented": large,
    "ws_anomalies": anomaly,
    "ws_upstream_forwarding": forwarding,
    "message_json": message_form,
    "quic_framing": framing,
    "quic_live_sessions": live_session,
    "bootstrap_http": enrolment,
    "measured_behaviour": measured,
}
