"""What fuzzing begins with: the recorded vectors, and samples of what has no vectors."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Final

from modules.edgehub.store import OutboxFile, Row
from runtime import emp
from runtime.message import Message, encode_message, join_batch

ROOT: Final = Path(__file__).parents[1]
VECTORS: Final = ROOT / "tests" / "vectors" / "cloudlink"


@cache
def vectors(name: str) -> list[dict[str, Any]]:
    return list(json.loads((VECTORS / f"{name}.json").read_text())["vectors"])


def nothing() -> Iterator[bytes]:
    yield b""


# --- websocket ----------------------------------------------------------------------------------------


def frames_to_cloud() -> Iterator[bytes]:
    for vector in vectors("ws_anomalies"):
        yield bytes.fromhex(vector["sent_frames_hex"])
    yield from _session("edge->cloud")


def frames_from_cloud() -> Iterator[bytes]:
    yield from _session("cloud->edge")
    yield b"".join(_session("cloud->edge"))
    yield b"\x01\x02ab\x80\x00\x89\x01x\x88\x02\x03\xe8"  # fragments, a ping, a close


def _session(direction: str) -> Iterator[bytes]:
    for vector in vectors("ws_session"):
        if vector["direction"] == direction:
            yield bytes.fromhex(vector["frame_hex"])


def cloud_json() -> Iterator[bytes]:
    for vector in vectors("message_json") + vectors("ws_upstream_forwarding"):
        if vector["raw_text"] is not None:
            yield vector["raw_text"].encode()
    for vector in vectors("ws_anomalies"):
        for payload in vector["sent_payloads"] or ():
            if isinstance(payload, list) and isinstance(payload[-1], str):
                yield payload[-1].encode("utf-8", "surrogatepass")

    for depth in (400, 600, 880):
        yield b'{"x":1,"content":' + b"[" * depth + b"]" * depth + b"}"
    yield b'{"header":{"msg_id":"a"},"header":{"timestamp":1}}'


def json_content() -> Iterator[bytes]:
    for vector in vectors("message_json"):
        yield json.dumps(json.loads(vector["raw_text"])["content"]).encode()
    yield from (b"null", b"1e308", b"-0.0", b'"\\ud83d\\ude00"', b"[[[[1]]]]", b'{"a":{"b":[true,false,null]}}')


def upgrade_requests() -> Iterator[bytes]:
    for vector in vectors("ws_handshake"):
        if vector["direction"] == "edge->cloud":
            yield vector["raw_text"].encode()
    for vector in vectors("bootstrap_http"):
        if vector["direction"] == "edge->cloud":
            yield vector["head_text"].encode()


# --- QUIC ---------------------------------------------------------------------------------------------


def viaduct_streams() -> Iterator[bytes]:
    for vector in vectors("quic_framing"):
        if vector["name"].startswith(("package_", "reader_")):
            yield b"msg" + bytes.fromhex(vector["raw_hex"])
    for direction in ("edge->cloud", "cloud->edge"):
        live = [
            vector
            for vector in vectors("quic_live_sessions")
            if vector["direction"] == direction and vector.get("stream_id") == 5 and "..." not in vector["raw_hex"]
        ]
        yield b"".join(bytes.fromhex(vector["raw_hex"]) for vector in live)


def viaduct_messages() -> Iterator[bytes]:
    for vector in vectors("quic_framing"):
        if "protobuf_hex" in vector:
            yield bytes.fromhex(vector["protobuf_hex"])
        elif vector["name"].startswith("protobuf_decode_case_"):
            yield bytes.fromhex(vector["raw_hex"])
    for vector in vectors("quic_live_sessions"):
        if vector["decoded"] == "protobuf payload" and "..." not in vector["raw_hex"]:
            yield bytes.fromhex(vector["raw_hex"])


# --- HTTP ---------------------------------------------------------------------------------------------


def http_answers() -> Iterator[bytes]:
    for vector in vectors("bootstrap_http"):
        if vector["direction"] == "cloud->edge":
            yield vector["head_text"].encode() + bytes.fromhex(vector["body_hex"])
    yield b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;x=y\r\nhello\r\n0\r\n\r\n"
    yield b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 401 Unauthorized\r\nContent-Length: 2\r\n\r\nno"
    yield b"HTTP/1.0 503 Busy\r\n\r\ncome back"


def proxy_answers() -> Iterator[bytes]:
    yield b"HTTP/1.1 200 Connection established\r\nVia: 1.1 squid\r\n\r\n"
    yield b"HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic\r\nContent-Length: 3\r\n\r\nno\n"
    yield b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.0 200 OK\n\n"


def tokens() -> Iterator[bytes]:
    jwt = b"eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJleHAiOjE3OTU0NTMwNzV9.c2lnbmF0dXJl"
    yield b"ab" * 32 + b"." + jwt
    yield b"Bearer " + jwt
    yield b"Bearer W10.e30."
    yield b'{"alg":"HS256","typ":"JWT"}\n{"exp":1795453075}\nx'
    yield b'{"alg":["HS256"]}\n{"exp":' + b"9" * 400 + b"}\n"


# --- the bus ------------------------------------------------------------------------------------------

_MESSAGE: Final = Message(
    id="11111111-2222-4333-8444-555555555555",
    timestamp=1_700_000_000_123,
    source="sensor",
    group="user",
    resource="room/temperature",
    operation="upload",
    content=b'{"celsius":21.5}',
)


def emp_frames() -> Iterator[bytes]:
    incarnation, epoch = bytes(emp.INCARNATION_BYTES), bytes(emp.EPOCH_BYTES)
    batch = join_batch([encode_message(_MESSAGE)] * 2)
    for frames in (
        emp.encode(emp.HELLO, emp.Hello("sensor", ["g"], incarnation, 0, 15_000, "test")),
        emp.encode(emp.WELCOME, emp.Welcome(epoch, 7, 1, 1000, False)),
        emp.encode(emp.SEND, emp.Send("@hub", 3, 1, 2, 1), batch),
        emp.encode(emp.SEND, emp.Send("logger", 1, 1, 1, 1, ttl_ms=500), batch),
        emp.encode(
            emp.DELIVER, emp.Deliver(7, 1, "sensor", incarnation, 1, "logger", 3, 1, 2, 1, 1, [(1, "gone")]), batch
        ),
        emp.encode(emp.ACK, emp.Ack(7, [(1, 2, [(2, "failed")])])),
        emp.encode(emp.SETTLED, emp.Settled("@hub", 3, 2, [(1, "gone", "edgehub")], [(1, 2, ["edgehub"])])),
        emp.encode(emp.PING, emp.Ping(1, {"handled": 5}, [("@hub", 3, 2)])),
        emp.encode(emp.PONG, emp.Pong(1)),
        emp.encode(emp.WHO, emp.Who(epoch)),
        emp.encode(emp.FENCED, emp.Fenced(2)),
        emp.encode(emp.DRAIN, emp.Drain(8000)),
        emp.encode(emp.BYE, emp.Bye(True)),
        emp.encode(emp.REFUSED, emp.Refused("denied", "no")),
        emp.encode(emp.ADMIN, emp.Admin(1, "status"), b"\x80"),
    ):
        yield join_frames(frames)


def join_frames(frames: list[bytes]) -> bytes:
    """Frames as one input; `split_frames` of fuzz/targets.py undoes it."""
    return b"".join(len(frame).to_bytes(2, "big") + frame for frame in frames)


SESSION: Final = 1 << 24
"What the brokers under test count their sessions from."


def _said(peer: int, verb: bytes, header: Any, body: bytes | None = None) -> bytes:
    """One step of a conversation: who, how many frames, the frames."""
    frames = emp.encode(verb, header, body)
    return bytes((peer, len(frames))) + join_frames(frames)


def conversations_with_the_broker() -> Iterator[bytes]:
    """Steps of several peers; `targets.steps` reads them. A step without frames lets time pass or loses a peer."""
    batch = join_batch([encode_message(_MESSAGE)] * 2)
    hellos = b"".join(
        _said(peer, emp.HELLO, emp.Hello(name, ["g"], bytes((peer,)) * emp.INCARNATION_BYTES, 0, 1000, "test"))
        for peer, name in enumerate(("alpha", "beta", "gamma"))
    )
    sends = _said(0, emp.SEND, emp.Send("beta", 3, 1, 2, 1), batch) + _said(
        1, emp.SEND, emp.Send("@g", 2, 1, 2, 1), batch
    )
    acks = b"".join(
        _said(peer, emp.ACK, emp.Ack(SESSION + number, [(lane, 2, [(1, "failed")])]))
        for peer in (0, 1, 2)
        for number in (1, 2, 3)
        for lane in (1, 2)
    )
    yield hellos + sends + acks
    yield hellos + sends + b"\x01\x00" + acks + b"\xff\x00" * 3
    retain = emp.Send("@g", 2, 1, 1, 1, flags=emp.RETAIN, retain_key="k", retain_counter=1)
    request = emp.Send("gamma", 1, 1, 1, 1, flags=emp.EXPECTS_REPLY, ttl_ms=500)
    one = join_batch([encode_message(_MESSAGE)])
    yield hellos + _said(0, emp.SEND, retain, one) + _said(1, emp.SEND, request, one) + b"\xff\x00" + hellos
    yield (
        hellos
        + _said(0, emp.PING, emp.Ping(1))
        + _said(1, emp.DRAIN, emp.Drain(100))
        + _said(1, emp.BYE, emp.Bye(False))
    )


def conversations_with_a_module() -> Iterator[bytes]:
    """The same, said by a broker to one module."""
    epoch, incarnation = bytes(emp.EPOCH_BYTES), b"s" * emp.INCARNATION_BYTES
    batch = join_batch([encode_message(_MESSAGE)] * 2)
    welcome = _said(0, emp.WELCOME, emp.Welcome(epoch, SESSION, 1, 1000, True))
    deliver = emp.Deliver(SESSION, 1, "alpha", incarnation, 1, "module", 3, 1, 2, 1, 1)
    yield (
        welcome
        + _said(0, emp.DELIVER, deliver, batch)
        + _said(0, emp.SETTLED, emp.Settled("beta", 3, 2, [(1, "gone", None)]))
    )
    yield welcome + _said(0, emp.PONG, emp.Pong(1)) + b"\xff\x00" * 2 + _said(0, emp.WHO, emp.Who(epoch)) + welcome
    yield welcome + _said(0, emp.FENCED, emp.Fenced(2))
    yield _said(0, emp.REFUSED, emp.Refused("denied", "no")) + welcome


def batches() -> Iterator[bytes]:
    yield join_batch([encode_message(_MESSAGE)])
    yield join_batch([encode_message(_MESSAGE)] * 20)
    yield b"\x90"


# --- MQTT ---------------------------------------------------------------------------------------------


def mqtt_packets() -> Iterator[bytes]:
    """The first byte says which version the others are of."""
    publish = b"\x30\x0b\x00\x03a/bpayload"
    yield b"\x00" + publish + b"\x32\x09\x00\x03a/b\x00\x01xy" + b"\xd0\x00" + b"\x90\x03\x00\x01\x01"
    yield b"\x01" + b"\x32\x0c\x00\x03a/b\x00\x01\x02\x01\x01xy" + b"\x20\x03\x00\x00\x00"
    yield b"\x00" + b"\x30\xff\xff\xff\x7f\x00\x01a"


def mqtt_topics() -> Iterator[bytes]:
    yield b"$hw/events/device/lamp/twin/update\n$hw/events/device/+/twin/#"
    yield b"SYS/dis/upload_records\n#"
    yield b"a//b\n$share/group/+/b"
    yield b"JGh3L2V2ZW50cy9kZXZpY2Uv\n/"


def subscription_files() -> Iterator[bytes]:
    yield b'{"version":1,"wanted":["a/#","b/+/c"],"unwanted":["d"]}'


# --- configuration ------------------------------------------------------------------------------------


def edgecore_files() -> Iterator[bytes]:
    yield (ROOT / "edgecore.example.yaml").read_bytes()
    yield b"apiVersion: edgecore.config.kubeedge.io/v1alpha2\nkind: EdgeCore\nmodules: {edgeHub: {heartbeat: 15}}\n"
    yield b"a: &a [1, 2]\nb: [*a, *a]\n<<: {c: !!binary aGk=}\nd: 2001-01-01\n"


def edge_2019_files() -> Iterator[bytes]:
    yield (
        b"mqtt: {server: 'tcp://user:pw@127.0.0.1:1883', mode: 0, qos: 0}\n"
        b"edgehub:\n  websocket: {url: 'wss://0.0.0.0:10000/e632aba927ea4ac2b575ec1603d56f10/edge-node/events'}\n"
        b"  quic: {url: '127.0.0.1:10001'}\n  controller: {protocol: websocket, heartbeat: 15, node-id: edge-node}\n"
        b"edged: {hostname-override: edge-node}\nmodules: {enabled: [eventbus, websocket]}\n"
    )


def node_files() -> Iterator[bytes]:
    from msgspec import json as encoder

    from runtime.config import NodeConfig

    yield encoder.encode(NodeConfig(node_name="edge-1"))


# --- files of ours ------------------------------------------------------------------------------------


@cache
def certificate() -> bytes:
    """The DER of a node's certificate."""
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding

    from cloudsim.certificates import Authority

    with tempfile.TemporaryDirectory() as directory:
        pair = Authority(Path(directory)).node("edge-1")
        return x509.load_pem_x509_certificate(pair.certificate.read_bytes()).public_bytes(Encoding.DER)


def certificates() -> Iterator[bytes]:
    yield certificate()


OUTBOX_BOOT: Final = "boot-1"
"The boot of the machine in which `outbox` was made."


@cache
def outbox() -> bytes:
    """An outbox file with rows, parked objects and a ledger, whole in one file."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "outbox.db")
        file = OutboxFile(path, boot_id=OUTBOX_BOOT, now=1.0)
        for kind in (0, 1):
            file.add(kind, [Row(number, "sensor", b'{"n":%d}' % number) for number in range(1, 6)], 1.0)
            file.delete(kind, 1)
            file.drop(kind, 2, "age", 1)
        park(file)
        file.know_owner("meta")
        file.close()
        return path.read_bytes()


def park(file: OutboxFile) -> bool:
    return file.park("twin", "k", b"{}", is_insert=True, is_delete=False, max_messages=9, max_bytes=999)


def damages() -> Iterator[bytes]:
    """Rows of three bytes of offset and one of value, to be written over a sound file."""
    yield b"\x00\x00\x3c\x02"
    data = outbox()
    for word in (b"sensor", b"CREATE TABLE", b"reborn", b'{"n":'):
        at = data.find(word)
        yield at.to_bytes(3, "big") + b"!"
