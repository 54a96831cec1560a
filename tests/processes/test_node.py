"""The whole node as a user runs it: MQTT at one end, a CloudHub double at the other, and things killed in between."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import paho.mqtt.publish
import pytest

from demo.show import Script, Show
from demo.stage import NODE, Stage
from demo.telling import Teller
from runtime.locks import holders
from tests.support.aio import until_sync
from tests.support.deadline import DEADLINE
from tests.support.mosquitto import require_mosquitto
from tests.support.node import Node

pytestmark = [pytest.mark.processes, pytest.mark.mosquitto]

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
TOPIC = "site/user/meter"

SLEEPER = """
from runtime.module import Module, run

class Sleeper(Module):
    name = "sleeper"
    liveness = 1.0

    async def handle(self, message):
        await self.bus.respond(message, message.response("awake"))

run(Sleeper)
"""


def block(language: str, containing: str) -> str:
    """A code block of the README."""
    found = [text for text in re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) if containing in text]
    assert len(found) == 1, f"{len(found)} blocks of {language} with {containing!r} in README.md"
    return str(found[0])


class Site(Node):
    """A node with everything around it. `stage` is the demo's own."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.stage = Stage(directory / "around", directory)

    def start(self) -> None:
        require_mosquitto()
        self.stage.start_cloud()
        self.stage.start_mqtt("mosquitto")
        self.stage.start_node()
        self.until(self.is_served, "the link to be served")
        self.until(lambda: "mqtt subscribed" in self.log("eventbus"), "eventbus to subscribe")

    def control(self, path: str, body: Any = None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(f"http://127.0.0.1:{self.stage.control_port}{path}", data, timeout=10) as answer:
            content: bytes = answer.read()
        return content

    def is_served(self) -> bool:
        return any(session["state"] == "served" for session in json.loads(self.control("/sessions"))["sessions"])

    def uploads(self, resource: str) -> list[Any]:
        """Contents that have come up with this resource, in order."""
        events = [json.loads(line) for line in self.control("/events?follow=0").splitlines()]
        return [
            event["message"]["content"]
            for event in events
            if event["event"] == "message" and event["message"]["route"]["resource"] == f"node/{NODE}/{resource}"
        ]

    def publish(self, *payloads: str) -> None:
        """As a device does, at QoS 1."""
        messages = [{"topic": TOPIC, "payload": payload, "qos": 1} for payload in payloads]
        paho.mqtt.publish.multiple(messages, hostname="127.0.0.1", port=self.stage.mqtt_port)

    def end(self) -> None:
        self.stage.interrupts.hurry = True
        self.stage.close()
        super().end()


@contextmanager
def site_in(directory: Path) -> Iterator[Site]:
    site = Site(directory)
    try:
        yield site
    finally:
        site.end()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """One for the tests that leave it as they found it, with the README's module beside the node's own."""
    with site_in(tmp_path_factory.mktemp("site")) as site:
        (site.home.path / "thermostat.py").write_text(block("python", "run("))
        (site.home.modules / "thermostat.conf").write_text(block("ini", "[program:thermostat]"))
        site.add_module("sleeper", SLEEPER)
        site.start()
        yield site


# --- end to end ---------------------------------------------------------------------------------------


def test_nothing_is_lost_while_each_process_in_turn_is_killed(site: Site) -> None:
    script = Script(uploads=400, commands=40, seconds=4.0, kills=("watchdog", "eventbus", "edgehub", "broker"))
    restarts = {name: site.module(name)["restarts"] for name in ("edgehub", "broker")}
    with Teller() as teller:
        show = Show(site.stage, script, teller)
        try:
            show.wait_ready()
            tally = show.run()
        finally:
            show.close()
    assert show.verdict() == [], site.logs()
    assert (tally.uploads.lost, tally.commands.lost, tally.recovered) == (0, 0, 4)
    # Each is the process that the kill brought, and the watchdog has counted what the killed one cannot have seen.
    pids = {kill.program: kill.new_pid for kill in tally.kills}
    for program, pid in pids.items():
        site.until(lambda program=program: site.is_running(program), f"{program} to run")  # type: ignore[misc]
        assert site.program(program).pid == pid
    site.until(
        lambda: all(site.module(name)["restarts"] == before + 1 for name, before in restarts.items()),
        "the watchdog to count one restart each",
    )
    status = site.status()
    assert (status["link"]["state"], status["problems"]) == ("served", [])
    modules = {module["name"]: module for module in status["modules"]}
    assert {name: modules[name]["pid"] for name in pids} == pids
    assert (modules["edgehub"]["state"], modules["eventbus"]["state"]) == ("attached", "attached")
    assert (modules["edgehub"]["queued"], modules["eventbus"]["queued"]) == (0, 0)


def test_nothing_is_lost_when_all_processes_are_killed_at_the_same_moment(site: Site) -> None:
    victims = ("broker", "edgehub", "eventbus", "watchdog")
    pids = {name: site.wait_running(name) for name in victims}
    with Teller() as teller:
        show = Show(site.stage, Script(uploads=300, commands=30, seconds=3.0, kills=()), teller)

        def kill_all() -> None:
            until_sync(lambda: show.tally.uploads.arrived >= 100, "the traffic to flow")
            for pid in pids.values():
                os.kill(pid, signal.SIGKILL)

        killer = threading.Thread(target=kill_all)
        try:
            show.wait_ready()
            killer.start()
            tally = show.run()
        finally:
            show.close()
    killer.join()
    assert (tally.uploads.sent, tally.commands.sent) == (300, 30)
    assert (tally.uploads.lost, tally.commands.lost) == (0, 0), site.logs()
    for name, pid in pids.items():
        site.wait_running(name, not_pid=pid)


def test_what_was_accepted_while_the_cloud_was_away_survives_the_death_of_every_process(site: Site) -> None:
    site.control("/faults", {"fault": "refuse"})
    site.control("/faults", {"fault": "drop"})
    site.until(lambda: not site.is_served(), "the link to be lost")
    wanted = [f'{{"away": {n}}}' for n in range(100)]
    site.publish(*wanted)
    site.until(lambda: (site.status()["link"] or {}).get("stored", 0) >= 100, "the messages to be on disk")
    site.until(lambda: site.module("edgehub")["in_flight"] <= 1, "them to be settled")  # one: the question itself
    pids = {name: site.wait_running(name) for name in ("broker", "edgehub", "eventbus")}
    for pid in pids.values():
        os.kill(pid, signal.SIGKILL)
    site.control("/faults", {"fault": "clear"})
    site.until(lambda: [each for each in site.uploads(TOPIC) if "away" in each] == wanted, "them to go up, in order")
    for name, pid in pids.items():
        site.wait_running(name, not_pid=pid)
    site.until(lambda: site.status()["link"]["stored"] == 0, "the outbox to be empty")


def test_status_tells_what_waits_for_a_stopped_process_and_that_it_has_gone_on(site: Site) -> None:
    pid = site.wait_running("edgehub")
    site.until(lambda: site.module("edgehub")["state"] == "attached", "edgehub on the bus")
    delivered = site.module("edgehub")["delivered"]
    os.kill(pid, signal.SIGSTOP)
    try:
        site.publish(*(f'{{"stopped": {n}}}' for n in range(5)))
        rows: list[Any] = []

        def five_wait() -> bool:
            rows.append(site.module("edgehub"))
            return int(rows[-1]["queued"] + rows[-1]["in_flight"]) >= 5

        site.until(five_wait, "five messages to wait")
        assert (rows[-1]["state"], rows[-1]["pid"], rows[-1]["oldest_age_ms"] > 0) == ("attached", pid, True)
    finally:
        os.kill(pid, signal.SIGCONT)
    wanted = [f'{{"stopped": {n}}}' for n in range(5)]
    site.until(lambda: site.uploads(TOPIC)[-5:] == wanted, "them to arrive, in order")
    site.until(lambda: site.module("edgehub")["delivered"] >= delivered + 5, "the count of deliveries")
    assert site.wait_running("edgehub") == pid


def test_status_tells_why_there_is_no_link_and_what_waits_goes_up_afterwards(site: Site) -> None:
    site.control("/faults", {"fault": "restart", "seconds": 2.0})
    site.until(lambda: (site.status()["link"] or {}).get("state") != "served", "the link to be lost")
    status = site.status()
    assert any("no link to the cloud" in problem for problem in status["problems"]), status["problems"]
    site.publish('{"offline": 1}')
    site.until(lambda: '{"offline": 1}' in site.uploads(TOPIC), "the message to go up")
    assert site.status()["link"]["state"] == "served"


def test_tap_shows_messages_of_both_directions_as_they_were_sent(site: Site) -> None:
    tap = subprocess.Popen(
        [sys.executable, "-m", "runtime.cli", "tap", "--resource", "site/*", "--json", "-n", "4"],
        env=site.environ,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        # It says nothing when it begins: go on until it has seen enough.
        while tap.poll() is None:
            site.publish('{"tapped": 1}')
            command = {"source": "router_eventbus", "group": "user", "operation": "publish", "resource": "site/lamp"}
            site.control(f"/nodes/{NODE}/messages", {"route": command, "content": {"on": True}})
            time.sleep(0.05)  # between two rounds of messages
        assert tap.stdout is not None
        seen = [json.loads(line) for line in tap.stdout]
    finally:
        tap.kill()
        tap.communicate()
    facts = {(m["sender"], m["destination"], m["operation"], m["resource"], str(m["content"])) for m in seen}
    assert facts <= {
        ("eventbus", "@hub", "upload", TOPIC, '{"tapped": 1}'),
        ("eventbus", "@hub", "upload", TOPIC, "{'tapped': 1}"),
        ("edgehub", "eventbus", "publish", "site/lamp", "{'on': True}"),
    }
    assert {sender for sender, *_ in facts} == {"eventbus", "edgehub"}


# --- the user's own modules ---------------------------------------------------------------------------


def test_the_readmes_module_runs_beside_the_node_and_its_upload_reaches_the_cloud(site: Site) -> None:
    site.wait_running("thermostat")
    site.until(lambda: site.module("thermostat")["state"] == "attached", "thermostat on the bus")
    for celsius in (18.5, 22.0):
        done = site.edgezmq("send", "thermostat", "-r", "reading", "--content", json.dumps({"celsius": celsius}))
        assert done.returncode == 0, done.stderr + site.log("thermostat")
    site.until(lambda: len(site.uploads("thermostat/state")) == 2, "its uploads")
    assert site.uploads("thermostat/state") == [{"heating": True}, {"heating": False}]


def test_the_readmes_module_has_about_ten_lines_and_its_configuration_is_valid(tmp_path: Path) -> None:
    assert len([line for line in block("python", "run(").splitlines() if line.strip()]) <= 11
    config = tmp_path / "edgecore.yaml"
    config.write_text(block("yaml", "thermostat"))
    code = "from pathlib import Path; from runtime.cli import settings; import sys\n"
    code += "print(settings.read(Path(sys.argv[1]))[0].declared_modules()['thermostat'])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(config)], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.stdout == "frozenset()\n", done.stderr


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_module_that_hangs_or_dies_is_replaced_and_others_do_not_notice(site: Site, number: signal.Signals) -> None:
    pid = site.wait_running("sleeper")
    site.until(lambda: site.module("sleeper")["state"] == "attached", "sleeper on the bus")
    others = {name: site.program(name).pid for name in ("broker", "edgehub", "eventbus", "watchdog")}
    os.kill(pid, number)
    site.wait_running("sleeper", not_pid=pid)
    site.until(lambda: site.module("sleeper")["state"] == "attached", "sleeper on the bus")
    done = site.edgezmq("send", "sleeper", "-r", "r", "--request")
    assert done.stdout.strip().strip('"') == "awake", done.stderr
    assert {name: site.program(name).pid for name in others} == others


# --- one node to a home, and no orphans -----------------------------------------------------------------


def test_a_second_node_on_the_same_home_is_refused_and_the_first_goes_on(site: Site, scratch: Path) -> None:
    before = site.stage.pids()
    done = site.edgezmq("up")
    assert done.returncode == 1
    assert f"a node runs on {site.home.path} already" in done.stderr
    second = demo("--keep", "--home", str(site.home.path), scratch=scratch)
    assert second.returncode == 1
    assert f"a node runs on {site.home.path} already" in second.stderr
    assert site.stage.pids() == before
    assert site.is_served()


def test_a_killed_supervisord_leaves_no_orphans(tmp_path: Path) -> None:
    with site_in(tmp_path) as site:
        site.start()
        supervisord = site.supervisor.pid()
        pids = [supervisord, *site.stage.pids().values()]
        assert len(pids) >= 5  # mqtt-broker may not yet have ended
        os.kill(supervisord, signal.SIGKILL)
        until_sync(lambda: not any(is_alive(pid) for pid in pids), "the end of all of them")
        until_sync(lambda: not any(holders(site.home.run)), "all locks to be free")


def is_alive(pid: int) -> bool:
    """Whether it runs; a zombie that waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


# --- the demo itself --------------------------------------------------------------------------------------

LAST_LINE = re.compile(
    r"uploads sent=(\d+) arrived=(\d+) lost=(\d+) duplicated=\d+ "
    r"commands sent=(\d+) answered=(\d+) lost=(\d+) duplicated=\d+ kills=(\d+)"
)


@pytest.fixture
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a short path, for the demo's sockets; everything that it starts carries its name."""
    return tmp_path_factory.mktemp("d")


def start_demo(*arguments: str, scratch: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "demo", *arguments],
        env={**os.environ, "TMPDIR": str(scratch)},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def demo(*arguments: str, scratch: Path) -> subprocess.CompletedProcess[str]:
    with start_demo(*arguments, scratch=scratch) as process:
        output, errors = process.communicate(timeout=4 * DEADLINE)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def processes_of(scratch: Path) -> list[int]:
    """Every living process that a demo with this directory has started, and the demo itself."""
    mark = f"TMPDIR={scratch}"
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark in (entry / "environ").read_text(errors="replace").split("\0"):
                found.append(int(entry.name))
        except OSError:
            continue
    return [pid for pid in found if is_alive(pid)]


def read_until(output: IO[str], words: str) -> None:
    for line in output:
        if words in line:
            return
    raise AssertionError(f"the demo ended before it said {words!r}")


def test_the_demo_kills_twice_loses_nothing_and_leaves_nothing_behind(scratch: Path) -> None:
    done = demo("--uploads", "300", "--commands", "30", "--seconds", "2", scratch=scratch)
    assert done.returncode == 0, done.stdout + done.stderr
    found = LAST_LINE.fullmatch(done.stdout.splitlines()[-1])
    assert found is not None, done.stdout
    assert found.groups() == ("300", "300", "0", "30", "30", "0", "2")
    assert processes_of(scratch) == []
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["This is", "cloudsim is up", "MQTT", "supervisord has started", "Now kill"])
def test_an_interrupted_demo_leaves_nothing_behind(scratch: Path, moment: str, number: signal.Signals) -> None:
    with start_demo("--seconds", "2", scratch=scratch) as process:
        assert process.stdout is not None
        read_until(process.stdout, moment)
        process.send_signal(number)
        process.communicate(timeout=2 * DEADLINE)
    assert process.returncode == 130
    assert processes_of(scratch) == []
    assert list(scratch.iterdir()) == []


def test_a_killed_demo_takes_everything_along(scratch: Path) -> None:
    with start_demo(scratch=scratch) as process:
        assert process.stdout is not None
        read_until(process.stdout, "first message")
        # cloudsim, mosquitto, supervisord, broker, edgehub, eventbus, watchdog, and the demo
        assert len(processes_of(scratch)) >= 8
        process.kill()
        process.communicate()
    until_sync(lambda: not processes_of(scratch), "the end of all of them")


def test_a_demo_that_cannot_go_on_names_the_log_and_keeps_it(scratch: Path) -> None:
    with start_demo("--seconds", "60", scratch=scratch) as process:
        assert process.stdout is not None
        read_until(process.stdout, "Now a thermometer")
        [cloudsim] = [pid for pid in processes_of(scratch) if "cloudsim --dir" in command_of(pid)]
        os.kill(cloudsim, signal.SIGKILL)
        _, errors = process.communicate(timeout=2 * DEADLINE)
    assert process.returncode == 1
    assert "cloudsim was killed by signal 9" in errors
    [log] = re.findall(r"look at (\S+)", errors)
    assert Path(log).name == "cloudsim.log"
    assert Path(log).is_file()
    assert processes_of(scratch) == []


def command_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
