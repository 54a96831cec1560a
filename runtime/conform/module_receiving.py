"""What docs/emp.md demands of a module that is sent something.

What a module does when it is handed a message nobody outside can see, except where it answers: so most of it is asked
with requests, and one reply is one handling.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from runtime import emp
from runtime.conform import wire
from runtime.conform.module_stage import (
    ASKER,
    LIMITS,
    Delivery,
    ModuleStage,
    is_same,
    message,
    other,
)
from runtime.conform.play import Catalogue, Script, Seen, expect

CHECKS: Final = Catalogue()
check = CHECKS.enter

UNKNOWN_FLAG: Final = 1 << 20
LARGE_BYTES: Final = 12 * 2**20 - 4096
"A request that is allowed, and whose reply is too, though its fields are longer."


@check("outcome", "11 outcome, 19", "whatever is delivered has an outcome: delivered, or refused with a reason")
def outcome(stage: ModuleStage) -> Script:
    yield from stage.attached()
    for number, priority in enumerate((3, 2, 1)):
        flags = emp.EXPECTS_REPLY if priority == 1 else 0
        delivery = stage.deliver(message(f"m-{number}", operation="note"), priority=priority, flags=flags)
        yield from stage.settled(delivery, f"a message at priority {priority}")


@check("request", "12", "the reply names the request and goes to the asker's incarnation", needs=("answers",))
def request(stage: ModuleStage) -> Script:
    hello = yield from stage.attached()
    delivery = stage.deliver(message("q-1"))
    yield from stage.served(delivery, "q-1")
    seen, reply = only_reply(stage, delivery, "q-1")
    header: emp.Send = seen.header
    expect(header.destination == ASKER.name, f"the reply goes to {header.destination!r}")
    expect(header.flags & emp.REPLY, "the reply has not the flag REPLY")
    expect(header.priority == 0, f"the reply has priority {header.priority}")
    expect(header.requester == ASKER.incarnation, f"requester is {wire.shown(header.requester)}")
    expect(reply[1] == "q-1" and reply[0] not in ("", "q-1"), f"id {reply[0]!r}, parent {reply[1]!r}")
    expect(hello.name == stage.traits.name, "its name changes")


def only_reply(stage: ModuleStage, delivery: Delivery, id: str) -> tuple[Seen, list[Any]]:
    """The reply to one request; fails when there are several."""
    found = stage.replies(delivery.mark, id)
    expect(len(found) == 1, f"{len(found)} replies to {id}")
    return found[0]


@check("request-order", "11, 17 rule 28", "the SEND of a reply goes before the ACK of its request", needs=("answers",))
def request_order(stage: ModuleStage) -> Script:
    yield from stage.attached()
    for number in range(1, 6):
        delivery = stage.deliver(message(f"q-{number}"), first=number, floor=number)
        yield from stage.served(delivery, f"q-{number}")
        reply, _ = only_reply(stage, delivery, f"q-{number}")
        acks = stage.acks_of(delivery)
        expect(acks, f"no ACK for request {number}: it was acknowledged before it came")
        expect(stage.record.index(reply) < stage.record.index(acks[0]), "the ACK came before the reply")


@check("reply-content", "6, 12", "content and kind of a message come through as they stand", needs=("echoes",))
def reply_content(stage: ModuleStage) -> Script:
    yield from stage.attached()
    contents: tuple[dict[str, object], ...] = ({"a": [1, 2.5, None, True], "ä": "ö€𝄞"}, {}, {"n": 2**53 + 1})
    messages = [message(f"q-{number}", content) for number, content in enumerate(contents)]
    texts = [*messages, [*message("q-text")[:9], "text", "ä plain text".encode()]]
    delivery = stage.deliver(*texts)
    ids = [each[0] for each in texts]
    found = yield from stage.replied(delivery, *ids)
    replies = {reply[1]: reply for _, reply in found}
    for sent in texts:
        reply = replies.get(sent[0])
        expect(reply is not None, f"no reply to {sent[0]}")
        assert reply is not None
        expect(is_same(sent, reply), f"{sent[0]}: {sent[9]} {sent[10]!r} came back as {reply[9]} {reply[10]!r}")


@check("reply-settled", "10, 19 sender", "floors of lanes that have run empty are told by PING", needs=("answers",))
def reply_settled(stage: ModuleStage) -> Script:
    yield from stage.attached()
    askers = [other(f"conform-asker-{number}") for number in range(3)]
    for asker in askers:
        yield from stage.served(stage.deliver(message("q-1"), sender=asker), "q-1")
    wanted = {(asker.name, 0, 2) for asker in askers}

    def told() -> set[tuple[str, int, int]]:
        return {tuple(floor) for seen in stage.since(0, "PING/1") for floor in seen.header.floors}

    yield from stage.until(lambda: wanted <= told(), f"no PING tells the floors of {sorted(wanted - told())}")


@check("reply-resent", "10, 17 rule 4", "a reply that is not settled is sent again after WELCOME", needs=("answers",))
def reply_resent(stage: ModuleStage) -> Script:
    yield from stage.attached()
    stage.manners.settles = False
    yield from stage.served(stage.deliver(message("q-1")), "q-1")
    mark = stage.mark
    yield from stage.asked_who()
    seen = yield from stage.until(
        lambda: [each for each in stage.since(mark, "SEND/1") if each.header.priority == 0],
        "the reply does not come again",
    )
    expect(seen[0].header.flags & emp.RESENT, "it comes without RESENT")


@check("batch", "5 DELIVER, 11", "of a batch each message is handled once, and one ACK covers it", needs=("answers",))
def batch(stage: ModuleStage) -> Script:
    yield from stage.attached()
    ids = [f"q-{number}" for number in range(1, 21)]
    delivery = stage.deliver(*map(message, ids))
    yield from stage.served(delivery, *ids)
    yield from stage.never(lambda: len(stage.replies(delivery.mark)) > len(ids), "more replies than requests")


@check("batch-from", "5 DELIVER, 11", "messages before `from` are not handled", needs=("answers",))
def batch_from(stage: ModuleStage) -> Script:
    yield from stage.attached()
    delivery = stage.deliver(*map(message, ("q-1", "q-2", "q-3")), from_=3)
    yield from stage.served(delivery, "q-3")
    yield from stage.never(lambda: stage.replies(delivery.mark, "q-1", "q-2"), "what stands before `from` was handled")


@check(
    "void",
    "11, 17 rule 15",
    "numbers below `from` have the outcome that `void` tells, else delivered",
    needs=("answers",),
)
def void(stage: ModuleStage) -> Script:
    yield from stage.attached()
    first = stage.deliver(*map(message, ("q-1", "q-2", "q-3")), from_=3, floor=1, void=[(1, "denied")])
    yield from stage.served(first, "q-3")
    yield from stage.asked_who()
    again = stage.deliver(*map(message, ("q-1", "q-2", "q-3")), flags=emp.EXPECTS_REPLY | emp.REDELIVERED)
    found = yield from stage.settled(again)
    expect(found.exceptions.get(1) == "denied", f"asked again, number 1 is {found.exceptions.get(1, 'delivered')}")
    others = {number: why for number, why in found.exceptions.items() if number > 1}
    expect(not others, f"asked again, {others} are refused")
    yield from stage.never(lambda: stage.replies(again.mark), "a number that it has booked is handled")


@check(
    "duplicate",
    "11, 17 rule 14",
    "a number that is known is not handled again, and acknowledged again",
    needs=("answers",),
)
def duplicate(stage: ModuleStage) -> Script:
    yield from stage.attached()
    ids = ("q-1", "q-2")
    yield from stage.served(stage.deliver(*map(message, ids)), *ids)
    again = stage.deliver(*map(message, ids), flags=emp.EXPECTS_REPLY | emp.REDELIVERED)
    yield from stage.until(lambda: stage.acks_of(again), "no ACK for what came a second time in one session")
    yield from stage.never(lambda: stage.replies(again.mark), "what came a second time is handled again")


@check(
    "redelivered",
    "11, 17 rule 14",
    "what is delivered again in a new session is acknowledged there, and not handled",
    needs=("answers",),
)
def redelivered(stage: ModuleStage) -> Script:
    yield from stage.attached()
    ids = ("q-1", "q-2", "q-3")
    yield from stage.served(stage.deliver(*map(message, ids)), *ids)
    yield from stage.asked_who()
    # A lane that comes first has another short number now.
    yield from stage.served(stage.deliver(message("x-1"), sender=other("conform-second")), "x-1")
    again = stage.deliver(*map(message, (*ids, "q-4")), flags=emp.EXPECTS_REPLY | emp.REDELIVERED)
    yield from stage.served(again, "q-4")
    yield from stage.never(lambda: stage.replies(again.mark, *ids), "what was handled is handled again")


@check(
    "refused-again",
    "11, 17 rule 16",
    "a body that holds no such messages is refused as `invalid`, and so again when asked again",
)
def refused_again(stage: ModuleStage) -> Script:
    yield from stage.attached()
    broken = (b"\xc1", wire.packed(message("q-1")), wire.packed("no message", 7))
    for number, body in enumerate(broken):
        sender = other(f"conform-broken-{number}")
        count = 1 if number == 0 else 2
        delivery = stage.deliver(sender=sender, body=body, count=count, priority=3, flags=0)
        found = yield from stage.settled(delivery, f"a body of {wire.shown(body)}")
        reasons = {each: found.exceptions.get(each, "delivered") for each in range(1, count + 1)}
        expect(set(reasons.values()) == {"invalid"}, f"a body of {wire.shown(body)} is {reasons}")
        yield from stage.asked_who()
        again = stage.deliver(sender=sender, body=body, count=count, priority=3, flags=emp.REDELIVERED)
        found = yield from stage.settled(again, "the same once more")
        reasons = {each: found.exceptions.get(each, "delivered") for each in range(1, count + 1)}
        expect(set(reasons.values()) == {"invalid"}, f"asked again, it is {reasons}")


@check(
    "overtaken",
    "11, 17 rule 15",
    "a number below the book's beginning is refused as `overtaken`, never handled",
    needs=("answers",),
)
def overtaken(stage: ModuleStage) -> Script:
    yield from stage.attached()
    yield from stage.served(stage.deliver(message("q-5"), first=5, floor=5), "q-5")
    yield from stage.asked_who()
    late = stage.deliver(message("q-3"), first=3, floor=3, flags=emp.EXPECTS_REPLY | emp.REDELIVERED)
    found = yield from stage.until(lambda: stage.acks_of(late), "no ACK for a number that was overtaken")
    exceptions = {
        each: why for seen in found for lane in seen.header.lanes if lane[0] == late.lane for each, why in lane[2]
    }
    expect(exceptions.get(3) == "overtaken", f"number 3 after number 5 is {exceptions.get(3, 'delivered')}")
    yield from stage.never(lambda: stage.replies(late.mark, "q-3"), "number 3 is handled after number 5")


@check(
    "floor-moves",
    "11",
    "the broker may settle numbers itself: a floor beyond them moves the book on",
    needs=("answers",),
)
def floor_moves(stage: ModuleStage) -> Script:
    yield from stage.attached()
    yield from stage.served(stage.deliver(message("q-1")), "q-1")
    far = stage.deliver(message("q-9"), first=9, floor=9)
    yield from stage.served(far, "q-9")


@check(
    "lanes", "3 lane, 17 rule 1", "sender's incarnation, destination and priority tell lanes apart", needs=("answers",)
)
def lanes(stage: ModuleStage) -> Script:
    hello = yield from stage.attached()
    places = [
        (ASKER, hello.name, 1),
        (ASKER, hello.name, 2),
        (ASKER, hello.name, 3),
        (other("conform-second"), hello.name, 1),
    ]
    places += [(ASKER, f"@{group}", 1) for group in stage.traits.groups[:1]]
    for place, (sender, destination, priority) in enumerate(places):
        delivery = stage.deliver(message(f"q-{place}"), sender=sender, destination=destination, priority=priority)
        yield from stage.served(delivery, f"q-{place}")


@check(
    "session-old",
    "11, 17 rule 9",
    "a DELIVER of an earlier session is handled, and not acknowledged",
    needs=("answers",),
)
def session_old(stage: ModuleStage) -> Script:
    yield from stage.attached()
    old = stage.session
    yield from stage.asked_who()
    delivery = stage.deliver(message("q-1"), session=old)
    yield from stage.replied(delivery, "q-1")
    yield from stage.never(
        lambda: stage.since(delivery.mark, "ACK/1"), "it acknowledges what another session delivered"
    )
    again = stage.deliver(message("q-1"), flags=emp.EXPECTS_REPLY | emp.REDELIVERED)
    yield from stage.settled(again, "the same in this session")
    yield from stage.never(lambda: stage.replies(again.mark), "the same in this session is handled again")


@check(
    "fenced-sender",
    "11, 17 rule 20",
    "a lane of an older generation of its sender is refused as `fenced`",
    needs=("answers",),
)
def fenced_sender(stage: ModuleStage) -> Script:
    yield from stage.attached()
    newer = other("conform-twice", generation=200, process=2)
    older = other("conform-twice", generation=150, process=1)
    yield from stage.served(stage.deliver(message("q-1"), sender=newer), "q-1")
    delivery = stage.deliver(*map(message, ("z-1", "z-2")), sender=older)
    found = yield from stage.settled(delivery, "a lane of an older generation")
    reasons = [found.exceptions.get(number, "delivered") for number in (1, 2)]
    expect(reasons == ["fenced", "fenced"], f"an older generation's messages are {reasons}")
    yield from stage.never(
        lambda: stage.replies(delivery.mark, "z-1", "z-2"), "an older generation's message is handled"
    )
    newest = other("conform-twice", generation=300, process=3)
    yield from stage.served(stage.deliver(message("q-2"), sender=newest), "q-2")


@check(
    "store-lane",
    "11, 14",
    "lanes of the broker's store have generation 0 and begin anywhere; they are not fenced",
    needs=("answers", "groups"),
)
def store_lane(stage: ModuleStage) -> Script:
    yield from stage.attached()
    group = f"@{stage.traits.groups[0]}"
    source = other("conform-source", generation=200)
    yield from stage.served(stage.deliver(message("q-1"), sender=source, destination=group, priority=2), "q-1")
    stored = other("conform-source", generation=0, process=9)
    flags = emp.EXPECTS_REPLY | emp.RETAIN | emp.FROM_STORE
    delivery = stage.deliver(
        message("s-1"),
        first=41,
        sender=stored,
        destination=group,
        priority=2,
        flags=flags,
        more=(None, None, "key", [200, 1]),
    )
    yield from stage.served(delivery, "s-1")


@check(
    "retained-versions",
    "14, 17 rule 35",
    "of a retained key only what is newer is handled; what is not is acknowledged",
    needs=("answers", "groups"),
)
def retained_versions(stage: ModuleStage) -> Script:
    yield from stage.attached()
    group = f"@{stage.traits.groups[0]}"
    versions = [((5, 2), True), ((5, 1), False), ((5, 2), False), ((4, 9), False), ((5, 3), True), ((6, 1), True)]
    for number, (version, is_new) in enumerate(versions, 1):
        # Over several incarnations of the source, so that the lanes' own numbers say nothing.
        source = other("conform-source", generation=0, process=number)
        flags = emp.EXPECTS_REPLY | emp.RETAIN | emp.FROM_STORE
        delivery = stage.deliver(
            message(f"v-{number}"),
            sender=source,
            destination=group,
            priority=2,
            flags=flags,
            more=(None, None, "key", list(version)),
        )
        if is_new:
            yield from stage.served(delivery, f"v-{number}")
            continue
        found = yield from stage.settled(delivery, f"the version {version}")
        expect(not found.exceptions, f"the version {version} is refused: {found.exceptions}")
        yield from stage.never(_has_replies(stage, delivery), f"the version {version} is handled")
    other_key = stage.deliver(
        message("k-1"),
        sender=other("conform-source", generation=0, process=20),
        destination=group,
        priority=2,
        flags=emp.EXPECTS_REPLY | emp.RETAIN | emp.FROM_STORE,
        more=(None, None, "another", [1, 1]),
    )
    yield from stage.served(other_key, "k-1")


def _has_replies(stage: ModuleStage, delivery: Delivery) -> Callable[[], object]:
    return lambda: stage.replies(delivery.mark)


@check("group", "13", "messages to its groups have an outcome", needs=("groups",))
def group_(stage: ModuleStage) -> Script:
    yield from stage.attached()
    for number, name in enumerate(stage.traits.groups[:8]):
        delivery = stage.deliver(message(f"g-{number}", operation="note"), destination=f"@{name}", priority=3, flags=0)
        yield from stage.settled(delivery, f"a message to @{name}")


@check("large", "2, 7", "a message of nearly 12 MiB comes in, and goes out again", needs=("echoes",))
def large(stage: ModuleStage) -> Script:
    yield from stage.attached()
    text = "x" * (LARGE_BYTES - 200)
    sent = message("q-1", {"text": text})
    delivery = stage.deliver(sent)
    found = yield from stage.replied(delivery, "q-1")
    expect(is_same(sent, found[0][1]), f"{len(found[0][1][10])} bytes of content came back, others than were sent")
    yield from stage.settled(delivery)


@check("trailing-fields", "1 version, 4", "fields after the last known one, and unknown flags, are ignored")
def trailing_fields(stage: ModuleStage) -> Script:
    stage.manners.welcomes = stage.manners.pongs = False
    yield from stage.greeted()
    later = ("later", {"more": 1}, [1])
    stage.welcome(*later)
    yield from stage.until(lambda: stage.pinged, "no PING after a WELCOME with further fields")
    assert stage.pinged is not None
    stage.say(emp.PONG, stage.pinged.header.nonce, *later)
    stage.manners.pongs = True
    delivery = stage.deliver(
        [*message("q-1"), "dest", "type", "later"],
        flags=emp.EXPECTS_REPLY | UNKNOWN_FLAG,
        more=(None, None, None, None, *later),
    )
    if stage.traits.answers:
        yield from stage.served(delivery, "q-1")
    yield from stage.settled(delivery, "a DELIVER with further fields")
    for lane in list(stage.referee.lanes.values()):
        stage.say(emp.SETTLED, lane.destination, lane.priority, lane.settled, [], [], *later)
    mark = stage.mark
    stage.is_attached = False
    stage.say(emp.WHO, stage.epoch, *later)
    yield from stage.answer(mark, "no HELLO in answer to a WHO with further fields", "HELLO/1")
    yield from stage.left_alone()


@check("defaults", "4 trailing fields, 5", "fields marked opt may be left out")
def defaults(stage: ModuleStage) -> Script:
    stage.limits = None
    yield from stage.attached()
    delivery = stage.deliver(message("m-1")[:8], more=None, priority=3)
    yield from stage.settled(delivery, "a DELIVER without optional fields")
    mark = stage.mark
    stage.is_attached = False
    stage.say(emp.WHO)
    yield from stage.answer(mark, "no HELLO in answer to a WHO without fields", "HELLO/1")
    yield from stage.left_alone()


@check("wide", "4", "integers, strings, bins and arrays are taken in any width")
def wide(stage: ModuleStage) -> Script:
    stage.manners.welcomes = stage.manners.pongs = False
    yield from stage.greeted()
    stage.session += 1
    stage.is_attached = True
    stage.referee.welcomed(stage.session)
    fields = [stage.epoch, stage.session, stage.generation, stage.heartbeat_ms, False, list(LIMITS)]
    stage.tell(stage.connection, emp.WELCOME, wire.packed_wide(fields))
    stage.manners.welcomes = True
    yield from stage.until(lambda: stage.pinged, "no PING after a WELCOME in wide encoding")
    assert stage.pinged is not None
    stage.tell(stage.connection, emp.PONG, wire.packed_wide([stage.pinged.header.nonce]))
    stage.manners.pongs = True
    delivery = stage.deliver(
        message("q-1"), pack=lambda *each: wire.packed_wide(list(each)), body=wire.packed_wide([message("q-1")])
    )
    if stage.traits.answers:
        yield from stage.served(delivery, "q-1")
    yield from stage.settled(delivery, "a DELIVER in wide encoding")


@check("unknown-verbs", "4", "frames that it cannot read are ignored: unknown verbs, other versions, broken headers")
def unknown_verbs(stage: ModuleStage) -> Script:
    yield from stage.attached()
    stage.say(b"NEWS/1", "something later")
    stage.say(b"DELIVER/2", 1, 2, 3, body=b"\x90")
    stage.say(b"PING/1", 1)
    yield from stage.left_alone()
    stage.tell(stage.connection, b"")
    stage.tell(stage.connection, emp.DELIVER)
    stage.tell(stage.connection, emp.PONG, b"\xc1")
    stage.tell(stage.connection, emp.SETTLED, wire.packed("no", "such", "header"))
    stage.tell(stage.connection, emp.DELIVER, wire.packed(1, 2), b"\x90")
    stage.tell(stage.connection, emp.WELCOME, wire.packed())
    yield from stage.left_alone()


@check("deliver-senseless", "11", "a DELIVER whose numbers make no sense is dropped", needs=("answers",))
def deliver_senseless(stage: ModuleStage) -> Script:
    yield from stage.attached()
    mark = stage.mark
    stage.deliver(message("n-1"), sender=other("conform-no-1"), first=5, from_=9, floor=5)
    stage.deliver(message("n-2"), sender=other("conform-no-2"), first=5, from_=4, floor=3)
    stage.deliver(message("n-3"), sender=other("conform-no-3"), first=5, from_=5, floor=7)
    yield from stage.never(lambda: stage.replies(mark), "it was handled")
    yield from stage.left_alone()
