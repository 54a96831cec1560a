"""What a module has to keep all the time, whatever the script is about: watched in every play.

Each standing rule is a check of its own in the report: failed when one play saw it broken, passed when at least one
play had something to judge, not applicable otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from runtime import emp
from runtime.conform import wire
from runtime.conform.play import Check, Finding, Seen, shown_frames

RULES: Final = (
    Check("frames", "4, 5", "every frame is a verb, a header with the told types and ranges, and a body where one is"),
    Check("routing-id", "2", "the connection has the routing id that libzmq gives it, none of the module's own"),
    Check("hello-first", "9", "the first frame of a process is HELLO"),
    Check("greeting", "9, 17 rule 4", "between HELLO and WELCOME nothing but HELLO and PING is sent"),
    Check("numbers", "3 lane, 17 rule 2", "a lane's numbers begin at 1 and none is left out"),
    Check("floor", "5 SEND, 10", "floors never fall, and never pass what SETTLED has told"),
    Check("resent", "5 flags, 17 rule 13", "what was sent before is marked RESENT when it is sent again"),
    Check("unchanged", "10", "a batch that was sent never changes: same numbers, same bytes"),
    Check("window", "7, 10", "not more than a window is unsettled, in messages and in bytes; an empty lane admits one"),
    Check("sizes", "7", "no message and no batch is larger than WELCOME allows"),
    Check("bodies", "6", "a body is an array of as many messages as the header says, each with its fields"),
    Check("replies", "5 flags, 12", "REPLY, priority 0 and a requester go together, and go to a module"),
    Check("retained", "14", "retained messages go alone, to a group, with a key and a counter that rises"),
    Check("acks", "5 ACK, 17 rule 6, 17 rule 7", "an ACK has a session of this process, and only what that delivered"),
    Check("nonces", "5 PING", "each PING has a new nonce"),
)


@dataclass(slots=True)
class SentLane:
    """A lane of the module under test, as far as it has been seen."""

    destination: str
    priority: int
    last: int = 0
    floor: int = 1
    settled: int = 0
    "What SETTLED has told."
    batches: dict[int, tuple[int, bytes, int]] = field(default_factory=dict)
    "first → (count, body, flags but RESENT), of what is not settled."
    sizes: dict[int, int] = field(default_factory=dict)
    "number → bytes, of what is not settled."

    def settle(self, cumulative: int) -> None:
        self.settled = max(self.settled, cumulative)
        self.batches = {first: batch for first, batch in self.batches.items() if first + batch[0] - 1 > cumulative}
        self.sizes = {number: size for number, size in self.sizes.items() if number > cumulative}


@dataclass(slots=True)
class Delivered:
    """What one session has delivered on one lane, and what was answered."""

    high: int
    cumulative: int = 0
    exceptions: dict[int, str] = field(default_factory=dict)


class Referee:
    """Watches one module through one play. The stage tells it what passes; `findings` is what it made of it."""

    def __init__(self, record: list[Any]) -> None:
        self._record = record
        self.findings: dict[str, Finding] = {rule.name: Finding() for rule in RULES}
        self.limits = emp.Limits()
        """What is judged by. A script that tells narrower ones sets them here when the module has had time for them:
        what got its number before has its place."""
        self.lanes: dict[tuple[str, int], SentLane] = {}
        "Of the process that runs now."
        self.delivered: dict[tuple[int, int], Delivered] = {}
        "By session and lane number, of the process that runs now."
        self.sessions: set[int] = set()
        self._is_greeting = False
        self._has_spoken = False
        self._nonces: set[int] = set()
        self._counters: dict[tuple[str, str], int] = {}

    def _judge(self, rule: str, good: bool, fault: str) -> None:
        finding = self.findings[rule]
        finding.exercised += 1
        if not good and not finding.fault:
            finding.fault = fault
            finding.frames = shown_frames(self._record)

    # --- what the stage does -----------------------------------------------------------------------

    def started(self) -> None:
        """A new process: everything begins anew."""
        self.lanes = {}
        self.delivered = {}
        self.sessions = set()
        self._nonces = set()
        self._counters = {}
        self._is_greeting = self._has_spoken = False

    def welcomed(self, session: int) -> None:
        self._is_greeting = False
        self.sessions.add(session)

    def deliver(self, session: int, lane: int, last: int) -> None:
        delivered = self.delivered.setdefault((session, lane), Delivered(0))
        delivered.high = max(delivered.high, last)

    # --- what the module does ----------------------------------------------------------------------

    def heard(self, seen: Seen, routing_id: bytes) -> None:
        """A message of the module, before the stage looks at it."""
        self._judge("frames", seen.fault is None, seen.fault or "")
        self._judge("routing-id", routing_id[:1] == b"\0", f"the routing id is {wire.shown(routing_id)}")
        if not self._has_spoken:
            self._has_spoken = True
            self._judge("hello-first", seen.verb == "HELLO/1", f"the first frame is {seen.verb}")
        if seen.verb == "HELLO/1":
            self._is_greeting = True
        elif self._is_greeting:
            allowed = seen.verb in ("PING/1", "ADMIN/1")
            self._judge("greeting", allowed, f"{seen.verb} between HELLO and WELCOME")
        if seen.verb == "PING/1" and seen.header is not None:
            nonce = seen.header.nonce
            self._judge("nonces", nonce not in self._nonces, f"nonce {nonce} a second time")
            self._nonces.add(nonce)
        if seen.verb == "HELLO/1":
            self._judge("greeting", True, "")

    def sent(self, seen: Seen) -> SentLane:
        """A SEND that the scripted broker takes; returns its lane."""
        header: emp.Send = seen.header
        body = seen.frames[2]
        key = (header.destination, header.priority)
        lane = self.lanes.get(key)
        if lane is None:
            lane = self.lanes[key] = SentLane(*key)
        last = header.first + header.count - 1
        name = f"{header.destination}, priority {header.priority}"
        self._judge(
            "numbers",
            header.first <= lane.last + 1,
            f"lane {name}: number {header.first} after {lane.last}" if lane.last else f"begins at {header.first}",
        )
        self._judge(
            "floor",
            lane.floor <= header.floor <= min(lane.settled + 1, last),
            f"lane {name}: floor {header.floor} after {lane.floor}, settled is {lane.settled}, last {last}",
        )
        lane.floor = max(lane.floor, header.floor)
        self._look_at_repeat(lane, header, body, name)
        fault = wire.body_fault(body, header.count)
        self._judge("bodies", fault is None, f"lane {name}: {fault}")
        if header.flags & emp.REPLY or header.priority == 0:
            good = bool(header.flags & emp.REPLY) and header.priority == 0 and header.requester is not None
            self._judge("replies", good and not header.destination.startswith("@"), f"lane {name}")
        if header.flags & emp.RETAIN:
            self._look_at_retained(lane, header)
        self._measure(lane, header, body, name)
        lane.batches[header.first] = (header.count, body, header.flags & ~emp.RESENT)
        lane.last = max(lane.last, last)
        return lane

    def _look_at_repeat(self, lane: SentLane, header: emp.Send, body: bytes, name: str) -> None:
        if header.first > lane.last:
            return
        self._judge(
            "resent", bool(header.flags & emp.RESENT), f"lane {name}: number {header.first} again without RESENT"
        )
        before = lane.batches.get(header.first)
        if before is None:
            good = header.first + header.count - 1 <= lane.settled  # what is settled we do not keep
        else:
            good = before == (header.count, body, header.flags & ~emp.RESENT)
        self._judge("unchanged", good, f"lane {name}: the batch that begins at {header.first} is another one now")

    def _look_at_retained(self, lane: SentLane, header: emp.Send) -> None:
        good = header.count == 1 and header.destination.startswith("@") and header.retain_key is not None
        if header.retain_key is not None and header.first > lane.last and not header.flags & emp.RESENT:
            key = (header.destination, header.retain_key)
            counter = header.retain_counter or 0
            # The same counter once more is the announcement to a new broker.
            good = good and counter >= self._counters.get(key, 0)
            self._counters[key] = max(counter, self._counters.get(key, 0))
        self._judge("retained", good, f"key {header.retain_key!r}, counter {header.retain_counter}")

    def _measure(self, lane: SentLane, header: emp.Send, body: bytes, name: str) -> None:
        sizes = wire.sizes_of(body)
        limits = self.limits
        is_new = header.first > lane.last
        most = max(limits.message_bytes, limits.batch_bytes) + 16
        if is_new:
            too_large = max(sizes, default=0) > limits.message_bytes or len(body) > most
            self._judge("sizes", not too_large, f"lane {name}: {len(body)} bytes in {len(sizes)} messages")
        for number, size in enumerate(sizes, header.first):
            if number > lane.settled:
                lane.sizes[number] = size
        if not is_new or header.priority == 0:
            return
        unsettled, held = len(lane.sizes), sum(lane.sizes.values())
        self._judge(
            "window",
            unsettled <= 1 or (unsettled <= limits.window_messages and held <= limits.window_bytes),
            f"lane {name}: {unsettled} messages, {held} bytes unsettled; "
            f"allowed are {limits.window_messages} and {limits.window_bytes}",
        )

    def acknowledged(self, seen: Seen, session: int) -> bool:
        """An ACK. Whether it is of the present `session`; then what it says is booked."""
        header: emp.Ack = seen.header
        self._judge("acks", header.session in self.sessions, f"session {header.session} was never given")
        if header.session != session:
            return False
        for number, cumulative, exceptions in header.lanes:
            delivered = self.delivered.get((session, number))
            good = delivered is not None and cumulative <= delivered.high
            good = good and all(each <= cumulative for each, _ in exceptions)
            self._judge(
                "acks",
                good,
                f"lane {number} up to {cumulative}, delivered was "
                + (f"up to {delivered.high}" if delivered is not None else "nothing in this session"),
            )
            if delivered is not None:
                delivered.cumulative = max(delivered.cumulative, cumulative)
                delivered.exceptions.update(exceptions)
        return True
