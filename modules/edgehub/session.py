"""LinkSession: when to dial, greet, count as connected, give up, dial again.

CloudHub leaves a connection that it rejected open, answers its pings and takes its uploads, but never sends
it anything. So a link is greeted with a query that only a session answers. An answer, or anything else from
the cloud, proves the link (`served`). No answer means rejected, or a CloudHub older than 1.17, which does not
know the query: the link is closed and the next endpoint tried, and after three such dials it is kept
as `unproven` (docs/cloudlink.md, Zombies).

                  DialDue            Opened               Proven
        CLOSED ------------> DIALLING ------> GREETING -------------> SERVED
          ^  ^                  |                | \\                    ^
          |  |      Failed      |    GreetingOver|  \\ GreetingOver      | Proven
          |  +------------------+    (1st, 2nd)  |   \\ (3rd)            |
          |                                      |    +---> UNPROVEN ---+
          +--------------------------------------+              | Lost, RedialDue
          +-----------------------------------------------------+
        StopWanted leads to DRAINING from SERVED and UNPROVEN, else to STOPPED.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final, assert_never

from modules.edgehub.config import Endpoint
from runtime.backoff import Backoff

UNANSWERED_DIALS: Final = 3
"After so many dials in a row whose greeting was not answered the link is kept as unproven."


class LinkState(Enum):
    CLOSED = "closed"
    DIALLING = "dialling"
    GREETING = "greeting"
    SERVED = "served"
    UNPROVEN = "unproven"
    DRAINING = "draining"
    STOPPED = "stopped"


# --- events ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DialDue:
    """The pause is over (from `expire`), or somebody wants the dial now."""


@dataclass(frozen=True, slots=True)
class Opened:
    """TCP, TLS and the upgrade are done."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The dial did not lead to a link."""

    why: str


@dataclass(frozen=True, slots=True)
class Lost:
    """The link that was open is gone, whoever ended it."""

    why: str


@dataclass(frozen=True, slots=True)
class Proven:
    """A message came from the cloud."""


@dataclass(frozen=True, slots=True)
class GreetingOver:
    """The greeting's time is over (from `expire`)."""


@dataclass(frozen=True, slots=True)
class RedialDue:
    """An unproven link has lived long enough (from `expire`)."""


@dataclass(frozen=True, slots=True)
class StopWanted:
    """The process is to end: finish what is under way."""


@dataclass(frozen=True, slots=True)
class Drained:
    """Nothing is under way any more, or the time for it is over."""


Event = DialDue | Opened | Failed | Lost | Proven | GreetingOver | RedialDue | StopWanted | Drained

# --- actions ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Dial:
    endpoint: Endpoint


@dataclass(frozen=True, slots=True)
class Greet:
    """Send the first keepalive and the greeting query."""


@dataclass(frozen=True, slots=True)
class Keepalive:
    """Send a keepalive message."""


@dataclass(frozen=True, slots=True)
class Announce:
    """Tell the node's modules whether the cloud can be reached."""

    is_connected: bool


@dataclass(frozen=True, slots=True)
class Hangup:
    """Close the link; the task that reads it then reports `Lost`."""

    why: str


@dataclass(frozen=True, slots=True)
class Drain:
    """Take nothing new for the cloud, wait for what is under way, then report `Drained`."""


@dataclass(frozen=True, slots=True)
class Finished:
    """Nothing more will come."""


Action = Dial | Greet | Keepalive | Announce | Hangup | Drain | Finished

