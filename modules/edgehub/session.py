"""LinkSession: when to dial, greet, count as connected, give up, dial again.

CloudHub leaves a connection that it rejected open, answers its pings and takes its uploads, but never sends
it anything. So a link is greeted with a query that only a session answers. An answer, or anything else from
the cloud, proves the link (`served`). No answer means rejected, or a CloudHub older than 1.17, which does not
know the query: the link is closed and the next endpoint tried, and after three such dials (or one to each endpoint,
if there are more) it is kept as `unproven` (docs/cloudlink.md, Zombies). Where configuration says that the hub does not
know the query it is not asked, and the link is `unproven` at once.

                  DialDue            Opened               Proven
        CLOSED ------------> DIALLING ------> GREETING -------------> SERVED
          ^  ^                  |                | \\                    ^
          |  |      Failed      |    GreetingOver|  \\ GreetingOver      | Proven
          |  +------------------+    (1st, 2nd)  |   \\ (3rd)            |
          |                                      |    +---> UNPROVEN ---+
          +--------------------------------------+              | Lost, RedialDue
          +-----------------------------------------------------+
        StopWanted leads to DRAINING from SERVED and UNPROVEN, else to STOPPED.

A link may also be replaced on purpose: to return to the first endpoint while another one serves (`Probe` asks now and
then whether it can be reached), to use a new certificate, to try an unproven link anew. Such a move waits for a quiet
moment (`AwaitQuiet`, then `Quiet`), and the next dial follows at once. A return that does not last makes the pause
before the next one twice as long, so that a node does not go to and fro.
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
_LONGEST_FAILBACK: Final = 16
"Times the configured pause: returns to the first endpoint that did not last double it up to that."


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
class Probed:
    """Whether the first endpoint could be reached (answer to `Probe`)."""

    is_reachable: bool


@dataclass(frozen=True, slots=True)
class MoveWanted:
    """The link is to be replaced by a new one as soon as that disturbs nobody."""

    why: str


@dataclass(frozen=True, slots=True)
class Quiet:
    """Nothing is under way (answer to `AwaitQuiet`)."""


@dataclass(frozen=True, slots=True)
class StopWanted:
    """The process is to end: finish what is under way."""


@dataclass(frozen=True, slots=True)
class Drained:
    """Nothing is under way any more, or the time for it is over."""


Event = (
    DialDue
    | Opened
    | Failed
    | Lost
    | Proven
    | GreetingOver
    | RedialDue
    | Probed
    | MoveWanted
    | Quiet
    | StopWanted
    | Drained
)

# --- actions ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Dial:
    endpoint: Endpoint


@dataclass(frozen=True, slots=True)
class Greet:
    """Send the first keepalive and, where the hub knows it, the greeting query."""

    is_asking: bool = True


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
class Probe:
    """See whether the endpoint can be reached, without becoming a node there; report `Probed`."""

    endpoint: Endpoint


@dataclass(frozen=True, slots=True)
class AwaitQuiet:
    """Report `Quiet` as soon as nothing is under way on the link."""


@dataclass(frozen=True, slots=True)
class Drain:
    """Take nothing new for the cloud, wait for what is under way, then report `Drained`."""


@dataclass(frozen=True, slots=True)
class Finished:
    """Nothing more will come."""


Action = Dial | Greet | Keepalive | Announce | Hangup | Probe | AwaitQuiet | Drain | Finished

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
    # These may come late, whatever has become of the link meanwhile.
    **{(state, event): state for state in _S for event in (Probed, MoveWanted, Quiet)},
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
        failback_seconds: float = 0.0,
        is_answered: bool = True,
        keeps_unproven: bool = True,
        now: float,
    ) -> None:
        """`failback_seconds` between two looks at the first endpoint while another one serves; 0: none.

        `is_answered`: whether the hub knows the greeting query. `keeps_unproven`: a link whose greeting nobody answers
        is of use, for something else tells what the hub has read.
        """
        self._endpoints = endpoints
        self._backoff = backoff
        self._heartbeat_seconds = heartbeat_seconds
        self._greeting_seconds = greeting_seconds
        self._stable_seconds = stable_seconds
        self._unproven_redial_seconds = unproven_redial_seconds
        self._failback_seconds = failback_seconds if len(endpoints) > 1 else 0.0
        self._is_answered = is_answered
        self._keeps_unproven = keeps_unproven
        self._unanswered_limit = max(UNANSWERED_DIALS, len(endpoints))
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
        self._probe_at: float | None = None
        self._is_first_away = False  # by the last look at it
        self._failback_pause = failback_seconds
        self._move_wanted: str | None = None  # the reason
        self._is_returning = False  # that move is to the first endpoint
        self._is_moving = False  # its hangup was ordered
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
    def move_wanted(self) -> str | None:
        """Why the link is to be replaced in the next quiet moment; None when it is not."""
        return self._move_wanted

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
                self._enter(state, f"dialling {self.endpoint}", now)
                return [Dial(self.endpoint)]
            case Opened():
                self._opened_at = now
                self._is_first_away = self._is_first_away and not self._is_first
                self._greeting_due = now + self._greeting_seconds
                self._keepalive_at = now + self._heartbeat_seconds
                self._enter(state, f"connected to {self.endpoint}, greeting", now)
                if self._is_answered:
                    return [Greet()]
                why = f"connected to {self.endpoint}; a CloudHub before 1.17 does not tell whether it serves this node"
                return [Greet(is_asking=False), *self._keep_unproven(why, now)]
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
                # Each endpoint gets one more try.
                self._unanswered = self._unanswered_limit - len(self._endpoints)
                return self._want_move("unproven link, trying a new one")
            case Probed(is_reachable):
                return self._on_probed(is_reachable, now)
            case MoveWanted(why):
                return self._want_move(why)
            case Quiet():
                return self._on_quiet()
            case StopWanted():
                return self._on_stop(state, now)
            case Drained():
                self._enter(state, "stopped", now)
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
        if self._probe_at is not None and now >= self._probe_at:
            self._probe_at = None
            actions.append(Probe(self._endpoints[0]))
        if self._keepalive_at is not None and now >= self._keepalive_at:
            self._keepalive_at = now + self._heartbeat_seconds
            actions.append(Keepalive())
        return actions

    def next_deadline(self) -> float | None:
        deadlines = (self._dial_at, self._greeting_due, self._redial_at, self._probe_at, self._keepalive_at)
        return min((at for at in deadlines if at is not None), default=None)

    # --- transitions ---------------------------------------------------------------------------------

    def _enter(self, state: LinkState, why: str, now: float) -> None:
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
        self._forget_link()
        self._enter(state, why, now)

    def _forget_link(self) -> None:
        """What was planned with the link that is gone."""
        self._move_wanted = None
        self._is_returning = self._is_moving = False
        self._greeting_due = self._keepalive_at = self._redial_at = self._probe_at = None

    def _on_lost(self, state: LinkState, why: str, now: float) -> list[Action]:
        if state is LinkState.STOPPED:
            self._forget_link()
            self._enter(state, why, now)
            return [*self._announce(False), Finished()]
        was_open = self._is_up
        lived_seconds = now - self._opened_at
        if was_open and self._is_first and lived_seconds >= max(self._stable_seconds, self._failback_seconds):
            self._failback_pause = self._failback_seconds
        if self._is_moving:
            if self._is_returning:
                self._turn = 0
                longest = self._failback_seconds * _LONGEST_FAILBACK
                self._failback_pause = min(self._failback_pause * 2, longest)  # until the return has proved lasting
            self._dial_at = now
            self._forget_link()
            self._enter(state, why, now)
        elif was_open and lived_seconds >= self._stable_seconds:
            self._failures = 0
            if not self._is_first_away:
                self._turn = 0
            self._dial_at = now + self._backoff.delay(0)
            self._forget_link()
            self._enter(state, why, now)
        else:
            self._fall(state, self._why if self._unanswered and not was_open else why, now)
        return self._announce(False)

    def _on_proven(self, state: LinkState, now: float) -> list[Action]:
        if self._state is state:
            return []
        self._unanswered = 0
        was_unproven = self._state is LinkState.UNPROVEN
        self._greeting_due = self._redial_at = None
        self._enter(state, f"served by {self.endpoint}", now)
        return self._announce(True) if was_unproven else [*self._announce(True), *self._begin_moves(now)]

    def _on_unanswered(self, state: LinkState, now: float) -> list[Action]:
        self._greeting_due = None
        self._unanswered += 1
        if self._unanswered < self._unanswered_limit or not self._keeps_unproven:
            self._why = (
                f"{self.endpoint} took the connection but did not answer the greeting within "
                f"{self._greeting_seconds:g} s: rejected (node limit, certificate), or a CloudHub before 1.17"
            )
            return [Hangup("greeting unanswered")]
        why = (
            f"{self.endpoint} takes uploads but has answered none of {self._unanswered} greetings: "
            "rejected (node limit, certificate), or a CloudHub before 1.17"
        )
        return self._keep_unproven(why, now)

    def _keep_unproven(self, why: str, now: float) -> list[Action]:
        self._greeting_due = None
        if self._unproven_redial_seconds > 0:
            self._redial_at = now + self._unproven_redial_seconds
        self._enter(LinkState.UNPROVEN, why, now)
        return [*self._announce(True), *self._begin_moves(now)]

    # --- moves on purpose ------------------------------------------------------------------------

    @property
    def _is_up(self) -> bool:
        return self._state in (LinkState.SERVED, LinkState.UNPROVEN)

    @property
    def _is_first(self) -> bool:
        """Whether the endpoint is the preferred one."""
        return self._turn % len(self._endpoints) == 0

    def _begin_moves(self, now: float) -> list[Action]:
        """The link is open: look for the first endpoint from time to time; do what was wanted meanwhile."""
        if self._failback_seconds > 0 and not self._is_first:
            self._probe_at = now + self._backoff.about(self._failback_pause)
        return [AwaitQuiet()] if self._move_wanted is not None else []

    def _want_move(self, why: str) -> list[Action]:
        if self._state in (LinkState.CLOSED, LinkState.DRAINING) or self._move_wanted is not None:
            return []  # the next dial is a new link anyhow
        self._move_wanted = why
        return [AwaitQuiet()] if self._is_up else []

    def _on_probed(self, is_reachable: bool, now: float) -> list[Action]:
        if self._is_first or not self._is_up:
            return []
        self._is_first_away = not is_reachable
        if not is_reachable:
            self._probe_at = now + self._backoff.about(self._failback_pause)
            return []
        self._is_returning = True
        return self._want_move(f"back to {self._endpoints[0]}")

    def _on_quiet(self) -> list[Action]:
        if self._move_wanted is None or self._is_moving or not self._is_up:
            return []
        self._is_moving = True
        return [Hangup(self._move_wanted)]

    def _on_stop(self, state: LinkState, now: float) -> list[Action]:
        was_closed = self._state is LinkState.CLOSED
        self._dial_at = None
        self._forget_link()
        self._enter(state, "stopping", now)
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
