"""A real node under supervisord: deaths, hangs, an operator's word, and nothing left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.node import Node, node_in

pytestmark = pytest.mark.processes

# No cloud and no MQTT here: what is supervised is broker, watchdog, and modules of the user's.
CONFIGURATION = """
modules:
  edged: {hostnameOverride: edge-1}
  edgeHub: {enable: false}
  eventBus: {enable: false}
runtime:
  broker: {heartbeatSeconds: 0.3}
  modules: {echo: {groups: [echoes]}, hanger: {}}
  watchdog: {pollSeconds: 0.5, hangGraceSeconds: 0.5, brokerSilenceSeconds: 1.5}
"""

ECHO = """
from runtime.module import Module, run

class Echo(Module):
    name = "echo"

    async def handle(self, message):
        await self.bus.respond(message, message.response(message.json()))

run(Echo)
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

run(Hanger)
"""


@contextmanager
def made(directory: Path) -> Iterator[Node]:
    with node_in(directory) as node:
        node.configure(CONFIGURATION)
        node.add_module("echo", ECHO)
        node.add_module("hanger", HANGER)
        node.add_program("foreign", f'"{sys.executable}" -m runtime.exec --name foreign -- sleep 1000')
        yield node


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """One node for the tests that leave it as they found it."""
    with made(tmp_path_factory.mktemp("node")) as node:
        node.up()
        for name in ("echo", "hanger", "foreign"):
            node.wait_running(name)
        node.until(lambda: node.module("echo")["state"] == "attached", "echo on the bus")
        yield node


@pytest.fixture
def own_node(tmp_path: Path) -> Iterator[Node]:
    """A node for a test that ends it."""
    with made(tmp_path) as node:
        yield node


# --- a node that runs -------------------------------------------------------------------------------


def test_a_module_that_configuration_disables_stays_down(node: Node) -> None:
    for name in ("edgehub", "eventbus", "mqtt-broker"):
        node.until(lambda name=name: node.program(name).state == "EXITED", f"the end of {name}")  # type: ignore[misc]
        assert node.program(name).exit_status == 0
    assert node.status()["problems"] == []


def test_status_shows_process_memory_and_bus_state(node: Node) -> None:
    row = node.module("echo")
    assert (row["process"], row["state"], row["pid"]) == ("running", "attached", node.program("echo").pid)
    assert len(row["incarnation"]) == 32
    assert row["pss_bytes"] > 2**20


def test_a_request_from_the_command_line_is_answered(node: Node) -> None:
    done = node.edgezmq("send", "echo", "-r", "r", "--content", '{"n": 12345678901234567890}', "--request")
    assert (done.returncode, done.stdout) == (0, '{"n":12345678901234567890}\n'), done.stderr


def test_tap_shows_what_passes(node: Node) -> None:
    tap = subprocess.Popen(
        [sys.executable, "-m", "runtime.cli", "tap", "--to", "echo", "--resource", "tapped/*", "--json", "-n", "1"],
        env=node.environ,
        stdout=subprocess.PIPE,
        text=True,
    )
    while tap.poll() is None:
        node.edgezmq("send", "echo", "-r", "other/1", "--content", "1", "--request")
        node.edgezmq("send", "echo", "-r", "tapped/1", "--content", "[1.50]", "--request")
    output, _ = tap.communicate()
    assert '"resource": "tapped/1"' in output
    assert '"content": [1.5]' in output


@pytest.mark.parametrize("name", ["echo", "foreign", "broker"])
def test_what_is_killed_is_started_again_and_counted(node: Node, name: str) -> None:
    pid = node.wait_running(name)
    before = node.module(name)["restarts"]
    os.kill(pid, signal.SIGKILL)
    node.wait_running(name, not_pid=pid)
    node.until(lambda: node.module(name)["restarts"] == before + 1, "the watchdog to count it")
    node.until(lambda: node.module("echo")["state"] == "attached", "echo on the bus")


@pytest.mark.parametrize("name", ["echo", "broker", "watchdog"])
def test_a_kill_that_lets_it_drain_does_not_keep_it_down(node: Node, name: str) -> None:
    pid = node.wait_running(name)
    os.kill(pid, signal.SIGTERM)
    node.wait_running(name, not_pid=pid)
    node.until(lambda: node.module("echo")["state"] == "attached", "echo on the bus")


def test_a_module_that_blocks_is_aborted_with_a_traceback_and_started_again(node: Node) -> None:
    pid = node.wait_running("hanger")
    node.until(lambda: node.module("hanger")["state"] == "attached", "hanger on the bus")
    node.edgezmq("send", "hanger", "-r", "r", "--content", "hang", "--timeout", "0.1")
    node.until(lambda: node.program("hanger").pid not in (0, pid), "a new hanger")
    log = node.log("hanger")
    assert "Fatal Python error: Aborted" in log
    assert "in handle" in log
    # The message comes again and hangs it again, until the broker takes it for poison and refuses it.
    node.until(lambda: node.module("hanger").get("refused", {}).get("failed"), "the poison to be refused")
    node.until(lambda: node.module("hanger")["state"] == "attached", "hanger on the bus")
    node.wait_running("hanger")


def test_a_stopped_module_is_killed_for_it_cannot_even_abort(node: Node) -> None:
    pid = node.wait_running("hanger")
    node.until(lambda: node.module("hanger")["state"] == "attached", "hanger on the bus")
    os.kill(pid, signal.SIGSTOP)
    node.wait_running("hanger", not_pid=pid)
    assert f"killed program=hanger pid={pid}" in node.log("watchdog")


def test_a_hung_broker_is_found_and_replaced(node: Node) -> None:
    pid = node.wait_running("broker")
    os.kill(pid, signal.SIGSTOP)
    node.wait_running("broker", not_pid=pid)
    node.until(lambda: node.module("echo")["state"] == "attached", "echo on the bus")


def test_an_operators_stop_is_respected(node: Node) -> None:
    pid = node.wait_running("echo")
    node.supervisor.stop("echo")
    node.until(lambda: node.program("echo").state == "STOPPED", "the stop")
    mark = node.home.watchdog_json.stat().st_mtime_ns
    end = time.monotonic() + 1.5
    while time.monotonic() < end:  # three looks of the watchdog
        assert node.program("echo").state == "STOPPED"
        time.sleep(0.1)
    assert node.home.watchdog_json.stat().st_mtime_ns == mark
    node.supervisor.start("echo")
    node.wait_running("echo", not_pid=pid)


def test_restart_gives_a_new_process_and_says_so(node: Node) -> None:
    pid = node.wait_running("echo")
    done = node.edgezmq("restart", "echo")
    assert done.returncode == 0, done.stderr
    assert f"echo: pid {pid} → {node.program('echo').pid} in" in done.stderr
    done = node.edgezmq("restart", "ehco")
    assert (done.returncode, "did you mean echo?" in done.stderr) == (1, True)


def test_logs_shows_the_last_lines(node: Node) -> None:
    done = node.edgezmq("logs", "broker", "-n", "2")
    assert len(done.stdout.splitlines()) == 2


def test_a_second_up_is_refused_and_the_first_node_goes_on(node: Node) -> None:
    pid = node.wait_running("broker")
    done = node.edgezmq("up", "-d")
    assert done.returncode == 1
    assert "a node runs on" in done.stderr
    assert node.wait_running("broker") == pid


def test_sockets_and_secrets_are_closed_to_others(node: Node) -> None:
    assert node.home.supervisor_socket.stat().st_mode & 0o777 == 0o700
    assert node.home.bus_socket.stat().st_mode & 0o777 == 0o660
    assert node.home.node_json.stat().st_mode & 0o777 == 0o600
    assert all(file.stat().st_mode & 0o007 == 0 for file in node.home.log.iterdir())


# --- a node that ends -------------------------------------------------------------------------------


def test_down_leaves_no_process(own_node: Node) -> None:
    own_node.up()
    own_node.wait_running("echo")
    done = own_node.edgezmq("down")
    assert done.returncode == 0, done.stderr
    assert own_node.processes() == []
    assert own_node.edgezmq("status").returncode == 3


def test_ctrl_c_in_the_foreground_leaves_no_process(own_node: Node) -> None:
    up = own_node.up_in_foreground()
    own_node.wait_running("echo")
    up.send_signal(signal.SIGINT)
    up.wait()
    own_node.until(lambda: not own_node.processes(), "the end of all processes")


def test_a_killed_supervisord_leaves_no_orphan_and_the_next_up_works(own_node: Node) -> None:
    up = own_node.up_in_foreground()
    first = own_node.wait_running("echo")
    own_node.wait_running("foreign")
    up.kill()
    up.wait()
    own_node.until(lambda: not own_node.processes(), "the death of all processes")
    own_node.up()
    assert own_node.wait_running("echo") != first


def test_up_ends_what_an_earlier_supervisord_left_and_spares_what_a_shell_started(own_node: Node) -> None:
    code = "import time; from runtime.home import find_home; from runtime.locks import hold\n"
    code += "lock = hold(find_home().lock('{}')); print('held', flush=True); time.sleep(1000)"
    leftover, own = (
        subprocess.Popen(
            [sys.executable, "-c", code.format(name)],
            env={**own_node.environ, **more},
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        for name, more in (("edgehub", {"EDGEZMQ_SUPERVISOR_PID": "1"}), ("mine", {}))
    )
    try:
        for process in (leftover, own):
            assert process.stdout is not None
            process.stdout.readline()
        done = own_node.edgezmq("up", "-d")
        assert f"ended a leftover of an earlier run: edgehub (pid {leftover.pid})" in done.stderr
        assert leftover.wait() == -signal.SIGKILL
        assert own.poll() is None
    finally:
        for process in (leftover, own):
            process.kill()
            process.communicate()


def test_a_full_disk_for_logs_stops_nobody(own_node: Node) -> None:
    chatty = "import time\nwhile True: print('x' * 4000, flush=True); time.sleep(0.01)"
    own_node.home.data.joinpath("chatty.py").write_text(chatty)
    own_node.add_program("chatty", f'"{sys.executable}" {own_node.home.data}/chatty.py', logfile="/dev/full")
    own_node.up()
    pid = own_node.wait_running("chatty")
    supervisor = own_node.supervisor.pid()
    assert own_node.edgezmq("send", "echo", "-r", "r", "--content", "1", "--request").returncode == 0
    assert (own_node.program("chatty").pid, own_node.supervisor.pid()) == (pid, supervisor)
