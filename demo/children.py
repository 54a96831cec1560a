"""The demo's child processes: each in a session of its own, logged to a file, gone when the demo is gone."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

from runtime.locks import SUPERVISOR_PID_VARIABLE


class DemoFailed(Exception):
    """The demo cannot go on. `log` is the file to look at."""

    def __init__(self, text: str, log: Path | None = None) -> None:
        super().__init__(text)
        self.log = log


class Interrupts:
    """SIGINT, SIGTERM and SIGHUP become one KeyboardInterrupt, never in the middle of starting a process.

    After `listen` signals are noted, from `begin` on they are heard, after `close` they only make it faster.
    """

    def __init__(self) -> None:
        self.hurry = False
        "A signal came while everything was being ended: wait for nobody."
        self._is_closing = False
        self._is_held = False
        self._is_pending = False

    def listen(self) -> None:
        self._is_held = True
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._interrupt)

    def begin(self) -> None:
        """Raises KeyboardInterrupt for what came before."""
        self._is_held = False
        if self._is_pending and not self._is_closing:
            self._is_closing = True
            raise KeyboardInterrupt

    def close(self) -> None:
        """No KeyboardInterrupt any more: everything is being ended anyway. Idempotent."""
        self._is_closing = True

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """What is done inside is finished, and known to be done, before an interrupt is heard."""
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False
        self.begin()

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._is_closing:
            self.hurry = True
        elif self._is_held:
            self._is_pending = True
        else:
            self._is_closing = True
            raise KeyboardInterrupt


class Child:
    """One process whose output goes to `log`. `end` it; a killed demo takes it along.

    Ctrl-C in a terminal reaches every process of the foreground at once. In a session of its own the child
    does not hear it, and ends when its turn has come.
    """

    def __init__(self, name: str, command: Sequence[str], *, log: Path, env: Mapping[str, str] | None = None) -> None:
        self.name = name
        self.log = log
        environment = {**os.environ, **(env or {}), SUPERVISOR_PID_VARIABLE: str(os.getpid())}
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                # `exec` asks the kernel to kill the child when we die, whatever we die of.
                [sys.executable, "-m", "runtime.exec", "--", *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def check(self) -> None:
        """Raise DemoFailed when it has ended."""
        status = self._process.poll()
        if status is not None:
            how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
            raise DemoFailed(f"{self.name} {how}{last_words(self.log)}", self.log)

    def status(self) -> int | None:
        """Its exit status; None while it runs."""
        return self._process.poll()

    def has_ended(self) -> bool:
        return self.status() is not None

    def ask_to_end(self) -> None:
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """At once, with what it started in its session; waits until it is gone. Idempotent."""
        self._signal(signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5.0)

    def end(self, seconds: float) -> None:
        """Ask, wait, and kill what has not ended in that time."""
        self.ask_to_end()
        deadline = time.monotonic() + seconds
        while not self.has_ended() and time.monotonic() < deadline:
            time.sleep(0.01)  # between two looks
        if not self.has_ended():
            self.kill()

    def _signal(self, number: signal.Signals) -> None:
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)


def last_words(log: Path) -> str:
    """The end of a log, to follow a sentence; empty where there is none."""
    try:
        text = log.read_text(errors="replace").strip()
    except OSError:
        return ""
    return ": " + " / ".join(text.splitlines()[-2:])[-400:] if text else ""
