"""What docs/emp.md demands of a module, check by check. Each script begins with a fresh process.

What a module does when it is handed a message nobody outside can see, except where it answers: so most of what is said
of receivers is asked with requests, and one reply is one handling.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Final

from runtime import emp
from runtime.conform import referee, wire
from runtime.conform.module_stage import (
    ASKER,
    HEARTBEAT_MS,
    LIMITS,
    STATUS_OF_TERM,
    Delivery,
    ModuleStage,
    Traits,
    message,
    other,
)
from runtime.conform.play import Check, Failed, NotApplicable, Scene, Script, Seen
from runtime.conform.referee import SentLane

CHECKS: list[Check] = []
"In the order of the page."

UNKNOWN_FLAG: Final = 1 << 20
LARGE_BYTES: Final = 12 * 2**20 - 4096
"A request that is allowed, and whose reply is too, though its fields are longer."


def check(
    name: str, section: str, says: str, *, needs: tuple[str, ...] = (), is_long: bool = False
) -> Callable[[Callable[[ModuleStage], Script]], Callable[[ModuleStage], Script]]:
    def enter(script: Callable[[ModuleStage], Script]) -> Callable[[ModuleStage], Script]:
        CHECKS.append(Check(name, section, says, script, needs, is_long))
        return script

    return enter


def expect(good: object, otherwise: str) -> None:
    if not good:
        raise Failed(otherwise)


# --- attaching -----------------------------------------------------------------------------------------


@check("hello", "5 HELLO, 9", "a new process says HELLO with generation 0 and an incarnation of its own")
def hello(stage: ModuleStage) -> Script:
    first = yield from stage.attached()
    expect(first.generation == 0, f"generation {first.generation} in the first HELLO of a process")
    stage.signal("KILL")
    yield from stage.gone(stage.settings.soon, "it does not die")
    second = yield from stage.attached()
    expect(second.generation == 0, f"generation {second.generation} in the first HELLO of the second process")
    expect(second.incarnation != first.incarnation, "two processes have the same incarnation")
    expect(second.name == first.name, f"it is called {first.name!r}, then {second.name!r}")


@check("hello-repeated", "7 times of a module, 9", "an unanswered HELLO is repeated, with the same incarnation")
def hello_repeated(stage: ModuleStage) -> Script:
    stage.manners.welcomes = False
    first = yield from stage.greeted()
    yield from stage.until(lambda: len(stage.since(0, "HELLO/1")) >= 4, "HELLO is not repeated")
    seen = stage.since(0, "HELLO/1")
    expect(all(each.header.incarnation == first.incarnation for each in seen), "the incarnation changes")
    expect(all(each.header.generation == 0 for each in seen), "a generation that no WELCOME has given")
    gap = seen[3].at - seen[0].at
    expect(gap > 0.6, f"four HELLOs within {gap:.2f} s; 0.5 s apart is told")
    stage.welcome()
    yield from stage.left_alone()


@check("welcome-generation", "9, 17 rule 22", "HELLO after a WELCOME carries its generation, and the same incarnation")
def welcome_generation(stage: ModuleStage) -> Script:
    first = yield from stage.attached()
    again = yield from stage.asked_who()
    expect(again.generation == stage.generation, f"generation {again.generation}, WELCOME said {stage.generation}")
    expect(again.incarnation == first.incarnation, "a reconnect has another incarnation")
    yield from stage.left_alone()


@check("welcome-old", "9, 17 rule 9", "a WELCOME of this epoch with a session that is not higher is ignored")
def welcome_old(stage: ModuleStage) -> Script:
    yield from stage.attached()
    stage.say(emp.WELCOME, stage.epoch, stage.session - 1, stage.generation - 5, stage.heartbeat_ms, False)
    if stage.traits.answers:
        yield from stage.served(stage.deliver(message("q-1")), "q-1")
    else:
        yield from stage.settled(stage.deliver(message("q-1")))
    again = yield from stage.asked_who()
    expect(again.generation == stage.generation, "the old WELCOME's generation was taken")


@check("welcome-again", "9", "while attached a WELCOME with a higher session begins that session")
def welcome_again(stage: ModuleStage) -> Script:
    yield from stage.attached()
    stage.welcome()
    delivery = stage.deliver(message("q-1"))
    yield from stage.settled(delivery, "what the new session delivered")
    yield from stage.left_alone()


@check("who", "9, 17 rule 8", "WHO is answered by HELLO, and after WELCOME all goes on")
def who(stage: ModuleStage) -> Script:
    yield from stage.attached()
    yield from stage.asked_who()
    yield from stage.left_alone()


@check("who-greeting", "9, 17 rule 10", "WHO is ignored while HELLO is unanswered")
def who_greeting(stage: ModuleStage) -> Script:
    stage.manners.welcomes = False
    yield from stage.greeted()
    mark = stage.mark
    for _ in range(10):
        stage.say(emp.WHO, stage.epoch)
    yield from stage.pause(1.2)
    count = len(stage.since(mark, "HELLO/1"))
    expect(count <= 4, f"{count} HELLOs within 1.2 s after ten WHO; the timer gives two or three")
    stage.welcome()
    yield from stage.left_alone()


@check("name-taken", "8 Of frames, 9", "REFUSED `name-taken` does not end it: HELLO is repeated")
def name_taken(stage: ModuleStage) -> Script:
    if stage.traits.liveness < 2.5:
        raise NotApplicable("its liveness time is too short to see it try again")
    stage.manners.welcomes = False
    yield from stage.greeted()
    for _ in range(3):
        mark = stage.mark
        stage.say(emp.REFUSED, "name-taken", "held by somebody")
        yield from stage.answer(mark, "HELLO is not repeated after `name-taken`", "HELLO/1", within=2.0)
    stage.welcome()
    yield from stage.left_alone()


@check(
    "name-taken-long", "8 Of frames, 9", "`name-taken` for longer than its liveness time makes it exit", is_long=True
)
def name_taken_long(stage: ModuleStage) -> Script:
    yield from needs_patience(stage)
    stage.manners.welcomes = False
    yield from stage.greeted()
    began = stage.now
    stage.may_end = True
    end = began + stage.traits.liveness + stage.settings.soon
    while stage.now < end and stage.status is None:
        stage.say(emp.REFUSED, "name-taken", "held by somebody")
        mark = stage.mark
        yield from stage.whether(
            lambda mark=mark: stage.status is not None or stage.since(mark, "HELLO/1"),  # type: ignore[misc]
            end - stage.now,
        )
    expect(stage.status is not None, f"it still tries after {stage.now - began:.1f} s")
    early = stage.now - began < stage.traits.liveness - 0.5
    expect(not early, f"it gives up after {stage.now - began:.1f} s, its liveness is {stage.traits.liveness:.1f} s")


def _refused(code: str) -> Callable[[ModuleStage], Script]:
    def script(stage: ModuleStage) -> Script:
        stage.manners.welcomes = False
        yield from stage.greeted()
        stage.may_end = True
        stage.say(emp.REFUSED, code, "the scripted broker says no")
        yield from stage.gone(stage.settings.soon, f"it does not exit after `{code}`")

    return script


for _code in ("denied", "version", "too-many"):
    check(f"refused-{_code}", "8 Of frames, 9", f"REFUSED `{_code}` in answer to HELLO makes it exit")(_refused(_code))


@check("refused-other", "8 Of frames, 9", "other codes, and REFUSED while attached, do not end it")
def refused_other(stage: ModuleStage) -> Script:
    stage.manners.welcomes = False
    yield from stage.greeted()
    mark = stage.mark
    stage.say(emp.REFUSED, "bad-header", "the scripted broker did not like it")
    yield from stage.answer(mark, "HELLO is not repeated after `bad-header`", "HELLO/1")
    stage.welcome()
    yield from stage.left_alone()
    for code in ("unknown-verb", "bad-header", "name-taken"):
        stage.say(emp.REFUSED, code, "the scripted broker did not like it")
    yield from stage.left_alone()


# --- PING ----------------------------------------------------------------------------------------------


@check("ping-first", "9, 18", "after WELCOME it sends a PING soon, before the heartbeat is due again and again")
def ping_first(stage: ModuleStage) -> Script:
    stage.heartbeat_ms = 60_000
    if stage.traits.liveness > 3 * stage.settings.soon:
        allowed = stage.settings.soon
    else:
        allowed = stage.traits.liveness / 3 + stage.settings.soon
    yield from stage.greeted()
    yield from stage.until(lambda: stage.pinged, "no PING after WELCOME", allowed)


@check("ping-heartbeat", "5 PING, 7 times of a module", "PING comes at least every heartbeat_ms")
def ping_heartbeat(stage: ModuleStage) -> Script:
    yield from stage.attached()
    mark = stage.mark
    wanted = 5
    allowed = 2 * wanted * HEARTBEAT_MS / 1000 + 1.0
    yield from stage.until(
        lambda: len(stage.since(mark, "PING/1")) >= wanted,
        f"fewer than {wanted} PINGs in {allowed:.1f} s; heartbeat_ms is {HEARTBEAT_MS}",
        allowed,
    )


@check("ping-liveness", "7 times of a module", "PING comes three times within liveness_ms, however long the heartbeat")
def ping_liveness(stage: ModuleStage) -> Script:
    yield from needs_patience(stage)
    stage.heartbeat_ms = 3_600_000
    yield from stage.attached()
    mark = stage.mark
    allowed = stage.traits.liveness / 3 * 2 + 1.0
    yield from stage.until(lambda: stage.since(mark, "PING/1"), f"no second PING for {allowed:.1f} s", allowed)


@check("pong-missing", "7 times of a module, 9", "without a PONG for its liveness time it says HELLO", is_long=True)
def pong_missing(stage: ModuleStage) -> Script:
    yield from needs_patience(stage)
    yield from stage.attached()
    stage.manners.pongs = False
    mark = stage.mark
    began = stage.now
    liveness = stage.traits.liveness
    yield from stage.answer(
        mark, f"no HELLO {liveness:.1f} s after the last PONG", "HELLO/1", within=liveness + stage.settings.soon
    )
    expect(stage.now - began > liveness / 3, f"HELLO {stage.now - began:.1f} s after the last PONG already")
    stage.manners.pongs = True
    yield from stage.left_alone()


def needs_patience(stage: ModuleStage) -> Scene[None]:
    """The check takes as long as the module's liveness time."""
    if stage.traits.liveness > stage.settings.longest:
        raise NotApplicable(
            f"its liveness time is {stage.traits.liveness:.0f} s; it would take longer than {stage.settings.longest} s"
        )
    yield from ()