_S = LinkState
_NEXT: Final[Mapping[tuple[LinkState, type[Event]], LinkState]] = {
    (_S.CLOSED, DialDue): _S.DIALLING,
    (_S.CLOSED, StopWanted): _S.STOPPED,
    (_S.DIALLING, Opened): _S.GREETING,
    (_S.DIALLING, Failed): _S.CLOSED,
    (_S.DIALLING, StopWanted): _S.STOPPED,
    (_S.GREETING, Proven): _S.SERVED,
    # GreetingOver: UNPROVEN after three, else it stays until the Hangup is reported as Lost.
    (_S.GREETING, GreetingOver): _S.UNPROVEN,
    (_S.GREETING, Lost): _S.CLOSED,
    (_S.GREETING, StopWanted): _S.STOPPED,
    (_S.SERVED, Proven): _S.SERVED,
    (_S.SERVED, Lost): _S.CLOSED,
    (_S.SERVED, StopWanted): _S.DRAINING,
    (_S.UNPROVEN, Proven): _S.SERVED,
    (_S.UNPROVEN, Lost): _S.CLOSED,
    (_S.UNPROVEN, RedialDue): _S.UNPROVEN,
    (_S.UNPROVEN, StopWanted): _S.DRAINING,
    (_S.DRAINING, Proven): _S.DRAINING,
    (_S.DRAINING, Lost): _S.STOPPED,
    (_S.DRAINING, Drained): _S.STOPPED,
}


class IllegalMove(Exception):
    """An event that the state has no move for: a fault of the shell, never of the cloud."""


