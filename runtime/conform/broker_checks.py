"""What docs/emp.md demands of a broker, check by check. Each script begins with modules of its own."""

from __future__ import annotations

from typing import Final

from runtime import emp
from runtime.conform import wire
from runtime.conform.broker_stage import LIVENESS_MS, BrokerStage, Peer, note_message
from runtime.conform.module_stage import message
from runtime.conform.play import Catalogue, Check, NotApplicable, Scene, Script, expect

CHECKS: Final = Catalogue()
check = CHECKS.enter

UNKNOWN_FLAG: Final = 1 << 20
MAX_WINDOW: Final = 20_000
"A broker with larger windows is not asked to overflow."
MAX_DEATHS: Final = 10


def notes(first: int, last: int) -> list[list[object]]:
    return [note_message(f"n-{number}") for number in range(first, last + 1)]


# --- attaching --------------------------------------------------------------------------------------------


@check("welcome", "5 WELCOME, 15", "HELLO gets WELCOME: epoch, session, a generation, heartbeat, limits")
def welcome(stage: BrokerStage) -> Script:
    first = stage.peer("one")
    told = yield from first.welcomed()
    second = stage.peer("two")
    other = yield from second.welcomed()
    expect(told.epoch == other.epoch, "two epochs in one broker")
    expect(told.session != other.session, "two attachments have the same session")


@check("hello-again", "9, 15", "HELLO again gets a higher session, and the same generation")
def hello_again(stage: BrokerStage) -> Script:
    peer = stage.peer("one")
    first = yield from peer.welcomed()
    second = yield from peer.welcomed()
    expect(second.session > first.session, f"session {second.session} after {first.session}")
    expect(second.generation == first.generation, "the generation changes")
    moved = stage.again(peer)
    third = yield from moved.welcomed()
    expect(third.session > second.session, f"session {third.session} after {second.session}")
    expect(third.generation == first.generation, "the generation changes with the connection")


@check("pong", "5 PONG", "PING gets PONG with its nonce")
def pong(stage: BrokerStage) -> Script:
    peer = yield from stage.attach("one")
    for nonce in (7, 0, 2**63 - 1):
        mark = stage.mark
        peer.say(emp.PING, nonce)
        seen = yield from stage.answer(mark, f"no PONG for nonce {nonce}", "PONG/1", end=peer.end)
        expect(seen.header.nonce == nonce, f"nonce {seen.header.nonce} for {nonce}")


@check("stranger", "15, 17 rule 8, 17 rule 10", "a connection that has not said HELLO gets WHO, once until it does")
def stranger(stage: BrokerStage) -> Script:
    peer = stage.peer("one")
    mark = stage.mark
    for nonce in range(4):
        peer.say(emp.PING, nonce)
    peer.send(stage.name("nobody"), note_message("n-1"))
    yield from stage.answer(mark, "no WHO", "WHO/1", end=peer.end)
    yield from stage.pause(stage.settings.quiet)
    told = stage.since(mark, end=peer.end)
    expect([seen.verb for seen in told] == ["WHO/1"], f"it is told {[seen.verb for seen in told]}")
    yield from peer.welcomed()
    peer.say(emp.PING, 9)
    yield from stage.answer(mark, "no PONG after HELLO", "PONG/1", end=peer.end)


@check("bad-header", "4, 8 Of frames", "a frame that is none of EMP/1 gets REFUSED `bad-header`; the connection stays")
def bad_header(stage: BrokerStage) -> Script:
    peer = stage.peer("one")
    good = [peer.name, [], peer.incarnation, 0, LIVENESS_MS, "conform"]
    wrong = {
        "a name that begins with a mark": [emp.HELLO, wire.packed("-x", *good[1:])],
        "an incarnation as str": [emp.HELLO, wire.packed(good[0], [], "i" * 16, *good[3:])],
        "a short incarnation": [emp.HELLO, wire.packed(good[0], [], b"i" * 15, *good[3:])],
        "a float": [emp.HELLO, wire.packed(*good[:4], 15000.0, "conform")],
        "a generation above 2^62": [emp.HELLO, wire.packed(*good[:3], 2**62 + 1, *good[4:])],
        "65 groups": [emp.HELLO, wire.packed(good[0], [f"g{n}" for n in range(65)], *good[2:])],
        "too few fields": [emp.HELLO, wire.packed(*good[:5])],
        "a map": [emp.HELLO, b"\x80"],
        "no MessagePack": [emp.HELLO, b"\xc1"],
        "a body where none is": [emp.HELLO, wire.packed(*good), b""],
        "no header": [emp.HELLO],
    }
    for what, frames in wrong.items():
        yield from refused(stage, peer, "bad-header", what, *frames)
    yield from peer.welcomed()
    yield from refused(stage, peer, "bad-header", "SEND without body", emp.SEND, wire.packed("x", 3, 1, 1, 1))
    sends = {
        "number 0": ["x", 3, 0, 1, 1],
        "no message": ["x", 3, 1, 0, 1],
        "1025 messages": ["x", 3, 1, 1025, 1],
        "priority 4": ["x", 4, 1, 1, 1],
        "a destination that is none": ["@", 3, 1, 1, 1],
    }
    for what, fields in sends.items():
        yield from refused(stage, peer, "bad-header", what, emp.SEND, wire.packed(*fields), b"\x90")
    counters = {f"counter-{number}": "x" for number in range(3)}
    yield from refused(stage, peer, "bad-header", "counters that are none", emp.PING, wire.packed(1, counters))
    large = [emp.PING, wire.packed(1, {"x" * 270_000: 1})]
    yield from refused(stage, peer, "bad-header", "a header of more than 262144 bytes", *large)
    mark = stage.mark
    peer.say(emp.PING, 5)
    yield from stage.answer(mark, "no PONG after frames that were refused", "PONG/1", end=peer.end)