@check(
    "fresh-first",
    "9 freshness, 17 rule 21",
    "it begins to handle only when a PONG has answered its PING",
    needs=("answers",),
)
def fresh_first(stage: ModuleStage) -> Script:
    stage.manners.pongs = False
    yield from stage.attached()
    delivery = stage.deliver(message("q-1"))
    assert stage.pinged is not None
    nonce = stage.pinged.header.nonce
    stage.say(emp.PONG, nonce + 1000 if nonce < 2**62 else 0)
    yield from stage.never(
        lambda: stage.replies(delivery.mark, "q-1") or stage.outcome(delivery),
        "it handles before its PING was answered",
    )
    stage.manners.pongs = True
    stage.pong()
    yield from stage.served(delivery, "q-1")


@check(
    "fresh-stalled",
    "9 freshness, 17 rule 21",
    "after a stall longer than its liveness time it handles nothing before a new PING was answered",
    needs=("answers",),
    is_long=True,
)
def fresh_stalled(stage: ModuleStage) -> Script:
    yield from needs_patience(stage)
    yield from stage.attached()
    stage.manners.pongs = False
    mark = stage.mark
    yield from stage.until(lambda: stage.since(mark, "PING/1"), "no PING any more")
    stage.signal("STOP")
    yield from stage.pause(stage.traits.liveness + 0.5)
    mark = stage.mark
    # As if they had lain in its socket since before: the old PONG, and a message.
    stage.pong()
    delivery = stage.deliver(message("q-1"))
    stage.signal("CONT")

    def has_handled() -> object:
        return stage.replies(delivery.mark, "q-1") or stage.outcome(delivery)

    yield from stage.until(
        lambda: has_handled() or stage.since(mark, "PING/1", "HELLO/1"), "neither PING nor HELLO after the stall"
    )
    expect(not has_handled(), "it handles what lay there without asking first")
    yield from stage.never(has_handled, "it handles what lay there before its PING was answered")
    # A module that took the connection for dead said HELLO, and has a new session by now: redeliver there.
    stage.manners.pongs = True
    stage.pong()
    if delivery.session != stage.session:
        delivery = stage.deliver(message("q-1"), flags=emp.EXPECTS_REPLY | emp.REDELIVERED)
    yield from stage.until(lambda: stage.replies(mark, "q-1"), "no reply to q-1 after the PONG")


