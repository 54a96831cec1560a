"""CloudHub's websocket port: TLS, upgrade and frames around the hub's shell.

TLS is done here with memory buffers rather than by asyncio, since the double must control what is
on the wire to the byte: an end without close frame, a cut inside a frame, a line that is slow in
both directions, a socket that stays open and says nothing.
"""

from __future__ import annotations

import asyncio
import email.utils
import enum
import logging
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from cloudsim import frames, handshake, tls
from cloudsim.faults import Fault
from cloudsim.hub import Peer
from cloudsim.impairment import Pipe
from cloudsim.line import Line

log = logging.getLogger("cloudsim.websocket")

HANDSHAKE_SECONDS: Final = 30.0
"For TLS and the upgrade."
_LINE_BYTES: Final = 64 * 1024
"A slow line takes over this much before it pushes back."
_H2_REFUSAL: Final = bytes.fromhex("000000040000000000" + "0000080700000000000000000000000d")
"HTTP/2 SETTINGS and GOAWAY(HTTP_1_1_REQUIRED): an edge that offered h2 cannot upgrade."


class Shell(Protocol):
    """What a connection tells the hub (`HubShell`)."""

    def open(self, wire: Connection, peer: Peer) -> int: ...
    def receive(self, number: int, payload: bytes) -> bool: ...
    def settle(self) -> None: ...
    def closed(self, number: int, reason: str = ...) -> None: ...
    def writable(self, number: int, writable: bool) -> None: ...
    def line_faults(self) -> Sequence[Fault]: ...


class _Phase(enum.Enum):
    TLS = enum.auto()
    HTTP = enum.auto()
    FRAMES = enum.auto()
    ENDED = enum.auto()
    "The hub is done with it; bytes that still come are thrown away."


