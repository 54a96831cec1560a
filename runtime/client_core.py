"""The SDK's core: one module's side of EMP/1. No I/O, no clock.

`ClientCore` takes frames and the passing of time and collects what to send in `out` (frames, in
order) and what the shell has to do in `events`. "rule n" names a numbered rule of docs/emp.md.

The sender's side: an `OutLane` gives each message a sequence number and keeps it, in batches, until
SETTLED passes it. The receiver's side: an `InLane` is the book of what was seen of one sender's lane, so that each
message is handled at most once in this process and every redelivery is answered with its outcome.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any, Final, NamedTuple

from runtime import emp
from runtime.errors import HelloRefused, MalformedFrame, MalformedMessage, NameTaken
from runtime.message import Message, decode_batch, join_batch

REPLY: Final = int(emp.Priority.REPLY)
LAZY_PRIORITY: Final = int(emp.Priority.REQUEST)
"Lanes up to this one are acknowledged without haste: the reply has told the requester already."
HELLO_AGAIN_SECONDS: Final = 0.5
"An unanswered HELLO is repeated this often (rule 10)."
MAX_IN_LANES: Final = 4096
"Books kept; the ones unused longest are forgotten first, which can lead to a repeat, never to a loss (rule 18)."
MAX_RETAINED_VERSIONS: Final = 4096
LIMITS_BEFORE_WELCOME: Final = emp.Limits(window_messages=64, window_bytes=2**20)
"What a module may send before it knows what the broker allows: little, so that a strict broker need not refuse it."
MAX_FLOORS: Final = 1024
"Floors told by one PING, so that its header stays small; the next one tells the others."
MAX_BOOK: Final = 1 << 20
"A DELIVER that leaps over more numbers than this while others run is no frame of a sane broker."


class State(Enum):
    """Where the module stands with the broker."""

    DETACHED = "detached"
    "No connection: HELLO goes out when there is one."
    GREETING = "greeting"
    "HELLO is out; nothing but HELLO and PING may be sent (rule 4)."
    ATTACHED = "attached"
    ENDED = "ended"
    "Fenced or refused: for good."


class OutBatch:
    """Messages of one lane that share a header; closed when it is first sent."""

    __slots__ = (
        "abandoned",
        "body",
        "count",
        "deadline",
        "first",
        "flags",
        "parts",
        "plain",
        "refusals",
        "requester",
        "retain_counter",
        "retain_key",
        "sent",
        "settled",
        "size",
        "waiters",
    )

    def __init__(self, first: int) -> None:
        self.first = first
        self.count = 0
        self.parts: list[bytes] = []
        self.size = 0
        self.body = b""
        self.sent = False
        self.flags = 0
        self.plain = True
        "Nothing special in its header: no flags, no deadline, no requester."
        self.deadline: float | None = None
        self.requester: bytes | None = None
        self.retain_key: str | None = None
        self.retain_counter: int | None = None
        self.settled = first - 1
        "Numbers up to this are settled."
        self.refusals: dict[int, list[tuple[str, str | None]]] | None = None
        self.waiters: list[tuple[int, Any]] | None = None
        "The shell's: [(number, whom to wake)]."
        self.abandoned: Exception | None = None
        "The shell's: why it will never be settled (the bus has ended)."

    @property
    def last(self) -> int:
        return self.first + self.count - 1


class OutLane:
    """One lane of ours: (destination as addressed, priority)."""

    __slots__ = (
        "batches",
        "destination",
        "floor",
        "messages",
        "next",
        "open",
        "priority",
        "size",
        "told",
        "unsent",
        "waiters",
    )

    def __init__(self, destination: str, priority: int) -> None:
        self.destination = destination
        self.priority = priority
        self.next = 1
        self.floor = 1
        self.batches: deque[OutBatch] = deque()
        "Unsettled, in order; the last one may be open."
        self.unsent: deque[OutBatch] = deque()
        self.open: OutBatch | None = None
        self.messages = 0
        self.size = 0
        self.told = 1
        "The floor as the broker knows it; when it has moved and nothing more is sent, PING carries it (rules 5, 12)."
        self.waiters: deque[Any] = deque()
        "The shell's: who waits for room."


class InLane:
    """The book of one sender's lane, in this process."""

    __slots__ = (
        "acked",
        "base",
        "destination",
        "dirty",
        "done",
        "failed",
        "floor",
        "generation",
        "highest",
        "incarnation",
        "late",
        "number",
        "priority",
        "sender",
        "session",
        "session_high",
        "used",
        "work",
    )

    def __init__(self, header: emp.Deliver) -> None:
        self.sender = header.sender
        self.incarnation = header.incarnation
        self.generation = header.generation
        self.destination = header.destination
        self.priority = header.priority
        self.base = header.floor
        "The lowest number this book ever knew."
        self.floor = header.floor
        self.highest = header.floor - 1
        "All numbers from base to this one are known."
        self.done = header.floor - 1
        "All up to this one have an outcome."
        self.late: set[int] = set()
        "Numbers above done + 1 that have one too."
        self.failed: dict[int, str] = {}
        "Outcomes other than `delivered`."
        self.session = -1
        self.number = 0
        self.session_high = 0
        self.acked = 0
        self.dirty = False
        self.used = True
        "Something came since the cap on books was last looked at."
        self.work: Any = None
        "The shell's worker of this lane."