# --- receiving -----------------------------------------------------------------------------------------


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
    [(seen, reply)] = stage.replies(delivery.mark)
    header: emp.Send = seen.header
    expect(header.destination == ASKER.name, f"the reply goes to {header.destination!r}")
    expect(header.flags & emp.REPLY, "the reply has not the flag REPLY")
    expect(header.priority == 0, f"the reply has priority {header.priority}")
    expect(header.requester == ASKER.incarnation, f"requester is {wire.shown(header.requester)}")
    expect(reply[1] == "q-1" and reply[0] not in ("", "q-1"), f"id {reply[0]!r}, parent {reply[1]!r}")
    expect(hello.name == stage.traits.name, "its name changes")


@check("request-order", "11, 17 rule 28", "the SEND of a reply goes before the ACK of its request", needs=("answers",))
def request_order(stage: ModuleStage) -> Script:
    yield from stage.attached()
    for number in range(1, 6):
        delivery = stage.deliver(message(f"q-{number}"), first=number, floor=number)
        yield from stage.served(delivery, f"q-{number}")
        [(reply, _)] = stage.replies(delivery.mark, f"q-{number}")
        [ack] = stage.acks_of(delivery)[:1]
        expect(stage.record.index(reply) < stage.record.index(ack), "the ACK came before the reply")


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


