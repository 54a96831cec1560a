"""The bench's own child processes: started, told to go, read one JSON line at a time, always ended."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from bench.memory import cpu_seconds

START_SECONDS = 30.0
"For a child to say that it is ready."

END_SECONDS = 10.0
"For a child to end after SIGTERM; then SIGKILL."


INPUT_SECONDS = 2.0
"For a worker to end after its standard input; then SIGTERM."


class ChildFailed(Exception):
    """A child ended, said nothing in time, or said something that is no JSON."""


class Child:
    """One process in a session of its own, whose standard output is JSON lines or ignored.

    A context manager: leaving it ends the process and waits for it.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        log: Path | None = None,
        end_seconds: float = END_SECONDS,
        ends_with_input: bool = False,
    ) -> None:
        self._ends_with_input = ends_with_input
        self._log = log
        self._end_seconds = end_seconds
        self._name = " ".join(Path(word).name for word in command[:4])
        errors = log.open("ab") if log else None
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors if errors else subprocess.DEVNULL,
                env={**os.environ, **(env or {})},
                start_new_session=True,
            )
        finally:
            if errors:
                errors.close()
        self._pending = bytearray()

    @property
    def pid(self) -> int:
        return self._process.pid

    def cpu_seconds(self) -> float:
        """CPU time so far."""
        return cpu_seconds(self.pid)

    def tell(self, **message: Any) -> None:
        """Write one JSON line to the child. Raises ChildFailed when it is gone."""
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as fault:
            raise self._failed(f"is gone ({fault})") from fault

    def line(self, seconds: float) -> str:
        """The next line of its output. Raises ChildFailed."""
        assert self._process.stdout
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._pending:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise self._failed(f"said nothing for {seconds:.0f} s")
                piece = os.read(self._process.stdout.fileno(), 65536)
                if not piece:
                    raise self._failed(f"ended, status {self._process.wait()}")
                self._pending += piece
        line, _, rest = bytes(self._pending).partition(b"\n")
        self._pending = bytearray(rest)
        return line.decode("utf-8", "replace")

    def answer(self, seconds: float) -> dict[str, Any]:
        """The next line as a JSON object. Raises ChildFailed."""
        line = self.line(seconds)
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise self._failed(f"said {line[:200]!r}, expected a JSON object")
        return value

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def end(self, *, hard: bool = False) -> None:
        """End it and what it started, and wait. Idempotent."""
        if self._ends_with_input and not hard and self._process.stdin:
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                self._process.stdin.close()
                self._process.wait(INPUT_SECONDS)
        if self._process.poll() is None:
            self._signal(signal.SIGKILL if hard else signal.SIGTERM)
            try:
                self._process.wait(self._end_seconds)
            except subprocess.TimeoutExpired:
                self._signal(signal.SIGKILL)
                self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream:
                try:
                    stream.close()
                except OSError:
                    pass  # unflushed words for a process that is gone

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            pass

    def _failed(self, what: str) -> ChildFailed:
        tail = ""
        if self._log and self._log.exists():
            tail = "\n" + self._log.read_text(errors="replace")[-2000:].strip()
        return ChildFailed(f"{self._name} {what}{tail}")


def worker(
    module: str, role: str, arguments: Mapping[str, Any], *, log: Path, env: Mapping[str, str] | None = None
) -> Child:
    """Start `python -m bench.worker` in the given role; it answers `{"ready": true}` when it is."""
    command = [sys.executable, "-m", "bench.worker", module, role, json.dumps(arguments)]
    return await_ready(Child(command, env=env, log=log, ends_with_input=True))


def await_ready(child: Child) -> Child:
    """The child, once it has said `{"ready": true}`. Raises ChildFailed, and ends it then."""
    try:
        child.answer(START_SECONDS)
    except BaseException:
        child.end(hard=True)
        raise
    return child
