"""A module that does all of EMP/1 and nothing else, written from docs/emp.md: a pure core, and a process around it.

It echoes requests, uploads, asks, retains, is in a group. A *fault* breaks one rule and no other: with it, the puppet
shows that the conformance runner sees the breach. Others are freedoms that the page leaves; they break nothing.
`python -m tests.support.puppet FAULT…` runs it.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterable
from typing import Any

import msgpack

EXPECTS_REPLY, REPLY, RESENT, RETAIN, FROM_STORE = 1, 2, 4, 8, 32
LIVENESS = 3.0
UPLOAD_SECONDS = 0.1
ASK_SECONDS = 0.5
ASK_TIMEOUT = 1.0
DRAIN_SECONDS = 4.0
NARROW_FIELDS = {b"WELCOME/1": 6, b"PONG/1": 1, b"WHO/1": 1, b"SETTLED/1": 5, b"DELIVER/1": 17}


class OutLane:
    def __init__(self, destination: str, priority: int) -> None:
        self.destination = destination
        self.priority = priority
        self.next = 1
        self.open: list[list[Any]] = []  # [first, flags, requester, key, counter, message, sent]

    @property
    def floor(self) -> int:
        return int(self.open[0][0]) if self.open else self.next


class Book:
    def __init__(self, floor: int) -> None:
        self.base = floor
        self.high = self.done = floor - 1
        self.failed: dict[int, str] = {}
        self.session = -1
        self.lane = 0
        self.session_high = 0
        self.acked = 0


class Puppet:
    """The core. `out` collects frames; `status` is set when the process would exit."""

    def __init__(
        self, faults: Iterable[str] = (), incarnation: bytes = b"puppet's first..", name: str = "puppet"
    ) -> None:
        self.faults = frozenset(faults)
        self.name = name
        self.incarnation = incarnation if "same-incarnation" not in self.faults else b"always the same!"
        self.out: list[list[bytes]] = []
        self.status: int | None = None
        self.generation = 5 if "generation-first" in self.faults else 0
        self.session = -1
        self.epoch = b""
        self.state = "detached"
        self.heartbeat = 1.0
        self.limits = [12582912, 64, 2**20, 512, 262144]
        self.hello_at = 0.0
        self.taken_since: float | None = None
        self.nonce = 0
        self.pings = 0
        self.ping_at = 0.0
        self.pinged: tuple[int, float] | None = None
        self.fresh_at = float("-inf")
        self.lanes: dict[tuple[str, int], OutLane] = {}
        self.books: dict[Any, Book] = {}
        self.generations: dict[str, int] = {}
        self.versions: dict[Any, tuple[int, int]] = {}
        self.work: list[tuple[Book, int, Any, str, bytes, int]] = []
        self.upload_at = self.ask_at = 0.0
        self.asks: dict[str, float] = {}
        self.retained: list[Any] | None = None
        self.counter = 0
        self.draining_until: float | None = None
        self.serial = 0
        self.uploads = 0

    def bad(self, fault: str) -> bool:
        return fault in self.faults

    def say(self, verb: str, *fields: Any, body: bytes | None = None) -> None:
        self.out.append([verb.encode() + b"/1", msgpack.packb(list(fields)), *([] if body is None else [body])])

    def exit(self, status: int) -> None:
        if self.status is None:
            self.status = status
            self.state = "ended"

    # --- connection ---

    def connected(self, now: float) -> None:
        if self.bad("first-frame-ping"):
            self.say("PING", 1)
        if self.bad("no-reconnect") and self.epoch:
            self.state = "lost"
            return
        if self.bad("new-incarnation-on-reconnect") and self.epoch:
            self.incarnation = b"puppet's second."
        self.greet(now)

    def disconnected(self, now: float) -> None:
        self.state = "detached"
        self.pinged = None

    def greet(self, now: float) -> None:
        self.state = "greeting"
        self.pinged = None
        self.hello_at = now
        generation = 0 if self.bad("generation-forgotten") else self.generation
        self.say("HELLO", self.name, ["conform-g"], self.incarnation, generation, int(LIVENESS * 1000), "puppet")
        if self.bad("sends-in-greeting"):
            self.upload(now)
            self.send_lane(self.lane("@hub", 3))

    def expire(self, now: float) -> None:
        if self.status is not None:
            return
        again = 0.05 if self.bad("hello-flood") else 0.5
        if self.state == "greeting" and now - self.hello_at >= again and not self.bad("hello-once"):
            self.greet(now)
        if self.state == "attached":
            late = self.pinged is not None and now - self.pinged[1] > LIVENESS
            if late and not self.bad("pong-not-missed"):
                self.greet(now)
            elif now >= self.ping_at and (self.pinged is None or self.bad("ping-anyhow")):
                self.ping(now)
        for id, deadline in list(self.asks.items()):
            if now >= deadline:
                del self.asks[id]
        if self.draining_until is not None:
            if now >= self.draining_until and not self.bad("drain-for-ever"):
                self.leave()
        else:
            if now >= self.upload_at and not (self.bad("sends-stop") and self.uploads):
                self.upload_at = now + UPLOAD_SECONDS
                self.upload(now)
            if now >= self.ask_at and not (self.bad("sends-stop") and self.uploads):
                self.ask_at = now + ASK_SECONDS
                self.ask(now)
        self.look(now)

    def deadline(self) -> float:
        due = [self.upload_at, self.ask_at] if self.draining_until is None else [self.draining_until]
        if self.bad("drain-for-ever") and self.draining_until is not None:
            due = [float("inf")]
        if self.state == "greeting" and not self.bad("hello-once"):
            due.append(self.hello_at + (0.05 if self.bad("hello-flood") else 0.5))
        if self.state == "attached":
            if self.pinged is None or self.bad("ping-anyhow"):
                due.append(self.ping_at)
            if self.pinged is not None:
                due.append(self.pinged[1] + LIVENESS + 0.001)
        return min(due)

    def ping(self, now: float) -> None:
        if not self.bad("nonce-again"):
            self.nonce += 1
        self.pings += 1
        # With a PING on its way already, it is that one's PONG that is missed.
        self.pinged = (self.nonce, now if self.pinged is None else self.pinged[1])
        self.ping_at = now + (5.0 if self.bad("ping-slow") else self.heartbeat)
        floors = (
            []
            if self.bad("floors-untold") or self.bad("floor-stuck")
            else [[lane.destination, lane.priority, lane.floor] for lane in self.lanes.values()]
        )
        counters = {"uploads": 1.5} if self.bad("float-counter") and self.pings == 2 else {"uploads": self.uploads}
        self.say("PING", self.nonce, counters, floors)

    def is_fresh(self, now: float) -> bool:
        return self.bad("not-fresh") or now - self.fresh_at <= LIVENESS

    def terminate(self, now: float) -> None:
        if self.bad("no-bye"):
            self.exit(-15)
            return
        self.draining_until = now + DRAIN_SECONDS
        if self.state == "attached" and not self.bad("bye-only"):
            self.say("DRAIN", 4000)
        if self.bad("drain-leaves") or self.bad("bye-only"):
            self.leave()
        self.look(now)

    def leave(self) -> None:
        if self.state == "attached":
            self.say("BYE", False)
        self.exit(0)

    # --- sending ---

    def lane(self, destination: str, priority: int) -> OutLane:
        return self.lanes.setdefault((destination, priority), OutLane(destination, priority))

    def message(self, operation: str, content: bytes, parent: str = "", kind: str = "json") -> list[Any]:
        self.serial += 1
        return [f"m-{self.serial}", parent, 0, False, "", self.name, "user", "r", operation, kind, content]

    def put(
        self,
        destination: str,
        priority: int,
        message: list[Any],
        flags: int = 0,
        *,
        requester: bytes | None = None,
        key: str | None = None,
        counter: int | None = None,
    ) -> bool:
        lane = self.lane(destination, priority)
        size = len(msgpack.packb(message))
        held = sum(len(msgpack.packb(each[5])) for each in lane.open)
        if priority and (lane.open or self.bad("empty-lane-closed")):
            if len(lane.open) >= self.limits[1] and not self.bad("window-ignored"):
                return False
            if held + size > self.limits[2] and not self.bad("window-bytes-ignored") and not self.bad("window-ignored"):
                return False
        if size > self.limits[0] and not self.bad("limit-ignored"):
            return False
        if self.bad("gap") and lane.next == 3:
            lane.next += 1
        lane.open.append([lane.next, flags, requester, key, counter, message, False])
        lane.next += 1
        if self.state == "attached":
            self.send(lane, lane.open[-1])
        return True

    def send(self, lane: OutLane, batch: list[Any]) -> None:
        first, flags, requester, key, counter, message, sent = batch
        batch[6] = True
        if sent:
            flags |= 0 if self.bad("resent-unmarked") else RESENT
            if self.bad("resent-changed"):
                message = [*message[:10], message[10] + b" "]
        floor = lane.next if self.bad("floor-too-high") else 1 if self.bad("floor-stuck") else lane.floor
        priority = lane.priority
        if self.bad("reply-to-group") and flags & REPLY:
            priority = 3
        messages = [message, message] if self.bad("body-longer") and lane.priority == 3 else [message]
        self.say(
            "SEND",
            lane.destination,
            priority,
            first,
            1,
            floor,
            flags,
            None,
            requester,
            key,
            counter,
            body=msgpack.packb(messages),
        )

    def send_lane(self, lane: OutLane) -> None:
        for batch in lane.open:
            self.send(lane, batch)

    def upload(self, now: float) -> None:
        if self.put("@hub", 3, self.message("upload", b'{"n":%d}' % self.uploads)):
            self.uploads += 1

    def ask(self, now: float) -> None:
        message = self.message("query", b"{}")
        if self.put("oracle", 1, message, EXPECTS_REPLY):
            self.asks[message[0]] = now + ASK_TIMEOUT
        self.counter += -1 if self.bad("counter-falls") and self.counter > 1 else 1
        state = self.message("state", b"{}")
        if self.put("@state", 2, state, RETAIN, key="key", counter=self.counter):
            self.retained = state

    # --- receiving ---

    def receive(self, frames: list[bytes], now: float) -> None:
        if self.status is not None:
            return
        try:
            verb, header = frames[0], msgpack.unpackb(frames[1])
            self.take(verb, header, frames, now)
        except Exception:
            if self.bad("dies-of-unknown"):
                self.exit(1)
        self.look(now)

    def take(self, verb: bytes, header: list[Any], frames: list[bytes], now: float) -> None:
        if self.bad("strict-header") and len(header) > NARROW_FIELDS.get(verb, 99):
            return
        if self.bad("all-fields") and len(header) < NARROW_FIELDS.get(verb, 0):
            return
        if self.bad("narrow") and b"\xdd" in frames[1][:1]:
            return
        if self.bad("small-frames") and sum(map(len, frames)) > 2**20:
            return
        if verb == b"WELCOME/1":
            self.welcome(*header[:4], header[5] if len(header) > 5 else None, now)
        elif verb == b"WHO/1":
            if (self.state == "attached" or self.bad("who-while-greeting")) and not self.bad("who-ignored"):
                if self.bad("new-incarnation-on-who"):
                    self.incarnation = b"puppet's second."
                self.greet(now)
        elif verb == b"PONG/1":
            if self.pinged is not None and (header[0] == self.pinged[0] or self.bad("any-pong")):
                self.fresh_at, self.pinged = self.pinged[1], None
                if self.bad("stale-pong"):
                    self.fresh_at = now
        elif verb == b"SETTLED/1":
            self.settled(header)
        elif verb == b"FENCED/1":
            if (header[0] >= self.generation or self.bad("fenced-lower-exits")) and not self.bad("fenced-ignored"):
                self.exit(3)
        elif verb == b"REFUSED/1":
            self.refused(header[0], now)
        elif verb == b"DELIVER/1":
            self.deliver(header, frames[2], now)
        elif self.bad("dies-of-unknown"):
            self.exit(1)

    def welcome(
        self, epoch: bytes, session: int, generation: int, heartbeat_ms: int, limits: list[int] | None, now: float
    ) -> None:
        if epoch == self.epoch and session <= self.session and not self.bad("old-welcome-taken"):
            return
        if self.state == "attached" and self.bad("new-welcome-ignored"):
            return
        anew = bool(self.epoch) and epoch != self.epoch
        self.epoch, self.session, self.generation = epoch, session, generation
        self.heartbeat = heartbeat_ms / 1000
        if not self.bad("ping-only-heartbeat"):
            self.heartbeat = min(self.heartbeat, LIVENESS / 3)
        self.limits = limits or [12582912, 4096, 8388608, 512, 262144]
        self.taken_since = None
        self.state = "attached"
        for lane in self.lanes.values():
            if self.bad("replies-not-resent") and not lane.priority:
                continue
            for place, batch in enumerate(list(lane.open)):
                if self.bad("resend-skips") and not place and batch[6] and len(lane.open) > 1:
                    continue
                self.send(lane, batch)
        if anew and self.retained is not None and not self.bad("retain-once"):
            self.put("@state", 2, self.retained, RETAIN, key="key", counter=self.counter)
        if self.draining_until is not None and not self.bad("drain-once"):
            self.say("DRAIN", 4000)
        self.pinged = None
        if self.bad("ping-late"):
            self.ping_at = now + heartbeat_ms / 1000
        else:
            self.ping(now)

    def settled(self, header: list[Any]) -> None:
        lane = self.lanes.get((header[0], header[1]))
        cumulative = header[2]
        if lane is None:
            return
        if cumulative >= lane.next and not self.bad("settled-believed"):
            return
        if len(header) > 3 and header[3] and self.bad("exceptions-stop"):
            self.exit(1)
        while lane.open and lane.open[0][0] <= cumulative:
            lane.open.pop(0)

    def refused(self, code: str, now: float) -> None:
        if self.state != "greeting":
            return
        if code == "name-taken":
            self.taken_since = self.taken_since if self.taken_since is not None else now
            over = now - self.taken_since > LIVENESS and not self.bad("name-taken-for-ever")
            if over or self.bad("name-taken-exits"):
                self.exit(2)
        elif (code in ("denied", "version", "too-many") or self.bad("bad-header-exits")) and not self.bad(
            f"{code}-ignored"
        ):
            self.exit(2)

    def deliver(self, header: list[Any], body: bytes, now: float) -> None:
        header = header + [[], 0, None, None, None, None][len(header) - 11 :] if len(header) < 17 else header
        session, lane, sender, incarnation, generation, to, priority, first, count, from_, floor = header[:11]
        void, flags, _, requester, key, version = header[11:17]
        last = first + count - 1
        if (not first <= from_ <= last or floor > from_) and not self.bad("senseless-handled"):
            return
        if self.bad("group-unacked") and to.startswith("@"):
            return
        place = incarnation if self.bad("lanes-by-sender") else (incarnation, to, priority)
        book = self.books.get(place)
        if book is None:
            book = Book(1 if self.bad("floor-ignored") else floor)
            known = self.generations.get(sender, 0)
            exempt = flags & (REPLY | FROM_STORE) and not (self.bad("store-fenced") and flags & FROM_STORE)
            if generation < known and not exempt and not self.bad("fenced-sender-handled"):
                book.done = book.high = last
                book.failed = dict.fromkeys(range(from_, last + 1), "fenced")
            else:
                self.generations[sender] = max(known, generation)
                self.books[place] = book
        if floor > book.done + 1 and not self.bad("floor-ignored"):
            book.done = max(book.done, floor - 1)
            book.high = max(book.high, book.done)
        if from_ > book.high + 1 and not self.bad("floor-ignored"):
            if not self.bad("void-ignored"):
                book.failed |= {number: why for number, why in void if book.high < number < from_}
            if book.done == book.high:
                book.done = from_ - 1
            book.high = from_ - 1
        if session == self.session or self.bad("old-session-acked"):
            if book.session != session:
                book.session, book.session_high = session, last
                if not self.bad("old-lane-number") or not book.lane:
                    book.lane = lane
            book.session_high = max(book.session_high, last)
        start = from_ if not self.bad("from-ignored") else first
        for number in range(start, min(last + 1, book.base)):
            if not self.bad("overtaken-handled"):
                book.failed[number] = "overtaken"
            else:
                self.work.append((book, number, msgpack.unpackb(body)[number - first], sender, incarnation, flags))
        try:
            messages = msgpack.unpackb(body)
            assert isinstance(messages, list)
            assert len(messages) == count
            assert all(isinstance(each, list) for each in messages)
        except Exception:
            messages = [None] * count
        news = max(start, book.high + 1)
        if self.bad("duplicates-handled"):
            news = start
        if self.bad("from-ignored"):
            news = first
        is_old = False
        if key is not None:
            place = (sender, to, key)
            is_old = tuple(version) <= self.versions.get(place, (-1, -1)) and not self.bad("versions-ignored")
            self.versions[place] = max(tuple(version), self.versions.get(place, (-1, -1)))
        for number in range(news, last + 1):
            content = messages[number - first]
            if flags & REPLY:
                late = content[1] not in self.asks or requester != self.incarnation
                self.asks.pop(content[1], None)
                if late and self.bad("late-replies-refused"):
                    book.failed[number] = "gone"
                book.done = book.high = max(book.high, number)
            elif is_old:
                book.done = book.high = number
            else:
                self.work.append((book, number, content, sender, incarnation, flags))
                book.high = max(book.high, number)
        if self.bad("batch-first-only"):
            del self.work[1:]
        if not (self.bad("duplicates-unanswered") and last <= book.done):
            self.acknowledge(book, from_)

    def look(self, now: float) -> None:
        """Handle what may be handled."""
        if self.status is not None:
            return
        busy = self.bad("busy-asking") and self.asks
        while self.work and self.is_fresh(now) and not busy:
            self.handle(*self.work.pop(0))
        if self.draining_until is not None and not any(lane.open for lane in self.lanes.values()):
            self.leave()

    def handle(self, book: Book, number: int, message: Any, sender: str, incarnation: bytes, flags: int) -> None:
        if self.bad("no-outcome") and not flags & EXPECTS_REPLY:
            return
        if self.bad("ack-first"):
            self.finish(book, number)
        if message is None:
            if not (self.bad("failures-forgotten") and number in book.failed):
                book.failed[number] = "invalid" if not self.bad("reasons-own") else "failed"
        elif flags & EXPECTS_REPLY:
            content = message[10]
            if self.bad("content-ascii"):
                content = bytes(each if each < 128 else 63 for each in content)
            reply = self.message("response", content, message[0], message[9])
            to = incarnation if not self.bad("reply-to-nobody") else b"no such process."
            self.put(sender, 0, reply, REPLY, requester=to)
            if self.bad("replies-twice"):
                self.put(sender, 0, self.message("response", content, message[0], message[9]), REPLY, requester=to)
        self.finish(book, number)

    def finish(self, book: Book, number: int) -> None:
        if self.bad("floor-ignored"):
            book.done = number if number == book.done + 1 else book.done
        else:
            book.done = max(book.done, number)
        self.acknowledge(book, number)

    def acknowledge(self, book: Book, from_: int) -> None:
        done = min(book.done, book.session_high)
        session = self.session if not self.bad("old-session-acked") else book.session
        if self.bad("ack-beyond"):
            done += 1
        if book.session == session and self.state == "attached" and done >= from_:
            least = from_ if not self.bad("void-told") else 0
            refused = [[number, why] for number, why in sorted(book.failed.items()) if least <= number <= done]
            if self.bad("failures-forgotten"):
                for number, _ in refused:
                    book.failed.pop(number, None)
            self.say("ACK", session, [[book.lane, done, refused]])


def main() -> int:
    """The process: one DEALER, as section 2 of the page wants it."""
    import os
    import time

    import zmq
    from zmq.utils.monitor import parse_monitor_message

    puppet = Puppet(sys.argv[1:], os.urandom(16))
    signal.signal(signal.SIGTERM, lambda *_: puppet.terminate(time.monotonic()))
    context: zmq.Context[Any] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    for option, value in (
        (zmq.IMMEDIATE, 1),
        (zmq.LINGER, 1000),
        (zmq.SNDHWM, 0),
        (zmq.RCVHWM, 0),
        (zmq.RECONNECT_IVL, 20),
        (zmq.RECONNECT_IVL_MAX, 500),
    ):
        socket.setsockopt(option, value)
    monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
    socket.connect(os.environ["EDGEZMQ_BUS"])
    poller = zmq.Poller()
    poller.register(socket, zmq.POLLIN)
    poller.register(monitor, zmq.POLLIN)
    while puppet.status is None:
        wait = max(0.0, min(0.1, puppet.deadline() - time.monotonic()))
        ready = dict(poller.poll(int(wait * 1000) + 1))
        if monitor in ready:
            event = parse_monitor_message(monitor.recv_multipart())["event"]
            (puppet.connected if event == zmq.EVENT_HANDSHAKE_SUCCEEDED else puppet.disconnected)(time.monotonic())
        while socket.poll(0):
            puppet.receive(socket.recv_multipart(), time.monotonic())
        puppet.expire(time.monotonic())
        while puppet.out:
            try:
                socket.send_multipart(puppet.out.pop(0), zmq.NOBLOCK)
            except zmq.Again:
                puppet.disconnected(time.monotonic())
                puppet.out.clear()
    socket.disable_monitor()
    monitor.close(linger=0)
    socket.close()
    context.term()
    return puppet.status


if __name__ == "__main__":
    sys.exit(main())
