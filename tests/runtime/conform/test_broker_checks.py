"""Every check of a broker: our core passes it, and fails it when something on the way breaks the rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgpack
import pytest

from runtime import emp
from runtime.conform import broker_checks
from runtime.conform.play import FAIL, PASS, Check, Result
from runtime.emp import Limits
from runtime.routing import BrokerLimits, RoutingCore
from runtime.routing_state import Feed, Incarnation, Module
from tests.support.theatre import BrokerPlay, Mangler

CHECKS = {check.name: check for check in broker_checks.CHECKS}
LIMITS = BrokerLimits(limits=Limits(window_messages=64, message_bytes=2**20), grace_seconds=0.1)

Said = list[tuple[str, list[bytes]]]


class Saying(Mangler):
    """Changes the headers of one verb that the broker says; None leaves the frame out."""

    def __init__(self, verb: bytes, change: Callable[[list[Any]], list[Any] | None]) -> None:
        super().__init__()
        self._verb = verb
        self._change = change

    def say(self, said: Said) -> Said:
        changed: Said = []
        for end, frames in said:
            if frames[0] == self._verb:
                header = self._change(msgpack.unpackb(frames[1]))
                if header is None:
                    continue
                frames = [frames[0], msgpack.packb(header), *frames[2:]]
            changed.append((end, frames))
        return changed


class Hearing(Mangler):
    """Changes the headers of one verb that the broker hears; None leaves the frame out."""

    def __init__(self, verb: bytes, change: Callable[[list[Any]], list[Any] | None]) -> None:
        super().__init__()
        self._verb = verb
        self._change = change

    def hear(self, end: str, frames: list[bytes]) -> list[list[bytes]]:
        if len(frames) < 2 or frames[0] != self._verb:
            return [frames]
        try:
            header = msgpack.unpackb(frames[1])
        except ValueError:
            return [frames]
        if not isinstance(header, list):
            return [frames]
        changed = self._change(header)
        return [] if changed is None else [[frames[0], msgpack.packb(changed), *frames[2:]]]


class AskingOften(Mangler):
    """WHO for each frame of a stranger."""

    def hear(self, end: str, frames: list[bytes]) -> list[list[bytes]]:
        if frames[0] == emp.HELLO:
            self.memory[end] = True
        elif end not in self.memory:
            self.memory.setdefault("asked", []).append(end)
        return [frames]

    def say(self, said: Said) -> Said:
        asked = self.memory.pop("asked", [])
        return [*said, *((end, emp.encode(emp.WHO, emp.Who(b"e" * 8))) for end in asked)]


class OldAcks(Mangler):
    """Takes an ACK of any session."""

    def say(self, said: Said) -> Said:
        for end, frames in said:
            if frames[0] == emp.WELCOME:
                self.memory[end] = msgpack.unpackb(frames[1])[1]
        return said

    def hear(self, end: str, frames: list[bytes]) -> list[list[bytes]]:
        if frames[0] == emp.ACK and end in self.memory:
            header = msgpack.unpackb(frames[1])
            frames = [frames[0], msgpack.packb([self.memory[end], *header[1:]])]
        return [frames]


class NoReplies(Mangler):
    """DRAIN stops replies as well."""

    def hear(self, end: str, frames: list[bytes]) -> list[list[bytes]]:
        if frames[0] == emp.DRAIN:
            self.memory[end] = True
        return [frames]

    def say(self, said: Said) -> Said:
        return [(end, frames) for end, frames in said if frames[0] != emp.DELIVER or end not in self.memory]


class Swapping(Mangler):
    """Deliveries of one turn the other way round."""

    def say(self, said: Said) -> Said:
        places = [place for place, (_, frames) in enumerate(said) if frames[0] == emp.DELIVER]
        turned = list(said)
        for place, other in zip(places, reversed(places), strict=True):
            turned[place] = said[other]
        return turned


class Delaying(Mangler):
    """Each second DELIVER comes behind the next."""

    def say(self, said: Said) -> Said:
        changed: Said = []
        for end, frames in said:
            held = self.memory.pop("held", None)
            if frames[0] == emp.DELIVER and held is None and msgpack.unpackb(frames[1])[7] % 2 == 0:
                self.memory["held"] = (end, frames)
                continue
            changed.append((end, frames))
            if held is not None:
                changed.append(held)
        return changed


class ExceptionsOnce(Mangler):
    """Tells a refusal one time only."""

    def say(self, said: Said) -> Said:
        changed: Said = []
        for end, frames in said:
            if frames[0] == emp.SETTLED:
                header = msgpack.unpackb(frames[1])
                told = self.memory.setdefault(end, set())
                header[3] = [each for each in header[3] if each[0] not in told]
                told |= {each[0] for each in header[3]}
                frames = [frames[0], msgpack.packb(header)]
            changed.append((end, frames))
        return changed


class OtherBodies(Mangler):
    def say(self, said: Said) -> Said:
        return [
            (end, [*frames[:2], msgpack.packb([*msgpack.unpackb(frames[2]), []])])
            if frames[0] == emp.DELIVER
            else (end, frames)
            for end, frames in said
        ]


class UnmarkedGeneration(Mangler):
    """A HELLO of generation 0 is taken for the newest of all."""

    def hear(self, end: str, frames: list[bytes]) -> list[list[bytes]]:
        if frames[0] == emp.HELLO:
            header = msgpack.unpackb(frames[1])
            self.memory["n"] = self.memory.get("n", 2**50) + 1
            if isinstance(header, list) and len(header) > 3 and header[3] == 0:
                header[3] = self.memory["n"]
                frames = [frames[0], msgpack.packb(header)]
        return [frames]


class Impatient(RoutingCore):
    """A newer process's messages do not wait for the older one's."""

    def _feed(self, sender: Incarnation, module: Module) -> Feed:
        feed = super()._feed(sender, module)
        feed.blocked = False
        return feed


class WholeOverlap(RoutingCore):
    """Takes a whole duplicate for something new."""

    def _on_send(self, peer: Any, sender: Incarnation, header: emp.Send, body: bytes | None, now: float) -> None:
        lane = sender.lanes.get((header.destination, header.priority))
        if lane is not None and header.flags & emp.RESENT:
            lane.last = header.first - 1
        super()._on_send(peer, sender, header, body, now)


def put(place: int, value: Any) -> Callable[[list[Any]], list[Any]]:
    return lambda header: [*header[:place], value, *header[place + 1 :]]


def change(place: int, by: Callable[[Any], Any]) -> Callable[[list[Any]], list[Any]]:
    return lambda header: [*header[:place], by(header[place]), *header[place + 1 :]] if len(header) > place else header


def nothing(header: list[Any]) -> None:
    return None


def without(flag: int) -> Callable[[list[Any]], list[Any]]:
    return change(12, lambda flags: flags & ~flag)


def small_only(header: list[Any]) -> list[Any] | None:
    return header if header[8] < 3 else None


MANGLERS: dict[str, list[Callable[[], Mangler]]] = {
    "welcome": [lambda: Saying(emp.WELCOME, put(1, 7)), lambda: Saying(emp.WELCOME, put(0, b"short"))],
    "hello-again": [
        lambda: Saying(emp.WELCOME, put(1, 7)),
        lambda: Saying(emp.WELCOME, lambda header: [*header[:2], header[1] % 2**40 + 1, *header[3:]]),
    ],
    "pong": [lambda: Saying(emp.PONG, lambda header: [header[0] // 2])],
    "stranger": [AskingOften, lambda: Saying(emp.WHO, nothing)],
    "bad-header": [lambda: Saying(emp.REFUSED, nothing), lambda: Saying(emp.REFUSED, put(0, "version"))],
    "send-flags": [lambda: Saying(emp.REFUSED, nothing)],
    "unknown-verb": [lambda: Saying(emp.REFUSED, put(0, "bad-header"))],
    "trailing-fields": [lambda: Hearing(emp.HELLO, lambda header: header if len(header) <= 9 else None)],
    "name-taken": [UnmarkedGeneration],
    "fenced": [lambda: Saying(emp.FENCED, nothing), lambda: Saying(emp.FENCED, put(0, 1))],
    "silent": [lambda: Hearing(emp.HELLO, put(4, 60_000)), lambda: Saying(emp.FENCED, nothing)],
    "late": [lambda: Saying(emp.WELCOME, put(4, False)), lambda: Saying(emp.WELCOME, put(4, True))],
    "deliver": [OtherBodies, lambda: Saying(emp.DELIVER, put(2, "somebody")), lambda: Saying(emp.DELIVER, put(0, 9))],
    "order": [Delaying],
    "refusals": [lambda: Saying(emp.SETTLED, put(3, []))],
    "unroutable": [lambda: Saying(emp.SETTLED, put(3, []))],
    "too-large": [lambda: Saying(emp.SETTLED, put(3, []))],
    "gap": [lambda: Saying(emp.WHO, nothing)],
    "overlap": [lambda: Saying(emp.DELIVER, lambda header: [*header[:9], header[7], *header[10:]])],
    "ack-session": [OldAcks],
    "ack-beyond": [lambda: Saying(emp.REFUSED, nothing)],
    "redelivered": [lambda: Saying(emp.DELIVER, without(emp.REDELIVERED)), lambda: Saying(emp.DELIVER, put(11, []))],
    "resent": [lambda: Saying(emp.DELIVER, without(emp.REDELIVERED))],
    "settled-again": [ExceptionsOnce, lambda: Hearing(emp.PING, lambda header: header[:2])],
    "expired": [lambda: Hearing(emp.SEND, lambda header: header[:6])],
    "prefetch": [lambda: Hearing(emp.HELLO, put(6, 2048))],
    "prefetch-large": [lambda: Saying(emp.DELIVER, small_only)],
    "priorities": [Swapping],
    "overflow": [lambda: Saying(emp.WELCOME, change(5, lambda limits: [limits[0], 16, limits[2], 16, limits[4]]))],
    "incarnations": [],
    "poison": [lambda: Saying(emp.SETTLED, change(3, lambda refused: [[each[0], "gone", None] for each in refused]))],
    "group": [lambda: Saying(emp.SETTLED, change(3, lambda refused: [[*each[:2], None] for each in refused]))],
    "group-lane": [lambda: Saying(emp.DELIVER, put(1, 1))],
    "request": [lambda: Saying(emp.DELIVER, put(14, None))],
    "reply-gone": [lambda: Saying(emp.SETTLED, put(3, []))],
    "reply-passes": [NoReplies, lambda: Hearing(emp.DRAIN, nothing)],
    "group-request": [lambda: Saying(emp.SETTLED, put(4, []))],
    "drain": [lambda: Hearing(emp.DRAIN, nothing)],
    "bye": [lambda: Hearing(emp.BYE, lambda header: [False])],
    "retained": [
        lambda: Saying(emp.DELIVER, without(emp.FROM_STORE)),
        lambda: Saying(emp.DELIVER, change(16, lambda version: version and [version[0], 1])),
    ],
    "admin": [lambda: Saying(emp.ADMIN, put(0, 1))],
}
"check → what makes a broker fail it"

CORES: dict[str, list[Callable[[], RoutingCore]]] = {
    "overlap": [lambda: core(WholeOverlap)],
    "incarnations": [lambda: core(Impatient)],
}
"The same where it is the core that is another."


def core(kind: type[RoutingCore] = RoutingCore, limits: BrokerLimits = LIMITS) -> RoutingCore:
    return kind(epoch=b"e" * 8, session_base=1 << 24, clock_ms=1000, now=0.0, limits=limits)


def verdict(check: Check, mangler: Mangler | None = None, other: RoutingCore | None = None) -> Result:
    result = BrokerPlay(check, other or core(), mangler).play.result
    assert result is not None
    return result


@pytest.mark.parametrize("check", [broker_checks.SURVEY, *broker_checks.CHECKS], ids=lambda check: check.name)
def test_our_core_passes(check: Check) -> None:
    result = verdict(check)
    assert result.outcome == PASS, (result.why, *result.frames)


@pytest.mark.parametrize(
    ("name", "place"), [(name, place) for name, makers in MANGLERS.items() for place in range(len(makers))]
)
def test_a_broker_whose_frames_are_wrong_fails(name: str, place: int) -> None:
    result = verdict(CHECKS[name], MANGLERS[name][place]())
    assert result.outcome == FAIL
    assert result.frames


@pytest.mark.parametrize(
    ("name", "place"), [(name, place) for name, makers in CORES.items() for place in range(len(makers))]
)
def test_a_broker_that_decides_otherwise_fails(name: str, place: int) -> None:
    assert verdict(CHECKS[name], other=CORES[name][place]()).outcome == FAIL


def test_every_check_has_a_broker_that_fails_it() -> None:
    assert set(MANGLERS) == set(CHECKS)
    assert all(MANGLERS[name] or CORES.get(name) for name in CHECKS)
