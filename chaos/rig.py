"""One node with everything around it, made to be broken: supervisord's tree, mosquitto, cloudsim, two relays.

device ── mosquitto ── relay ── eventbus ── broker ── edgehub ── relay ── cloudsim
                                maker, keeper, asker, answerer and the Go and the C module on the same broker
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import selectors
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from chaos.disk import Control, Disk
from chaos.mixed import FELLOWS, WORDS
from chaos.places import NODE
from chaos.tail import Tail
from demo.around import QUIC, WSS, edgecore, find_mosquitto, free_port, listens, mosquitto_conf
from demo.children import Child
from runtime.admin import AdminClient, BrokerSilent
from runtime.home import Home
from runtime.ledger import OUTBOX_FILE, compose, read_outbox
from runtime.locks import holder, holders
from runtime.module import EXIT_FENCED
from runtime.supervisord import Supervisor, SupervisorError

START_SECONDS: Final = 30.0
RESTART_SECONDS: Final = 0.3
"Pause before a dead supervisord, mosquitto or cloudsim is started again: what a service manager would do."
MODULES: Final = ("maker", "keeper", "asker", "answerer")
PROGRAMS: Final = ("broker", "edgehub", "eventbus", "watchdog", *MODULES)
"Of every node; `Rig.programs` has the Go and the C module besides, where they could be built."
NODE_LOCK: Final = "node"
ELSEWHERE_NICE: Final = 10
LEDGER_SECONDS: Final = 5.0
_LIFE: Final = re.compile(rb" (attached|back|silent|gone) module=")
_FENCED: Final = b"(exit status %d;" % EXIT_FENCED

MOSQUITTO: Final = """\
autosave_interval 5
set_tcp_nodelay true
"""

RUNTIME: Final = """\
runtime:
  modules: {{keeper: {{groups: [meta]}}, {others}}}
  eventbus: {{keepaliveSeconds: 5}} # a silent MQTT broker is found in seconds, not in a minute
  watchdog: {{brokerSilenceSeconds: 3}}