class Arrival(NamedTuple):
    """Event: new messages to handle, `first` being the number of the first."""

    lane: InLane
    first: int
    messages: list[Message]
    header: emp.Deliver
    at: float


class Replied(NamedTuple):
    """Event: the reply somebody waits for. `waiter` is what `expect` was given."""

    waiter: Any
    reply: Message
    sender: str


class Woken(NamedTuple):
    """Event: these waiters' messages are settled."""

    waiters: list[Any]


class Room(NamedTuple):
    """Event: the lane's window has moved."""

    lane: OutLane


class Members(NamedTuple):
    """Event: the members that a group request went to. `waiters` are those registered for its batch's numbers."""

    lane: OutLane
    first: int
    messages: int
    members: list[str]


class Attached(NamedTuple):
    """Event: in. `late`: group messages may have been missed (rule 24). `anew`: by another broker process."""

    late: bool
    anew: bool


class Detached(NamedTuple):
    why: str


class Ended(NamedTuple):
    """Event: for good. `error` says why; fenced when None is not the case of a drain."""

    error: Exception | None
    fenced: int | None


class AdminAnswer(NamedTuple):
    header: emp.Admin
    body: bytes


class Complaint(NamedTuple):
    """Event: the broker refused a frame of ours; a bug on one of the sides. For the log."""

    code: str
    text: str


Event = Arrival | Replied | Woken | Room | Members | Attached | Detached | Ended | AdminAnswer | Complaint


class _Retained(NamedTuple):
    destination: str
    priority: int
    key: str
    counter: int
    data: bytes


