"""CloudHub without its sockets: connections, sessions, routing, acknowledgements, keepalive.

`Hub` is told what happened and when, and answers with the actions that follow. It opens no socket,
reads no clock and logs nothing. Transports carry actions out; what a connection is made of does not
matter here, but for the form of its messages (`Peer.codec`). Rules: docs/cloudlink.md.
"""

from __future__ import annotations

import enum
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from cloudsim.queues import AckQueue, PlainQueue
from cloudsim.rules import (
    UNPREFIXED_MODULE,
    Effect,
    HubVersion,
    ack_fault,
    is_admitted,
    needs_ack,
    object_key,
    route_upstream,
    strip_node_prefix,
    version_number,
)
from cloudsim.wire import JSON_CODEC, CloudMessage, Codec, Header, Route

TAKEOVER_SECONDS_2019: Final = 30.0
"How long the 2019 hub lets a second connection of a node wait for the first to go."


MAX_QUEUED_2019: Final = 10
"Messages the 2019 hub holds for a node; one more stops its dispatcher for all nodes."


class Authorization(enum.Enum):
    """Whether a hub looks at who says what."""

    OFF = "off"
    DEBUG = "debug"
    "It looks, tells of it, and admits everything."
    ENFORCED = "enforced"


@dataclass(frozen=True, slots=True, kw_only=True)
class HubRules:
    """What an operator sets on a CloudCore, and how unlucky the hub's races are."""

    keepalive_seconds: float = 30.0
    node_limit: int = 500
    authorization: Authorization = Authorization.OFF
    version: HubVersion = HubVersion.CURRENT
    replacement_race: float = 0.04
    "Probability that a replaced connection takes its successor with it (measured: 6 of 150)."
    max_queued_objects: int = 10_000
    max_queued_bytes: int = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Peer:
    """Who connects: what its headers say and what its certificate proves."""

    node: str
    project: str = ""
    use: str = "msg"
    "Header ConnectionUse. Only of `msg` connections anything is read."
    certificates: int = 1
    common_name: str = ""
    codec: Codec = JSON_CODEC


class Send(msgspec.Struct, frozen=True, gc=False):
    """Write a message to a connection."""

    connection: int
    payload: bytes


class Drop(msgspec.Struct, frozen=True, gc=False):
    """End a connection without a websocket close frame."""

    connection: int
    reason: str


class Read(msgspec.Struct, frozen=True, gc=False):
    """Read from a connection from now on, or leave what it sends in the socket."""

    connection: int
    wanted: bool


class Forward(msgspec.Struct, frozen=True, gc=False):
    """A message for a cloud module; its resource is prefixed already."""

    node: str
    module: str
    message: CloudMessage


class Note(msgspec.Struct, frozen=True, gc=False):
    """Something worth telling an observer; nothing on the wire."""

    node: str
    what: str
    facts: dict[str, Any]


Action = Send | Drop | Read | Forward | Note


class Verdict(msgspec.Struct, frozen=True, gc=False):
    """What became of a message for a node."""

    id: str
    queue: str
    "`ack`, `no-ack`, or empty: dropped."
    dropped: str | None = None
    "Why. A real hub drops in silence."


class _State(enum.Enum):
    SERVED = "served"
    REJECTED = "rejected"
    "Looks alive, is read from, and never gets anything."
    WAITING = "waiting"
    "2019: until the first connection of the node is gone."


@dataclass(slots=True)
class _Connection:
    number: int
    peer: Peer
    state: _State
    reason: str
    since: float
    received: int = 0
    takeover_deadline: float = 0.0


@dataclass(slots=True)
class _Session:
    connection: _Connection
    keepalive_deadline: float
    acks: AckQueue
    plain: PlainQueue
    writable: bool = True
    keepalives: int = 0
    sent: int = 0


@dataclass(frozen=True, slots=True)
class SessionView:
    """One connection as `Hub.sessions` shows it."""

    node: str
    connection: int
    state: str
    reason: str
    transport: str
    seconds: float
    received: int
    sent: int
    keepalives: int
    in_flight: str | None
    queued_objects: int
    queued_messages: int


_NOTHING: Final[list[Action]] = []


