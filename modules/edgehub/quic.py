"""The QUIC adapter: a Link over IETF QUIC version 1, with viaduct's framing as KubeEdge's QUIC transport has it.

Stream 0 is the control stream: our headers go up on it, an ack comes back. Messages go on two further streams, one
for signals and one for data, so that a large upload holds up no signal; each keeps its order. What the cloud sends
comes on any stream, ours or one that it opened. The barrier is a query that CloudHub itself answers: it is read from
the stream behind everything that was written before it (docs/edgehub.md, QUIC).

aioquic is a pure state machine with a thin asyncio shell; the shell is ours, for it sends and receives many datagrams
in one turn, writes no more than the socket takes, and moves the connection to another local address.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from aioquic.quic import events
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection, QuicConnectionState
from aioquic.quic.packet import QuicErrorCode, QuicProtocolVersion
from aioquic.quic.stream import QuicStream
from aioquic.tls import AlertDescription, load_pem_private_key, load_pem_x509_certificates
from cryptography.exceptions import UnsupportedAlgorithm

from modules.edgehub import cloud, tls
from modules.edgehub.addresses import AddressWatch
from modules.edgehub.config import EdgeHubConfig, Endpoint
from modules.edgehub.dialling import Unreachable, interleaved, resolve
from modules.edgehub.link import Decoded, LinkEvent, LinkLost, LinkRefused, Passed, Received, SkippedMessage
from modules.edgehub.outbox import Class
from runtime import viaduct
from runtime.errors import MalformedMessage
from runtime.message import from_cloud_json
from runtime.viaduct import OtherUse, Oversized, PackageReader, ViaductFault

log = logging.getLogger("modules.edgehub")

CONTROL_STREAM: Final = 0
_CONTROL_BYTES: Final = 64 * 1024
"The largest package taken on the control stream: acks are 100 bytes."

CREDIT_BYTES: Final = 2 * 2**20
"So much may come, on one stream and on all together, before we have read it."
_EVENT_BYTES: Final = 256
"What an event takes in memory beside its content: a flood of tiny messages must not be for nothing."
_UNSENT_BYTES: Final = 128 * 1024
"A stream takes more while less than this waits for its first transmission."
_MAX_DATAGRAM_BYTES: Final = 65_536
_READ_DATAGRAMS: Final = 64
"In one turn of the loop; then others have their turn."
_SOCKET_BYTES: Final = 2**20
"Kernel buffers, each way: a burst of the other side must not be lost here."
_HINT: Final = "KubeEdge's released CloudHub does not speak QUIC version 1: docs/edgehub.md"
_SILENCE_SECONDS: Final = 7.0
"""For the first datagram of an answer: the fifth repetition of ours is on its way then, and the pauses between them
double. A new dial is quicker to find a cloud that has come back than the sixth or seventh."""
_ADDRESS_SECONDS: Final = 2.0
"For the first answer of one address, before the next one of the same name is tried."
_MOVE_PAUSE_SECONDS: Final = 1.0
_REFUSALS: Final = 3
_REFUSED_SECONDS: Final = 0.3
"A link that works counts as gone after so many refusals over so long, with nothing else in between."


class _Connection(QuicConnection):
    """aioquic's connection, with flow control that follows what was read, and a look at how far streams are.

    aioquic doubles its limits whenever half of one is used up, read or not: whoever does not read would gather
    without bound. The names with an underscore are aioquic's own; tests/sockets/test_edgehub_quic.py notices a
    release that changes them.
    """

    def __init__(self, configuration: QuicConfiguration) -> None:
        super().__init__(configuration=configuration)
        self.unread: dict[int, int] = {}
        "Bytes received and not read yet, by stream."

    @property
    def end(self) -> events.ConnectionTerminated | None:
        """How the connection ended, at once; aioquic's event comes after the draining period."""
        ended: events.ConnectionTerminated | None = self._close_event
        return ended

    @property
    def is_confirmed(self) -> bool:
        """The peer has told that the handshake is done: it has taken our certificate."""
        return bool(self._handshake_confirmed)

    @property
    def is_ended_by_peer(self) -> bool:
        return bool(self._state is QuicConnectionState.DRAINING)

    def unsent_bytes(self, stream_id: int) -> int:
        """Written and not yet in any packet."""
        sender = self._streams[stream_id].sender
        return int(sender._buffer_stop - sender.highest_offset)

    def acknowledged_bytes(self) -> int:
        """What the peer has of all streams, each from its start without a gap."""
        return sum(stream.sender._buffer_start for stream in self._streams.values())

    def _write_connection_limits(self, builder: Any, space: Any) -> None:
        limit = self._local_max_data
        used = limit.used
        wanted = used - sum(self.unread.values()) + CREDIT_BYTES
        if wanted - limit.value >= CREDIT_BYTES // 4:
            limit.value = wanted
        limit.used = 0  # so that aioquic does not double it
        try:
            super()._write_connection_limits(builder, space)
        finally:
            limit.used = used

    def _write_stream_limits(self, builder: Any, space: Any, stream: QuicStream) -> None:
        receiver, stream_id = stream.receiver, stream.stream_id
        if stream_id is None or not stream.max_stream_data_local or receiver.is_finished:
            return
        wanted = receiver.starting_offset() - self.unread.get(stream_id, 0) + CREDIT_BYTES
        if wanted - stream.max_stream_data_local >= CREDIT_BYTES // 4:
            stream.max_stream_data_local = wanted
        highest, receiver.highest_offset = receiver.highest_offset, 0
        try:
            super()._write_stream_limits(builder, space, stream)
        finally:
            receiver.highest_offset = highest


