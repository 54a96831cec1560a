"""One connection to one MQTT broker, dialled again for ever: the only file that knows the MQTT library.

paho-mqtt does the protocol (connecting, packet ids, repeats after a reconnect); asyncio does the network. Between the
two stands `_Wire`, which plays the socket that paho reads from and writes to: TLS without threads, one read for many
packets, one write for many PUBACKs. Incoming PUBLISHes, which paho would hand through as they are, pass it by
(`packets`). Keepalive is ours too, because paho's takes a connection that we do not read on purpose for a dead one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

from modules.eventbus.config import SECTION, Server, TlsFiles
from modules.eventbus.packets import InPublish, MalformedPacket, PacketReader, puback
from runtime.backoff import Backoff
from runtime.errors import ConfigError
from runtime.lean import absent

# For proxies of MQTT over websockets, which is not used here; it would bring http.client and email, 1.8 MiB.
with absent("urllib.request"):
    from paho.mqtt import client as paho
    from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
    from paho.mqtt.packettypes import PacketTypes
    from paho.mqtt.properties import Properties
    from paho.mqtt.reasoncodes import ReasonCode
    from paho.mqtt.subscribeoptions import SubscribeOptions

if TYPE_CHECKING:
    import ssl


class _NeverRaised(Exception):
    """Stands for ssl's exceptions where ssl was left out."""


if getattr(paho, "ssl", None) is None:
    # paho names two of ssl's exceptions in its `except` clauses, which are looked up whenever a socket would block.
    paho.ssl = SimpleNamespace(SSLWantReadError=_NeverRaised, SSLWantWriteError=_NeverRaised)  # type: ignore[attr-defined, assignment]

log = logging.getLogger("modules.eventbus")

T = TypeVar("T")

DIAL_SECONDS: Final = 10.0
"For the TCP and TLS handshakes."
CONNACK_SECONDS: Final = 10.0
FIRST_CONNACK_SECONDS: Final = 3.0
"As long as it is not known whether the broker speaks MQTT 5: some that do not say nothing at all."
STOP_SECONDS: Final = 2.0
"For the last bytes of an orderly disconnect."
STABLE_SECONDS: Final = 5.0
"A connection that lived this long makes the next try start with a short delay again."
PACKETS_PER_TURN: Final = 256
"Read in one turn of the event loop: about 4 ms; then others get theirs."
MAX_PACKET_BYTES: Final = 16 * 2**20
"A longer PUBLISH is skipped and reported; beyond what the bus carries in any configuration we expect."
BACKLOG_BYTES: Final = 1 << 20
"Read and not yet parsed; from there on the socket is left alone, and TCP holds up the broker."
SET_ASIDE_BYTES: Final = 32 << 20
"Of messages beyond our window, read because a PUBACK may stand behind them: brokers do not always keep to the window."
MQTT5: Final = MQTTProtocolVersion.MQTTv5
MQTT311: Final = MQTTProtocolVersion.MQTTv311
_UNSUPPORTED_VERSION: Final = 0x84
_PINGREQ: Final = b"\xc0\x00"


@dataclass(frozen=True, slots=True)
class Connected:
    """What the broker says of a new connection."""

    session_present: bool
    "It still has our session: subscriptions, and what it got no PUBACK for."
    receive_maximum: int
    "Publishes that it takes before it has acknowledged the first."
    max_packet_bytes: int | None
    no_local: bool
    "It keeps our own publishes from us."
    repeats: bool
    "The library sends again by itself what was unacknowledged; False for the first connection in this version."
    version: str