class LinkSession:
    """Events in, actions out; opens nothing, reads no clock.

    `receive` takes what happened, `expire` what the clock brings; `next_deadline` says when to call it.
    """

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        backoff: Backoff,
        *,
        heartbeat_seconds: float,
        greeting_seconds: float,
        stable_seconds: float,
        unproven_redial_seconds: float,
        now: float,
    ) -> None:
        self._endpoints = endpoints
        self._backoff = backoff
        self._heartbeat_seconds = heartbeat_seconds
        self._greeting_seconds = greeting_seconds
        self._stable_seconds = stable_seconds
        self._unproven_redial_seconds = unproven_redial_seconds
        self._state = LinkState.CLOSED
        self._why = "starting"
        self._since = now
        self._failures = 0  # in a row, without a stable link between them
        self._unanswered = 0  # greetings in a row
        self._turn = 0  # of the endpoints
        self._dial_at: float | None = now
        self._opened_at = now
        self._greeting_due: float | None = None
        self._keepalive_at: float | None = None
        self._redial_at: float | None = None
        self._is_announced: bool | None = None

    # --- state ---------------------------------------------------------------------------------

    @property
    def state(self) -> LinkState:
        return self._state

    @property
    def why(self) -> str:
        """What led to the state, in words for the operator."""
        return self._why

    @property
    def since(self) -> float:
        """When the state began."""
        return self._since

    @property
    def endpoint(self) -> Endpoint:
        """The one that is dialled or connected, or comes next."""
        return self._endpoints[self._turn % len(self._endpoints)]

    @property
    def is_open(self) -> bool:
        """Whether uploads go out."""
        return self._state in (LinkState.SERVED, LinkState.UNPROVEN, LinkState.DRAINING)

    @property
    def dial_at(self) -> float | None:
        return self._dial_at

    # --- events --------------------------------------------------------------------------------

    def start(self) -> list[Action]:
        """Before anything else: consumers assume nothing, they are told that the cloud is not there yet."""
        return self._announce(False)

    def receive(self, event: Event, *, now: float) -> list[Action]:
        """Take what happened. Raises IllegalMove for what cannot happen in this state."""
        if self._state is LinkState.STOPPED:
            return []  # whatever was under way when the process was told to stop
        state = _NEXT.get((self._state, type(event)))
        if state is None:
            raise IllegalMove(f"{type(event).__name__} in state {self._state.value}")
        match event:
            case DialDue():
                self._dial_at = None
                self._move(state, f"dialling {self.endpoint}", now)
                return [Dial(self.endpoint)]
            case Opened():
                self._opened_at = now
                self._greeting_due = now + self._greeting_seconds
                self._keepalive_at = now + self._heartbeat_seconds
                self._move(state, f"connected to {self.endpoint}, greeting", now)
                return [Greet()]
            case Failed(why):
                self._fall(state, why, now)
                return self._announce(False)
            case Lost(why):
                return self._on_lost(state, why, now)
            case Proven():
                return self._on_proven(state, now)
            case GreetingOver():
                return self._on_unanswered(state, now)
            case RedialDue():
                self._redial_at = None
                return [Hangup("unproven link, trying a new one")]
            case StopWanted():
                return self._on_stop(state, now)
            case Drained():
                self._move(state, "stopped", now)
                return [*self._announce(False), Hangup("stopped"), Finished()]
            case _:
                assert_never(event)

    def expire(self, *, now: float) -> list[Action]:
        """What the clock brings; call it when `next_deadline()` has passed."""
        actions: list[Action] = []
        if self._dial_at is not None and now >= self._dial_at and self._state is LinkState.CLOSED:
            actions += self.receive(DialDue(), now=now)
        if self._greeting_due is not None and now >= self._greeting_due:
            actions += self.receive(GreetingOver(), now=now)
        if self._redial_at is not None and now >= self._redial_at:
            actions += self.receive(RedialDue(), now=now)
        if self._keepalive_at is not None and now >= self._keepalive_at:
            self._keepalive_at = now + self._heartbeat_seconds
            actions.append(Keepalive())
        return actions

    def next_deadline(self) -> float | None:
        deadlines = (self._dial_at, self._greeting_due, self._redial_at, self._keepalive_at)
        return min((at for at in deadlines if at is not None), default=None)

    # --- moves ---------------------------------------------------------------------------------

    def _move(self, state: LinkState, why: str, now: float) -> None:
        if state is not self._state:
            self._since = now
        self._state = state
        self._why = why

    def _fall(self, state: LinkState, why: str, now: float) -> None:
        """Closed after a failure: the next endpoint, after a pause that grows once per round of them."""
        pause = self._backoff.delay(self._failures // len(self._endpoints))
        self._failures += 1
        self._turn += 1
        self._dial_at = now + pause
        self._forget_timers()
        self._move(state, why, now)

    def _forget_timers(self) -> None:
        self._greeting_due = self._keepalive_at = self._redial_at = None

    def _on_lost(self, state: LinkState, why: str, now: float) -> list[Action]:
        if state is LinkState.STOPPED:
            self._forget_timers()
            self._move(state, why, now)
            return [*self._announce(False), Finished()]
        was_open = self._state in (LinkState.SERVED, LinkState.UNPROVEN)
        if was_open and now - self._opened_at >= self._stable_seconds:
            self._failures = 0
            self._turn = 0
            self._dial_at = now + self._backoff.delay(0)
            self._forget_timers()
            self._move(state, why, now)
        else:
            self._fall(state, self._why if self._unanswered and not was_open else why, now)
        return self._announce(False)

    def _on_proven(self, state: LinkState, now: float) -> list[Action]:
        if self._state is state:
            return []
        self._unanswered = 0
        self._greeting_due = self._redial_at = None
        self._move(state, f"served by {self.endpoint}", now)
        return self._announce(True)

    def _on_unanswered(self, state: LinkState, now: float) -> list[Action]:
        self._greeting_due = None
        self._unanswered += 1
        if self._unanswered < UNANSWERED_DIALS:
            self._why = (
                f"{self.endpoint} took the connection but did not answer the greeting within "
                f"{self._greeting_seconds:g} s: rejected (node limit, certificate), or a CloudHub before 1.17"
            )
            return [Hangup("greeting unanswered")]
        if self._unproven_redial_seconds > 0:
            self._redial_at = now + self._unproven_redial_seconds
        self._move(
            state,
            f"{self.endpoint} takes uploads but has answered none of {self._unanswered} greetings: "
            "rejected (node limit, certificate), or a CloudHub before 1.17",
            now,
        )
        return self._announce(True)

    def _on_stop(self, state: LinkState, now: float) -> list[Action]:
        was_closed = self._state is LinkState.CLOSED
        self._dial_at = None
        self._forget_timers()
        self._move(state, "stopping", now)
        if state is LinkState.DRAINING:
            self._keepalive_at = now + self._heartbeat_seconds
            return [Drain()]
        actions = self._announce(False)
        if not was_closed:
            actions.append(Hangup("stopped"))
        return [*actions, Finished()]

    def _announce(self, is_connected: bool) -> list[Action]:
        if self._is_announced is is_connected:
            return []
        self._is_announced = is_connected
        return [Announce(is_connected)]