class _Lane:
    """The stream that one class of messages goes up on."""

    def __init__(self, stream_id: int) -> None:
        self.stream_id = stream_id
        self.room: asyncio.Future[None] | None = None


class QuicLink:
    """See `Link`."""

    keeps_kinds_apart = True

    def __init__(self, config: EdgeHubConfig) -> None:
        self._config = config
        self._loop: asyncio.AbstractEventLoop
        self._quic: _Connection | None = None
        self._socket: socket.socket | None = None
        self._peer: Any = None  # its socket address
        self._unsent: deque[bytes] = deque()  # datagrams that the socket did not take
        self._is_transmit_due = False
        self._timer: asyncio.TimerHandle | None = None
        self._readers: dict[int, PackageReader] = {}
        self._control = PackageReader(_CONTROL_BYTES)
        self._headers_id = ""
        self._opened: asyncio.Future[None] | None = None
        self._is_heard = False
        self._answered: asyncio.Future[None] | None = None
        self._lanes: dict[Class, _Lane] = {}
        self._idle_streams: deque[int] = deque()  # message streams that the cloud opened and we do not write on
        self._ignored: set[int] = set()
        self._partial_bytes_max = 2 * config.max_frame_bytes  # KubeEdge writes one message after another
        self._barriers: dict[str, int] = {}  # by the id of the query that stands for it
        self._inbox: list[LinkEvent] = []
        self._inbox_bytes = 0
        self._arrival: asyncio.Future[None] | None = None
        self._lost: LinkLost | None = None
        self._addresses: AddressWatch | None = None
        self._moved_at = float("-inf")
        self._refusals: list[float] = []  # when, since the last datagram came

    # --- Link ----------------------------------------------------------------------------------

    async def open(self, endpoint: Endpoint) -> None:
        await self._bounded(endpoint, self._open(endpoint))
        self._addresses = AddressWatch(self._loop, self._check_address)

    async def shake_hands(self, endpoint: Endpoint) -> None:
        """As far as TLS, both certificates verified: a connection that belongs to no node. Raises as `open` does."""
        await self._bounded(endpoint, self._connect_and_confirm(endpoint))

    async def _connect_and_confirm(self, endpoint: Endpoint) -> None:
        await self._connect(endpoint)
        assert self._quic is not None
        self._answered = self._loop.create_future()
        if self._lost is not None:
            raise self._lost
        if not self._quic.is_confirmed:
            await self._answered

    async def _open(self, endpoint: Endpoint) -> None:
        await self._connect(endpoint)
        await self._send_headers()

    async def _bounded(self, endpoint: Endpoint, opening: Coroutine[Any, Any, None]) -> None:
        self._loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._config.handshake_seconds):
                await opening
        except TimeoutError as fault:
            self._abort()
            raise LinkLost(f"{endpoint}: no link within {self._config.handshake_seconds:g} s ({_HINT})") from fault
        except (OSError, Unreachable) as fault:
            self._abort()
            raise LinkLost(f"{endpoint}: {_explain(fault)}") from fault
        except BaseException:
            self._abort()
            raise

    async def _connect(self, endpoint: Endpoint) -> None:
        """Handshake with the first address that answers."""
        configuration = _configuration(self._config, endpoint)
        addresses = interleaved(await resolve(endpoint.host, endpoint.port))
        while addresses:
            family, self._peer = addresses.pop(0)
            try:
                # The last one may take all the time there is.
                async with asyncio.timeout(_ADDRESS_SECONDS if addresses else None):
                    await self._dial(family, configuration)
                return
            except (OSError, TimeoutError, LinkLost):
                if not addresses:
                    raise
                self._abort()
                self._lost = None

    async def _dial(self, family: int, configuration: QuicConfiguration) -> None:
        self._socket = self._open_socket(family)
        self._quic = _Connection(configuration)
        self._opened = self._loop.create_future()
        self._loop.add_reader(self._socket, self._turn, self._read)
        self._quic.connect(self._peer, now=self._loop.time())
        self._transmit()
        silence = self._loop.call_later(_SILENCE_SECONDS, self._turn, self._give_up_silent)
        try:
            await self._opened
        finally:
            silence.cancel()

    def _give_up_silent(self) -> None:
        if not self._is_heard:
            self._lose(
                LinkLost(f"{self._peer[0]} port {self._peer[1]}: no answer within {_SILENCE_SECONDS:g} s ({_HINT})")
            )

    def _open_socket(self, family: int) -> socket.socket:
        """A socket that the kernel binds to the local address which leads to the peer."""
        opened = socket.socket(family, socket.SOCK_DGRAM)
        try:
            opened.setblocking(False)
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SOCKET_BYTES)
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)
            opened.connect(self._peer)
        except BaseException:
            opened.close()
            raise
        return opened

    async def _send_headers(self) -> None:
        """viaduct's greeting on the control stream. The connection's use is told by each stream, not by a header."""
        assert self._quic is not None
        message = viaduct.header_message(
            [(name, value) for name, value in cloud.headers(self._config) if name != "ConnectionUse"]
        )
        self._headers_id = message.id
        self._answered = self._loop.create_future()
        if self._lost is not None:
            raise self._lost
        assert self._quic.get_next_available_stream_id() == CONTROL_STREAM
        self._quic.send_stream_data(CONTROL_STREAM, viaduct.packages([viaduct.encode_message(message)]))
        self._transmit()
        await self._answered

    def write(self, payloads: Sequence[bytes], barrier: int | None = None, *, kind: Class = Class.DATA) -> None:
        quic = self._quic
        if quic is None or self._lost is not None:
            return
        pieces = [self._as_viaduct(payload) for payload in payloads]
        if barrier is not None:
            pieces.append(self._barrier_query(barrier))
        lane = self._lanes.get(kind)
        start = b""
        if lane is None:
            if self._idle_streams:
                lane = _Lane(self._idle_streams.popleft())
            else:
                lane = _Lane(quic.get_next_available_stream_id())
                start = viaduct.MESSAGES
            self._lanes[kind] = lane
        quic.send_stream_data(lane.stream_id, start + viaduct.packages(pieces))
        self._transmit_soon()

    @staticmethod
    def _as_viaduct(payload: bytes) -> bytes:
        """The payload; out of an outbox that was filled while the link was a websocket it is JSON."""
        return viaduct.encode_message(from_cloud_json(payload)) if payload[:1] == b"{" else payload

    def _barrier_query(self, barrier: int) -> bytes:
        """The query that CloudHub answers itself, once it has read everything before it on the stream.

        CloudHub reads message streams without looking for control messages, as it does on the websocket, so there is
        nothing else to ask it. On a connection that it has rejected nobody answers.
        """
        query = cloud.greeting()
        self._barriers[query.id] = barrier
        return viaduct.encode_message(query)

    def is_writable(self, kind: Class) -> bool:
        lane = self._lanes.get(kind)
        if lane is None or self._quic is None or self._lost is not None:
            return True
        return self._quic.unsent_bytes(lane.stream_id) < _UNSENT_BYTES

    async def wait_writable(self, kind: Class) -> None:
        while self._lost is None:
            if self.is_writable(kind):
                return
            lane = self._lanes[kind]
            lane.room = self._loop.create_future()
            await lane.room
        raise self._lost

    async def receive(self) -> list[LinkEvent]:
        while not self._inbox:
            if self._lost is not None:
                raise self._lost
            self._arrival = self._loop.create_future()
            await self._arrival
        taken, self._inbox, size, self._inbox_bytes = self._inbox, [], self._inbox_bytes, 0
        if self._quic is not None:
            self._quic.unread.clear()
            if size >= CREDIT_BYTES // 4:
                self._transmit_soon()  # the cloud may wait for the credit
        return taken

    def acknowledged_bytes(self) -> int:
        return self._quic.acknowledged_bytes() if self._quic is not None else 0

    def fit_send_buffer(self, window_bytes: int) -> None:
        """Nothing to do: what waits, waits in the streams, where a signal overtakes it."""

    async def close(self, *, is_polite: bool) -> None:
        if self._quic is not None and self._quic.end is None:
            # Twice, where somebody waits for it: nobody sends it again when it is lost.
            self._turn(partial(self._say_goodbye, 2 if is_polite else 1))
        self._lose(LinkLost("the connection was closed"))
        self._abort()

    def _say_goodbye(self, times: int) -> None:
        assert self._quic is not None
        self._quic.close(error_code=QuicErrorCode.NO_ERROR)
        for datagram, _ in self._quic.datagrams_to_send(now=self._loop.time()):
            for _ in range(times):
                self._send(datagram)

    # --- datagrams -----------------------------------------------------------------------------

    def _turn(self, step: Callable[[], None]) -> None:
        """What the loop calls. A fault in the step, on bytes from outside, ends the link rather than hang it."""
        try:
            step()
        except Exception as fault:
            log.exception("the QUIC link cannot go on")
            self._break(f"QUIC: {type(fault).__name__}: {fault}")

    def _read(self) -> None:
        """All datagrams that have come, then their events, then what they let us send."""
        if self._socket is None or self._quic is None:
            return
        now = self._loop.time()
        receive, take = self._socket.recv, self._quic.receive_datagram
        try:
            for _ in range(_READ_DATAGRAMS):
                take(receive(_MAX_DATAGRAM_BYTES), self._peer, now)
                self._is_heard = True
                self._refusals.clear()
        except BlockingIOError:
            pass
        except OSError as fault:
            self._on_socket_fault(fault)
        self._take_events()
        self._transmit()

    def _transmit_soon(self) -> None:
        """Once for everything that is written in this turn of the loop."""
        if not self._is_transmit_due:
            self._is_transmit_due = True
            self._loop.call_soon(self._turn, self._transmit_due)

    def _transmit_due(self) -> None:
        self._is_transmit_due = False
        self._transmit()

    def _transmit(self) -> None:
        if self._quic is None or self._socket is None:
            return
        if not self._unsent:
            for datagram, _ in self._quic.datagrams_to_send(now=self._loop.time()):
                self._send(datagram)
        for kind, lane in self._lanes.items():
            if lane.room is not None and self.is_writable(kind):
                _wake(lane.room)
        self._arm()

    def _send(self, datagram: bytes) -> None:
        if self._socket is None:
            return
        if self._unsent:
            self._unsent.append(datagram)
            return
        try:
            try:
                self._socket.send(datagram)
            except ConnectionRefusedError as fault:  # of an earlier one; this one was not sent
                self._on_socket_fault(fault)
                self._socket.send(datagram)
        except BlockingIOError:
            self._unsent.append(datagram)
            self._loop.add_writer(self._socket, self._turn, self._flush)
        except OSError as fault:
            self._on_socket_fault(fault)  # lost, as on the way

    def _flush(self) -> None:
        """The socket takes datagrams again."""
        waiting, self._unsent = self._unsent, deque()
        if self._socket is not None:
            self._loop.remove_writer(self._socket)
        for datagram in waiting:
            self._send(datagram)
        self._transmit()

    def _arm(self) -> None:
        """Have `_on_timer` called in time. A timer that is early anyway is left as it is: it looks again."""
        assert self._quic is not None
        due = self._quic.get_timer()
        if self._timer is not None:
            if due is not None and self._timer.when() <= due:
                return
            self._timer.cancel()
        self._timer = None if due is None else self._loop.call_at(due, self._turn, self._on_timer)

    def _on_timer(self) -> None:
        assert self._timer is not None
        now = max(self._timer.when(), self._loop.time())
        self._timer = None
        if self._quic is None:
            return
        due = self._quic.get_timer()
        if due is not None and due <= now:
            self._quic.handle_timer(now=now)
            self._take_events()
        self._transmit()

    # --- what comes ----------------------------------------------------------------------------

    def _take_events(self) -> None:
        quic = self._quic
        assert quic is not None
        while (event := quic.next_event()) is not None:
            if isinstance(event, events.StreamDataReceived):
                if self._lost is None:
                    self._take_data(event)
            elif isinstance(event, events.HandshakeCompleted):
                _wake(self._opened)
            elif isinstance(event, events.StreamReset | events.StopSendingReceived):
                self._on_reset(event.stream_id)
        if quic.is_confirmed and not self._headers_id:
            _wake(self._answered)  # of `shake_hands`
        if quic.end is not None:
            self._lose(_explain_end(quic.end, is_by_peer=quic.is_ended_by_peer))

    def _take_data(self, event: events.StreamDataReceived) -> None:
        assert self._quic is not None
        stream_id = event.stream_id
        try:
            if stream_id == CONTROL_STREAM:
                for package in self._control.receive(event.data):
                    self._take_control(package)
                return
            if stream_id & 2 or stream_id in self._ignored:
                return  # one-way, or raw bytes: no messages
            reader = self._readers.get(stream_id)
            if reader is None:
                is_theirs = bool(stream_id & 1)
                reader = PackageReader(self._config.max_frame_bytes, has_use_type=is_theirs)
                self._readers[stream_id] = reader
            was_known = reader.is_use_known
            self._take_packages(stream_id, reader.receive(event.data))
            if reader.is_use_known and not was_known:
                self._idle_streams.append(stream_id)
        except OtherUse:
            self._ignored.add(stream_id)
            self._quic.stop_stream(stream_id, QuicErrorCode.NO_ERROR)
            return
        except ViaductFault as fault:
            self._take_packages(stream_id, fault.packages)
            self._break(f"CloudHub broke viaduct's framing on stream {stream_id}: {fault}")
            return
        if len(self._readers) > 1 and sum(each.held_bytes for each in self._readers.values()) > self._partial_bytes_max:
            self._break("CloudHub sends too many large messages at once")
        if event.end_stream:
            if not reader.is_between_packages:
                self._break(f"CloudHub ended stream {stream_id} within a package")
            self._on_reset(stream_id)

    def _take_packages(self, stream_id: int, packages: Sequence[viaduct.Package]) -> None:
        assert self._quic is not None
        inbox, size = self._inbox, _EVENT_BYTES * len(packages)
        for package in packages:
            if isinstance(package, Oversized):
                inbox.append(SkippedMessage(package.size_bytes))
                continue
            size += len(package)
            try:
                message = viaduct.decode_message(package)
            except MalformedMessage:
                inbox.append(Received(package))  # the hub counts and reports it
                continue
            barrier = self._barriers.pop(message.parent_id, None) if message.parent_id else None
            if barrier is None:
                inbox.append(Decoded(cloud.with_kind(message), len(package)))
                continue
            inbox.append(Passed(barrier))
        if size:
            self._inbox_bytes += size
            self._quic.unread[stream_id] = self._quic.unread.get(stream_id, 0) + size
        if inbox:
            _wake(self._arrival)

    def _take_control(self, package: viaduct.Package) -> None:
        if isinstance(package, Oversized) or self._answered is None or self._answered.done():
            return
        try:
            message = viaduct.decode_message(package)
        except MalformedMessage:
            return
        if message.parent_id != self._headers_id:
            return
        if message.content == viaduct.ACK.encode():
            self._answered.set_result(None)
        else:
            self._answered.set_exception(LinkRefused(f"CloudHub does not take our headers: {message.content[:80]!r}"))

    def _on_reset(self, stream_id: int) -> None:
        """The cloud will read or write no more on a stream."""
        self._readers.pop(stream_id, None)
        if stream_id in self._idle_streams:
            self._idle_streams.remove(stream_id)
        if stream_id == CONTROL_STREAM or any(lane.stream_id == stream_id for lane in self._lanes.values()):
            self._break(f"CloudHub ended stream {stream_id}")

    def _break(self, why: str) -> None:
        """End the connection: what is missing on a stream cannot be had again."""
        self._lose(LinkLost(why, is_cut_by_cloud=True))

    # --- paths ---------------------------------------------------------------------------------

    def _on_socket_fault(self, fault: OSError) -> None:
        if self._opened is not None and not self._opened.done():
            self._opened.set_exception(fault)  # refused, unreachable
        elif fault.errno == errno.EMSGSIZE:
            self._lose(LinkLost("the path does not carry our datagrams: lower runtime.edgehub.quic.maxDatagram"))
        elif fault.errno == errno.ENOBUFS:
            pass  # lost in this machine's own queue
        elif fault.errno != errno.ECONNREFUSED:
            self._loop.call_soon(self._move)
        elif self._lost is None:
            # One refusal (ICMP) may be anybody's; several, and nothing else, mean that CloudHub is gone.
            now = self._loop.time()
            self._refusals.append(now)
            if len(self._refusals) >= _REFUSALS and now >= self._refusals[0] + _REFUSED_SECONDS:
                self._lose(LinkLost("CloudHub's port is closed", is_cut_by_cloud=True))

    def _check_address(self) -> None:
        """Something changed about this machine's addresses or routes: does the socket still leave by the best?"""
        if self._socket is None or self._lost is not None:
            return
        try:
            with self._open_socket(self._socket.family) as probe:
                best = probe.getsockname()[0]
        except OSError:
            return  # no route for now
        if best != self._socket.getsockname()[0]:
            self._move()

    def _move(self) -> None:
        """Go on from another local address: a new socket, another connection id (RFC 9000, 9.5)."""
        if self._socket is None or self._quic is None or self._lost is not None:
            return
        now = self._loop.time()
        if now < self._moved_at + _MOVE_PAUSE_SECONDS:
            return
        self._moved_at = now
        try:
            opened = self._open_socket(self._socket.family)
        except OSError as fault:
            log.debug("no way to the cloud for now: %s", fault)
            self._loop.call_later(_MOVE_PAUSE_SECONDS, self._check_address)
            return
        log.info("link moves to another local address from=%s to=%s", self._local(), opened.getsockname()[0])
        self._close_socket()
        self._socket = opened
        self._loop.add_reader(opened, self._turn, self._read)
        self._quic.change_connection_id()
        self._quic.send_ping(0)
        self._transmit()

    def _local(self) -> str:
        assert self._socket is not None
        try:
            return str(self._socket.getsockname()[0])
        except OSError:
            return "?"

    # --- the end -------------------------------------------------------------------------------

    def _lose(self, lost: LinkLost | LinkRefused) -> None:
        if self._lost is not None:
            return
        self._lost = lost if isinstance(lost, LinkLost) else LinkLost(str(lost))
        for waiter in (self._opened, self._answered):
            if waiter is not None and not waiter.done():
                waiter.set_exception(lost)
        _wake(self._arrival)
        for lane in self._lanes.values():
            _wake(lane.room)
        if self._addresses is not None:
            self._addresses.stop()

    def _abort(self) -> None:
        """Leave nothing open."""
        for waiter in (self._opened, self._answered):
            if waiter is not None and waiter.done() and not waiter.cancelled():
                waiter.exception()  # seen: it is what `open` raised, or it came behind a time-out
        self._opened = self._answered = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._addresses is not None:
            self._addresses.stop()
        self._quic = None
        self._close_socket()

    def _close_socket(self) -> None:
        self._unsent.clear()
        if self._socket is not None:
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)
            self._socket.close()
            self._socket = None


