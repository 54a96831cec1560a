"""The cloud link with Go at one end or both: what a native node gets out of cloudsim, and edgehub out of a native hub.

Over wss `bench/gowss` stands in: it writes and reads as KubeEdge's own edgehub and CloudHub do, over the library they
use. Over QUIC it is the Go peer of the tests (tests/peers/quicgo). Both are built here, where there is Go.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench import report
from bench.bus import WORK_SECONDS, Say
from bench.children import START_SECONDS, Child, ChildFailed, worker
from bench.cloudsite import LINK, Cpu, Measured, Run, Site, link_arguments
from bench.contenders import PEERS_DIRECTORY
from bench.payload import READING_BYTES, reading
from bench.report import QUIC, WSS, Results

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {WSS: Path(__file__).with_name("gowss"), QUIC: ROOT / "tests" / "peers" / "quicgo"}
BUILD_SECONDS = 600.0
"A first build fetches libraries and compiles Go's own."


def runs(
    results: Results, stack: ExitStack, directory: Path, sites: dict[str, Site], say: Say
) -> tuple[dict[tuple[str, str], Measured], list[int]]:
    """What can be run with Go, by measure and transport, and the hubs' process ids.

    Without Go: nothing, and `results` says why.
    """
    possible: dict[tuple[str, str], Measured] = {}
    pids: list[int] = []
    for transport, around in sites.items():
        try:
            program = _build(transport)
            hub = _Hub(program, around, directory / f"native-{transport}.log")
            stack.enter_context(hub)
            pids.append(hub.pid)
        except ChildFailed as fault:
            results.not_run[f"native {transport}"] = str(fault)
            say(f"native {transport}: not run: {fault}")
            continue
        peer = _Peer(program, around, hub)
        possible[report.NATIVE_UPLOADS, transport] = peer.native_upload
        possible[report.LINK_UPLOADS_NATIVE_HUB, transport] = peer.link_upload
        possible[report.LINK_DOWNLOADS_NATIVE_HUB, transport] = peer.link_download
        possible[report.NATIVE_UPLOADS_NATIVE_HUB, transport] = peer.native_upload_to_native_hub
    return possible, pids


def _build(transport: str) -> Path:
    source = SOURCES[transport]
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/go/bin", str(ROOT / ".go" / "bin")])
    go = shutil.which("go", path=path)
    if go is None:
        raise ChildFailed("Go is not installed (tests/peers/install-go)")
    PEERS_DIRECTORY.mkdir(exist_ok=True)
    (PEERS_DIRECTORY / ".gitignore").write_text("*\n")
    program = PEERS_DIRECTORY / source.name
    try:
        done = subprocess.run(
            [go, "build", "-mod=readonly", "-o", str(program), "."],
            cwd=source,
            capture_output=True,
            text=True,
            timeout=BUILD_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as fault:
        raise ChildFailed(f"{source.name} could not be built: {fault}") from fault
    if done.returncode:
        raise ChildFailed(f"{source.name} could not be built: {done.stderr.strip()[-500:]}")
    return program


class _Hub(Child):
    """A hub in Go, with the certificates of a site's cloudsim."""

    def __init__(self, program: Path, around: Site, log: Path) -> None:
        pki = around.directory / "cloud"
        files = ["-ca", str(pki / "ca.crt"), "-cert", str(pki / "server.crt"), "-key", str(pki / "server.key")]
        super().__init__([str(program), "serve", *files], log=log)
        self._is_quic = around.transport == QUIC
        try:
            ready = self.answer(START_SECONDS)
        except ChildFailed:
            self.end(hard=True)
            raise
        if self._is_quic:
            self.port = int(ready["address"].rpartition(":")[2])
            self._control = ready["control"]
        else:
            self.port = int(ready["port"])
            self._control = f"http://127.0.0.1:{ready['control_port']}"

    def send(self, node: str, count: int) -> None:
        """Commands for a node. Raises ChildFailed."""
        if self._is_quic:
            order = {
                "node": node,
                "source": "router_eventbus",
                "group": "user",
                "operation": "publish",
                "resource": "bench/command",
                "content": json.dumps(reading(0)),
                "count": count,
            }
            request = urllib.request.Request(f"{self._control}/send", data=json.dumps(order).encode())
        else:
            request = urllib.request.Request(f"{self._control}/send?node={node}&count={count}", data=b"")
        try:
            with urllib.request.urlopen(request, timeout=WORK_SECONDS) as answer:
                answer.read()
        except OSError as fault:
            raise ChildFailed(f"the native hub does not send: {fault}") from fault


class _Peer:
    """Go's node and Go's hub of one transport, beside a site."""

    def __init__(self, program: Path, around: Site, hub: _Hub) -> None:
        self._program = program
        self._around = around
        self._hub = hub

    def link_upload(self, count: int) -> Run:
        """edgehub's end of the link to Go's hub."""
        arguments = {**link_arguments(self._around, count), "port": self._hub.port}
        with worker("link_side", "sender", arguments, log=self._log) as sending:
            cpu = Cpu({"hub": self._hub})
            sending.tell(go=True)
            sent = sending.answer(WORK_SECONDS)
            spent = cpu.spent() | {"edgehub": float(sent["cpu_seconds"])}
        return Run(count * 1e9 / float(sent["finished_ns"] - sent["started_ns"]), spent)

    def link_download(self, count: int) -> Run:
        arguments = {**link_arguments(self._around, count), "port": self._hub.port}
        with worker("link_side", "receiver", arguments, log=self._log) as receiving:
            cpu = Cpu({"hub": self._hub})
            receiving.tell(go=True)
            started = time.monotonic_ns()
            self._hub.send(arguments["node"], count)
            got = receiving.answer(WORK_SECONDS)
            spent = cpu.spent() | {"edgehub": float(got["cpu_seconds"])}
        return Run(count * 1e9 / float(got["last_ns"] - started), spent)

    def native_upload(self, count: int) -> Run:
        """Go's node to cloudsim."""
        return self._native(count, self._around.port, {"cloudsim": self._around.cloud})

    def native_upload_to_native_hub(self, count: int) -> Run:
        return self._native(count, self._hub.port, {"hub": self._hub})

    def _native(self, count: int, port: int, who: dict[str, Child]) -> Run:
        files = self._around.credentials(LINK)
        command = [
            *(str(self._program), "dial", "-ca", files["ca"], "-cert", files["certificate"], "-key", files["key"]),
            *("-node", LINK, *self._wanted(count), f"127.0.0.1:{port}"),
        ]
        with Child(command, log=self._log) as node:
            if self._around.transport == QUIC:
                _until(node, "confirmed")
                cpu, started = Cpu({**who, "node": node}), time.monotonic()
                _until(node, "uploaded")
                return Run(count / (time.monotonic() - started), cpu.spent())
            node.answer(START_SECONDS)
            cpu = Cpu(who)
            node.tell(go=True)
            said = node.answer(WORK_SECONDS)
            return Run(count / float(said["seconds"]), cpu.spent() | {"node": float(said["cpu_seconds"])})

    def _wanted(self, count: int) -> list[str]:
        if self._around.transport == QUIC:
            return ["-uploads", str(count), "-size", str(READING_BYTES)]
        return ["-count", str(count)]

    @property
    def _log(self) -> Path:
        return self._around.directory / "native.log"


def _until(node: Child, event: str) -> dict[str, Any]:
    """Read what Go's QUIC node says until it says this. Raises ChildFailed."""
    while (said := node.answer(WORK_SECONDS)).get("event") != event:
        if said.get("event") == "end":
            raise ChildFailed(f"Go's node ended: {said.get('reason')}")
    return said
