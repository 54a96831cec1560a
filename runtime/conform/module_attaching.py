"""What docs/emp.md demands of every module: to come in, to stay, to be fresh, to leave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from runtime import emp
from runtime.conform.module_stage import (
    HEARTBEAT_MS,
    STATUS_OF_TERM,
    ModuleStage,
    message,
)
from runtime.conform.play import Catalogue, Failed, NotApplicable, Scene, Script, expect

CHECKS: Final = Catalogue()
check = CHECKS.enter


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
    yield from calm(stage, 0, seen[0].at)
    yield from welcomed(stage)


def calm(stage: ModuleStage, mark: int, began: float) -> Scene[None]:
    """HELLO is repeated by its timer of 0.5 s, not much quicker."""
    yield from stage.pause(max(0.0, began + 1.5 - stage.now))
    elapsed = stage.now - began  # more than was asked for, when this machine is slow
    count = len(stage.since(mark, "HELLO/1"))
    expect(count <= 3 + elapsed / 0.3, f"{count} HELLOs within {elapsed:.1f} s; 0.5 s apart is told")


def welcomed(stage: ModuleStage) -> Scene[None]:
    """WELCOME at last. A HELLO of the timer may cross it on its way: a broker answers that as well."""
    stage.manners.welcomes = True
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
    yield from calm(stage, mark, stage.now)
    yield from welcomed(stage)


@check("name-taken", "8 Of frames, 9", "REFUSED `name-taken` does not end it: HELLO is repeated")
def name_taken(stage: ModuleStage) -> Script:
    if stage.traits.liveness < 2.5:
        raise NotApplicable("its liveness time is too short to see it try again")
    stage.manners.welcomes = False
    yield from stage.greeted()
    for _ in range(3):
        mark = stage.mark
        stage.say(emp.REFUSED, "name-taken", "held by somebody")
        yield from stage.answer(mark, "HELLO is not repeated after `name-taken`", "HELLO/1")
    yield from welcomed(stage)


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
    yield from welcomed(stage)
    for code in ("unknown-verb", "bad-header", "name-taken"):
        stage.say(emp.REFUSED, code, "the scripted broker did not like it")
    yield from stage.left_alone()


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
    allowed = 2 * wanted * HEARTBEAT_MS / 1000 + stage.settings.soon / 4
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
    allowed = stage.traits.liveness / 3 * 2 + stage.settings.soon / 4
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
    yield from stage.answer(
        mark, "no HELLO after the WHO that answered its PING", "HELLO/1", within=stage.before_liveness
    )
    yield from stage.left_alone()


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
