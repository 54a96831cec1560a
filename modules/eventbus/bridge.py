"""Both directions of the bridge, decided without a socket: what becomes of each message.

`Uplink` follows messages from one MQTT broker to the bus: it holds them until their receipts are settled, and
says when the broker may have its PUBACK. `Downlink` follows publishes to one MQTT broker until its PUBACK.
`read_command` says what a message from the bus asks for. `EchoFilter` knows our own publishes again where the
broker does not keep them from us (MQTT 3.1.1). Times are seconds of any monotonic clock.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict, deque
from dataclasses import dataclass
from random import Random
from typing import Any, Final

import msgspec

from modules.eventbus.topics import CONNECTION_STATE, Semantics, auth_info_topic, is_filter, is_topic, route
from runtime.emp import DENIED, FAILED, INVALID, TOO_LARGE, UNROUTABLE
from runtime.errors import EdgezmqError
from runtime.message import BYTES, JSON, TEXT, Kind, Message, content_as_json, new_id, payload_of
from runtime.names import Group

SOURCE: Final = "bus"
"eventbus signs with its group's name, as KubeEdge's does."

# --- from MQTT to the bus ------------------------------------------------------------------------

PERMANENT: Final = frozenset({INVALID, TOO_LARGE, DENIED})
"""Refusals that no repetition mends. Reasons that EMP/1 does not define count as such too: a receiver that
gives one of its own (`too-large-for-link`) has made up its mind."""

TRANSIENT: Final = frozenset({FAILED, UNROUTABLE, "gone", "overflow", "expired", "fenced", "overtaken"})

MAX_FAILED_TRIES: Final = 8
"A message whose handler failed this often (three tries each, over some minutes) is given up: it would hold up all."

UNROUTABLE_GRACE_SECONDS: Final = 10.0
"""How long a destination that nobody serves is waited for. A module that the configuration declares is never
unroutable, so after this it is not coming; its messages must not hold up those for others."""

RETRY_FIRST_SECONDS: Final = 0.5
RETRY_CAP_SECONDS: Final = 30.0


class Held:
    """One message from MQTT that is in hand."""

    __slots__ = ("destination", "is_done", "message", "mid", "refused_tries", "topic")

    def __init__(self, mid: int, topic: str, destination: Group, message: Message) -> None:
        self.mid = mid
        "Packet id on the connection that brought it last; 0 for QoS 0, which has none."
        self.topic = topic
        self.destination = destination
        self.message = message
        self.is_done = False
        "Settled, or given up: the PUBACK may go as soon as its turn comes."
        self.refused_tries = 0


@dataclass(frozen=True, slots=True)
class Refusal:
    """What a refused receipt led to. `retry_in` None: given up and acknowledged to the broker."""

    held: Held
    reason: str
    retry_in: float | None


class Uplink:
    """Messages of one MQTT broker, from PUBLISH to PUBACK.

    Bounded by `window` messages and `window_bytes` of payload. A broker of MQTT 5 keeps to the window by itself
    (Receive Maximum); what comes beyond it, and what comes beyond the bytes, makes `is_full` say that no more may be
    read. Nothing is thrown away. An empty uplink takes one message of any size.
    """

    def __init__(
        self,
        *,
        window: int,
        window_bytes: int,
        semantics: Semantics,
        random: Random,
    ) -> None:
        self._window = window
        self._window_bytes = window_bytes
        self._semantics = semantics
        self._random = random
        self._order: deque[Held] = deque()  # QoS 1 of this connection, in the order of arrival
        self._carried: dict[int, Held] = {}  # QoS 1 of earlier connections, by packet id
        self._retries: list[tuple[float, int, Held]] = []
        self._retry_number = itertools.count()
        self._unroutable_since: dict[Group, float] = {}
        self.in_hand = 0
        "Not yet settled."
        self.in_hand_bytes = 0
        self.received = 0
        self.redelivered = 0
        "Came again after a reconnect while still in hand: not sent to the bus a second time."
        self.delivered = 0
        self.malformed = 0
        "Topics that are not UTF-8 or have wildcards: acknowledged and dropped, for they have no place on the bus."
        self.retried = 0
        self.given_up: dict[str, int] = {}
        "By reason: refused for good, acknowledged to the broker all the same."

    @property
    def is_full(self) -> bool:
        return self.in_hand > self._window or (self.in_hand_bytes >= self._window_bytes and self.in_hand > 0)

    @property
    def has_drained(self) -> bool:
        """Low enough to read on after having been full."""
        return self.in_hand <= self._window // 2 and self.in_hand_bytes <= self._window_bytes // 2

    def connected(self, *, session_present: bool) -> None:
        """A new connection is open. With its session the broker will send again what it got no PUBACK for."""
        self.disconnected()
        if not session_present:
            # The broker knows nothing of them any more: their packet ids mean nothing now. They go on to the bus.
            self._carried.clear()

    def disconnected(self) -> None:
        """The connection is gone: acknowledgements wait for the messages to come again."""
        for held in self._order:
            self._carried[held.mid] = held
        self._order.clear()

    def received_message(
        self, mid: int, qos: int, dup: bool, topic: str, payload: bytes, *, timestamp_ms: int
    ) -> Held | None:
        """A PUBLISH has come. Returns what to send to the bus, or None when that has been done already.

        `topic` has been checked (`is_topic`). Ask `take_acknowledgements` afterwards when None came back.
        """
        if qos and self._carried:
            known = self._carried.pop(mid, None)
            if dup and known is not None and known.topic == topic and known.message.content == payload:
                self.redelivered += 1
                self._order.append(known)
                return None
        self.received += 1
        where = route(topic, self._semantics)
        kind: Kind
        try:
            if not payload.isascii():
                payload.decode()
            kind = TEXT
        except UnicodeDecodeError:
            kind = BYTES
        message = Message(
            id=new_id(),
            timestamp=timestamp_ms,
            source=SOURCE,
            group="user",
            resource=where.resource,
            operation=where.operation,
            kind=kind,
            content=payload,
        )
        held = Held(mid if qos else 0, topic, where.destination, message)
        self.in_hand += 1
        self.in_hand_bytes += len(payload)
        if qos:
            self._order.append(held)
        return held

    def skip(self, mid: int, qos: int, *, reason: str = "") -> list[int]:
        """A PUBLISH that does not go to the bus (an echo, a malformed topic); returns what to acknowledge.

        With a reason it is counted as given up.
        """
        if reason:
            self.given_up[reason] = self.given_up.get(reason, 0) + 1
        if not qos:
            return []
        self._carried.pop(mid, None)
        held = Held(mid, "", _NOWHERE, _EMPTY)
        held.is_done = True
        self._order.append(held)
        return self.take_acknowledgements()

    def settled(self, held: Held) -> list[int]:
        """Its receipt is settled as delivered. Returns the packet ids to acknowledge now, in order."""
        if self._unroutable_since:
            self._unroutable_since.pop(held.destination, None)
        self.delivered += 1
        self._finish(held)
        return self.take_acknowledgements()

    def refused(self, held: Held, reason: str, *, now: float) -> Refusal:
        """Its receipt is refused. Call `take_acknowledgements` when `retry_in` is None."""
        held.refused_tries += 1
        if self._is_final(held, reason, now):
            self.given_up[reason] = self.given_up.get(reason, 0) + 1
            self._finish(held)
            return Refusal(held, reason, None)
        self.retried += 1
        bound = min(RETRY_FIRST_SECONDS * 2 ** min(held.refused_tries - 1, 10), RETRY_CAP_SECONDS)
        delay = self._random.uniform(bound / 2, bound)
        heapq.heappush(self._retries, (now + delay, next(self._retry_number), held))
        return Refusal(held, reason, delay)

    def _is_final(self, held: Held, reason: str, now: float) -> bool:
        if reason == UNROUTABLE:
            since = self._unroutable_since.setdefault(held.destination, now)
            return now - since >= UNROUTABLE_GRACE_SECONDS
        if reason == FAILED:
            return held.refused_tries >= MAX_FAILED_TRIES
        return reason in PERMANENT or reason not in TRANSIENT

    def _finish(self, held: Held) -> None:
        held.is_done = True
        self.in_hand -= 1
        self.in_hand_bytes -= len(held.message.content)

    def take_acknowledgements(self) -> list[int]:
        """Packet ids to acknowledge now. In the order of arrival, as MQTT-4.6.0-2 demands: one that is not
        settled holds back those behind it."""
        order = self._order
        mids = []
        while order and order[0].is_done:
            mids.append(order.popleft().mid)
        return mids

    @property
    def retrying(self) -> int:
        """Refused, and waiting to be sent to the bus again."""
        return len(self._retries)

    def next_retry(self) -> float | None:
        return self._retries[0][0] if self._retries else None

    def take_retries(self, *, now: float) -> list[Held]:
        """What is to be sent to the bus again now."""
        due = []
        while self._retries and self._retries[0][0] <= now:
            due.append(heapq.heappop(self._retries)[2])
        return due


_NOWHERE: Final = Group("none")
_EMPTY: Final = Message()

# --- from the bus to MQTT ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Publish:
    topic: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class Subscribe:
    topic_filter: str


@dataclass(frozen=True, slots=True)
class Unsubscribe:
    topic_filter: str


@dataclass(frozen=True, slots=True)
class ConnectionState:
    """edgehub tells how the link to the cloud is."""

    is_connected: bool
    publish: Publish | None
    "Set where the option of 2019 asks for it."


@dataclass(frozen=True, slots=True)
class Reject:
    """Nothing that eventbus can do; refuse the message as `invalid`, saying `text`."""

    text: str


Command = Publish | Subscribe | Unsubscribe | ConnectionState | Reject


def read_command(
    message: Message, *, node: str, semantics: Semantics = Semantics.HEAD, publish_connection_state: bool = False
) -> Command:
    """What a message from the bus asks of eventbus, by its operation alone (docs/eventbus.md, Operations).

    Content is decoded by what it is, never by how it came: text and bytes that hold JSON are as good as JSON.
    """
    # 2019 sends the state with operation `publish`, today's edgehub with `connect`: source and resource decide.
    if message.resource == CONNECTION_STATE and message.source == "edgehub":
        return _connection_state(message, publish_connection_state)
    match message.operation:
        case "publish":
            return _publish(message.resource, payload_of(message))
        case "message":
            return _publish_inner(message)
        case "subscribe":
            return _filter(Subscribe, message.resource)
        case "unsubscribe" if semantics is Semantics.HEAD:
            return _filter(Unsubscribe, message.resource)
        case "get_result":
            if message.resource != "auth_info":
                return Reject(f"get_result: resource is {message.resource!r}, expected auth_info")
            return _publish(auth_info_topic(node), json_of(message))
        case operation:
            return Reject(f"operation {operation!r} is none of publish, message, subscribe, unsubscribe, get_result")


def _connection_state(message: Message, publish: bool) -> Command:
    state = payload_of(message)
    if state not in (b"cloud_connected", b"cloud_disconnected"):
        return Reject("node/connection: expected cloud_connected or cloud_disconnected")
    return ConnectionState(state == b"cloud_connected", Publish(CONNECTION_STATE, state) if publish else None)


def _filter(kind: type[Subscribe] | type[Unsubscribe], topic_filter: str) -> Command:
    if not is_filter(topic_filter):
        return Reject(f"{_short(topic_filter)} is no topic filter")
    return kind(topic_filter)


def _publish(topic: str, payload: bytes) -> Command:
    if not is_topic(topic):
        return Reject(f"{_short(topic)} is no topic to publish to")
    return Publish(topic, payload)


class _Inner(msgspec.Struct):
    message: msgspec.Raw


class _Topic(msgspec.Struct):
    topic: str


_decode_outer = msgspec.json.Decoder(_Inner).decode
_decode_topic = msgspec.json.Decoder(_Topic).decode
_decode_any: Any = msgspec.json.Decoder().decode
_JSON_FAULTS: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def _publish_inner(message: Message) -> Command:
    """Content `{"message": {"topic": ..., ...}}`: publish the inner object's own JSON text to its topic."""
    try:
        inner = bytes(_decode_outer(message.content).message)
        return _publish(_decode_topic(inner).topic, inner)
    except _JSON_FAULTS as fault:
        return Reject(f'message: expected {{"message": {{"topic": TEXT, ...}}}}: {fault}')


