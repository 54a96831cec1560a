"""The message: KubeEdge's model, its MessagePack form for the bus and its JSON form for the cloud.

Field names are KubeEdge's (`beehive/pkg/core/model`). On the bus a message is a MessagePack array
in the order of the fields below (docs/emp.md, The message); towards CloudHub it is one JSON object
(docs/cloudlink.md, Message model). `content` is always bytes, and `kind` says what they are:

* ``json``   the raw text of one JSON value. It is never decoded and encoded again on the way, so
  numbers beyond 2^53, the order of keys and the spelling of numbers survive.
* ``text``   UTF-8 text. In the cloud's JSON it is a JSON string.
* ``bytes``  anything. In the cloud's JSON it is a base64 string, which is what Go does with bytes.
"""

from __future__ import annotations

import runtime.libraries  # noqa: F401  (first: see there)

# isort: split

import base64
import itertools
import os
import time
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any, Final, Literal, Protocol

import msgpack
import msgspec

from runtime.errors import InvalidMessage, MalformedMessage, UsageError

Kind = Literal["json", "text", "bytes"]

JSON: Final = "json"
TEXT: Final = "text"
BYTES: Final = "bytes"

OPERATION_RESPONSE: Final = "response"
OPERATION_UPLOAD: Final = "upload"
OPERATION_ERROR: Final = "error"


class Deferral(Protocol):
    """Settles one delivered message later, in any order (see `Message.defer`)."""

    @property
    def delivery(self) -> Delivery: ...

    def done(self) -> None:
        """Acknowledge: the message has been handled. Idempotent."""

    def refuse(self, reason: str) -> None:
        """Settle with a refusal reason (`runtime.emp.REASONS`). Idempotent; the first call counts."""


class Delivery(msgspec.Struct, frozen=True, gc=False):
    """What the broker says of a message that is being handled; `Message.delivery` gives it."""

    sender: str
    "The sending module's name as the broker vouches for it (`route.source` is only a claim)."
    destination: str
    "As addressed: a module's name or `@group`."
    priority: int
    "The lane class, `runtime.emp.Priority`."
    redelivered: bool
    "It may have been handled before, by this process or an earlier one."
    retained: bool
    "It comes from the broker's store of retained messages."
    expects_reply: bool
    ttl_ms: int | None
    "Milliseconds left when it was delivered, or None: without limit."


class Handling(Protocol):
    """What a running handler's context gives (the SDK's shell provides it)."""

    def defer(self, message: Message) -> Deferral: ...

    def delivery_of(self, message: Message) -> Delivery: ...


current_handling: ContextVar[Handling | None] = ContextVar("current_handling", default=None)


