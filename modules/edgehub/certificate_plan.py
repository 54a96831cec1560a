"""When the node's certificate is asked for, renewed, or complained about. A core.

What is in the files comes in (`saw`), with the clock: `now` is monotonic and for pauses, `wall` is seconds since 1970
and for validity, since it may be set at any time. `step` says what to do, `next_look` when to come again.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import Enum
from typing import Final

from runtime.backoff import Backoff
from runtime.enrolment import BAD_CERTIFICATE, PASSING, RotationSchedule, show_time

ALARM_SECONDS: Final = 30 * 86_400.0
"Weeks before the end: renewing may need a person."
_SHORT_LIFE_SECONDS: Final = 7 * 86_400.0
_ALARM_SHARE: Final = 0.1
"Certificates of a week are renewed by the day: of them only the last tenth is alarming."

_LOOK_SECONDS: Final = 60.0
_LOOK_ANXIOUSLY_SECONDS: Final = 5.0
"While there is no usable certificate: somebody may be laying one."
_SHORTEST_LOOK_SECONDS: Final = 0.05
_REST_SECONDS: Final = 1.0
"Between a certificate and the next, at the least."
_CAP_SECONDS: Final = 60.0
_LASTING_FIRST_SECONDS: Final = 10.0
_LASTING_CAP_SECONDS: Final = 300.0
"For refusals that do not pass by themselves: the clock or the token has to be set right."


class Standing(Enum):
    MISSING = "missing"
    BROKEN = "broken"
    OTHER_NODE = "other-node"
    NOT_YET_VALID = "not-yet-valid"
    VALID = "valid"
    EXPIRED = "expired"


class Step(Enum):
    JOIN = "join"
    RENEW = "renew"


@dataclass(frozen=True, slots=True)
class Seen:
    """What the files are worth at the moment."""

    standing: Standing
    why: str = ""
    "What is wrong, in words; empty for a valid one."
    not_before: float = 0.0
    "Seconds since 1970; 0 where there is no certificate to read it in."
    not_after: float = 0.0


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why the last try failed."""

    code: str
    text: str
    wall: float


class CertificatePlan:
    """Chance is handed in. Of refusals the last is kept until a try succeeds or the files are right."""

    def __init__(self, chance: random.Random, *, has_token: bool, may_renew: bool) -> None:
        self._chance = chance
        self._has_token = has_token
        self._may_renew = may_renew
        self._passing = Backoff(chance, cap_seconds=_CAP_SECONDS)
        self._lasting = Backoff(chance, cap_seconds=_LASTING_CAP_SECONDS, first_seconds=_LASTING_FIRST_SECONDS)
        self._failures = 0
        self._try_at = float("-inf")
        self._schedule: RotationSchedule | None = None
        self.seen = Seen(Standing.MISSING)
        self.refusal: Refusal | None = None

    @property
    def rotation_due(self) -> float | None:
        """Seconds since 1970; None where nothing is renewed."""
        return self._schedule.due if self._schedule is not None and self._may_renew else None

    @property
    def _may_join(self) -> bool:
        # Files that are there and wrong are the operator's; who laid them had something in mind.
        return self._has_token and self.seen.standing in (Standing.MISSING, Standing.EXPIRED)

    # --- what happens --------------------------------------------------------------------------

    def saw(self, seen: Seen) -> None:
        """The files were looked at."""
        is_new = (seen.not_before, seen.not_after) != (self.seen.not_before, self.seen.not_after)
        if is_new or seen.standing is not self.seen.standing:
            self._forget_failures()
        self.seen = seen
        if not seen.not_after:
            self._schedule = None
        elif is_new:
            self._schedule = RotationSchedule(self._chance, not_before=seen.not_before, not_after=seen.not_after)

    def step(self, *, now: float, wall: float) -> Step | None:
        """What is to be done at once; then report `refused`, or look at the files and report `issued`."""
        if now < self._try_at:
            return None
        if self._may_join:
            return Step.JOIN
        due = self.rotation_due
        return Step.RENEW if self.seen.standing is Standing.VALID and due is not None and wall >= due else None

    def issued(self, *, now: float, wall: float) -> None:
        """A try succeeded, and the files were looked at since.

        A certificate that is of no use all the same, or for a second only, must not be asked for without pause.
        """
        if self.seen.standing in (Standing.VALID, Standing.NOT_YET_VALID):
            self._try_at = now + _REST_SECONDS
        else:
            self.refused(
                BAD_CERTIFICATE, f"a certificate was issued and is of no use: {self.seen.why}", now=now, wall=wall
            )

    def refused(self, code: str, text: str, *, now: float, wall: float) -> None:
        """It came to nothing."""
        self.refusal = Refusal(code, text, wall)
        if self.seen.standing is Standing.VALID and self._schedule is not None:
            pause = self._schedule.failed()
        else:
            pause = (self._passing if code in PASSING else self._lasting).delay(self._failures)
            self._failures += 1
        self._try_at = now + pause

    def next_look(self, *, now: float, wall: float) -> float:
        """Seconds until the files, or the time, should be looked at again."""
        is_valid = self.seen.standing is Standing.VALID
        pauses = [_LOOK_SECONDS if is_valid else _LOOK_ANXIOUSLY_SECONDS]
        if is_valid and (due := self.rotation_due) is not None:
            pauses.append(max(due - wall, self._try_at - now))
        elif self._may_join:
            pauses.append(self._try_at - now)
        for at in (self.seen.not_before, self.seen.not_after):
            if at > wall:
                pauses.append(at - wall + _SHORTEST_LOOK_SECONDS)
        return max(min(pauses), _SHORTEST_LOOK_SECONDS)

    def _forget_failures(self) -> None:
        self._failures = 0
        self._try_at = float("-inf")
        self.refusal = None

    # --- words -----------------------------------------------------------------------------------

    def joining(self) -> str | None:
        """What an operator reads while there is no certificate to dial with, or none that is valid."""
        if not self._may_join:
            return None
        if self.refusal is None:
            return "joining: asking the cloud for a certificate"
        return f"joining: {self.refusal.text}"

    def warning(self, *, wall: float) -> str | None:
        """What is wrong, or soon will be, with the certificate; None: nothing."""
        seen = self.seen
        if seen.standing is not Standing.VALID:
            if self._may_join:
                return self.joining()
            return f"{seen.why}. Lay valid files there, or join with a token (edgezmq join): they are noticed"
        left = seen.not_after - wall
        lifetime = seen.not_after - seen.not_before
        is_short = self._may_renew and lifetime <= _SHORT_LIFE_SECONDS
        if left > (_ALARM_SHARE * lifetime if is_short else ALARM_SECONDS) and self.refusal is None:
            return None
        text = f"the certificate expires in {show_span(left)} ({show_time(seen.not_after)})"
        if not self._may_renew:
            return f"{text}, and modules.edgeHub.rotateCertificates is off: renew it (edgezmq join)"
        if self.refusal is not None:
            return f"{text}, and is not renewed: {self.refusal.text}"
        return f"{text} and is to be renewed {show_time(self.rotation_due or 0.0)}"


def show_span(seconds: float) -> str:
    """A length of time for people: 29 days, 5 hours, 30 s."""
    for size, name in ((86_400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{int(seconds // size)} {name}"
    return f"{max(0, int(seconds))} s"
