"""What the cloud link's measures run on: cloudsim, a broker and edgehub as processes, for one transport."""

from __future__ import annotations

import json
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.children import Child, ChildFailed
from bench.report import QUIC, WSS
from bench.rig import POLL_SECONDS, SERVED_SECONDS, ready_line
from runtime.config import EdgeHubSection, NodeConfig, QuicSection, WebsocketSection, store
from runtime.home import Home

NODE = "bench-node"
LINK = "bench-link"
"The node of edgehub's end of the link alone."

TRANSPORTS: Mapping[str, str] = {WSS: "websocket", QUIC: "quic"}
"Our word and edgehub's."


@dataclass(frozen=True, slots=True)
class Run:
    """One run of one measure."""

    rate: float
    cpu_seconds: dict[str, float]
    "By role."


Measured = Callable[[int], Run]
"Runs one measure with so many messages. Raises ChildFailed."


@dataclass(frozen=True, slots=True)
class Site:
    """One transport's processes, running."""

    directory: Path
    transport: str
    port: int
    "Where the hub listens for this transport."
    control_port: int
    cloud: Child
    broker: Child
    edgehub: Child
    home: Home

    def ask(self, path: str, body: bytes | None = None) -> Any:
        """cloudsim's answer. Raises ChildFailed."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.control_port}{path}", data=body)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.load(answer)
        except (OSError, ValueError) as fault:
            raise ChildFailed(f"cloudsim at {path}: {fault}") from fault

    @property
    def pids(self) -> list[int]:
        return [child.pid for child in (self.cloud, self.broker, self.edgehub)]

    def credentials(self, node: str) -> dict[str, str]:
        return _credentials(self.directory, node)


@contextmanager
def site(directory: Path, transport: str) -> Iterator[Site]:
    """Start cloudsim, broker and edgehub under `directory`; returns once the link is served. Raises ChildFailed."""
    directory.mkdir()
    with ExitStack() as stack:
        cloud = stack.enter_context(
            Child(
                [
                    *(sys.executable, "-m", "cloudsim", "--dir", str(directory / "cloud")),
                    *("--node", NODE, "--node", LINK, "--port", "0", "--control-port", "0", "--quic-port", "0"),
                    # A reconnect is refused now and then by a real CloudHub (a race); here it would be noise.
                    *("--replacement-race", "0"),
                ],
                log=directory / "cloudsim.log",
            )
        )
        ports = ready_line(cloud)
        port = int(ports["port" if transport == WSS else "quic_port"])
        home = Home(directory / "home")
        home.prepare()
        store(_configuration(_credentials(directory, NODE), transport, port), home)
        env = {"EDGEZMQ_HOME": str(home.path), "EDGEZMQ_BUS": ""}
        broker, edgehub = (
            stack.enter_context(Child([sys.executable, "-m", module], env=env, log=directory / f"{module}.log"))
            for module in ("runtime.broker", "modules.edgehub")
        )
        around = Site(directory, transport, port, int(ports["control_port"]), cloud, broker, edgehub, home)
        _wait_served(around)
        yield around


def _credentials(directory: Path, node: str) -> dict[str, str]:
    pki = directory / "cloud"
    return {"ca": str(pki / "ca.crt"), "certificate": str(pki / f"{node}.crt"), "key": str(pki / f"{node}.key")}


def _configuration(credentials: Mapping[str, str], transport: str, port: int) -> NodeConfig:
    server = f"127.0.0.1:{port}"
    hub = EdgeHubSection(
        message_qps=0,
        tls_ca_file=credentials["ca"],
        tls_cert_file=credentials["certificate"],
        tls_private_key_file=credentials["key"],
        websocket=WebsocketSection(enable=transport == WSS, server=server),
        quic=QuicSection(enable=transport == QUIC, server=server),
    )
    return NodeConfig(node_name=NODE, edge_hub=hub)


def _wait_served(around: Site) -> None:
    deadline = time.monotonic() + SERVED_SECONDS
    while not around.ask("/health")["served"]:
        if not around.edgehub.is_alive() or time.monotonic() > deadline:
            log = (around.directory / "modules.edgehub.log").read_text(errors="replace")[-2000:]
            raise ChildFailed(f"the link is not served over {around.transport}\n{log}")
        time.sleep(POLL_SECONDS)


def link_arguments(around: Site, count: int) -> dict[str, Any]:
    protocol = TRANSPORTS[around.transport]
    return {"node": LINK, "port": around.port, "protocol": protocol, "count": count, **around.credentials(LINK)}


class Cpu:
    """CPU time of processes from now on."""

    def __init__(self, who: Mapping[str, Child]) -> None:
        self._who = who
        self._before = {role: child.cpu_seconds() for role, child in who.items()}

    def spent(self) -> dict[str, float]:
        return {role: child.cpu_seconds() - self._before[role] for role, child in self._who.items()}