def _has_replies(stage: ModuleStage, delivery: Delivery) -> Callable[[], object]:
    return lambda: stage.replies(delivery.mark)


def is_same(sent: list[object], reply: list[object]) -> bool:
    """Whether a message comes back with the same content."""
    if sent[9] != reply[9]:
        return False
    if sent[9] != "json":
        return sent[10] == reply[10]
    try:
        return bool(json.loads(bytes(sent[10])) == json.loads(bytes(reply[10])))  # type: ignore[call-overload]
    except ValueError:
        return False


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


# --- frames as others might write them -----------------------------------------------------------------


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
    stage.welcome()
    stage.manners.welcomes = True
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


# --- sending -------------------------------------------------------------------------------------------


@check("sends-on", "10", "settled messages make room for the next ones, numbered on", needs=("sends",))
def sends_on(stage: ModuleStage) -> Script:
    yield from stage.attached()
    yield from stage.sends(3)
    lane = max(stage.own_lanes(), key=lambda lane: lane.last)
    yield from stage.until(
        lambda: (
            lane.floor > 1 or any(floor[2] > 1 for seen in stage.since(0, "PING/1") for floor in seen.header.floors)
        ),
        "the floor does not move",
        4 * stage.settings.soon,
    )


@check(
    "resend-who",
    "10, 17 rule 4",
    "after WELCOME all that is not settled is sent again, in order, before what is new",
    needs=("sends",),
)
def resend_who(stage: ModuleStage) -> Script:
    yield from stage.attached()
    yield from stage.unsettled(2)
    yield from resent_whole(stage, stage.asked_who)


@check(
    "resend-restart",
    "2, 10, 17 rule 13",
    "a new broker at the same endpoint gets all that is not settled",
    needs=("sends",),
)
def resend_restart(stage: ModuleStage) -> Script:
    first = yield from stage.attached()
    yield from stage.unsettled(2)

    def restart() -> Scene[emp.Hello]:
        stage.rebind()
        hello = yield from found_again(stage)
        return hello

    again = yield from resent_whole(stage, restart)
    expect(again.incarnation == first.incarnation, "a reconnect has another incarnation")
    expect(again.generation == stage.generation, f"generation {again.generation}, WELCOME said {stage.generation}")