class Events(Protocol):
    """What a connection tells its owner, in the event loop; none of them may raise."""

    def accepted(self, facts: Connected) -> bool:
        """A CONNACK; called before the library repeats what was unacknowledged. True: it shall forget that."""

    def connected(self, facts: Connected) -> None:
        """The connection can be used."""

    def disconnected(self, reason: str) -> None: ...
    def message(self, mid: int, qos: int, dup: bool, topic: str | None, payload: bytes | None, size: int) -> None:
        """A PUBLISH (`packets.InPublish`). QoS 1 has to be acknowledged."""

    def turn_ended(self) -> None:
        """A batch of packets has been read."""

    def published(self, mid: int, reason_code: int) -> None: ...
    def answered(self, mid: int, accepted: bool) -> None:
        """SUBACK or UNSUBACK."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionSettings:
    client_id: str
    protocol: str
    "auto, 5 or 3.1.1"
    receive_window: int
    keepalive_seconds: int
    session_expiry_seconds: int
    reconnect_max_seconds: float


class MqttConnection:
    """Keeps one connection to `server`. `run` does the work; the other methods are for the event loop's thread."""

    def __init__(self, server: Server, settings: ConnectionSettings, events: Events, random: Random) -> None:
        self._server = server
        self._settings = settings
        self._events = events
        self._backoff = Backoff(random, cap_seconds=settings.reconnect_max_seconds)
        self._failures = 0  # in a row, without a stable connection between them
        self._version = MQTT311 if settings.protocol == "3.1.1" else MQTT5
        self._knows_mqtt5 = False
        self._client: _Client | None = None
        self._wire: _Wire | None = None
        self._is_open = False
        self._is_paused = False
        self._stopping = asyncio.Event()
        self._last_fault = ""
        self.dials = 0
        self.connects = 0

    @property
    def is_connected(self) -> bool:
        return self._is_open

    # --- what its owner may ask for; all of it only while connected ---

    def publish(self, topic: str, payload: bytes) -> int | None:
        """Send at QoS 1; returns the packet id. None: no packet id is free, try later."""
        assert self._client is not None
        for _ in range(2):  # the id may belong to a publish that has been under way for 65535 others
            info = self._client.publish(topic, payload, qos=1)
            if info.rc is not MQTTErrorCode.MQTT_ERR_QUEUE_SIZE:
                return info.mid
        return None

    def acknowledge(self, mids: list[int]) -> None:
        """Send a PUBACK for each, in this order."""
        assert self._wire is not None
        self._wire.send_whole(b"".join(map(puback, mids)))

    def subscribe(self, topic_filter: str) -> int:
        assert self._client is not None
        if self._version is MQTT5:
            options = SubscribeOptions(
                qos=1,
                # MQTT-3.8.3-4: no-local on a shared subscription is a protocol error.
                noLocal=not topic_filter.startswith("$share/"),
                # A filter that the session has already must not bring all retained messages once more.
                retainHandling=SubscribeOptions.RETAIN_SEND_IF_NEW_SUB,
            )
            _, mid = self._client.subscribe(topic_filter, options=options)
        else:
            _, mid = self._client.subscribe(topic_filter, qos=1)
        assert mid is not None
        return mid

    def watch(self, topic: str) -> None:
        """Subscribe at QoS 0: the broker keeps nothing of it while we are away. A refusal does no harm."""
        assert self._client is not None
        if self._version is MQTT5:
            self._client.subscribe(topic, options=SubscribeOptions(qos=0))
        else:
            self._client.subscribe(topic, qos=0)

    def unsubscribe(self, topic_filter: str) -> int:
        assert self._client is not None
        _, mid = self._client.unsubscribe(topic_filter)
        assert mid is not None
        return mid

    def pause_reading(self) -> None:
        """Deliver no more messages. Once BACKLOG_BYTES lie unread, TCP holds up the broker. Idempotent."""
        self._is_paused = True

    def resume_reading(self) -> None:
        if self._is_paused:
            self._is_paused = False
            if self._wire is not None:
                self._wire.schedule_parsing()

    # --- the connection's life ---

    async def run(self) -> None:
        """Dial, serve, dial again, until `stop`; ConfigError at once for TLS files that cannot be used."""
        tls_context(self._server.tls)
        while not self._stopping.is_set():
            started = asyncio.get_running_loop().time()
            try:
                reason = await self._serve_once()
            except (OSError, TimeoutError, ConfigError) as fault:  # ssl.SSLError is an OSError
                reason = f"{type(fault).__name__}: {fault}" if str(fault) else type(fault).__name__
            if self._stopping.is_set():
                return
            if asyncio.get_running_loop().time() - started > STABLE_SECONDS:
                self._failures = 0
            delay = self._backoff.delay(self._failures)
            self._failures += 1
            # The same fault again and again is said once aloud; somebody may read this log for weeks.
            level = logging.DEBUG if reason == self._last_fault else logging.WARNING
            self._last_fault = reason
            log.log(level, "mqtt not connected server=%s reason=%s next_try_seconds=%.1f", self._server, reason, delay)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), delay)

    async def stop(self) -> None:
        """Disconnect in good order; the broker keeps the session. `run` returns. Idempotent."""
        self._stopping.set()
        wire = self._wire
        if self._client is not None and self._is_open and wire is not None:
            self._client.disconnect()
            wire.write_now()
            wire.close()
            await asyncio.wait({wire.closed}, timeout=STOP_SECONDS)
        if wire is not None:
            wire.abort("stopped")  # also where the session is only about to open

    async def _serve_once(self) -> str:
        """One connection from dial to end; returns why it ended."""
        self.dials += 1
        loop = asyncio.get_running_loop()
        wire = _Wire(self, loop, is_mqtt5=self._version is MQTT5)
        async with asyncio.timeout(DIAL_SECONDS):
            await loop.create_connection(
                lambda: wire, self._server.host, self._server.port, ssl=tls_context(self._server.tls)
            )
        try:
            if self._stopping.is_set():
                return "stopped"  # while we were dialling
            connack: asyncio.Future[Connected | str] = loop.create_future()
            self._open_session(wire, connack)
            either: set[asyncio.Future[Any]] = {connack, wire.closed}
            patience = CONNACK_SECONDS if self._knows_mqtt5 or self._version is MQTT311 else FIRST_CONNACK_SECONDS
            await asyncio.wait(either, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
            if not connack.done():
                fault = f"closed: {wire.closed.result()}" if wire.closed.done() else f"silent for {patience:.0f} s"
                return self._try_other_version(f"no CONNACK, {fault}")
            answer = connack.result()
            if isinstance(answer, str):
                return answer
            if self._stopping.is_set():
                return "stopped"
            self._is_open = True
            self.connects += 1
            self._knows_mqtt5 |= self._version is MQTT5
            self._last_fault = ""
            log.info(
                "mqtt connected server=%s client=%s version=%s session_present=%s",
                self._server, self._settings.client_id, answer.version, answer.session_present,
            )  # fmt: skip
            self._events.connected(answer)
            wire.schedule_parsing()
            return await self._watch(wire)
        finally:
            wire.close()
            self._wire = None
            if self._is_open:
                self._is_open = False
                self._events.disconnected(wire.reason)

    def _open_session(self, wire: _Wire, connack: asyncio.Future[Connected | str]) -> None:
        if self._client is None:
            self._client = self._new_client()
        client = self._client
        client.wire = wire
        client.connack = connack
        self._wire = wire
        client.reconnect()

    def _new_client(self) -> _Client:
        settings, server = self._settings, self._server
        is_mqtt5 = self._version is MQTT5
        client = _Client(
            CallbackAPIVersion.VERSION2,
            client_id=settings.client_id,
            clean_session=None if is_mqtt5 else False,
            protocol=self._version,
            reconnect_on_failure=False,
            manual_ack=True,
        )
        client.max_inflight_messages = 0  # no limit of the library's own: Downlink has the window
        if server.username:
            client.username_pw_set(server.username, server.password or None)
        properties = None
        if is_mqtt5:
            properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]  # paho's
            properties.SessionExpiryInterval = settings.session_expiry_seconds
            properties.ReceiveMaximum = settings.receive_window
        client.connect_async(
            server.host,
            server.port,
            keepalive=settings.keepalive_seconds,
            clean_start=False if is_mqtt5 else paho.MQTT_CLEAN_START_FIRST_ONLY,
            properties=properties,
        )
        events = self._events

        def on_publish(_client: paho.Client, _data: Any, mid: int, code: ReasonCode, _props: Properties) -> None:
            events.published(mid, code.value)

        def on_subscribe(
            _client: paho.Client, _data: Any, mid: int, codes: list[ReasonCode], _props: Properties | None
        ) -> None:
            events.answered(mid, not any(code.is_failure for code in codes))

        client.on_publish = on_publish
        client.on_subscribe = on_subscribe
        client.on_unsubscribe = on_subscribe
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_socket_register_write = self._on_register_write
        return client

    def _on_connect(
        self, client: paho.Client, _data: Any, flags: paho.ConnectFlags, code: ReasonCode, properties: Properties | None
    ) -> None:
        assert isinstance(client, _Client)
        if client.connack is None or client.connack.done():
            return
        if code.is_failure:
            reason = f"refused by the broker: {code}"
            if code.value == _UNSUPPORTED_VERSION:
                reason = self._try_other_version(reason)
            client.connack.set_result(reason)
            return
        is_mqtt5 = self._version is MQTT5
        facts = Connected(
            session_present=flags.session_present,
            receive_maximum=getattr(properties, "ReceiveMaximum", 65535),
            max_packet_bytes=getattr(properties, "MaximumPacketSize", None),
            no_local=is_mqtt5,
            repeats=client.has_served,
            version="5" if is_mqtt5 else "3.1.1",
        )
        client.has_served = True
        if self._events.accepted(facts):
            client.drop_out_messages()
        client.connack.set_result(facts)

    def _on_disconnect(
        self, client: paho.Client, _data: Any, flags: paho.DisconnectFlags, code: ReasonCode, _props: Properties | None
    ) -> None:
        if self._wire is not None and flags.is_disconnect_packet_from_server:
            self._wire.reason = f"disconnected by the broker: {code}"

    def _on_register_write(self, _client: paho.Client, _data: Any, _socket: Any) -> None:
        if self._wire is not None:
            self._wire.schedule_write()

    def _try_other_version(self, reason: str) -> str:
        """After a dial without an answer: a broker that does not know MQTT 5 may give none."""
        if self._settings.protocol == "auto":
            self._version = MQTT311 if self._version is MQTT5 and not self._knows_mqtt5 else MQTT5
            self._client = None
            return f"{reason}; trying MQTT {'5' if self._version is MQTT5 else '3.1.1'} next"
        return reason

    async def _watch(self, wire: _Wire) -> str:
        """Keep the connection alive until it ends."""
        loop = asyncio.get_running_loop()
        assert self._client is not None
        # The library has taken over the broker's Server Keep Alive, if it gave one (MQTT 5, 3.2.2.3.14).
        keepalive = min(self._client.keepalive or self._settings.keepalive_seconds, self._settings.keepalive_seconds)
        while True:
            done, _ = await asyncio.wait({wire.closed}, timeout=keepalive / 4)
            if done:
                return wire.closed.result()
            now = loop.time()
            silence = now - wire.last_received
            # While we do not read we cannot tell silence from our own deafness.
            if silence > keepalive * 1.5 and not wire.is_deaf:
                wire.abort(f"silent for {silence:.0f} s")
            elif min(wire.last_sent, wire.last_received) < now - keepalive / 2:
                wire.send_whole(_PINGREQ)


