"""Two cores in a room: the broker's core with hand-made peers, the SDK's core with a hand-made broker, or both.

* `BrokerRoom` holds a RoutingCore; `RawPeer` is a module made of frames, as one in another language would be.
* `RawBroker` stands in for the broker before a ClientCore.
* `Pair` carries frames between a RoutingCore and any number of ClientCores, in order, until nothing moves.

Nothing here reads a clock: `room.now` is moved by the test.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from runtime import emp
from runtime.access import Access, Credentials
from runtime.client_core import Arrival, ClientCore, Event, OutBatch, State
from runtime.message import Message, decode_batch, encode_message, join_batch
from runtime.routing import BrokerLimits, RoutingCore
from runtime.routing_state import Peer

DATA = int(emp.Priority.DATA)
SIGNAL = int(emp.Priority.SIGNAL)
REQUEST = int(emp.Priority.REQUEST)
REPLY = int(emp.Priority.REPLY)

START = 100.0
"Seconds; when every room begins."


def make_body(first: int, count: int = 1, *, parent: str = "", size: int = 0) -> bytes:
    """A batch of messages that say their number."""
    return join_batch(
        [
            encode_message(Message(id=f"m{number}", parent_id=parent, kind="bytes", content=b"x" * size))
            for number in range(first, first + count)
        ]
    )


class BrokerRoom:
    """A broker's core and the peers that talk to it. The grace after the start is over unless a test wants it."""

    def __init__(
        self,
        *,
        declared: Mapping[str, Iterable[str]] | None = None,
        access: Access | None = None,
        window: int = 100,
        window_bytes: int = 1 << 20,
        grace: float = 0.0,
        clock_ms: int = 1000,
        epoch: int = 1,
        now: float = START,
        message_bytes: int = 1 << 20,
        batch_bytes: int = 4096,
        **limits: Any,
    ) -> None:
        self.now = now
        self.peers: dict[Peer, RawPeer] = {}
        self.serial = 0
        self.core = RoutingCore(
            epoch=epoch.to_bytes(emp.EPOCH_BYTES, "big"),
            session_base=epoch << 24,
            clock_ms=clock_ms,
            now=now,
            limits=BrokerLimits(
                limits=emp.Limits(message_bytes, window, window_bytes, 128, batch_bytes),
                grace_seconds=grace,
                **limits,
            ),
            declared=declared,
            access=access,
        )
        if not grace:
            self.core.expire(now)

    def peer(self, name: str, **options: Any) -> RawPeer:
        """A peer that has said HELLO; its WELCOME (or what came instead) is in its inbox."""
        peer = RawPeer(self, name, **options)
        peer.hello()
        return peer

    def settle(self) -> None:
        """Put what the broker has to say into the inboxes; a peer that is not there is lost."""
        while outs := self.core.flush(self.now):
            for out in outs:
                there = self.peers.get(out.peer)
                if there is None:
                    self.core.lost(out.peer, self.now)
                else:
                    there.inbox.append(out.frames)

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.core.expire(self.now)
        self.settle()

    def status(self, name: str) -> dict[str, Any]:
        modules = self.core.statistics(self.now)["modules"]
        return next(dict(module) for module in modules if module["name"] == name)


