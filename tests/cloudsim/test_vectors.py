"""cloudsim against every golden vector of a real CloudHub: the double must not drift from the measured hub.

What it plays back goes over real sockets wherever a vector is about the wire. `NOT_HERE` names the vectors
that are not checked in this file, with the reason; tests/test_vectors.py sees to it that none is forgotten.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import itertools
import json
import random
import ssl
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cloudsim import CloudMessage, CloudSim, Header, Route, handshake, viaduct
from cloudsim.hub import Action, Drop, Hub, HubRules, Peer, Send
from cloudsim.lanes import Freed, Lanes, Package
from cloudsim.wire import Undecodable, decode, decode_as_go, encode
from runtime.viaduct import package_header, packages
from tests.cloudsim.odd_certificates import odd_context
from tests.cloudsim.quicnode import QuicNode, quic_cloud, quic_raw, quic_served
from tests.cloudsim.rawnode import (
    KEEPALIVE_FRAME,
    RawNode,
    client_context,
    cloud,
    frame,
    message,
    raw,
    served,
    tls_failure,
    upgrade_text,
)
from tests.support.aio import run, until
from tests.support.vectors import Vector, every, matching, of_file

GQUIC = "Google's QUIC below the streams, which the double does not speak (docs/cloudsim.md, differences)"
API = "tests/cloudsim/test_certificate_api.py"

NOT_HERE = {
    "quic_version/quic_and_client_certificates": "tests/cloudsim/test_quic.py::"
    "test_as_over_googles_quic_no_certificate_is_seen",
    "quic_version/*": GQUIC,
    "bootstrap_http/answers/token_accepted_twice": f"{API}::test_a_node_gets_its_certificate_over_https_and_rotates_it",
    "bootstrap_http/answers/*": f"{API}::test_the_vector_of_an_answer_is_met",
    "bootstrap_http/bootstrap_*": f"{API}::test_the_genuine_request_of_the_vectors_is_signed",
    "bootstrap_http/token": f"{API}::test_a_token_has_the_form_of_the_vectors",
    "bootstrap_http/jwt_hmac_key_is_ca_private_key_der": f"{API}::test_a_token_has_the_form_of_the_vectors",
}

HERE = [vector for vector in every() if matching(vector, NOT_HERE) is None]


@pytest.mark.parametrize("vector", HERE, ids=str)
def test_a_vector_holds_for_cloudsim(tmp_path: Path, vector: Vector) -> None:
    check = _measured(vector.name) if vector.file == "measured_behaviour" else CHECKS[vector.file]
    scenario = check(vector, tmp_path)
    if scenario is not None:
        run(scenario)


def test_no_vector_of_a_table_is_checked_twice_or_in_vain() -> None:
    rows = {vector.name for vector in of_file("measured_behaviour")}
    assert MEASURED.keys() <= rows
    assert all(sum(name.startswith(prefix) for prefix in PREFIXES) <= 1 for name in rows)


def seen(sim: CloudSim, node: str = "edge-a") -> list[tuple[str, dict[str, Any]]]:
    """What the cloud modules got from a node: module and message."""
    return [
        (received.module, json.loads(received.line())["message"])
        for received in sim.messages(node=node)
        if not received.from_hub
    ]


def model(value: dict[str, Any]) -> CloudMessage:
    return msgspec.convert(value, CloudMessage)


def without_chance(value: dict[str, Any]) -> dict[str, Any]:
    """A message without what is new each time."""
    return value | {
        "header": {key: each for key, each in value["header"].items() if key not in ("msg_id", "timestamp")}
    }


# --- the websocket -----------------------------------------------------------------------------------


async def handshake_vector(vector: Vector, directory: Path) -> None:
    request, response = (each.value for each in of_file("ws_handshake"))
    async with cloud(directory) as sim, raw(sim, "edge-a") as node:
        assert await node.request(request["raw_text"]) == response["raw_text"]
        (session,) = sim.sessions()
        assert (session["node"], session["state"]) == ("edge-a", "served")
        await node.send(KEEPALIVE_FRAME)
        await node.barrier()
        assert sim.sessions()[0]["keepalives"] == 1


def in_words(final: bool, opcode: int, payload: bytes) -> str:
    """A frame as the vectors tell it."""
    if opcode == 1:
        return f"text fin={int(final)} len={len(payload)} {payload.decode()}"
    name = {8: "close", 10: "pong"}[opcode]
    return f"{name} fin={int(final)} len={len(payload)} {payload.hex()}"


async def anomaly(vector: Vector, directory: Path) -> None:
    """Odd input has the measured effect."""
    async with cloud(directory) as sim, served(sim) as node:
        await node.send(KEEPALIVE_FRAME, bytes.fromhex(vector.value["sent_frames_hex"]))
        for reaction in vector.value["decoded"]["hub_reaction"]:
            if reaction.startswith("TCP EOF"):
                assert await node.ends()
            elif reaction.startswith("nothing"):
                await node.barrier()
            elif reaction.startswith("text"):
                answer = without_chance(await node.message())
                expected = without_chance(json.loads(reaction.split(" ", 3)[3]))
                if expected["route"]["resource"] == "k8s/ca.crt":  # each cloud has its own
                    assert answer.pop("content").startswith("-----BEGIN CERTIFICATE-----\n")
                    expected.pop("content")
                assert answer == expected
            else:
                assert in_words(*await node.frame()) == reaction
        assert seen(sim) == [
            (item["to"], {key: item[key] for key in ("header", "route", "content")})
            for item in vector.value["decoded"]["forwarded_to_cloud_modules"]
        ]


async def forwarding(vector: Vector, directory: Path) -> None:
    """A recorded message reaches the recorded module in the recorded form."""
    expected = vector.value["decoded"]
    async with cloud(directory) as sim:
        async with served(sim) as node:
            if vector.value["raw_text"]:
                await node.send(frame(1, vector.value["raw_text"].encode()))
                await node.barrier()
                assert seen(sim) == [(expected["forwarded_to"], expected["message"])]
                return
        await until(lambda: not sim.is_served("edge-a"), "the end of the session")
        event = [received for received in sim.messages() if received.from_hub][-1]
        assert event.module == expected["forwarded_to"]
        assert msgspec.to_builtins(event.route) == expected["message"]["route"]
        found, wanted = (json.loads(base64.b64decode(text)) for text in (event.content, expected["message"]["content"]))
        found["timestamp"] = wanted["timestamp"]
        assert found == wanted


async def check_session_entry(sim: CloudSim, node: RawNode, vector: Vector) -> None:
    """What went down is sent again and must be the same bytes; what went up is replayed as recorded."""
    data = bytes.fromhex(vector.value["frame_hex"])
    if vector.value["direction"] == "edge->cloud":
        await node.send(data)
        await node.barrier()
        return
    assert sim.send("edge-a", model(vector.value["decoded"]))["dropped"] is None
    if b"1e+21" in data:  # we write 1e21, the same number in fewer bytes
        assert await node.message() == json.loads(vector.value["text"])
    else:
        assert await node.reader.readexactly(len(data)) == data


async def session_entry(vector: Vector, directory: Path) -> None:
    """Each entry by itself, and what the cloud sees of those that go up."""
    async with cloud(directory) as sim, served(sim) as node:
        await check_session_entry(sim, node, vector)
        if vector.value["direction"] == "edge->cloud":
            sent = vector.value["decoded"]
            sent["route"]["resource"] = f"node/edge-a/{sent['route']['resource']}"
            is_consumed = sent["route"]["operation"] in ("keepalive", "response")
            assert [found for _, found in seen(sim)] == ([] if is_consumed else [sent])


def test_the_session_of_the_vectors_runs_as_a_whole(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path) as sim, served(sim) as node:
            for vector in of_file("ws_session"):
                await check_session_entry(sim, node, vector)
            assert sim.sessions()[0]["queued_objects"] == 0

    run(scenario())


async def large(vector: Vector, directory: Path) -> None:
    """Large messages are cut and joined as recorded."""
    size = int(vector.name.split("_")[2].split(".")[0])
    content = ("0123456789abcdef" * (size // 16 + 1))[:size]
    header, route = vector.value["header"], vector.value["route"]
    built = CloudMessage(msgspec.convert(header, Header), msgspec.convert(route, Route), content)
    async with cloud(directory) as sim, served(sim) as node:
        if vector.value["direction"] == "cloud->edge":
            sim.send("edge-a", built)
            payload = b""
            for expected in vector.value["frames"]:
                found = await node.reader.readexactly(len(expected["header_hex"]) // 2)
                assert found.hex() == expected["header_hex"]
                payload += await node.reader.readexactly(expected["payload_len"])
            assert hashlib.sha256(payload).hexdigest() == vector.value["payload_sha256"]
            return
        payload = encode(built)
        assert hashlib.sha256(payload).hexdigest() == vector.value["payload_sha256"]
        pieces = [payload[start : start + 4096] for start in range(0, len(payload), 4096)]
        assert len(pieces) == vector.value["frame_count"]
        last = len(pieces) - 1
        for index, piece in enumerate(pieces):
            await node.send(frame(0 if index else 1, piece, final=index == last))
        await node.barrier()
        (received,) = sim.uploads()
        assert received.content == content


def message_form(vector: Vector, _directory: Path) -> None:
    """The exact JSON text, both ways."""
    text = vector.value["raw_text"].encode()
    if not isinstance(vector.value["decoded"], dict):
        _standard_reply(vector)
        return
    built = model(vector.value["decoded"]["message"])
    assert decode(text) == decode_as_go(text) == built
    # Go writes 1e21 with its plus sign; the number is the same.
    assert encode(built).replace(b"1e21", b"1e+21") == text


def _standard_reply(vector: Vector) -> None:
    if vector.name.startswith("error"):
        # Only edges make these; the hub takes them and does nothing.
        hub, actions = _hub(), []
        hub.connect(1, Peer("edge-a"), now=0.0)
        actions = hub.receive(1, decode(vector.value["raw_text"].encode()), now=0.0)
        assert actions == []
        return
    request = next(
        each.value["decoded"]["message"] for each in of_file("message_json") if each.name == "json_full_string"
    )
    reply = _hub()._reply(model(request), "OK", 0.0)
    reply.header.msg_id, reply.header.timestamp = "NEW-ID", 1
    assert json.loads(encode(reply)) == json.loads(vector.value["raw_text"])


# --- QUIC ----------------------------------------------------------------------------------------------


def framing(vector: Vector, _directory: Path) -> None:
    """Packages and protobuf, in the hub's own reader and writer."""
    name, value = vector.name, vector.value
    if name == "write_over_max_error":
        too_long = CloudMessage(content=bytes(33554433 - len(viaduct.encode(CloudMessage())) - 5))
        with pytest.raises(ValueError, match=value):
            viaduct.encode(too_long)
        return
    data = bytes.fromhex(value["raw_hex"])
    if name.startswith("package_header"):
        assert package_header(value["decoded"]["payload_len"]) == data
    elif name.startswith("reader_case"):
        _reader_case(data, value["decoded"])
    elif name.startswith("protobuf_decode_case"):
        _decode_case(data, value["decoded"])
    else:
        told, payload = value["decoded"], bytes.fromhex(value["protobuf_hex"])
        assert packages([payload]) == data
        # We write 1e21, the same number in fewer bytes than Go's 1e+21.
        assert viaduct.encode(_built(told)) == payload or b"1e+21" in payload
        expected = model(told["message_after_the_trip"])
        found = viaduct.decode(payload)
        # The receiver always gets bytes, which the vector tells in base64.
        assert (found.header, found.route) == (expected.header, expected.route)
        assert found.content == (None if expected.content is None else base64.b64decode(expected.content))


