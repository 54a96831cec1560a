"""`edgezmq reload`: another policy for a node that runs, with a broker and an edgehub of their own processes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime import policy
from runtime.admin import AdminClient
from runtime.cli import settings
from runtime.client import Bus
from runtime.config import load, store
from runtime.errors import HelloRefused, Refused
from runtime.locks import holder
from runtime.message import Message
from runtime.names import Group
from tests.support.aio import run, until_sync
from tests.support.deadline import DEADLINE
from tests.support.node import Node

pytestmark = pytest.mark.processes

ME = os.geteuid()
PUMP = f"pump: {{users: [{ME}], to: [sink, '@hub'], cloud: [{{groups: [user]}}]}}"
FAN = f"fan: {{users: [{ME}], to: [sink], ownSocket: true}}"


def file(*rules: str, modules: str = "pump: {}", rest: str = "") -> str:
    return f"""
modules:
  edged: {{hostnameOverride: node-1}}
  edgeHub: {{websocket: {{enable: true, server: "127.0.0.1:9"}}}}
  eventBus: {{enable: false}}
runtime:
  modules: {{{modules}}}
  policy:
    enable: true
    modules: {{{", ".join(rules)}}}
{rest}
"""


class Site(Node):
    """A broker and an edgehub without supervisord."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.children: list[subprocess.Popen[bytes]] = []
        self.endpoint = f"ipc://{self.home.bus_socket}"

    def start(self, text: str) -> None:
        self.configure(text)
        config, _ = settings.read(self.home.path / "edgecore.yaml")
        store(config, self.home)
        for name in ("runtime.broker", "modules.edgehub"):
            log = (self.home.log / f"{name.rpartition('.')[2]}.log").open("wb")
            self.children.append(
                subprocess.Popen([sys.executable, "-m", name], env=self.environ, stdout=log, stderr=log)
            )
            log.close()
        for name in ("broker", "edgehub"):
            self.until(lambda name=name: policy.told(self.home, name), f"{name} to be there")

    def reload(self, text: str) -> subprocess.CompletedProcess[str]:
        self.configure(text)
        return self.edgezmq("reload")

    def end(self) -> None:
        for child in self.children:
            child.kill()
            child.wait(DEADLINE)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    found = Site(tmp_path / "home")
    try:
        yield found
    finally:
        found.end()


async def refusal(name: str, endpoint: str) -> str:
    """What the broker says to HELLO; empty: it is welcome."""
    try:
        async with asyncio.timeout(DEADLINE), Bus.connect(name, endpoint=endpoint):
            return ""
    except HelloRefused as refused:
        return str(refused)


def test_rules_come_and_go_under_load_and_nothing_is_lost(site: Site) -> None:
    site.start(file(PUMP))
    fans = f"ipc://{site.home.own_socket('fan')}"
    got: list[str] = []

    async def scenario() -> None:
        async def take(message: Message) -> None:
            got.append(message.resource)

        async def reload(text: str) -> subprocess.CompletedProcess[str]:
            return await asyncio.to_thread(site.reload, text)

        async def stream(bus: Bus, stop: asyncio.Event) -> int:
            receipts = []
            while not stop.is_set():
                receipts.append(await bus.send("sink", Message.build(resource=str(len(receipts)), content="x")))
                await asyncio.sleep(0)  # the others' turn
            for receipt in receipts:
                await receipt
            return len(receipts)

        stop = asyncio.Event()
        async with (
            Bus.connect("sink", handler=take, endpoint=site.endpoint),
            Bus.connect("pump", endpoint=site.endpoint) as pump,
            asyncio.TaskGroup() as tasks,
        ):
            streaming = tasks.create_task(stream(pump, stop))
            done = await reload(file(PUMP, FAN, modules="pump: {}, fan: {}"))
            assert done.returncode == 0, done.stderr
            assert "broker and edgehub" in done.stdout
            assert await refusal("fan", fans) == ""
            assert "own socket only" in await refusal("fan", site.endpoint)
            done = await reload(file(PUMP.replace("to:", "messagesPerSecond: 100000, to:"), FAN))
            assert done.returncode == 0, done.stderr
            fan = Bus("fan", endpoint=fans)
            fan.open()
            await (await fan.send("sink", Message.build(resource="fan")))
            done = await reload(file(PUMP))
            assert done.returncode == 0, done.stderr
            with pytest.raises(HelloRefused, match="no longer one of the node's"):
                await fan.wait_ended()
            await fan.aclose()
            assert not site.home.own_socket("fan").exists()
            stop.set()
        sent = streaming.result()
        assert sent > 0
        assert [each for each in got if each != "fan"] == [str(number) for number in range(sent)]

    run(scenario())
    assert site.home.node_json.stat().st_mode & 0o007 == 0
    assert "denied module=fan" in site.log("broker")


