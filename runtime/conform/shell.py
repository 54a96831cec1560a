"""The processes and sockets of the conformance runner; what is to be done, the plays say.

Every check has a socket, a directory and processes of its own, so several are played side by side.
"""

from __future__ import annotations

import runtime.libraries  # noqa: F401  (first: see there)

# isort: split

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import zmq

from runtime.conform import broker_checks, module_checks
from runtime.conform.broker_stage import BrokerStage
from runtime.conform.module_stage import ModuleStage, Traits
from runtime.conform.play import (
    FAIL,
    NOT_APPLICABLE,
    PASS,
    Action,
    Check,
    Close,
    Open,
    Play,
    Rebind,
    Result,
    Settings,
    Signal,
    Start,
    Tell,
)
from runtime.home import BUS_VARIABLE, HOME_VARIABLE

JOBS: Final = 6
"Checks that are played at a time; most of one is waiting."
LINGER_MS: Final = 300
"What was told last may still go out."
MAX_FRAME_BYTES: Final = 64 * 2**20
LOG_BYTES: Final = 2000
"Of what a module printed: shown with a check that failed."
TURN_SECONDS: Final = 1.0
"Between two looks at the clock at the latest."
CONFORM_VARIABLE: Final = "EDGEZMQ_CONFORM"
"Set for a module under test."