class Connection(Line[Pipe], asyncio.Protocol):
    """One TCP connection of a node. Fulfils `shell.Wire`."""

    def __init__(self, shell: Shell, context: ssl.SSLContext, max_message_bytes: int, on_lost: Callable[..., None]):
        super().__init__(Pipe(), Pipe())
        self._shell = shell
        self._from_node = ssl.MemoryBIO()
        self._to_node = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._from_node, self._to_node, server_side=True)
        self._reader = frames.FrameReader(max_message_bytes)
        self._on_lost = on_lost
        self._phase = _Phase.TLS
        self._head = b""
        self._number = 0
        self._tcp: asyncio.Transport | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._unwritten: list[bytes] = []
        self._corked = False
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._tcp_full = False
        self._told_writable = True

    # --- asyncio -------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._tcp = transport
        raw: socket.socket | None = transport.get_extra_info("socket")
        if raw is not None:
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._deadline = asyncio.get_running_loop().call_later(HANDSHAKE_SECONDS, self._too_slow)
        for fault in self._shell.line_faults():
            self.afflict(fault)

    def data_received(self, data: bytes) -> None:
        if self._upward.is_clear:
            self._process(data)
            return
        self._upward.push(data, time.monotonic())
        self._flow()
        self._arm("upward", self._upward, self._upward_due)

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, error: Exception | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        for timer in self._timers.values():
            timer.cancel()
        self._phase = _Phase.ENDED
        self._tcp = None
        self._on_lost(self)
        if self._number:
            self._shell.closed(self._number, f"the connection broke: {error}" if error else "the node closed")

    def pause_writing(self) -> None:
        self._tcp_full = True
        self._tell_writable()

    def resume_writing(self) -> None:
        self._tcp_full = False
        self._tell_writable()

    # --- bytes from the node ---------------------------------------------------------------------

    def _process(self, data: bytes) -> None:
        if self._phase is _Phase.ENDED:
            return
        self._from_node.write(data)
        self._corked = True
        try:
            if self._phase is _Phase.TLS and not self._shake_hands():
                return
            plain, ended = self._decrypt()
            if plain:
                self._plain(plain)
            if ended:
                self._end("the node closed")
        except ssl.SSLError as error:
            log.info("tls failed: %s", error)
            self._abandon()
        finally:
            self._corked = False
            self._flush()

    def _shake_hands(self) -> bool:
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            self._write_tls()
            return False
        self._write_tls()
        if self._tls.selected_alpn_protocol() == "h2":
            self._unwritten.append(_H2_REFUSAL)
            self._end()
            return False
        self._phase = _Phase.HTTP
        return True

    def _decrypt(self) -> tuple[bytes, bool]:
        """What can be read now, and whether the node has sent its close_notify."""
        pieces: list[bytes] = []
        read = self._tls.read
        try:
            while True:
                piece = read(262144)
                if not piece:
                    return b"".join(pieces), True
                pieces.append(piece)
        except ssl.SSLWantReadError:
            return b"".join(pieces), False
        except ssl.SSLZeroReturnError:
            return b"".join(pieces), True

    def _plain(self, data: bytes) -> None:
        if self._phase is _Phase.HTTP:
            self._http(data)
        elif self._phase is _Phase.FRAMES and not self._ignored:
            self._frames(data)

    def _http(self, data: bytes) -> None:
        self._head += data
        while self._phase is _Phase.HTTP:
            head, mark, rest = self._head.partition(b"\r\n\r\n")
            if not mark:
                if len(self._head) > handshake.MAX_REQUEST_BYTES:
                    self._unwritten.append(handshake.refuse_broken("request too large"))
                    self._end()
                return
            try:
                request = handshake.parse_request(head)
            except handshake.BadRequest as fault:
                self._unwritten.append(handshake.refuse_broken(str(fault)))
                self._end()
                return
            self._head = rest
            answer = handshake.answer(request, email.utils.formatdate(usegmt=True))
            if not answer.upgraded:
                self._unwritten.append(answer.data)
                continue
            if rest:
                # The library refuses bytes that came before it had answered.
                self._end()
                return
            self._unwritten.append(answer.data)
            self._upgrade(request)

    def _upgrade(self, request: handshake.Request) -> None:
        self._phase = _Phase.FRAMES
        if self._deadline is not None:
            self._deadline.cancel()
        self._number = self._shell.open(
            self,
            Peer(
                node=request.header("node_id"),
                project=request.header("project_id"),
                use=request.header("connectionuse"),
                certificates=tls.presented_certificates(self._tls),
                common_name=tls.common_name(self._tls),
            ),
        )

    def _frames(self, data: bytes) -> None:
        receive, number = self._shell.receive, self._number
        for kind, payload in self._reader.feed(data):
            if kind == frames.MESSAGE:
                if not receive(number, payload):
                    break
            elif kind == frames.PING:
                self._pong(frames.control_frame(frames.OPCODE_PONG, payload))
            elif kind == frames.CLOSE:
                self._unwritten.append(frames.echoed_close(payload))
                self._end("the node sent a close frame")
                break
            elif kind == frames.VIOLATION:
                self._unwritten.append(frames.violation_close(payload))
                self._end(f"protocol violation: {payload.decode()}")
                break
            elif kind == frames.TOO_LARGE:
                log.warning("message above the limit of this double connection=%d", number)
                self._end("a message above max_message_bytes")
                break
        self._shell.settle()

    def _pong(self, frame: bytes) -> None:
        if not self._answer_delay:
            self._unwritten.append(frame)
        else:
            asyncio.get_running_loop().call_later(self._answer_delay, self._write, frame)

    # --- bytes to the node -----------------------------------------------------------------------

    def send(self, payload: bytes) -> None:
        data = frames.message_frames(payload)
        if self._cut_next:
            self._cut_next = False
            self._write(data[: max(len(data) // 2, 1)])
            self._flush()
            self._end("fault: close-mid-frame")
            return
        self._write(data)

    def _write(self, data: bytes) -> None:
        if self._phase is _Phase.ENDED:
            return
        self._unwritten.append(data)
        if not self._corked:
            self._flush()

    def _flush(self) -> None:
        if not self._unwritten or self._tcp is None:
            return
        data = b"".join(self._unwritten) if len(self._unwritten) > 1 else self._unwritten[0]
        self._unwritten.clear()
        view = memoryview(data)
        while view:
            view = view[self._tls.write(view) :]
        self._write_tls()

    def _write_tls(self) -> None:
        """Give the line what TLS wants to write."""
        data = self._to_node.read()
        if not data or self._tcp is None or self._half_open:
            return
        if self._downward.is_clear:
            self._tcp.write(data)
            return
        self._downward.push(data, time.monotonic())
        self._tell_writable()
        self._arm("downward", self._downward, self._downward_due)

    def _tell_writable(self) -> None:
        writable = not self._tcp_full and self._downward.held_bytes < _LINE_BYTES
        if writable != self._told_writable:
            self._told_writable = writable
            if self._number:
                self._shell.writable(self._number, writable)

    # --- ends --------------------------------------------------------------------------------------

    def drop(self) -> None:
        """close_notify and FIN, no websocket close frame. A half-open socket stays as it is."""
        self._flush()
        self._end()

    def _end(self, reason: str = "the hub closed") -> None:
        if self._phase is _Phase.ENDED:
            return
        self._flush()
        self._phase = _Phase.ENDED
        if self._half_open or self._tcp is None:
            return
        try:
            self._tls.unwrap()
        except ssl.SSLError:
            pass  # it wants the node's close_notify, or the handshake had not ended: ours is written
        self._write_tls()
        self._close_when_written()
        if self._number:
            self._shell.closed(self._number, reason)

    def _close_when_written(self) -> None:
        if self._downward.is_clear and self._tcp is not None:
            self._tcp.close()

    def _abandon(self) -> None:
        """TLS is broken: send its alert and go."""
        self._phase = _Phase.ENDED
        self._unwritten.clear()
        self._write_tls()
        self._close_when_written()

    def abort(self) -> None:
        """Close the socket whatever state it is in."""
        self._phase = _Phase.ENDED
        if self._tcp is not None:
            self._tcp.abort()

    def _too_slow(self) -> None:
        log.info("no upgrade within %.0f s", HANDSHAKE_SECONDS)
        self.abort()

    # --- faults --------------------------------------------------------------------------------------

    def read(self, wanted: bool) -> None:
        self._ignored = not wanted
        self._flow()

    def afflict(self, fault: Fault) -> None:
        super().afflict(fault)
        self._flow()

    def _heal(self) -> None:
        was_half_open = self._half_open
        self._clear_faults(time.monotonic())
        if was_half_open and self._tcp is not None:
            # What was written meanwhile is lost, so this TLS connection cannot go on.
            self.abort()
            return
        self._upward_due()
        self._downward_due()
        self._flow()

    def _flow(self) -> None:
        """Read from the socket, or leave the bytes to pile up in the node."""
        if self._tcp is None:
            return
        paused = self._ignored or self._stalled or self._half_open or self._upward.held_bytes >= _LINE_BYTES
        if paused and self._tcp.is_reading():
            self._tcp.pause_reading()
        elif not paused and not self._tcp.is_reading() and not self._tcp.is_closing():
            self._tcp.resume_reading()

    def _arm(self, name: str, pipe: Pipe, due: Callable[[], None]) -> None:
        deadline = pipe.next_deadline()
        timer = self._timers.pop(name, None)
        if timer is not None:
            timer.cancel()
        if deadline is not None:
            self._timers[name] = asyncio.get_running_loop().call_at(deadline, due)

    def _upward_due(self) -> None:
        data = self._upward.pop(time.monotonic())
        if data and not self._half_open:
            self._process(data)
        self._flow()
        self._arm("upward", self._upward, self._upward_due)

    def _downward_due(self) -> None:
        data = self._downward.pop(time.monotonic())
        if self._tcp is None:
            return
        if data and not self._half_open:
            self._tcp.write(data)
        self._tell_writable()
        self._arm("downward", self._downward, self._downward_due)
        if self._phase is _Phase.ENDED and not self._downward.held_bytes:
            self._tcp.close()


class Listener:
    """The port. It can be closed and opened again at the same number."""

    def __init__(
        self,
        shell: Shell,
        context: ssl.SSLContext,
        host: str,
        port: int,
        *,
        max_message_bytes: int,
        receive_buffer_bytes: int | None,
    ) -> None:
        self._shell = shell
        self.context = context
        "Of connections made from now on."
        self._host = host
        self.port = port
        self._max_message_bytes = max_message_bytes
        self._receive_buffer_bytes = receive_buffer_bytes
        self._server: asyncio.Server | None = None
        self._connections: set[Connection] = set()

    async def open(self) -> None:
        """Listen. Raises OSError, among others when the port is in use."""
        if self._server is not None:
            return
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        raw = socket.socket(family, socket.SOCK_STREAM)
        try:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if self._receive_buffer_bytes is not None:
                # Accepted sockets inherit it only when it is set before listen().
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._receive_buffer_bytes)
            raw.bind((self._host, self.port))
        except OSError:
            raw.close()
            raise
        self.port = raw.getsockname()[1]
        self._server = await asyncio.get_running_loop().create_server(self._connection, sock=raw, backlog=512)

    def _connection(self) -> Connection:
        connection = Connection(self._shell, self.context, self._max_message_bytes, self._connections.discard)
        self._connections.add(connection)
        return connection

    @property
    def is_open(self) -> bool:
        return self._server is not None

    def close(self) -> None:
        """Refuse connections from now on; those that exist stay."""
        if self._server is not None:
            self._server.close()
            self._server = None

    async def aclose(self) -> None:
        """Refuse connections and end those that exist; returns when their sockets are closed."""
        self.close()
        loop = asyncio.get_running_loop()
        end = loop.time() + 0.5  # for close_notify to leave in order
        while self._connections and loop.time() < end:
            await asyncio.sleep(0.005)
        for connection in list(self._connections):
            connection.abort()
        while self._connections:
            await asyncio.sleep(0)
