"""What CloudHub speaks: URL, headers, keepalive, greeting, which messages it wants acknowledged, what it cannot read.

The facts and where they come from stand in docs/cloudlink.md.
"""

from __future__ import annotations

import re
from itertools import accumulate
from typing import Final

import msgspec

from modules.edgehub.config import EdgeHubConfig, Endpoint
from modules.edgehub.dialect import Dialect
from runtime.emp import Priority
from runtime.errors import InvalidMessage
from runtime.message import BYTES, JSON, OPERATION_ERROR, OPERATION_RESPONSE, TEXT, Kind, Message, to_cloud_json

OPERATION_KEEPALIVE: Final = "keepalive"
OPERATION_QUERY: Final = "query"
CA_RESOURCE: Final = "k8s/ca.crt"
GROUP_RESOURCE: Final = "resource"
GROUP_USER: Final = "user"

SOURCE_OF_EVENTS: Final = "edgehub"
"Source of the connection events: KubeEdge's edgehub signs them so, though its module is called `websocket`."
CONNECTION_RESOURCE: Final = "node/connection"
CONNECTED: Final = "cloud_connected"
DISCONNECTED: Final = "cloud_disconnected"


def path(config: EdgeHubConfig) -> str:
    """The path of the URL. CloudHub looks at the headers only, but a `//` in it is redirected."""
    return f"/{config.project_id}/{config.node_name}/events"


def url(config: EdgeHubConfig, endpoint: Endpoint) -> str:
    return f"wss://{endpoint}{path(config)}"


def headers(config: EdgeHubConfig) -> list[tuple[str, str]]:
    """Who we are. Without `ConnectionUse: msg` CloudHub opens a session and never reads from it."""
    return [("node_id", config.node_name), ("project_id", config.project_id), ("ConnectionUse", "msg")]


def keepalive(padding_bytes: int = 0) -> Message:
    """The only thing that CloudHub counts as a sign of life; it has no answer, and its content is not looked at."""
    content = "ping" + " " * padding_bytes
    return Message.build(
        source="websocket", group=GROUP_RESOURCE, resource="node", operation=OPERATION_KEEPALIVE, content=content
    )


def greeting() -> Message:
    """A query that CloudHub itself answers where the link has a session, and nobody where it has none."""
    return Message.build(source="metamanager", group="meta", resource=CA_RESOURCE, operation=OPERATION_QUERY)


def proves_session(message: Message) -> bool:
    """Whether a message from the cloud shows that the link has a session.

    All do but one kind: operations `ping`, `pong` and `config` are answered with `ack` by CloudHub's connection
    layer, on a rejected connection too.
    """
    return not (message.operation == OPERATION_RESPONSE and message.kind == TEXT and message.content == b"ack")


def connection_event(dialect: Dialect, group: str, *, is_connected: bool) -> Message:
    """KubeEdge's pubConnectInfo(true/false), for one group."""
    return Message.build(
        source=SOURCE_OF_EVENTS,
        group=group,
        resource=CONNECTION_RESOURCE,
        operation=dialect.connection_operation,
        content=CONNECTED if is_connected else DISCONNECTED,
    )


# --- which class a message belongs to -----------------------------------------------------------

_SIGNAL_OPERATIONS: Final = frozenset({OPERATION_RESPONSE, OPERATION_ERROR, OPERATION_KEEPALIVE})
_SIGNAL_TYPES: Final = frozenset({"node", "nodestatus", "nodepatch", "lease"})
_NODE_SOURCES: Final = frozenset({"edged", "metamanager", "metaManager"})


def is_signal(message: Message, priority: int) -> bool:
    """Whether it goes before uploads: what was sent as one, answers and ACKs, node, lease and twin traffic."""
    if priority <= Priority.SIGNAL:
        return True
    if message.group == GROUP_USER:
        return False  # uploads, also those that eventbus of 2019 calls `response`
    if message.operation in _SIGNAL_OPERATIONS or message.source == "twin":
        return True
    if message.source in _NODE_SOURCES:
        parts = message.resource.split("/", 2)
        return len(parts) > 1 and parts[1] in _SIGNAL_TYPES
    return False


# --- what CloudHub wants acknowledged -------------------------------------------------------------

_ACKNOWLEDGED_OPERATIONS: Final = frozenset({"insert", "update", "delete", "patch", OPERATION_RESPONSE})