def json_of(message: Message) -> bytes:
    """The content as JSON text: itself when it is JSON already, whatever kind it came as, else a JSON string."""
    if message.kind != JSON:
        try:
            _decode_any(message.content)
        except _JSON_FAULTS:
            try:
                return content_as_json(message)
            except EdgezmqError:  # says text, is not: carried as bytes would be
                return content_as_json(msgspec.structs.replace(message, kind=BYTES))
    return message.content


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")


class Outgoing:
    """One publish on its way to the broker."""

    __slots__ = ("mid", "payload", "ticket", "topic")

    def __init__(self, topic: str, payload: bytes, ticket: object) -> None:
        self.topic = topic
        self.payload = payload
        self.ticket = ticket
        "The shell's own; it comes back with the result."
        self.mid = 0


BARREN_LIMIT: Final = 3
"Connections lost in a row, publishes under way and not one acknowledged, until we suspect the oldest of them."


class Downlink:
    """Publishes for one MQTT broker, in order, at most `window` of them unacknowledged.

    What is unacknowledged when a connection is lost goes again: by the MQTT library under its packet id, or by us
    when `connected` says so. A publish that seems to end each connection (a broker may cut on what it finds too
    large) goes alone, and is refused as `failed` when that ends it too. Bounded by the bus: each publish keeps its
    place in the prefetch until its result is known.
    """

    def __init__(self, *, window: int) -> None:
        self._own_window = window
        self._window = window
        self._max_packet_bytes: int | None = None
        self._waiting: deque[Outgoing] = deque()
        self._in_flight: OrderedDict[int, Outgoing] = OrderedDict()
        self._is_connected = False
        self._barren = 0
        self.published = 0
        "Acknowledged by the broker."
        self.refused: dict[str, int] = {}

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def in_flight(self) -> int:
        return len(self._in_flight)

    def submit(self, outgoing: Outgoing) -> None:
        self._waiting.append(outgoing)

    def connected(self, *, receive_maximum: int, max_packet_bytes: int | None, repeats: bool) -> bool:
        """The broker's limits on a new connection; `repeats`: the library sends again what was unacknowledged.

        True: the library must forget what was under way, we send all of it again within the new window.
        False: the library repeats it, under the packet ids it had (MQTT-4.4.0-1).
        """
        self._is_connected = True
        self._max_packet_bytes = max_packet_bytes
        self._window = min(self._own_window, receive_maximum)
        if self._barren >= BARREN_LIMIT:
            self._window = 1
        if repeats and len(self._in_flight) <= self._window:
            return False
        self._waiting.extendleft(reversed(self._in_flight.values()))
        self._in_flight.clear()
        return True

    def disconnected(self) -> Outgoing | None:
        """The connection is gone. Returns a publish to refuse as `failed`, for having ended too many."""
        was_connected, self._is_connected = self._is_connected, False
        if not was_connected or not self._in_flight:
            return None
        self._barren += 1
        if self._barren < 2 * BARREN_LIMIT:
            return None
        self._barren = BARREN_LIMIT  # the next oldest is under the same suspicion
        return self._in_flight.popitem(last=False)[1]

    def take(self) -> Outgoing | None:
        """The next publish to hand to the library, or None while the window is full or no broker is there."""
        if not self._is_connected or not self._waiting or len(self._in_flight) >= self._window:
            return None
        return self._waiting.popleft()

    def put_back(self, outgoing: Outgoing) -> None:
        """What `take` gave could not be handed over just now."""
        self._waiting.appendleft(outgoing)

    def fits(self, outgoing: Outgoing) -> bool:
        """Whether the broker takes a packet of this size (MQTT 5 tells its limit); refuse it as `too-large` if not."""
        if self._max_packet_bytes is None:
            return True
        overhead = 16  # fixed header, two lengths, packet id, an empty property list
        return len(outgoing.topic.encode()) + len(outgoing.payload) + overhead <= self._max_packet_bytes

    def sent(self, mid: int, outgoing: Outgoing) -> None:
        outgoing.mid = mid
        self._in_flight[mid] = outgoing

    def acknowledged(self, mid: int) -> Outgoing | None:
        """The broker's PUBACK, whatever it says; None for a packet id that is not ours."""
        outgoing = self._in_flight.pop(mid, None)
        if outgoing is not None and self._barren:
            self._barren = 0
        return outgoing

    def count(self, reason: str | None) -> None:
        """Count a result: None is published, else the reason of the refusal."""
        if reason is None:
            self.published += 1
        else:
            self.refused[reason] = self.refused.get(reason, 0) + 1


