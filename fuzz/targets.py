"""The targets: one function for each decoder of bytes from outside.

A function asserts more than that nothing breaks where it can: that it does not matter how the network cuts the bytes,
that what was read is written back alike, that two readers of the same thing agree.
"""

from __future__ import annotations

import base64
import json
import os
import sqlite3
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from cloudsim import frames as cloud_frames
from cloudsim import handshake, wire
from cloudsim.certificate_api import ApiRequest, CertificateApi, token_refusal
from cloudsim.certificates import Authority
from fuzz import seeds
from fuzz.target import TARGETS, pieces, target
from modules.edgehub import certificate, cloud, dispatch, store
from modules.edgehub.dialect import DIALECTS
from modules.edgehub.frames import FrameFault, FrameReader
from modules.eventbus import bridge, subscriptions, topics
from modules.eventbus.packets import MalformedPacket, PacketReader
from runtime import config, edgecore, emp, enrolment, viaduct
from runtime.access import Credentials
from runtime.cli import settings
from runtime.client_core import ClientCore
from runtime.edge2019 import CLOUDS, convert
from runtime.emp import Priority
from runtime.errors import ConfigError, InvalidMessage, MalformedFrame, MalformedMessage, NotEnrolled
from runtime.http_answer import Answer, AnswerReader, MalformedAnswer
from runtime.ledger import UnreadableOutbox, read_outbox
from runtime.message import (
    Message,
    decode_batch,
    encode_message,
    from_cloud_json,
    join_batch,
    split_batch,
    to_cloud_json,
)
from runtime.proxy import ConnectAnswer, Proxy, ProxyRefused
from runtime.routing import BrokerLimits, RoutingCore

__all__ = ["TARGETS"]

T = TypeVar("T")

NOW: Final = 1_795_453_075.0
TOKEN: Final = enrolment.Token("ab" * 32, "a.b.c", None)
MAX_MESSAGE: Final = 4096
"Of the readers under test: small, so that the limit is met."
MAX_DEPTH: Final = 512
"runtime.edgehub.maxContentDepth."


# --- websocket ----------------------------------------------------------------------------------------


@target(
    seeds.frames_from_cloud, tokens=(b"\x81\x7e\x0c\x77", b"\x01\x7f", b"\x80\x00", b"\x89\x00", b"\x88\x02\x03\xe8")
)
def websocket_from_cloud(data: bytes) -> None:
    """edgehub's reader of websocket frames."""

    def read(parts: Sequence[bytes]) -> list[Any]:
        reader, events = FrameReader(MAX_MESSAGE), []
        try:
            for part in parts:
                events += reader.receive(part)
                assert reader.held_bytes <= MAX_MESSAGE + len(part) + 14
        except FrameFault as fault:
            return [*events, *fault.events, str(fault)]
        return events

    assert read([data]) == read(list(pieces(data)))


@target(seeds.frames_to_cloud, tokens=(b"\x81\xfe\x0c\x77", b"\x01\xff", b"\x80\x80", b"\x89\x80", b"\x88\x82"))
def websocket_to_cloud(data: bytes) -> None:
    """cloudsim's reader of websocket frames."""

    def read(parts: Sequence[bytes]) -> list[Any]:
        reader, events = cloud_frames.FrameReader(MAX_MESSAGE), []
        for part in parts:
            events += reader.feed(part)
        return events

    assert read([data]) == read(list(pieces(data)))


_JSON_TOKENS: Final = (
    b'"header":',
    b'"route":',
    b'"content":',
    b'"msg_id":',
    b"\\ud800",
    b"[[",
    b"{}",
    b"1e999",
    b"null",
)


@target(seeds.cloud_json, MalformedMessage, InvalidMessage, tokens=_JSON_TOKENS)
def json_from_cloud(data: bytes) -> None:
    """A message from the cloud, as far as edgehub looks at it."""
    message = from_cloud_json(data)
    judge(message)
    again = from_cloud_json(to_cloud_json(message))
    assert again == msgspec.structs.replace(message, sync=False)


