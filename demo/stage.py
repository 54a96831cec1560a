"""Everything around the demo's traffic: cloudsim, an MQTT broker, and the node under supervisord."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from demo.around import QUIC, WSS, edgecore, find_mosquitto, free_port, is_free_udp, listens, mosquitto_conf
from demo.children import Child, DemoFailed, Interrupts, last_words
from runtime.home import Home
from runtime.locks import holder, holders
from runtime.supervisord import Supervisor, SupervisorError

NODE: Final = "demo-node"
NODE_LOCK: Final = "node"
"Held by the supervisord of a running node (runtime.cli.node)."

START_SECONDS: Final = 20.0
"For a helper to listen; on a busy machine Python alone takes some seconds to start."
END_SECONDS: Final = 15.0
"For the node: modules may take 8 s to drain."


def wait(condition: Callable[[], bool], what: str, seconds: float, *children: Child, log: Path | None = None) -> None:
    """Until `condition()`. Raises DemoFailed after `seconds`, or when one of `children` has ended."""
    deadline = time.monotonic() + seconds
    while not condition():
        for child in children:
            child.check()
        if time.monotonic() > deadline:
            raise DemoFailed(f"waited {seconds:.0f} s in vain for {what}{last_words(log) if log else ''}", log)
        time.sleep(0.01)  # between two looks


class Stage:
    """Start the parts in order; `close` ends all of them, also half-started. `directory` is made and kept."""

    def __init__(
        self,
        directory: Path,
        home: Path,
        *,
        usual_ports: bool = False,
        link: str = WSS,
        interrupts: Interrupts | None = None,
    ) -> None:
        """`usual_ports`: prefer 1883, 10000, 10001 and 10080 where they are free. `link`: WSS or QUIC."""
        self.interrupts = interrupts or Interrupts()
        self.directory = directory
        self.home = Home(home)
        self.supervisor = Supervisor(self.home.supervisor_socket)
        self.mqtt_name = ""
        "What serves MQTT, in words."
        self.mqtt_port = 0
        self.link = link
        self.cloud_port = 0
        "Where the link goes, TCP or UDP."
        self.control_port = 0
        self._usual_ports = usual_ports
        self._mqtt_mode = 2
        self._cloud: Child | None = None
        self._mqtt: Child | None = None
        self._node: Child | None = None

    @property
    def log(self) -> Path:
        """Where the helpers write; the node's own logs are in `home.log`."""
        return self.directory / "log"

    def start_cloud(self) -> None:
        self.home.prepare()
        if (pid := holder(self.home.lock(NODE_LOCK))) is not None:
            raise DemoFailed(f"a node runs on {self.home.path} already (pid {pid}); end it with Ctrl-C or `make down`")
        directory = self.directory / "cloud"
        for each in (self.directory, self.log, directory):
            each.mkdir(mode=0o700, exist_ok=True)
        log = self.log / "cloudsim.log"
        ready = directory / "ports.json"
        ready.unlink(missing_ok=True)
        ports = [free_port(usual) if self._usual_ports else 0 for usual in (10000, 10080)]
        command = [
            *(sys.executable, "-m", "cloudsim", "--dir", str(directory), "--node", NODE, "--log-level", "info"),
            *("--port", str(ports[0]), "--control-port", str(ports[1])),
            *(
                ("--quic-port", "10001" if self._usual_ports and is_free_udp(10001) else "0")
                if self.link == QUIC
                else ()
            ),
        ]
        with self.interrupts.held():
            self._cloud = cloud = Child("cloudsim", command, log=log)
        wait(
            lambda: ready.exists() and listens(json.loads(ready.read_bytes())["control_port"]),
            "cloudsim",
            START_SECONDS,
            cloud,
            log=log,
        )
        found = json.loads(ready.read_bytes())
        self.cloud_port = found["port" if self.link == WSS else "quic_port"]
        self.control_port = found["control_port"]

    def start_mqtt(self, wanted: str = "auto") -> None:
        """`wanted`: auto, mosquitto or amqtt (which is part of the node and starts with it)."""
        self.mqtt_port = free_port(*([1883] if self._usual_ports else []))
        mosquitto = find_mosquitto() if wanted != "amqtt" else None
        if mosquitto is None:
            if wanted == "mosquitto":
                raise DemoFailed("no mosquitto is installed (Debian, Ubuntu: sudo apt-get install -y mosquitto)")
            self._mqtt_mode = 0
            self.mqtt_name = "amqtt, the built-in broker: no mosquitto is installed" if wanted == "auto" else "amqtt"
            return
        self.mqtt_name = f"mosquitto ({mosquitto})"
        directory = self.directory / "mqtt"
        directory.mkdir(mode=0o700, exist_ok=True)
        log = self.log / "mosquitto.log"
        conf = directory / "mosquitto.conf"
        conf.write_text(mosquitto_conf(self.mqtt_port, directory))
        with self.interrupts.held():
            self._mqtt = broker = Child("mosquitto", [mosquitto, "-c", str(conf)], log=log)
        wait(lambda: listens(self.mqtt_port), "mosquitto", START_SECONDS, broker, log=log)

    def start_node(self) -> None:
        """Returns once supervisord answers and every program has a process."""
        config = self.home.path / "edgecore.yaml"
        config.write_text(
            edgecore(
                NODE,
                self.directory / "cloud",
                cloud_port=self.cloud_port,
                mqtt_port=self.mqtt_port,
                link=self.link,
                mqtt_mode=self._mqtt_mode,
            )
        )
        log = self.log / "up.log"
        environment = {
            "EDGEZMQ_HOME": str(self.home.path),
            "EDGEZMQ_BUS": "",
            "EDGEZMQ_CONFIG": "",
            "EDGEZMQ_SUPERVISORD_CONF": "",
        }
        command = [sys.executable, "-m", "runtime.cli", "up", "-c", str(config)]
        with self.interrupts.held():
            self._node = node = Child("the node", command, log=log, env=environment)
        wait(self._has_started, "supervisord", START_SECONDS, node, log=self.home.log / "supervisord.log")
        if self._mqtt_mode == 0:
            log = self.home.log / "mqtt-broker.log"
            wait(lambda: listens(self.mqtt_port), "the built-in MQTT broker", START_SECONDS, node, log=log)

    def _has_started(self) -> bool:
        try:
            return all(program.state != "STOPPED" for program in self.supervisor.programs())
        except SupervisorError:
            return False

    def pids(self) -> dict[str, int]:
        """Program to pid, of those that run."""
        try:
            return {program.name: program.pid for program in self.supervisor.programs() if program.pid}
        except SupervisorError as fault:
            raise DemoFailed(f"supervisord does not answer: {fault}", self.home.log / "supervisord.log") from fault

    def pid_in_lock(self, program: str) -> int:
        """Which process holds the name now, or held it last. Wakes nobody, unlike a question to supervisord."""
        try:
            return int(self.home.lock(program).read_bytes() or 0)
        except (OSError, ValueError):
            return 0

    def check(self) -> None:
        """Raise DemoFailed when a part that is not killed on purpose has ended, or the node has given one up."""
        for child in (self._cloud, self._mqtt, self._node):
            if child is not None:
                child.check()

    def node_was_stopped(self) -> bool:
        """Whether the node has ended in good order, which somebody must have asked for."""
        return self._node is not None and self._node.status() == 0

    def failing_program(self) -> str | None:
        """A program that does not start, for a failure to name its log."""
        with contextlib.suppress(SupervisorError):
            for program in self.supervisor.programs():
                if program.state in ("FATAL", "BACKOFF"):
                    return program.name
        return None

    def close(self, seconds: float = END_SECONDS) -> None:
        """End the node, in good order if it takes no longer than `seconds`, then what is around it. Idempotent."""
        if self._node is not None:
            self._end_node(self._node, seconds)
        for child in (self._mqtt, self._cloud):
            if child is not None:
                child.end(0.0 if self.interrupts.hurry else 5.0)

    def _end_node(self, node: Child, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        node.ask_to_end()
        while not node.has_ended() and time.monotonic() < deadline and not self.interrupts.hurry:
            time.sleep(0.03)  # between two looks
        node.kill()  # and with it, by the kernel's word, every process under it
        deadline = time.monotonic() + 5.0
        while self.home.run.is_dir() and any(holders(self.home.run)) and time.monotonic() < deadline:
            time.sleep(0.01)