class RawPeer:
    """A module made of frames. Every method that sends lets the broker answer at once."""

    def __init__(
        self,
        room: BrokerRoom,
        name: str,
        *,
        groups: Sequence[str] = (),
        incarnation: bytes | None = None,
        generation: int = 0,
        liveness: float = 15.0,
        prefetch: int = 2048,
        prefetch_bytes: int = 8 << 20,
        pid: int = 0,
    ) -> None:
        room.serial += 1
        self.room = room
        self.name = name
        self.groups = list(groups)
        self.incarnation = incarnation or room.serial.to_bytes(emp.INCARNATION_BYTES, "big")
        self.generation = generation
        self.liveness = liveness
        self.prefetch = (prefetch, prefetch_bytes)
        self.pid = pid or 1000 + room.serial
        self.session = -1
        self.address: Peer = (0, b"")
        self.inbox: list[list[bytes]] = []
        self.move()

    def move(self) -> None:
        """Another connection; the broker does not know that the old one is gone."""
        self.room.serial += 1
        self.room.peers.pop(self.address, None)
        self.address = (0, b"c" + self.room.serial.to_bytes(4, "big"))
        self.room.peers[self.address] = self
        self.inbox = []

    def put(self, verb: bytes, header: Any, body: bytes | None = None) -> None:
        self.raw(emp.encode(verb, header, body))

    def raw(self, frames: list[bytes], address: Peer | None = None) -> None:
        room = self.room
        room.core.receive(address or self.address, frames, room.now, Credentials(0, 0, self.pid))
        room.settle()

    def hello(self) -> None:
        self.put(emp.HELLO, self.hello_header())
        for frames in self.inbox:
            if frames[0] == emp.WELCOME:
                welcome = emp.decode(frames)[1]
                self.session, self.generation = welcome.session, welcome.generation

    def hello_header(self) -> emp.Hello:
        return emp.Hello(
            self.name, self.groups, self.incarnation, self.generation, int(self.liveness * 1000), "raw", *self.prefetch
        )

    def send(
        self,
        destination: str,
        first: int,
        count: int = 1,
        *,
        floor: int = 1,
        priority: int = DATA,
        flags: int = 0,
        ttl_ms: int | None = None,
        body: bytes | None = None,
        size: int = 0,
        requester: bytes | None = None,
        retain: tuple[str, int] | None = None,
    ) -> None:
        key, counter = retain or (None, None)
        self.put(
            emp.SEND,
            emp.Send(
                destination,
                priority,
                first,
                count,
                floor,
                flags | (emp.RETAIN if retain else 0),
                ttl_ms,
                requester,
                key,
                counter,
            ),
            make_body(first, count, size=size) if body is None else body,
        )

    def ack(
        self, lane: int, cumulative: int, exceptions: Iterable[tuple[int, str]] = (), *, session: int | None = None
    ) -> None:
        self.put(
            emp.ACK,
            emp.Ack(self.session if session is None else session, [(lane, cumulative, list(exceptions))]),
        )

    def ack_all(self) -> list[emp.Deliver]:
        """Acknowledge whatever is delivered, until nothing more comes; returns what it was."""
        taken: list[emp.Deliver] = []
        while delivered := self.take(emp.DELIVER):
            for header in delivered:
                self.ack(header.lane, header.first + header.count - 1)
            taken += delivered
        return taken

    def take(self, verb: bytes) -> list[Any]:
        """The headers of what came with `verb`, taken out of the inbox."""
        found = [emp.decode(frames)[1] for frames in self.inbox if frames[0] == verb]
        self.inbox = [frames for frames in self.inbox if frames[0] != verb]
        return found

    def take_bodies(self) -> list[tuple[emp.Deliver, list[Message]]]:
        """What was delivered, with the messages that are meant for us."""
        found = []
        for frames in self.inbox:
            if frames[0] == emp.DELIVER:
                header, body = emp.decode(frames)[1:]
                assert body is not None
                found.append((header, decode_batch(body)[header.from_ - header.first :]))
        self.inbox = [frames for frames in self.inbox if frames[0] != emp.DELIVER]
        return found

    def settled(self) -> tuple[int, list[tuple[int, str, str | None]]]:
        """The last cumulative number told and all exceptions told, over the SETTLEDs in the inbox."""
        told = self.take(emp.SETTLED)
        return (told[-1].cumulative if told else 0), [exception for each in told for exception in each.exceptions]

    def verbs(self) -> list[bytes]:
        return [frames[0] for frames in self.inbox]


