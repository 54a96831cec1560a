"""How a script is driven: it waits, goes on, fails, and time is what it is told."""

from __future__ import annotations

from typing import Any

import pytest

from runtime import emp
from runtime.conform import play as playing
from runtime.conform import wire
from runtime.conform.play import (
    FAIL,
    NOT_APPLICABLE,
    PASS,
    Catalogue,
    Check,
    Failed,
    NotApplicable,
    Play,
    Script,
    Settings,
    Stage,
    Tell,
    expect,
)


class Bare(Stage):
    reads = wire.FROM_MODULE
    writes = wire.FROM_BROKER


def begun(script: Any) -> Play:
    return Play(Check("name", "9", "says", script), Bare(Settings()), 50.0)


PING = [emp.PING, wire.packed(7)]


def test_a_script_that_ends_has_passed() -> None:
    def script(stage: Bare) -> Script:
        stage.tell("a", emp.PONG, wire.packed(1))
        yield from ()

    play = begun(script)
    assert play.result is not None
    assert play.result.outcome == PASS
    assert play.stage.actions == [Tell("a", (emp.PONG, wire.packed(1)))]
    assert play.result.frames == ("  0.000 > PONG/1 nonce=1",)


def test_it_goes_on_when_what_it_waits_for_has_come() -> None:
    def script(stage: Bare) -> Script:
        seen = yield from stage.answer(0, "no PING", "PING/1", end="a", within=3.0)
        expect(seen.header.nonce == 7, "another nonce")
        assert seen.at == 2.0

    play = begun(script)
    play.expire(51.0)
    play.receive("b", PING, 51.5)
    assert play.result is None
    assert play.deadline() == 53.0
    play.receive("a", PING, 52.0)
    assert play.result is not None
    assert play.result.outcome == PASS


def test_what_does_not_come_in_time_is_a_failure() -> None:
    def script(stage: Bare) -> Script:
        yield from stage.until(lambda: stage.since(0, "PING/1"), "no PING")

    play = begun(script)
    play.expire(54.9)
    assert play.result is None
    play.expire(55.0)
    assert play.result is not None
    assert (play.result.outcome, play.result.why, play.result.seconds) == (FAIL, "no PING", 5.0)


def test_what_must_not_come_is_a_failure_when_it_does() -> None:
    def script(stage: Bare) -> Script:
        yield from stage.never(lambda: stage.since(0, "PING/1"), "a PING")

    quiet, loud = begun(script), begun(script)
    quiet.expire(50.6)
    loud.receive("a", PING, 50.1)
    assert [each.result.outcome for each in (quiet, loud) if each.result] == [PASS, FAIL]


def test_what_may_stay_out_gives_none() -> None:
    def script(stage: Bare) -> Script:
        found = yield from stage.whether(lambda: stage.since(0, "PING/1"), 1.0)
        assert found is None
        raise NotApplicable("it does not")

    play = begun(script)
    play.expire(51.0)
    assert play.result is not None
    assert (play.result.outcome, play.result.why) == (NOT_APPLICABLE, "it does not")


def test_a_condition_that_fails_by_itself_is_a_failure() -> None:
    def look() -> object:
        raise Failed("wrong as it stands")

    def script(stage: Bare) -> Script:
        yield from stage.until(look, "nothing")

    play = begun(script)
    play.expire(50.1)
    assert play.result is not None
    assert play.result.why == "wrong as it stands"
    play.receive("a", PING, 50.2)
    play.ended(0, 50.3)  # what comes later changes nothing


def test_malformed_frames_are_recorded_and_not_found() -> None:
    def script(stage: Bare) -> Script:
        yield from stage.pause(1.0)
        assert not stage.since(0)
        assert len(stage.record) == 3

    play = begun(script)
    for frames in ([b"NEWS/1", b"\x90"], [], [emp.PING, b"\xc1"]):
        play.receive("a", frames, 50.1)
    play.expire(51.0)
    assert play.result is not None
    assert play.result.outcome == PASS


def test_who_never_stops_talking_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(playing, "MAX_SEEN", 30)

    def script(stage: Bare) -> Script:
        yield from stage.pause(100.0)

    play = begun(script)
    for _ in range(31):
        play.receive("a", PING, 50.1)
    assert play.result is not None
    assert play.result.why == "more than 30 frames"
    assert play.result.frames[0].strip() == "… 16 earlier"
    assert len(play.result.frames) == playing.SHOWN_FRAMES + 1


def test_checks_are_entered_in_order() -> None:
    catalogue = Catalogue()

    @catalogue.enter("first", "9", "says", needs=("sends",), is_long=True)
    def _first(stage: Bare) -> Script:
        yield from ()

    assert [(check.name, check.needs, check.is_long) for check in catalogue] == [("first", ("sends",), True)]
