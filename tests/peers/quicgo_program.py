"""The Go peer as a program: built once, run as a CloudHub (`GoHub`) or as an edge node (`GoEdge`).

Where Go is missing the tests are skipped with that reason; under env CI they fail instead. `tests/peers/install-go`
gets one.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from cloudsim.certificates import Authority
from tests.support.aio import until_sync
from tests.support.deadline import DEADLINE

SOURCE = Path(__file__).parent / "quicgo"
ROOT = Path(__file__).parents[2]
BUILD_SECONDS = 600
"A first build fetches quic-go and compiles Go's own library, too."


def find_go() -> str | None:
    """A Go that can build the peer: it has the version that go.mod asks for, or may fetch it."""
    for directory in (None, "/usr/local/go/bin", str(ROOT / ".go" / "bin")):
        program = shutil.which("go", path=directory)
        if program is not None:
            # A Go that is too old refuses the module.
            asked = subprocess.run([program, "list", "-m"], cwd=SOURCE, capture_output=True, check=False)
            if asked.returncode == 0:
                return program
    return None


def build(target: Path) -> Path:
    """The program, built from source at `target`; or skip the test, under env CI fail it."""
    go = find_go()
    if go is None:
        message = "there is no Go that can build the peer (tests/peers/install-go)"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    done = subprocess.run(
        [go, "build", "-mod=readonly", "-o", str(target), "."],
        cwd=SOURCE,
        capture_output=True,
        text=True,
        timeout=BUILD_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return target


class GoHub:
    """A CloudHub of somebody else's making. `flags` are those of `quicgo serve`, without the dash."""

    def __init__(self, program: Path, directory: Path, authority: Authority, **flags: str | bool) -> None:
        pair = authority.server(["127.0.0.1", "localhost"])
        files = {"ca": str(authority.ca.certificate), "cert": str(pair.certificate), "key": str(pair.key)}
        self._command = [str(program), "serve", *_arguments(files | flags)]
        self._log = directory / "quicgo.log"
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0
        self.control = ""

    async def __aenter__(self) -> GoHub:
        await asyncio.to_thread(self.start)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.thaw()
        await asyncio.to_thread(self.kill)

    def start(self) -> None:
        """Start it, after `kill` on the port that it had."""
        listen = _arguments({"listen": f"127.0.0.1:{self.port}"})
        with self._log.open("ab") as log:
            self._process = subprocess.Popen([*self._command, *listen], stdout=subprocess.PIPE, stderr=log)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the peer did not start: {self._log.read_text()}"
        ready = json.loads(line)
        self.port = int(ready["address"].rpartition(":")[2])
        self.control = ready["control"]

    def kill(self) -> None:
        """SIGKILL: its connections are not closed, they just cease."""
        self._end(signal.SIGKILL)

    def terminate(self) -> None:
        """A clean end, with its connections closed."""
        self._end(signal.SIGTERM)

    def _end(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)
        self._process.wait(DEADLINE)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def freeze(self) -> None:
        """SIGSTOP, and wait for it: another core may run the process a little longer."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        process = psutil.Process(self._process.pid)
        until_sync(lambda: process.status() == psutil.STATUS_STOPPED, "the peer to stand still")

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    # --- its control interface; see quicgo/control.go ---

    async def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """GET `path`, or POST `body` to it; fails the test with what it says if it refuses."""
        data = None if body is None else json.dumps(body).encode()
        return await asyncio.to_thread(self._ask, urllib.request.Request(self.control + path, data))

    def _ask(self, request: urllib.request.Request) -> Any:
        try:
            with urllib.request.urlopen(request, timeout=DEADLINE) as response:
                return json.load(response)
        except urllib.error.HTTPError as refusal:
            with refusal:
                raise AssertionError(f"{request.full_url}: {refusal.read().decode()}") from None

    async def sessions(self) -> list[dict[str, Any]]:
        return list((await self.ask("/state"))["sessions"])

    async def faults(self) -> list[str]:
        """Connections that it ended because we broke the protocol."""
        return list((await self.ask("/state"))["faults"])

    async def received(self) -> list[dict[str, Any]]:
        records: list[dict[str, Any]] = []
        while more := await self.ask(f"/received?since={len(records)}&limit=5000"):
            records += more
        return records

    async def send(self, node: str, **order: Any) -> list[str]:
        """Send down what an `order` of quicgo/hub.go says; the ids of the messages."""
        return list((await self.ask("/send", {"node": node, **order}))["ids"])

    async def delivery(self, message_id: str) -> dict[str, Any]:
        return dict(await self.ask(f"/deliveries/{message_id}"))


class GoEdge:
    """An edge node of somebody else's making. `flags` are those of `quicgo dial`, without the dash."""

    def __init__(self, program: Path, authority: Authority, node: str, port: int, **flags: str | bool) -> None:
        pair = authority.node(node)
        files = {"ca": str(authority.ca.certificate), "cert": str(pair.certificate), "key": str(pair.key)}
        self._command = [str(program), "dial", *_arguments(files | {"node": node} | flags), f"127.0.0.1:{port}"]
        self._process: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self.events: list[dict[str, Any]] = []
        "What it saw so far; see quicgo/edge.go."

    async def __aenter__(self) -> GoEdge:
        self._process = await asyncio.create_subprocess_exec(
            *self._command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        self._reading = asyncio.create_task(self._read(), name="events of the Go edge")
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._process is not None
        if self._process.returncode is None:
            self._process.kill()
        await self.finish()

    async def _read(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            self.events.append(json.loads(line))

    def saw(self, event: str) -> list[dict[str, Any]]:
        return [each for each in self.events if each["event"] == event]

    async def finish(self) -> str:
        """Wait for its end; what it complained of, empty if all went well."""
        assert self._process is not None
        assert self._process.stderr is not None
        assert self._reading is not None
        await self._reading
        complaint = await self._process.stderr.read()
        await self._process.wait()
        return complaint.decode()


def _arguments(flags: dict[str, str | bool]) -> Sequence[str]:
    return [
        f"-{name.replace('_', '-')}={str(value).lower() if isinstance(value, bool) else value}"
        for name, value in flags.items()
    ]