async def probe(config: EdgeHubConfig, endpoint: Endpoint) -> str | None:
    """See `link.probe`. Without headers on the control stream nobody is a node there."""
    link = QuicLink(config)
    try:
        await link.shake_hands(endpoint)
    except (LinkLost, LinkRefused) as fault:
        return str(fault)
    await link.close(is_polite=True)
    return None


def _configuration(config: EdgeHubConfig, endpoint: Endpoint) -> QuicConfiguration:
    """Verify CloudHub against the CA; present this node's certificate, and only that, if it is asked for.

    The files are read anew on each call. Raises LinkRefused naming the file and what is wrong.
    """
    tls.check_certificate(config, now=time.time())
    try:
        certificate = load_pem_x509_certificates(_read(config.cert_file, "tlsCertFile"))[0]
    except (ValueError, IndexError) as fault:
        raise LinkRefused(f"tlsCertFile {config.cert_file}: expected one PEM certificate: {fault}") from fault
    try:
        key = load_pem_private_key(_read(config.key_file, "tlsPrivateKeyFile"))
    except (ValueError, TypeError, UnsupportedAlgorithm) as fault:
        raise LinkRefused(f"tlsPrivateKeyFile {config.key_file}: expected a PEM key, no password: {fault}") from fault
    if certificate.public_key() != key.public_key():
        raise LinkRefused(
            f"tlsPrivateKeyFile {config.key_file}: it is not the key of the certificate {config.cert_file}"
        )
    authorities = _read(config.ca_file, "tlsCaFile")
    try:
        load_pem_x509_certificates(authorities)
    except ValueError as fault:
        raise LinkRefused(f"tlsCaFile {config.ca_file}: expected PEM certificates: {fault}") from fault
    return QuicConfiguration(
        is_client=True,
        alpn_protocols=list(config.quic_alpn) or None,
        idle_timeout=2 * config.keepalive_limit_seconds,  # CloudHub's own limit ends an idle link before
        max_data=CREDIT_BYTES,
        max_stream_data=CREDIT_BYTES,
        max_datagram_size=config.quic_datagram_bytes,
        server_name=config.server_name or endpoint.host,
        supported_versions=[QuicProtocolVersion.VERSION_1],
        cadata=authorities,
        certificate=certificate,
        private_key=key,
    )


