"""One check as a play: a script that tells frames, waits for what must come of it, and so comes to a verdict.

A script is a generator over its stage. It acts through the stage, which collects actions for the shell, and it yields
`Wait` to let time pass or frames come. It ends: the check has passed. It raises Failed or NotApplicable: so be it.
`Play` drives it, with frames and `now` as arguments; whether real processes or values in a test are behind the actions
it does not know.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, TypeVar

from runtime.conform import wire

MAX_SEEN: Final = 50_000
"Frames of one play; who says more has failed."
SHOWN_FRAMES: Final = 14
"Frames that a verdict shows at the most, the last ones."

PASS: Final = "pass"
FAIL: Final = "fail"
NOT_APPLICABLE: Final = "not-applicable"

T = TypeVar("T")


class Wait(NamedTuple):
    """Go on with what `ready` gives, once that is true; or with None after `within` seconds."""

    ready: Callable[[], Any]
    within: float


Script = Generator[Wait, Any, None]
Scene = Generator[Wait, Any, T]
"A part of a script, with its result; for `yield from`."


class Verdict(Exception):
    """Ends a script."""


class Failed(Verdict):
    """It does not do what the page says."""


class NotApplicable(Verdict):
    """It has not what the check is about."""


# --- what the shell does ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tell:
    """Send `frames` to the connection `end`."""

    end: str
    frames: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Open:
    """Make a connection to the broker under test, and call it `end`."""

    end: str


@dataclass(frozen=True, slots=True)
class Close:
    """Close it, without a word."""

    end: str


@dataclass(frozen=True, slots=True)
class Start:
    """Start the module under test as a new process."""


@dataclass(frozen=True, slots=True)
class Signal:
    """Send a signal to the module's process: `TERM`, `KILL`, `STOP` or `CONT`."""

    name: str


@dataclass(frozen=True, slots=True)
class Rebind:
    """Be another broker: close the socket and bind a new one at the same endpoint."""


Action = Tell | Open | Close | Start | Signal | Rebind


# --- what is known ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Seen:
    """One ZeroMQ message that passed."""

    at: float
    "Seconds since the play began."
    from_peer: bool
    "From what is under test; otherwise from the stage."
    end: str
    frames: tuple[bytes, ...]
    verb: str
    header: Any
    "As a value of runtime.emp; None when it is malformed."
    fault: str | None

    def __str__(self) -> str:
        return f"{self.at:7.3f} {'<' if self.from_peer else '>'} {wire.describe(self.frames)}"


@dataclass(frozen=True, slots=True)
class Note:
    """Something that passed and is no frame: a start, a signal, an end."""

    at: float
    text: str

    def __str__(self) -> str:
        return f"{self.at:7.3f} - {self.text}"


@dataclass(frozen=True, slots=True)
class Settings:
    """How long things may take, in seconds."""

    soon: float = 5.0
    "For every reaction that the page wants soon."
    start: float = 20.0
    "From the start of the process to its HELLO."
    quiet: float = 0.6
    "For so long nothing may come where nothing is allowed."
    stop: float = 12.0
    "From SIGTERM to the end of the process; supervisord kills after 10."
    longest: float = 20.0
    "Checks whose wait goes by the liveness that the module tells are left out when it is more than this."
    survey: float = 3.0
    "So long a module has to show that it sends by itself."

    def stretched(self, factor: float) -> Settings:
        """The same with more time for everything but the longest waits, for a slow machine."""
        return Settings(
            soon=self.soon * factor,
            start=self.start * factor,
            quiet=self.quiet * factor,
            stop=self.stop * factor,
            longest=self.longest,
            survey=self.survey * factor,
        )


def _place(said: tuple[int, Seen]) -> int:
    return said[0]


class Stage:
    """What both sides' stages have: the record, the actions, the waiting."""

    reads: frozenset[str]
    "Verbs that the one under test may say."
    writes: frozenset[str]
    "Verbs of our own side."

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.playing = ""
        "The name of the check."
        self.now = 0.0
        "Seconds since the play began."
        self.record: list[Seen | Note] = []
        self.actions: list[Action] = []
        self._said: dict[str, list[tuple[int, Seen]]] = {}  # by verb: place in the record, and what was said

    # --- acting ---

    def tell(self, end: str, *frames: bytes) -> None:
        header, fault = wire.read(frames, self.writes)
        self.record.append(Seen(self.now, False, end, frames, wire.verb_of(frames), header, fault))
        self.actions.append(Tell(end, frames))

    def note(self, text: str) -> None:
        self.record.append(Note(self.now, text))

    # --- what the play tells it ---

    def take(self, end: str, frames: tuple[bytes, ...]) -> Seen:
        """A message has come from the one under test."""
        if len(self.record) >= MAX_SEEN:
            raise Failed(f"more than {MAX_SEEN} frames")
        header, fault = wire.read(frames, self.reads)
        seen = Seen(self.now, True, end, frames, wire.verb_of(frames), header, fault)
        if header is not None:
            self._said.setdefault(seen.verb, []).append((len(self.record), seen))
        self.record.append(seen)
        return seen

    def ended(self, status: int) -> None:
        """The process under test has ended."""

    def farewell(self) -> None:
        """The play is over: leave nothing behind."""

    # --- looking ---

    @property
    def mark(self) -> int:
        """A place in the record: what comes from now on is `since` it."""
        return len(self.record)

    def since(self, mark: int, *verbs: str, end: str | None = None) -> list[Seen]:
        """What the one under test has said since `mark` (well formed, of these verbs, on this connection)."""
        found: list[tuple[int, Seen]] = []
        for verb in verbs or tuple(self._said):
            said = self._said.get(verb, [])
            found += said[bisect_left(said, mark, key=_place) :]
        if len(verbs) != 1:
            found.sort(key=_place)
        return [seen for _, seen in found if end is None or seen.end == end]

    # --- waiting ---

    def until(self, ready: Callable[[], T | None], otherwise: str, within: float | None = None) -> Scene[T]:
        """Go on when `ready()` is true, with what it gives; fail with `otherwise` when it stays false."""
        found: T | None = yield Wait(ready, self.settings.soon if within is None else within)
        if not found:
            raise Failed(otherwise)
        return found

    def whether(self, ready: Callable[[], T | None], within: float) -> Scene[T | None]:
        """The same for what may stay out: then it gives None."""
        found: T | None = yield Wait(ready, within)
        return found or None

    def pause(self, seconds: float) -> Scene[None]:
        yield Wait(lambda: None, seconds)

    def never(self, happens: Callable[[], object], why: str, seconds: float | None = None) -> Scene[None]:
        """For a while (`quiet` seconds) `happens` must stay false."""
        found = yield Wait(happens, self.settings.quiet if seconds is None else seconds)
        if found:
            raise Failed(why)

    def answer(
        self, mark: int, otherwise: str, *verbs: str, end: str | None = None, within: float | None = None
    ) -> Scene[Seen]:
        """The first of these verbs that has come since `mark`; fail with `otherwise` when none comes."""
        found = yield from self.until(lambda: self.since(mark, *verbs, end=end), otherwise, within)
        return found[0]