@check(
    "send-flags", "5 SEND", "REPLY without requester or off priority 0, and RETAIN without what it needs, are refused"
)
def send_flags(stage: BrokerStage) -> Script:
    peer = yield from stage.attach("one")
    wrong = {
        "priority 0 without REPLY": ["x", 0, 1, 1, 1, 0],
        "REPLY at priority 3": ["x", 3, 1, 1, 1, emp.REPLY, None, peer.incarnation],
        "REPLY without requester": ["x", 0, 1, 1, 1, emp.REPLY],
        "RETAIN without key": ["@x", 2, 1, 1, 1, emp.RETAIN],
        "RETAIN to a module": ["x", 2, 1, 1, 1, emp.RETAIN, None, None, "key", 1],
    }
    for what, fields in wrong.items():
        yield from refused(stage, peer, "bad-header", what, emp.SEND, wire.packed(*fields), b"\x91\x90")


@check("unknown-verb", "1 version, 8 Of frames", "other verbs get `unknown-verb`, those of other versions `version`")
def unknown_verb(stage: BrokerStage) -> Script:
    for peer in (stage.peer("one"), (yield from stage.attach("two"))):
        for verb, code in (
            (b"PUSH/1", "unknown-verb"),
            (b"", "unknown-verb"),
            (b"SEND/2", "version"),
            (b"HELLO/9", "version"),
            (emp.WELCOME, "unknown-verb"),
            (emp.DELIVER, "unknown-verb"),
        ):
            body = [b"\x90"] if verb in (emp.DELIVER,) else []
            header = wire.packed(b"e" * 8, 1, 1, 1, False)
            if verb == emp.DELIVER:
                header = wire.packed(1, 1, "x", b"i" * 16, 1, "y", 3, 1, 1, 1, 1)
            yield from refused(stage, peer, code, repr(verb), verb, header, *body)


def refused(stage: BrokerStage, peer: Peer, code: str, what: str, *frames: bytes) -> Scene[None]:
    """Say these frames; the answer must be REFUSED with that code."""
    mark = stage.mark
    stage.tell(peer.end, *frames)
    seen = yield from stage.answer(mark, f"no REFUSED for {what}", "REFUSED/1", end=peer.end)
    expect(seen.header.code == code, f"`{seen.header.code}` for {what}")


@check("trailing-fields", "1 version, 4", "further fields and unknown flags are ignored; any width is taken")
def trailing_fields(stage: BrokerStage) -> Script:
    sender = stage.peer("one")
    yield from sender.welcomed(more=("later", {"more": 1}))
    receiver = stage.peer("two")
    fields = [receiver.name, [], receiver.incarnation, 0, LIVENESS_MS, "conform"]
    stage.tell(receiver.end, emp.HELLO, wire.packed_wide(fields))
    seen = yield from stage.answer(0, "no WELCOME for a HELLO in wide encoding", "WELCOME/1", end=receiver.end)
    receiver.session, receiver.is_attached = seen.header.session, True
    more = (None, None, None, None, "later", [1])
    body = sender.send(receiver.name, note_message("n-1"), flags=UNKNOWN_FLAG, more=more)
    delivered = yield from receiver.gets()
    expect(delivered.frames[2] == body, "the body is another one")
    receiver.say(emp.ACK, receiver.session, [[delivered.header.lane, 1, []]], "later")
    yield from sender.is_told(receiver.name, 1)
    mark = stage.mark
    sender.say(emp.PING, 3, {"counter": 1}, [], "later")
    yield from stage.answer(mark, "no PONG for a PING with further fields", "PONG/1", end=sender.end)


# --- names ------------------------------------------------------------------------------------------------


@check("name-taken", "15, 17 rule 23", "another process with generation 0 does not get the name of a living one")
def name_taken(stage: BrokerStage) -> Script:
    holder = yield from stage.attach("one")
    second = stage.peer("one")
    mark = stage.mark
    second.hello()
    seen = yield from stage.answer(mark, "no REFUSED", "REFUSED/1", end=second.end)
    expect(seen.header.code == "name-taken", f"`{seen.header.code}`")
    holder.say(emp.PING, 1)
    yield from stage.answer(mark, "the holder is served no more", "PONG/1", end=holder.end)


