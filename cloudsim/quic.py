"""The hub's QUIC port: IETF QUIC version 1 with viaduct's framing, around the hub's shell.

KubeEdge's released CloudHub speaks Google's QUIC of 2018 instead; what happens above the streams is the
same (docs/cloudlink.md, QUIC). Only imported where there is a QUIC port: aioquic and protobuf are large.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
import random
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, Protocol, assert_never

from aioquic import tls
from aioquic._buffer import Buffer
from aioquic.quic import events
from aioquic.quic.configuration import SMALLEST_MAX_DATAGRAM_SIZE, QuicConfiguration
from aioquic.quic.connection import NetworkAddress, QuicConnection
from aioquic.quic.packet import (
    QuicFrameType,
    QuicPacketType,
    QuicProtocolVersion,
    encode_quic_version_negotiation,
    pull_quic_header,
)
from aioquic.quic.packet_builder import QuicPacketBuilder
from aioquic.quic.recovery import QuicPacketSpace
from aioquic.quic.stream import QuicStream

from cloudsim import viaduct
from cloudsim.certificates import Authority, Pair
from cloudsim.faults import Fault
from cloudsim.hub import Peer
from cloudsim.impairment import DatagramPipe
from cloudsim.lanes import (
    CONTROL_STREAM,
    FREED,
    Broken,
    Control,
    ControlEnded,
    Freed,
    LaneEvent,
    Lanes,
    Package,
)
from cloudsim.line import Line
from cloudsim.wire import CloudMessage, Header, Route, Undecodable
from runtime.errors import MalformedMessage
from runtime.message import new_id
from runtime.viaduct import ACK, MESSAGES, NACK, decode_message, headers_of, packages

log = logging.getLogger("cloudsim.quic")

IDLE_SECONDS: Final = 30.0
"A connection on which nothing comes for so long ends (quic-go's default)."
MAX_INCOMING_STREAMS: Final = 10_000
"CloudHub's default."
STREAM_WINDOW_BYTES: Final = 4 * 2**20
CONNECTION_WINDOW_BYTES: Final = 12 * 2**20
"What a node may send before it is read; quic-go allows 6 and 15 MiB at most."
_MAX_DATAGRAM_BYTES: Final = 65_536
_READ_DATAGRAMS: Final = 64
"In one turn of the loop; then others have their turn."
_UNSENT_BYTES: Final = 64 * 1024
"A write to a stream returns once less than this has not gone into packets yet."


class Shell(Protocol):
    """What a connection tells the hub (`HubShell`)."""

    def open(self, wire: Connection, peer: Peer) -> int: ...
    def dispatch(self, number: int, message: CloudMessage, payload: bytes) -> bool: ...
    def settle(self) -> None: ...
    def closed(self, number: int, reason: str = ...) -> None: ...
    def crash(self, reason: str) -> None: ...
    def writable(self, number: int, writable: bool) -> None: ...
    def line_faults(self) -> Sequence[Fault]: ...


class _CertificateRequired(tls.Alert):
    description = tls.AlertDescription.certificate_required


class _UnknownAuthority(tls.Alert):
    description = tls.AlertDescription.unknown_ca


class _MutualTls(tls.Context):
    """Demands a client's certificate and verifies it, which aioquic's server does not."""

    authority: Authority
    chain: list[bytes]
    "The certificates (DER) that the client sent, its own first."

    @classmethod
    def adopt(cls, context: tls.Context, authority: Authority) -> None:
        """Make a fresh server's context demand a certificate."""
        context.__class__ = cls
        assert isinstance(context, cls)
        context.authority = authority
        context.chain = []
        context._request_client_certificate = True

    def _set_peer_certificate(self, certificate: tls.Certificate) -> None:
        super()._set_peer_certificate(certificate)
        self.chain = [each[0] for each in certificate.certificates]

    def _server_handle_certificate(self, input_buf: Buffer) -> None:
        super()._server_handle_certificate(input_buf)
        if not self.chain:
            raise _CertificateRequired("the client has no certificate")

    def _server_handle_certificate_verify(self, input_buf: Buffer) -> None:
        super()._server_handle_certificate_verify(input_buf)
        objection = self.authority.objection(self.chain[0], datetime.datetime.now(datetime.UTC))
        if objection is None:
            return
        if "unknown authority" in objection:
            raise _UnknownAuthority(objection)
        if "expired" in objection:
            raise tls.AlertCertificateExpired(objection)
        raise tls.AlertBadCertificate(objection)