def test_a_faulty_file_leaves_the_policy_and_says_why(site: Site) -> None:
    site.start(file(PUMP))
    before = site.home.node_json.read_bytes()
    for text, why in (
        (file(PUMP.replace("users", "user")), "user"),
        (file(PUMP, "fan: {users: [no-such-user-here]}"), "no-such-user-here"),
        (file(PUMP, "fan: {to: [sink]}"), "neither users nor keys"),
        ("modules: [", "YAML"),
    ):
        done = site.reload(text)
        assert done.returncode == 1
        assert why in done.stderr
        assert site.edgezmq("policy", "check").returncode == 1
        assert site.home.node_json.read_bytes() == before
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        done = site.reload(file(PUMP, FAN, rest=f"  bus: {{listen: ['{address}']}}"))
        assert done.returncode == 1
        assert "broker keeps the policy it has" in done.stderr
        assert "in use" in done.stderr
    assert json.loads(site.home.node_json.read_bytes()) == json.loads(before)
    assert not site.home.own_socket("fan").exists()

    async def scenario() -> None:
        assert await refusal("pump", site.endpoint) == ""

    run(scenario())
    mark = policy.mark_of(load(site.home.path))
    until_sync(
        lambda: {policy.told(site.home, name).mark for name in ("broker", "edgehub")} == {mark}, "both as before"
    )  # type: ignore[union-attr]


def test_what_reload_does_not_take_over_is_named_and_left(site: Site) -> None:
    site.start(file(PUMP))
    done = site.reload(file(PUMP, FAN, rest="  broker: {heartbeatSeconds: 3}"))
    assert done.returncode == 0, done.stderr
    assert "for the next `edgezmq up`: runtime.broker.heartbeatSeconds" in done.stderr
    assert load(site.home.path).runtime.broker.heartbeat_seconds == 5.0
    assert "fan" in load(site.home.path).runtime.policy.modules


def test_edgehub_knows_new_grants_and_forgets_none(site: Site) -> None:
    site.start(file(PUMP))

    async def outcome(bus: Bus, group: str) -> str:
        try:
            async with asyncio.timeout(DEADLINE):
                await (await bus.send(Group("hub"), Message.build(group=group, operation="upload", resource="a/b")))
        except Refused as refused:
            return refused.reason
        return "settled"

    async def scenario() -> None:
        async with Bus.connect("pump", endpoint=site.endpoint) as pump:
            assert await outcome(pump, "user") == "settled"
            assert await outcome(pump, "twin") == "denied"
            done = await asyncio.to_thread(site.reload, file(PUMP.replace("[user]", "[twin]")))
            assert done.returncode == 0, done.stderr
            assert await outcome(pump, "user") == "denied"
            assert await outcome(pump, "twin") == "settled"

    run(scenario())
    with AdminClient(site.endpoint) as admin:
        hub = next(each for each in admin.ask("status")["modules"] if each["name"] == "edgehub")
    assert hub["refused"]["denied"] == 2


def test_an_edgehub_that_is_away_reads_the_new_policy_at_its_start(site: Site) -> None:
    site.start(file(PUMP))
    hub = site.children.pop()
    hub.send_signal(signal.SIGKILL)
    hub.wait(DEADLINE)
    done = site.reload(file(PUMP, FAN))
    assert done.returncode == 0, done.stderr
    assert "in force in broker\n" in done.stdout
    assert holder(site.home.lock("edgehub")) is None


def test_an_edgehub_that_hangs_leaves_the_policy_as_it_was(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    from runtime.cli import policing
    from runtime.cli.node import NodeError

    site.start(file(PUMP))
    site.children[1].send_signal(signal.SIGSTOP)
    monkeypatch.setattr(policing, "ANSWER_SECONDS", 0.3)
    monkeypatch.setenv("EDGEZMQ_HOME", str(site.home.path))
    site.configure(file(PUMP, FAN))
    with pytest.raises(NodeError, match="edgehub did not answer"):
        policing.reload(None)
    assert "fan" not in load(site.home.path).runtime.policy.modules
    site.children[1].send_signal(signal.SIGCONT)
    mark = policy.mark_of(load(site.home.path))
    site.until(lambda: (said := policy.told(site.home, "edgehub")) and said.mark == mark, "edgehub to go on as before")


@pytest.mark.skipif(ME != 0, reason="needs root, to be another user")
def test_nobody_but_root_and_the_nodes_user_may_ask(site: Site) -> None:
    site.start(file(PUMP))
    before = site.home.node_json.read_bytes()
    code = f"""
import os, sys
from runtime.cli import policing, main
os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    os.kill({holder(site.home.lock("broker"))}, 1)
except PermissionError:
    print("no signal")
try:
    open({str(site.home.node_json)!r}, "ab")
except PermissionError:
    print("no file")
sys.argv[1:] = ["reload", "--config", {str(site.home.path / "edgecore.yaml")!r}]
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=site.environ, capture_output=True, text=True, timeout=DEADLINE, check=False
    )
    assert done.stdout.splitlines() == ["no signal", "no file"]
    assert done.returncode == 1, done.stderr
    assert site.home.node_json.read_bytes() == before
    assert stat.S_IMODE(site.home.run.stat().st_mode) == 0o750