# --- checks and verdicts ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Check:
    """One demand of the page."""

    name: str
    section: str
    "Where it stands in docs/emp.md: `9`, `5 ACK`, `17 rule 21`; several with commas."
    says: str
    "The demand, in a sentence."
    script: Callable[[Any], Script] | None = None
    "None: watched all the time, by the referee."
    needs: tuple[str, ...] = ()
    "What it must have shown itself to do, for the check to apply; keys of `Traits.LACKING`."
    is_long: bool = False
    "Waits for the liveness time, or a whole stop: begun first."


class Catalogue(list[Check]):
    """Checks in the order of the page."""

    def enter(
        self, name: str, section: str, says: str, *, needs: tuple[str, ...] = (), is_long: bool = False
    ) -> Callable[[Callable[[Any], Script]], None]:
        """Decorates a script. The arguments are the fields of `Check`."""

        def enter(script: Callable[[Any], Script]) -> None:
            self.append(Check(name, section, says, script, needs, is_long))

        return enter


def expect(good: object, otherwise: str) -> None:
    """Fail with `otherwise` unless it is good."""
    if not good:
        raise Failed(otherwise)


@dataclass(frozen=True, slots=True)
class Result:
    """A check's verdict."""

    check: Check
    outcome: str
    "pass, fail or not-applicable."
    why: str = ""
    frames: tuple[str, ...] = ()
    seconds: float = 0.0
    log: str = ""
    "The end of what the process printed, when it has failed."


@dataclass(slots=True)
class Finding:
    """What the referee has to say of one standing rule in one play."""

    exercised: int = 0
    "How often there was something to judge."
    fault: str = ""
    frames: tuple[str, ...] = ()


@dataclass(slots=True)
class Play:
    """One check being played. Give it frames, time and ends of processes; perform `stage.actions`."""

    check: Check
    stage: Any
    began: float
    result: Result | None = None
    _script: Script = field(init=False)
    _wait: Wait | None = field(init=False, default=None)
    _until: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        assert self.check.script is not None
        self.stage.playing = self.check.name
        self._script = self.check.script(self.stage)
        self._go(None)

    def receive(self, end: str, frames: Sequence[bytes], now: float) -> None:
        self._happen(lambda: self.stage.take(end, tuple(frames)), now)

    def ended(self, status: int, now: float) -> None:
        """The process under test has ended with `status` (negative: by that signal)."""
        self._happen(lambda: self.stage.ended(status), now)

    def expire(self, now: float) -> None:
        self._happen(lambda: None, now)

    def deadline(self) -> float:
        """When `expire` wants to be called."""
        return self._until

    def _happen(self, happening: Callable[[], object], now: float) -> None:
        if self.result is not None:
            return
        self.stage.now = now - self.began
        try:
            happening()
            while self.result is None and self._wait is not None:
                found = self._wait.ready()
                if not found and now < self._until:
                    return
                self._go(found or None)
        except Verdict as verdict:  # what comes, or what a script looks for, may be wrong by itself
            self._end(verdict)

    def _go(self, value: Any) -> None:
        try:
            self._wait = self._script.send(value)
        except StopIteration:
            self._end(None)
        except Verdict as verdict:
            self._end(verdict)
        else:
            self._until = self.began + self.stage.now + self._wait.within

    def _end(self, verdict: Verdict | None) -> None:
        self._script.close()
        self._wait = None
        shown = shown_frames(self.stage.record)
        self.stage.farewell()
        outcome = PASS if verdict is None else FAIL if isinstance(verdict, Failed) else NOT_APPLICABLE
        self.result = Result(
            self.check,
            outcome,
            str(verdict or ""),
            shown,
            round(self.stage.now, 3),
        )


def shown_frames(record: Sequence[Seen | Note]) -> tuple[str, ...]:
    """The end of a record, as a verdict shows it."""
    left_out = len(record) - SHOWN_FRAMES
    head = (f"        … {left_out} earlier",) if left_out > 0 else ()
    return (*head, *map(str, record[-SHOWN_FRAMES:]))
