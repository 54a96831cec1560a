"""Every check of a module: a puppet that keeps all rules passes it, one that breaks the rule does not."""

from __future__ import annotations

import functools
import random

import pytest

from runtime import emp
from runtime.conform import module_checks
from runtime.conform.module_stage import Traits
from runtime.conform.play import FAIL, NOT_APPLICABLE, PASS, Check, Result
from runtime.conform.referee import RULES
from runtime.conform.shell import judge
from tests.support.puppet import Puppet
from tests.support.theatre import ModulePlay

CHECKS = {check.name: check for check in module_checks.ALL}
SCRIPTED = [check for check in module_checks.ALL if check.script is not None]

FAULTS = {
    # standing rules, seen in any play
    "float-counter": ["frames"],
    "own-routing-id": ["routing-id"],
    "first-frame-ping": ["hello-first"],
    "sends-in-greeting": ["greeting"],
    "gap": ["numbers"],
    "floor-too-high": ["floor"],
    "resent-unmarked": ["resent", "reply-resent"],
    "resent-changed": ["unchanged"],
    "window-ignored": ["window", "window-messages"],
    "limit-ignored": ["sizes", "message-limit"],
    "body-longer": ["bodies"],
    "reply-to-group": ["replies"],
    "counter-falls": ["retained"],
    "ack-beyond": ["acks"],
    "nonce-again": ["nonces"],
    # attaching
    "same-incarnation": ["hello"],
    "generation-first": ["hello", "hello-repeated"],
    "hello-once": ["hello-repeated", "name-taken", "refused-other"],
    "hello-flood": ["hello-repeated", "who-greeting"],
    "generation-forgotten": ["welcome-generation"],
    "new-incarnation-on-who": ["welcome-generation"],
    "old-welcome-taken": ["welcome-old"],
    "new-welcome-ignored": ["welcome-again"],
    "who-ignored": ["who", "restart-silent"],
    "who-while-greeting": ["who-greeting"],
    "name-taken-exits": ["name-taken", "name-taken-long"],
    "name-taken-for-ever": ["name-taken-long"],
    "denied-ignored": ["refused-denied"],
    "version-ignored": ["refused-version"],
    "too-many-ignored": ["refused-too-many"],
    "bad-header-exits": ["refused-other"],
    "ping-late": ["ping-first"],
    "ping-slow": ["ping-heartbeat", "ping-liveness"],
    "ping-only-heartbeat": ["ping-liveness"],
    "pong-not-missed": ["pong-missing"],
    "not-fresh": ["fresh-first", "fresh-stalled"],
    "any-pong": ["fresh-first"],
    "stale-pong": ["fresh-stalled"],
    "no-reconnect": ["restart", "resend-restart"],
    "new-incarnation-on-reconnect": ["restart", "resend-restart"],
    "fenced-ignored": ["fenced", "fenced-greeting"],
    "fenced-lower-exits": ["fenced-lower"],
    "no-bye": ["bye"],
    # receiving
    "no-outcome": ["outcome", "group"],
    "reply-to-nobody": ["request"],
    "replies-twice": ["request", "request-order", "batch"],
    "ack-first": ["request-order"],
    "content-ascii": ["reply-content"],
    "floors-untold": ["reply-settled"],
    "replies-not-resent": ["reply-resent"],
    "batch-first-only": ["batch"],
    "from-ignored": ["batch-from"],
    "void-ignored": ["void"],
    "duplicates-handled": ["duplicate", "redelivered"],
    "duplicates-unanswered": ["duplicate"],
    "old-lane-number": ["redelivered"],
    "reasons-own": ["refused-again"],
    "failures-forgotten": ["refused-again"],
    "overtaken-handled": ["overtaken"],
    "floor-ignored": ["floor-moves"],
    "lanes-by-sender": ["lanes"],
    "old-session-acked": ["session-old"],
    "fenced-sender-handled": ["fenced-sender"],
    "store-fenced": ["store-lane"],
    "versions-ignored": ["retained-versions"],
    "group-unacked": ["group"],
    "small-frames": ["large"],
    "strict-header": ["trailing-fields"],
    "all-fields": ["defaults"],
    "narrow": ["wide"],
    "dies-of-unknown": ["unknown-verbs"],
    "senseless-handled": ["deliver-senseless"],
    # sending
    "sends-stop": ["exceptions"],
    "floor-stuck": ["resend-part", "sends-on"],
    "resend-skips": ["resend-who", "resend-restart", "settled-senseless"],
    "settled-believed": ["settled-senseless"],
    "exceptions-stop": ["exceptions"],
    "window-bytes-ignored": ["window-bytes"],
    "empty-lane-closed": ["window-bytes"],
    "late-replies-refused": ["ask"],
    "busy-asking": ["ask-and-serve"],
    "retain-once": ["retain-again"],
    "drain-leaves": ["drain"],
    "drain-for-ever": ["drain-within"],
    "drain-once": ["drain-again"],
}
"fault of the puppet → checks that it fails"


