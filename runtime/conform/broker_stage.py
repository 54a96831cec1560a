"""The scripted modules: what a broker under test meets.

They do nothing by themselves: a script says HELLO, sends and acknowledges for them. Their names have a tag of their
own, so that a broker with other modules on it can be tested too, and several checks at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from runtime import emp
from runtime.conform import wire
from runtime.conform.module_stage import message
from runtime.conform.play import Close, Failed, Open, Scene, Seen, Settings, Stage

LIVENESS_MS: Final = 60_000
"Long, since the scripted modules say PING only where a check is about that."


@dataclass(slots=True)
class Peer:
    """One scripted module's process, and its connection."""

    stage: BrokerStage
    end: str
    name: str
    incarnation: bytes
    generation: int = 0
    session: int = -1
    limits: emp.Limits = emp.Limits()  # noqa: RUF009  (frozen)
    is_attached: bool = False

    def say(self, verb: bytes, *fields: Any, body: bytes | None = None) -> None:
        self.stage.tell(self.end, verb, wire.packed(*fields), *([] if body is None else [body]))

    def hello(
        self,
        groups: Sequence[str] = (),
        *,
        generation: int | None = None,
        liveness_ms: int = LIVENESS_MS,
        prefetch: tuple[int, int] = (2048, 8388608),
        more: Sequence[Any] = (),
    ) -> None:
        generation = self.generation if generation is None else generation
        fields = [self.name, list(groups), self.incarnation, generation, liveness_ms, "conform", *prefetch, 0, *more]
        self.say(emp.HELLO, *fields)

    def send(
        self,
        destination: str,
        *messages: list[Any],
        first: int = 1,
        priority: int = 3,
        floor: int | None = None,
        flags: int = 0,
        more: Sequence[Any] = (),
        body: bytes | None = None,
    ) -> bytes:
        """A batch; its body. `more`: ttl_ms, requester, retain_key, retain_counter."""
        body = wire.packed(*messages) if body is None else body
        count = max(1, len(messages))
        floor = first if floor is None else floor
        self.say(emp.SEND, destination, priority, first, count, floor, flags, *more, body=body)
        return body

    def ack(self, seen: Seen, *refused: tuple[int, str], upto: int | None = None, session: int | None = None) -> None:
        """Acknowledge a DELIVER, to its end or up to a number."""
        header: emp.Deliver = seen.header
        upto = header.first + header.count - 1 if upto is None else upto
        session = header.session if session is None else session
        self.say(emp.ACK, session, [[header.lane, upto, [list(each) for each in refused]]])

    def delivered(self, mark: int = 0, *, priority: int | None = None) -> list[Seen]:
        """What it has got since `mark`."""
        return [
            seen
            for seen in self.stage.since(mark, "DELIVER/1", end=self.end)
            if priority is None or seen.header.priority == priority
        ]

    def numbers(self, mark: int = 0) -> list[tuple[int, int]]:
        """The DELIVERs since `mark` as (from, last)."""
        return [(seen.header.from_, seen.header.first + seen.header.count - 1) for seen in self.delivered(mark)]

    def settled(self, destination: str, priority: int = 3, mark: int = 0) -> list[emp.Settled]:
        """What it was told of a lane since `mark`."""
        return [
            seen.header
            for seen in self.stage.since(mark, "SETTLED/1", end=self.end)
            if (seen.header.destination, seen.header.priority) == (destination, priority)
        ]

    def refusals(self, destination: str, priority: int = 3, mark: int = 0) -> dict[int, set[tuple[str, str | None]]]:
        """number → (reason, member), of all that it was told of a lane."""
        found: dict[int, set[tuple[str, str | None]]] = {}
        for settled in self.settled(destination, priority, mark):
            for number, reason, member in settled.exceptions:
                found.setdefault(number, set()).add((reason, member))
        return found

    # --- scenes ---

    def welcomed(self, groups: Sequence[str] = (), **options: Any) -> Scene[emp.Welcome]:
        """HELLO, and the WELCOME that answers it."""
        mark = self.stage.mark
        self.hello(groups, **options)
        seen = yield from self.stage.answer(mark, f"no WELCOME for {self.name}", "WELCOME/1", end=self.end)
        welcome: emp.Welcome = seen.header
        self.session = welcome.session
        self.generation = welcome.generation
        self.limits = welcome.limits
        self.is_attached = True
        return welcome

    def gets(self, mark: int = 0, *, what: str = "", priority: int | None = None) -> Scene[Seen]:
        """The first DELIVER since `mark`."""
        found = yield from self.stage.until(
            lambda: self.delivered(mark, priority=priority), f"{self.name} gets no {what or 'DELIVER'}"
        )
        return found[0]

    def is_told(self, destination: str, cumulative: int, *, priority: int = 3, mark: int = 0) -> Scene[emp.Settled]:
        """Until SETTLED has reached a number."""
        found = yield from self.stage.until(
            lambda: [each for each in self.settled(destination, priority, mark) if each.cumulative >= cumulative],
            f"no SETTLED up to {cumulative} for the lane to {destination}",
        )
        return found[0]


