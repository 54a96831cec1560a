"""What the watchdog decides: which hung process to end, which program to revive, when to look again.

supervisord restarts what dies; by itself it looks once a second. This core makes it look at once after a death,
finds what lives but hangs (the broker says which module is silent), starts again what supervisord gave
up (FATAL), and counts restart storms. It never acts on a program that an operator stopped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from random import Random
from typing import Final

BROKER: Final = "broker"
"The program whose silence towards us, instead of towards the broker, means that it hangs."

FAST_POKES: Final = 40
"After a death supervisord is asked so many times …"
FAST_POKE_SECONDS: Final = 0.015
"… at this distance: it needs two or three turns of its loop to reap and to start."
SLOW_POKE_SECONDS: Final = 0.25
"After those, until the program runs again: a program in BACKOFF waits for whole seconds."

TRACEBACK_SECONDS: Final = 0.5
"After an aborted process's death: supervisord reads its last words from a pipe."

STALL_SECONDS: Final = 2.0
"Woken so much later than asked, it was us who stood still, and silence proves nothing."


@dataclass(frozen=True, slots=True)
class Seen:
    """One program as supervisord just described it."""

    name: str
    state: str
    pid: int
    "0 when there is no process."


# --- actions ---------------------------------------------------------------------------------------


class Action:
    """Base of what the shell has to do."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Poke(Action):
    """Ask supervisord for all programs, which wakes it, and report the answer with `programs`."""


@dataclass(frozen=True, slots=True)
class AskBroker(Action):
    """Send the broker a question; report any answer with `broker_answered`."""


@dataclass(frozen=True, slots=True)
class Abort(Action):
    """SIGABRT: a Python module prints where it hangs, and ends."""

    program: str
    pid: int


@dataclass(frozen=True, slots=True)
class Kill(Action):
    """SIGKILL to the process and its group."""

    program: str
    pid: int


@dataclass(frozen=True, slots=True)
class KeepTraceback(Action):
    """The aborted process is gone: keep what it said about where it hung before its log is rotated."""

    program: str


@dataclass(frozen=True, slots=True)
class Start(Action):
    """Start a program that supervisord gave up."""

    program: str


@dataclass(frozen=True, slots=True)
class Note(Action):
    """Something for the log. `is_warning`: somebody should know."""

    text: str
    is_warning: bool = False


# --- settings and statistics ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchSettings:
    """All times in seconds; `runtime.config.WatchdogSection` says what each is for."""

    poll_seconds: float = 5.0
    hang_grace_seconds: float = 2.0
    broker_silence_seconds: float = 10.0
    broker_question_seconds: float = 3.0
    revive_first_seconds: float = 5.0
    revive_cap_seconds: float = 300.0
    storm_restarts: int = 5
    storm_seconds: float = 60.0


@dataclass(frozen=True, slots=True)
class Counts:
    """What happened to one program since the watchdog was started."""

    restarts: int
    hangs: int
    "Aborted because they hung."
    revivals: int
    in_storm: bool
    storms: int = 0
    kills: int = 0
    "Of those aborted: were still there after the grace."


@dataclass(slots=True)
class _Watched:
    name: str
    state: str = "UNKNOWN"
    pid: int = 0
    died_pid: int = 0
    "The pid that we know to be dead while supervisord may not yet."
    running_since: float = 0.0
    kill_at: float | None = None
    "Aborted; to be killed then unless it has ended."
    revive_at: float | None = None
    revive_tries: int = 0
    is_due: str = ""
    "`abort` or `revive`, to be done if supervisord's next word says that it is still wanted; else empty."
    why: str = ""
    aborted_pid: int = 0
    traceback_at: float | None = None
    restarts_at: deque[float] = field(default_factory=deque)
    restarts: int = 0
    hangs: int = 0
    revivals: int = 0
    in_storm: bool = False
    storms: int = 0
    kills: int = 0

    @property
    def is_alive(self) -> bool:
        return self.state == "RUNNING" and self.pid != 0 and self.pid != self.died_pid


