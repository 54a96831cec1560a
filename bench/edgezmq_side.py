"""The SDK as a module uses it: one `await bus.send(message)` each, one `handle(message)` each.

Every receipt is kept until it is settled and then inspected: a refusal ends the measurement.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque

from bench.payload import Sequence, filler, stamp_of, stamped
from bench.worker import Arguments, Gate
from runtime.client import Bus, Receipt
from runtime.message import Message

SINK = "bench-sink"
RESOURCE = "bench"
WAIT_SECONDS = 120.0


def sender(arguments: Arguments, gate: Gate) -> None:
    asyncio.run(_send(arguments, gate))


def receiver(arguments: Arguments, gate: Gate) -> None:
    asyncio.run(_receive(arguments, gate))


def requester(arguments: Arguments, gate: Gate) -> None:
    asyncio.run(_request(arguments, gate))


def responder(arguments: Arguments, gate: Gate) -> None:
    asyncio.run(_respond(arguments, gate))


async def _send(arguments: Arguments, gate: Gate) -> None:
    count, rest = arguments["count"], filler(arguments["size"])
    per_second = arguments.get("per_second", 0)
    async with Bus.connect("bench-sender", endpoint=arguments["endpoint"]) as bus:
        await bus.wait_attached()
        gate.ready()
        await asyncio.to_thread(gate.wait)
        pending: deque[Receipt] = deque()
        delivered = 0
        started = time.monotonic_ns()
        for number in range(count):
            if per_second:
                await asyncio.sleep((started + number * 1_000_000_000 // per_second - time.monotonic_ns()) / 1e9)
                rest = stamped(arguments["size"], time.monotonic_ns())
            message = Message.build(resource=RESOURCE, operation="update", content=number.to_bytes(8, "big") + rest)
            pending.append(await bus.send(SINK, message))
            while pending and pending[0].settled:
                await pending.popleft()  # settled: returns at once, or raises what refused it
                delivered += 1
        async with asyncio.timeout(WAIT_SECONDS):
            while pending:
                await pending.popleft()
                delivered += 1
        gate.result(started_ns=started, finished_ns=time.monotonic_ns(), confirmed=delivered)
        await asyncio.to_thread(gate.stay)


async def _receive(arguments: Arguments, gate: Gate) -> None:
    sequence, count = Sequence(), arguments["count"]
    finished = asyncio.Event()
    is_paced, took_us = bool(arguments.get("per_second")), list[float]()

    async def handle(message: Message) -> None:
        if is_paced:
            took_us.append((time.monotonic_ns() - stamp_of(message.content)) / 1000)
        if sequence.take(message.content) == count:
            finished.set()

    async with Bus.connect(SINK, endpoint=arguments["endpoint"], handler=handle) as bus:
        await bus.wait_attached()
        gate.ready()
        await asyncio.to_thread(gate.wait)
        async with asyncio.timeout(WAIT_SECONDS):
            await finished.wait()
        gate.result(received=sequence.received, skips=sequence.skips, last_ns=time.monotonic_ns(), took_us=took_us)
        await asyncio.to_thread(gate.stay)


async def _request(arguments: Arguments, gate: Gate) -> None:
    rest = filler(arguments["size"])
    async with Bus.connect("bench-requester", endpoint=arguments["endpoint"]) as bus:
        await bus.wait_attached()
        gate.ready()
        await asyncio.to_thread(gate.wait)
        took_us: list[float] = []
        for number in range(arguments["warm_up"] + arguments["count"]):
            payload = number.to_bytes(8, "big") + rest
            before = time.perf_counter_ns()
            reply = await bus.request(
                SINK, Message.build(resource=RESOURCE, operation="query", content=payload), timeout=10
            )
            took_us.append((time.perf_counter_ns() - before) / 1000)
            if reply.content != payload:
                raise AssertionError(f"request {number} got another payload back")
        gate.result(took_us=took_us[arguments["warm_up"] :])
        await asyncio.to_thread(gate.stay)


async def _respond(arguments: Arguments, gate: Gate) -> None:
    async def handle(message: Message) -> None:
        await bus.respond(message, message.response(message.content))

    async with Bus.connect(SINK, endpoint=arguments["endpoint"], handler=handle) as bus:
        await bus.wait_attached()
        gate.ready()
        await asyncio.to_thread(gate.stay)
