"""Link: one connection to CloudHub, whatever its transport, and the factory that chooses one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from modules.edgehub import cloud
from modules.edgehub.config import QUIC, WEBSOCKET, EdgeHubConfig, Endpoint
from modules.edgehub.outbox import Class
from runtime.errors import ConfigError, EdgezmqError
from runtime.message import Message


class LinkLost(EdgezmqError):
    """The connection is gone. `is_cut_by_cloud`: the far end closed it, rather than the path being dead."""

    def __init__(self, why: str, *, is_cut_by_cloud: bool = False) -> None:
        super().__init__(why)
        self.why = why
        self.is_cut_by_cloud = is_cut_by_cloud


class LinkRefused(EdgezmqError):
    """No connection came about, and the reason is one that somebody has to look at (certificate, HTTP status)."""


@dataclass(frozen=True, slots=True)
class Received:
    """One whole message from the cloud, as its JSON text."""

    payload: bytes


@dataclass(frozen=True, slots=True)
class Decoded:
    """One whole message from the cloud, over a transport that does not carry it as JSON."""

    message: Message
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Passed:
    """The cloud has taken over everything that was written before this barrier, of its kind where kinds are apart."""

    barrier: int


@dataclass(frozen=True, slots=True)
class SkippedMessage:
    """A message from the cloud was larger than the limit and was passed over."""

    size_bytes: int


LinkEvent = Received | Decoded | Passed | SkippedMessage


class Link(Protocol):
    """One connection: opened once, closed once. Not to be used again."""

    keeps_kinds_apart: bool
    "Signals and data go up independently of each other: order, barriers and a full buffer concern one kind only."

    async def open(self, endpoint: Endpoint) -> None:
        """Connect, verify the server, upgrade. Raises LinkRefused or LinkLost; both leave nothing open.

        Bounded by the configured handshake time.
        """

    def write(self, payloads: Sequence[bytes], barrier: int | None = None, *, kind: Class = Class.DATA) -> None:
        """Hand over messages of a kind in order and, behind them, a barrier. Never waits; all goes out in one write.

        Payloads are what `make_encoder` makes, or what another protocol's encoder made before.

        On a lost link it does nothing: `receive` and `wait_writable` tell.
        """

    def is_writable(self, kind: Class) -> bool:
        """Whether the write buffer is below its limit."""

    async def wait_writable(self, kind: Class) -> None:
        """Return when the write buffer has drained. Raises LinkLost."""

    async def receive(self) -> list[LinkEvent]:
        """What has come since, at least one. Raises LinkLost after the last.

        While nobody calls it, reading from the socket stops once about a MiB has gathered.
        """

    def acknowledged_bytes(self) -> int:
        """Bytes of this connection that the peer's transport has acknowledged, in all."""

    def fit_send_buffer(self, window_bytes: int) -> None:
        """Let the kernel buffer about what may be under way, not more: what lies there cannot be overtaken."""

    async def close(self, *, is_polite: bool) -> None:
        """End it; `is_polite` says goodbye first. Idempotent. Bounded by about a second."""


def make_link(config: EdgeHubConfig) -> Link:
    """The adapter for `config.protocol`; ConfigError for one that there is not."""
    if config.protocol == WEBSOCKET:
        from modules.edgehub.websocket import WebSocketLink

        return WebSocketLink(config)
    if config.protocol == QUIC:
        from modules.edgehub.quic import QuicLink

        return QuicLink(config)
    raise ConfigError("protocol", config.protocol, f"{WEBSOCKET!r} or {QUIC!r}")


async def probe(config: EdgeHubConfig, endpoint: Endpoint) -> str | None:
    """See whether a CloudHub answers there, as far as TLS, and leave again: what is wrong, None when nothing is.

    It does not show whether the hub would serve us: that takes a session, and so the end of the one that we have.
    """
    if config.protocol == WEBSOCKET:
        from modules.edgehub import dialling

        return await dialling.probe(config, endpoint)
    from modules.edgehub import quic

    return await quic.probe(config, endpoint)


def make_encoder(config: EdgeHubConfig) -> Callable[[Message], bytes]:
    """Makes the payloads that go up over `config.protocol`; raises InvalidMessage for what CloudHub cannot read.

    JSON text starts with a brace, viaduct's protobuf with a byte of 10: each adapter knows the other's payloads, which
    an outbox may hold after the protocol was changed.
    """
    max_depth = config.max_content_depth
    if config.protocol == WEBSOCKET:
        return lambda message: cloud.encode_up(message, max_depth)
    from runtime.viaduct import encode_message

    def encode(message: Message) -> bytes:
        cloud.check_up(message, max_depth)
        return encode_message(message)

    return encode
