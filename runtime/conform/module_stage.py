"""The scripted broker: what a module under test meets instead of a real one.

By itself it has the manners that docs/emp.md wants of a broker (WELCOME, PONG, SETTLED, WHO to strangers); a script
switches off what it wants to do itself. It shares no rule with `runtime.routing`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from runtime import emp
from runtime.conform import wire
from runtime.conform.play import Failed, NotApplicable, Rebind, Scene, Seen, Settings, Signal, Stage, Start
from runtime.conform.referee import Delivered, Referee, SentLane

HEARTBEAT_MS: Final = 400
LIMITS: Final = (12582912, 4096, 8388608, 512, 262144)
"message_bytes, window_messages, window_bytes, batch_messages, batch_bytes"
GENERATION: Final = 70_000
STATUS_OF_TERM: Final = -15


@dataclass(frozen=True, slots=True)
class Traits:
    """What a module has shown of itself: which checks apply to it."""

    name: str = ""
    groups: tuple[str, ...] = ()
    liveness: float = 15.0
    "Seconds, from its HELLO."
    answers: bool = False
    echoes: bool = False
    sends: bool = False
    asks: bool = False
    retains: bool = False

    def lacking(self, needs: Iterable[str]) -> str:
        """Why a check that `needs` these does not apply; empty when it does."""
        for need in needs:
            if not getattr(self, need):
                return LACKING[need]
        return ""


LACKING: Final = {
    "groups": "its HELLO names no group",
    "answers": "it did not answer a request",
    "echoes": "it did not answer a request with what it was asked",
    "sends": "it sent nothing by itself",
    "asks": "it sent no request",
    "retains": "it retained nothing",
}


@dataclass(frozen=True, slots=True)
class Other:
    """A module that the scripted broker pretends to have: it sends to the one under test."""

    name: str
    incarnation: bytes
    generation: int


def other(name: str, *, generation: int = 100, process: int = 1) -> Other:
    """`process` tells incarnations of one name apart."""
    return Other(name, (name.encode() + b"-" * 16)[:15] + bytes([process]), generation)


ASKER: Final = other("conform-asker")


def message(
    id: str, content: Any = None, *, resource: str = "conform/1", operation: str = "query", parent: str = ""
) -> list[Any]:
    """A message with JSON content."""
    text = json.dumps({"id": id} if content is None else content, separators=(",", ":")).encode()
    return [id, parent, 1_700_000_000_000, False, "", "conform", "user", resource, operation, "json", text]


def is_same(sent: list[Any], reply: list[Any]) -> bool:
    """Whether a message comes back with the same content."""
    if sent[9] != reply[9]:
        return False
    if sent[9] != "json":
        return bool(sent[10] == reply[10])
    try:
        return bool(json.loads(sent[10]) == json.loads(reply[10]))
    except ValueError:
        return False


@dataclass(slots=True)
class Delivery:
    """Something delivered, to ask about."""

    session: int
    lane: int
    first: int
    "That is meant for the module: its `from`."
    last: int
    mark: int
    "The record's end when it was delivered."


@dataclass(slots=True)
class Manners:
    """What the scripted broker does by itself."""

    welcomes: bool = True
    pongs: bool = True
    settles: bool = True
    asks_strangers: bool = True


class ModuleStage(Stage):
    """A broker, a module under test, and others that only seem to be there."""

    reads = wire.FROM_MODULE
    writes = wire.FROM_BROKER

    def __init__(self, settings: Settings, traits: Traits | None = None) -> None:
        super().__init__(settings)
        self.traits = traits or Traits()
        self.referee = Referee(self.record)
        self.manners = Manners()
        self.epoch = b"conform1"
        self.session = 4096
        self.generation = GENERATION
        self.heartbeat_ms = HEARTBEAT_MS
        self.limits: Sequence[int] | None = LIMITS
        self.hello: emp.Hello | None = None
        "The last one."
        self.greeted_at = 0
        "Its place in the record: what comes after it is of a module that knows that it has to begin anew."
        self.connection = ""
        "That said it."
        self.is_attached = False
        self.status: int | None = None
        "Of the process that has ended."
        self.may_end = False
        self.pinged: Seen | None = None
        "The last PING."
        self._strangers: set[str] = set()
        self._asked_after = 0
        self._lane_numbers: dict[tuple[int, bytes, str, int], int] = {}

    # --- the module's process -----------------------------------------------------------------------

    def start(self) -> None:
        """A new process."""
        self.referee.started()
        self.hello = None
        self.pinged = None
        self.is_attached = False
        self.status = None
        self.may_end = False
        self.note("the module is started")
        self.actions.append(Start())

    def signal(self, name: str) -> None:
        self.note(f"SIG{name} to the module")
        self.actions.append(Signal(name))
        if name in ("TERM", "KILL"):
            self.may_end = True

    def ended(self, status: int) -> None:
        self.status = status
        self.is_attached = False
        self.note(f"the module's process has ended, status {status}")
        if not self.may_end:
            raise Failed(f"its process has ended (status {status})")

    # --- frames ----------------------------------------------------------------------------------------

    def take(self, end: str, frames: tuple[bytes, ...]) -> Seen:
        seen = super().take(end, frames)
        self.referee.heard(seen, bytes.fromhex(end))
        if seen.header is None or seen.fault is not None:
            return seen
        if seen.verb == "HELLO/1":
            self.hello = seen.header
            self.greeted_at = self.mark
            self.pinged = None
            self.connection = end
            self._strangers.discard(end)
            self.is_attached = False
            if self.manners.welcomes:
                self.welcome()
        elif seen.verb == "ADMIN/1":
            self.tell(end, emp.ADMIN, wire.packed(seen.header.request, seen.header.op, False), b"\x80")
        elif not self.is_attached or end != self.connection:
            if self.manners.asks_strangers and self.hello is None and end not in self._strangers:
                self._strangers.add(end)
                self.tell(end, emp.WHO, wire.packed(self.epoch))
        elif seen.verb == "PING/1":
            self.pinged = seen
            if self.manners.pongs:
                self.pong()
        elif seen.verb == "SEND/1":
            lane = self.referee.sent(seen)
            if self.manners.settles:
                self.settle(lane)
        elif seen.verb == "ACK/1":
            self.referee.acknowledged(seen, self.session)
        return seen

    def say(self, verb: bytes, *fields: Any, body: bytes | None = None) -> None:
        """A frame to the module."""
        self.tell(self.connection, verb, wire.packed(*fields), *([] if body is None else [body]))

    def welcome(self, *more: Any, epoch: bytes | None = None, limits: Sequence[int] | None = None) -> None:
        """A new session. `more`: fields of a later version."""
        # From here on a HELLO that was on its way already is answered too: its sender takes itself for attached.
        self.manners.welcomes = True
        self.session += 1
        self.epoch = epoch or self.epoch
        if limits is not None:
            self.limits = limits
        self.is_attached = True
        self.referee.welcomed(self.session)
        fields: list[Any] = [self.epoch, self.session, self.generation, self.heartbeat_ms, False]
        if self.limits is not None:
            fields.append(list(self.limits))
        self.say(emp.WELCOME, *fields, *more)
        # What is settled of its lanes is told again (rule 11).
        for lane in self.referee.lanes.values():
            if lane.last:
                self.say(emp.SETTLED, lane.destination, lane.priority, lane.settled)

    def who(self) -> None:
        """Forget the session and ask."""
        self.is_attached = False
        self.say(emp.WHO, self.epoch)

    def rebind(self) -> None:
        """Be another broker at the same endpoint: the connection is lost, and all that was known."""
        self.note("the broker is replaced")
        self.actions.append(Rebind())
        self.epoch = self.epoch[:-1] + bytes([self.epoch[-1] + 1])
        self.session += 1000
        self.is_attached = False
        self.hello = None
        self.connection = ""
        self._lane_numbers = {}

    def pong(self) -> None:
        if self.pinged is not None:
            self.say(emp.PONG, self.pinged.header.nonce)

    def settle(self, lane: SentLane, cumulative: int | None = None, *exceptions: tuple[int, str, str | None]) -> None:
        """SETTLED, up to the last number or to `cumulative`."""
        cumulative = lane.last if cumulative is None else cumulative
        lane.settle(cumulative)
        self.say(emp.SETTLED, lane.destination, lane.priority, cumulative, [list(each) for each in exceptions])

    def settle_all(self) -> None:
        for lane in self.referee.lanes.values():
            if lane.settled < lane.last:
                self.settle(lane)

    # --- deliveries --------------------------------------------------------------------------------------

    def lane_number(self, sender: Other, destination: str, priority: int, session: int | None = None) -> int:
        """The short number of a lane; another one in each session."""
        key = (session or self.session, sender.incarnation, destination, priority)
        return self._lane_numbers.setdefault(key, 7 * (key[0] % 100) + len(self._lane_numbers) + 1)

    def deliver(
        self,
        *messages: list[Any],
        first: int = 1,
        sender: Other = ASKER,
        destination: str = "",
        priority: int = 1,
        from_: int | None = None,
        floor: int | None = None,
        void: Iterable[tuple[int, str]] = (),
        flags: int = emp.EXPECTS_REPLY,
        session: int | None = None,
        body: bytes | None = None,
        count: int | None = None,
        pack: Callable[..., bytes] = wire.packed,
        more: Sequence[Any] | None = (None, None, None, None),
    ) -> Delivery:
        """A batch for the module.

        `more`: ttl_ms, requester, retain_key, retain_version; None leaves off all that may be left off.
        """
        session = self.session if session is None else session
        destination = destination or (self.hello.name if self.hello else "")
        lane = self.lane_number(sender, destination, priority, session)
        count = len(messages) if count is None else count
        from_ = first if from_ is None else from_
        fields: list[Any] = [session, lane, sender.name, sender.incarnation, sender.generation, destination, priority]
        fields += [first, count, from_, first if floor is None else floor]
        if more is not None:
            fields += [[list(each) for each in void], flags, *more]
        last = first + count - 1
        self.referee.deliver(session, lane, last)
        delivery = Delivery(session, lane, from_, last, self.mark)
        self.tell(self.connection, emp.DELIVER, pack(*fields), wire.packed(*messages) if body is None else body)
        return delivery

    def outcome(self, delivery: Delivery) -> Delivered | None:
        """What the present session's ACKs say of it; None while it is open."""
        found = self.referee.delivered.get((delivery.session, delivery.lane))
        return found if found is not None and found.cumulative >= delivery.last else None

    def acks_of(self, delivery: Delivery, mark: int | None = None) -> list[Seen]:
        """The ACKs that name its lane, since it was delivered or since `mark`."""
        return [
            seen
            for seen in self.since(delivery.mark if mark is None else mark, "ACK/1")
            if seen.header.session == delivery.session and any(lane[0] == delivery.lane for lane in seen.header.lanes)
        ]

    def replies(self, mark: int, *ids: str) -> list[tuple[Seen, list[Any]]]:
        """Replies since `mark`, to the messages with these ids (or to any): the frame and the message."""
        found = []
        for seen in self.since(mark, "SEND/1"):
            if seen.header.flags & emp.REPLY or seen.header.priority == 0:
                for reply in wire.messages_of(seen.frames[2]):
                    if (not ids or reply[1] in ids) and not seen.header.flags & emp.RESENT:
                        found.append((seen, reply))
        return found

    def own(self, mark: int = 0) -> list[Seen]:
        """What it has sent by itself since `mark`: SENDs that are no replies."""
        return [seen for seen in self.since(mark, "SEND/1") if seen.header.priority]

    def own_lanes(self) -> list[SentLane]:
        return [lane for lane in self.referee.lanes.values() if lane.priority]

    @property
    def before_liveness(self) -> float:
        """Soon, and before it says HELLO anyhow because no PONG comes."""
        return min(self.settings.soon, 0.8 * self.traits.liveness)

    # --- scenes ---------------------------------------------------------------------------------------------

    def greeted(self) -> Scene[emp.Hello]:
        """Start the module and wait for its HELLO."""
        self.start()
        yield from self.until(lambda: self.hello, f"no HELLO within {self.settings.start} s", self.settings.start)
        assert self.hello is not None
        return self.hello

    def attached(self) -> Scene[emp.Hello]:
        """Start it and wait until it is in, and knows that the broker lives."""
        hello = yield from self.greeted()
        yield from self.until(lambda: self.pinged, "no PING after WELCOME")
        return hello

    def asked_who(self) -> Scene[emp.Hello]:
        """WHO, and the HELLO that answers it."""
        mark = self.mark
        self.who()
        seen = yield from self.answer(mark, "no HELLO in answer to WHO", "HELLO/1", within=self.before_liveness)
        hello: emp.Hello = seen.header
        return hello

    def replied(self, delivery: Delivery, *ids: str) -> Scene[list[tuple[Seen, list[Any]]]]:
        """Until there is a reply to each of these."""
        found = yield from self.until(
            lambda: len(self.replies(delivery.mark, *ids)) >= len(ids) and self.replies(delivery.mark, *ids),
            f"no reply to {', '.join(ids)}",
        )
        assert isinstance(found, list)
        return found

    def settled(self, delivery: Delivery, what: str = "what was delivered") -> Scene[Delivered]:
        """Until the ACK covers it."""
        found = yield from self.until(lambda: self.outcome(delivery), f"no ACK for {what}")
        return found

    def served(self, delivery: Delivery, *ids: str) -> Scene[Delivered]:
        """Until it has been replied to, once each, and acknowledged as delivered."""
        yield from self.replied(delivery, *ids)
        outcome = yield from self.settled(delivery)
        refused = {number: why for number, why in outcome.exceptions.items() if number >= delivery.first}
        if refused:
            raise Failed(f"answered and yet refused: {refused}")
        return outcome

    def left_alone(self) -> Scene[None]:
        """It still serves: PING goes on, and a request is answered, if it answers any."""
        mark = self.mark
        yield from self.until(lambda: self.since(mark, "PING/1"), "no PING any more")
        if self.traits.answers:
            self._asked_after += 1
            id = f"still-{self._asked_after}"
            # Its number says nothing of the lanes that the script is about.
            delivery = self.deliver(message(id), sender=other(f"conform-after-{self._asked_after}"))
            yield from self.served(delivery, id)

    def sends(self, how_many: int = 1, mark: int = 0, otherwise: str = "") -> Scene[list[Seen]]:
        """Until it has sent so many messages by itself.

        When it does not: fail with `otherwise`; without that, the check does not apply.
        """
        wait = 4 * self.settings.survey + self.settings.soon
        found = yield from self.whether(
            lambda: sum(seen.header.count for seen in self.own(mark)) >= how_many and self.own(mark), wait
        )
        if not found and otherwise:
            raise Failed(otherwise)
        if not found:
            raise NotApplicable(f"it did not send {how_many} messages within {wait:.0f} s")
        assert isinstance(found, list)
        return found

    def unsettled(self, wanted: int = 1, least: int | None = None) -> Scene[SentLane]:
        """From now on settle nothing, and wait until one lane has so many messages open: that lane.

        `least`: so many will do, for a module whose own window is small.
        """
        self.manners.settles = False
        least = wanted if least is None else least
        wait = 4 * self.settings.survey + self.settings.soon

        def has(open_messages: int) -> SentLane | None:
            return next((lane for lane in self.own_lanes() if lane.last - lane.settled >= open_messages), None)

        lane = yield from self.whether(lambda: has(least), wait)
        if lane is None:
            raise NotApplicable(f"it had no {least} messages open to one destination within {wait:.0f} s")
        more = yield from self.whether(lambda: has(wanted), 2 * self.settings.survey)
        return more or lane

    def gone(self, within: float, otherwise: str) -> Scene[int]:
        """Until the process has ended."""
        self.may_end = True
        yield from self.until(lambda: self.status is not None, otherwise, within)
        assert self.status is not None
        return self.status