def judge(message: Message) -> None:
    """All that edgehub asks about a message from the cloud before it hands it on, and the ack."""
    for dialect in DIALECTS.values():
        dispatch.destination(message, dialect)
    cloud.proves_session(message)
    cloud.is_signal(message, Priority.DATA)
    if cloud.wants_ack(message):
        with suppress(InvalidMessage):
            viaduct.decode_message(viaduct.encode_message(cloud.ack(message)))
        from_cloud_json(cloud.encode_up(cloud.ack(message), MAX_DEPTH))


@target(seeds.cloud_json, wire.Undecodable, tokens=_JSON_TOKENS)
def json_to_cloud(data: bytes) -> None:
    """cloudsim's two ways of reading JSON as Go reads it; where the strict one does, the tolerant one agrees."""
    message = wire.decode(data)
    if not _repeats_keys(data):  # docs/cloudsim.md, differences
        with suppress(wire.Undecodable):  # numbers of 309 digits
            assert wire.decode_as_go(data) == message
    assert wire.decode(wire.encode(message)) == message
    wire.seen_in_cloud(message.content)


def _repeats_keys(data: bytes) -> bool:
    """Whether an object in a JSON text has a key twice."""
    found = False

    def look(pairs: list[tuple[str, Any]]) -> None:
        nonlocal found
        found |= len({key for key, _ in pairs}) < len(pairs)

    with suppress(ValueError, RecursionError):
        json.JSONDecoder(object_pairs_hook=look).raw_decode(data.decode("utf-8", "replace").lstrip(" \t\r\n"))
    return found


@target(seeds.json_content, InvalidMessage, tokens=_JSON_TOKENS)
def json_content(data: bytes) -> None:
    """JSON content of a module: what edgehub lets go up, the cloud can read."""
    text = cloud.encode_up(Message(id="m", content=data), MAX_DEPTH)
    try:
        wire.decode_as_go(text)
    except wire.Undecodable as fault:
        raise AssertionError("would cut the link") from fault


# --- QUIC ---------------------------------------------------------------------------------------------


@target(seeds.viaduct_streams, tokens=(b"msg", b"str", b"\x01\x01\x01\x00\x01\x00\x00\x00\x00"))
def viaduct_stream(data: bytes) -> None:
    """The reader of packages on a QUIC stream."""

    def read(parts: Sequence[bytes]) -> list[Any]:
        reader, packages = viaduct.PackageReader(MAX_MESSAGE, has_use_type=True), []
        try:
            for part in parts:
                packages += reader.receive(part)
        except viaduct.ViaductFault as fault:
            return [*packages, *fault.packages, type(fault)]
        return packages

    assert read([data]) == read(list(pieces(data)))


@target(seeds.viaduct_messages, MalformedMessage, tokens=(b"\x0a\x00\x12\x00", b"\x1a", b"\x18\x80"))
def viaduct_message(data: bytes) -> None:
    """The protobuf message in a package, and the headers that it may carry."""
    message = viaduct.decode_message(data)
    assert viaduct.decode_message(viaduct.encode_message(message)) == msgspec.structs.replace(message, type="")
    message = cloud.with_kind(message)
    judge(message)
    bridge.read_command(message, node="edge-1")
    viaduct.headers_of(message)


# --- HTTP ---------------------------------------------------------------------------------------------


@target(
    seeds.http_answers,
    MalformedAnswer,
    NotEnrolled,
    tokens=(b"\r\n\r\n", b"HTTP/1.1 200 \r\n", b"Content-Length: ", b"Transfer-Encoding: chunked\r\n", b"\r\n0\r\n"),
)
def certificate_answer(data: bytes) -> None:
    """An answer of the certificate API, up to what it means."""
    answer = _answer([data[at : at + 4096] for at in range(0, len(data), 4096)])
    assert _or_refusal(lambda: _answer(list(pieces(data))), MalformedAnswer) == answer
    enrolment.check_clock(answer.headers.get("date"), NOW)
    for token in (None, TOKEN):
        with suppress(NotEnrolled):
            enrolment.judge_certificate(answer, "cloud:10002", node_name="edge-1", token=token, now=NOW)
    enrolment.judge_ca(answer, TOKEN, "cloud:10002")