def _built(told: dict[str, Any]) -> CloudMessage:
    built = model(told["input_as_json"])
    if told["input_content_go_type"] == "[]uint8":
        built.content = base64.b64decode(built.content)
    return built


def _reader_case(data: bytes, expected: dict[str, Any]) -> None:
    lanes = Lanes(random.Random(1), 2**26)
    list(lanes.serve())
    *found, last = lanes.receive(4, b"msg" + data, True)
    assert b"".join(each.payload for each in found if isinstance(each, Package)).hex() == expected["payload_hex"]
    assert isinstance(last, Freed)
    assert last.reason == (expected["error"] or "the node ended the stream")


def _decode_case(data: bytes, expected: dict[str, Any]) -> None:
    if "panic" in expected:
        with pytest.raises(viaduct.CrashingPayload):
            viaduct.decode(data)
    elif "err" in expected:
        with pytest.raises(Undecodable):
            viaduct.decode(data)
    else:
        assert viaduct.decode(data) == model(expected["msg"])


STREAMS = {3: 0, 5: 4, 2: 1}
"Google's stream numbers in those of version 1."


class LiveSession:
    """Plays recorded entries over a real connection."""

    def __init__(self, sim: CloudSim, node: QuicNode) -> None:
        self.sim = sim
        self.node = node
        self._read: dict[int, int] = {}

    async def come(self, stream: int, count: int) -> bytes:
        """The next bytes of a stream."""
        start = self._read.get(stream, 0)
        await self.node.wait(lambda: len(self.node.data.get(stream, b"")) >= start + count)
        self._read[stream] = start + count
        return bytes(self.node.data[stream][start : start + count])

    async def opened(self, stream: int) -> None:
        """Return when the hub has accepted a stream: it uses it from then on."""
        await self.node.barrier(stream)
        self._read[stream] = len(self.node.data[stream])

    async def play(self, value: dict[str, Any]) -> None:
        """A use type, or a payload with the package header that was recorded before it."""
        stream = STREAMS[value["stream_id"]]
        is_up = value["direction"] == "edge->cloud"
        if value["decoded"] == "use type prefix":
            if is_up:
                self.node.write(stream, whole(value))
            return  # the hub's comes with its first message and is looked at there
        payload = whole(value)
        data = packages([payload])
        if is_up:
            self.node.write(stream, data)
            sent = viaduct.decode(payload)
            if stream and sent.route.operation not in ("keepalive", "response"):
                await self.sim.wait_for(lambda: any(each.payload == payload for each in self.sim.messages()))
        elif stream == 0:
            answer, expected = await self.node.message(1, 0), viaduct.decode(payload)
            assert (answer.route, answer.content) == (expected.route, expected.content)
            assert answer.header.parent_msg_id == expected.header.parent_msg_id
        else:
            expected = viaduct.decode(payload)
            down = CloudMessage(expected.header, expected.route, _json_or_bytes(expected.content))
            if down.route.operation == "insert":
                down.header.resourceversion = "1"  # which this form does not carry
            assert self.sim.send("edge-f", down)["dropped"] is None
            if stream == 1 and not self._read.get(1):
                assert await self.come(1, 3) == b"msg"
            assert await self.come(stream, len(data)) == data


