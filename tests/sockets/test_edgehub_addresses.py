"""The kernel's news of addresses and routes."""

import asyncio
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from modules.edgehub.addresses import AddressWatch
from tests.support.aio import run, until
from tests.support.deadline import DEADLINE


def test_several_changes_together_are_told_once() -> None:
    async def scenario() -> None:
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        near.setblocking(False)
        told: list[None] = []
        watch = AddressWatch(asyncio.get_running_loop(), lambda: told.append(None))
        watch.stop()
        watch._socket = near
        for _ in range(3):
            far.send(b"a change")
        watch._read()
        far.send(b"another")
        watch._read()
        await until(lambda: told, "the call")
        assert len(told) == 1
        watch._read()
        watch.stop()
        await asyncio.sleep(0)
        assert len(told) == 1, "none after the stop"
        far.close()

    run(scenario())


def test_a_link_over_quic_goes_on_from_the_address_that_the_machine_has_now(tmp_path: Path) -> None:
    """In a network of its own, whose route to the cloud begins at another address all at once."""
    alone = next((each for each in (["unshare", "-n"], ["unshare", "-rn"]) if succeeds([*each, "ip", "link"])), None)
    if alone is None:
        pytest.skip("no right to a network of one's own, or no `ip`")
    command = [*alone, sys.executable, "-m", "tests.support.moving", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "addresses": ["10.9.0.2", "10.9.0.3"],
        "links": 1,
        "arrived": list(range(20)),
    }


def succeeds(command: list[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def test_without_a_netlink_socket_nothing_is_told_and_nothing_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> socket.socket:
        raise PermissionError(1, "Operation not permitted")

    async def scenario() -> None:
        monkeypatch.setattr(socket, "socket", refuse)
        AddressWatch(asyncio.get_running_loop(), lambda: None).stop()

    run(scenario())
