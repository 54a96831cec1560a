"""What docs/emp.md demands of a module that sends, asks or retains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from runtime import emp
from runtime.conform import wire
from runtime.conform.module_attaching import found_again
from runtime.conform.module_stage import (
    LIMITS,
    Delivery,
    ModuleStage,
    message,
    other,
)
from runtime.conform.play import Catalogue, Failed, NotApplicable, Scene, Script, Seen, expect
from runtime.conform.referee import SentLane

CHECKS: Final = Catalogue()
check = CHECKS.enter


PATIENT_SECONDS: Final = 0.6
"So long a module that ends waits for SETTLED at least. Not stretched: a second later it may have given up."


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
    yield from stage.unsettled(2, least=1)
    yield from resent_whole(stage, stage.asked_who)


@check(
    "resend-restart",
    "2, 10, 17 rule 13",
    "a new broker at the same endpoint gets all that is not settled",
    needs=("sends",),
)
def resend_restart(stage: ModuleStage) -> Script:
    first = yield from stage.attached()
    yield from stage.unsettled(2, least=1)

    def restart() -> Scene[emp.Hello]:
        stage.rebind()
        hello = yield from found_again(stage)
        return hello

    again = yield from resent_whole(stage, restart)
    expect(again.incarnation == first.incarnation, "a reconnect has another incarnation")
    expect(again.generation == stage.generation, f"generation {again.generation}, WELCOME said {stage.generation}")


def resent_whole(stage: ModuleStage, greet: Callable[[], Scene[emp.Hello]]) -> Scene[emp.Hello]:
    """After another WELCOME everything comes again from the floor, in order, marked, before anything new."""
    wanted = {(lane.destination, lane.priority): (lane.settled + 1, lane.last) for lane in stage.referee.lanes.values()}
    wanted = {key: span for key, span in wanted.items() if span[0] <= span[1]}
    hello = yield from greet()

    def next_numbers() -> dict[tuple[str, int], int]:
        """How far each lane has come again, without a gap."""
        reached = {key: span[0] - 1 for key, span in wanted.items()}
        for seen in stage.since(stage.greeted_at, "SEND/1"):
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
    lane = yield from stage.unsettled(3, least=2)
    floor = lane.settled + 2
    stage.settle(lane, floor - 1)
    yield from stage.pause(0.3)
    yield from stage.asked_who()
    found = yield from stage.until(
        lambda: [
            seen
            for seen in stage.since(stage.greeted_at, "SEND/1")
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
    yield from stage.sends(1, mark, "it sends no more, though there is room")
    yield from stage.left_alone()


@check("window-messages", "7, 10", "a small window_messages is kept; it sends on when there is room", needs=("sends",))
def window_messages(stage: ModuleStage) -> Script:
    yield from narrowed(stage, (LIMITS[0], 2, *LIMITS[2:]))
    lane = yield from stage.unsettled(2)
    yield from stage.never(lambda: lane.last - lane.settled > 2, "more than the window", 2 * stage.settings.quiet)
    mark = stage.mark
    stage.settle(lane)
    yield from stage.sends(1, mark, "it sends no more, though there is room")


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
    yield from stage.sends(1, mark, "it sends no more, though there is room")


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


def asked(stage: ModuleStage) -> Scene[tuple[str, str]]:
    """Until the module asks something: the request's id, and whom it asks."""
    wait = 4 * stage.settings.survey + stage.settings.soon
    found = yield from stage.whether(
        lambda: [seen for seen in stage.own() if seen.header.flags & emp.EXPECTS_REPLY], wait
    )
    if not found:
        raise NotApplicable(f"it asked nothing within {wait:.0f} s")
    header: emp.Send = found[-1].header
    messages = wire.messages_of(found[-1].frames[2])
    expect(messages, "its request holds no message")
    return str(messages[-1][0]), header.destination.removeprefix("@")


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
    wanted = {(seen.header.destination, seen.header.retain_key) for seen in found}
    mark = stage.mark
    stage.epoch = b"conform2"
    yield from stage.asked_who()

    def announced() -> bool:
        """Whether each key's last version came again: its counter a second time, and not as a SEND of before."""
        last: dict[tuple[str, str], int] = {}
        again: set[tuple[str, str]] = set()
        for seen in stage.own():
            header: emp.Send = seen.header
            key = (header.destination, header.retain_key or "")
            if not header.flags & emp.RETAIN:
                continue
            if seen in stage.own(mark) and not header.flags & emp.RESENT and last.get(key) == header.retain_counter:
                again.add(key)
            last[key] = max(last.get(key, 0), header.retain_counter or 0)
        return wanted <= again

    yield from stage.until(announced, "the last versions do not come again under a new epoch")


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
    yield from stage.never(
        lambda: stage.since(mark, "BYE/1"), "it leaves while what it has sent is not settled", PATIENT_SECONDS
    )
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