def live_entries(session: str) -> list[dict[str, Any]]:
    """What was written in a session. Package headers are not entries by themselves: a payload brings its own."""
    return [
        each.value
        for each in of_file("quic_live_sessions")
        if each.name.startswith(f"{session}_") and each.value["decoded"] in ("use type prefix", "protobuf payload")
    ]


def whole(value: dict[str, Any]) -> bytes:
    """The bytes of an entry; of the largest only the beginning was kept, the rest of it is one letter."""
    text = value["raw_hex"]
    if not text.endswith("..."):
        return bytes.fromhex(text)
    known = bytes.fromhex(text[:-3])
    full = viaduct.encode(
        CloudMessage(
            Header(known[4:40].decode(), timestamp=1795453214402),
            Route(source="eventbus", group="user", operation="upload", resource="big"),
            bytes(2**20),
        )
    )
    assert len(full) == value["length"]
    assert full.startswith(known)
    return full


def _json_or_bytes(content: Any) -> Any:
    """Content as a cloud module would have handed it over."""
    try:
        return json.loads(content)
    except (TypeError, ValueError):
        return content


async def live_session(vector: Vector, directory: Path) -> None:
    """One entry of a session, in the place that it has in it."""
    value = vector.value
    if vector.name.endswith("_event"):
        await session_event(vector, directory)
        return
    if value["decoded"] == "package header":
        entries = of_file("quic_live_sessions")
        at = entries.index(vector)
        assert package_header(entries[at + 1].value["length"]) == bytes.fromhex(value["raw_hex"])
        return
    session_name = vector.name.split("_")[0]
    async with quic_cloud(directory) as sim, quic_raw(sim, "edge-f") as node:
        session = LiveSession(sim, node)
        control = [each for each in live_entries(session_name) if each["stream_id"] == 3]
        for each in control:
            await session.play(each)
        if value in control:
            return
        stream = STREAMS[value["stream_id"]]
        opener = [each for each in live_entries(session_name) if each["decoded"] == "use type prefix"]
        if stream == 4:
            await session.play(opener[0])
            await session.opened(stream)
        elif value["direction"] == "edge->cloud" or value["decoded"] == "use type prefix":
            sim.send_command("edge-f", "some/path", "opens the stream")
            assert await session.come(1, 3) == whole(opener[0])
        if value["decoded"] != "use type prefix":
            await session.play(value)
        assert node.ended is None


async def session_event(vector: Vector, directory: Path) -> None:
    """How the end of the session reaches the node, and the ack of its headers."""
    told = vector.value["decoded"]
    async with quic_cloud(directory) as sim, quic_served(sim, "edge-f") as node:
        await node.barrier()
        if told["quic"] == "control-response":
            answer = node.messages(0)[0]
            assert answer.content == base64.b64decode(told["msg"]["content"])
            assert msgspec.to_builtins(answer.route) == told["msg"]["route"]
            return
        sim.kick("edge-f")
        ended = await node.wait(lambda: node.ended)
        # Google's "going away" is the close of version 1: the application's, with code 0 and without words.
        assert (ended.error_code, ended.frame_type, ended.reason_phrase) == (0, None, "")
        if "canceled" in told["err"]:
            assert node.resets == {4: 1}


