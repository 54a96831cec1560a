"""Modules that tests start as processes of their own, to kill and to stop them.

    python -m tests.support.bus_child receive NAME LOG [LIVENESS]
        handles everything: one line `PID SENDER RESOURCE REDELIVERED` each, written before it is acknowledged.
        The resource `poison` kills the process.
    python -m tests.support.bus_child send NAME TO COUNT TAG LOG [LIVENESS]
        sends TAG-1 … TAG-COUNT and writes `RESOURCE OUTCOME` for each that is settled.

The bus is found by EDGEZMQ_BUS. Exit status 3: fenced.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys

from runtime.client import Bus, Receipt
from runtime.errors import Fenced
from runtime.message import Message

FENCED = 3


def _append(log: str) -> int:
    return os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)


async def receive(name: str, log: str, liveness: str = "15") -> None:
    fd = _append(log)

    async def handler(message: Message) -> None:
        if message.resource == "poison":
            os.kill(os.getpid(), signal.SIGKILL)
        delivery = message.delivery
        os.write(fd, f"{os.getpid()} {delivery.sender} {message.resource} {int(delivery.redelivered)}\n".encode())

    bus = Bus(name, handler=handler, liveness=float(liveness))
    bus.open()
    await bus.wait_ended()


async def send(name: str, to: str, count: str, tag: str, log: str, liveness: str = "15") -> None:
    fd = _append(log)
    bus = Bus(name, liveness=float(liveness))
    bus.open()

    async def work() -> None:
        await bus.wait_attached()
        for number in range(1, int(count) + 1):
            resource = f"{tag}-{number}"

            def settled(receipt: Receipt, resource: str = resource) -> None:
                os.write(fd, f"{resource} {receipt.refusal or 'delivered'}\n".encode())

            (await bus.send(to, Message.build(resource=resource))).add_done_callback(settled)
            if number % 10 == 0:
                await asyncio.sleep(0.002)  # spread over what happens to us meanwhile

    working = asyncio.ensure_future(work())
    try:
        await bus.wait_ended()
    finally:
        working.cancel()


def main() -> int:
    task, *arguments = sys.argv[1:]
    try:
        asyncio.run({"receive": receive, "send": send}[task](*arguments))
    except Fenced:
        return FENCED
    return 0


if __name__ == "__main__":
    sys.exit(main())