@check("fenced", "15, 17 rule 22", "the higher generation has the name; the lower one is FENCED")
def fenced(stage: BrokerStage) -> Script:
    first = yield from stage.attach("one")
    second = stage.peer("one")
    mark = stage.mark
    yield from second.welcomed(generation=first.generation + 5)
    expect(second.generation == first.generation + 5, f"generation {second.generation}")
    seen = yield from stage.answer(mark, "the older one is not FENCED", "FENCED/1", end=first.end)
    expect(seen.header.generation == second.generation, f"FENCED says {seen.header.generation}")
    first.is_attached = False
    for generation in (first.generation, second.generation):
        third = stage.peer("one")
        mark = stage.mark
        third.hello(generation=generation)
        yield from stage.answer(mark, f"generation {generation} is not FENCED", "FENCED/1", end=third.end)


@check(
    "silent",
    "15, 17 rule 23",
    "over a holder that was silent for its liveness time generation 0 wins, with a higher one",
)
def silent(stage: BrokerStage) -> Script:
    first = yield from stage.attach("one", liveness_ms=200)
    second = stage.peer("one")
    yield from stage.pause(0.6)
    mark = stage.mark
    yield from second.welcomed()
    expect(second.generation > first.generation, f"generation {second.generation} after {first.generation}")
    first.is_attached = False
    # Its connection may be bound to it no more: then WHO, and FENCED for the HELLO.
    first.say(emp.PING, 1)
    seen = yield from stage.answer(
        mark, "neither FENCED nor WHO for the silent one", "FENCED/1", "WHO/1", end=first.end
    )
    if seen.verb == "WHO/1":
        first.hello()
        yield from stage.answer(mark, "the silent one is not FENCED", "FENCED/1", end=first.end)


@check("late", "15, 17 rule 24", "a process that comes with a generation to a broker that never saw it is told `late`")
def late(stage: BrokerStage) -> Script:
    peer = stage.peer("one")
    told = yield from peer.welcomed(generation=2**60)
    expect(told.generation == 2**60, f"generation {told.generation}")
    expect(told.late, "`late` is false")
    other = yield from stage.attach("two")
    again = yield from other.welcomed()
    expect(not again.late, "`late` is true for one that was here all the time")


# --- messages ------------------------------------------------------------------------------------------------


@check("deliver", "5 DELIVER, 15", "a batch comes to its receiver byte for byte, with the sender vouched for")
def deliver(stage: BrokerStage) -> Script:
    sender = yield from stage.attach("one")
    receiver = yield from stage.attach("two")
    body = sender.send(receiver.name, *notes(1, 3), priority=2)
    seen = yield from receiver.gets()
    header: emp.Deliver = seen.header
    expect(seen.frames[2] == body, "the body is another one")
    expect(header.session == receiver.session, f"session {header.session}")
    expect((header.sender, header.incarnation) == (sender.name, sender.incarnation), "it names another sender")
    expect(header.generation == sender.generation, f"generation {header.generation}")
    expect((header.destination, header.priority) == (receiver.name, 2), "it names another lane")
    expect((header.first, header.count, header.from_) == (1, 3, 1), f"{header.first}, {header.count}, {header.from_}")
    expect(not header.flags, f"flags {header.flags}")
    yield from stage.never(lambda: sender.settled(receiver.name, 2), "it is settled before it was handled")
    receiver.ack(seen, upto=2)
    yield from sender.is_told(receiver.name, 2, priority=2)
    expect(not sender.refusals(receiver.name, 2), "delivered messages are refused")
    receiver.ack(seen)
    yield from sender.is_told(receiver.name, 3, priority=2)


@check("order", "1, 15", "the batches of a lane come in order; each priority is a lane of its own")
def order(stage: BrokerStage) -> Script:
    sender = yield from stage.attach("one")
    receiver = yield from stage.attach("two")
    for number in range(1, 21):
        sender.send(receiver.name, note_message(f"n-{number}"), first=number, floor=1)
    sender.send(receiver.name, note_message("s-1"), priority=2)
    yield from stage.until(lambda: len(receiver.delivered()) >= 21, "not all is delivered")
    data = [seen.header.first for seen in receiver.delivered(priority=3)]
    expect(data == list(range(1, 21)), f"the order is {data}")
    expect([seen.header.first for seen in receiver.delivered(priority=2)] == [1], "the signal's lane is not its own")


@check("refusals", "5 SETTLED, 17 rule 5", "the receiver's refusals reach the sender, with their numbers")
def refusals(stage: BrokerStage) -> Script:
    sender = yield from stage.attach("one")
    receiver = yield from stage.attach("two")
    sender.send(receiver.name, *notes(1, 3))
    seen = yield from receiver.gets()
    receiver.ack(seen, (2, "not-today"))
    yield from sender.is_told(receiver.name, 3)
    found = sender.refusals(receiver.name)
    expect(set(found) == {2}, f"refused are {sorted(found)}")
    expect({reason for reason, _ in found[2]} == {"not-today"}, f"the reasons are {found[2]}")


@check("unroutable", "8 Of messages, 13", "what goes to nobody is refused, and consumes its number")
def unroutable(stage: BrokerStage) -> Script:
    sender = yield from stage.attach("one")
    for nobody in (stage.name("nobody"), stage.group("nobody")):
        sender.send(nobody, note_message("n-1"))
        yield from sender.is_told(nobody, 1)
        sender.send(nobody, note_message("n-2"), first=2)
        yield from sender.is_told(nobody, 2)
        reasons = {reason for each in sender.refusals(nobody).values() for reason, _ in each}
        expect(reasons == {"unroutable"}, f"the reasons are {sorted(reasons)}")