@pytest.mark.parametrize("name", ["q1", "q2"])
def test_a_live_session_of_the_vectors_runs_as_a_whole(tmp_path: Path, name: str) -> None:
    async def scenario() -> None:
        async with quic_cloud(tmp_path) as sim, quic_raw(sim, "edge-f") as node:
            session = LiveSession(sim, node)
            for each in live_entries(name):
                await session.play(each)
            await node.barrier(4 if name == "q1" else 1)
            assert sim.sessions()[0]["queued_objects"] == 0

    run(scenario())


# --- measured behaviour: the hub by itself, with time as an argument ---------------------------------------


class Never(random.Random):
    """Chance that never strikes."""

    def random(self) -> float:
        return 1.0


def _hub(**rules: Any) -> Hub:
    ids = itertools.count(1)
    return Hub(
        rules=HubRules(**rules), new_id=lambda: f"hub-{next(ids)}", chance=Never(), epoch=1000.0, cluster_ca="CA"
    )


def thing(
    name: str, version: str = "1", operation: str = "insert", id: str = "", namespace: str = "default"
) -> CloudMessage:
    kind = "node" if namespace == "null" else "configmap"
    return CloudMessage(
        Header(id or f"{name}.{version}.{operation}", resourceversion=version),
        Route("edgecontroller", "", "resource", operation, f"{namespace}/{kind}/{name}"),
        {"metadata": {"uid": f"uid-{name}"}},
    )


class Timeline:
    """A hub and a node that is always read from, driven by the clock of the measurement."""

    def __init__(self, start: float, **rules: Any) -> None:
        self.hub = _hub(**rules)
        self.written: list[tuple[float, CloudMessage]] = []
        self.dropped: list[tuple[float, int]] = []
        self._collect(self.hub.connect(1, Peer("edge-b"), now=start), start)

    def _collect(self, actions: list[Action], now: float) -> None:
        for action in actions:
            if isinstance(action, Send):
                self.written.append((now, decode(action.payload)))
            elif isinstance(action, Drop):
                self.dropped.append((now, action.connection))

    def send(self, sent: CloudMessage, now: float) -> str | None:
        verdict, actions = self.hub.send("edge-b", sent, now=now)
        self._collect(actions, now)
        return verdict.dropped

    def receive(self, received: CloudMessage, now: float, number: int = 1) -> None:
        self._collect(self.hub.receive(number, received, now=now), now)

    def acknowledge(self, id: str, now: float) -> None:
        self.receive(CloudMessage(Header("x", id, 1), Route(operation="response")), now)

    def run_until(self, end: float, *, acknowledging: bool = False) -> None:
        while (deadline := self.hub.next_deadline()) is not None and deadline <= end:
            before = len(self.written)
            self._collect(self.hub.expire(now=deadline), deadline)
            while acknowledging and before < len(self.written):
                self.acknowledge(self.written[before][1].header.msg_id, deadline)
                before += 1


def retry_timeline() -> Timeline:
    """What was done when ack_retry_timeline was measured: the first write was at -0.311 s."""
    timeline = Timeline(-0.311, keepalive_seconds=1000.0)
    timeline.send(thing("edge-b", operation="update", id="?", namespace="null"), -0.311)
    timeline.send(thing("cm-retry", id="m1"), 0.0)
    timeline.send(thing("cm-second", id="m2"), 0.001)
    timeline.send(thing("cm-second", "3", "update", "m2 newer rv 3"), 0.002)
    timeline.run_until(62.0)
    return timeline


def as_measured(writes: list[tuple[float, CloudMessage]]) -> list[list[Any]]:
    return [[at, each.header.msg_id, each.route.resource, each.header.resourceversion] for at, each in writes]


def ack_timeline(vector: Vector, _directory: Path) -> None:
    timeline = retry_timeline()
    # The measurement began to read at 0.013 s what was written at -0.311 s.
    found, expected = as_measured(timeline.written), vector.value["decoded"]
    assert found[0][1:] == expected[0][1:]
    assert [row[1:] for row in found] == [row[1:] for row in expected]
    for row, measured in zip(found[1:], expected[1:], strict=True):
        assert row[0] == pytest.approx(measured[0], abs=0.05)


def ack_after_timeouts(vector: Vector, _directory: Path) -> None:
    timeline = retry_timeline()
    before = len(timeline.written)
    timeline.run_until(64.8, acknowledging=True)
    found = as_measured(timeline.written[before:])
    assert [row[1:] for row in found] == [row[1:] for row in vector.value["decoded"]]
    assert all(row[0] == pytest.approx(64.7, abs=0.05) for row in found)


def keepalive_limit(vector: Vector, _directory: Path) -> None:
    timeline = Timeline(0.0)
    if vector.name.endswith("busy"):
        for second in range(1, 30):
            timeline.run_until(float(second))
            timeline.receive(CloudMessage(Header("m"), Route(operation="upload", group="user", resource="t")), second)
    elif vector.name.endswith("no_conn_use"):
        timeline = Timeline(0.0)
        timeline.hub.connect(2, Peer("edge-c", use=""), now=0.0)
    timeline.run_until(40.0)
    assert [at for at, _ in timeline.dropped] == [pytest.approx(vector.value[0], abs=0.05)] * len(timeline.dropped)
    assert timeline.dropped


def keepalive_of_4(vector: Vector, _directory: Path) -> None:
    timeline = Timeline(0.0, keepalive_seconds=4.0)
    timeline.run_until(2.0)
    for _ in range(50 if vector.name.startswith("tls_identity_nodelimit_authorization_enforced/50") else 1):
        timeline.receive(CloudMessage(route=Route(operation="keepalive")), 2.0)
    timeline.run_until(20.0)
    ((at, _),) = timeline.dropped
    assert at - 2.0 == pytest.approx(vector.value, abs=0.05)