class _Quic(QuicConnection):
    """aioquic's connection with windows that follow what has been read.

    aioquic doubles its windows for as long as data comes, whoever reads it or not.
    """

    def __init__(
        self,
        *,
        configuration: QuicConfiguration,
        original_destination_connection_id: bytes,
        lanes: Lanes,
        authority: Authority | None,
    ) -> None:
        super().__init__(
            configuration=configuration, original_destination_connection_id=original_destination_connection_id
        )
        self._local_max_streams_bidi.value = self._local_max_streams_bidi.sent = MAX_INCOMING_STREAMS
        self._lanes = lanes
        self._authority = authority

    @property
    def client_chain(self) -> list[bytes]:
        """The client's certificates (DER); empty: none was asked for."""
        return self.tls.chain if isinstance(self.tls, _MutualTls) else []

    def unsent_bytes(self, stream: int) -> int:
        """What was written to a stream and has not gone into a packet yet."""
        found = self._streams.get(stream)
        return found.sender._buffer_stop - found.sender.highest_offset if found else 0

    def _initialize(self, peer_cid: bytes) -> None:
        super()._initialize(peer_cid)
        if self._authority is not None:
            _MutualTls.adopt(self.tls, self._authority)

    def _write_connection_limits(self, builder: QuicPacketBuilder, space: QuicPacketSpace) -> None:
        limit, streams = self._local_max_data, self._local_max_streams_bidi
        wanted = self._lanes.taken + CONNECTION_WINDOW_BYTES
        if wanted - limit.value >= CONNECTION_WINDOW_BYTES // 4:
            limit.value = wanted
        for each, step in ((limit, 0), (streams, MAX_INCOMING_STREAMS // 4)):
            if each.value <= each.sent + step:
                continue
            buf = builder.start_frame(
                each.frame_type, capacity=9, handler=self._on_connection_limit_delivery, handler_args=(each,)
            )
            buf.push_uint_var(each.value)
            each.sent = each.value

    def _write_stream_limits(self, builder: QuicPacketBuilder, space: QuicPacketSpace, stream: QuicStream) -> None:
        number = stream.stream_id
        if number is None or not stream.max_stream_data_local or stream.receiver.is_finished:
            return
        wanted = self._lanes.taken_from(number) + STREAM_WINDOW_BYTES
        if wanted - stream.max_stream_data_local >= STREAM_WINDOW_BYTES // 4:
            stream.max_stream_data_local = wanted
        if stream.max_stream_data_local_sent != stream.max_stream_data_local:
            buf = builder.start_frame(
                QuicFrameType.MAX_STREAM_DATA,
                capacity=17,
                handler=self._on_max_stream_data_delivery,
                handler_args=(stream,),
            )
            buf.push_uint_var(number)
            buf.push_uint_var(stream.max_stream_data_local)
            stream.max_stream_data_local_sent = stream.max_stream_data_local


class Connection(Line[DatagramPipe[tuple[bytes, NetworkAddress]]]):
    """One QUIC connection of a node. Fulfils `shell.Wire`."""

    def __init__(self, shell: Shell, listener: Listener, quic: _Quic, lanes: Lanes, chance: random.Random) -> None:
        super().__init__(DatagramPipe(chance), DatagramPipe(chance))
        self._shell = shell
        self._listener = listener
        self._quic = quic
        self._lanes = lanes
        self._number = 0
        self._is_over = False  # the hub is done with it
        self._unread: list[tuple[int, bytes, bool]] = []
        self._outgoing: deque[bytes] = deque()
        self._writing: int | None = None  # the stream last written to
        self._told_writable = True
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._transmission: asyncio.Handle | None = None
        for fault in shell.line_faults():
            self.afflict(fault)

    # --- datagrams ---------------------------------------------------------------------------------

    def datagram(self, data: bytes, address: NetworkAddress) -> None:
        """One has come over the network. Call `progress` behind the last of several."""
        if self._upward.is_clear:
            self._receive(data, address)
            return
        self._upward.push((data, address), len(data), time.monotonic())
        self._arm("upward", self._upward.next_deadline(), self._upward_due)

    def _receive(self, data: bytes, address: NetworkAddress) -> None:
        if not self._half_open:
            self._quic.receive_datagram(data, address, now=time.monotonic())

    def progress(self) -> None:
        """Do what the datagrams that have come ask for."""
        self._take_events()
        self._transmit()

    def _upward_due(self) -> None:
        for data, address in self._upward.pop(time.monotonic()):
            self._receive(data, address)
        self.progress()
        self._arm("upward", self._upward.next_deadline(), self._upward_due)

    def _downward_due(self) -> None:
        for data, address in self._downward.pop(time.monotonic()):
            self._listener.send(data, address)
        self._arm("downward", self._downward.next_deadline(), self._downward_due)

    def _transmit(self) -> None:
        """Send what the connection wants to send, and arm its timer."""
        if self._transmission is not None:
            self._transmission.cancel()
            self._transmission = None
        self._send_datagrams()
        while self._outgoing and self._write_next():
            while self._outgoing and self._write_next():
                pass  # small messages share datagrams
            self._send_datagrams()
        self._tell_writable()
        self._arm("quic", self._quic.get_timer(), self._quic_due)

    def _send_datagrams(self) -> None:
        now = time.monotonic()
        for data, address in self._quic.datagrams_to_send(now=now):
            if self._half_open:
                continue
            if self._downward.is_clear:
                self._listener.send(data, address)
            else:
                self._downward.push((data, address), len(data), now)
                self._arm("downward", self._downward.next_deadline(), self._downward_due)

    def _transmit_soon(self) -> None:
        if self._transmission is None:
            self._transmission = asyncio.get_running_loop().call_soon(self._transmit)

    def _quic_due(self) -> None:
        self._quic.handle_timer(now=time.monotonic())
        self._take_events()
        self._transmit()

    def _arm(self, name: str, deadline: float | None, due: Callable[[], None]) -> None:
        timer = self._timers.get(name)
        if timer is not None:
            if timer.when() == deadline and not timer.cancelled():
                return
            timer.cancel()
            del self._timers[name]
        if deadline is not None:

            def fire() -> None:
                self._timers.pop(name, None)
                due()

            # The loop's clock is time.monotonic as well (asyncio.BaseEventLoop.time).
            self._timers[name] = asyncio.get_running_loop().call_at(deadline, fire)

    # --- what comes from the node ------------------------------------------------------------------

    def _take_events(self) -> None:
        has_read = False
        while (event := self._quic.next_event()) is not None:
            match event:
                case events.StreamDataReceived():
                    self._read(event.stream_id, event.data, event.end_stream)
                    has_read = True
                case events.StreamReset() | events.StopSendingReceived():
                    if not self._is_over:
                        self._perform([self._lanes.free(event.stream_id, "the node reset the stream")])
                case events.ConnectionIdIssued():
                    self._listener.add(event.connection_id, self)
                case events.ConnectionIdRetired():
                    self._listener.remove(event.connection_id)
                case events.ConnectionTerminated():
                    self._terminated(event)
                case _:
                    pass  # handshake and ping need nothing
        if has_read:
            self._shell.settle()

    def _read(self, stream: int, data: bytes, ended: bool) -> None:
        if self._is_over:
            return
        if self._stalled or self._ignored:
            self._unread.append((stream, data, ended))  # bounded by the windows, which do not move meanwhile
        else:
            self._perform(self._lanes.receive(stream, data, ended))

    def _perform(self, found: Iterable[LaneEvent]) -> None:
        for event in found:
            if self._is_over:
                return
            match event:
                case Control(payload):
                    self._control(payload)
                case Package(stream, payload):
                    self._package(stream, payload)
                case ControlEnded():
                    if not self._number:
                        self._serve({})
                case Freed(stream, reason):
                    log.info("stream given up connection=%d stream=%d: %s", self._number, stream, reason)
                    self._give_up(stream)
                case Broken(reason):
                    self._end(reason)
                case _:
                    assert_never(event)

    def _control(self, payload: bytes) -> None:
        try:
            request = viaduct.decode(payload)
        except viaduct.CrashingPayload as fault:
            self._shell.crash(str(fault))
            return
        except Undecodable as fault:
            self._perform([self._lanes.free(CONTROL_STREAM, str(fault))])
            return
        result, headers = ACK, None
        if not self._number:
            try:
                headers = headers_of(decode_message(payload))
            except MalformedMessage:
                result, headers = NACK, {}
        route = request.route
        answer = CloudMessage(
            Header(new_id(), request.header.msg_id, time.time_ns() // 1_000_000),
            Route(source=route.source, group=route.group, operation="response", resource=route.resource),
            result,
        )
        data = packages([viaduct.encode(answer)])
        if self._answer_delay:
            asyncio.get_running_loop().call_later(self._answer_delay, self._write, CONTROL_STREAM, data)
        else:
            self._write(CONTROL_STREAM, data)
        if headers is not None:
            self._serve(headers)

    def _serve(self, headers: Any) -> None:
        """The headers are known, or there are none: the connection gets its session, or silently none."""
        chain = self._quic.client_chain
        self._number = self._shell.open(
            self,
            Peer(
                # Spelt as Go's http.Header looks it up: the map is not made canonical again.
                node=next(iter(headers.get("Node_id", ())), ""),
                project=next(iter(headers.get("Project_id", ())), ""),
                certificates=len(chain),
                common_name=Authority.subject_of(chain[0])[1] if chain else "",
                codec=viaduct.VIADUCT_CODEC,
            ),
        )
        self._perform(self._lanes.serve())

    def _package(self, stream: int, payload: bytes) -> None:
        try:
            message = viaduct.decode(payload)
        except viaduct.CrashingPayload as fault:
            self._shell.crash(str(fault))
        except Undecodable as fault:
            self._perform([self._lanes.free(stream, str(fault))])
        else:
            self._shell.dispatch(self._number, message, payload)

    def _give_up(self, stream: int) -> None:
        for action in (self._quic.stop_stream, self._quic.reset_stream):
            try:
                action(stream, FREED)
            except ValueError:
                pass  # it is finished already

    def _terminated(self, event: events.ConnectionTerminated) -> None:
        self._listener.forget(self)
        self._is_over = True
        if self._number:
            reason = f": {event.reason_phrase}" if event.reason_phrase else ""
            self._shell.closed(self._number, f"the node closed (0x{event.error_code:x}{reason})")
        elif event.error_code:
            log.info("no connection: 0x%x %s", event.error_code, event.reason_phrase)

    # --- what goes to the node -----------------------------------------------------------------------

    def send(self, payload: bytes) -> None:
        if self._answer_delay and viaduct.decode(payload).route.source == "cloudhub":
            asyncio.get_running_loop().call_later(self._answer_delay, self._queue, payload)
        else:
            self._queue(payload)

    def _queue(self, payload: bytes) -> None:
        if self._is_over:
            return
        self._outgoing.append(payload)
        self._write_next()
        self._tell_writable()

    def _write_next(self) -> bool:
        """Write the first waiting message, if the one before has gone. The hub writes one at a time."""
        if self._is_over or (self._writing is not None and self._quic.unsent_bytes(self._writing) >= _UNSENT_BYTES):
            return False
        stream = self._lanes.pick()
        if stream is None:
            if not self._lanes.may_open:
                return False
            stream = self._quic.get_next_available_stream_id()
            self._lanes.opened(stream)
            self._write(stream, MESSAGES)
        data = packages([self._outgoing.popleft()])
        self._writing = stream
        if self._cut_next:
            self._cut_next = False
            self._write(stream, data[: len(data) // 2])
            self._end("fault: close-mid-frame")
            return False
        self._write(stream, data)
        return True

    def _write(self, stream: int, data: bytes) -> None:
        if self._is_over:
            return
        try:
            self._quic.send_stream_data(stream, data)
        except (ValueError, RuntimeError) as fault:
            log.info("nothing can be written connection=%d stream=%d: %s", self._number, stream, fault)
        self._transmit_soon()

    def _tell_writable(self) -> None:
        writable = not self._outgoing
        if writable != self._told_writable:
            self._told_writable = writable
            if self._number and not self._is_over:
                self._shell.writable(self._number, writable)

    # --- ends ----------------------------------------------------------------------------------------

    def drop(self) -> None:
        """CONNECTION_CLOSE. A half-open connection says nothing."""
        self._end()

    def _end(self, reason: str = "the hub closed") -> None:
        if self._is_over:
            return
        self._send_datagrams()
        self._is_over = True
        self._outgoing.clear()
        self._unread.clear()
        # viaduct gives its streams up before it closes, and a node may hear of that first (q2_55 of the vectors).
        for stream in self._lanes.messages:
            self._give_up(stream)
        self._send_datagrams()
        self._quic.close()
        self._transmit()
        if self._number:
            self._shell.closed(self._number, reason)

    def abandon(self) -> None:
        """Let go of all timers: the port closes."""
        self._is_over = True
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        if self._transmission is not None:
            self._transmission.cancel()

    # --- faults --------------------------------------------------------------------------------------

    def read(self, wanted: bool) -> None:
        self._ignored = not wanted
        self._read_on()

    def _lose(self, rate: float) -> None:
        self._upward.loss = self._downward.loss = rate

    def _heal(self) -> None:
        if not self._listener.holds(self):
            return
        self._clear_faults(time.monotonic())
        self._upward_due()
        self._downward_due()
        self._read_on()

    def _read_on(self) -> None:
        if self._unread and not (self._stalled or self._ignored):
            unread, self._unread = self._unread, []
            for stream, data, ended in unread:
                self._read(stream, data, ended)
            self._shell.settle()
            self._transmit_soon()  # the windows have moved


class Listener(asyncio.DatagramProtocol):
    """The port. It can refuse connections while it keeps those that exist."""

    def __init__(
        self,
        shell: Shell,
        authority: Authority,
        server: Pair,
        host: str,
        port: int,
        *,
        sees_client_certificates: bool,
        alpn: Sequence[str],
        max_message_bytes: int,
        chance: random.Random,
    ) -> None:
        self._shell = shell
        self._authority = authority if sees_client_certificates else None
        self._host = host
        self.port = port
        self._alpn = list(alpn)
        self._max_message_bytes = max_message_bytes
        self._chance = chance
        self.present(server)
        self._connections: dict[bytes, Connection] = {}  # by each connection id in use
        self._transport: asyncio.DatagramTransport | None = None
        self._socket: socket.socket | None = None
        self._is_open = False

    def present(self, server: Pair) -> None:
        """The server's certificate in connections made from now on."""
        configuration = QuicConfiguration(
            is_client=False,
            alpn_protocols=self._alpn or None,
            idle_timeout=IDLE_SECONDS,
            max_data=CONNECTION_WINDOW_BYTES,
            max_stream_data=STREAM_WINDOW_BYTES,
            supported_versions=[QuicProtocolVersion.VERSION_1],
        )
        configuration.load_cert_chain(server.certificate, server.key)
        self._configuration = configuration

    async def open(self) -> None:
        """Take connections. Raises OSError, among others when the port is in use."""
        if self._transport is None:
            raw = socket.socket(socket.AF_INET6 if ":" in self._host else socket.AF_INET, socket.SOCK_DGRAM)
            try:
                raw.setblocking(False)
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * 2**20)
                raw.bind((self._host, self.port))
            except OSError:
                raw.close()
                raise
            self.port = raw.getsockname()[1]
            self._socket = raw
            self._transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(lambda: self, sock=raw)
        self._is_open = True

    @property
    def is_open(self) -> bool:
        return self._is_open

    def close(self) -> None:
        """Answer no new connection from now on; those that exist stay."""
        self._is_open = False

    async def aclose(self) -> None:
        """End the connections and close the port."""
        self.close()
        for connection in set(self._connections.values()):
            connection.drop()
            connection.abandon()
        self._connections.clear()
        if self._transport is not None:
            self._transport.close()
            self._transport = self._socket = None
            await asyncio.sleep(0)  # the socket is closed in the loop's next round

    # --- what connections call -----------------------------------------------------------------------

    def send(self, data: bytes, address: NetworkAddress) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.sendto(data, address)

    def add(self, connection_id: bytes, connection: Connection) -> None:
        self._connections[connection_id] = connection

    def remove(self, connection_id: bytes) -> None:
        self._connections.pop(connection_id, None)

    def holds(self, connection: Connection) -> bool:
        return connection in self._connections.values()

    def forget(self, connection: Connection) -> None:
        """The connection is over in both directions."""
        connection.abandon()
        self._connections = {key: each for key, each in self._connections.items() if each is not connection}

    # --- asyncio ---------------------------------------------------------------------------------------

    def datagram_received(self, data: bytes, address: Any) -> None:
        """asyncio reads one datagram in a turn of the loop; here all that have come are read, and then answered."""
        concerned = {self._received(data, address): None}
        for _ in range(_READ_DATAGRAMS):
            if self._socket is None:
                break
            try:
                concerned[self._received(*self._socket.recvfrom(_MAX_DATAGRAM_BYTES))] = None
            except OSError:
                break  # none is left, or asyncio will meet the fault itself
        for connection in concerned:
            if connection is not None:
                connection.progress()

    def _received(self, data: bytes, address: Any) -> Connection | None:
        """The connection that a datagram was given to."""
        try:
            header = pull_quic_header(Buffer(data=data), host_cid_length=self._configuration.connection_id_length)
        except ValueError:
            return None  # not QUIC
        connection = self._connections.get(header.destination_cid)
        if connection is not None:
            connection.datagram(data, address)
            return connection
        if not self._is_open or len(data) < SMALLEST_MAX_DATAGRAM_SIZE or header.version is None:
            return None
        if header.version not in self._configuration.supported_versions:
            if header.packet_type is not QuicPacketType.VERSION_NEGOTIATION:
                answer = encode_quic_version_negotiation(
                    source_cid=header.destination_cid,
                    destination_cid=header.source_cid,
                    supported_versions=self._configuration.supported_versions,
                )
                self.send(answer, address)
        elif header.packet_type is QuicPacketType.INITIAL:
            connection = self._connect(header.destination_cid)
            connection.datagram(data, address)
        return connection

    def error_received(self, error: Exception) -> None:
        log.info("a datagram could not be sent: %s", error)

    def _connect(self, destination_id: bytes) -> Connection:
        lanes = Lanes(self._chance, self._max_message_bytes)
        quic = _Quic(
            configuration=self._configuration,
            original_destination_connection_id=destination_id,
            lanes=lanes,
            authority=self._authority,
        )
        connection = Connection(self._shell, self, quic, lanes, self._chance)
        self._connections[destination_id] = self._connections[quic.host_cid] = connection
        return connection