def _answer(parts: Sequence[bytes]) -> Answer:
    reader = AnswerReader()
    for part in parts:
        answer = reader.feed(part)
        if answer is not None:
            return answer
    return reader.end()


def _or_refusal(read: Callable[[], T], refusal: type[Exception]) -> T | Exception:
    try:
        return read()
    except refusal as fault:
        return fault


@target(seeds.proxy_answers, ProxyRefused, tokens=(b"\r\n\r\n", b"HTTP/1.1 100 \r\n\r\n", b"HTTP/1.1 200 "))
def proxy_answer(data: bytes) -> None:
    """A proxy's answer to CONNECT."""
    reader = ConnectAnswer(Proxy("proxy", 3128, user="u", password="secret"))
    try:
        if not any(reader.receive(part) for part in pieces(data)):
            raise reader.end()
    except ProxyRefused as fault:
        if "secret" in str(fault):
            raise AssertionError("the password is told") from fault
        raise


@target(seeds.upgrade_requests, handshake.BadRequest, tokens=(b"Connection: upgrade\r\n", b"Origin: http://[", b"//"))
def request_to_cloud(data: bytes) -> None:
    """cloudsim's reading of an HTTP request, on both of its ports."""
    request = handshake.parse_request(data)
    handshake.answer(request, "Mon, 23 Nov 2026 21:00:00 GMT")
    certificate_ = seeds.certificate() if request.header("x-certificate") else None
    _certificate_api().answer(ApiRequest(request.method, request.target, request.headers, data, certificate_), now=NOW)


@cache
def _authority() -> Authority:
    with tempfile.TemporaryDirectory() as directory:
        return Authority(Path(directory))


@cache
def _certificate_api() -> CertificateApi:
    return CertificateApi(_authority(), lambda name: name == "edge-1")


@target(seeds.tokens, NotEnrolled, tokens=(b"eyJ", b"W10", b"e30", b".", b"Bearer "))
def token(data: bytes) -> None:
    """A token for joining, as the edge and as the cloud reads it: as it stands, and made of JSON in lines."""
    text = data.decode("latin-1")
    now = datetime.fromtimestamp(NOW, UTC)
    token_refusal(text, b"key", now)
    if data[:1] == b"{":
        lines = [base64.urlsafe_b64encode(line).rstrip(b"=").decode() for line in data.split(b"\n", 2)]
        jwt = ".".join([*lines, "", ""][:3])
        token_refusal(f"Bearer {jwt}", b"key", now)
        text = f"{'ab' * 32}.{jwt}"
    parsed = enrolment.parse_token(text)
    rejected = Answer(401, "Unauthorized", {}, b"token is expired")
    enrolment.judge_certificate(rejected, "cloud:10002", node_name="edge-1", token=parsed, now=NOW)


# --- the bus ------------------------------------------------------------------------------------------


@target(seeds.emp_frames, MalformedFrame, MalformedMessage, tokens=tuple(sorted(emp.VERBS)))
def emp_frames(data: bytes) -> None:
    """Frames from a module or from the broker, and the batch in them."""
    verb, header, body = emp.decode(split_frames(data))
    assert emp.decode(emp.encode(verb, header, body)) == (verb, header, body)
    if body is not None:
        decode_batch(body)


def split_frames(data: bytes) -> list[bytes]:
    """Undoes `seeds.join_frames`; total."""
    frames: list[bytes] = []
    at = 0
    while at < len(data) and len(frames) < 5:
        size = int.from_bytes(data[at : at + 2], "big")
        frames.append(data[at + 2 : at + 2 + size])
        at += 2 + size
    return frames