@check("too-large", "7, 8 Of messages", "a message above the limit is refused as `too-large`; the lane goes on")
def too_large(stage: BrokerStage) -> Script:
    sender = yield from stage.attach("one")
    receiver = yield from stage.attach("two")
    limit = max(sender.limits.message_bytes, sender.limits.batch_bytes) + 17
    if limit > 32 * 2**20:
        raise NotApplicable(f"its limit is {limit} bytes")
    sender.send(receiver.name, body=b"\x91" + b"\xc6" + (limit - 6).to_bytes(4, "big") + bytes(limit - 6))
    yield from sender.is_told(receiver.name, 1)
    reasons = {reason for reason, _ in sender.refusals(receiver.name).get(1, set())}
    expect(reasons == {"too-large"}, f"the reasons are {sorted(reasons)}")
    sender.send(receiver.name, note_message("n-2"), first=2)
    seen = yield from receiver.gets()
    expect(seen.header.from_ == 2, f"number {seen.header.from_} is delivered")


@check("gap", "15, 17 rule 3", "a batch that leaves a gap is not taken: WHO")
def gap(stage: BrokerStage) -> Script:
    sender = yield from stage.attach("one")
    receiver = yield from stage.attach("two")
    sender.send(receiver.name, note_message("n-1"))
    yield from receiver.gets()
    mark = stage.mark
    sender.send(receiver.name, note_message("n-3"), first=3, floor=1)
    yield from stage.answer(mark, "no WHO for a gap", "WHO/1", end=sender.end)
    yield from stage.never(lambda: receiver.delivered(mark), "what came after a gap is delivered")
    yield from sender.welcomed()
    mark = stage.mark
    sender.send(receiver.name, note_message("n-5"), first=5, floor=2, priority=2)
    yield from stage.answer(mark, "no WHO for a gap in a lane that is new", "WHO/1", end=sender.end)


@check("overlap", "15, 17 rule 3", "what it has taken is not taken twice; of an overlap only the new part counts")
def overlap(stage: BrokerStage) -> Script:
    sender = yield from stage.attach("one")
    receiver = yield from stage.attach("two")
    sender.send(receiver.name, *notes(1, 2))
    sender.send(receiver.name, *notes(1, 2), flags=emp.RESENT)
    sender.send(receiver.name, *notes(1, 3), flags=emp.RESENT)
    yield from stage.until(lambda: len(receiver.delivered()) >= 2, "the new part is not delivered")
    yield from stage.pause(stage.settings.quiet)
    expect(receiver.numbers() == [(1, 2), (3, 3)], f"delivered are {receiver.numbers()}")


@check("ack-session", "5 ACK, 17 rule 6", "an ACK of another session is dropped")
def ack_session(stage: BrokerStage) -> Script:
    sender = yield from stage.attach("one")
    receiver = yield from stage.attach("two")
    sender.send(receiver.name, note_message("n-1"))
    seen = yield from receiver.gets()
    old = receiver.session
    yield from receiver.welcomed()
    again = yield from receiver.gets(stage.mark)
    receiver.ack(again, session=old)
    receiver.ack(seen)
    receiver.ack(again, session=receiver.session + 1)
    yield from stage.never(lambda: sender.settled(receiver.name), "an ACK of another session settles")
    receiver.ack(again)
    yield from sender.is_told(receiver.name, 1)


@check("ack-beyond", "5 ACK", "an ACK of what was not delivered is refused as `bad-header`")
def ack_beyond(stage: BrokerStage) -> Script:
    sender = yield from stage.attach("one")
    receiver = yield from stage.attach("two")
    sender.send(receiver.name, note_message("n-1"))
    seen = yield from receiver.gets()
    header = wire.packed(receiver.session, [[seen.header.lane, 2, []]])
    yield from refused(stage, receiver, "bad-header", "an ACK of number 2", emp.ACK, header)
    receiver.ack(seen)
    yield from sender.is_told(receiver.name, 1)


@check(
    "redelivered", "15, 17 rule 7", "what is not acknowledged comes again in the next session, REDELIVERED, in order"
)
def redelivered(stage: BrokerStage) -> Script:
    sender = yield from stage.attach("one")
    receiver = yield from stage.attach("two")
    sender.send(receiver.name, *notes(1, 3))
    sender.send(receiver.name, *notes(4, 5), first=4, floor=1)
    yield from stage.until(lambda: len(receiver.delivered()) >= 2, "not all is delivered")
    receiver.ack(receiver.delivered()[0], (1, "not-today"), upto=2)
    yield from sender.is_told(receiver.name, 2)
    moved = stage.again(receiver)
    yield from moved.welcomed()
    yield from stage.until(lambda: len(moved.delivered()) >= 2, "not all is delivered again")
    expect(moved.numbers() == [(3, 3), (4, 5)], f"delivered again are {moved.numbers()}")
    for seen in moved.delivered():
        expect(seen.header.flags & emp.REDELIVERED, f"number {seen.header.from_} comes again without REDELIVERED")
        expect(seen.header.session == moved.session, "it carries another session")
    void = [list(each) for each in moved.delivered()[0].header.void]
    expect(void == [[1, "not-today"]], f"void is {void}")
    for seen in moved.delivered():
        moved.ack(seen)
    yield from sender.is_told(receiver.name, 5)