_PUBACK_REASONS: Final = {0x87: DENIED, 0x90: INVALID, 0x99: INVALID, 0x95: TOO_LARGE, 0x97: "overflow"}


def refusal_of(reason_code: int) -> str | None:
    """The refusal for a PUBACK's reason code (MQTT 5, 3.4.2.1), or None: the broker has the message."""
    return _PUBACK_REASONS.get(reason_code, FAILED) if reason_code >= 0x80 else None


# --- own publishes that come back ----------------------------------------------------------------


def _fingerprint(topic: str, payload: bytes) -> tuple[str, int, int]:
    return topic, len(payload), hash(payload)  # a keyed hash of 64 bits: payloads of 8 MiB need not be kept


class EchoFilter:
    """Knows our own publishes again, for brokers without MQTT 5's no-local.

    Remembers what was published to topics that we subscribe: at most `limit` of them, `seconds` long. An echo uses
    up its entry, so of two equal messages, ours and a device's, exactly one passes. Beyond these bounds an echo
    goes up as an upload, as all do in KubeEdge.
    """

    def __init__(self, *, limit: int = 4096, seconds: float = 30.0) -> None:
        self._limit = limit
        self._seconds = seconds
        self._seen: OrderedDict[tuple[str, int, int], list[float]] = OrderedDict()
        self._held = 0
        self.skipped = 0

    def published(self, topic: str, payload: bytes, *, now: float) -> None:
        """Call it before the packet can have gone out."""
        self._forget_before(now - self._seconds)
        key = _fingerprint(topic, payload)
        self._seen.setdefault(key, []).append(now)
        self._seen.move_to_end(key)
        self._held += 1
        while self._held > self._limit:
            self._held -= len(self._seen.popitem(last=False)[1])

    def is_echo(self, topic: str, payload: bytes, *, now: float) -> bool:
        if not self._seen:
            return False
        self._forget_before(now - self._seconds)
        key = _fingerprint(topic, payload)
        times = self._seen.get(key)
        if times is None:
            return False
        times.pop()
        self._held -= 1
        if not times:
            del self._seen[key]
        self.skipped += 1
        return True

    def _forget_before(self, limit: float) -> None:
        while self._seen:
            key, times = next(iter(self._seen.items()))
            if times[-1] > limit:
                return
            self._held -= len(times)
            del self._seen[key]
