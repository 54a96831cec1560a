"""How to test a module: a real broker and the module as processes, and a test that talks to them.

python -m pytest test_echo.py
"""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.client import Bus
from runtime.errors import Refused
from runtime.message import Message


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A broker and the module, in a directory of their own."""
    monkeypatch.setenv("EDGEZMQ_HOME", str(tmp_path))
    monkeypatch.delenv("EDGEZMQ_BUS", raising=False)
    module = Path(__file__).with_name("echo.py")
    commands = ([sys.executable, "-m", "runtime.broker"], [sys.executable, str(module)])
    processes = [subprocess.Popen(command, env=dict(os.environ)) for command in commands]
    yield
    for process in reversed(processes):
        process.terminate()
        process.wait(20)


async def ask() -> None:
    async with Bus.connect("tester") as bus:
        # Until echo has said HELLO its name is unknown; a node's configuration would declare it.
        async for presence in bus.presence():
            if presence.name == "echo":
                break
        reply = await bus.request("echo", Message.build(resource="a", content={"x": 1}), timeout=5)
        assert reply.json() == {"x": 1}
        with pytest.raises(Refused, match="no-request"):
            await (await bus.send("echo", Message.build(resource="a")))


def test_echo_answers_requests_and_refuses_the_rest(node: None) -> None:
    asyncio.run(asyncio.wait_for(ask(), 20))