@check("resent", "5 flags, 17 rule 13", "what its sender sent before is delivered as REDELIVERED")
def resent(stage: BrokerStage) -> Script:
    sender = yield from stage.attach("one")
    receiver = yield from stage.attach("two")
    sender.send(receiver.name, note_message("n-1"), flags=emp.RESENT)
    seen = yield from receiver.gets()
    expect(seen.header.flags & emp.REDELIVERED, "RESENT is not passed on")


@check(
    "settled-again",
    "15, 17 rule 11, 17 rule 12",
    "after WELCOME lanes are settled again, exceptions kept until a floor passes them",
)
def settled_again(stage: BrokerStage) -> Script:
    sender = yield from stage.attach("one")
    receiver = yield from stage.attach("two")
    sender.send(receiver.name, *notes(1, 2))
    seen = yield from receiver.gets()
    receiver.ack(seen, (1, "not-today"))
    yield from sender.is_told(receiver.name, 2)
    mark = stage.mark
    yield from sender.welcomed()
    yield from sender.is_told(receiver.name, 2, mark=mark)
    expect(1 in sender.refusals(receiver.name, mark=mark), "after WELCOME number 1 is delivered; it was refused")
    sender.say(emp.PING, 1, {}, [[receiver.name, 3, 3]])
    yield from stage.answer(mark, "no PONG", "PONG/1", end=sender.end)
    mark = stage.mark
    yield from sender.welcomed()
    yield from stage.pause(stage.settings.quiet)
    expect(not sender.refusals(receiver.name, mark=mark), "a floor has passed number 1, and it is told again")
    sender.send(receiver.name, note_message("n-3"), first=3)
    again = yield from receiver.gets(mark)
    expect(again.header.from_ == 3, f"number {again.header.from_} is delivered")


@check(
    "expired",
    "15 expiry, 17 rule 33",
    "what waits longer than its ttl is refused as `expired`, never what was delivered",
)
def expired(stage: BrokerStage) -> Script:
    sender = yield from stage.attach("one")
    receiver = yield from stage.attach("two")
    sender.send(receiver.name, note_message("n-1"), more=(200,))
    seen = yield from receiver.gets()
    expect(seen.header.ttl_ms is not None and seen.header.ttl_ms <= 200, f"ttl_ms {seen.header.ttl_ms}")
    yield from stage.never(lambda: sender.settled(receiver.name), "what was delivered expires", 0.6)
    receiver.ack(seen)
    yield from sender.is_told(receiver.name, 1)
    receiver.say(emp.DRAIN, 1000)
    sender.send(receiver.name, note_message("n-2"), first=2, more=(100,))
    yield from sender.is_told(receiver.name, 2)
    reasons = {reason for reason, _ in sender.refusals(receiver.name).get(2, set())}
    expect(reasons == {"expired"}, f"the reasons are {sorted(reasons)}")


# --- flow -------------------------------------------------------------------------------------------------------


@check("prefetch", "15 deliveries, 17 rule 29", "not more than the prefetch is in flight for each priority")
def prefetch(stage: BrokerStage) -> Script:
    sender = yield from stage.attach("one")
    receiver = yield from stage.attach("two", prefetch=(2, 8388608))
    for number in range(1, 6):
        sender.send(receiver.name, note_message(f"n-{number}"), first=number, floor=1)
    yield from stage.until(lambda: len(receiver.delivered()) >= 2, "the prefetch is not used")
    yield from stage.never(lambda: len(receiver.delivered()) > 2, "more than the prefetch is in flight")
    sender.send(receiver.name, note_message("s-1"), priority=2)
    yield from receiver.gets(priority=2, what="signal, behind data that is in flight")
    receiver.ack(receiver.delivered(priority=3)[1])
    yield from stage.until(lambda: len(receiver.delivered(priority=3)) >= 4, "an ACK makes no room")
    yield from stage.never(lambda: len(receiver.delivered(priority=3)) > 4, "more than the prefetch is in flight")


@check(
    "prefetch-large",
    "15 deliveries, 17 rule 29",
    "a batch larger than the prefetch goes when nothing else is in flight",
)
def prefetch_large(stage: BrokerStage) -> Script:
    sender = yield from stage.attach("one")
    receiver = yield from stage.attach("two", prefetch=(1, 1))
    sender.send(receiver.name, *notes(1, 5))
    seen = yield from receiver.gets()
    sender.send(receiver.name, note_message("n-6"), first=6, floor=1)
    yield from stage.never(lambda: len(receiver.delivered()) > 1, "more than the prefetch is in flight")
    receiver.ack(seen)
    yield from stage.until(lambda: len(receiver.delivered()) > 1, "an ACK makes no room")


@check("priorities", "3 priority, 15 deliveries", "of what waits, requests come before signals, and those before data")
def priorities(stage: BrokerStage) -> Script:
    sender = yield from stage.attach("one")
    receiver = yield from stage.attach("two")
    receiver.say(emp.DRAIN, 1000)
    for priority in (3, 2, 1):
        sender.send(receiver.name, note_message(f"p-{priority}"), priority=priority)
    yield from stage.never(lambda: receiver.delivered(), "DRAIN does not stop deliveries")
    yield from receiver.welcomed()
    yield from stage.until(lambda: len(receiver.delivered()) >= 3, "what waited is not delivered")
    found = [seen.header.priority for seen in receiver.delivered()]
    expect(found == [1, 2, 3], f"the order of priorities is {found}")


