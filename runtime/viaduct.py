"""viaduct: how KubeEdge carries messages over QUIC streams. The edge and cloudsim share it.

A stream is a row of packages, in both directions, for as long as it lives. A package is 10 bytes of header and a
protobuf message. The first stream that the edge opens is the control stream: the edge sends one message with
its headers on it and gets an ack. Every other stream starts with three bytes from whoever opened it, its use type.

Nothing here does input or output. The facts stand in docs/cloudlink.md, QUIC.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgspec
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from runtime.errors import EdgezmqError, InvalidMessage, MalformedMessage
from runtime.message import BYTES, JSON, Message, payload_of

MESSAGES: Final = b"msg"
"Use type of a stream that carries messages."
RAW: Final = b"str"
"Use type of a stream that carries bytes without packages."
USE_TYPE_BYTES: Final = 3

HEADER_BYTES: Final = 10
MAX_PAYLOAD_BYTES: Final = 32 * 2**20
"KubeEdge's readers and writers refuse a longer one."

HEADER_OPERATION: Final = "header"
"Operation and resource of the message that carries the headers."
ACK: Final = "ack"
NACK: Final = "nack"

_START: Final = bytes((1, 1, 1, 0, 1, 0))  # version 1.1.1.0, type 1, flags 0
_head = struct.Struct("!6sI")


class ViaductFault(EdgezmqError):
    """The peer broke the framing; the stream cannot go on. What was read before it is in `packages`."""

    def __init__(self, text: str, packages: list[Package] | None = None) -> None:
        super().__init__(text)
        self.packages = packages or []


class OtherUse(ViaductFault):
    """The peer opened the stream for something else than messages."""


class MissingPart(MalformedMessage):
    """Protobuf without the header or the router part: KubeEdge's own receiver panics on it."""


@dataclass(frozen=True, slots=True)
class Oversized:
    """A payload was larger than this reader takes and has been passed over."""

    size_bytes: int


Package = bytes | Oversized

# --- packages --------------------------------------------------------------------------------------


def package_header(size_bytes: int) -> bytes:
    """The 10 bytes before a payload. Raises InvalidMessage for one that no reader takes."""
    if size_bytes > MAX_PAYLOAD_BYTES:
        raise InvalidMessage(f"payload length {size_bytes} exceeds maximum {MAX_PAYLOAD_BYTES}")
    return _head.pack(_START, size_bytes)


def packages(payloads: Iterable[bytes]) -> bytes:
    """Payloads as packages in one piece, to be written in one go. Raises InvalidMessage as `package_header`."""
    pieces: list[bytes] = []
    add, pack = pieces.append, _head.pack
    for payload in payloads:
        size = len(payload)
        add(pack(_START, size) if size <= MAX_PAYLOAD_BYTES else package_header(size))
        add(payload)
    return b"".join(pieces)


class PackageReader:
    """Bytes of one direction of a stream in, payloads out, however they are cut.

    Holds at most `max_payload_bytes` and the header, allocates only what has come, takes time in proportion to
    the bytes. As KubeEdge's reader it looks at the length alone: version, type and flags may be anything.
    """

    def __init__(self, max_payload_bytes: int = MAX_PAYLOAD_BYTES, *, has_use_type: bool = False) -> None:
        """`has_use_type`: the peer opened the stream, so its first three bytes must be `msg`."""
        self._max_payload_bytes = max_payload_bytes
        self._use_type: bytes | None = b"" if has_use_type else None
        self._head = b""
        self._size: int | None = None
        self._missing = 0
        self._gathered = bytearray()

    @property
    def is_use_known(self) -> bool:
        """Whether this is known to be a stream for messages."""
        return self._use_type is None

    @property
    def is_between_packages(self) -> bool:
        """Whether the stream may end here without cutting anything short."""
        return self._size is None and not self._head and not self._use_type

    @property
    def held_bytes(self) -> int:
        """What is kept of a payload that is not whole."""
        return len(self._gathered)

    def receive(self, data: bytes) -> list[Package]:
        """The payloads that are now whole. Raises ViaductFault (OtherUse); then it is of no use any more."""
        whole: list[Package] = []
        at, end = 0, len(data)
        if self._use_type is not None and end:
            at = min(USE_TYPE_BYTES - len(self._use_type), end)
            self._use_type += data[:at]
            if not MESSAGES.startswith(self._use_type):
                raise OtherUse(f"use type {self._use_type!r}, expected {MESSAGES!r}")
            if len(self._use_type) < USE_TYPE_BYTES:
                return whole
            self._use_type = None
        while at < end:
            if self._size is None:
                if not self._head and at + HEADER_BYTES <= end:
                    _, size = _head.unpack_from(data, at)
                    at += HEADER_BYTES
                else:
                    stop = at + HEADER_BYTES - len(self._head)
                    self._head += data[at:stop]
                    at = stop
                    if len(self._head) < HEADER_BYTES:
                        break
                    _, size = _head.unpack(self._head)
                    self._head = b""
                if size > MAX_PAYLOAD_BYTES:
                    raise ViaductFault(f"payload length {size} exceeds maximum {MAX_PAYLOAD_BYTES}", whole)
                self._size = self._missing = size
            stop = min(at + self._missing, end)
            self._missing -= stop - at
            if self._size > self._max_payload_bytes:
                if not self._missing:
                    whole.append(Oversized(self._size))
            elif self._missing:
                self._gathered += data[at:stop]
            elif self._gathered:
                self._gathered += data[at:stop]
                whole.append(bytes(self._gathered))
                self._gathered = bytearray()
            else:
                whole.append(data[at:stop])
            at = stop
            if not self._missing:
                self._size = None
        return whole