@check("restart", "9, 17 rule 8", "it finds a new broker at the same endpoint, by itself")
def restart(stage: ModuleStage) -> Script:
    first = yield from stage.attached()
    stage.rebind()
    again = yield from found_again(stage)
    expect(again.incarnation == first.incarnation, "a reconnect has another incarnation")
    yield from stage.left_alone()


def found_again(stage: ModuleStage) -> Scene[emp.Hello]:
    """The HELLO to a new broker: at once where the module watches its connection, else when PONG stays out."""
    allowed = min(stage.traits.liveness, stage.settings.longest) + stage.settings.soon
    hello: emp.Hello = yield from stage.until(lambda: stage.hello, "no HELLO to the new broker", allowed)
    return hello


@check("restart-silent", "9, 17 rule 8", "a broker that has forgotten it and says WHO to its PING gets a HELLO")
def restart_silent(stage: ModuleStage) -> Script:
    yield from stage.attached()
    stage.is_attached = False
    stage.hello = None
    mark = stage.mark
    yield from stage.answer(mark, "no HELLO after the WHO that answered its PING", "HELLO/1")
    yield from stage.left_alone()


def resent_whole(stage: ModuleStage, greet: Callable[[], Scene[emp.Hello]]) -> Scene[emp.Hello]:
    """After another WELCOME everything comes again from the floor, in order, marked, before anything new."""
    wanted = {(lane.destination, lane.priority): (lane.settled + 1, lane.last) for lane in stage.referee.lanes.values()}
    wanted = {key: span for key, span in wanted.items() if span[0] <= span[1]}
    mark = stage.mark
    hello = yield from greet()

    def next_numbers() -> dict[tuple[str, int], int]:
        """How far each lane has come again, without a gap."""
        reached = {key: span[0] - 1 for key, span in wanted.items()}
        for seen in stage.since(mark, "SEND/1"):
            header: emp.Send = seen.header
            key = (header.destination, header.priority)
            if key in reached:
                if header.first > reached[key] + 1:
                    raise Failed(f"lane {key[0]}: {header.first} comes, {reached[key] + 1} is open and did not come")
                reached[key] = max(reached[key], header.first + header.count - 1)
        return reached

    yield from stage.until(
        lambda: all(reached >= wanted[key][1] for key, reached in next_numbers().items()),
        "not all that was not settled came again",
    )
    return hello


@check(
    "resend-part", "10", "what is settled in part is sent again from the batch that holds the floor", needs=("sends",)
)
def resend_part(stage: ModuleStage) -> Script:
    yield from stage.attached()
    lane = yield from stage.unsettled(3)
    floor = lane.settled + 2
    stage.settle(lane, floor - 1)
    yield from stage.pause(0.3)
    mark = stage.mark
    yield from stage.asked_who()
    found = yield from stage.until(
        lambda: [
            seen
            for seen in stage.since(mark, "SEND/1")
            if (seen.header.destination, seen.header.priority) == (lane.destination, lane.priority)
        ],
        "nothing came again",
    )
    header: emp.Send = found[0].header
    expect(header.floor == floor, f"the floor is {header.floor}, settled was up to {floor - 1}")
    expect(header.first <= floor <= header.first + header.count - 1, f"it begins with {header.first}")


@check(
    "settled-senseless",
    "10",
    "SETTLED below the floor, beyond what was sent, or of no lane, is ignored",
    needs=("sends",),
)
def settled_senseless(stage: ModuleStage) -> Script:
    yield from stage.attached()
    lane = yield from stage.unsettled()
    stage.say(emp.SETTLED, lane.destination, lane.priority, 1_000_000)
    stage.say(emp.SETTLED, lane.destination, lane.priority, 0)
    stage.say(emp.SETTLED, "conform-nobody", 3, 5)
    yield from stage.pause(0.3)
    yield from resent_whole(stage, stage.asked_who)


@check(
    "exceptions",
    "8 Of messages, 10",
    "refusals, with reasons it does not know, are taken: the next message has the next number",
    needs=("sends",),
)
def exceptions(stage: ModuleStage) -> Script:
    yield from stage.attached()
    yield from stage.unsettled()
    for lane in stage.own_lanes():
        open_ = range(lane.settled + 1, lane.last + 1)
        stage.settle(lane, None, *((number, "too-odd-for-words", None) for number in open_))
    stage.manners.settles = True
    mark = stage.mark
    yield from stage.sends(1, mark)
    yield from stage.left_alone()