@target(seeds.conversations_with_the_broker, tokens=tuple(sorted(emp.VERBS)))
def broker_core(data: bytes) -> None:
    """What several peers say to the broker's core."""
    core = RoutingCore(
        epoch=bytes(emp.EPOCH_BYTES),
        session_base=seeds.SESSION,
        clock_ms=1000,
        now=0.0,
        limits=BrokerLimits(limits=emp.Limits(MAX_MESSAGE, 50, 2**16), grace_seconds=0.0),
        declared={"alpha": ["g"]},
    )
    now = 0.0
    for peer, frames in steps(data):
        address = (0, bytes((peer & 3,)))
        if frames:
            core.receive(address, frames, now, Credentials(0, 0, 1 + (peer & 3)))
        elif peer >= 0x80:
            now += 0.5
            core.expire(now)
        else:
            core.lost(address, now)
        for out in core.flush(now):
            emp.decode(out.frames)
        held = core.statistics(now)["broker"]
        assert held["messages_held"] >= 0
        assert held["bytes_held"] >= 0


@target(seeds.conversations_with_a_module, tokens=tuple(sorted(emp.VERBS)))
def module_core(data: bytes) -> None:
    """What a broker says to a module's core, which has something to send."""
    core = ClientCore("module", incarnation=b"m" * emp.INCARNATION_BYTES, liveness_seconds=2.0)
    now = 0.0
    core.connected(now)
    for _, frames in steps(data):
        if frames:
            core.receive(frames, now)
        else:
            now += 0.5
            core.expire(now)
        lane = core.lane("beta", 3)
        if core.has_room(lane, 10) and len(core.lanes) < 10:
            core.put(lane, encode_message(Message(id="m")))
        core.flush(now)
        for out in core.out:
            emp.decode(out)
        core.out.clear()
        core.events.clear()


def steps(data: bytes) -> Iterator[tuple[int, list[bytes]]]:
    """The steps of a conversation; total."""
    at = 0
    while at + 2 <= len(data):
        peer, count = data[at], data[at + 1] & 3
        at += 2
        frames: list[bytes] = []
        for _ in range(count):
            size = int.from_bytes(data[at : at + 2], "big")
            frames.append(data[at + 2 : at + 2 + size])
            at += 2 + size
        yield peer, frames