@check(
    "overflow", "15, 17 rule 30", "beyond two windows of one sender's name and destination: `overflow`", is_long=True
)
def overflow(stage: BrokerStage) -> Script:
    sender = yield from stage.attach("one")
    receiver = yield from stage.attach("two", prefetch=(1, 8388608))
    window = sender.limits.window_messages
    if window > MAX_WINDOW:
        raise NotApplicable(f"its window is {window} messages")
    size = min(512, sender.limits.batch_messages)
    sent = 0
    while sent < 2 * window + size:
        count = min(size, 2 * window + size - sent)
        messages = [[f"n-{number}"] for number in range(sent + 1, sent + count + 1)]
        sender.send(receiver.name, *messages, first=sent + 1, floor=1)
        sent += count
    mark = stage.mark
    sender.say(emp.PING, 1)
    yield from stage.answer(mark, "no PONG", "PONG/1", end=sender.end)  # all of it has been read
    # The lane settles in order: what was refused is told when the rest is handled.
    while not sender.refusals(receiver.name):
        mark = stage.mark
        for seen in receiver.delivered()[-1:]:
            receiver.ack(seen)
        yield from stage.until(
            lambda mark=mark: receiver.delivered(mark) or sender.refusals(receiver.name),  # type: ignore[misc]
            "neither delivered nor refused",
        )
    found = sender.refusals(receiver.name)
    reasons = {reason for each in found.values() for reason, _ in each}
    expect(reasons == {"overflow"}, f"the reasons are {sorted(reasons)}")
    expect(min(found) > window, f"number {min(found)} is refused, the window is {window}")


@check(
    "incarnations",
    "15 deliveries, 17 rule 19",
    "a newer process of a sender waits until the older one's messages are acknowledged",
)
def incarnations(stage: BrokerStage) -> Script:
    first = yield from stage.attach("one")
    receiver = yield from stage.attach("two")
    first.send(receiver.name, note_message("old-1"))
    old = yield from receiver.gets()
    second = stage.peer("one")
    yield from second.welcomed(generation=first.generation + 1)
    first.is_attached = False
    second.send(receiver.name, note_message("new-1"))
    mark = stage.mark
    yield from stage.never(lambda: receiver.delivered(mark), "the newer process's message does not wait")
    receiver.ack(old)
    new = yield from receiver.gets(mark)
    expect(new.header.incarnation == second.incarnation, "another incarnation's message comes")
    expect(new.header.generation == second.generation, f"generation {new.header.generation}")


@check(
    "poison",
    "15 poison, 17 rule 32",
    "a message that was there at too many deaths is delivered alone, then refused as `failed`",
    is_long=True,
)
def poison(stage: BrokerStage) -> Script:
    sender = yield from stage.attach("one")
    sender.send(stage.name("two"), note_message("n-0"))  # unroutable: two is not there yet
    yield from sender.is_told(stage.name("two"), 1)
    alone = False
    for death in range(1, MAX_DEATHS + 1):
        receiver = yield from stage.attach("two", liveness_ms=150)
        if death == 1:
            sender.send(receiver.name, *notes(2, 3), first=2)
        found = yield from stage.whether(
            lambda receiver=receiver: receiver.delivered() or sender.refusals(receiver.name).get(2),  # type: ignore[misc]
            stage.settings.soon,
        )
        expect(found, "it is neither delivered again nor refused")
        if sender.refusals(receiver.name).get(2):
            reasons = {reason for reason, _ in sender.refusals(receiver.name)[2]}
            expect(reasons == {"failed"}, f"the reasons are {sorted(reasons)}")
            expect(alone, "it was never delivered alone")
            return
        alone = alone or receiver.delivered()[0].header.count == 1
        # It dies: silent, and another one takes its name.
        yield from stage.pause(0.4)
        receiver.is_attached = False
    raise NotApplicable(f"after {MAX_DEATHS} deaths it is still delivered: its limit is another one")


# --- groups, requests -------------------------------------------------------------------------------------------


@check(
    "group",
    "13, 17 rule 26",
    "each member gets it; it is settled when all have, with an exception for each that failed",
)
def group(stage: BrokerStage) -> Script:
    sender = yield from stage.attach("one")
    first = yield from stage.attach("two", ["g"])
    second = yield from stage.attach("three", ["g"])
    to = stage.group("g")
    body = sender.send(to, *notes(1, 2))
    for member in (first, second):
        seen = yield from member.gets()
        expect(seen.frames[2] == body, "the body is another one")
        expect(seen.header.destination == to, f"destination {seen.header.destination}")
    first.ack(first.delivered()[0])
    yield from stage.never(lambda: sender.settled(to), "it is settled when one of two members has handled it")
    second.ack(second.delivered()[0], (2, "not-today"))
    yield from sender.is_told(to, 2)
    found = sender.refusals(to)
    expect(found == {2: {("not-today", second.name)}}, f"the refusals are {found}")