def versions(vector: Vector, _directory: Path) -> None:
    """The row of versions up to the one in question: each acknowledged, as it was when they were measured."""
    steps = [
        ("rv10_insert", thing("v1", "10")),
        ("rv10_again", thing("v1", "10")),
        ("rv9_older", thing("v1", "9", "update")),
        ("rv11_newer", thing("v1", "11", "update")),
        ("no_rv", thing("v1", "")),
        ("ack_required_group_other", thing("v1", "12")),
        ("delete", thing("v1", "11", "delete")),
        ("delete_again", thing("v1", "11", "delete")),
        ("insert_after_delete_same_rv", thing("v1", "11")),
        ("v2_insert", thing("v2", "1")),
        ("ack_required_content_not_k8s_object", thing("v3", "1")),
    ]
    timeline = Timeline(0.0, keepalive_seconds=1000.0)
    name = vector.name.removeprefix("session_and_ordering/")
    for now, (step, sent) in enumerate(steps):
        if step == "ack_required_group_other":
            sent.route.group = "meta"
        if step == "ack_required_content_not_k8s_object":
            sent.content = "text"
        before = len(timeline.written)
        timeline.send(sent, float(now))
        found = [each for _, each in timeline.written[before:]]
        for each in found:
            timeline.acknowledge(each.header.msg_id, float(now))
        if step == name:
            told = [[each.route.resource, each.route.operation, each.header.resourceversion] for each in found]
            assert told == vector.value
            return
        if name == "objectsyncs_after_ack":
            # Kubernetes' ObjectSync objects, as far as the double has them: node, uid and version.
            ((key, _, status),) = vector.value
            (((node, uid), version),) = timeline.hub._acknowledged.items()
            assert (f"{node}.{uid}".replace("edge-b", "edge-e"), str(version)) == (key, status["objectResourceVersion"])
            return
    raise AssertionError(f"no step {name}")


def ack_variant(vector: Vector, _directory: Path) -> None:
    kind = vector.name.split("ack_variant_")[1]
    timeline = Timeline(0.0, keepalive_seconds=1000.0)
    timeline.hub.connect(2, Peer("edge-c"), now=0.0)
    timeline.send(thing(f"ackv-{kind}", id="first"), 0.0)
    timeline.send(thing(f"next-{kind}", id="next"), 0.0)
    ack = CloudMessage(
        Header("x", "first", 1), Route("edgecontroller", "", "resource", "response", "default/x/y"), "OK"
    )
    number = 1
    match kind:
        case "minimal_only_parent_and_operation":
            ack = CloudMessage(Header("x", "first", 1), Route(operation="response"))
        case "content_not_OK":
            ack.content = {"any": 1}
        case "operation_error":
            ack.route.operation = "error"
        case "wrong_parent":
            ack.header.parent_msg_id = "another"
        case "volume_like_resource":
            ack.route.resource = "default/volume/x"
        case "from_another_node":
            number = 2
        case _:
            assert kind in ("plain", "twice")
    timeline.receive(ack, 0.0, number)
    if kind == "twice":
        timeline.receive(ack, 0.0, number)
    timeline.run_until(4.9)
    if not any(each.route.resource.startswith("default/configmap/next") for _, each in timeline.written):
        timeline.run_until(5.0)
        timeline.acknowledge("first", 5.0)
    assert [[at, each.route.resource] for at, each in timeline.written] == vector.value


def query_answer_not_acked(vector: Vector, _directory: Path) -> None:
    timeline = Timeline(0.0, keepalive_seconds=1000.0)
    answer = thing("q1", operation="response")
    answer.header.parent_msg_id = "query"
    timeline.send(answer, 0.0)
    timeline.run_until(10.0)
    found = [
        [at, each.route.operation, each.route.resource, each.header.parent_msg_id == "query"]
        for at, each in timeline.written
    ]
    assert found == vector.value


# --- measured behaviour: on the wire ---------------------------------------------------------------------


async def reconnects(vector: Vector, directory: Path) -> None:
    async with cloud(directory) as sim, AsyncExitStack() as stack:
        for old_end, new_end, is_served, number in vector.value:
            old = await stack.enter_async_context(served(sim))
            new = await stack.enter_async_context(served(sim))
            assert old_end.startswith("EOF")
            assert await old.ends()
            assert new_end is None
            await new.barrier()
            assert (sim.is_served("edge-a"), len(sim.sessions())) == (is_served, number)


async def after_the_last(vector: Vector, directory: Path) -> None:
    async with cloud(directory) as sim:
        async with served(sim):
            pass
        await until(lambda: not sim.sessions(), "the end of the session")
        assert {"limit": sim.config.rules().node_limit, "nodes": [], "number": 0} == vector.value


async def kicked(vector: Vector, directory: Path) -> None:
    async with cloud(directory) as sim, served(sim) as node:
        sim.kick("edge-a")
        assert await node.ends()  # asyncio would raise for an end without close_notify
        assert "no websocket close frame" in vector.value


async def deleted(vector: Vector, directory: Path) -> None:
    async with cloud(directory) as sim, served(sim) as node:
        sim.delete_node("edge-a")
        assert await node.ends()
        assert vector.value[0].startswith("TCP EOF")


async def pong_after_300(vector: Vector, directory: Path) -> None:
    async with cloud(directory) as sim, served(sim) as node:
        await node.send(*(frame(1, message(id=f"m{n}")) for n in range(300)), frame(9, b"sync"))
        assert await node.frame() == (True, 10, b"sync")
        assert [upload.id for upload in sim.uploads()] == [f"m{n}" for n in range(300)]
        assert vector.value["forwarded_when_pong_arrived"] == 300


async def order(vector: Vector, directory: Path) -> None:
    """Strict towards the router; towards the controllers a few change places, in one hub as in the other."""
    count = vector.value["count"]
    is_router = "in_order" in vector.value
    one = message(id="%d") if is_router else message("update", "default/x/y", source="edged", group="meta", id="%d")
    async with cloud(directory, upstream_inversion=0.046, seed=1) as sim, served(sim) as node:
        await node.send(*(frame(1, one.replace(b"%d", b"%d" % n)) for n in range(count)))
        await node.barrier()
        found = [
            int(each.id) for each in sim.messages("router" if is_router else "edgecontroller") if not each.from_hub
        ]
        inversions = sum(first > second for first, second in itertools.pairwise(found))
        assert sorted(found) == list(range(count))
        assert inversions == 0 if is_router else 0 < inversions < 2 * vector.value["inversions"]