def wants_ack(message: Message) -> bool:
    """Whether CloudHub may wait for an ACK of this message.

    The wire does not tell. CloudHub only retries what has group `resource`; a surplus ACK is harmless, a
    missing one blocks everything behind it (docs/cloudlink.md, ACK).
    """
    return message.group == GROUP_RESOURCE and message.operation in _ACKNOWLEDGED_OPERATIONS and message.id != ""


def ack(message: Message) -> Message:
    """KubeEdge's reply `OK`. CloudHub reads the parent id and the operation, nothing else."""
    return message.response("OK")


# --- what CloudHub can read ---------------------------------------------------------------------------

_decode = msgspec.json.Decoder().decode
_skim = msgspec.json.Decoder(msgspec.Raw).decode
_LONG_INTEGER = re.compile(rb"[0-9]{309}")  # the largest float64 has 309 digits
_LARGEST_FLOAT: Final = int(1.7976931348623157e308)
_STRINGS = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_NOT_BRACKETS: Final = bytes(set(range(256)) - set(b"[]{}"))
_STEPS: Final = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
_MAX_TIMESTAMP: Final = 2**63 - 1
_MIN_TIMESTAMP: Final = -_MAX_TIMESTAMP


def check_json(content: bytes, max_depth: int) -> None:
    """Raise InvalidMessage for JSON text that Go's decoder refuses, for CloudHub then cuts the link.

    Stricter than Go in two points: nesting is bounded by `max_depth`, and lone surrogates, which
    Go replaces in silence, are refused.
    """
    size = len(content)
    if size > max_depth and content.count(b"[") + content.count(b"{") > max_depth and depth(content) > max_depth:
        raise InvalidMessage(f"content is nested deeper than {max_depth}")
    try:
        value = _decode(content)
    except (ValueError, RecursionError) as fault:  # DecodeError and UnicodeDecodeError are ValueErrors
        raise InvalidMessage(f"content says json but is not: {fault}") from fault
    if size >= 309 and _LONG_INTEGER.search(content) and _holds_huge_integer(value):
        raise InvalidMessage("content holds a number beyond float64, which CloudHub cannot read")


def depth(content: bytes) -> int:
    """The deepest nesting of JSON text (of anything else: some number)."""
    brackets = _STRINGS.sub(b"", content).translate(None, _NOT_BRACKETS)
    return max(accumulate(map(_STEPS.__getitem__, brackets)), default=0)


def _holds_huge_integer(value: object) -> bool:
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, int):
            if abs(value) > _LARGEST_FLOAT:
                return True
        elif isinstance(value, dict):
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)
    return False


def encode_up(message: Message, max_depth: int) -> bytes:
    """The JSON text that goes up, with its newline. Raises InvalidMessage for what CloudHub cannot read."""
    check_up(message, max_depth)
    return to_cloud_json(message)


def check_up(message: Message, max_depth: int) -> None:
    """Raise InvalidMessage for what CloudHub cannot read, in either form."""
    kind = message.kind
    if kind == JSON:
        check_json(message.content, max_depth)
    elif kind == TEXT and not message.content.isascii():
        try:
            message.content.decode()
        except UnicodeDecodeError as fault:
            raise InvalidMessage(f"content says text but is not UTF-8: {fault}") from fault
    if not _MIN_TIMESTAMP <= message.timestamp <= _MAX_TIMESTAMP:
        raise InvalidMessage(f"timestamp {message.timestamp} does not fit into 64 bits")


# --- content as it comes over QUIC ---------------------------------------------------------------------


def with_kind(message: Message) -> Message:
    """The message with the kind that its content would have over the websocket, as far as it can be told.

    Over QUIC all content is bytes: objects and arrays came as JSON, other UTF-8 as text. So modules need not know
    which way a message came.
    """
    content = message.content
    if message.kind != BYTES:
        return message
    kind: Kind = BYTES
    try:
        if not content.isascii():
            content.decode()
        kind = TEXT
        if content[:1] in (b"{", b"["):
            _skim(content)
            kind = JSON
    except (ValueError, RecursionError):  # DecodeError and UnicodeDecodeError are ValueErrors
        pass
    return message if kind == BYTES else msgspec.structs.replace(message, kind=kind)