"""

PROGRAM: Final = """\
[program:{name}]
command={command}
autorestart={autorestart}
exitcodes=0
startsecs=1
startretries=20
stopwaitsecs=10
stopasgroup=true
killasgroup=true
redirect_stderr=true
stdout_logfile=%(ENV_EDGEZMQ_HOME)s/log/{name}.log
stdout_logfile_maxbytes=1MB
stdout_logfile_backups=2
"""


class RigBroken(Exception):
    """A part does not start or does not answer: the cells of this rig cannot go on."""


def _stand_aside(pid: int) -> None:
    """For what is not on the node's machine in truth: where cores are few, the node's processes come first."""
    os.setpriority(os.PRIO_PROCESS, pid, ELSEWHERE_NICE)
    with contextlib.suppress(OSError):  # where each session has its share of the processors, nice counts within it only
        Path(f"/proc/{pid}/autogroup").write_text(str(ELSEWHERE_NICE))


class Relay:
    """The process of chaos.relay, or, for QUIC, of chaos.udp_relay."""

    def __init__(
        self, listen: int, target: int, log: Path, record: Path | None = None, *, is_udp: bool = False
    ) -> None:
        module = "chaos.udp_relay" if is_udp else "chaos.relay"
        words = [sys.executable, "-m", module, str(listen), str(target), *([str(record)] if record else [])]
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
            )
        _stand_aside(self._process.pid)
        self.port = int(self._answer()["port"])

    def order(self, what: str, **facts: Any) -> None:
        """Returns once it is done."""
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps({"do": what, **facts}).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as fault:
            raise RigBroken(f"a relay is gone: {fault}") from fault
        self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(START_SECONDS):
                raise RigBroken("a relay does not answer")
        line = self._process.stdout.readline()
        if not line:
            raise RigBroken("a relay has ended")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                if stream:
                    stream.close()


class Rig:
    """`start`, then break it; `tend` it now and then; `close` leaves no process behind."""

    def __init__(
        self, directory: Path, shim: Path | None, link: str = WSS, foreign: Mapping[str, Path] | None = None
    ) -> None:
        """`link`: what joins edgehub and the cloud, `wss` or `quic`. `foreign`: those of chaos.mixed, by name."""
        self.foreign = foreign or {}
        self.programs = (*PROGRAMS, *self.foreign)
        self.directory = directory
        self.protocol = link
        self.disk = Disk(directory / "disk", directory / "shadow")
        self.home = Home(self.disk.root / "node")
        self.control = Control(directory / "control")
        self.supervisor = Supervisor(self.home.supervisor_socket)
        self.record = directory / "record"
        self.log = directory / "log"
        self._cloud_directory = directory / "cloud"
        self._mqtt_directory = self.disk.root / "mqtt"
        self.shim = shim
        self.mqtt_port = 0
        self.control_port = 0
        self._cloud_port = 0
        self.cloud: Child | None = None
        self.mqtt: Child | None = None
        self.node: Child | None = None
        self.link: Relay | None = None
        self.mqtt_link: Relay | None = None
        self.mqtt_deaths: list[float] = []
        "When mosquitto was found dead, seconds of the monotonic clock."
        self._dead_since: dict[str, float] = {}
        self.may_restart = True
        "False: `tend` leaves what is dead."
        self.power_lost = False
        "Before the next start the files become what a power loss leaves."
        self._broker_log = Tail(self.home.log / "broker.log")
        self._supervisord_log = Tail(self.home.log / "supervisord.log")
        self._life: Counter[str] = Counter()

    # --- starting -------------------------------------------------------------------------------------

    def start(self) -> None:
        """Until every program has a process. Raises RigBroken, DemoFailed."""
        for each in (self.directory, self.disk.root, self.record, self.log, self._cloud_directory):
            each.mkdir(mode=0o700, exist_ok=True)
        self._mqtt_directory.mkdir(mode=0o700)
        self.home.prepare()
        self.mqtt_port, self.control_port, self._cloud_port = free_port(), free_port(), free_port()
        self.set_rates(0.0, 0.0, 0.0)
        self._start_cloud()
        self._start_mqtt_conf()
        self.link = Relay(0, self._cloud_port, self.log / "link.log", is_udp=self.protocol == QUIC)
        self.mqtt_link = Relay(0, self.mqtt_port, self.log / "mqtt-link.log", self.record / "mqtt")
        for name in (*MODULES, *self.foreign):
            (self.home.modules / f"{name}.conf").write_text(self._program(name))
        others = ", ".join(f"{name}: {{}}" for name in (*MODULES, *self.foreign) if name != "keeper")
        (self.home.path / "edgecore.yaml").write_text(
            edgecore(
                NODE,
                self._cloud_directory,
                cloud_port=self.link.port,
                mqtt_port=self.mqtt_link.port,
                link=self.protocol,
                more=RUNTIME.format(others=others),
            )
        )
        if self.shim is not None:
            self.disk.checkpoint()
        self._start_mqtt()
        self._start_node()
        self._wait(self.is_whole, "the node's programs")

    def command(self, name: str) -> Sequence[str]:
        """What a user's module is started with."""
        if name in self.foreign:
            return [str(self.foreign[name]), name, FELLOWS[name], WORDS[name]]
        return [sys.executable, str(Path(__file__).with_name("worker.py")), name]

    def _program(self, name: str) -> str:
        """Its part of supervisord's configuration.

        A foreign module takes the lock of its name through `edgezmq exec`, and ends with 0 on SIGTERM, as those
        in examples/ do (docs/operations.md).
        """
        autorestart = "true" if name in self.foreign else "unexpected"
        return PROGRAM.format(name=name, command=self._line(name), autorestart=autorestart)

    def _line(self, name: str) -> str:
        python = '"%(ENV_EDGEZMQ_PYTHON)s"'
        if name in self.foreign:
            program, *words = self.command(name)
            return f'{python} -m runtime.exec --name {name} -- "{program}" {" ".join(words)}'
        _, worker, word = self.command(name)
        return f'{python} "{worker}" {word}'

    def _start_cloud(self, *, waits: bool = True) -> None:
        words = [str(self._cloud_directory), str(self._cloud_port), str(self.control_port), str(self.record / "cloud")]
        words.append(self.protocol)
        self.cloud = Child("cloudsim", [sys.executable, "-m", "chaos.cloud", *words], log=self.log / "cloudsim.log")
        _stand_aside(self.cloud.pid)
        if waits:
            self._wait(lambda: listens(self.control_port), "cloudsim")

    def _start_mqtt_conf(self) -> None:
        text = mosquitto_conf(self.mqtt_port, self._mqtt_directory, MOSQUITTO)
        (self.directory / "mosquitto.conf").write_text(text)

    def _start_mqtt(self, *, waits: bool = True) -> None:
        program = find_mosquitto()
        if program is None:
            raise RigBroken("no mosquitto is installed")
        command = [program, "-c", str(self.directory / "mosquitto.conf")]
        self.mqtt = Child("mosquitto", command, log=self.log / "mosquitto.log", env=self._shimmed("mosquitto"))
        if waits:
            self._wait(lambda: listens(self.mqtt_port), "mosquitto")

    def _start_node(self) -> None:
        environment = {
            "EDGEZMQ_HOME": str(self.home.path),
            "EDGEZMQ_BUS": "",
            "EDGEZMQ_CONFIG": "",
            "EDGEZMQ_SUPERVISORD_CONF": "",
            "CHAOS_RECORD": str(self.record),
            **self._shimmed("supervisord"),
        }
        command = [sys.executable, "-m", "runtime.cli", "up", "-c", str(self.home.path / "edgecore.yaml")]
        self.node = Child("the node", command, log=self.log / "up.log", env=environment)

    def _shimmed(self, process: str) -> Mapping[str, str]:
        if self.shim is None:
            return {}
        return {
            "LD_PRELOAD": str(self.shim),
            "CHAOS_PROCESS": process,
            "CHAOS_CONTROL": str(self.control.directory),
            "CHAOS_ROOT": str(self.disk.root),
            "CHAOS_SHADOW": str(self.disk.shadow),
        }

    def _wait(self, condition: Any, what: str, seconds: float = START_SECONDS) -> None:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                raise RigBroken(f"waited {seconds:.0f} s in vain for {what}")
            time.sleep(0.02)  # between two looks

    # --- looking ------------------------------------------------------------------------------------------

    def is_whole(self) -> bool:
        """Every program has a process."""
        return all(self.pid(name) for name in self.programs)

    def pid(self, name: str) -> int:
        """Of a program, `supervisord`, `mosquitto` or `cloudsim`; 0 when it does not run."""
        child = {"mosquitto": self.mqtt, "cloudsim": self.cloud}.get(name)
        if child is not None:
            return 0 if child.has_ended() else child.pid
        pid = holder(self.home.lock(NODE_LOCK if name == "supervisord" else name))
        if pid == 0:  # somebody holds it, and the disk had no room for the number
            with contextlib.suppress(SupervisorError):
                pid = {program.name: program.pid for program in self.supervisor.programs()}.get(name)
        return pid or 0

    def node_pids(self) -> list[int]:
        """Everything on the machine that loses power: the node and the MQTT broker; supervisord first."""
        pids = [self.pid("supervisord"), *(pid for _, pid in holders(self.home.run)), self.pid("mosquitto")]
        return list(dict.fromkeys(pid for pid in pids if pid))

    def life(self) -> Counter[str]:
        """How often so far the broker has said that a module is `attached`, `back`, `silent` or `gone`, and how often
        one has ended as `fenced`.
        """
        for line in self._broker_log.lines():
            found = _LIFE.search(line)
            if found is not None:
                self._life[found[1].decode()] += 1
        # Where the broker had given it up already, it says nothing more of a process that it fences.
        self._life["fenced"] += sum(_FENCED in line for line in self._supervisord_log.lines())
        return self._life

    def ledger(self) -> dict[str, Any] | None:
        """As `edgezmq ledger --json`; None when the broker does not answer."""
        with AdminClient(f"ipc://{self.home.bus_socket}") as admin:
            try:
                bus = admin.ask("status", timeout_seconds=LEDGER_SECONDS)
            except BrokerSilent:
                return None
        return compose(bus, read_outbox(self.home.data / OUTBOX_FILE))

    def set_rates(self, kept: float, uploaded: float, mixed: float) -> None:
        """Messages a second: of maker to keeper, and to the cloud; of each flow of the Go and the C module."""
        scratch = self.record / "rates.new"
        scratch.write_text(f"{kept} {uploaded} {mixed}")
        scratch.replace(self.record / "rates")

    # --- tending ----------------------------------------------------------------------------------------------

    def tend(self) -> None:
        """Start again what no supervisord looks after: what systemd does for a node, and the cloud for itself."""
        if not self.may_restart:
            return
        now = time.monotonic()
        for name, child in (("cloudsim", self.cloud), ("mosquitto", self.mqtt), ("node", self.node)):
            if child is None or not child.has_ended():
                self._dead_since.pop(name, None)
                continue
            since = self._dead_since.setdefault(name, now)
            if name == "mosquitto" and since == now:
                self.mqtt_deaths.append(now)
            if now - since < RESTART_SECONDS or (self.power_lost and name != "cloudsim"):
                continue
            if name == "cloudsim":
                self._start_cloud(waits=False)
            elif name == "mosquitto":
                self._start_mqtt(waits=False)
            elif not any(holders(self.home.run)):
                self._start_node()
        if self.power_lost and not self.node_pids():
            self.disk.lose_power()
            self.power_lost = False
            self._start_mqtt(waits=False)
            self._start_node()

    def close(self) -> None:
        for pid in self.node_pids() if self.home.run.is_dir() else []:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for child in (self.node, self.mqtt, self.cloud):
            if child is not None:
                child.kill()
        for relay in (self.link, self.mqtt_link):
            if relay is not None:
                relay.close()

    def keep_logs(self, directory: Path) -> None:
        """Copy what tells how a failed cell came about."""
        directory.mkdir(parents=True, exist_ok=True)
        for source in (self.log, self.home.log, self.record):
            with contextlib.suppress(OSError, shutil.Error):
                shutil.copytree(source, directory / source.name, dirs_exist_ok=True)
