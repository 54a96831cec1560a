"""The user's modules of a chaos node: `python worker.py maker|keeper|asker|answerer`, under supervisord.

Each writes what it did into a file outside of the node (CHAOS_RECORD), one line a fact, with one write: what is
in the file survives the death of the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from pathlib import Path

from runtime.client import Receipt
from runtime.errors import EdgezmqError
from runtime.message import Message
from runtime.module import Module, run
from runtime.names import Group

KEEP = "chaos/keep"
TICK_SECONDS = 0.02
REQUESTS_PER_SECOND = 200
REQUEST_SECONDS = 20.0


class Record:
    """A file of facts that only grows."""

    def __init__(self, name: str) -> None:
        self.directory = Path(os.environ["CHAOS_RECORD"])
        self.path = self.directory / name
        self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def write(self, text: str) -> None:
        os.write(self._fd, text.encode())


class Maker(Module):
    """Sends numbered messages to keeper and to the cloud, and writes down each receipt.

    The file `rates` in the record's directory holds both rates a second; it is read again five times a second.
    """

    name = "maker"

    def __init__(self) -> None:
        self._record = Record("maker")
        text = self._record.path.read_text()
        # Numbers never come again: each process counts in a generation of its own.
        self._generation = text.count("G ")
        self._record.write(f"G {self._generation}\n")
        self._settled: list[str] = []

    async def start(self) -> None:
        self.tasks.create_task(self._make())

    async def _make(self) -> None:
        number = 0
        due = [0.0, 0.0]
        last = time.monotonic()
        rates = [0.0, 0.0]
        looked = 0.0
        while True:
            await asyncio.sleep(TICK_SECONDS)
            now = time.monotonic()
            if now - looked > 0.2:
                looked = now
                with contextlib.suppress(OSError, ValueError):
                    rates = [float(word) for word in (self._record.directory / "rates").read_text().split()]
            for flow, kind in enumerate("km"):
                due[flow] = min(due[flow] + rates[flow] * (now - last), 50.0)
                while due[flow] >= 1.0:
                    due[flow] -= 1.0
                    number += 1
                    await self._send(kind, f"{self._generation}.{number}")
            last = now
            if self._settled:
                self._record.write("".join(self._settled))
                self._settled.clear()

    async def _send(self, kind: str, number: str) -> None:
        token = f"{kind}.x.{number}."
        if kind == "k":
            message = Message.build(source=self.name, group="user", resource=KEEP, operation="keep", content=token)
            to: str | Group = "keeper"
        else:
            message = Message.upload("default/chaos/1", {"t": token}, source=self.name)
            to = Group("hub")
        self._record.write(f"S {kind} {number} {time.monotonic():.4f}\n")
        receipt = await self.bus.send(to, message)

        def settled(receipt: Receipt) -> None:
            word = "R" if receipt.refusal is None else f"X:{receipt.refusal}"
            self._settled.append(f"{word} {kind} {number} {time.monotonic():.4f}\n")

        receipt.add_done_callback(settled)


class Keeper(Module):
    """Handles what maker sends, and the cluster's objects (it plays metamanager), and writes down each."""

    name = "keeper"
    groups = frozenset({"meta"})
    liveness = 3.0

    def __init__(self) -> None:
        self._record = Record("keeper")

    async def handle(self, message: Message) -> None:
        marked = int(message.delivery.redelivered) if message.delivery else 0
        if message.resource == KEEP:
            number = message.text().split(".", 2)[2].rstrip(".")
            self._record.write(f"H {number} {marked} {os.getpid()} {time.monotonic():.4f}\n")
        elif "/configmap/" in message.resource:
            self._record.write(f"O {message.id} {marked} {os.getpid()} {time.monotonic():.4f}\n")


class Answerer(Module):
    name = "answerer"

    async def handle(self, message: Message) -> None:
        await self.bus.respond(message, message.response(message.json()))


class Asker(Module):
    """200 requests a second on a schedule of their own: a late answer does not delay the next question."""

    name = "asker"

    def __init__(self) -> None:
        self._record = Record("asker")
        self._lines: list[str] = []

    async def start(self) -> None:
        self.tasks.create_task(self._ask_always())

    async def _ask_always(self) -> None:
        await self.bus.wait_attached()
        begun = time.monotonic()
        count = 0
        while True:
            count += 1
            wait = begun + count / REQUESTS_PER_SECOND - time.monotonic()
            if wait > 0:
                await asyncio.sleep(wait)
            elif wait < -1.0:  # we ourselves were stopped: no burst for what was missed
                begun -= wait
            self.tasks.create_task(self._ask())
            if len(self._lines) >= 20:
                self._record.write("".join(self._lines))
                self._lines.clear()

    async def _ask(self) -> None:
        asked = time.monotonic()
        question = Message.build(source=self.name, group="user", resource="chaos/ask", operation="ask", content=1)
        try:
            await self.bus.request("answerer", question, timeout=REQUEST_SECONDS)
            took = time.monotonic() - asked
        except EdgezmqError:
            took = REQUEST_SECONDS
        self._lines.append(f"{asked:.5f} {took:.6f}\n")


if __name__ == "__main__":
    run({"maker": Maker, "keeper": Keeper, "asker": Asker, "answerer": Answerer}[sys.argv[1]])