class RawBroker:
    """Stands before a ClientCore: hands it frames, shows what it sends."""

    def __init__(self, *, epoch: int = 1, window: int = 100, **options: Any) -> None:
        self.now = START
        self.epoch = epoch
        self.session = 0
        self.window = window
        self.core = ClientCore("receiver", incarnation=b"R" * 16, **options)

    def welcome(
        self, *, epoch: int | None = None, generation: int = 7, late: bool = False, fresh: bool = True
    ) -> list[list[bytes]]:
        """The connection comes up and HELLO is answered; returns all that the client sent in turn."""
        self.core.connected(self.now)
        if epoch is not None:
            self.epoch = epoch
        self.session += 1
        self.core.receive(
            emp.encode(
                emp.WELCOME,
                emp.Welcome(
                    self.epoch.to_bytes(emp.EPOCH_BYTES, "big"),
                    self.session,
                    generation,
                    5000,
                    late,
                    emp.Limits(1 << 20, self.window, 1 << 20, 128, 4096),
                ),
            ),
            self.now,
        )
        sent = self.take()
        if fresh:
            self.answer_ping(sent)
        return sent

    def answer_ping(self, sent: Iterable[list[bytes]]) -> None:
        for frames in sent:
            if frames[0] == emp.PING:
                self.give(emp.PONG, emp.Pong(emp.decode(frames)[1].nonce))

    def give(self, verb: bytes, header: Any, body: bytes | None = None) -> None:
        self.core.receive(emp.encode(verb, header, body), self.now)

    def deliver(
        self,
        first: int,
        count: int = 1,
        *,
        from_: int | None = None,
        floor: int = 1,
        lane: int = 1,
        session: int | None = None,
        sender: str = "sender",
        incarnation: bytes = b"S" * 16,
        generation: int = 5,
        destination: str = "receiver",
        priority: int = DATA,
        void: Iterable[tuple[int, str]] = (),
        flags: int = 0,
        body: bytes | None = None,
        requester: bytes | None = None,
        retain: tuple[str, tuple[int, int]] | None = None,
    ) -> None:
        key, version = retain or (None, None)
        self.give(
            emp.DELIVER,
            emp.Deliver(
                self.session if session is None else session,
                lane,
                sender,
                incarnation,
                generation,
                destination,
                priority,
                first,
                count,
                first if from_ is None else from_,
                floor,
                list(void),
                flags,
                None,
                requester,
                key,
                version,
            ),
            make_body(first, count) if body is None else body,
        )

    def take(self) -> list[list[bytes]]:
        """What the client has sent since."""
        sent, self.core.out = self.core.out, []
        return sent

    def flush(self, verb: bytes | None = None) -> list[Any]:
        """Let the client send what is ready, lazy ACKs too; the headers of it (of `verb`)."""
        self.core.flush_lazy()
        self.core.flush(self.now)
        return [emp.decode(frames)[1] for frames in self.take() if verb is None or frames[0] == verb]

    def acks(self) -> list[tuple[int, int, list[tuple[int, str]]]]:
        return [entry for ack in self.flush(emp.ACK) for entry in ack.lanes]

    def events(self, kind: type[Any]) -> list[Any]:
        events, self.core.events = self.core.events, []
        return [event for event in events if isinstance(event, kind)]

    def arrived(self) -> list[int]:
        """Numbers that the shell would have to handle now."""
        return [
            number for event in self.events(Arrival) for number in range(event.first, event.first + len(event.messages))
        ]