async def order_down(vector: Vector, directory: Path) -> None:
    async with cloud(directory) as sim, served(sim) as node:
        for number in range(vector.value["count"]):
            sim.send_command("edge-a", "t", number)
        found = [(await node.message())["content"] for _ in range(vector.value["count"])]
        assert found == list(range(vector.value["count"]))


async def nothing_kept(vector: Vector, directory: Path) -> None:
    """Neither what was sent to an absent node nor what it left unacknowledged comes at its next connection."""
    async with cloud(directory) as sim:
        assert sim.send("edge-a", thing("offline"))["dropped"]
        async with served(sim) as node:
            sim.send("edge-a", thing("unacked"))
            await node.message()
        await until(lambda: not sim.is_served("edge-a"), "the end of the session")
        async with served(sim) as node:
            assert await node.is_quiet()
        assert vector.value == []


async def ok_needs_no_ack(vector: Vector, directory: Path) -> None:
    async with cloud(directory) as sim, served(sim, "edge-e") as node:
        resource, operation, version = vector.value[0]
        down = CloudMessage(
            Header(resourceversion=version), Route("edgecontroller", "", "resource", operation, resource), "OK"
        )
        assert sim.send("edge-e", down)["queue"] == "no-ack"
        assert (await node.message())["route"]["resource"] == resource


async def upgraded(vector: Vector, directory: Path) -> None:
    """What a request is answered, and under which name a session begins."""
    name = vector.name.removeprefix("session_and_ordering/")
    headers, path = {"node_id": "edge-e", "ConnectionUse": "msg"}, "/p/edge-e/events"
    match name:
        case "hs_origin_header_foreign":
            headers["Origin"] = "https://elsewhere.example"
        case "hs_path_other":
            path = "/any/thing"
        case "hs_path_root":
            path = "/"
        case "hs_path_double_slash":
            path = "//edge-e/events"
        case "hs_no_node_id":
            del headers["node_id"]
        case _:
            headers["ConnectionUse"] = "str"
    status, sessions, after = vector.value
    async with cloud(directory) as sim, raw(sim, "edge-e") as node:
        assert (await node.request(upgrade_text(headers, path))).split("\r\n")[0] == status
        assert [session["node"] for session in sim.sessions()] == sessions
        if not sessions:
            await node.reader.read(4096)  # the refusal's body
        assert after == ["nothing, still open"]
        assert await node.is_quiet()


def no_extension(vector: Vector, _directory: Path) -> None:
    offered = {"Sec-WebSocket-Extensions": "permessage-deflate", "Sec-WebSocket-Protocol": "chat"}
    request = handshake.parse_request(upgrade_text(offered).encode().removesuffix(b"\r\n\r\n"))
    found = handshake.answer(request, "").data.decode().split("\r\n")
    assert found[:3] == vector.value.split("\r\n")[:3]
    assert len(found) == len(vector.value.split("\r\n")) + 2


def plain_get(vector: Vector, _directory: Path) -> None:
    date = "Mon, 23 Nov 2026 17:04:42 GMT"
    request = handshake.parse_request(b"GET / HTTP/1.1\r\nHost: h")
    assert handshake.answer(request, date).data.decode() == vector.value


async def alpn(vector: Vector, directory: Path) -> None:
    offered = ["h2", "http/1.1"] if "h2" in vector.name else ["http/1.1"]
    async with cloud(directory) as sim, raw(sim, "edge-a", alpn=offered) as node:
        assert node.writer.get_extra_info("ssl_object").selected_alpn_protocol() == vector.value


async def identity(vector: Vector, directory: Path) -> None:
    """A certificate of some kind: the alert it gets, or what becomes of the connection and its messages."""
    words = vector.name.split("/", 1)[1].split(" ", 1)
    kind, _, version = words[1].rpartition(" ") if words[1].endswith(("1.2", "1.3")) else (words[1], "", "tls1.3")
    kind = kind.removeprefix("cert=")
    claimed = "edge-b" if "node_id of another node" in kind else "edge-a"
    async with cloud(directory, enforce_authorization=words[0] == "auth_enforce") as sim:
        context = odd_context(sim, directory, kind, ssl.TLSVersion.TLSv1_2 if version == "tls1.2" else None)
        failure = vector.value[-1] if isinstance(vector.value[-1], str) else ""
        if failure:
            reason = await tls_failure(sim, context)
            if kind in ("not_yet", "server_eku"):
                # OpenSSL has alerts of its own for these two (docs/cloudsim.md, differences).
                assert "ALERT" in reason
            else:
                assert f"[SSL: {reason}]" in failure.replace("TLSV1_ALERT_HANDSHAKE", "SSLV3_ALERT_HANDSHAKE")
            return
        node = await RawNode.connect(sim, context)
        try:
            await node.upgrade(claimed)
            await node.send(
                frame(1, message(resource="authprobe")),
                frame(1, message("update", f"default/nodestatus/{claimed}", source="edged", group="meta")),
                frame(1, message("query", "k8s/ca.crt", source="metamanager", group="meta")),
                frame(9, b"z"),
            )
            _, _, reactions, outcome = vector.value
            for _ in range(2 if outcome["sessions"] else 1):
                _, opcode, _ = await node.frame()
                assert opcode in (1, 10)
            assert await node.is_quiet()
            assert "pong fin=1 len=1 b'z'" in reactions
            assert [each["node"] for each in sim.sessions() if each["state"] == "served"] == outcome["sessions"]
            forwarded = [[module, found["route"]["resource"]] for module, found in seen(sim, claimed)]
            assert sorted(forwarded) == sorted(outcome["forwarded"])
        finally:
            await node.aclose()