@check("group-lane", "3 lane, 17 rule 1", "a group's lane and a module's are two, though one receiver is behind both")
def group_lane(stage: BrokerStage) -> Script:
    sender = yield from stage.attach("one")
    receiver = yield from stage.attach("two", ["g"])
    sender.send(stage.group("g"), note_message("g-1"))
    sender.send(receiver.name, note_message("m-1"))
    yield from stage.until(lambda: len(receiver.delivered()) >= 2, "not both are delivered")
    lanes = {seen.header.lane for seen in receiver.delivered()}
    expect(len(lanes) == 2, "both carry the same lane number")


@check("request", "12, 17 rule 28", "request and reply find their way, the reply to the asker's incarnation")
def request(stage: BrokerStage) -> Script:
    asker = yield from stage.attach("one")
    responder = yield from stage.attach("two")
    asker.send(responder.name, message("q-1"), priority=1, flags=emp.EXPECTS_REPLY, more=(3000,))
    seen = yield from responder.gets()
    expect(seen.header.flags & emp.EXPECTS_REPLY, "EXPECTS_REPLY is lost")
    expect(0 < (seen.header.ttl_ms or 0) <= 3000, f"ttl_ms {seen.header.ttl_ms}")
    answer(responder, asker)
    responder.ack(seen)
    reply = yield from asker.gets()
    header: emp.Deliver = reply.header
    expect(header.flags & emp.REPLY, "the reply has not the flag REPLY")
    expect((header.priority, header.requester) == (0, asker.incarnation), "it is not addressed as it was")
    expect(header.sender == responder.name, f"sender {header.sender}")
    asker.ack(reply)
    yield from responder.is_told(asker.name, 1, priority=0)
    yield from asker.is_told(responder.name, 1, priority=1)


def answer(responder: Peer, asker: Peer, number: int = 1, *, incarnation: bytes | None = None) -> None:
    reply = message(f"a-{number}", parent=f"q-{number}", operation="response")
    more = (None, incarnation or asker.incarnation)
    responder.send(asker.name, reply, first=number, priority=0, flags=emp.REPLY, more=more)


@check("reply-gone", "12, 17 rule 28", "a reply to a process that is no more is settled as `gone`")
def reply_gone(stage: BrokerStage) -> Script:
    asker = yield from stage.attach("one")
    responder = yield from stage.attach("two")
    answer(responder, asker, incarnation=b"of another life.")
    yield from responder.is_told(asker.name, 1, priority=0)
    reasons = {reason for reason, _ in responder.refusals(asker.name, 0).get(1, set())}
    expect(reasons == {"gone"}, f"the reasons are {sorted(reasons)}")
    expect(not asker.delivered(), "it is delivered to another process")


@check("reply-passes", "12, 15, 17 rule 27", "replies come while everything else is full, and while draining")
def reply_passes(stage: BrokerStage) -> Script:
    asker = yield from stage.attach("one", prefetch=(1, 1))
    responder = yield from stage.attach("two")
    for number in range(1, 4):
        responder.send(asker.name, note_message(f"n-{number}"), first=number, floor=1)
    yield from asker.gets()
    asker.say(emp.DRAIN, 1000)
    mark = stage.mark
    for number in range(1, 4):
        answer(responder, asker, number)
    yield from stage.until(lambda: len(asker.delivered(mark, priority=0)) >= 3, "replies do not pass")
    asker.ack(asker.delivered()[0])
    yield from stage.never(lambda: asker.delivered(mark, priority=3), "DRAIN does not stop deliveries")


@check("group-request", "12 asking a group", "the members that a group request went to are told, again after WELCOME")
def group_request(stage: BrokerStage) -> Script:
    asker = yield from stage.attach("one")
    members = []
    for name in ("two", "three"):
        member = yield from stage.attach(name, ["g"])
        members.append(member.name)
    to = stage.group("g")

    def told(mark: int) -> list[tuple[int, int, list[str]]]:
        return [(first, count, names) for each in asker.settled(to, 1, mark) for first, count, names in each.members]

    asker.send(to, message("q-1"), priority=1, flags=emp.EXPECTS_REPLY)
    found = yield from stage.until(lambda: told(0), "the members are not told")
    expect(found[0][:2] == (1, 1) and sorted(found[0][2]) == sorted(members), f"told is {found[0]}")
    mark = stage.mark
    yield from asker.welcomed()
    yield from stage.until(lambda: told(mark), "the members are not told again after WELCOME")


# --- the end, retained ----------------------------------------------------------------------------------------------


@check("drain", "15, 17 rule 34", "after DRAIN nothing new comes; what waits is for the next process")
def drain(stage: BrokerStage) -> Script:
    sender = yield from stage.attach("one")
    receiver = yield from stage.attach("two")
    receiver.say(emp.DRAIN, 1000)
    mark = stage.mark
    receiver.say(emp.PING, 1)
    yield from stage.answer(mark, "no PONG while draining", "PONG/1", end=receiver.end)
    sender.send(receiver.name, note_message("n-1"))
    yield from stage.never(lambda: receiver.delivered(), "something new is delivered after DRAIN")
    receiver.say(emp.BYE, False)
    receiver.is_attached = False
    following = yield from stage.attach("two")
    seen = yield from following.gets(what="what waited for it")
    expect(following.generation > receiver.generation, f"generation {following.generation}")
    following.ack(seen)
    yield from sender.is_told(following.name, 1)