@check("window-messages", "7, 10", "a small window_messages is kept; it sends on when there is room", needs=("sends",))
def window_messages(stage: ModuleStage) -> Script:
    yield from narrowed(stage, (LIMITS[0], 2, *LIMITS[2:]))
    lane: SentLane = yield from stage.until(
        lambda: next((lane for lane in stage.own_lanes() if lane.last - lane.settled >= 2), None),
        "it does not use the window",
        4 * stage.settings.survey + stage.settings.soon,
    )
    yield from stage.never(lambda: lane.last - lane.settled > 2, "more than the window", 2 * stage.settings.quiet)
    mark = stage.mark
    stage.settle(lane)
    yield from stage.sends(1, mark)


@check("window-bytes", "7, 10", "a small window_bytes is kept: an empty lane admits one message", needs=("sends",))
def window_bytes(stage: ModuleStage) -> Script:
    yield from narrowed(stage, (LIMITS[0], LIMITS[1], 1, *LIMITS[3:]))
    lane: SentLane = yield from stage.until(
        lambda: next((lane for lane in stage.own_lanes() if lane.last > lane.settled), None),
        "an empty lane admits no message",
        4 * stage.settings.survey + stage.settings.soon,
    )
    yield from stage.never(lambda: lane.last - lane.settled > 1, "more than the window", 4 * stage.settings.quiet)
    mark = stage.mark
    stage.settle(lane)
    yield from stage.sends(1, mark)


@check("message-limit", "7, 10", "a message larger than WELCOME's message_bytes is not sent", needs=("sends",))
def message_limit(stage: ModuleStage) -> Script:
    # A module that cannot send any more may say so and end.
    yield from narrowed(stage, (8, LIMITS[1], LIMITS[2], LIMITS[3], 1024), may_end=True)
    mark = stage.mark

    def too_large() -> list[Seen]:
        return [seen for seen in stage.own(mark) if max(wire.sizes_of(seen.frames[2]), default=0) > 8]

    yield from stage.never(too_large, "it sends messages of more than 8 bytes", 3 * stage.settings.quiet)


def narrowed(stage: ModuleStage, limits: tuple[int, ...], *, may_end: bool = False) -> Scene[None]:
    """Attach, and then tell narrower limits in a second WELCOME; what was numbered before is let through."""
    yield from stage.attached()
    yield from stage.sends(1)
    stage.may_end = may_end
    stage.limits = limits
    mark = stage.mark
    yield from stage.asked_who()
    yield from stage.until(lambda: stage.since(mark, "PING/1") or stage.status is not None, "no PING after WELCOME")
    # Until it has read WELCOME and SETTLED, what has its number comes.
    yield from stage.pause(0.5)
    stage.settle_all()
    stage.manners.settles = False
    yield from stage.pause(0.2)
    stage.settle_all()
    stage.referee.limits = emp.Limits(*limits)


# --- asking, retaining ---------------------------------------------------------------------------------


def asked(stage: ModuleStage) -> Scene[tuple[str, str]]:
    """Until the module asks something: the request's id, and whom it asks."""
    wait = 4 * stage.settings.survey + stage.settings.soon
    found = yield from stage.whether(
        lambda: [seen for seen in stage.own() if seen.header.flags & emp.EXPECTS_REPLY], wait
    )
    if not found:
        raise NotApplicable(f"it asked nothing within {wait:.0f} s")
    header: emp.Send = found[-1].header
    id = wire.messages_of(found[-1].frames[2])[-1][0]
    return str(id), header.destination.removeprefix("@")


def replied_to(stage: ModuleStage, id: str, name: str, number: int, requester: bytes) -> Delivery:
    more = (None, requester, None, None)
    return stage.deliver(
        message(f"a-{number}", parent=id, operation="response"),
        first=number,
        floor=number,
        sender=other(name),
        priority=0,
        flags=emp.REPLY,
        more=more,
    )