@target(seeds.batches, MalformedMessage, tokens=(b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\x9d"))
def message_batch(data: bytes) -> None:
    """A batch of messages; taken apart, each part is the message it was."""
    messages = decode_batch(data)
    for index in (0, len(messages) - 1):
        if messages:
            alone = split_batch(data, index)
            assert alone is not None
            assert decode_batch(alone) == [messages[index]]
    assert split_batch(data, len(messages)) is None
    encode = msgspec.msgpack.encode
    assert decode_batch(join_batch([encode(message) for message in messages])) == messages
    for message in messages:
        bridge.read_command(message, node="edge-1")
        with suppress(InvalidMessage):
            cloud.encode_up(message, MAX_DEPTH)


# --- MQTT ---------------------------------------------------------------------------------------------


@target(seeds.mqtt_packets, tokens=(b"\x32", b"\xff\xff\xff\x7f", b"\x00\x03a/b"))
def mqtt_packets(data: bytes) -> None:
    """What an MQTT broker sends. The first byte chooses the version."""

    def read(parts: Sequence[bytes]) -> list[Any]:
        reader = PacketReader(is_mqtt5=data[:1] > b"\x7f", limit_bytes=MAX_MESSAGE)
        packets: list[Any] = []
        try:
            for part in parts:
                reader.feed(part)
                while (packet := reader.next()) is not None:
                    packets.append(packet)
        except MalformedPacket as fault:
            packets.append(str(fault))
        return packets

    assert read([data[1:]]) == read(list(pieces(data[1:])))


@target(seeds.mqtt_topics, ValueError, tokens=(b"$hw/events/", b"$share/", b"+", b"#", b"/"))
def mqtt_topics(data: bytes) -> None:
    """A topic and, after a line feed, a filter."""
    topic, _, topic_filter = data.decode("utf-8", "surrogateescape").partition("\n")
    if topics.is_topic(topic):
        for semantics in topics.Semantics:
            topics.route(topic, semantics)
        assert topics.decode_topic(topics.encode_topic(topic)) == topic
        if topics.is_filter(topic_filter):
            topics.matches(topic_filter, topic)
        assert topics.matches("#", topic) != topic.startswith("$")
    topics.decode_topic(topic_filter)


@target(seeds.subscription_files, subscriptions.DamagedStore, tokens=(b'"wanted":', b'["'))
def subscription_file(data: bytes) -> None:
    """The file in which eventbus keeps what the cloud subscribed."""
    snapshot = subscriptions.decode(data)
    assert subscriptions.decode(subscriptions.encode(snapshot)) == snapshot


# --- configuration ------------------------------------------------------------------------------------


@target(
    seeds.edgecore_files, ConfigError, tokens=(b"*a", b"&a ", b"<<: ", b"!!python/object", b"modules:", b"runtime:")
)
def edgecore_yaml(data: bytes) -> None:
    """The configuration file."""
    node, _ = settings.read(_file(data))
    assert msgspec.json.decode(msgspec.json.encode(node), type=config.NodeConfig) == node


@target(seeds.edge_2019_files, ConfigError, tokens=(b"*a", b"&a ", b"mqtt:", b"edgehub:", b"wss://"))
def edge_2019_yaml(data: bytes) -> None:
    """The configuration file of 2019, and what is made of it."""
    for cloud_age in CLOUDS:
        imported = convert(settings.parse(_file(data)), cloud=cloud_age)
        edgecore.from_edgecore(imported.document)


@target(seeds.node_files, ConfigError)
def node_json(data: bytes) -> None:
    """run/node.json, which the processes read."""
    home = _directory() / "run"
    home.mkdir(exist_ok=True)
    (home / "node.json").write_bytes(data)
    config.load(_directory())


@cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    return tempfile.TemporaryDirectory(prefix="edgezmq-fuzz-", dir=memory)


def _directory() -> Path:
    return Path(_scratch().name)


def _file(data: bytes) -> Path:
    path = _directory() / "input"
    path.write_bytes(data)
    return path


# --- files of ours ------------------------------------------------------------------------------------


@target(
    seeds.certificates, certificate.MalformedCertificate, tokens=(b"\x30\x82", b"\x17\x0d", b"\x06\x03\x55\x04\x03")
)
def certificate_der(data: bytes) -> None:
    """edgehub's own reading of a certificate."""
    certificate.parse(data)


@target(seeds.damages, sqlite3.DatabaseError)
def outbox_file(data: bytes) -> None:
    """An outbox file in which bytes were changed: it is read, or said to be damaged, and nothing else."""
    damaged = bytearray(seeds.outbox())
    for at in range(0, len(data) - 3, 4):
        damaged[int.from_bytes(data[at : at + 3], "big") % len(damaged)] = data[at + 3]
    path = _file(bytes(damaged))
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    with suppress(UnreadableOutbox):
        read_outbox(path)
    use_outbox(path, boot="next")


def use_outbox(path: Path, boot: str) -> None:
    """All that edgehub does with a file that it finds."""
    file = store.OutboxFile(path, boot_id=boot, now=2.0)
    try:
        for kind in range(len(store.CLASSES)):
            extent = file.extent(kind)
            file.account(kind)
            for row in file.read(kind, extent.first - 1, max_messages=1024, max_bytes=2**20):
                assert isinstance(row.sender, str)
                assert isinstance(row.payload, bytes)
            file.last_older_than(kind, 0.5, 3.0)
            file.upto_bytes(kind, 20)
        file.parked()
        file.parked_of()
        for owner in file.known_owners() | {"twin"}:
            file.first_parked(owner)
        seeds.park(file)
        file.ledger()
        with file.transaction():
            file.add(1, [store.Row(extent.last + 1, "sensor", b"{}")], 3.0)
            file.replace(1, 4, "sensor", b"{}", "superseded")
            file.delete(1, 3)
            file.drop(1, 4, "age", 5)
    finally:
        file.close()