@check(
    "bye", "5 BYE, 15, 17 rule 25", "BYE(leaving) of an undeclared module lets it go at once: `gone`, then `unroutable`"
)
def bye(stage: BrokerStage) -> Script:
    sender = yield from stage.attach("one")
    receiver = yield from stage.attach("two")
    sender.send(receiver.name, note_message("n-1"))
    yield from receiver.gets()
    receiver.say(emp.BYE, True)
    receiver.is_attached = False
    yield from sender.is_told(receiver.name, 1)
    reasons = {reason for reason, _ in sender.refusals(receiver.name).get(1, set())}
    expect(reasons == {"gone"}, f"the reasons are {sorted(reasons)}")
    sender.send(receiver.name, note_message("n-2"), first=2)
    yield from sender.is_told(receiver.name, 2)
    reasons = {reason for reason, _ in sender.refusals(receiver.name).get(2, set())}
    expect(reasons == {"unroutable"}, f"the reasons are {sorted(reasons)}")


@check(
    "retained",
    "14, 17 rule 35",
    "a retained message is kept for members that come later, the newest version of each key",
)
def retained(stage: BrokerStage) -> Script:
    source = yield from stage.attach("one")
    to = stage.group("g")
    body = b""
    for number in (1, 2):
        state = note_message(f"state-{number}")
        more = (None, None, "key", number)
        body = source.send(to, state, first=number, priority=2, flags=emp.RETAIN, more=more)
    yield from source.is_told(to, 2, priority=2)
    expect(not source.refusals(to, 2), "a retained message to a group without members is refused")
    member = yield from stage.attach("two", ["g"])
    seen = yield from member.gets(what="retained message")
    yield from stage.pause(stage.settings.quiet)
    expect(len(member.delivered()) == 1, f"{len(member.delivered())} versions are delivered")
    header: emp.Deliver = seen.header
    expect(seen.frames[2] == body, "it is not the newest version")
    expect(header.flags & emp.RETAIN and header.flags & emp.FROM_STORE, f"flags {header.flags}")
    expect(header.sender == source.name and header.generation == 0, "the lane is not the store's own")
    expect(header.retain_key == "key", f"key {header.retain_key}")
    expect(tuple(header.retain_version or ()) == (source.generation, 2), f"version {header.retain_version}")
    member.ack(seen)
    mark = stage.mark
    source.send(to, note_message("state-3"), first=3, priority=2, flags=emp.RETAIN, more=(None, None, "key", 3))
    fresh = yield from member.gets(mark)
    expect(not fresh.header.flags & emp.FROM_STORE, "a fresh one is marked as out of the store")
    expect(tuple(fresh.header.retain_version or ()) == (source.generation, 3), "the version is another one")


# --- ADMIN ------------------------------------------------------------------------------------------------------------


@check("admin", "15, 16", "ADMIN is answered without HELLO; what it does not know it says")
def admin(stage: BrokerStage) -> Script:
    module = yield from stage.attach("one")
    peer = stage.peer("tool")

    def ask(number: int, op: str) -> Scene[dict[str, object]]:
        mark = stage.mark
        peer.say(emp.ADMIN, number, op, body=b"\x80")
        seen = yield from stage.answer(mark, f"no answer to {op!r}", "ADMIN/1", "REFUSED/1", end=peer.end)
        if seen.verb == "REFUSED/1":
            raise NotApplicable(f"it does not let this user ask: `{seen.header.code}`")
        expect((seen.header.request, seen.header.op) == (number, op), f"request {seen.header.request}")
        found = wire.unpack(seen.frames[2])
        expect(isinstance(found, dict), "the answer is no map")
        assert isinstance(found, dict)
        return found

    status = yield from ask(11, "status")
    names = [each.get("name") for each in _maps(status.get("modules"))]
    expect(module.name in names, "status does not name a module that is attached")
    expect(isinstance(status.get("broker"), dict), "status has no `broker`")
    present = yield from ask(12, "presence")
    names = [each.get("name") for each in _maps(present.get("modules"))]
    expect(module.name in names, "presence does not name a module that is attached")
    mark = stage.mark
    second = yield from stage.attach("two")

    def events() -> list[object]:
        bodies = [wire.unpack(seen.frames[2]) for seen in stage.since(mark, "ADMIN/1", end=peer.end)]
        return [each for each in bodies if each.get("name") == second.name and each.get("event") == "attached"]

    yield from stage.until(events, "presence does not tell of one that comes")
    wrong = yield from ask(13, "no-such-question")
    expect("error" in wrong, f"the answer to a question that is none is {wire.shown(wrong)}")


def _maps(value: object) -> list[dict[str, object]]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


# --- getting to know it ---------------------------------------------------------------------------------------------


def survey(stage: BrokerStage) -> Script:
    """It is there, and its grace is over: it calls an unknown name unknown."""
    peer = yield from stage.attach("survey")
    nobody = stage.name("nobody")
    peer.send(nobody, note_message("n-1"))
    yield from peer.is_told(nobody, 1)


SURVEY: Final = Check("survey", "9", "it answers HELLO, and settles", survey)
