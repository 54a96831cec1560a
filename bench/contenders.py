"""Who takes part: edgezmq and its peers, each with its server. What is not installed says so and is not run."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from bench import report
from bench.children import Child, ChildFailed, worker

SERVER_SECONDS = 15.0
"For a server to listen."

INSTALL_HINT = "`make bench-peers` installs it"

PEERS_DIRECTORY = Path(__file__).resolve().parent.parent / ".bench"
"Where `make bench-peers` puts a nats-server that it had to build."

SBIN = ("/usr/sbin", "/usr/local/sbin")
"Debian keeps servers here, which is not on everybody's PATH."


@dataclass(frozen=True, slots=True)
class Server:
    """A running server and what its clients need to know."""

    child: Child
    arguments: Mapping[str, Any]
    "Merged into the arguments of both workers."


class Contender(Protocol):
    """One column of the table: a server, and the client's two sides."""

    name: str
    probe_messages: int
    most_messages: int

    def missing(self) -> str | None:
        """Why it cannot run here; None when it can."""

    def version(self) -> str:
        """Server and client, as they name themselves."""

    def serve(self, directory: Path) -> AbstractContextManager[Server]:
        """Start the server in an empty directory, give it once it listens, end it."""

    def start(self, role: str, arguments: Mapping[str, Any], log: Path) -> Child:
        """Start the client's side of this role (see worker.ROLES); it is ready then. Raises ChildFailed."""


def find_program(name: str) -> str | None:
    """The path of a server program: in `.bench/`, on PATH, or where Debian puts servers."""
    path = os.pathsep.join([str(PEERS_DIRECTORY), os.environ.get("PATH", os.defpath), *SBIN])
    return shutil.which(name, path=path)


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_port(port: int, child: Child, seconds: float = SERVER_SECONDS) -> None:
    """Until something listens on a port of 127.0.0.1. Raises ChildFailed when the child ends before, or late."""
    deadline = time.monotonic() + seconds
    while child.is_alive():
        with socket.socket() as probe:
            probe.settimeout(1.0)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        if time.monotonic() > deadline:
            raise ChildFailed(f"nothing listens on port {port} after {seconds:.0f} s")
        time.sleep(0.02)
    raise ChildFailed(f"the server for port {port} ended")


class Edgezmq:
    """Our broker, started as supervisord starts it, on an ipc socket; the SDK at both ends."""

    name = report.EDGEZMQ
    probe_messages = 20_000
    most_messages = 3_000_000

    def missing(self) -> str | None:
        if importlib.util.find_spec("runtime.broker") is None or importlib.util.find_spec("runtime.client") is None:
            return "runtime.broker or runtime.client is missing"
        return None

    def version(self) -> str:
        import zmq

        import runtime

        return f"edgezmq {runtime.__version__}, pyzmq {zmq.__version__}, libzmq {zmq.zmq_version()}"

    @contextmanager
    def serve(self, directory: Path) -> Iterator[Server]:
        home = directory / "home"
        env = {"EDGEZMQ_HOME": str(home), "EDGEZMQ_BUS": ""}
        bus = home / "run" / "bus.sock"
        with Child([sys.executable, "-m", "runtime.broker"], env=env, log=directory / "broker.log") as child:
            deadline = time.monotonic() + SERVER_SECONDS
            while not bus.exists():
                if not child.is_alive() or time.monotonic() > deadline:
                    raise ChildFailed("the broker does not listen:\n" + (directory / "broker.log").read_text()[-2000:])
                time.sleep(0.02)
            yield Server(child, {"endpoint": f"ipc://{bus}"})

    def start(self, role: str, arguments: Mapping[str, Any], log: Path) -> Child:
        return worker("edgezmq_side", role, arguments, log=log)


class Nats:
    """nats-server as it is installed, but with room for a subscriber that lags, so that it loses nothing."""

    probe_messages = 10_000
    most_messages = 2_000_000

    def __init__(self, *, uvloop: bool = False) -> None:
        self.name = report.NATS_UVLOOP if uvloop else report.NATS
        self._uvloop = uvloop

    def missing(self) -> str | None:
        if find_program("nats-server") is None:
            return f"nats-server is not installed ({INSTALL_HINT})"
        for package in ("nats", "uvloop") if self._uvloop else ("nats",):
            if importlib.util.find_spec(package) is None:
                return f"the Python package {package} is not installed ({INSTALL_HINT})"
        return None

    def version(self) -> str:
        return f"{_says(find_program('nats-server'), '--version')}, nats-py {_package('nats-py')}" + (
            f", uvloop {_package('uvloop')}" if self._uvloop else ""
        )

    @contextmanager
    def serve(self, directory: Path) -> Iterator[Server]:
        port = free_port()
        configuration = directory / "nats.conf"
        # The stock 64 MB of max_pending cuts off a subscriber that lags behind 4 KiB messages.
        configuration.write_text(f"listen: 127.0.0.1:{port}\nmax_pending: 1GB\n")
        program = find_program("nats-server")
        assert program
        with Child([program, "-c", str(configuration)], log=directory / "nats.log") as child:
            wait_for_port(port, child)
            yield Server(child, {"url": f"nats://127.0.0.1:{port}", "uvloop": self._uvloop})

    def start(self, role: str, arguments: Mapping[str, Any], log: Path) -> Child:
        return worker("nats_side", role, arguments, log=log)


class Mosquitto:
    """mosquitto in memory, without limits on its queues."""

    name = report.MOSQUITTO
    probe_messages = 2_000
    most_messages = 200_000

    def missing(self) -> str | None:
        if find_program("mosquitto") is None:
            return f"mosquitto is not installed ({INSTALL_HINT})"
        return None

    def version(self) -> str:
        return f"{_says(find_program('mosquitto'), '-h')}, paho-mqtt {_package('paho-mqtt')}"

    @contextmanager
    def serve(self, directory: Path) -> Iterator[Server]:
        with mosquitto(directory, "persistence false\nmax_queued_messages 0\n") as (child, port):
            yield Server(child, {"port": port})

    def start(self, role: str, arguments: Mapping[str, Any], log: Path) -> Child:
        return worker("mosquitto_side", role, arguments, log=log)


@contextmanager
def mosquitto(directory: Path, settings: str) -> Iterator[tuple[Child, int]]:
    """A mosquitto for anybody on a free port of 127.0.0.1, with further settings; it and its port."""
    program, port = find_program("mosquitto"), free_port()
    if program is None:
        raise ChildFailed(f"mosquitto is not installed ({INSTALL_HINT})")
    configuration = directory / "mosquitto.conf"
    configuration.write_text(
        f"listener {port} 127.0.0.1\nallow_anonymous true\nset_tcp_nodelay true\nlog_type error\n{settings}"
    )
    with Child([program, "-c", str(configuration)], log=directory / "mosquitto.log") as child:
        wait_for_port(port, child)
        yield child, port


def _says(program: str | None, argument: str) -> str:
    if program is None:
        return "not installed"
    said = subprocess.run([program, argument], capture_output=True, text=True, timeout=10, check=False)
    return (said.stdout or said.stderr).strip().splitlines()[0]


def _package(name: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
