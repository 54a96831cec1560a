"""The largest messages, through a real broker and a real edgehub process, and the memory they take."""

from pathlib import Path

import pytest

from runtime.client import Bus
from runtime.errors import MessageTooLarge
from runtime.message import TEXT, Message, encode_message
from runtime.names import Group
from tests.modules.edgehub.simulated import NODE, cloud, command
from tests.sockets.test_edgehub_process import Processes, processes, write_config
from tests.support.aio import run, until

__all__ = ["processes"]

pytestmark = pytest.mark.processes

MIB = 2**20
LIMIT_UP = 12 * MIB


def peak_bytes(pid: int) -> int:
    """The most memory that a process has had at one time."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def check_memory(peaks: list[int], size_bytes: int) -> None:
    """`peaks` after each of some rounds, above what edgehub takes idle."""
    assert peaks[0] < 12 * size_bytes, "the copies that bus, base64, JSON, frame and TLS make: measured 7.5"
    assert peaks[-1] < peaks[0] + 2 * size_bytes, "and not one more for each message"


def largest(content: bytes | str) -> Message:
    """A message of the limit's 12 MiB to the last byte, with one byte of content repeated."""
    empty = Message.upload("a/b", content * 2**16)
    room = LIMIT_UP - len(encode_message(empty)) + 2**16
    message = Message.upload("a/b", content * room)
    assert len(encode_message(message)) == LIMIT_UP
    return message


def test_12_mib_go_up_as_text_and_as_bytes(tmp_path: Path, processes: Processes) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path / "cloud") as sim:
            write_config(sim)
            processes.start("runtime.broker")
            processes.start("modules.edgehub")
            async with Bus.connect("tester") as bus:
                await sim.wait_served(NODE)
                pid = processes.running["modules.edgehub"].pid
                idle = peak_bytes(pid)
                peaks = []
                for _ in range(3):
                    for message in (largest("a"), largest(b"\xff")):
                        await (await bus.send(Group("hub"), message))
                        received = sim.uploads(NODE)[-1]
                        assert received.id == message.id
                        size = len(message.content)
                        assert len(received.content) == (size if message.kind == TEXT else -(-size // 3) * 4)
                    peaks.append(peak_bytes(pid) - idle)
                check_memory(peaks, 16 * MIB)
                with pytest.raises(MessageTooLarge):
                    await bus.send(Group("hub"), Message.upload("a/b", "a" * (17 * MIB)))

    run(scenario())


def test_16_mib_come_down(tmp_path: Path, processes: Processes) -> None:
    async def scenario() -> None:
        got: list[Message] = []

        async def handle(message: Message) -> None:
            if message.operation == "publish":
                got.append(message)

        async with cloud(tmp_path / "cloud") as sim:
            write_config(sim)
            processes.start("runtime.broker")
            processes.start("modules.edgehub")
            async with Bus.connect("eventbus", handler=handle):
                await sim.wait_served(NODE)
                pid = processes.running["modules.edgehub"].pid
                idle = peak_bytes(pid)
                peaks = []
                for number in range(4):
                    large = command(number)
                    large.content = "x" * (16 * MIB - 400)
                    sim.send(NODE, large)
                    await until(lambda: got, "16 MiB")
                    assert len(got.pop().content) == 16 * MIB - 400
                    peaks.append(peak_bytes(pid) - idle)
                check_memory(peaks, 16 * MIB)

    run(scenario())
