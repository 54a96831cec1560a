"""The watchdog with real processes: what was given up, storms, kept tracebacks, an operator's stop, and `/metrics`."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.exposition import METRICS
from tests.support.node import Node, node_in

pytestmark = pytest.mark.processes

CONFIGURATION = """
modules:
  edged: {hostnameOverride: edge-1}
  edgeHub: {enable: false}
  eventBus: {enable: false}
runtime:
  broker: {heartbeatSeconds: 0.3}
  modules: {hanger: {}}
  metrics: {port: 0}
  watchdog: {pollSeconds: 0.5, hangGraceSeconds: 0.5, reviveFirstSeconds: 1, stormRestarts: 3, stormSeconds: 30}
"""

HANGER = """
import time
from runtime.module import Module, run

class Hanger(Module):
    name = "hanger"
    liveness = 2.0

    async def handle(self, message):
        while message.text() == "hang":
            time.sleep(0.1)

    def counters(self):
        return {"answers": 42}

run(Hanger)
"""

# Fails until somebody makes it whole.
BROKEN = """
import pathlib, sys, time
if not pathlib.Path(__file__).with_suffix(".whole").exists():
    sys.exit("broken")
time.sleep(1000)
"""


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with node_in(tmp_path_factory.mktemp("node")) as node:
        node.configure(CONFIGURATION)
        node.add_module("hanger", HANGER)
        node.add_module("broken", BROKEN)
        conf = node.home.modules / "broken.conf"
        conf.write_text(conf.read_text() + "startretries=1\n")
        node.add_program("sleeper", f'"{sys.executable}" -m runtime.exec --name sleeper -- sleep 1000')
        node.edgezmq("up", "-d")
        for name in ("hanger", "sleeper", "watchdog"):
            node.wait_running(name)
        node.until(node.home.metrics_json.exists, "the metrics to be served")
        yield node


def scrape(node: Node) -> dict[str, float]:
    where = json.loads(node.home.metrics_json.read_bytes())
    with urllib.request.urlopen(f"http://{where['address']}:{where['port']}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return {key: float(value) for key, value in re.findall(r"^([^#\s]\S*) (\S+)$", text, re.MULTILINE)}


def test_a_scrape_tells_of_every_program_and_module(node: Node) -> None:
    node.until(lambda: scrape(node).get('edgezmq_module_value{module="hanger",counter="answers"}') == 42, "counters")
    found = scrape(node)
    assert found["edgezmq_broker_up"] == found["edgezmq_supervisord_up"] == 1
    assert found['edgezmq_program_running{program="hanger"}'] == 1
    assert found['edgezmq_program_resident_bytes{program="broker"}'] > 2**20
    assert found['edgezmq_module_state{module="hanger",state="attached"}'] == 1
    names = {re.sub(r"_(bucket|sum|count)$", "", re.split(r"\{", key)[0]) for key in found}
    assert names <= {metric.name for metric in METRICS}


def test_a_broker_that_stands_still_does_not_hold_up_a_scrape(node: Node) -> None:
    pid = node.wait_running("broker")
    os.kill(pid, signal.SIGSTOP)
    try:
        found = scrape(node)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert found["edgezmq_broker_up"] == 0
    assert found['edgezmq_program_running{program="broker"}'] == 1
    node.until(lambda: scrape(node)["edgezmq_broker_up"] == 1, "the broker to be back")


def test_what_supervisord_gave_up_is_revived_until_it_runs(node: Node) -> None:
    node.until(lambda: scrape(node)['edgezmq_watchdog_actions_total{program="broken",action="revive"}'] >= 1, "a try")
    (node.home.data / "broken.whole").touch()
    node.wait_running("broken")
    assert "revive program=broken" in node.log("watchdog")


def test_a_restart_storm_is_counted_and_shown(node: Node) -> None:
    for _ in range(3):
        pid = node.wait_running("sleeper")
        os.kill(pid, signal.SIGKILL)
        node.wait_running("sleeper", not_pid=pid)
    node.until(lambda: scrape(node)['edgezmq_program_storms_total{program="sleeper"}'] == 1, "the storm to be counted")
    assert scrape(node)['edgezmq_program_in_storm{program="sleeper"}'] == 1
    row = node.module("sleeper")
    assert (row["in_storm"], row["storms"]) == (True, 1)
    assert row["restarts"] >= 3
    assert any("sleeper is restarted again and again" in problem for problem in node.status()["problems"])


def test_the_traceback_of_a_hung_module_is_kept(node: Node) -> None:
    pid = node.wait_running("hanger")
    node.until(lambda: node.module("hanger")["state"] == "attached", "hanger on the bus")
    node.edgezmq("send", "hanger", "-r", "r", "--content", "hang", "--timeout", "0.1")
    node.until(lambda: node.program("hanger").pid not in (0, pid), "a new hanger")

    def kept() -> list[str]:
        return [path.read_text() for path in node.home.log.glob("hanger.hung-*.txt")]

    node.until(lambda: any("Fatal Python error: Aborted" in text and "in handle" in text for text in kept()), "it")
    # The message comes again and hangs it again, until the broker takes it for poison: not more than five are kept.
    node.until(lambda: node.module("hanger").get("refused", {}).get("failed"), "the poison to be refused")
    assert 1 <= len(kept()) <= 5
    assert scrape(node)['edgezmq_watchdog_actions_total{program="hanger",action="abort"}'] >= 1


def test_what_an_operator_stopped_stays_stopped(node: Node) -> None:
    """Also a module that hangs while it is stopped, which the broker reports as silent."""
    pid = node.wait_running("sleeper")
    node.supervisor.stop("sleeper")
    node.until(lambda: node.program("sleeper").state == "STOPPED", "the stop")
    polls = scrape(node)
    pid = node.wait_running("hanger")
    node.until(lambda: node.module("hanger")["state"] == "attached", "hanger on the bus")
    os.kill(pid, signal.SIGSTOP)
    node.supervisor.stop("hanger", wait=False)  # supervisord waits for it, and the broker finds it silent meanwhile
    node.until(lambda: node.module("hanger")["state"] == "silent", "the broker to find it silent")
    os.kill(pid, signal.SIGCONT)
    node.until(lambda: node.program("hanger").state == "STOPPED", "the stop")
    subprocess.run(["sleep", "2"], check=True)  # four looks of the watchdog
    assert {node.program(name).state for name in ("sleeper", "hanger")} == {"STOPPED"}
    found = scrape(node)
    for name in ("sleeper", "hanger"):
        for action in ("abort", "kill", "revive"):
            key = f'edgezmq_watchdog_actions_total{{program="{name}",action="{action}"}}'
            assert found[key] == polls[key]


def test_a_port_that_is_taken_is_said_and_harms_nothing(tmp_path: Path, node: Node) -> None:
    port = json.loads(node.home.metrics_json.read_bytes())["port"]
    with node_in(tmp_path) as other:
        other.configure(CONFIGURATION.replace("port: 0", f"port: {port}"))
        other.edgezmq("up", "-d")
        other.until(lambda: "no metrics: 127.0.0.1" in other.log("watchdog"), "the warning")
        other.wait_running("broker")