class _Client(paho.Client):
    """paho, reading and writing a `_Wire`."""

    wire: _Wire
    connack: asyncio.Future[Connected | str] | None = None
    has_served = False

    def _create_socket(self) -> paho.SocketLike:
        return self.wire


def _size_of(packet: InPublish) -> int:
    """What a message set aside takes, about: its parts as Python objects are some 256 bytes."""
    return 256 + len(packet.payload or b"")


class _Wire(asyncio.Protocol):
    """The network on one side, what paho takes for a socket (`SocketLike`) on the other.

    `recv` gives out one packet, and raises BlockingIOError when that is used up. `send` takes whole packets and
    keeps them until the turn of the event loop is over; then they go out in one write.
    """

    def __init__(self, owner: MqttConnection, loop: asyncio.AbstractEventLoop, *, is_mqtt5: bool) -> None:
        self._owner = owner
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._reader = PacketReader(is_mqtt5=is_mqtt5, limit_bytes=MAX_PACKET_BYTES)
        self._set_aside: deque[InPublish] = deque()  # came while the owner had paused
        self._set_aside_bytes = 0
        self._packet = b""  # the one that paho is reading
        self._position = 0
        self._to_send: list[bytes | bytearray] = []
        self._parsing_scheduled = False
        self._write_scheduled = False
        self._socket_paused = False
        self._end_of_file = False
        self.closed: asyncio.Future[str] = loop.create_future()
        self.reason = "connection lost"
        self.last_received = self.last_sent = loop.time()

    # --- asyncio's side ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self.last_received = self._loop.time()
        self._reader.feed(data)
        if not self._parsing_scheduled:
            self._parse()

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None:
            self.reason = f"{type(exc).__name__}: {exc}"
        self._finish()

    def _finish(self) -> None:
        if not self.closed.done():
            self.closed.set_result(self.reason)

    @property
    def is_deaf(self) -> bool:
        """Whether bytes of the broker may lie unread, by our own will."""
        return self._socket_paused or self._owner._is_paused or self._parsing_scheduled

    def schedule_parsing(self) -> None:
        if not self._parsing_scheduled and not self.closed.done():
            self._parsing_scheduled = True
            self._loop.call_soon(self._parse_scheduled)

    def _parse_scheduled(self) -> None:
        self._parsing_scheduled = False
        self._parse()

    def _parse(self) -> None:
        """Take packets, as many as fit into one turn.

        While the owner has paused, PUBLISHes are set aside, up to SET_ASIDE_BYTES, and what stands between them is
        taken: it may be the PUBACK that, by way of the bus and the cloud, the messages in hand wait for.
        """
        client, owner = self._owner._client, self._owner
        if client is None or client.wire is not self or self.closed.done():
            return
        if client.connack is not None and client.connack.done() and not owner._is_open:
            return  # what follows the CONNACK waits until its owner knows of the connection
        deliver, next_packet = owner._events.message, self._reader.next
        more = False
        try:
            for _ in range(PACKETS_PER_TURN):
                is_paused = owner._is_paused and owner._is_open
                if is_paused and self._set_aside_bytes > SET_ASIDE_BYTES:
                    break
                packet: InPublish | bytes | None
                if self._set_aside and not is_paused:
                    packet = self._set_aside.popleft()
                    self._set_aside_bytes -= _size_of(packet)
                else:
                    packet = next_packet()
                if packet is None:
                    break
                if not isinstance(packet, bytes):
                    if is_paused:
                        self._set_aside.append(packet)
                        self._set_aside_bytes += _size_of(packet)
                        continue
                    if owner._is_open:
                        deliver(*packet)
                        continue
                    raise MalformedPacket("PUBLISH before CONNACK")
                self._packet, self._position = packet, 0
                if client.loop_read() is not MQTTErrorCode.MQTT_ERR_SUCCESS or not owner._is_open:
                    break
            else:
                more = True
        except MalformedPacket as fault:
            self.abort(f"malformed packet: {fault}")
            return
        except Exception as fault:  # whatever paho makes of a broker's packet must not end the process
            log.warning("mqtt packet cannot be read server=%s", owner._server, exc_info=True)
            self.abort(f"unreadable packet: {fault!r}")
            return
        owner._events.turn_ended()
        if more:
            self.schedule_parsing()
        # Not at once: only a socket that is read shows that the broker has gone.
        self._hold_socket((more or owner._is_paused) and self._reader.unread_bytes > BACKLOG_BYTES)

    def _hold_socket(self, hold: bool) -> None:
        if self._transport is None or hold is self._socket_paused or self._transport.is_closing():
            return
        self._socket_paused = hold
        if hold:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def schedule_write(self) -> None:
        if not self._write_scheduled:
            self._write_scheduled = True
            self._loop.call_soon(self.write_now)

    def write_now(self) -> None:
        """Let paho hand over its packets, and send them."""
        self._write_scheduled = False
        client = self._owner._client
        if client is not None and client.wire is self:
            client.loop_write()
        if self._to_send and self._transport is not None and not self._transport.is_closing():
            self._transport.write(b"".join(self._to_send))
            self.last_sent = self._loop.time()
        self._to_send.clear()

    def send_whole(self, packet: bytes) -> None:
        """A packet of our own, between two of paho's."""
        self._to_send.append(packet)
        self.schedule_write()

    def abort(self, reason: str) -> None:
        self.reason = reason
        if self._transport is not None:
            self._transport.abort()
        self._finish()

    # --- paho's side: SocketLike ---

    def recv(self, buffer_size: int) -> bytes:
        position = self._position
        data = self._packet[position : position + buffer_size]
        if not data:
            raise BlockingIOError
        self._position = position + len(data)
        return data

    def send(self, buffer: bytes | bytearray) -> int:
        self._to_send.append(buffer)
        return len(buffer)

    def close(self) -> None:
        """Idempotent. What has been handed over before is still sent."""
        if self._transport is not None and not self._transport.is_closing():
            if self._to_send:
                self._transport.write(b"".join(self._to_send))
                self._to_send.clear()
            self._transport.close()
        if self._transport is None:
            self._finish()

    def fileno(self) -> int:
        return -1

    def setblocking(self, flag: bool) -> None:
        pass


def tls_context(files: TlsFiles | None) -> ssl.SSLContext | None:
    """The TLS context for these files, read anew at each dial so that replaced ones are taken; None for plain TCP.

    Raises ConfigError naming the file that cannot be used.
    """
    if files is None:
        return None
    import ssl  # here, for it brings OpenSSL, which a connection in clear need not pay for

    context = _load(
        "tlsMqttCAFile", files.ca, "a readable PEM file", lambda: ssl.create_default_context(cafile=files.ca or None)
    )
    if files.cert:
        rule = "a PEM certificate and, in tlsMqttPrivateKeyFile, its key"
        _load("tlsMqttCertFile", files.cert, rule, lambda: open(files.cert, "rb").close())
        _load("tlsMqttPrivateKeyFile", files.key, rule, lambda: open(files.key, "rb").close())
        _load("tlsMqttCertFile", files.cert, rule, lambda: context.load_cert_chain(files.cert, files.key))
    return context


def _load(key: str, path: str, rule: str, load: Callable[[], T]) -> T:
    try:
        return load()
    except OSError as fault:  # ssl.SSLError is one, too
        raise ConfigError(f"{SECTION}.eventBusTLS.{key}", path, f"{rule} ({fault.strerror or fault})") from fault