@check(
    "ask",
    "12, 17 rule 28",
    "replies are acknowledged: the first one, a second one, a late one, one for somebody else",
    needs=("asks",),
)
def ask(stage: ModuleStage) -> Script:
    hello = yield from stage.attached()
    id, name = yield from asked(stage)
    expect(id, "the request has no id")
    requesters = (hello.incarnation, hello.incarnation, b"somebody else's.")
    for number, requester in enumerate(requesters, 1):
        delivery = replied_to(stage, id, name, number, requester)
        found = yield from stage.settled(delivery, f"reply {number} to its request")
        expect(not found.exceptions, f"reply {number} is refused: {found.exceptions}")
    late = replied_to(stage, "00000000-0000-0000-0000-000000000000", name, 4, hello.incarnation)
    yield from stage.settled(late, "a reply to a request of long ago")
    yield from stage.left_alone()


@check(
    "ask-and-serve", "11 order, 17 rule 27", "while it waits for a reply it serves requests", needs=("asks", "answers")
)
def ask_and_serve(stage: ModuleStage) -> Script:
    yield from stage.attached()
    yield from asked(stage)
    yield from stage.served(stage.deliver(message("q-1")), "q-1")


@check(
    "retain-again",
    "14, 17 rule 36",
    "to a broker with another epoch the last version of each key is sent again",
    needs=("retains",),
)
def retain_again(stage: ModuleStage) -> Script:
    yield from stage.attached()
    wait = 4 * stage.settings.survey + stage.settings.soon
    found = yield from stage.whether(lambda: [seen for seen in stage.own() if seen.header.flags & emp.RETAIN], wait)
    if not found:
        raise NotApplicable(f"it retained nothing within {wait:.0f} s")
    yield from stage.pause(0.2)  # it is settled by now
    last = {
        (seen.header.destination, seen.header.retain_key): seen.header.retain_counter
        for seen in stage.own()
        if seen.header.flags & emp.RETAIN
    }
    mark = stage.mark
    stage.epoch = b"conform2"
    yield from stage.asked_who()

    def announced() -> bool:
        seen = {
            (each.header.destination, each.header.retain_key): each.header.retain_counter
            for each in stage.own(mark)
            if each.header.flags & emp.RETAIN
        }
        return all((seen.get(key) or -1) >= (counter or 0) for key, counter in last.items())

    yield from stage.until(announced, "the last versions do not come again under a new epoch")


# --- the end -------------------------------------------------------------------------------------------


@check("fenced", "9 FENCED", "FENCED with a generation not below its own ends it, without another word")
def fenced(stage: ModuleStage) -> Script:
    yield from stage.attached()
    stage.may_end = True
    stage.say(emp.FENCED, stage.generation + 1)
    stage.is_attached = False
    stage.manners.asks_strangers = False
    mark = stage.mark
    yield from stage.gone(stage.settings.soon, "it does not exit after FENCED")
    expect(not stage.since(mark, "HELLO/1"), "it says HELLO after FENCED")


@check("fenced-greeting", "9", "FENCED in answer to HELLO ends it as well")
def fenced_greeting(stage: ModuleStage) -> Script:
    yield from stage.attached()
    stage.manners.welcomes = False
    yield from stage.asked_who()
    stage.may_end = True
    stage.say(emp.FENCED, stage.generation)
    yield from stage.gone(stage.settings.soon, "it does not exit after FENCED")


@check("fenced-lower", "9", "FENCED with a generation below its own says nothing")
def fenced_lower(stage: ModuleStage) -> Script:
    yield from stage.attached()
    stage.say(emp.FENCED, stage.generation - 1)
    yield from stage.left_alone()


@check("bye", "9 ending, 19", "SIGTERM ends it within its time, and BYE is its last frame")
def bye(stage: ModuleStage) -> Script:
    yield from stage.attached()
    mark = stage.mark
    stage.signal("TERM")
    status = yield from stage.gone(
        stage.settings.stop, f"it does not end within {stage.settings.stop:.0f} s of SIGTERM"
    )
    # What was on its way when it ended.
    yield from stage.whether(lambda: stage.since(mark, "BYE/1"), 0.5)
    said = stage.since(mark)
    if not any(seen.verb == "BYE/1" for seen in said):
        raise Failed("no BYE" + (": it does not handle SIGTERM" if status == STATUS_OF_TERM else ""))
    expect(said[-1].verb == "BYE/1", f"{said[-1].verb} after BYE")