def _read(path: str, key: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as fault:
        raise LinkRefused(f"{key} {path}: {fault.strerror or fault}") from fault


def _explain(fault: Exception) -> str:
    if isinstance(fault, OSError) and fault.errno is not None:
        return os.strerror(fault.errno)
    return str(fault) or type(fault).__name__


_ALERTS: Final[dict[int, str]] = {
    AlertDescription.bad_certificate: "it is not for client authentication",
    AlertDescription.certificate_expired: "it is expired or not yet valid (compare both clocks)",
    AlertDescription.unknown_ca: "it is not of CloudHub's CA",
    AlertDescription.certificate_required: "none was sent",
}


def _explain_end(end: events.ConnectionTerminated, *, is_by_peer: bool) -> LinkLost | LinkRefused:
    """Why the connection is over, in words for the operator."""
    reason = end.reason_phrase
    alert = end.error_code - QuicErrorCode.CRYPTO_ERROR
    if alert == AlertDescription.no_application_protocol:
        return LinkRefused("no application protocol in common with CloudHub (runtime.edgehub.quic.alpn)")
    if is_by_peer:
        if 0 <= alert <= 255:
            return LinkRefused(f"CloudHub refuses our certificate: {_ALERTS.get(alert, f'TLS alert {alert} {reason}')}")
        return LinkLost(f"CloudHub closed the link: code {end.error_code} {reason}".rstrip(), is_cut_by_cloud=True)
    if 0 <= alert <= 255:
        return LinkRefused(f"CloudHub's certificate does not verify: {reason}")
    if reason == "Idle timeout":
        return LinkLost("CloudHub is silent: nothing came for as long as a QUIC link may be idle")
    if end.error_code == QuicErrorCode.NO_ERROR:
        return LinkLost("the connection was closed")
    return LinkLost(f"QUIC: {reason or hex(end.error_code)}")


def _wake(waiter: asyncio.Future[None] | None) -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(None)