class BrokerStage(Stage):
    """Modules that a script plays, in front of a broker under test. `tag`: of their names."""

    reads = wire.FROM_BROKER
    writes = wire.FROM_MODULE

    def __init__(self, settings: Settings, tag: str, seed: int = 1) -> None:
        super().__init__(settings)
        self.tag = tag
        self._seed = seed
        self._peers: list[Peer] = []

    def take(self, end: str, frames: tuple[bytes, ...]) -> Seen:
        seen = super().take(end, frames)
        if seen.fault is not None:
            raise Failed(f"a frame that is none of EMP/1: {seen.fault}")
        if seen.verb == "DELIVER/1":
            fault = deliver_fault(seen.header)
            if fault:
                raise Failed(fault)
        return seen

    def name(self, name: str) -> str:
        """A module's or group's name, with the tag."""
        return f"conform-{self.tag}-{name}"

    def group(self, name: str) -> str:
        """A group as a destination."""
        return f"@{self.name(name)}"

    def peer(self, name: str) -> Peer:
        """A new process of that name, on a new connection."""
        number = len(self._peers) + 1
        incarnation = (f"{self.tag}{self._seed}".encode() + b"." * 16)[:14] + number.to_bytes(2, "big")
        peer = Peer(self, f"{name}#{number}", self.name(name), incarnation)
        self._peers.append(peer)
        self.actions.append(Open(peer.end))
        return peer

    def again(self, peer: Peer) -> Peer:
        """The same process on a new connection; the old one goes without a word."""
        self.close(peer)
        fresh = Peer(self, f"{peer.end}'", peer.name, peer.incarnation, peer.generation, peer.session, peer.limits)
        self._peers.append(fresh)
        self.actions.append(Open(fresh.end))
        return fresh

    def close(self, peer: Peer) -> None:
        self.note(f"the connection of {peer.end} is closed")
        peer.is_attached = False
        self._peers.remove(peer)
        self.actions.append(Close(peer.end))

    def attach(self, name: str, groups: Iterable[str] = (), **options: Any) -> Scene[Peer]:
        """A new process that is in. `groups` are bare: they get the tag."""
        peer = self.peer(name)
        yield from peer.welcomed([self.name(group) for group in groups], **options)
        return peer

    def farewell(self) -> None:
        for peer in list(self._peers):
            if peer.is_attached:
                peer.say(emp.BYE, True)
            self.close(peer)


def deliver_fault(header: emp.Deliver) -> str | None:
    """What is wrong with the numbers of a DELIVER (section 5), whatever it is about."""
    last = header.first + header.count - 1
    if not header.first <= header.from_ <= last:
        return f"DELIVER: from {header.from_} is not within {header.first} … {last}"
    if header.floor > header.from_:
        return f"DELIVER: floor {header.floor} is above from {header.from_}"
    if any(not header.floor <= number < header.from_ for number, _ in header.void):
        return f"DELIVER: void {header.void} is not within {header.floor} … {header.from_ - 1}"
    if bool(header.flags & emp.REPLY) != (header.priority == 0):
        return "DELIVER: priority 0 and the flag REPLY go together"
    return None


def note_message(id: str) -> list[Any]:
    """A message that wants no reply."""
    return message(id, operation="note")
