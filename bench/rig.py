"""A whole node to measure: cloudsim, mosquitto, a configuration, and the node under the shipped supervisord.conf."""

from __future__ import annotations

import json
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.children import Child, ChildFailed
from bench.contenders import SERVER_SECONDS, mosquitto
from demo.around import edgecore

NODE_NAME = "bench-node"
SERVED_SECONDS = 30.0
END_SECONDS = 30.0
"Modules may take 8 s to drain, one after another in the worst case."

STAYED_SECONDS = 4
"A program that configuration disables ends once supervisord takes it for started; one that is older stays."

POLL_SECONDS = 0.005
"Between two questions to cloudsim; what we may be late by."


@dataclass(frozen=True, slots=True)
class Rig:
    """What a node needs around it, running."""

    home: Path
    config: Path
    control_port: int
    mqtt_port: int
    cloud: Child
    relay: Child | None
    relay_output: Path
    mqtt: Child

    @property
    def env(self) -> dict[str, str]:
        return {"EDGEZMQ_HOME": str(self.home), "EDGEZMQ_BUS": "", "EDGEZMQ_CONFIG": ""}

    @property
    def endpoint(self) -> str:
        return f"ipc://{self.home}/run/bus.sock"

    def ask(self, path: str) -> dict[str, Any]:
        """cloudsim's answer to a GET. Raises ChildFailed."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.control_port}{path}", timeout=10) as answer:
                value: dict[str, Any] = json.load(answer)
                return value
        except (OSError, ValueError) as fault:
            raise ChildFailed(f"cloudsim at {path}: {fault}") from fault

    def arrived(self) -> int:
        """Distinct messages that have come up."""
        return int(self.ask("/received")["distinct"])

    def logs(self) -> str:
        """The ends of the node's logs, for a failure."""
        parts = []
        for path in sorted((self.home / "log").glob("*")):
            text = path.read_text(errors="replace")[-1500:].strip()
            if text:
                parts.append(f"--- {path.name}\n{text}")
        return "\n".join(parts)


@contextmanager
def rig(directory: Path, *, with_relay: bool = False) -> Iterator[Rig]:
    """Start cloudsim and mosquitto, and write a configuration for them, all under `directory`."""
    with ExitStack() as stack:
        pki, home = directory / "cloud", directory / "home"
        cloud = stack.enter_context(
            Child(
                [
                    *(sys.executable, "-m", "cloudsim", "--dir", str(pki), "--node", NODE_NAME),
                    # A reconnect is refused now and then by a real CloudHub (a race); here it would be noise.
                    *("--port", "0", "--control-port", "0", "--replacement-race", "0"),
                ],
                log=directory / "cloudsim.log",
            )
        )
        ports = ready_line(cloud)
        cloud_port, relay, relay_output = int(ports["port"]), None, directory / "relay.txt"
        if with_relay:
            relay = stack.enter_context(
                Child([sys.executable, "-m", "bench.relay", f"127.0.0.1:{cloud_port}", str(relay_output)])
            )
            cloud_port = int(relay.answer(SERVER_SECONDS)["port"])
        mqtt, mqtt_port = stack.enter_context(
            mosquitto(directory, "persistence false\nmax_queued_messages 0\nmax_inflight_messages 1000\n")
        )
        config = directory / "edgecore.yaml"
        config.write_text(edgecore(NODE_NAME, pki, cloud_port=cloud_port, mqtt_port=mqtt_port))
        yield Rig(home, config, int(ports["control_port"]), mqtt_port, cloud, relay, relay_output, mqtt)


def ready_line(cloud: Child) -> dict[str, Any]:
    """The ports that cloudsim tells when it is ready. Raises ChildFailed."""
    line = cloud.line(SERVER_SECONDS)
    _, found, document = line.partition("cloudsim ready ")
    if not found:
        raise ChildFailed(f"cloudsim said {line!r}, expected its ready line")
    ports: dict[str, Any] = json.loads(document)
    return ports


def start_node(rig: Rig) -> Child:
    """`edgezmq up` in the foreground: it becomes supervisord, so the child is the node."""
    return Child(
        [sys.executable, "-m", "runtime.cli", "up", "--config", str(rig.config)],
        env=rig.env,
        log=rig.home.parent / "up.log",
        end_seconds=END_SECONDS,
    )


def wait_served(rig: Rig, node: Child, seconds: float = SERVED_SECONDS) -> None:
    """Until cloudsim serves the node. Raises ChildFailed with the node's logs."""
    deadline = time.monotonic() + seconds
    while not rig.ask("/health")["served"]:
        if not node.is_alive() or time.monotonic() > deadline:
            raise ChildFailed(f"the link is not served after {seconds:.0f} s\n{rig.logs()}")
        time.sleep(POLL_SECONDS)


def wait_gone(rig: Rig, seconds: float = SERVED_SECONDS) -> None:
    """Until cloudsim has noticed that the node is gone."""
    deadline = time.monotonic() + seconds
    while rig.ask("/health")["served"]:
        if time.monotonic() > deadline:
            raise ChildFailed(f"cloudsim still serves a node that ended {seconds:.0f} s ago")
        time.sleep(POLL_SECONDS)


def processes(rig: Rig, node: Child, seconds: float = SERVED_SECONDS) -> dict[str, int]:
    """Name to pid of all that runs under the node's supervisord, and of supervisord itself.

    Waits until every program has started, or has ended because configuration does not want it.
    Raises ChildFailed.
    """
    from runtime.supervisord import Supervisor

    supervisor = Supervisor(rig.home / "run" / "supervisor.sock")
    deadline = time.monotonic() + seconds
    programs = supervisor.programs()
    while not all(
        program.state == "EXITED" or (program.state == "RUNNING" and program.seconds_up >= STAYED_SECONDS)
        for program in programs
    ):
        if time.monotonic() > deadline:
            states = ", ".join(f"{program.name} {program.state}" for program in programs)
            raise ChildFailed(f"not all programs run after {seconds:.0f} s: {states}\n{rig.logs()}")
        time.sleep(0.1)
        programs = supervisor.programs()
    return {"supervisord": node.pid, **{program.name: program.pid for program in programs if program.pid}}