Report = Callable[[Result], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleRun:
    """What to test: a command that starts a module."""

    command: Sequence[str]
    transport: str = "ipc"
    "ipc or tcp (loopback)."
    settings: Settings = field(default_factory=Settings)
    jobs: int = JOBS


class _Process:
    """The module under test. Whatever it starts is in a process group of its own, and ends with it."""

    def __init__(self, command: Sequence[str], environ: Mapping[str, str], log: Path) -> None:
        with log.open("ab") as output:
            self._popen = subprocess.Popen(
                command,
                env=dict(environ),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.pidfd = os.pidfd_open(self._popen.pid)

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._popen.pid, number)

    def reap(self) -> int:
        """Its status, once it has ended."""
        status = self._popen.wait()
        os.close(self.pidfd)
        # A wrapper may have left what it started.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        return status

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.reap()


class _ModuleRoom:
    """Where one check of a module is played: a ROUTER, a directory, a process."""

    def __init__(self, run: ModuleRun) -> None:
        self._run = run
        self._directory = Path(tempfile.mkdtemp(prefix="emp-"))
        self._log = self._directory / "module.log"
        self._context: zmq.Context[Any] | None = None
        self._router: zmq.Socket[bytes] | None = None
        self._process: _Process | None = None
        self._endpoint = f"ipc://{self._directory}/bus.sock" if run.transport == "ipc" else "tcp://127.0.0.1:*"
        self._bind()
        self._environ = {key: value for key, value in os.environ.items() if not key.startswith("EDGEZMQ_")}
        self._environ |= {
            BUS_VARIABLE: self._endpoint,
            HOME_VARIABLE: str(self._directory / "home"),
            CONFORM_VARIABLE: "1",
        }

    def _bind(self) -> None:
        self._context = zmq.Context()
        router: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        router.setsockopt(zmq.SNDHWM, 0)
        router.setsockopt(zmq.RCVHWM, 0)
        router.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        router.bind(self._endpoint)
        self._endpoint = router.getsockopt_string(zmq.LAST_ENDPOINT)
        self._router = router

    def _unbind(self) -> None:
        assert self._router is not None
        assert self._context is not None
        self._router.close(linger=LINGER_MS)
        # Waits until the path is unlinked: a late unlink would take the next one's.
        self._context.term()

    def play(self, check: Check, traits: Traits) -> Play:
        began = time.monotonic()
        play = Play(check, ModuleStage(self._run.settings, traits), began)
        while play.result is None:
            self._perform(play)
            self._wait(play)
        return play

    def _perform(self, play: Play) -> None:
        actions: list[Action] = play.stage.actions
        while actions:
            action = actions.pop(0)
            match action:
                case Tell(end, frames):
                    assert self._router is not None
                    with contextlib.suppress(zmq.ZMQError):  # it has gone: the script will see
                        self._router.send_multipart([bytes.fromhex(end), *frames], zmq.NOBLOCK)
                case Start():
                    if self._process is not None:
                        self._process.kill()
                    self._process = _Process(self._run.command, self._environ, self._log)
                case Signal(name):
                    if self._process is not None:
                        self._process.signal(signal.Signals[f"SIG{name}"])
                case Rebind():
                    self._unbind()
                    self._bind()
                case Open() | Close():
                    raise AssertionError(f"{action} is for a broker under test")

    def _wait(self, play: Play) -> None:
        assert self._router is not None
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        if self._process is not None:
            poller.register(self._process.pidfd, zmq.POLLIN)
        seconds = min(max(0.0, play.deadline() - time.monotonic()), TURN_SECONDS)
        ready = dict(poller.poll(int(seconds * 1000) + 1))
        # A bounded number, so that a flood does not keep the clock from being looked at.
        for _ in range(1000):
            try:
                routing_id, *frames = self._router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            play.receive(routing_id.hex(), frames, time.monotonic())
            self._perform(play)
        if self._process is not None and self._process.pidfd in ready and play.result is None:
            process, self._process = self._process, None
            play.ended(process.reap(), time.monotonic())
        play.expire(time.monotonic())

    def log(self) -> str:
        """The end of what the module printed."""
        if not self._log.exists():
            return ""
        return self._log.read_bytes()[-LOG_BYTES:].decode("utf-8", "replace").strip()

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
        self._unbind()
        shutil.rmtree(self._directory, ignore_errors=True)


def check_module(run: ModuleRun, checks: Iterable[Check], report: Report) -> tuple[Traits, list[Result]]:
    """Play these checks of a module; `report` is told each verdict as it falls, from any thread.

    First a survey: which of them apply. Standing rules are watched in these plays; where only such are asked for, in
    all plays there are. Raises OSError when the command cannot be started.
    """
    checks = list(checks)
    survey, stage = _play_module(run, module_checks.SURVEY, Traits())
    traits = stage.traits
    if survey.outcome != PASS:
        report(survey)
        return traits, [survey]
    chosen = [check for check in checks if check.script is not None]
    plays = chosen or [check for check in module_checks.ALL if check.script is not None]

    def one(check: Check) -> tuple[Result, ModuleStage | None]:
        why = traits.lacking(check.needs)
        played = (Result(check, NOT_APPLICABLE, why), None) if why else _play_module(run, check, traits)
        if chosen:
            report(played[0])
        return played

    # The long ones first, so that the others are played meanwhile.
    with ThreadPoolExecutor(run.jobs) as pool:
        played = list(pool.map(one, sorted(plays, key=lambda check: not check.is_long)))
    stages = [stage, *(each for _, each in played if each is not None)]
    standing = [judge(check, stages) for check in checks if check.script is None]
    for result in standing:
        report(result)
    order = {check.name: place for place, check in enumerate(checks)}
    results = [result for result, _ in played if chosen]
    return traits, sorted([*standing, *results], key=lambda result: order[result.check.name])


def _play_module(run: ModuleRun, check: Check, traits: Traits) -> tuple[Result, ModuleStage]:
    room = _ModuleRoom(run)
    try:
        play = room.play(check, traits)
        result = play.result
        assert result is not None
        if result.outcome == FAIL:
            result = replace(result, log=room.log())
        return result, play.stage
    finally:
        room.close()


def judge(rule: Check, stages: Iterable[ModuleStage]) -> Result:
    """The verdict on a standing rule, from what the referees of all plays have found."""
    exercised = 0
    for stage in stages:
        finding = stage.referee.findings[rule.name]
        if finding.fault:
            return Result(rule, FAIL, f"{finding.fault} (while playing {stage.playing})", finding.frames)
        exercised += finding.exercised
    if not exercised:
        return Result(rule, NOT_APPLICABLE, "it did nothing that this is about")
    return Result(rule, PASS, f"{exercised} times")


# --- a broker --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerRun:
    """What to test: the broker that serves `endpoint`."""

    endpoint: str
    settings: Settings = field(default_factory=Settings)
    jobs: int = JOBS


class _BrokerRoom:
    """Where one check of a broker is played: a DEALER for each scripted module."""

    def __init__(self, run: BrokerRun) -> None:
        self._run = run
        self._context: zmq.Context[Any] = zmq.Context()
        self._dealers: dict[str, zmq.Socket[bytes]] = {}

    def play(self, check: Check) -> Play:
        stage = BrokerStage(self._run.settings, secrets.token_hex(4), os.getpid())
        play = Play(check, stage, time.monotonic())
        while play.result is None:
            self._perform(play)
            self._wait(play)
        self._perform(play)
        return play

    def _perform(self, play: Play) -> None:
        actions: list[Action] = play.stage.actions
        while actions:
            action = actions.pop(0)
            match action:
                case Open(end):
                    dealer: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
                    dealer.setsockopt(zmq.SNDHWM, 0)
                    dealer.setsockopt(zmq.RCVHWM, 0)
                    dealer.connect(self._run.endpoint)
                    self._dealers[end] = dealer
                case Close(end):
                    self._dealers.pop(end).close(linger=LINGER_MS)
                case Tell(end, frames):
                    self._dealers[end].send_multipart(frames, zmq.NOBLOCK)
                case Start() | Signal() | Rebind():
                    raise AssertionError(f"{action} is for a module under test")

    def _wait(self, play: Play) -> None:
        poller = zmq.Poller()
        for dealer in self._dealers.values():
            poller.register(dealer, zmq.POLLIN)
        seconds = min(max(0.0, play.deadline() - time.monotonic()), TURN_SECONDS)
        poller.poll(int(seconds * 1000) + 1)
        for end, dealer in list(self._dealers.items()):
            for _ in range(1000):
                try:
                    frames = dealer.recv_multipart(zmq.NOBLOCK)
                except zmq.Again:
                    break
                play.receive(end, frames, time.monotonic())
        play.expire(time.monotonic())

    def close(self) -> None:
        for dealer in self._dealers.values():
            dealer.close(linger=LINGER_MS)
        self._context.term()


def check_broker(run: BrokerRun, checks: Iterable[Check], report: Report) -> list[Result]:
    """Play these checks against a broker."""
    checks = list(checks)
    survey = _play_broker(run, broker_checks.SURVEY)
    if survey.outcome != PASS:
        report(survey)
        return [survey]

    def one(check: Check) -> Result:
        result = _play_broker(run, check)
        report(result)
        return result

    with ThreadPoolExecutor(run.jobs) as pool:
        results = list(pool.map(one, sorted(checks, key=lambda check: not check.is_long)))
    order = {check.name: place for place, check in enumerate(checks)}
    return sorted(results, key=lambda result: order[result.check.name])


def _play_broker(run: BrokerRun, check: Check) -> Result:
    room = _BrokerRoom(run)
    try:
        result = room.play(check).result
        assert result is not None
        return result
    finally:
        room.close()
