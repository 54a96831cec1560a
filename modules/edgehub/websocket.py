"""The websocket adapter: a Link over TLS, many messages in one write.

`websockets` makes and checks the opening handshake (its Sans-I/O ClientProtocol); frames are ours
(`frames.py`). No compression, no subprotocol, no ALPN: CloudHub negotiates none of them.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import ssl
import struct
from collections.abc import Sequence
from typing import Final

from modules.edgehub import cloud, tls
from modules.edgehub.config import EdgeHubConfig, Endpoint
from modules.edgehub.dialling import open_tls
from modules.edgehub.frames import (
    CLOSE,
    PING,
    PONG,
    Close,
    FrameFault,
    FrameReader,
    FrameWriter,
    Ping,
    Pong,
    Skipped,
    Text,
)
from modules.edgehub.link import LinkEvent, LinkLost, LinkRefused, Passed, Received, SkippedMessage
from modules.edgehub.outbox import Class
from runtime.lean import absent
from runtime.message import to_cloud_json

with absent("importlib.metadata"):  # 2 MiB, for the version of a websockets that is not released
    from websockets.client import ClientProtocol
    from websockets.protocol import State
    from websockets.uri import parse_uri

try:
    from websockets.speedups import apply_mask
except ImportError:  # a platform without the C extension
    from websockets.utils import apply_mask

log = logging.getLogger("modules.edgehub")

_SEND_BUFFER_BYTES: Final = 32 * 1024  # the kernel doubles it; twice the first byte window
_MAX_SEND_BUFFER_BYTES: Final = 4 * 2**20
_WRITE_HIGH_BYTES: Final = 64 * 1024
_INBOX_BYTES: Final = 2**20
_MAX_RESPONSE_BYTES: Final = 64 * 1024
_CLOSE_SECONDS: Final = 1.0
_TCP_INFO_BYTES: Final = 136
_BYTES_ACKED_AT: Final = 120  # tcpi_bytes_acked in linux/tcp.h, Linux 4.1 and later


class WebSocketLink(asyncio.Protocol):
    """See `Link`."""

    keeps_kinds_apart = False

    def __init__(self, config: EdgeHubConfig) -> None:
        self._config = config
        self._writer = FrameWriter(os.urandom, apply_mask)
        self._reader = FrameReader(config.max_frame_bytes)
        self._transport: asyncio.Transport | None = None
        self._socket: socket.socket | None = None
        self._upgrade: ClientProtocol | None = None
        self._upgraded: asyncio.Future[None] | None = None
        self._head = b""
        self._inbox: list[LinkEvent] = []
        self._inbox_bytes = 0
        self._is_reading_paused = False
        self._arrival: asyncio.Future[None] | None = None
        self._room: asyncio.Future[None] | None = None
        self._is_writable = True
        self._lost: LinkLost | None = None
        self._is_closing = False
        self._closed = asyncio.Event()
        self._send_buffer_bytes = _SEND_BUFFER_BYTES

    # --- Link ----------------------------------------------------------------------------------

    async def open(self, endpoint: Endpoint) -> None:
        context = tls.client_context(self._config)
        try:
            async with asyncio.timeout(self._config.handshake_seconds):
                await open_tls(lambda: self, endpoint, self._config, context)
                await self._shake_hands(endpoint)
        except TimeoutError as fault:
            self._abort()
            raise LinkLost(f"{endpoint}: no link within {self._config.handshake_seconds:g} s") from fault
        except BaseException:
            self._abort()
            raise

    async def _shake_hands(self, endpoint: Endpoint) -> None:
        assert self._transport is not None
        self._upgrade = ClientProtocol(parse_uri(cloud.url(self._config, endpoint)))
        request = self._upgrade.connect()
        for name, value in cloud.headers(self._config):
            request.headers[name] = value
        self._upgrade.send_request(request)
        self._upgraded = asyncio.get_running_loop().create_future()
        if self._lost is not None:
            raise self._lost
        self._transport.write(b"".join(self._upgrade.data_to_send()))
        await self._upgraded
        self._upgrade = None

    def write(self, payloads: Sequence[bytes], barrier: int | None = None, *, kind: Class = Class.DATA) -> None:
        if self._transport is None or self._lost is not None:
            return
        pieces = self._writer.texts([_as_json(payload) if payload[:1] == b"\n" else payload for payload in payloads])
        if barrier is not None:
            pieces.append(self._writer.control(PING, b"%d" % barrier))
        data = b"".join(pieces)
        # The byte window bounds what lies in the kernel; a message larger than that goes alone, and a buffer of
        # less than a few segments would only make it wait for delayed acknowledgements (40 ms each).
        self.fit_send_buffer(2 * len(data))
        self._transport.write(data)

    def is_writable(self, kind: Class) -> bool:
        return self._is_writable

    async def wait_writable(self, kind: Class) -> None:
        while not self._is_writable or self._lost is not None:
            if self._lost is not None:
                raise self._lost
            self._room = asyncio.get_running_loop().create_future()
            await self._room

    async def receive(self) -> list[LinkEvent]:
        while not self._inbox:
            if self._lost is not None:
                raise self._lost
            self._arrival = asyncio.get_running_loop().create_future()
            await self._arrival
        events, self._inbox, self._inbox_bytes = self._inbox, [], 0
        if self._is_reading_paused and self._transport is not None and self._lost is None:
            self._is_reading_paused = False
            self._transport.resume_reading()
        return events

    def acknowledged_bytes(self) -> int:
        if self._socket is None or self._lost is not None:
            return 0
        try:
            # Of this socket alone and free of what lies in user space, where SIOCOUTQ needs both known.
            info = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
        except OSError:
            return 0
        if len(info) < _BYTES_ACKED_AT + 8:
            return 0
        acknowledged: int = struct.unpack_from("=Q", info, _BYTES_ACKED_AT)[0]
        return acknowledged

    def fit_send_buffer(self, window_bytes: int) -> None:
        wanted = min(max(window_bytes, _SEND_BUFFER_BYTES), _MAX_SEND_BUFFER_BYTES)
        if self._socket is None or self._lost is not None or wanted <= self._send_buffer_bytes:
            return
        self._send_buffer_bytes = wanted
        self._set_buffers()

    async def close(self, *, is_polite: bool) -> None:
        if self._transport is None:
            return
        if self._lost is None and is_polite and not self._is_closing:
            self._transport.write(self._writer.close(1000))
        self._is_closing = True
        if is_polite:
            self._transport.close()
            try:
                async with asyncio.timeout(_CLOSE_SECONDS):
                    await self._closed.wait()
            except TimeoutError:
                pass
        self._transport.abort()

    # --- asyncio.Protocol ------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._socket = transport.get_extra_info("socket")
        self._set_buffers()
        transport.set_write_buffer_limits(high=_WRITE_HIGH_BYTES)

    def data_received(self, data: bytes) -> None:
        if self._upgrade is not None:
            data = self._receive_upgrade(data)
            if not data:
                return
        try:
            events = self._reader.receive(data)
        except FrameFault as fault:
            self._take(fault.events)
            if self._transport is not None and self._lost is None:
                self._transport.write(self._writer.close(1002, str(fault)))
                self._lose(LinkLost(f"CloudHub broke the websocket protocol: {fault}", is_cut_by_cloud=True))
            return
        self._take(events)

    def _receive_upgrade(self, data: bytes) -> bytes:
        """Gather the HTTP response; returns what came behind it."""
        assert self._upgrade is not None
        assert self._upgraded is not None
        self._head += data
        end = self._head.find(b"\r\n\r\n")
        if end < 0 and len(self._head) <= _MAX_RESPONSE_BYTES:
            return b""
        if self._upgraded.done():
            return b""
        head, rest = self._head[: end + 4], self._head[end + 4 :]
        fault: Exception | None = None
        if head.startswith(b"HTTP/1.1 101"):
            self._upgrade.receive_data(head)
            self._upgrade.events_received()
            fault = self._upgrade.handshake_exc
            if fault is None and self._upgrade.state is State.OPEN:
                self._upgrade = None
                self._upgraded.set_result(None)
                return rest
        self._upgraded.set_exception(LinkRefused(_explain_upgrade(fault, self._head)))
        return b""

    def _take(self, events: Sequence[object]) -> None:
        inbox = self._inbox
        for event in events:
            match event:
                case Text(payload):
                    inbox.append(Received(payload))
                    self._inbox_bytes += len(payload)
                case Pong(payload):
                    if payload.isdigit() and len(payload) < 20:
                        inbox.append(Passed(int(payload)))
                case Skipped(size):
                    inbox.append(SkippedMessage(size))
                case Ping(payload):
                    if self._transport is not None:
                        self._transport.write(self._writer.control(PONG, payload))
                case Close(code, reason):
                    if self._transport is not None and not self._is_closing:
                        answer = b"" if code == 1005 else struct.pack("!H", code)
                        self._transport.write(self._writer.control(CLOSE, answer))
                    why = f"CloudHub closed the link: code {code} {reason}".rstrip()
                    self._lose(LinkLost(why, is_cut_by_cloud=True))
        if inbox:
            _wake(self._arrival)
        if self._inbox_bytes > _INBOX_BYTES and not self._is_reading_paused and self._transport is not None:
            self._is_reading_paused = True
            self._transport.pause_reading()

    def eof_received(self) -> None:
        # CloudHub ends links so, without a close frame: a replaced session, a missed keepalive, a kick.
        self._lose(LinkLost("CloudHub ended the connection", is_cut_by_cloud=True))

    def connection_lost(self, exc: Exception | None) -> None:
        why = "the connection was closed" if exc is None else tls.explain(exc)
        self._lose(LinkLost(why, is_cut_by_cloud=exc is None or isinstance(exc, ConnectionResetError)))
        if self._upgraded is not None and not self._upgraded.done():
            if isinstance(exc, ssl.SSLError):
                self._upgraded.set_exception(LinkRefused(why))
            else:
                # A reset may overtake the alert that would say more.
                why = f"{why} before the upgrade: is it a CloudHub, and does it take our certificate?"
                self._upgraded.set_exception(LinkLost(why))
        self._closed.set()

    def pause_writing(self) -> None:
        self._is_writable = False

    def resume_writing(self) -> None:
        self._is_writable = True
        _wake(self._room)

    def _lose(self, lost: LinkLost) -> None:
        if self._lost is not None:
            return
        self._lost = lost
        if self._upgraded is not None and not self._upgraded.done():
            # Under TLS 1.3 the alert for a bad client certificate follows the handshake: wait for connection_lost.
            asyncio.get_running_loop().call_later(_CLOSE_SECONDS, self._fail_upgrade)
        _wake(self._arrival)
        _wake(self._room)
        if self._transport is not None:
            self._transport.close()

    def _fail_upgrade(self) -> None:
        if self._upgraded is not None and not self._upgraded.done() and self._lost is not None:
            self._upgraded.set_exception(self._lost)

    def _abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()
        if self._upgraded is not None and self._upgraded.done() and not self._upgraded.cancelled():
            self._upgraded.exception()  # seen: it is what `open` raised, or it came behind a time-out

    def _set_buffers(self) -> None:
        if self._socket is not None:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self._send_buffer_bytes)


def _as_json(payload: bytes) -> bytes:
    """Out of an outbox that was filled while the link was QUIC."""
    from runtime.viaduct import decode_message

    return to_cloud_json(cloud.with_kind(decode_message(payload)))


def _wake(waiter: asyncio.Future[None] | None) -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(None)


def _explain_upgrade(fault: Exception | None, head: bytes) -> str:
    if fault is not None:
        return f"CloudHub's answer to the upgrade is not valid: {fault}"
    if head.startswith(b"HTTP/1."):
        status = head.partition(b"\r\n")[0].partition(b" ")[2].decode("latin-1")
        return f"CloudHub answered the upgrade with HTTP {status[:80]}"
    return f"what answers there is no CloudHub: {head[:80]!r}"