class ClientCore:
    """One module's side of the bus.

    `incarnation`: 16 random bytes per process. `liveness_seconds`: silence that makes the broker call us
    hung, and after which we ask before we handle anything more (rule 21).
    """

    def __init__(
        self,
        name: str,
        *,
        incarnation: bytes,
        groups: tuple[str, ...] = (),
        liveness_seconds: float = 15.0,
        sdk: str = "",
        prefetch_messages: int = 2048,
        prefetch_bytes: int = 8 * 2**20,
        pid: int = 0,
    ) -> None:
        self.name = name
        self.incarnation = incarnation
        self.groups = groups
        self.liveness_seconds = liveness_seconds
        self.generation = 0
        self.session = -1
        self.epoch = b""
        self.state = State.DETACHED
        self.limits = LIMITS_BEFORE_WELCOME
        self.out: list[list[bytes]] = []
        self.events: list[Event] = []
        self.counters: Mapping[str, int] = {}
        "The module's own; PING carries them."
        self.draining = False
        self.duplicates = 0
        self.late_replies = 0
        self._sdk = sdk
        self._prefetch = (prefetch_messages, prefetch_bytes)
        self._pid = pid
        self._heartbeat_seconds = 5.0
        self._hello_at: float | None = None
        self._refused_since: float | None = None
        self._nonce = 0
        self._ping_at = 0.0
        self._pinged: tuple[int, float] | None = None  # nonce and time of the PING that is not answered
        self.last_ok = float("-inf")
        "When the last answered PING was sent; beyond `liveness_seconds` nothing new is handled (rule 21)."
        self.lanes: dict[tuple[str, int], OutLane] = {}
        self._unflushed: list[OutLane] = []
        self._in: dict[tuple[str, bytes, str, int], InLane] = {}
        self._generations: dict[str, int] = {}
        self.dirty_lanes: list[InLane] = []
        "Lanes with something finished that no ACK has told yet."
        self._lazy: list[InLane] = []
        self._waiters: dict[str, tuple[Any, str]] = {}
        self._retained: dict[tuple[str, str], _Retained] = {}
        self._retain_counter = 0
        self._versions: dict[tuple[str, str, str], tuple[int, int]] = {}

    # --- sending ------------------------------------------------------------------------------------

    def lane(self, destination: str, priority: int) -> OutLane:
        """The lane to `destination` (made when it is new)."""
        lane = self.lanes.get((destination, priority))
        if lane is None:
            lane = self.lanes[(destination, priority)] = OutLane(destination, priority)
        return lane

    def has_room(self, lane: OutLane, size: int) -> bool:
        """Whether the window admits a message of `size` bytes. An empty lane admits any; replies need no room."""
        return (
            (lane.messages < self.limits.window_messages and lane.size + size <= self.limits.window_bytes)
            or not lane.messages
            or lane.priority == REPLY
        )

    def put(self, lane: OutLane, data: bytes) -> OutBatch:
        """Give an encoded message its place. Its number is `lane.next - 1` after the call.

        The caller has asked `has_room`. Nothing is sent before `flush`; `lane.open` is None when a batch is full.
        """
        batch = lane.open
        if batch is None or not batch.plain or batch.size + len(data) > self.limits.batch_bytes:
            batch = self._open(lane)
        return self._append(lane, batch, data)

    def put_with(
        self, lane: OutLane, data: bytes, flags: int, deadline: float | None, requester: bytes | None
    ) -> OutBatch:
        """`put` with what stands in the batch's header: flags, deadline (seconds), the requester of a reply."""
        batch = lane.open
        if (
            batch is None
            or batch.flags != flags
            or batch.deadline != deadline
            or batch.requester != requester
            or batch.size + len(data) > self.limits.batch_bytes
        ):
            batch = self._open(lane)
            batch.flags = flags
            batch.deadline = deadline
            batch.requester = requester
            batch.plain = not flags and deadline is None and requester is None
        return self._append(lane, batch, data)

    def _append(self, lane: OutLane, batch: OutBatch, data: bytes) -> OutBatch:
        size = len(data)
        batch.parts.append(data)
        batch.count += 1
        batch.size += size
        lane.next += 1
        lane.messages += 1
        lane.size += size
        if batch.count >= self.limits.batch_messages or batch.size >= self.limits.batch_bytes:
            lane.open = None
        return batch

    def _open(self, lane: OutLane) -> OutBatch:
        batch = lane.open = OutBatch(lane.next)
        lane.batches.append(batch)
        if not lane.unsent:
            self._unflushed.append(lane)
        lane.unsent.append(batch)
        return batch

    def put_retained(self, destination: str, priority: int, key: str, data: bytes) -> tuple[OutLane, OutBatch]:
        """Send to a group and retain under `key`; a new broker gets it again by itself (rule 36)."""
        self._retain_counter += 1
        retained = _Retained(destination, priority, key, self._retain_counter, data)
        self._retained[(destination, key)] = retained
        return self._put_retained(retained)

    def _put_retained(self, retained: _Retained) -> tuple[OutLane, OutBatch]:
        lane = self.lane(retained.destination, retained.priority)
        batch = self._open(lane)
        batch.flags = emp.RETAIN
        batch.plain = False
        batch.retain_key = retained.key
        batch.retain_counter = retained.counter
        batch.parts.append(retained.data)
        batch.count = 1
        batch.size = len(retained.data)
        lane.next += 1
        lane.messages += 1
        lane.size += batch.size
        lane.open = None
        return lane, batch

    def flush(self, now: float) -> None:
        """Close what is open and send it, if we may; then the ACKs. Call it when the loop is idle."""
        if self.state is State.ATTACHED:
            if self._unflushed:
                lanes, self._unflushed = self._unflushed, []
                for lane in lanes:
                    lane.open = None
                    unsent = lane.unsent
                    while unsent:
                        self._send(lane, unsent.popleft(), now)
            while self.dirty_lanes:
                self._acknowledge()

    def flush_lane(self, lane: OutLane, now: float) -> None:
        """Send the closed batches of one lane (a batch has become full)."""
        if self.state is State.ATTACHED:
            unsent = lane.unsent
            while unsent and (len(unsent) > 1 or lane.open is None):
                self._send(lane, unsent.popleft(), now)
            if not unsent:
                # The lane stays in _unflushed: flush() finds nothing to do there, or what comes next.
                try:
                    self._unflushed.remove(lane)
                except ValueError:
                    pass

    def _send(self, lane: OutLane, batch: OutBatch, now: float) -> None:
        flags = batch.flags
        if batch.sent:
            flags |= emp.RESENT
        else:
            batch.sent = True
            batch.body = join_batch(batch.parts)
            batch.parts = []
        ttl = None if batch.deadline is None else max(0, int((batch.deadline - now) * 1000))
        lane.told = lane.floor
        header = emp.Send(
            lane.destination,
            lane.priority,
            batch.first,
            batch.count,
            lane.floor,
            flags,
            ttl,
            batch.requester,
            batch.retain_key,
            batch.retain_counter,
        )
        self.out.append(emp.encode(emp.SEND, header, batch.body))

    # --- requests -------------------------------------------------------------------------------------

    def expect(self, message_id: str, waiter: Any, of: str = "") -> None:
        """Register who waits for the reply to `message_id`. Before the request is put.

        `of`: the module that was asked; another's reply is none. Ids can be guessed from earlier ones.
        """
        self._waiters[message_id] = (waiter, of)

    def forget(self, message_id: str) -> None:
        """Nobody waits any more; a late reply is acknowledged and counted."""
        self._waiters.pop(message_id, None)

    @property
    def open_requests(self) -> int:
        return len(self._waiters)

    def open_waiters(self) -> Iterable[Any]:
        """Who waits for replies, as given to `expect`."""
        return [waiter for waiter, _ in self._waiters.values()]

    # --- the connection, time ----------------------------------------------------------------------------

    def connected(self, now: float) -> None:
        """There is a connection (again): say HELLO."""
        if self.state is State.ENDED:
            return
        if self.state is State.ATTACHED:
            self.events.append(Detached("the connection was lost"))
        self._greet(now)

    def disconnected(self, now: float, why: str = "the connection was lost") -> None:
        """The connection is gone."""
        if self.state is State.ATTACHED or self.state is State.GREETING:
            if self.state is State.ATTACHED:
                self.events.append(Detached(why))
            self.state = State.DETACHED
            self._pinged = None
            self._hello_at = None

    def _greet(self, now: float) -> None:
        self.state = State.GREETING
        self._pinged = None
        self._hello_at = now
        self.out.append(
            emp.encode(
                emp.HELLO,
                emp.Hello(
                    self.name,
                    list(self.groups),
                    self.incarnation,
                    self.generation,
                    int(self.liveness_seconds * 1000),
                    self._sdk,
                    *self._prefetch,
                    self._pid,
                ),
            )
        )

    def expire(self, now: float) -> None:
        """Time has passed: repeat HELLO, send PING, miss a PONG."""
        if self.state is State.GREETING:
            if self._hello_at is not None and now - self._hello_at >= HELLO_AGAIN_SECONDS:
                self._greet(now)
        elif self.state is State.ATTACHED:
            if self._pinged is not None and now - self._pinged[1] > self.liveness_seconds:
                self.events.append(Detached(f"no PONG for {self.liveness_seconds} s"))
                self._greet(now)
            elif now >= self._ping_at and self._pinged is None:
                self.ping(now)

    def next_deadline(self, now: float) -> float:
        """When `expire` wants to be called next."""
        if self.state is State.GREETING:
            return (self._hello_at if self._hello_at is not None else now) + HELLO_AGAIN_SECONDS
        if self.state is State.ATTACHED:
            if self._pinged is not None and now >= self._ping_at:
                return self._pinged[1] + self.liveness_seconds + 0.001
            return self._ping_at
        return now + 3600.0

    def ping(self, now: float) -> None:
        """PING with a fresh nonce; only its own PONG answers it (rule 21)."""
        self._nonce += 1
        self._pinged = (self._nonce, now)
        self._ping_at = now + self._heartbeat_seconds
        floors: list[tuple[str, int, int]] = []
        for lane in self.lanes.values():
            if lane.floor > lane.told and len(floors) < MAX_FLOORS:
                lane.told = lane.floor
                floors.append((lane.destination, lane.priority, lane.floor))
        self.out.append(emp.encode(emp.PING, emp.Ping(self._nonce, dict(self.counters), floors)))

    def is_fresh(self, now: float) -> bool:
        """Whether a handler may start: the broker answered a PING sent within the liveness time (rule 21)."""
        return now - self.last_ok <= self.liveness_seconds

    def ask_fresh(self, now: float) -> None:
        """We were stopped, or cut off: ask before working on. Handlers wait until `is_fresh`."""
        if self.state is State.ATTACHED and (self._pinged is None or now - self._pinged[1] > self._heartbeat_seconds):
            self.ping(now)

    def drain(self, deadline_seconds: float) -> None:
        """No new deliveries, please: we are going to stop (rule 34)."""
        self.draining = True
        if self.state is State.ATTACHED:
            self.out.append(emp.encode(emp.DRAIN, emp.Drain(max(0, int(deadline_seconds * 1000)))))

    def bye(self, *, leaving: bool, now: float) -> None:
        """The last frame."""
        if self.state is State.ATTACHED:
            self.flush_lazy()
            self.flush(now)
            self.out.append(emp.encode(emp.BYE, emp.Bye(leaving)))
        self.state = State.ENDED

    # --- receiving --------------------------------------------------------------------------------------

    def receive(self, frames: list[bytes], now: float) -> None:
        """Take the frames of one message of the broker. Malformed ones are counted and dropped: Complaint."""
        try:
            verb, header, body = emp.decode(frames)
        except MalformedFrame as fault:
            self.events.append(Complaint(fault.code, f"from the broker: {fault.text}"))
            return
        if verb == emp.DELIVER:
            assert body is not None
            self._on_deliver(header, body, now)
        elif verb == emp.SETTLED:
            self._on_settled(header)
        elif verb == emp.PONG:
            if self._pinged is not None and header.nonce == self._pinged[0]:
                self.last_ok = self._pinged[1]
                self._pinged = None
        elif verb == emp.WELCOME:
            self._on_welcome(header, now)
        elif verb == emp.WHO:
            if self.state is State.ATTACHED:  # rule 10: not while HELLO is unanswered
                self.events.append(Detached("the broker asked who we are"))
                self._greet(now)
        elif verb == emp.FENCED:
            if self.state is not State.ENDED and header.generation >= self.generation:
                self.state = State.ENDED
                self.events.append(Ended(None, header.generation))
        elif verb == emp.REFUSED:
            self._on_refused(header, now)
        elif verb == emp.ADMIN:
            self.events.append(AdminAnswer(header, body or b""))

    def _on_welcome(self, welcome: emp.Welcome, now: float) -> None:
        if self.state is State.ENDED:
            return
        # A WELCOME while attached answers a HELLO that was repeated: the newest session counts. Sessions of one
        # broker only rise, so a lower one lay unread since before.
        if welcome.epoch == self.epoch and welcome.session <= self.session:
            return
        anew = self.epoch != welcome.epoch
        known = bool(self.epoch)
        self.epoch = welcome.epoch
        self.session = welcome.session
        self.generation = welcome.generation
        self.limits = welcome.limits
        self._heartbeat_seconds = min(welcome.heartbeat_ms / 1000, self.liveness_seconds / 3)
        self._hello_at = None
        self._refused_since = None
        self._pinged = None
        self._ping_at = now + self._heartbeat_seconds
        self.state = State.ATTACHED
        # Everything unsettled from the floor, in order, then new (rule 4).
        self._unflushed = []
        for lane in self.lanes.values():
            lane.open = None
            lane.unsent.clear()
            if not anew:
                lane.told = 1  # what told it may have been lost with the connection
            for batch in lane.batches:
                self._send(lane, batch, now)
        if anew and known:
            for retained in self._retained.values():
                self._put_retained(retained)
        if self.draining:
            self.drain(0)
        self.events.append(Attached(welcome.late, anew))
        self.flush(now)
        # This WELCOME may be an old one that lay unread: only a PONG with a fresh nonce lets handlers start (rule 21).
        self.ping(now)

    def _on_refused(self, refused: emp.Refused, now: float) -> None:
        if self.state is not State.GREETING:
            if refused.code != emp.NAME_TAKEN:  # that one is the late answer to a HELLO that was repeated
                self.events.append(Complaint(refused.code, refused.text))
            return
        if refused.code == emp.NAME_TAKEN:
            # It may be our own predecessor, whose death the broker has not noticed: one liveness period (rule 23).
            if self._refused_since is None:
                self._refused_since = now
            if now - self._refused_since <= self.liveness_seconds:
                return
            self.state = State.ENDED
            self.events.append(Ended(NameTaken(refused.text), None))
        elif refused.code in (emp.BAD_HEADER, emp.UNKNOWN_VERB):
            self.events.append(Complaint(refused.code, refused.text))
        else:
            self.state = State.ENDED
            self.events.append(Ended(HelloRefused(refused.code, refused.text), None))

    def _on_settled(self, settled: emp.Settled) -> None:
        lane = self.lanes.get((settled.destination, settled.priority))
        if lane is None:
            return
        if settled.members:
            for first, count, members in settled.members:
                self.events.append(Members(lane, first, count, members))
        cumulative = settled.cumulative
        if cumulative < lane.floor or cumulative >= lane.next:
            return
        batches = lane.batches
        if settled.exceptions:
            self._except(lane, settled)
        woken: list[Any] = []
        while batches:
            batch = batches[0]
            if not batch.sent or batch.first > cumulative:
                break
            before = batch.settled
            if batch.last <= cumulative:
                batches.popleft()
                batch.settled = batch.last
                lane.messages -= batch.last - before
                lane.size -= batch.size
                batch.body = b""
                if batch.waiters:
                    woken.extend(waiter for _, waiter in batch.waiters)
                    batch.waiters = None
            else:
                batch.settled = cumulative
                lane.messages -= cumulative - before
                if batch.waiters:
                    woken.extend(waiter for number, waiter in batch.waiters if number <= cumulative)
                    batch.waiters = [waiting for waiting in batch.waiters if waiting[0] > cumulative]
                break
        lane.floor = batches[0].settled + 1 if batches else cumulative + 1
        if woken:
            self.events.append(Woken(woken))
        if lane.waiters:
            self.events.append(Room(lane))

    def _except(self, lane: OutLane, settled: emp.Settled) -> None:
        exceptions = iter(sorted(settled.exceptions, key=lambda exception: exception[0]))
        pending = next(exceptions, None)
        for batch in lane.batches:
            while pending is not None and pending[0] <= batch.last:
                number, reason, member = pending
                if number > batch.settled:
                    if batch.refusals is None:
                        batch.refusals = {}
                    batch.refusals.setdefault(number, []).append((reason, member))
                pending = next(exceptions, None)
            if pending is None:
                break

    def _on_deliver(self, header: emp.Deliver, body: bytes, now: float) -> None:
        last = header.first + header.count - 1
        if not header.first <= header.from_ <= last or header.floor > header.from_:
            self.events.append(
                Complaint(
                    emp.BAD_HEADER,
                    f"DELIVER/1: first {header.first} from {header.from_} last {last} floor {header.floor}",
                )
            )
            return
        lane = self._book(header)
        if lane is None:
            return
        lane.used = True
        from_ = header.from_
        if header.floor > lane.floor:
            lane.floor = header.floor
            if lane.failed:
                lane.failed = {number: why for number, why in lane.failed.items() if number >= header.floor}
            if lane.done < header.floor - 1:
                # The broker settled these itself (expired, gone); an outcome of ours is not asked any more.
                self._set_done(lane, header.floor - 1)
        if from_ > lane.highest + 1:
            self._book_void(lane, header)
        if header.session == self.session:
            if lane.session != header.session or lane.number != header.lane:
                lane.session = header.session
                lane.number = header.lane
                lane.acked = from_ - 1
                lane.session_high = last
            elif last > lane.session_high:
                lane.session_high = last
            if from_ - 1 < lane.acked:
                lane.acked = from_ - 1  # asked again: answer again, with the exceptions
        new = max(from_, lane.highest + 1)
        if from_ <= lane.highest:
            self.duplicates += min(last, lane.highest) - from_ + 1
            for number in range(from_, min(last + 1, lane.base)):
                lane.failed.setdefault(number, emp.OVERTAKEN)  # rule 15: unknown, and later ones were handled
            self._mark(lane)
        if new > last:
            return
        try:
            messages = decode_batch(body)
            if len(messages) != header.count:
                raise MalformedMessage(f"expected {header.count} messages, got {len(messages)}")
        except MalformedMessage as fault:
            lane.highest = last
            for number in range(new, last + 1):
                self.finish(lane, number, emp.INVALID)
            self.events.append(Complaint(emp.INVALID, f"from {header.sender}: {fault}"))
            return
        lane.highest = last
        if new > header.first:
            del messages[: new - header.first]
        if header.flags & emp.REPLY:
            self._on_replies(lane, new, messages, header)
        elif header.retain_key is not None and not self._is_newer(header):
            for number in range(new, last + 1):
                self.finish(lane, number)
        else:
            self.events.append(Arrival(lane, new, messages, header, now))

    def _book(self, header: emp.Deliver) -> InLane | None:
        """The lane's book; None when the batch is refused as a whole."""
        # By sender too: that the broker vouches for, and an incarnation is known to whoever got a message of it.
        key = (header.sender, header.incarnation, header.destination, header.priority)
        lane = self._in.get(key)
        if lane is None:
            lane = InLane(header)
            if header.priority != REPLY and not header.flags & emp.FROM_STORE:
                known = self._generations.get(header.sender, 0)
                if header.generation < known:
                    # A zombie got in at a new broker (rule 20): its book is not kept.
                    lane.session, lane.number = header.session, header.lane
                    lane.acked = lane.base - 1
                    lane.highest = lane.session_high = lane.done = header.first + header.count - 1
                    lane.failed = dict.fromkeys(range(header.from_, lane.highest + 1), emp.FENCED_REASON)
                    lane.acked = header.from_ - 1
                    if header.session == self.session:
                        self._mark(lane)
                    return None
                if header.generation > known:
                    self._generations.pop(header.sender, None)
                    if len(self._generations) >= MAX_IN_LANES:
                        self._generations.pop(next(iter(self._generations)))
                    self._generations[header.sender] = header.generation
                    self._forget_older(header.sender, header.incarnation)
            if len(self._in) >= MAX_IN_LANES:
                self._forget_oldest()
            self._in[key] = lane
        return lane

    def _book_void(self, lane: InLane, header: emp.Deliver) -> None:
        """Numbers in [highest + 1, from) were not for us: the reason in `void`, else delivered (rule 15)."""
        start, end = lane.highest + 1, header.from_
        for number, reason in header.void:
            if start <= number < end:
                lane.failed[number] = reason
        if lane.done == lane.highest:
            lane.done = end - 1
        elif end - start <= MAX_BOOK:
            lane.late.update(range(start, end))
        lane.highest = end - 1

    def _set_done(self, lane: InLane, done: int) -> None:
        lane.done = done
        lane.highest = max(lane.highest, done)
        if lane.late:
            lane.late = {number for number in lane.late if number > done}
            while lane.done + 1 in lane.late:
                lane.done += 1
                lane.late.discard(lane.done)

    def _on_replies(self, lane: InLane, first: int, messages: list[Message], header: emp.Deliver) -> None:
        for number, message in enumerate(messages, first):
            waiter = None
            if header.requester == self.incarnation:
                waiter, of = self._waiters.get(message.parent_id, (None, ""))
                if of and of != header.sender:
                    waiter = None
            if waiter is None:
                self.late_replies += 1
            else:
                self.events.append(Replied(waiter, message, header.sender))
            self.finish(lane, number)

    def _is_newer(self, header: emp.Deliver) -> bool:
        """Whether a retained message is newer than the one we have of its key (rule 35)."""
        if header.retain_key is None or header.retain_version is None:
            return True
        key = (header.sender, header.destination, header.retain_key)
        known = self._versions.get(key)
        if known is not None and header.retain_version <= known:
            return False
        if known is None and len(self._versions) >= MAX_RETAINED_VERSIONS:
            self._versions.pop(next(iter(self._versions)))
        self._versions[key] = header.retain_version
        return True

    def _forget_older(self, sender: str, incarnation: bytes) -> None:
        for key, lane in list(self._in.items()):
            if (
                lane.sender == sender
                and lane.incarnation != incarnation
                and lane.done == lane.highest
                and lane.priority != REPLY
                and not lane.dirty
            ):
                del self._in[key]

    def _forget_oldest(self) -> None:
        """Make room for a book: the oldest goes that was not used since the last look and has nothing open."""
        for _ in range(2 * len(self._in)):
            key = next(iter(self._in))
            lane = self._in.pop(key)
            if not lane.used and lane.done == lane.highest and not lane.dirty:
                return
            lane.used = False
            self._in[key] = lane

    def finish(self, lane: InLane, number: int, reason: str | None = None) -> None:
        """Message `number` has its outcome: handled, or refused with `reason`. Idempotent."""
        if number <= lane.done or number in lane.late:
            return
        if reason is not None:
            lane.failed[number] = reason[: emp.MAX_REASON_CHARS]
        if number == lane.done + 1:
            lane.done = number
            late = lane.late
            while late and lane.done + 1 in late:
                lane.done += 1
                late.discard(lane.done)
            if not lane.dirty:
                lane.dirty = True
                (self.dirty_lanes if lane.priority > LAZY_PRIORITY or lane.failed else self._lazy).append(lane)
        else:
            lane.late.add(number)

    def _mark(self, lane: InLane) -> None:
        if not lane.dirty:
            lane.dirty = True
            self.dirty_lanes.append(lane)

    @property
    def has_acks(self) -> bool:
        return bool(self.dirty_lanes)

    @property
    def has_lazy_acks(self) -> bool:
        """ACKs of requests and replies, for which nobody waits: they go with the next ones, or after `flush_lazy`."""
        return bool(self._lazy)

    def flush_lazy(self) -> None:
        """The next `flush` sends the lazy ACKs too."""
        self.dirty_lanes.extend(self._lazy)
        self._lazy.clear()

    def _acknowledge(self) -> None:
        """One ACK for all lanes on which something was finished. Only what this session delivered (rule 7)."""
        dirty, self.dirty_lanes = self.dirty_lanes + self._lazy, []
        self._lazy = []
        entries: list[tuple[int, int, list[tuple[int, str]]]] = []
        room = emp.MAX_EXCEPTIONS
        for lane in dirty:
            lane.dirty = False
            if lane.session != self.session:
                continue
            cumulative = min(lane.done, lane.session_high)
            if cumulative <= lane.acked:
                continue
            exceptions = []
            if lane.failed:
                exceptions = [
                    (number, why) for number, why in sorted(lane.failed.items()) if lane.acked < number <= cumulative
                ]
            if len(exceptions) > room:
                # The rest in the next ACK: this one ends before the first refusal that it does not tell.
                cumulative = exceptions[room][0] - 1
                exceptions = exceptions[:room]
                self._mark(lane)
                if cumulative <= lane.acked:
                    continue
            room -= len(exceptions)
            lane.acked = cumulative
            entries.append((lane.number, cumulative, exceptions))
        if entries:
            self.out.append(emp.encode(emp.ACK, emp.Ack(self.session, entries)))