class Party:
    """One ClientCore in a `Pair`."""

    def __init__(self, pair: Pair, core: ClientCore, pid: int) -> None:
        self.pair = pair
        self.core = core
        self.pid = pid
        self.address: Peer | None = None
        self.events: list[Event] = []
        self.arrivals: list[Arrival] = []
        self.frames: list[list[bytes]] = []
        "Everything the broker sent it, in order."

    def connect(self) -> None:
        self.pair.serial += 1
        self.address = (0, self.pair.serial.to_bytes(5, "big"))
        self.core.connected(self.pair.room.now)

    def cut(self, *, noticed: bool = True) -> None:
        """The connection is lost with all that was on its way; `noticed`: the broker hears of it."""
        address, self.address = self.address, None
        self.core.out.clear()
        self.core.disconnected(self.pair.room.now)
        if noticed and address is not None:
            self.pair.room.core.lost(address, self.pair.room.now)

    def send(
        self,
        destination: str,
        *,
        priority: int = DATA,
        message: Message | None = None,
        flags: int = 0,
        deadline: float | None = None,
        requester: bytes | None = None,
    ) -> Sent:
        lane = self.core.lane(destination, priority)
        self.pair.messages += 1
        message = message or Message(id=f"{self.core.name}-{self.pair.messages}", source=self.core.name)
        batch = self.core.put_with(lane, encode_message(message), flags, deadline, requester)
        return Sent(batch, lane.next - 1)

    def finish(self, reason: str | None = None) -> list[str]:
        """Every message that has arrived has its outcome now; returns their ids."""
        arrivals, self.arrivals = self.arrivals, []
        ids = []
        for arrival in arrivals:
            for number, message in enumerate(arrival.messages, arrival.first):
                ids.append(message.id)
                self.core.finish(arrival.lane, number, reason)
        return ids

    @property
    def waiting(self) -> list[str]:
        return [message.id for arrival in self.arrivals for message in arrival.messages]


class Sent:
    """What a sender may look at."""

    def __init__(self, batch: OutBatch, number: int) -> None:
        self.batch = batch
        self.number = number

    @property
    def outcome(self) -> list[tuple[str, str | None]] | None:
        """None while open, [] when delivered, the refusals otherwise."""
        if self.batch.settled < self.number:
            return None
        return (self.batch.refusals or {}).get(self.number, [])


class Pair:
    """A broker's core and SDK cores, with frames carried between them at once and in order."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.serial = 0
        self.messages = 0
        self.parties: list[Party] = []
        self.epoch = 1
        self.room = BrokerRoom(**options)

    def join(self, name: str, *, groups: Sequence[str] = (), connect: bool = True, **options: Any) -> Party:
        self.serial += 1
        core = ClientCore(
            name, incarnation=self.serial.to_bytes(emp.INCARNATION_BYTES, "big"), groups=tuple(groups), **options
        )
        party = Party(self, core, 2000 + self.serial)
        self.parties.append(party)
        if connect:
            party.connect()
            self.settle()
        return party

    def restart_broker(self, **changes: Any) -> None:
        """The broker dies and another one takes its place; the SDKs connect again."""
        self.epoch += 1
        options = {**self.options, "clock_ms": int(self.room.now * 1000), **changes}
        for party in self.parties:
            if party.address is not None:
                party.cut(noticed=False)
        self.room = BrokerRoom(epoch=self.epoch, now=self.room.now, **options)

    def kill(self, party: Party) -> None:
        """The process ends; the broker is told by the kernel."""
        self.parties.remove(party)
        party.address = None
        self.room.core.died(party.core.name, party.pid, self.room.now)

    def settle(self) -> None:
        """Carry frames until nothing moves. Handlers do not run: see `Party.finish`."""
        room = self.room
        moved = True
        while moved:
            moved = False
            for party in self.parties:
                if party.address is None:
                    continue
                party.core.flush_lazy()
                party.core.flush(room.now)
                out, party.core.out = party.core.out, []
                for frames in out:
                    moved = True
                    room.core.receive(party.address, frames, room.now, Credentials(0, 0, party.pid))
            for out in room.core.flush(room.now):
                moved = True
                there = next((party for party in self.parties if party.address == out.peer), None)
                if there is None:
                    room.core.lost(out.peer, room.now)
                else:
                    there.frames.append(out.frames)
                    there.core.receive(out.frames, room.now)
            for party in self.parties:
                events, party.core.events = party.core.events, []
                for event in events:
                    party.events.append(event)
                    if isinstance(event, Arrival):
                        party.arrivals.append(event)

    def pass_time(self, seconds: float) -> None:
        self.room.now += seconds
        for party in self.parties:
            if party.core.state is not State.DETACHED:
                party.core.expire(self.room.now)
        self.settle()
        self.room.core.expire(self.room.now)
        self.settle()