# --- messages --------------------------------------------------------------------------------------


def _message_class() -> Any:
    """viaduct's message.proto, described here rather than in generated code: nothing to regenerate."""
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="viaduct.proto", package="viaduct", syntax="proto3")

    def define(name: str, *fields: tuple[str, int, Any]) -> None:
        described = file.message_type.add(name=name)
        for field_name, number, kind in fields:
            entry = described.field.add(name=field_name, number=number, label=field.LABEL_OPTIONAL)
            if isinstance(kind, str):
                entry.type, entry.type_name = field.TYPE_MESSAGE, kind
            else:
                entry.type = kind

    define(
        "MessageHeader",
        ("id", 1, field.TYPE_STRING),
        ("parent_id", 2, field.TYPE_STRING),
        ("timestamp", 3, field.TYPE_SINT64),
        ("sync", 4, field.TYPE_BOOL),
        ("type", 5, field.TYPE_STRING),
    )
    define(
        "MessageRouter",
        ("source", 1, field.TYPE_STRING),
        ("group", 2, field.TYPE_STRING),
        ("operation", 3, field.TYPE_STRING),  # not in the order of the other forms
        ("resource", 4, field.TYPE_STRING),
    )
    define(
        "Message",
        ("header", 1, ".viaduct.MessageHeader"),
        ("router", 2, ".viaduct.MessageRouter"),
        ("content", 3, field.TYPE_BYTES),
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("viaduct.Message"))


_Message: Final[Any] = _message_class()


def encode_message(message: Message) -> bytes:
    """The payload of a package. `resource_version`, `destination` and `type` are lost, as they are with KubeEdge.

    Raises InvalidMessage for text with no UTF-8 form or a timestamp beyond 64 bits.
    """
    body = _Message()
    header, router = body.header, body.router
    # The genuine receiver crashes without them, even when they are empty.
    header.SetInParent()
    router.SetInParent()
    try:
        header.id = message.id
        header.timestamp = message.timestamp
        if message.parent_id:
            header.parent_id = message.parent_id
        if message.sync:
            header.sync = True
        router.source = message.source
        router.group = message.group
        router.operation = message.operation
        router.resource = message.resource
        body.content = payload_of(message)
        payload: bytes = body.SerializeToString()
    except (ValueError, UnicodeError) as fault:
        raise InvalidMessage(f"no viaduct message: {fault}") from fault
    return payload


def decode_message(payload: bytes) -> Message:
    """The message in a package. Total: raises MalformedMessage (MissingPart) for anything else.

    The wire does not tell what content was, so it is of kind ``bytes``; no content is null.
    """
    body = _Message()
    try:
        body.ParseFromString(payload)
    except (DecodeError, UnicodeError) as fault:
        raise MalformedMessage(f"not a viaduct message: {fault}") from fault
    if not body.HasField("header") or not body.HasField("router"):
        raise MissingPart("a viaduct message without header or router")
    header, router, content = body.header, body.router, body.content
    return Message(
        id=header.id,
        parent_id=header.parent_id,
        timestamp=header.timestamp,
        sync=header.sync,
        source=router.source,
        group=router.group,
        resource=router.resource,
        operation=router.operation,
        kind=BYTES if content else JSON,
        content=content or b"null",
        type=header.type,
    )


# --- the control stream ----------------------------------------------------------------------------


def header_message(headers: Iterable[tuple[str, str]]) -> Message:
    """What the edge sends first. The names get the spelling that Go's http.Header looks them up by."""
    content = {canonical_name(name): [value] for name, value in headers}
    return Message.build(operation=HEADER_OPERATION, resource=HEADER_OPERATION, content=content)


def canonical_name(name: str) -> str:
    """Go's CanonicalMIMEHeaderKey: a capital at the start and after each hyphen (not: underscore)."""
    return "-".join(part.capitalize() for part in name.split("-"))


_decode_headers = msgspec.json.Decoder(dict[str, list[str]]).decode


def headers_of(message: Message) -> Mapping[str, list[str]]:
    """The headers in the edge's first message. Raises MalformedMessage, which is answered with `nack`."""
    try:
        return _decode_headers(message.content)
    except (msgspec.DecodeError, UnicodeDecodeError) as fault:
        raise MalformedMessage(f"no headers: {fault}") from fault
