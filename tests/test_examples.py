"""The examples and docs/modules.md, each run against a real broker; a handler's every misbehaviour as told there."""

from __future__ import annotations

import asyncio
import configparser
import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from runtime import module as module_source
from runtime.admin import AdminClient
from runtime.client import HANDLER_WAIT_SECONDS, Bus
from runtime.config import (
    BrokerSection,
    EdgeHubSection,
    EventBusSection,
    ModuleSection,
    NodeConfig,
    RuntimeSection,
    store,
)
from runtime.emp import Limits, Priority
from runtime.errors import Congested, Refused, RequestTimeout
from runtime.home import Home
from runtime.message import Message
from runtime.module import Module
from runtime.names import Group
from tests.support.aio import run, until
from tests.support.deadline import DEADLINE
from tests.support.node import Node, node_in

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples" / "python"
PAGE = ROOT / "docs" / "modules.md"
TEXT = PAGE.read_text()

pytestmark = pytest.mark.processes


class Room:
    """A broker process in a directory of its own, and modules beside it as processes."""

    def __init__(self, directory: Path) -> None:
        self.home = Home(directory).prepare()
        self.environ = {key: value for key, value in os.environ.items() if not key.startswith("EDGEZMQ_")}
        self.environ["EDGEZMQ_HOME"] = str(directory)
        self.endpoint = f"ipc://{self.home.bus_socket}"
        self._processes: list[subprocess.Popen[bytes]] = []
        declared = {
            name: ModuleSection() for name in ("echo", "uploader", "heater", "thermometer", "bad", "tester", "late")
        }
        # edgehub would be a member of `hub` though it does not run, and its messages would wait for it.
        config = NodeConfig(
            edge_hub=EdgeHubSection(enable=False),
            event_bus=EventBusSection(enable=False),
            runtime=RuntimeSection(modules=declared, broker=BrokerSection(heartbeat_seconds=0.3)),
        )
        store(config, self.home)
        self.broker = self.start("-m", "runtime.broker")

    def start(self, *arguments: str, **environ: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen([sys.executable, *arguments], env=self.environ | environ, cwd=ROOT)
        self._processes.append(process)
        return process

    def example(self, name: str, **environ: str) -> subprocess.Popen[bytes]:
        return self.start(str(EXAMPLES / f"{name}.py"), **environ)

    def code(self, text: str) -> subprocess.Popen[bytes]:
        file = self.home.data / "module.py"
        file.write_text(textwrap.dedent(text))
        return self.start(str(file))

    def restart_broker(self) -> None:
        self.broker.kill()
        self.broker.wait(DEADLINE)
        self.broker = self.start("-m", "runtime.broker")

    def module(self, name: str) -> dict[str, Any]:
        with AdminClient(self.endpoint) as client:
            status = client.ask("status", timeout_seconds=DEADLINE)
        return next(module for module in status["modules"] if module["name"] == name)

    def end(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait(DEADLINE)


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Room]:
    room = Room(tmp_path)
    yield room
    room.end()


class Recorder:
    """A handler that keeps what came."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.retained: list[bool] = []
        self.redelivered: list[bool] = []

    async def __call__(self, message: Message) -> None:
        self.messages.append(message)
        self.retained.append(message.delivery.retained)
        self.redelivered.append(message.delivery.redelivered)


def end(process: subprocess.Popen[bytes]) -> int:
    process.send_signal(signal.SIGTERM)
    return process.wait(DEADLINE)


# --- the examples -----------------------------------------------------------------------------------


def test_the_example_of_a_test_passes(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(EXAMPLES / "test_echo.py")],
        check=False,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=4 * DEADLINE,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_uploader_goes_on_over_a_restart_of_the_broker_and_counts_what_is_safe(room: Room) -> None:
    uploader = room.example("uploader", UPLOADER_SECONDS="0.02")
    got = Recorder()

    async def scenario() -> None:
        async with Bus.connect("tester", groups={"hub"}, handler=got, endpoint=room.endpoint):
            await until(lambda: len(got.messages) >= 20, "uploads")
            room.restart_broker()
            before = len(got.messages)
            await until(lambda: len(got.messages) >= before + 20, "uploads through the new broker")
            await until(lambda: room.module("uploader")["counters"].get("uploaded", 0) >= 40, "its counter")
        first = got.messages[0]
        assert (first.group, first.operation, first.resource) == ("user", "upload", "default/load/1")
        assert isinstance(first.json()["load"], float)
        ids = [message.id for message in got.messages]
        assert len(ids) == len(set(ids))
        times = [message.timestamp for message in got.messages]
        assert times == sorted(times)

    run(scenario())
    end(uploader)


def test_the_heater_answers_late_in_any_state_and_tells_late_members(room: Room) -> None:
    room.example("heater", HEATER_SECONDS="0.3")
    got = Recorder()

    def job(celsius: Any) -> Message:
        return Message.build(resource="heater/1", operation="set", content={"celsius": celsius})

    async def scenario() -> None:
        async with Bus.connect("tester", endpoint=room.endpoint) as bus:
            get = Message.build(resource="heater/1", operation="get")
            slow = asyncio.ensure_future(bus.request("heater", job(21), timeout=DEADLINE))
            await until(lambda: room.module("heater")["state"] == "attached", "the heater")
            reply = await bus.request("heater", get, timeout=DEADLINE)
            assert (reply.json(), slow.done()) == ({"celsius": 5.0}, False), "answered while a job is in hand"
            assert (await slow).json() == {"celsius": 21}
            for content, reason in ((99, "out-of-range"), ("warm", "failed")):
                with pytest.raises(Refused) as refused:
                    await bus.request("heater", job(content), timeout=DEADLINE)
                assert refused.value.reason == reason
            async with Bus.connect("late", groups={"climate"}, handler=got, endpoint=room.endpoint):
                await until(lambda: got.messages, "the retained state")
        assert (got.messages[0].json(), got.retained) == ({"celsius": 21}, [True])

    run(scenario())


def test_a_job_that_the_heater_dies_with_is_done_by_the_next_one(room: Room) -> None:
    first = room.example("heater", HEATER_SECONDS="1000")

    async def scenario() -> None:
        async with Bus.connect("tester", endpoint=room.endpoint) as bus:
            message = Message.build(operation="set", content={"celsius": 21})
            answer = asyncio.ensure_future(bus.request("heater", message, timeout=DEADLINE))
            await until(lambda: room.module("heater")["in_flight"] == 1, "the job in its hands")
            first.kill()
            first.wait(DEADLINE)
            room.example("heater", HEATER_SECONDS="0")
            assert (await answer).json() == {"celsius": 21}
            assert room.module("heater")["redelivered"] == 1

    run(scenario())


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.conf")), ids=lambda file: file.stem)
def test_a_part_of_supervisords_configuration_names_its_module_and_leaves_time_to_drain(file: Path) -> None:
    parser = configparser.RawConfigParser(inline_comment_prefixes=(";",))
    parser.read(file)
    [section] = parser.sections()
    assert section == f"program:{file.stem}"
    assert f'name = "{file.stem}"' in file.with_suffix(".py").read_text()
    options = dict(parser[section])
    assert options["command"].endswith(f'"%(here)s/{file.stem}.py"')
    assert float(options["stopwaitsecs"]) > Module.drain_timeout
    assert options["stdout_logfile"].endswith(f"/log/{file.stem}.log")


def test_an_example_copied_into_a_running_nodes_modules_d_runs_after_an_update(tmp_path: Path) -> None:
    with node_in(tmp_path) as node:
        node.configure("modules: {edgeHub: {enable: false}, eventBus: {enable: false}}")
        node.up()
        for name in ("echo.py", "echo.conf"):
            (node.home.modules / name).write_text((EXAMPLES / name).read_text())
        control = [sys.executable, "-m", "supervisor.supervisorctl", "-s", f"unix://{node.home.supervisor_socket}"]
        updated = subprocess.run([*control, "update"], check=False, capture_output=True, text=True, cwd=tmp_path)
        assert updated.returncode == 0, updated.stdout + updated.stderr
        node.until(lambda: is_attached(node, "echo"), "echo on the bus")
        asked = node.edgezmq("send", "echo", "-r", "anything", "--content", '{"x": 1}', "--request")
        assert asked.returncode == 0, asked.stderr
        assert '"x":1' in asked.stdout.replace(" ", "")


def is_attached(node: Node, name: str) -> bool:
    return any(module["name"] == name and module["state"] == "attached" for module in node.status()["modules"])


# --- the page: the ten lines, its tables ---------------------------------------------------------------


def test_the_module_of_ten_lines_works(room: Room) -> None:
    code = re.findall(r"^```python\n(.*?)^```", TEXT, re.M | re.S)[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    room.code(code)
    got = Recorder()

    async def scenario() -> None:
        async with Bus.connect("tester", groups={"hub"}, handler=got, endpoint=room.endpoint) as bus:
            await (await bus.send("thermometer", Message.build(content={"celsius": 21.5})))
            assert [(m.resource, m.json()) for m in got.messages] == [("default/hall/1", {"celsius": 21.5})]

    run(scenario())


def test_the_settings_and_numbers_in_the_page_are_those_of_the_code() -> None:
    settings = re.findall(r"`(\w+) = ([\d.* ]+)`", TEXT)
    assert {name: eval(value) for name, value in settings} == {
        name: getattr(Module, name)
        for name in ("handler_timeout", "liveness", "prefetch_messages", "prefetch_bytes", "drain_timeout")
    }
    assert (Limits().window_messages, Limits().window_bytes, Limits().message_bytes) == (4096, 8 * 2**20, 17 * 2**20)
    assert HANDLER_WAIT_SECONDS == 5.0
    assert (module_source.EXIT_ERROR, module_source.EXIT_CONFIG, module_source.EXIT_FENCED) == (1, 2, 3)


def test_the_links_of_the_page_lead_somewhere() -> None:
    anchors = {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in re.findall(r"^#+ (.*)$", TEXT, re.M)
    }
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        page, _, anchor = target.partition("#")
        assert not page or (PAGE.parent / page).exists(), target
        assert page or anchor in anchors, target


# --- when a handler misbehaves ----------------------------------------------------------------------------

BAD = """
    import asyncio, os, time
    from runtime.emp import Priority
    from runtime.message import Message
    from runtime.module import Module, run

    class Bad(Module):
        name = "bad"
        liveness = 1.0
        handler_timeout = 0.2
        tries = 0

        async def handle(self, message):
            match message.resource:
                case "raise":
                    self.tries += 1
                    raise ValueError("on purpose")
                case "tries":
                    await self.bus.respond(message, message.response(self.tries))
                case "never":
                    await asyncio.Event().wait()
                case "block":
                    time.sleep(3)
                case "die":
                    os._exit(9)
                case "defer and raise":
                    message.defer()
                    raise ValueError("on purpose")

    run(Bad)
"""


def bad_scenario(room: Room, scenario: Callable[[Bus], Any]) -> None:
    async def whole() -> None:
        async with Bus.connect("tester", endpoint=room.endpoint) as bus:
            await scenario(bus)

    run(whole())


async def outcome(bus: Bus, resource: str, priority: Priority = Priority.DATA) -> str | None:
    receipt = await bus.send("bad", Message.build(resource=resource), priority=priority)
    try:
        await receipt
    except Refused as refused:
        return refused.reason
    return None


def test_a_handler_that_raises_is_tried_three_times_and_only_its_lane_waits(room: Room) -> None:
    room.code(BAD)

    async def scenario(bus: Bus) -> None:
        failing = asyncio.ensure_future(outcome(bus, "raise"))
        behind = asyncio.ensure_future(outcome(bus, "fine"))
        await until(lambda: room.module("bad")["in_flight"], "the first try")
        assert await outcome(bus, "fine", Priority.SIGNAL) is None
        assert not failing.done()
        assert not behind.done()
        assert (await failing, await behind) == ("failed", None)
        assert (await bus.request("bad", Message.build(resource="tries"), timeout=DEADLINE)).json() == 3
        assert await outcome(bus, "defer and raise") == "failed"

    bad_scenario(room, scenario)


def test_a_handler_that_never_returns_is_cancelled(room: Room) -> None:
    room.code(BAD)

    async def scenario(bus: Bus) -> None:
        assert await outcome(bus, "never") == "failed"
        assert await outcome(bus, "fine") is None

    bad_scenario(room, scenario)


def test_a_handler_that_blocks_makes_its_module_silent_and_loses_nothing(room: Room) -> None:
    room.code(BAD)

    async def scenario(bus: Bus) -> None:
        assert await outcome(bus, "fine") is None
        blocked = [asyncio.ensure_future(outcome(bus, what)) for what in ("block", "fine", "fine")]
        await until(lambda: room.module("bad")["state"] == "silent", "silence")
        assert await asyncio.gather(*blocked) == [None, None, None]
        assert room.module("bad")["state"] == "attached"

    bad_scenario(room, scenario)


def test_a_message_that_kills_its_handler_five_times_is_refused_and_those_behind_it_are_handled(room: Room) -> None:
    async def scenario(bus: Bus) -> None:
        poison = asyncio.ensure_future(outcome(bus, "die"))
        behind = asyncio.ensure_future(outcome(bus, "fine"))
        deaths = 0
        while not behind.done():
            process = room.code(BAD)
            while process.poll() is None and not behind.done():
                await asyncio.sleep(0.01)  # between two looks
            deaths += process.poll() == 9
        assert (await poison, await behind, deaths) == ("failed", None, 5)

    bad_scenario(room, scenario)


def test_a_request_that_is_not_answered_times_out(room: Room) -> None:
    room.code(BAD)

    async def scenario(bus: Bus) -> None:
        assert await outcome(bus, "fine") is None
        with pytest.raises(RequestTimeout):
            await bus.request("bad", Message.build(resource="fine"), timeout=0.5)

    bad_scenario(room, scenario)


def test_a_send_in_a_handler_where_nobody_reads_raises_congested(tmp_path: Path) -> None:
    """`late` is declared and away: the window towards it fills."""
    room = Room(tmp_path)
    congested: list[float] = []

    async def scenario() -> None:
        loop = asyncio.get_running_loop()

        async def handle(message: Message) -> None:
            begin = loop.time()
            try:
                for _ in range(Limits().window_messages + 1):
                    await bus.send("late", Message.build())
            except Congested:
                congested.append(loop.time() - begin)

        async with Bus.connect("tester", handler=handle, endpoint=room.endpoint) as bus:
            await (await bus.send("tester", Message.build()))
        assert congested[0] >= HANDLER_WAIT_SECONDS

    try:
        run(scenario())
    finally:
        room.end()


def test_a_module_without_handle_refuses_what_is_sent_to_it(room: Room) -> None:
    room.code(
        """
        from runtime.module import Module, run

        class Bad(Module):
            name = "bad"

        run(Bad)
        """
    )

    async def scenario(bus: Bus) -> None:
        assert await outcome(bus, "anything") == "failed"

    bad_scenario(room, scenario)


def test_a_group_request_tells_who_answered_and_who_is_missing(room: Room) -> None:
    async def scenario() -> None:
        async def answer(message: Message) -> None:
            await bus.respond(message, message.response("here"))

        async def keep_silent(message: Message) -> None:
            raise Refused("not-today")

        async with (
            Bus.connect("tester", endpoint=room.endpoint) as asker,
            Bus.connect("echo", groups={"sensors"}, handler=answer, endpoint=room.endpoint) as bus,
            Bus.connect("late", groups={"sensors"}, handler=keep_silent, endpoint=room.endpoint),
        ):
            replies = await asker.request_group(Group("sensors"), Message.build(), timeout=DEADLINE)
            assert {name: reply.text() for name, reply in replies.replies.items()} == {"echo": "here"}
            assert replies.missing == {"late": "not-today"}

    run(scenario())


def test_content_kinds_are_chosen_as_the_page_says() -> None:
    class Reading(msgspec.Struct):
        celsius: float

    kinds = [Message.build(content=content).kind for content in (b"\xff", "warm", {"a": 1}, 1, None, Reading(1.0))]
    assert kinds == ["bytes", "text", "json", "json", "json", "json"]
