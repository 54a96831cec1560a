"""The bus under SIGKILL and SIGSTOP, with real processes: nothing lost, order kept, exact counts."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from runtime.client import Bus, Receipt
from runtime.config import BrokerSection, ModuleSection, NodeConfig, RuntimeSection, store
from runtime.errors import Refused
from runtime.home import Home
from runtime.message import Message
from tests.support.aio import run, until
from tests.support.bus_child import FENCED
from tests.support.deadline import DEADLINE

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parent.parent.parent


class Handled(NamedTuple):
    """One line of a receiver's log."""

    pid: int
    sender: str
    resource: str
    redelivered: bool


class Processes:
    """A broker and children on a home of their own. `end` kills whatever is left."""

    def __init__(self, directory: Path) -> None:
        self.home = Home(directory).prepare()
        self.endpoint = f"ipc://{self.home.bus_socket}"
        self.environ = {key: value for key, value in os.environ.items() if not key.startswith("EDGEZMQ_")}
        self.environ |= {"EDGEZMQ_HOME": str(directory), "EDGEZMQ_LOG": "warning"}
        self.children: list[subprocess.Popen[bytes]] = []
        self.log = directory / "handled"
        self.settled = directory / "settled"
        store(
            NodeConfig(
                runtime=RuntimeSection(
                    modules={"receiver": ModuleSection()},
                    broker=BrokerSection(heartbeat_seconds=0.3, grace_seconds=0.3, poison_deaths=3),
                )
            ),
            self.home,
        )

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        child = subprocess.Popen([sys.executable, "-m", *arguments], cwd=ROOT, env=self.environ)
        self.children.append(child)
        return child

    def broker(self) -> subprocess.Popen[bytes]:
        return self.start("runtime.broker")

    def receiver(self, liveness: str = "15") -> subprocess.Popen[bytes]:
        return self.start("tests.support.bus_child", "receive", "receiver", str(self.log), liveness)

    def sender(self, tag: str, count: int, liveness: str = "15") -> subprocess.Popen[bytes]:
        arguments = ("send", "sender", "receiver", str(count), tag, str(self.settled), liveness)
        return self.start("tests.support.bus_child", *arguments)

    def handled(self) -> list[Handled]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [
            Handled(int(pid), sender, resource, redelivered == "1")
            for pid, sender, resource, redelivered in map(str.split, lines)
        ]

    def outcomes(self) -> dict[str, str]:
        """What the sending children were told: resource → outcome."""
        lines = self.settled.read_text().splitlines() if self.settled.exists() else []
        return dict(line.split() for line in lines)

    def end(self) -> None:
        for child in self.children:
            if child.poll() is None:
                child.kill()
            child.wait(DEADLINE)


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    made = Processes(tmp_path)
    try:
        yield made
    finally:
        made.end()


class Load:
    """Numbered messages from a bus of the test's own, until `enough` are sent."""

    def __init__(self, bus: Bus) -> None:
        self.receipts: list[Receipt] = []
        self._bus = bus
        self._enough = asyncio.Event()
        self._task = asyncio.ensure_future(self._run())

    async def _run(self) -> None:
        while not self._enough.is_set():
            message = Message.build(resource=str(len(self.receipts)))
            self.receipts.append(await self._bus.send("receiver", message))
            if len(self.receipts) % 25 == 0:
                await asyncio.sleep(0.005)  # spread over the kills

    async def more(self, count: int = 300) -> None:
        """Until `count` further messages are sent."""
        wanted = len(self.receipts) + count
        await until(lambda: len(self.receipts) >= wanted, "more load")

    async def settled(self) -> int:
        """No more load; every receipt is `delivered`. Returns how many there are."""
        self._enough.set()
        await self._task
        for receipt in self.receipts:
            await receipt
        return len(self.receipts)


def first_seen(handled: list[Handled]) -> list[str]:
    return list(dict.fromkeys(each.resource for each in handled))


def assert_in_order_within_each_process(handled: list[Handled]) -> None:
    for pid in {each.pid for each in handled}:
        numbers = [int(each.resource) for each in handled if each.pid == pid]
        assert numbers == sorted(set(numbers)), f"process {pid} repeats or reorders"


def test_a_broker_killed_five_times_under_load_loses_repeats_and_reorders_nothing(processes: Processes) -> None:
    async def scenario() -> None:
        broker = processes.broker()
        processes.receiver()
        async with Bus.connect("sender", endpoint=processes.endpoint) as bus:
            load = Load(bus)
            await until(processes.handled, "the first message")
            for _ in range(5):
                await load.more()
                broker.kill()
                broker.wait()
                broker = processes.broker()
                handled = len(processes.handled())
                await until(lambda handled=handled: len(processes.handled()) > handled + 50, "service")
            count = await load.settled()
        assert [each.resource for each in processes.handled()] == [str(number) for number in range(count)]

    run(scenario())


def test_a_receiver_killed_under_load_loses_nothing_and_repeats_only_what_is_marked(processes: Processes) -> None:
    async def scenario() -> None:
        processes.broker()
        receiver = processes.receiver()
        async with Bus.connect("sender", endpoint=processes.endpoint) as bus:
            load = Load(bus)
            await until(processes.handled, "the first message")
            for _ in range(4):
                await load.more()
                receiver.kill()
                receiver.wait()
                receiver = processes.receiver()
                pid = receiver.pid
                await until(lambda pid=pid: processes.handled()[-1].pid == pid, "the new one")
            count = await load.settled()
        handled = processes.handled()
        assert first_seen(handled) == [str(number) for number in range(count)]
        assert_in_order_within_each_process(handled)
        seen: set[str] = set()
        for each in handled:
            assert each.resource not in seen or each.redelivered, f"{each} is a repeat and does not say so"
            seen.add(each.resource)

    run(scenario())