async def openssl(vector: Vector, directory: Path) -> None:
    """The same program that measured the hub: which versions and suites the port takes."""
    async with cloud(directory) as sim:
        pair = sim.certificate("edge-a")
        options = vector.name.split("openssl ", 1)[1].split(" ")
        if "-tls1_1" in options:
            options += ["-cipher", "ALL:@SECLEVEL=0"]
        process = await asyncio.create_subprocess_exec(
            *("openssl", "s_client", "-connect", f"127.0.0.1:{sim.port}", "-CAfile", str(sim.ca.certificate)),
            *("-cert", str(pair.certificate), "-key", str(pair.key), *options),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output = (await process.communicate())[0].decode()
    expected = next(line for line in vector.value if line.startswith("New, "))
    if options == ["-tls1_3"]:
        # Of the suites that both sides have, OpenSSL picks another than Go does.
        expected = expected.partition("TLS_AES")[0]
    assert expected in output
    for line in vector.value:
        if "alert" in line:
            assert line.split("alert", 1)[1].split(":")[0] in output


async def strict(vector: Vector, directory: Path) -> None:
    async with cloud(directory) as sim:
        context = client_context(sim, "edge-a")
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(sim.ca.certificate)
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        assert "101" in await tls_failure(sim, context)
        assert vector.value == "ok"


async def wrong_host(vector: Vector, directory: Path) -> None:
    async with cloud(directory) as sim:
        context = ssl.create_default_context(cafile=str(sim.ca.certificate))
        pair = sim.certificate("edge-a")
        context.load_cert_chain(pair.certificate, pair.key)
        with pytest.raises(ssl.SSLCertVerificationError) as failure:
            await asyncio.open_connection("127.0.0.1", sim.port, ssl=context, server_hostname="not-in-san")
        assert failure.value.verify_message in vector.value


async def over_the_limit(vector: Vector, directory: Path) -> None:
    async with cloud(directory, node_limit=2) as sim, served(sim) as first, served(sim, "edge-b"):
        name = "edge-a" if "reconnect" in vector.name else "edge-c"
        async with served(sim, name) as node:
            await node.send(frame(1, message(resource="limitprobe")), frame(9, b"q"))
            assert await node.frame() == (True, 10, b"q")
            sim.send_command("edge-c", "t", "x")
            assert await node.is_quiet()
            nodes = [each["node"] for each in sim.sessions() if each["state"] == "served"]
            told = vector.value if isinstance(vector.value, dict) else {}
            assert {"limit": 2, "nodes": nodes, "number": len(nodes)} == told.get(
                "sessions", {"limit": 2, "nodes": ["edge-a", "edge-b"], "number": 2}
            )
            if "forwarded" in told:
                assert [found["route"]["resource"] for _, found in seen(sim, name)] == told["forwarded"]
            await first.barrier()


async def huge_up(vector: Vector, directory: Path) -> None:
    content = "x" * vector.value["got"]
    async with cloud(directory) as sim, served(sim) as node:
        await node.send(
            frame(1, encode(model({"route": {"operation": "upload", "group": "user"}, "content": content})))
        )
        await node.send(frame(9, b"b"))
        assert await node.frame() == (True, 10, b"b")
        assert len(sim.uploads()[0].payload) > vector.value["got"]


async def huge_down(vector: Vector, directory: Path) -> None:
    async with cloud(directory) as sim, served(sim) as node:
        sim.send_command("edge-a", "t", "x" * vector.value["got"])
        final, opcode, payload = await node.frame()
        assert (final, opcode) == (False, 1)
        assert payload.count(b"x") >= vector.value["got"]
        assert await node.frame() == (True, 0, b"")


def race(vector: Vector, _directory: Path) -> None:
    """The share of reconnects that take the new connection along, by the default of the rules."""
    hub = Hub(rules=HubRules(node_limit=10), new_id=lambda: "id", chance=random.Random(3))
    killed, count = 0, 3000
    hub.connect(0, Peer("edge-a"), now=0.0)
    for number in range(1, count + 1):
        killed += Drop(number, "lost the race with the connection it replaced") in hub.connect(
            number, Peer("edge-a"), now=0.0
        )
        if not hub.is_served("edge-a"):
            hub.connect(-number, Peer("edge-a"), now=0.0)
    measured = [int(word) for word in vector.value.split(" of ")]
    assert killed / count == pytest.approx(measured[0] / measured[1], abs=0.015)


async def boundaries(vector: Vector, directory: Path) -> None:
    async with cloud(directory) as sim, served(sim) as node:
        for size, expected in vector.value:
            empty = len(encode(CloudMessage(Header("id", timestamp=1), Route(group="user", resource="t"), "")))
            down = CloudMessage(Header("id", timestamp=1), Route(group="user", resource="t"), "x" * (size - empty))
            sim.send("edge-a", down)
            found = []
            for _ in expected:
                final, opcode, payload = await node.frame()
                found.append([int(final), {1: "text", 0: "continuation"}[opcode], len(payload)])
            assert found == expected


async def zombie(vector: Vector, directory: Path) -> None:
    """What a rejected connection answers, and what it does not."""
    async with cloud(directory, node_limit=0, keepalive_seconds=0.1) as sim, served(sim) as node:
        await node.send(
            frame(1, message("query", "k8s/ca.crt", source="metamanager", group="meta")),
            frame(1, message("query", "default/node/edge-a", source="edged", group="meta")),
            frame(1, message("ping", "r", source="s", group="g", id="c1")),
        )
        assert without_chance(await node.message()) == without_chance(vector.value["control_ping"])
        await node.barrier()
        await asyncio.sleep(0.25)  # time for an answer to come, if there were one
        await node.barrier()
        assert (vector.value["k8s_ca_query"], vector.value["own_node_query"]) == (None, None)


async def ca_with_session(vector: Vector, directory: Path) -> None:
    async with cloud(directory) as sim, served(sim) as node:
        await node.send(frame(1, message("query", "k8s/ca.crt", source="metamanager", group="meta", id="asked")))
        answer = await node.message()
        if isinstance(vector.value, dict):
            assert answer["route"] == vector.value["route"]
            assert set(answer["header"]) == set(vector.value["header"])
            assert answer["content"].startswith(vector.value["content_first"])
        else:
            assert sim.sessions()[0]["in_flight"] is None
            assert await node.is_quiet()


ADMISSION: dict[str, tuple[str, str, str, str]] = {
    "own nodestatus update": ("update", "default/nodestatus/edge-c", "edged", "meta"),
    "other nodestatus update": ("update", "default/nodestatus/edge-b", "edged", "meta"),
    "query unrelated configmap": ("query", "default/configmap/unrelated", "edged", "meta"),
    "query unrelated secret": ("query", "default/secret/unrelated", "edged", "meta"),
    "own node query": ("query", "default/node/edge-c", "edged", "meta"),
    "other node query": ("query", "default/node/edge-b", "edged", "meta"),
    "own lease insert": ("insert", "kube-node-lease/lease/edge-c", "edged", "meta"),
    "other lease insert": ("insert", "kube-node-lease/lease/edge-b", "edged", "meta"),
    "event insert": ("insert", "default/event/e", "edged", "meta"),
    "pod status list": ("update", "default/podstatus", "edged", "meta"),
    "pod query": ("query", "default/pod/p", "edged", "meta"),
    "unknown type": ("query", "default/unknowntype/x", "edged", "meta"),
    "unknown operation": ("unknown", "default/configmap/c", "edged", "meta"),
    "user upload": ("upload", "a/b", "eventbus", "user"),
    "twin source": ("update", "device/d/twin/edge_updated", "twin", "resource"),
    "metaserver source": ("x", "x", "metaserver", "resource"),
    "k8s ca": ("query", "k8s/ca.crt", "metamanager", "meta"),
}
"Operation, resource, source and group of what was sent."


async def admission(vector: Vector, directory: Path) -> None:
    operation, resource, source, group = ADMISSION[vector.name.split("/admit ")[1]]
    async with cloud(directory, enforce_authorization=True) as sim, served(sim, "edge-c") as node:
        await node.send(frame(1, message(operation, resource, source=source, group=group)))
        if resource == "k8s/ca.crt":
            assert (await node.message())["route"]["source"] == "cloudhub"
        await node.barrier()
        assert [[module, found["route"]["resource"]] for module, found in seen(sim, "edge-c")] == vector.value


# --- which check is for what -----------------------------------------------------------------------------

Check = Callable[[Vector, Path], Awaitable[None] | None]

CHECKS: dict[str, Callable[[Vector, Path], Any]] = {
    "ws_handshake": handshake_vector,
    "ws_anomalies": anomaly,
    "ws_upstream_forwarding": forwarding,
    "ws_session": session_entry,
    "ws_large_and_fragmented": large,
    "message_json": message_form,
    "quic_framing": framing,
    "quic_live_sessions": live_session,
}

_SESSION = "session_and_ordering/"
_ENFORCED = "tls_identity_nodelimit_authorization_enforced/"
_OFF = "tls_and_identity_authorization_off/"
_LARGE = "ack_variants_large_messages_reconnect_race/"
_ZOMBIES = "fragmentation_boundaries_and_zombie_probes/"

MEASURED: dict[str, Callable[[Vector, Path], Any]] = {
    "ack_retry_timeline": ack_timeline,
    "ack_after_timeouts": ack_after_timeouts,
    f"{_SESSION}reconnect_same_node(old,new,session_present,number)": reconnects,
    f"{_SESSION}sessions_after": after_the_last,
    f"{_SESSION}kick_eof": kicked,
    f"{_SESSION}node_delete": deleted,
    f"{_SESSION}pong_after_300": pong_after_300,
    f"{_SESSION}order_to_group": order,
    f"{_SESSION}order_to_router": order,
    f"{_SESSION}down_order_noack": order_down,
    f"{_SESSION}offline_messages_delivered_on_connect": nothing_kept,
    f"{_SESSION}response_OK": ok_needs_no_ack,
    f"{_SESSION}extensions_offered": no_extension,
    f"{_SESSION}plain_get": plain_get,
    f"{_OFF}python VERIFY_X509_STRICT": strict,
    f"{_OFF}hostname mismatch": wrong_host,
    f"{_ENFORCED}third node at nodelimit 2": over_the_limit,
    f"{_ENFORCED}downstream to a node over the limit": over_the_limit,
    f"{_ENFORCED}reconnect of edge-a while at the limit": over_the_limit,
    f"{_ENFORCED}keepalive4 closed after last keepalive": keepalive_of_4,
    f"{_ENFORCED}50 keepalives at once then silence: closed after": keepalive_of_4,
    f"{_LARGE}upstream_8MiB_single_frame": huge_up,
    f"{_LARGE}upstream_64MiB_single_frame": huge_up,
    f"{_LARGE}downstream_64MiB": huge_down,
    f"{_LARGE}query_response_not_acked": query_answer_not_acked,
    f"{_LARGE}unacked_before_disconnect_resent_after_reconnect": nothing_kept,
    f"{_LARGE}reconnect_race_new_connection_killed": race,
    f"{_ZOMBIES}hub_fragmentation_boundaries(payload_len, frames)": boundaries,
    f"{_ZOMBIES}zombie_probes": zombie,
    f"{_ZOMBIES}k8s_ca_probe_with_session": ca_with_session,
    f"{_ZOMBIES}k8s_ca_answer_repeated_without_ack": ca_with_session,
}
PREFIXES: dict[str, Callable[[Vector, Path], Any]] = {
    "keepalive/": keepalive_limit,
    f"{_SESSION}hs_": upgraded,
    f"{_SESSION}alpn_": alpn,
    f"{_OFF}auth_off ": identity,
    f"{_OFF}openssl ": openssl,
    f"{_ENFORCED}auth_enforce ": identity,
    f"{_LARGE}ack_variant_": ack_variant,
    "message_admission_with_authorization_enforced/admit ": admission,
}


def _measured(name: str) -> Callable[[Vector, Path], Any]:
    """The check of a row. What has none is one of the versions."""
    if name in MEASURED:
        return MEASURED[name]
    return next((check for prefix, check in PREFIXES.items() if name.startswith(prefix)), versions)