@functools.cache
def whole() -> Traits:
    """What a puppet without fault shows of itself."""
    survey = ModulePlay(module_checks.SURVEY).play
    assert survey.result is not None
    assert survey.result.outcome == PASS
    traits: Traits = survey.stage.traits
    return traits


def verdict(name: str, fault: str = "") -> Result:
    """A check's verdict on a puppet; a standing rule's after the plays that are likely to show it."""
    check = CHECKS[name]
    faults = [fault] if fault else []
    if check.script is None:
        stages = []
        for other in SCRIPTED:
            stages.append(ModulePlay(other, faults, whole()).play.stage)
            if stages[-1].referee.findings[name].fault:
                break
        return judge(check, stages)
    result = ModulePlay(check, faults, whole()).play.result
    assert result is not None
    return result


def test_a_puppet_shows_everything() -> None:
    traits = whole()
    assert not traits.lacking(("answers", "echoes", "sends", "asks", "retains", "groups"))


@pytest.mark.parametrize("check", SCRIPTED, ids=lambda check: check.name)
def test_a_module_that_keeps_all_rules_passes(check: Check) -> None:
    play = ModulePlay(check, (), whole()).play
    assert play.result is not None
    assert play.result.outcome == PASS, (play.result.why, *play.result.frames)
    faults = {name: found.fault for name, found in play.stage.referee.findings.items() if found.fault}
    assert not faults


@pytest.mark.parametrize("freedom", ["bye-only", "void-told", "ping-anyhow"])
def test_what_the_page_leaves_free_fails_nothing(freedom: str) -> None:
    for check in SCRIPTED:
        play = ModulePlay(check, [freedom], whole()).play
        assert play.result is not None
        assert play.result.outcome in (PASS, NOT_APPLICABLE), (check.name, play.result.why, *play.result.frames)
        assert not any(found.fault for found in play.stage.referee.findings.values())


class Crossing(Puppet):
    """Its timer has just said HELLO once more when the first WELCOME comes in."""

    def receive(self, frames: list[bytes], now: float) -> None:
        if frames[0] == emp.WELCOME and not self.generation:
            self.greet(now)
        super().receive(frames, now)


@pytest.mark.parametrize("name", ["hello-repeated", "who-greeting", "name-taken", "refused-other"])
def test_a_hello_that_crosses_its_welcome_fails_nothing(name: str) -> None:
    play = ModulePlay(CHECKS[name], (), whole(), Crossing).play
    assert play.result is not None
    assert play.result.outcome == PASS, (play.result.why, *play.result.frames)
    assert not any(found.fault for found in play.stage.referee.findings.values())


class Monkey(Puppet):
    """Says anything at any time."""

    def __init__(self, seed: int, incarnation: bytes) -> None:
        super().__init__((), incarnation)
        self.random = random.Random(seed)

    def receive(self, frames: list[bytes], now: float) -> None:
        super().receive(frames, now)
        said = list(self.out)
        for _ in range(self.random.choice((0, 0, 0, 1, 2))):
            verb = self.random.choice(sorted(emp.VERBS))
            shape = self.random.choice(said or [[emp.PING, b"\x91\x01"]])
            header = self.random.choice((shape[1], b"\x90", b"\xc1", b"\x93\x01\x01\x90", b"\xa1x"))
            body = self.random.choice(([], shape[2:], [b"\x91\x01"], [b"\x91\x91\xa1q"], [b"\xc1"]))
            self.out.append([self.random.choice((verb, shape[0])), header, *body])


@pytest.mark.parametrize("seed", range(3))
def test_whatever_a_module_says_the_runner_comes_to_a_verdict(seed: int) -> None:
    for check in SCRIPTED:
        play = ModulePlay(check, (), whole(), lambda _, incarnation: Monkey(seed, incarnation)).play
        assert play.result is not None


def test_every_standing_rule_has_something_to_judge() -> None:
    plays = [ModulePlay(check, (), whole()).play for check in SCRIPTED]
    for rule in RULES:
        assert any(play.stage.referee.findings[rule.name].exercised for play in plays), rule.name


@pytest.mark.parametrize(
    ("fault", "name"), [(fault, name) for fault, names in FAULTS.items() for name in names], ids=lambda text: text
)
def test_a_module_that_breaks_the_rule_fails_the_check(fault: str, name: str) -> None:
    result = verdict(name, fault)
    assert result.outcome == FAIL
    assert result.why
    assert result.frames


def test_every_check_has_a_fault_that_fails_it() -> None:
    assert {name for names in FAULTS.values() for name in names} == set(CHECKS)