def test_broker_and_receiver_killed_together_lose_nothing(processes: Processes) -> None:
    async def scenario() -> None:
        broker, receiver = processes.broker(), processes.receiver()
        async with Bus.connect("sender", endpoint=processes.endpoint) as bus:
            load = Load(bus)
            await until(processes.handled, "the first message")
            for _ in range(2):
                await load.more()
                receiver.kill()
                broker.kill()
                receiver.wait()
                broker.wait()
                receiver, broker = processes.receiver(), processes.broker()
                pid = receiver.pid
                await until(lambda pid=pid: processes.handled()[-1].pid == pid, "the new one")
            count = await load.settled()
        handled = processes.handled()
        assert first_seen(handled) == [str(number) for number in range(count)]
        assert_in_order_within_each_process(handled)

    run(scenario())


def test_a_sender_that_was_stopped_and_replaced_is_fenced_and_nothing_is_handled_twice(processes: Processes) -> None:
    async def scenario() -> None:
        processes.broker()
        processes.receiver()
        zombie = processes.sender("old", 100_000, liveness="0.5")
        await until(lambda: len(processes.handled()) > 200, "the first sender")
        zombie.send_signal(signal.SIGSTOP)
        processes.sender("new", 500, liveness="0.5")
        await until(lambda: processes.outcomes().get("new-500"), "the second sender")
        zombie.send_signal(signal.SIGCONT)
        await until(lambda: zombie.poll() is not None, "the end of the first one")
        assert zombie.returncode == FENCED
        handled = [each.resource for each in processes.handled()]
        old = [resource for resource in handled if resource.startswith("old")]
        new = [resource for resource in handled if resource.startswith("new")]
        assert old == [f"old-{number}" for number in range(1, len(old) + 1)]
        assert new == [f"new-{number}" for number in range(1, 501)]
        assert handled == old + new  # a newer process's messages come after the older one's (rule 19)
        outcomes = processes.outcomes()
        assert {resource for resource, outcome in outcomes.items() if outcome == "delivered"} <= set(handled)
        assert sum(outcome == "delivered" for outcome in outcomes.values()) >= 500

    run(scenario())


def test_a_receiver_that_was_stopped_and_replaced_handles_nothing_more(processes: Processes) -> None:
    async def scenario() -> None:
        processes.broker()
        zombie = processes.receiver(liveness="0.5")
        async with Bus.connect("sender", endpoint=processes.endpoint) as bus:
            load = Load(bus)
            await until(lambda: len(processes.handled()) > 200, "the first receiver")
            zombie.send_signal(signal.SIGSTOP)
            await load.more()
            processes.receiver(liveness="0.5")
            await until(lambda: processes.handled()[-1].pid != zombie.pid, "the second receiver")
            await load.more()
            before = sum(each.pid == zombie.pid for each in processes.handled())
            zombie.send_signal(signal.SIGCONT)
            await until(lambda: zombie.poll() is not None, "the end of the first one")
            assert zombie.returncode == FENCED
            count = await load.settled()
        handled = processes.handled()
        after = sum(each.pid == zombie.pid for each in handled) - before
        assert after <= 1  # a handler that was already running cannot be helped
        assert first_seen(handled) == [str(number) for number in range(count)]
        assert_in_order_within_each_process(handled)

    run(scenario())


def test_a_message_that_kills_its_handlers_process_is_refused_and_the_others_are_delivered(
    processes: Processes,
) -> None:
    async def scenario() -> None:
        processes.broker()
        receiver = processes.receiver()
        async with Bus.connect("sender", endpoint=processes.endpoint) as bus:
            receipts = []
            for number in range(30):
                resource = "poison" if number == 10 else str(number)
                receipts.append(await bus.send("receiver", Message.build(resource=resource)))
            deaths = 0
            end = asyncio.get_running_loop().time() + DEADLINE
            while not all(receipt.settled for receipt in receipts):
                assert asyncio.get_running_loop().time() < end, "not settled"
                if receiver.poll() is not None:
                    assert receiver.returncode == -signal.SIGKILL
                    deaths += 1
                    receiver = processes.receiver()
                await asyncio.sleep(0.01)  # between two looks
            assert receipts[10].refusal == "failed"
            with pytest.raises(Refused):
                await receipts[10]
            assert [receipt.refusal for receipt in receipts if receipt is not receipts[10]] == [None] * 29
            assert 3 <= deaths <= 2 + 3  # two before it was alone, three of its own
            await (await bus.send("receiver", Message.build(resource="99")))
        handled = processes.handled()
        assert first_seen(handled) == [*(str(number) for number in range(30) if number != 10), "99"]
        assert_in_order_within_each_process(handled)

    run(scenario())


def test_a_second_broker_on_one_home_says_so_and_the_first_serves_on(processes: Processes) -> None:
    async def scenario() -> None:
        processes.broker()
        processes.receiver()
        async with Bus.connect("sender", endpoint=processes.endpoint) as bus:
            second = await asyncio.to_thread(
                subprocess.run,
                [sys.executable, "-m", "runtime.broker"],
                cwd=ROOT,
                env=processes.environ,
                capture_output=True,
                timeout=DEADLINE,
                check=False,
            )
            assert second.returncode == 2
            assert b"already running" in second.stderr
            await (await bus.send("receiver", Message.build(resource="0")))

    run(scenario())