class Watching:
    """Events in, actions out; `now` is monotonic, in seconds.

    The shell calls `expire` no later than `next_deadline`, and reports what the actions brought.
    """

    def __init__(self, settings: WatchSettings, random: Random, *, now: float) -> None:
        self._settings = settings
        self._random = random
        self._programs: dict[str, _Watched] = {}
        self._poke_at = now
        self._pokes_left = 0
        self._ask_at = now
        self._unanswered_since: float | None = None
        self._expected_at = now

    # --- what happened ---

    def programs(self, seen: Iterable[Seen], *, now: float) -> list[Action]:
        """supervisord's answer to a Poke."""
        actions: list[Action] = []
        listed = set()
        for program in seen:
            listed.add(program.name)
            watched = self._programs.get(program.name)
            if watched is None:
                watched = self._programs[program.name] = _Watched(program.name)
            actions += self._update(watched, program, now)
            actions += self._do_due(watched, now)
        for name in self._programs.keys() - listed:
            del self._programs[name]
        if not any(self._is_awaited(watched) for watched in self._programs.values()):
            self._pokes_left = 0
            self._poke_at = now + self._settings.poll_seconds
        return actions

    def supervisor_silent(self, *, now: float) -> None:
        """A Poke failed: supervisord is starting, ending, or busy. Asked again soon."""
        self._pokes_left = 0
        self._poke_at = now + SLOW_POKE_SECONDS

    def died(self, pid: int, *, now: float) -> list[Action]:
        """The kernel told that the process is gone."""
        for watched in self._programs.values():
            if watched.pid == pid:
                watched.died_pid = pid
                watched.kill_at = None
                if pid == watched.aborted_pid:
                    watched.traceback_at = now + TRACEBACK_SECONDS
                self._pokes_left = FAST_POKES
                self._poke_at = now + FAST_POKE_SECONDS
                return [Poke()]
        return []

    def silent(self, name: str, pid: int, *, now: float) -> list[Action]:
        """The broker has not heard a module for its liveness time although its process lives.

        It is aborted when supervisord, asked once more (Poke), still has it running.
        `pid` is that of the supervised process: its own, or its process group's leader.
        """
        watched = self._by_pid(pid)
        if watched is None:
            return [Note(f"silent module={name} pid={pid} supervised=no: left alone", is_warning=True)]
        return self._end_hung(watched, f"module={name}", now)

    def heard(self, pid: int, *, now: float) -> list[Action]:
        """The broker hears the module again."""
        watched = self._by_pid(pid)
        if watched is not None and watched.is_due == "abort":
            watched.is_due = ""
        if watched is None or watched.kill_at is None:
            return []
        watched.kill_at = None
        return [Note(f"alive again program={watched.name} pid={pid}")]

    def broker_answered(self, *, now: float) -> None:
        """Anything came from the broker."""
        self._unanswered_since = None

    def expire(self, *, now: float) -> list[Action]:
        """What is due."""
        actions: list[Action] = []
        if now - self._expected_at > STALL_SECONDS and self._unanswered_since is not None:
            self._unanswered_since = now
        if now >= self._poke_at:
            actions.append(Poke())
            if self._pokes_left > 0:
                self._pokes_left -= 1
                self._poke_at = now + (FAST_POKE_SECONDS if self._pokes_left else SLOW_POKE_SECONDS)
            elif any(self._is_awaited(watched) for watched in self._programs.values()):
                self._poke_at = now + SLOW_POKE_SECONDS
            else:
                self._poke_at = now + self._settings.poll_seconds
        actions += self._check_broker(now)
        for watched in self._programs.values():
            if watched.kill_at is not None and now >= watched.kill_at:
                watched.kill_at = None
                if watched.is_alive:
                    actions.append(
                        Note(f"killed program={watched.name} pid={watched.pid}: still there", is_warning=True)
                    )
                    watched.kills += 1
                    actions.append(Kill(watched.name, watched.pid))
            if watched.traceback_at is not None and now >= watched.traceback_at:
                watched.traceback_at = None
                watched.aborted_pid = 0
                actions.append(KeepTraceback(watched.name))
            if watched.revive_at is not None and now >= watched.revive_at:
                watched.revive_at = None
                watched.is_due = "revive"
                actions.append(Poke())
        self._expected_at = self.next_deadline()
        return actions

    def next_deadline(self) -> float:
        """When `expire` wants to be called next."""
        due = [self._poke_at, self._ask_at]
        if self._unanswered_since is not None:
            due.append(self._unanswered_since + self._settings.broker_silence_seconds)
        for watched in self._programs.values():
            if watched.kill_at is not None:
                due.append(watched.kill_at)
            if watched.revive_at is not None:
                due.append(watched.revive_at)
            if watched.traceback_at is not None:
                due.append(watched.traceback_at)
        return min(due)

    def pids(self) -> frozenset[int]:
        """The processes whose death is to be reported."""
        return frozenset(w.pid for w in self._programs.values() if w.pid and w.pid != w.died_pid)

    def statistics(self) -> dict[str, Counts]:
        return {
            w.name: Counts(w.restarts, w.hangs, w.revivals, w.in_storm, w.storms, w.kills)
            for w in self._programs.values()
        }

    def states(self) -> list[Seen]:
        """All programs as supervisord last described them, without a pid that is known to be dead."""
        return [Seen(w.name, w.state, 0 if w.pid == w.died_pid else w.pid) for w in self._programs.values()]

    # --- how ---

    def _by_pid(self, pid: int) -> _Watched | None:
        return next((w for w in self._programs.values() if pid and w.pid == pid), None)

    def _is_awaited(self, watched: _Watched) -> bool:
        """Whether supervisord still has to do something that a poke makes happen sooner."""
        match watched.state:
            case "STARTING" | "BACKOFF" | "STOPPING" | "REVIVED":
                return True
            case "RUNNING":
                return watched.pid == watched.died_pid
            case "EXITED":
                return watched.pid != 0 and self._pokes_left > 0
        return False

    def _update(self, watched: _Watched, seen: Seen, now: float) -> list[Action]:
        actions: list[Action] = []
        was_fatal = watched.state == "FATAL"
        if seen.pid and seen.pid != watched.pid:
            watched.running_since = now
            watched.kill_at = None
            watched.died_pid = 0
            if watched.aborted_pid and watched.traceback_at is None:
                watched.traceback_at = now  # its death was not seen (no pidfd)
            if watched.pid:
                actions += self._count_restart(watched, now)
        if seen.pid:
            # Kept while there is no process, so that the next one is known for a restart.
            watched.pid = seen.pid
        elif watched.pid:
            watched.died_pid = watched.pid
            # EXITED is also what supervisord says between reaping a process and starting it again.
            if seen.state == "STOPPED" or (seen.state == "EXITED" and not self._pokes_left):
                watched.pid = 0
        watched.state = seen.state
        if seen.state == "FATAL":
            if not was_fatal:
                actions += self._plan_revival(watched, now)
        else:
            watched.revive_at = None
        if seen.state == "RUNNING" and now - watched.running_since > self._settings.storm_seconds:
            watched.revive_tries = 0
        if watched.in_storm and self._recent(watched, now) * 2 < self._settings.storm_restarts:
            watched.in_storm = False
            actions.append(Note(f"restart storm over program={watched.name}"))
        if seen.name == BROKER and seen.state != "RUNNING":
            self._unanswered_since = None
        return actions

    def _recent(self, watched: _Watched, now: float) -> int:
        while watched.restarts_at and now - watched.restarts_at[0] > self._settings.storm_seconds:
            watched.restarts_at.popleft()
        return len(watched.restarts_at)

    def _count_restart(self, watched: _Watched, now: float) -> list[Action]:
        watched.restarts += 1
        watched.restarts_at.append(now)
        if len(watched.restarts_at) > 4 * self._settings.storm_restarts:
            watched.restarts_at.popleft()
        actions: list[Action] = [Note(f"restarted program={watched.name} restarts={watched.restarts}")]
        if self._recent(watched, now) >= self._settings.storm_restarts and not watched.in_storm:
            watched.in_storm = True
            watched.storms += 1
            actions.append(
                Note(
                    f"restart storm program={watched.name} restarts={len(watched.restarts_at)} "
                    f"within_seconds={self._settings.storm_seconds:g}: see its log",
                    is_warning=True,
                )
            )
        return actions

    def _plan_revival(self, watched: _Watched, now: float) -> list[Action]:
        ceiling = min(
            self._settings.revive_cap_seconds,
            self._settings.revive_first_seconds * 2 ** min(watched.revive_tries, 30),
        )
        # Half fixed, half chance: programs that failed together do not come back together, and none at once.
        wait = ceiling / 2 + self._random.uniform(0, ceiling / 2)
        watched.revive_at = now + wait
        return [Note(f"given up by supervisord program={watched.name} next_try_seconds={wait:.1f}", is_warning=True)]

    def _end_hung(self, watched: _Watched, what: str, now: float) -> list[Action]:
        if not watched.is_alive or watched.kill_at is not None:
            return []  # stopped by an operator, ending already, or not there any more
        # What we know of it may be seconds old, and an operator may be stopping it: supervisord is asked first.
        watched.is_due = "abort"
        watched.why = what
        return [Poke()]

    def _do_due(self, watched: _Watched, now: float) -> list[Action]:
        """Just heard how it stands: abort what hangs, revive what was given up, unless that has changed."""
        due, watched.is_due = watched.is_due, ""
        if due == "abort" and watched.is_alive and watched.kill_at is None:
            watched.hangs += 1
            watched.aborted_pid = watched.pid
            watched.kill_at = now + self._settings.hang_grace_seconds
            return [
                Note(f"hung {watched.why} program={watched.name} pid={watched.pid}: aborting it", is_warning=True),
                Abort(watched.name, watched.pid),
            ]
        if due == "revive" and watched.state == "FATAL":
            watched.revive_tries += 1
            watched.revivals += 1
            watched.revive_at = None
            # Anew from what comes of it: FATAL again means a longer pause.
            watched.state = "REVIVED"
            self._pokes_left = max(self._pokes_left, 1)
            return [
                Note(f"revive program={watched.name} try={watched.revive_tries}", is_warning=True),
                Start(watched.name),
            ]
        return []

    def _check_broker(self, now: float) -> list[Action]:
        actions: list[Action] = []
        silence = self._settings.broker_silence_seconds
        if self._unanswered_since is not None and now - self._unanswered_since >= silence:
            broker = self._programs.get(BROKER)
            if broker is not None and now - broker.running_since >= silence:
                actions += self._end_hung(broker, f"silent_seconds={now - self._unanswered_since:.1f}", now)
            self._unanswered_since = now
        if now >= self._ask_at:
            self._ask_at = now + self._settings.broker_question_seconds
            if self._unanswered_since is None:
                self._unanswered_since = now
            actions.append(AskBroker())
        return actions
