"""A real node under supervisord in a directory of its own, for tests that kill things."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runtime.home import Home
from runtime.locks import holder
from runtime.supervisord import Program, Supervisor, SupervisorError
from tests.support.aio import until_sync
from tests.support.deadline import DEADLINE

PROGRAM = """[program:{name}]
command={command}
autorestart=unexpected
exitcodes=0
startsecs=1
stopwaitsecs=10
stopasgroup=true
killasgroup=true
redirect_stderr=true
stdout_logfile={logfile}
"""


class Node:
    """`up` before anything else; `end` leaves nothing behind, whatever happened."""

    def __init__(self, directory: Path) -> None:
        self.home = Home(directory).prepare()
        self.supervisor = Supervisor(self.home.supervisor_socket)
        self.environ = {key: value for key, value in os.environ.items() if not key.startswith("EDGEZMQ_")}
        self.environ["EDGEZMQ_HOME"] = str(directory)

    # --- before it is up ---

    def configure(self, text: str) -> None:
        (self.home.path / "edgecore.yaml").write_text(text)

    def add_module(self, name: str, code: str) -> None:
        """A module of the user's, written in Python."""
        file = self.home.data / f"{name}.py"
        file.write_text(code)
        self.add_program(name, f'"{sys.executable}" {file}')

    def add_program(self, name: str, command: str, logfile: str = "") -> None:
        conf = PROGRAM.format(name=name, command=command, logfile=logfile or self.home.log / f"{name}.log")
        (self.home.modules / f"{name}.conf").write_text(conf)

    # --- the command ---

    def edgezmq(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "runtime.cli", *arguments],
            check=False,
            capture_output=True,
            text=True,
            timeout=4 * DEADLINE,
            env=self.environ,
        )

    def up(self) -> None:
        done = self.edgezmq("up", "-d")
        assert done.returncode == 0, done.stderr

    def up_in_foreground(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "runtime.cli", "up"],
            env=self.environ,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def status(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.edgezmq("status", "--json").stdout)
        return document

    def module(self, name: str) -> dict[str, Any]:
        """Its row of `edgezmq status`."""
        return next(module for module in self.status()["modules"] if module["name"] == name)

    # --- what supervisord and the kernel say ---

    def program(self, name: str) -> Program:
        return next(program for program in self.supervisor.programs() if program.name == name)

    def is_running(self, name: str) -> bool:
        try:
            return self.program(name).state == "RUNNING"
        except (SupervisorError, StopIteration):
            return False

    def wait_running(self, name: str, *, not_pid: int = 0) -> int:
        """Wait until it runs as another process than `not_pid`; its pid."""
        self.until(lambda: self.is_running(name) and self.program(name).pid != not_pid, f"{name} to run")
        return self.program(name).pid

    def until(self, condition: Callable[[], object], what: str) -> None:
        try:
            until_sync(condition, what)
        except AssertionError as fault:
            raise AssertionError(f"{fault}\n{self.logs()}") from None

    def log(self, name: str) -> str:
        return (self.home.log / f"{name}.log").read_text(errors="replace")

    def logs(self) -> str:
        texts = {file.name: file.read_text(errors="replace")[-3000:] for file in sorted(self.home.log.glob("*"))}
        return "\n".join(f"--- {name}\n{text}" for name, text in texts.items())

    def processes(self) -> list[int]:
        """Every living process that was started for this home."""
        mark = f"EDGEZMQ_HOME={self.home.path}\0".encode()
        pids = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    if mark in (entry / "environ").read_bytes() + b"\0":
                        pids.append(int(entry.name))
                except OSError:
                    continue
        return pids

    def end(self) -> None:
        pid = holder(self.home.lock("node"))
        if pid:
            os.kill(pid, signal.SIGKILL)
        for left in self.processes():
            try:
                os.kill(left, signal.SIGKILL)
            except ProcessLookupError:
                continue
        until_sync(lambda: not self.processes(), "the end of all processes")


@contextmanager
def node_in(directory: Path) -> Iterator[Node]:
    """A node that is ended with the block."""
    node = Node(directory)
    try:
        yield node
    finally:
        node.end()