@dataclass
class Hub:
    """The state of one CloudHub process.

    `new_id` gives message ids, `epoch` is the Unix time at `now` 0, `cluster_ca` answers k8s/ca.crt. `races_due`
    counts, by node or for all (empty name), the replacements that lose the race for certain.
    """

    rules: HubRules
    new_id: Callable[[], str]
    chance: random.Random
    epoch: float = 0.0
    cluster_ca: str = ""
    races_due: dict[str, int] = field(default_factory=dict)
    _connections: dict[int, _Connection] = field(default_factory=dict)
    _sessions: dict[str, _Session] = field(default_factory=dict)
    _acknowledged: dict[tuple[str, str], int] = field(default_factory=dict)  # ObjectSync
    _delivered: dict[str, set[str]] = field(default_factory=dict)
    _held_up: deque[tuple[str, CloudMessage]] = field(default_factory=deque)  # 2019: behind a full queue

    # --- connections ---------------------------------------------------------------------------

    def connect(self, number: int, peer: Peer, *, now: float) -> list[Action]:
        """A connection has been upgraded. `number` is new for each."""
        reason = self._rejection(peer)
        if reason:
            return self.connect_rejected(number, peer, reason, now=now)
        connection = _Connection(number, peer, _State.SERVED, "", now)
        self._connections[number] = connection
        actions = self._reading(connection)
        old = self._sessions.get(peer.node)
        if old is not None and self.rules.version is HubVersion.TREE_2019:
            connection.state = _State.WAITING
            connection.takeover_deadline = now + TAKEOVER_SECONDS_2019
            return [Read(number, False)]
        if old is not None:
            actions += self._end(old.connection, "replaced by a new connection", now)
        actions += self._serve(connection, now)
        if objection := self._objection(peer):
            actions.append(Note(peer.node, "would-be-rejected", {"connection": number, "reason": objection}))
        if old is not None and self._loses_race(peer.node):
            # The read error of the old connection ends whatever session it finds under the name.
            actions += self._end(connection, "lost the race with the connection it replaced", now)
        return actions

    def _loses_race(self, node: str) -> bool:
        for name in (node, ""):
            if self.races_due.get(name):
                self.races_due[name] -= 1
                return True
        return self.chance.random() < self.rules.replacement_race

    def connect_rejected(self, number: int, peer: Peer, reason: str, *, now: float) -> list[Action]:
        """A connection that gets no session and is not told so."""
        connection = _Connection(number, peer, _State.REJECTED, reason, now)
        self._connections[number] = connection
        return [*self._reading(connection), Note(peer.node, "rejected", {"connection": number, "reason": reason})]

    @staticmethod
    def _reading(connection: _Connection) -> list[Action]:
        """Of a connection that is not of use `msg` nothing is ever read."""
        return [] if connection.peer.use == "msg" else [Read(connection.number, False)]

    def _rejection(self, peer: Peer) -> str:
        """Why a connection gets no session, or empty. The order is CloudHub's."""
        if self.rules.authorization is Authorization.ENFORCED and (objection := self._objection(peer)):
            return objection
        if len(self._sessions) >= self.rules.node_limit:
            return f"the limit of {self.rules.node_limit} nodes is reached"
        return ""

    def _objection(self, peer: Peer) -> str:
        """What authorization has against a connection, or empty. The hub of 2019 has no authorization."""
        if self.rules.authorization is Authorization.OFF or self.rules.version is HubVersion.TREE_2019:
            return ""
        if peer.certificates != 1:
            return f"{peer.certificates} certificates were sent, exactly 1 is allowed"
        wanted = f"system:node:{peer.node}"
        if peer.common_name != wanted:
            return f"the certificate says {peer.common_name!r}, the node needs {wanted!r}"
        return ""

    def _serve(self, connection: _Connection, now: float) -> list[Action]:
        node = connection.peer.node
        connection.state = _State.SERVED
        # A fresh queue: whatever waited for the node, or was not acknowledged, is gone.
        self._sessions[node] = _Session(
            connection,
            now + self.rules.keepalive_seconds,
            AckQueue(self.rules.max_queued_objects, connection.peer.codec),
            PlainQueue(self.rules.max_queued_bytes),
        )
        return [
            Note(node, "connected", {"connection": connection.number, "project": connection.peer.project}),
            self._life_event(node, "connected", now),
        ]

    def disconnected(self, number: int, *, now: float, reason: str = "the node closed") -> list[Action]:
        """A connection is gone. Idempotent."""
        connection = self._connections.get(number)
        if connection is None:
            return []
        return self._end(connection, reason, now)[1:]  # without the Drop: there is nothing to drop

    def _end(self, connection: _Connection, reason: str, now: float) -> list[Action]:
        """Forget a connection and its session; the first action is the Drop."""
        node = connection.peer.node
        self._connections.pop(connection.number, None)
        actions: list[Action] = [Drop(connection.number, reason)]
        session = self._sessions.get(node)
        if session is None or session.connection is not connection:
            actions.append(Note(node, "unserved-closed", {"connection": connection.number, "reason": reason}))
            return actions
        del self._sessions[node]
        actions.append(
            Note(
                node,
                "disconnected",
                {
                    "connection": connection.number,
                    "reason": reason,
                    "discarded": len(session.acks) + len(session.plain),
                },
            )
        )
        actions.append(self._life_event(node, "disconnected", now))
        for waiting in self._connections.values():
            if waiting.state is _State.WAITING and waiting.peer.node == node:
                actions += self._serve(waiting, now)
                if waiting.peer.use == "msg":
                    actions.append(Read(waiting.number, True))
                break
        return actions + self._dispatch_held_up(now)

    def drop(self, number: int, *, now: float, reason: str) -> list[Action]:
        """The hub ends a connection: what came in could not be decoded, or a fault was asked for."""
        connection = self._connections.get(number)
        return self._end(connection, reason, now) if connection else []

    def kick(self, node: str, *, now: float, reason: str = "kicked") -> list[Action]:
        """Drop every connection of a node, also rejected ones."""
        gone = [connection for connection in self._connections.values() if connection.peer.node == node]
        return [action for connection in gone for action in self._end(connection, reason, now)]

    def delete_node(self, node: str, *, now: float) -> list[Action]:
        """The Node object was deleted: the connection goes, and what was remembered of its objects."""
        for key in [key for key in self._acknowledged if key[0] == node]:
            del self._acknowledged[key]
        self._delivered.pop(node, None)
        return self.kick(node, now=now, reason="the node was deleted")

    def reset(self, *, now: float) -> list[Action]:
        """The process restarts: all connections end. ObjectSync stays, for it lives in the cluster."""
        return [
            action
            for connection in list(self._connections.values())
            for action in self._end(connection, "the hub restarts", now)
        ]

    # --- upstream ------------------------------------------------------------------------------

    def receive(self, number: int, message: CloudMessage, *, now: float) -> list[Action]:
        """One decoded message of a connection. May change its resource in place."""
        connection = self._connections.get(number)
        if connection is None:
            return _NOTHING
        connection.received += 1
        node = connection.peer.node
        codec = connection.peer.codec
        effect, module = route_upstream(message, self.rules.version, has_control=codec.has_control)
        if effect is Effect.CONTROL:
            return [Send(number, codec.encode(self._reply(message, "ack", now)))]
        if self.rules.authorization is Authorization.OFF or self._admits(message, node):
            return self._take(connection, effect, module, message, now)
        facts = {"id": message.header.msg_id, "resource": message.route.resource}
        if self.rules.authorization is Authorization.ENFORCED:
            return [Note(node, "not-admitted", facts)]
        remark = Note(node, "would-not-be-admitted", facts)
        return [remark, *self._take(connection, effect, module, message, now)]

    def _admits(self, message: CloudMessage, node: str) -> bool:
        # The hub of 2019 has no authorization.
        return self.rules.version is HubVersion.TREE_2019 or is_admitted(message, node, self._delivered.get(node, ()))

    def _take(
        self, connection: _Connection, effect: Effect, module: str, message: CloudMessage, now: float
    ) -> list[Action]:
        """What an admitted message leads to."""
        node, codec = connection.peer.node, connection.peer.codec
        if effect is Effect.FORWARD:
            if self.rules.version is HubVersion.TREE_2019 and connection.state is _State.REJECTED:
                return _NOTHING  # over its limit the hub of 2019 drops what comes up
            if module != UNPREFIXED_MODULE:
                message.route.resource = f"node/{node}/{message.route.resource}"
            return [Forward(node, module, message)]
        if connection.state is not _State.SERVED:
            return _NOTHING
        session = self._sessions[node]
        if effect is Effect.KEEPALIVE:
            session.keepalives += 1
            session.keepalive_deadline = now + self.rules.keepalive_seconds
            return _NOTHING
        if effect is Effect.ACK:
            return self._acknowledge(session, message, now)
        if effect is Effect.CLUSTER_CA:
            reply = self._reply(message, self.cluster_ca, now)
            reply.route = Route(
                source="cloudhub", group="resource", operation="response", resource=message.route.resource
            )
            session.plain.offer(codec.encode(reply))
            return self._pump(session, now)
        return _NOTHING

    def _acknowledge(self, session: _Session, message: CloudMessage, now: float) -> list[Action]:
        item = session.acks.acknowledge(message.header.parent_msg_id)
        if item is None:
            return _NOTHING
        node = session.connection.peer.node
        if item.message.route.operation == "delete":
            self._acknowledged.pop((node, item.key), None)
            self._delivered.get(node, set()).discard(item.message.route.resource)
        else:
            self._acknowledged[node, item.key] = version_number(item.message.header.resourceversion)
        facts = {
            "id": item.message.header.msg_id,
            "resource": item.message.route.resource,
            "resourceversion": item.message.header.resourceversion,
        }
        return [Note(node, "acknowledged", facts), *self._pump(session, now)]

    # --- downstream ----------------------------------------------------------------------------

    def send(self, node: str, message: CloudMessage, *, now: float) -> tuple[Verdict, list[Action]]:
        """A cloud module has a message for a node. Fills in an empty id and timestamp.

        Raises TypeError or ValueError for content without a JSON form.
        """
        header = message.header
        header.msg_id = header.msg_id or self.new_id()
        header.timestamp = header.timestamp or self._unix_ms(now)
        header.sync = False
        message.route.resource = strip_node_prefix(message.route.resource)
        if self.rules.version is HubVersion.TREE_2019:
            return self._send_2019(node, message, now)
        session = self._sessions.get(node)
        if session is None:
            # A real hub queues it and throws the queue away when the node connects.
            return self._dropped(node, message, f"node {node!r} has no session")
        if needs_ack(message):
            fault = ack_fault(message) or session.acks.offer(
                message, self._acknowledged.get((node, object_key(message)))
            )
            queue = "ack"
        else:
            fault = session.plain.offer(session.connection.peer.codec.encode(message))
            queue = "no-ack"
        if fault:
            return self._dropped(node, message, fault)
        self._delivered.setdefault(node, set()).add(message.route.resource)
        return Verdict(header.msg_id, queue), self._pump(session, now)

    def _send_2019(self, node: str, message: CloudMessage, now: float) -> tuple[Verdict, list[Action]]:
        """Each message once, in one order for all nodes: a node that does not read holds up the others."""
        # The model of 2019 has neither of them.
        message.header.resourceversion = message.header.type = message.route.destination = ""
        if len(self._held_up) >= self.rules.max_queued_objects:
            return self._dropped(node, message, "the dispatcher stands still")
        if self._held_up or self._is_full(node):
            self._held_up.append((node, message))
            return Verdict(message.header.msg_id, "held-up"), []
        session = self._sessions.get(node)
        if session is None:
            return self._dropped(node, message, f"node {node!r} has no session")
        session.plain.offer(session.connection.peer.codec.encode(message))
        return Verdict(message.header.msg_id, "no-ack"), self._pump(session, now)

    def _is_full(self, node: str) -> bool:
        session = self._sessions.get(node)
        return session is not None and len(session.plain) >= MAX_QUEUED_2019

    def _dispatch_held_up(self, now: float) -> list[Action]:
        """A queue may have room again: go on in order until the next full one."""
        actions: list[Action] = []
        while self._held_up and not self._is_full(self._held_up[0][0]):
            node, message = self._held_up.popleft()
            session = self._sessions.get(node)
            if session is None:
                actions += self._dropped(node, message, f"node {node!r} has no session")[1]
            else:
                session.plain.offer(session.connection.peer.codec.encode(message))
                actions += self._pump(session, now)
        return actions

    def _dropped(self, node: str, message: CloudMessage, reason: str) -> tuple[Verdict, list[Action]]:
        facts = {"id": message.header.msg_id, "resource": message.route.resource, "reason": reason}
        return Verdict(message.header.msg_id, "", reason), [Note(node, "dropped", facts)]

    def writable(self, number: int, writable: bool, *, now: float) -> list[Action]:
        """The node takes bytes again, or no longer does: then both queues wait."""
        connection = self._connections.get(number)
        session = self._sessions.get(connection.peer.node) if connection else None
        if session is None or session.connection is not connection or session.writable == writable:
            return []
        session.writable = writable
        return [*self._pump(session, now), *self._dispatch_held_up(now)]

    def _pump(self, session: _Session, now: float) -> list[Action]:
        if not session.writable:
            return []
        number = session.connection.number
        node = session.connection.peer.node
        actions: list[Action] = [Send(number, payload) for payload in session.plain.take()]
        writes, given_up = session.acks.advance(now)
        actions += [Send(number, payload) for payload in writes]
        session.sent += len(actions)
        actions += [
            Note(node, "gave-up", {"id": lost.item.message.header.msg_id, "failures": lost.failures})
            for lost in given_up
        ]
        return actions

    # --- time ----------------------------------------------------------------------------------

    def expire(self, *, now: float) -> list[Action]:
        """Do what has become due: retries, keepalive limits, waits of the 2019 hub."""
        actions: list[Action] = []
        for session in list(self._sessions.values()):
            if session.keepalive_deadline <= now:
                actions += self._end(session.connection, "no keepalive in time", now)
                continue
            deadline = session.acks.next_deadline()
            if deadline is not None and deadline <= now:
                actions += self._pump(session, now)
        for connection in list(self._connections.values()):
            if connection.state is _State.WAITING and connection.takeover_deadline <= now:
                notice = CloudMessage(
                    Header(self.new_id(), timestamp=self._unix_ms(now)),
                    Route(source="resource", group="cloudhub", operation="disconnected"),
                )
                actions.append(Send(connection.number, connection.peer.codec.encode(notice)))
                actions += self._end(connection, "the first connection of the node did not go", now)
        return actions

    def next_deadline(self) -> float | None:
        """When `expire` has something to do, as far as is known now."""
        deadlines = []
        for session in self._sessions.values():
            deadlines.append(session.keepalive_deadline)
            retry = session.acks.next_deadline() if session.writable else None
            if retry is not None:
                deadlines.append(retry)
        deadlines += [
            connection.takeover_deadline
            for connection in self._connections.values()
            if connection.state is _State.WAITING
        ]
        return min(deadlines, default=None)

    # --- seeing it -----------------------------------------------------------------------------

    def sessions(self, *, now: float) -> Sequence[SessionView]:
        """All connections: served ones with their queues, rejected and waiting ones with the reason."""
        views = []
        for connection in self._connections.values():
            session = self._sessions.get(connection.peer.node)
            if session is not None and session.connection is not connection:
                session = None
            flight = session.acks.in_flight if session else None
            views.append(
                SessionView(
                    node=connection.peer.node,
                    connection=connection.number,
                    state=connection.state.value,
                    reason=connection.reason,
                    transport=connection.peer.codec.transport,
                    seconds=round(now - connection.since, 3),
                    received=connection.received,
                    sent=session.sent if session else 0,
                    keepalives=session.keepalives if session else 0,
                    in_flight=flight.message.header.msg_id if flight else None,
                    queued_objects=len(session.acks) if session else 0,
                    queued_messages=len(session.plain) if session else 0,
                )
            )
        return views

    def is_served(self, node: str) -> bool:
        return node in self._sessions

    def served_nodes(self) -> list[str]:
        return list(self._sessions)

    def connection_of(self, node: str) -> int | None:
        """The number of the connection that serves a node."""
        session = self._sessions.get(node)
        return session.connection.number if session else None

    # --- messages of the hub's own -------------------------------------------------------------

    def _unix_ms(self, now: float) -> int:
        return int((self.epoch + now) * 1000)

    def _reply(self, request: CloudMessage, content: Any, now: float) -> CloudMessage:
        """Source, group, resource and type are copied and not swapped; the version is not copied."""
        route = request.route
        return CloudMessage(
            Header(
                msg_id=self.new_id(),
                parent_msg_id=request.header.msg_id,
                timestamp=self._unix_ms(now),
                type=request.header.type,
            ),
            Route(source=route.source, group=route.group, operation="response", resource=route.resource),
            content,
        )

    def _life_event(self, node: str, what: str, now: float) -> Forward:
        """What CloudHub tells edgecontroller of a node's coming and going."""
        facts = {"client_id": node, "event_type": what, "timestamp": int(self.epoch + now)}
        message = CloudMessage(
            Header(msg_id=self.new_id(), timestamp=self._unix_ms(now)),
            Route(source="cloudhub", group="resource", operation=what, resource=f"node/{node}"),
            msgspec.json.encode(facts),  # Go bytes: base64 wherever it becomes JSON
        )
        return Forward(node, "edgecontroller", message)
