"""Somebody talks to the broker as fast as it can, and never says who it is."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import zmq

from runtime.broker import OWN_TURN_MESSAGES, STRANGERS_PER_SECOND, Listener
from runtime.client import Bus
from runtime.message import Message
from tests.support.aio import run, until_sync
from tests.support.bus_broker import ThreadBroker

FRAMES = 3000


def refused(broker: ThreadBroker) -> int:
    assert broker.core is not None
    return sum(broker.core.statistics(time.monotonic())["broker"]["refused_frames"].values())


@contextmanager
def flood(endpoint: str) -> Iterator[None]:
    """Nonsense, all of it on its way; from somebody who stays as long as the block lasts."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(endpoint)
        for _ in range(FRAMES):
            socket.send_multipart([b"EMP/1", b"nonsense"])
        yield


def test_on_a_modules_own_socket_strangers_have_a_pace_and_others_do_not_wait_for_it(tmp_path: Path) -> None:
    own = f"ipc://{tmp_path}/pump.sock"

    async def ask() -> None:
        async def answer(message: Message) -> None:
            await fan.respond(message, message.response("yes"))

        async with (
            Bus.connect("fan", handler=answer, endpoint=broker.endpoint) as fan,
            Bus.connect("asker", endpoint=broker.endpoint) as asker,
        ):
            for _ in range(50):
                await asker.request("fan", Message.build(operation="get"), timeout=5)

    async def come_in() -> None:
        async with Bus.connect("pump", endpoint=own):
            pass

    begin = time.monotonic()
    with ThreadBroker(tmp_path, listeners=[Listener(own, "pump", mode=0o600)]) as broker, flood(own):
        until_sync(lambda: refused(broker), "the first to be read")
        run(ask())
        seen = refused(broker)
        # A second's worth, what a turn may overdraw, and what the time allows.
        assert seen <= STRANGERS_PER_SECOND * (1 + time.monotonic() - begin) + OWN_TURN_MESSAGES
        # It is read to its end all the same, and the module itself still comes in.
        run(come_in())
        until_sync(lambda: refused(broker) >= FRAMES, "all of it to be refused")


def test_on_the_socket_that_all_share_nobody_is_held_up_for_a_stranger(tmp_path: Path) -> None:
    with ThreadBroker(tmp_path) as broker, flood(broker.endpoint):
        begin = time.monotonic()
        until_sync(lambda: refused(broker) >= FRAMES, "all of it to be refused")
        assert time.monotonic() - begin < FRAMES / STRANGERS_PER_SECOND - 1