class Message(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """One message. Immutable; build it with `build`, `upload` or `response_to`."""

    id: str = ""
    "UUID text. The SDK fills it in when it is empty."
    parent_id: str = ""
    "The id of the message that this one answers, or empty."
    timestamp: int = 0
    "Milliseconds since 1970."
    sync: bool = False
    "KubeEdge's header.sync. Never true on the cloud's wire."
    resource_version: str = ""
    source: str = ""
    "Claimed sender (KubeEdge's route.source). Who really sent it: `delivery.sender`."
    group: str = ""
    "KubeEdge's route.group: a message group, not the bus group that receives it."
    resource: str = ""
    operation: str = ""
    kind: Kind = JSON
    content: bytes = b"null"
    destination: str = ""
    "KubeEdge's route.destination; not used by the bus."
    type: str = ""
    "KubeEdge's header.type; not used by the bus."

    @classmethod
    def build(
        cls,
        *,
        group: str = "",
        resource: str = "",
        operation: str = "",
        content: Any = None,
        source: str = "",
        parent_id: str = "",
        resource_version: str = "",
    ) -> Message:
        """Make a message with a new id and the time now.

        `content` of type bytes becomes kind ``bytes``, of type str ``text``; anything else becomes
        ``json``. Raises InvalidMessage for a value that JSON cannot hold (NaN, sets of objects, …).
        """
        kind: Kind
        if type(content) is bytes:
            kind, data = BYTES, content
        else:
            kind, data = encode_content(content)
        # By position: the order of the fields above.
        return cls(
            _next_id(),
            parent_id,
            time.time_ns() // 1_000_000,
            False,
            resource_version,
            source,
            group,
            resource,
            operation,
            kind,
            data,
        )

    @classmethod
    def upload(cls, resource: str, content: Any = None, *, source: str = "") -> Message:
        """An upload to the cloud's router: operation `upload`, group `user` (CloudHub, HEAD)."""
        kind, data = encode_content(content)
        # Not by way of `build`: a device's every reading comes here.
        return cls(
            _next_id(),
            "",
            time.time_ns() // 1_000_000,
            False,
            "",
            source,
            "user",
            resource,
            OPERATION_UPLOAD,
            kind,
            data,
        )

    def response(self, content: Any = "OK", *, operation: str = OPERATION_RESPONSE) -> Message:
        """The reply to this message: source, group, resource and type copied, parent id = this id.

        KubeEdge copies source and group from the request and does not swap them
        (docs/cloudlink.md, Replies).
        """
        kind, data = encode_content(content)
        return Message(
            id=new_id(),
            parent_id=self.id,
            timestamp=time.time_ns() // 1_000_000,
            source=self.source,
            group=self.group,
            resource=self.resource,
            operation=operation,
            kind=kind,
            content=data,
            type=self.type,
        )

    def error(self, text: str, *, source: str = "") -> Message:
        """The error reply to this message: operation `error`, content = text, parent id = this id."""
        return msgspec.structs.replace(self.response(text, operation=OPERATION_ERROR), source=source or self.source)

    def json(self) -> Any:
        """Decode content of kind ``json`` (or JSON that came as text or bytes, as over QUIC)."""
        try:
            return msgspec.json.decode(self.content)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as fault:
            raise MalformedMessage(f"content of kind {self.kind} is no JSON: {fault}") from fault

    def text(self) -> str:
        """Content as text: of kind ``text`` as it is, of kind ``json`` the JSON text itself."""
        try:
            return self.content.decode()
        except UnicodeDecodeError as fault:
            raise MalformedMessage(f"content of kind {self.kind} is not UTF-8: {fault}") from fault

    @property
    def delivery(self) -> Delivery:
        """What the broker says of this message. Only inside the handler it was given to."""
        return _handling().delivery_of(self)

    def defer(self) -> Deferral:
        """Take over the acknowledgement: the handler's return will not settle this message.

        Call it before the handler returns; settle with `Deferral.done` or `.refuse`, in any order.
        A deferred message holds its place in the receiver's prefetch until it is settled.
        """
        return _handling().defer(self)


def _handling() -> Handling:
    handling = current_handling.get()
    if handling is None:
        raise UsageError("delivery and defer() are only there inside the handler of this message")
    return handling


_encode_json = msgspec.json.Encoder().encode
_decode_string = msgspec.json.Decoder(str).decode


def payload_of(message: Message) -> bytes:
    """Content where the receiver is not told its kind (MQTT, KubeEdge's QUIC transport): as it is, but of JSON a string
    is the text it holds, and null is nothing."""
    content = message.content
    if message.kind != JSON:
        return content
    if content == b"null":
        return b""
    if content[:1] == b'"':
        try:
            return _decode_string(content).encode()
        except (msgspec.DecodeError, UnicodeError):  # no string after all, or a lone surrogate
            return content
    return content


def encode_content(content: Any) -> tuple[Kind, bytes]:
    """Kind and bytes for a Python value; see `Message.build`."""
    try:
        if type(content) is not dict:  # which most are
            if isinstance(content, str):
                return TEXT, content.encode()
            if isinstance(content, bytes | bytearray | memoryview):
                return BYTES, bytes(content)
        data = _encode_json(content)
    except (TypeError, ValueError, RecursionError, OverflowError) as fault:
        raise InvalidMessage(f"content of type {type(content).__name__} has no JSON form: {fault}") from fault
    # msgspec writes NaN and the infinities as null: a reading must not turn into "no value" unseen.
    if data.find(b"null") >= 0 and _holds_non_finite(content):  # `in` would try it as a number first
        raise InvalidMessage("content holds NaN or an infinity, which JSON cannot carry")
    return JSON, data


def _holds_non_finite(value: Any) -> bool:
    if isinstance(value, float):
        return value != value or value in (float("inf"), float("-inf"))
    if isinstance(value, dict):
        return any(map(_holds_non_finite, value.values()))
    if isinstance(value, list | tuple | set | frozenset):
        return any(map(_holds_non_finite, value))
    return False


# --- ids ---------------------------------------------------------------------------------------

_LAST_DIGITS: Final = tuple(f"{number:02x}" for number in range(256))


def _new_prefix() -> str:
    """The first 24 characters of a version 4 UUID: 74 random bits of it, then a counter of 48 bits."""
    raw = bytearray(os.urandom(10))
    raw[6] = raw[6] & 0x0F | 0x40
    raw[8] = raw[8] & 0x3F | 0x80
    digits = raw.hex()
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-"


def _ids() -> Iterator[str]:
    prefix = _new_prefix()
    for block in itertools.count():
        head = f"{prefix}{block:010x}"
        for last in _LAST_DIGITS:
            yield head + last


_next_id = _ids().__next__


def _renew_ids() -> None:
    global _next_id
    _next_id = _ids().__next__


# A forked child would give the same ids as its parent.
os.register_at_fork(after_in_child=_renew_ids)


def new_id() -> str:
    """A new message id in UUID form: a prefix random per process, and a counter.

    uuid4 per message would cost thirty times as much.
    """
    return _next_id()


# --- the bus form ------------------------------------------------------------------------------

encode_message = msgspec.msgpack.Encoder().encode
"One message as its MessagePack array."

_decode_batch = msgspec.msgpack.Decoder(list[Message]).decode


def decode_batch(body: bytes) -> list[Message]:
    """The messages of a batch. Total: raises MalformedMessage for anything else.

    Allocates in proportion to `body`, whatever lengths it claims.
    """
    try:
        return _decode_batch(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as fault:
        raise MalformedMessage(f"batch: {fault}") from fault


def join_batch(encoded: Sequence[bytes]) -> bytes:
    """The body of a batch out of messages that `encode_message` made."""
    count = len(encoded)
    if count < 16:
        head = bytes((0x90 | count,))
    elif count < 65536:
        head = b"\xdc" + count.to_bytes(2, "big")
    else:
        head = b"\xdd" + count.to_bytes(4, "big")
    return head + b"".join(encoded)


def split_batch(body: bytes, index: int) -> bytes | None:
    """A batch that holds only message `index` of `body`, or None when the body is no such batch.

    The message is copied as it stands, whatever it holds.
    """
    unpacker = msgpack.Unpacker(max_buffer_size=max(len(body), 1))
    unpacker.feed(body)
    try:
        if not 0 <= index < unpacker.read_array_header():
            return None
        for _ in range(index):
            unpacker.skip()
        start = unpacker.tell()
        unpacker.skip()
    except (ValueError, msgpack.exceptions.UnpackException, RecursionError):
        return None
    return join_batch([body[start : unpacker.tell()]])


# --- the cloud's form --------------------------------------------------------------------------


class _Header(msgspec.Struct, omit_defaults=True, gc=False):
    msg_id: str
    timestamp: int
    parent_msg_id: str = ""
    resourceversion: str = ""
    sync: bool = False
    type: str = ""


class _Route(msgspec.Struct, omit_defaults=True, gc=False):
    source: str = ""
    destination: str = ""
    group: str = ""
    operation: str = ""
    resource: str = ""


class _CloudMessage(msgspec.Struct, gc=False):
    """All but the content, which follows."""

    header: _Header
    route: _Route


class _AnyHeader(msgspec.Struct, gc=False):
    msg_id: str = ""
    parent_msg_id: str = ""
    timestamp: int = 0
    resourceversion: str = ""
    sync: bool = False
    type: str = ""


class _AnyCloudMessage(msgspec.Struct, gc=False):
    """What comes down: every field may be missing."""

    header: _AnyHeader = msgspec.field(default_factory=_AnyHeader)
    route: _Route = msgspec.field(default_factory=_Route)
    content: msgspec.Raw = msgspec.Raw(b"null")


_decode_cloud = msgspec.json.Decoder(_AnyCloudMessage).decode
_decode_text = msgspec.json.Decoder(str).decode


def to_cloud_json(message: Message) -> bytes:
    """The JSON text that CloudHub reads, with the newline that KubeEdge ends it with.

    Content of kind ``json`` is copied as it stands: check it first (`modules.edgehub.cloud`), for
    CloudHub cuts the link on JSON it cannot decode. `sync` is never sent (docs/cloudlink.md).
    Raises InvalidMessage for kind ``text`` that is not UTF-8.
    """
    content = message.content if message.kind == JSON else content_as_json(message)
    # By position, which is quicker: the order of the fields above.
    header = _Header(message.id, message.timestamp, message.parent_id, message.resource_version, False, message.type)
    route = _Route(message.source, message.destination, message.group, message.operation, message.resource)
    return b"".join((_encode_json(_CloudMessage(header, route))[:-1], b',"content":', content, b"}\n"))


def content_as_json(message: Message) -> bytes:
    """The content as JSON text: what it is for ``json``, a string for the others."""
    if message.kind == JSON:
        return message.content
    if message.kind == BYTES:
        return b'"' + base64.b64encode(message.content) + b'"'
    try:
        return _encode_json(message.content.decode())
    except UnicodeDecodeError as fault:
        raise InvalidMessage(f"content says text but is not UTF-8: {fault}") from fault


def from_cloud_json(data: bytes | str) -> Message:
    """The message in one JSON text from the cloud; raises MalformedMessage.

    A JSON string becomes kind ``text``. Any other value keeps its raw JSON text (kind ``json``), and
    so does a string that has no UTF-8 form. Missing fields are empty; unknown ones are ignored.
    """
    try:
        cloud = _decode_cloud(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as fault:
        raise MalformedMessage(f"not a message: {fault}") from fault
    raw = bytes(cloud.content)
    kind: Kind = JSON
    if raw[:1] == b'"':
        try:
            raw = _decode_text(raw).encode()
            kind = TEXT
        except (msgspec.DecodeError, UnicodeError):
            kind = JSON
    return Message(
        id=cloud.header.msg_id,
        parent_id=cloud.header.parent_msg_id,
        timestamp=cloud.header.timestamp,
        sync=cloud.header.sync,
        resource_version=cloud.header.resourceversion,
        source=cloud.route.source,
        group=cloud.route.group,
        resource=cloud.route.resource,
        operation=cloud.route.operation,
        kind=kind,
        content=raw,
        destination=cloud.route.destination,
        type=cloud.header.type,
    )
