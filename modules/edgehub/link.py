"""Link: one connection to CloudHub, whatever its transport, and the factory that chooses one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from modules.edgehub.config import QUIC, WEBSOCKET, EdgeHubConfig, Endpoint
from runtime.errors import ConfigError, EdgezmqError


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
class Passed:
    """The cloud has taken over everything that was written before this barrier."""

    barrier: int


@dataclass(frozen=True, slots=True)
class SkippedMessage:
    """A message from the cloud was larger than the limit and was passed over."""

    size_bytes: int


LinkEvent = Received | Passed | SkippedMessage


class Link(Protocol):
    """One connection: opened once, closed once. Not to be used again."""

    async def open(self, endpoint: Endpoint) -> None:
        """Connect, verify the server, upgrade. Raises LinkRefused or LinkLost; both leave nothing open.

        Bounded by the configured handshake time.
        """

    def write(self, payloads: Sequence[bytes], barrier: int | None = None) -> None:
        """Hand over messages in order and, behind them, a barrier. Never waits; all goes out in one write.

        On a lost link it does nothing: `receive` and `wait_writable` tell.
        """

    @property
    def is_writable(self) -> bool:
        """Whether the write buffer is below its limit."""

    async def wait_writable(self) -> None:
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
        raise ConfigError(
            "modules.edgeHub.quic.enable", True, "modules.edgeHub.websocket: this version has no QUIC adapter"
        )
    raise ConfigError("protocol", config.protocol, f"{WEBSOCKET!r} or {QUIC!r}")
