"""A real mosquitto on a free port, for tests against the real thing.

Where it is not installed the tests are skipped with that reason; under env CI they fail instead.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.deadline import DEADLINE

UNGIVEN_PORTS = (20_000, 32_000)
"Below net.ipv4.ip_local_port_range as it is by default."
_chance = random.SystemRandom()  # which hypothesis does not set to the same start in all processes


def find_mosquitto() -> str | None:
    """The broker's path; distributions put it where a user's PATH does not look."""
    return shutil.which("mosquitto", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")


def require_mosquitto() -> str:
    """The broker's path, or skip the test; under env CI fail it."""
    found = find_mosquitto()
    if found is not None:
        return found
    message = "mosquitto is not installed (apt-get install mosquitto)"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


def free_port() -> int:
    """A TCP port of loopback that nobody else gets by chance: not of those that the kernel gives to who asks for any.

    A test beside this one would else have it, while what is to listen there is starting, or down for a moment.
    """
    while True:
        port = _chance.randrange(*UNGIVEN_PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do
            probe.bind(("127.0.0.1", port))
            return port


class Mosquitto:
    """One broker process with a directory of its own. `start` after `kill` or `terminate` is a restart.

    `lines` are added to its configuration; `persistent` keeps sessions on disk (written at a clean end, and by
    `save`).
    """

    def __init__(
        self,
        directory: Path,
        *,
        lines: Sequence[str] = (),
        port: int | None = None,
        persistent: bool = False,
        defaults: bool = True,
    ) -> None:
        self._program = require_mosquitto()
        self.directory = directory
        self.port = port or free_port()
        self._process: subprocess.Popen[bytes] | None = None
        directory.mkdir(parents=True, exist_ok=True)
        config = [f"listener {self.port} 127.0.0.1", "log_type error", "log_type warning", "log_type notice"]
        if os.geteuid() == 0:
            config.append("user root")
        if defaults:
            config += ["allow_anonymous true", "max_inflight_messages 1000", "max_queued_messages 0"]
        if persistent:
            config += ["persistence true", f"persistence_location {directory}/", "autosave_interval 0"]
        self.config = directory / "mosquitto.conf"
        self.config.write_text("\n".join([*config, *lines]) + "\n")
        self.log = directory / "mosquitto.log"

    @property
    def url(self) -> str:
        return f"tcp://127.0.0.1:{self.port}"

    def start(self) -> Mosquitto:
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen([self._program, "-c", str(self.config)], stdout=log, stderr=log)
        end = time.monotonic() + DEADLINE
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return self
            except OSError:
                if self._process.poll() is not None or time.monotonic() > end:
                    raise AssertionError(f"mosquitto did not start: {self.log.read_text()}") from None
                time.sleep(0.01)  # between two attempts

    def _end(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)
        if self._process is not None:
            self._process.wait(DEADLINE)

    def save(self) -> None:
        """Ask it to write its sessions to disk now (mosquitto(8), SIGUSR1)."""
        assert self._process is not None
        self._process.send_signal(signal.SIGUSR1)

    def freeze(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL: what was not on disk is gone."""
        self._end(signal.SIGKILL)

    def terminate(self) -> None:
        """A clean end: a persistent one writes its sessions."""
        self._end(signal.SIGTERM)

    def __enter__(self) -> Mosquitto:
        return self.start()

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self.thaw()
            self.kill()