@check(
    "drain",
    "9 ending, 17 rule 34",
    "after DRAIN it waits for SETTLED of what it has sent, then says BYE",
    needs=("sends",),
)
def drain(stage: ModuleStage) -> Script:
    yield from stage.attached()
    yield from stage.unsettled()
    mark = stage.mark
    stage.signal("TERM")
    yield from stage.until(
        lambda: stage.since(mark, "DRAIN/1", "BYE/1") or stage.status is not None, "neither DRAIN nor BYE"
    )
    if not stage.since(mark, "DRAIN/1"):
        raise NotApplicable("it says BYE without DRAIN, as it may")
    yield from stage.never(lambda: stage.since(mark, "BYE/1"), "it leaves while what it has sent is not settled")
    stage.manners.settles = True
    stage.settle_all()
    yield from stage.gone(stage.settings.stop, "it does not end when all is settled")
    yield from stage.whether(lambda: stage.since(mark, "BYE/1"), 0.5)
    expect(stage.since(mark, "BYE/1"), "no BYE")


@check(
    "drain-within",
    "9 ending",
    "it ends within its time also when nothing is settled any more",
    needs=("sends",),
    is_long=True,
)
def drain_within(stage: ModuleStage) -> Script:
    yield from stage.attached()
    yield from stage.unsettled()
    mark = stage.mark
    stage.signal("TERM")
    yield from stage.gone(stage.settings.stop, f"it does not end within {stage.settings.stop:.0f} s of SIGTERM")
    yield from stage.whether(lambda: stage.since(mark, "BYE/1"), 0.5)
    expect(stage.since(mark, "BYE/1"), "no BYE")


@check("drain-again", "9 ending", "DRAIN is said again after a WELCOME", needs=("sends",))
def drain_again(stage: ModuleStage) -> Script:
    yield from stage.attached()
    yield from stage.unsettled()
    mark = stage.mark
    stage.signal("TERM")
    yield from stage.until(
        lambda: stage.since(mark, "DRAIN/1", "BYE/1") or stage.status is not None, "neither DRAIN nor BYE"
    )
    if not stage.since(mark, "DRAIN/1") or stage.since(mark, "BYE/1"):
        raise NotApplicable("it says BYE without DRAIN, as it may")
    mark = stage.mark
    yield from stage.asked_who()
    yield from stage.until(lambda: stage.since(mark, "DRAIN/1"), "no DRAIN after WELCOME, though it drains")
    stage.manners.settles = True
    stage.settle_all()
    yield from stage.gone(stage.settings.stop, "it does not end")


# --- getting to know it --------------------------------------------------------------------------------


def survey(stage: ModuleStage) -> Script:
    """See what it does: answers, sends, asks, retains. What it shows is in `stage.traits`."""
    hello = yield from stage.attached()
    delivery = stage.deliver(message("q-1", {"survey": 1}))

    def look() -> Traits:
        own = [seen.header for seen in stage.own()]
        replies = [
            reply
            for seen in stage.since(delivery.mark, "SEND/1")
            if seen.header.destination == ASKER.name
            for reply in wire.messages_of(seen.frames[2])
        ]
        return Traits(
            name=hello.name,
            groups=tuple(hello.groups),
            liveness=hello.liveness_ms / 1000,
            answers=bool(replies),
            echoes=any(is_same(message("q-1", {"survey": 1}), reply) for reply in replies),
            sends=any(header.destination != ASKER.name for header in own),
            asks=any(header.flags & emp.EXPECTS_REPLY for header in own),
            retains=any(header.flags & emp.RETAIN for header in own),
        )

    yield from stage.whether(lambda: not look().lacking(("answers", "sends", "asks", "retains")), stage.settings.survey)
    stage.traits = look()


SURVEY: Final = Check("survey", "9", "it comes up and says HELLO", survey)
ALL: Final = (*referee.RULES, *CHECKS)
