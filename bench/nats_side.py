"""nats-py, used as its documentation and its own benchmark (nats.py, benchmark/pub_sub_perf.py) use it.

At most once: `publish` returns when the bytes are in the client's buffer. The subscriber has a callback
(its iterator is three times slower) and no limit on what may be pending, so that nothing is dropped.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Any

import nats

from bench.payload import Sequence, filler
from bench.worker import Arguments, Gate

PAUSE_EACH = 100
PAUSE_SECONDS = 0.00001
"The pause of nats.py's own benchmark: it lets the flusher and the reader run."

QUIET_SECONDS = 2.0
"A receiver that has heard nothing for so long takes the rest for lost."

FLUSH_SECONDS = 60


def _run(main: Coroutine[Any, Any, None], arguments: Arguments) -> None:
    if arguments.get("uvloop"):
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main)
    else:
        asyncio.run(main)


def sender(arguments: Arguments, gate: Gate) -> None:
    _run(_send(arguments, gate), arguments)


def receiver(arguments: Arguments, gate: Gate) -> None:
    _run(_receive(arguments, gate), arguments)


def requester(arguments: Arguments, gate: Gate) -> None:
    _run(_request(arguments, gate), arguments)


def responder(arguments: Arguments, gate: Gate) -> None:
    _run(_respond(arguments, gate), arguments)


async def _send(arguments: Arguments, gate: Gate) -> None:
    connection = await nats.connect(arguments["url"])
    count, rest = arguments["count"], filler(arguments["size"])
    gate.ready()
    await asyncio.to_thread(gate.wait)
    started = time.monotonic_ns()
    for number in range(count):
        await connection.publish("bench", number.to_bytes(8, "big") + rest)
        if number % PAUSE_EACH == PAUSE_EACH - 1:
            await asyncio.sleep(PAUSE_SECONDS)
    await connection.flush(FLUSH_SECONDS)
    gate.result(started_ns=started, finished_ns=time.monotonic_ns(), confirmed=None)
    await asyncio.to_thread(gate.stay)
    await connection.close()


async def _receive(arguments: Arguments, gate: Gate) -> None:
    connection = await nats.connect(arguments["url"])
    sequence, count = Sequence(), arguments["count"]
    last_ns = 0
    finished = asyncio.Event()

    async def handle(message: Any) -> None:
        nonlocal last_ns
        if sequence.take(message.data) == count:
            last_ns = time.monotonic_ns()
            finished.set()

    await connection.subscribe("bench", cb=handle, pending_msgs_limit=0, pending_bytes_limit=0)
    await connection.flush()
    gate.ready()
    await asyncio.to_thread(gate.wait)
    seen = -1
    while not finished.is_set():
        try:
            await asyncio.wait_for(finished.wait(), QUIET_SECONDS)
        except TimeoutError:
            if sequence.received == seen:
                break
            seen, last_ns = sequence.received, time.monotonic_ns()
    gate.result(received=sequence.received, skips=sequence.skips, last_ns=last_ns)
    await asyncio.to_thread(gate.stay)
    await connection.close()


async def _request(arguments: Arguments, gate: Gate) -> None:
    connection = await nats.connect(arguments["url"])
    rest = filler(arguments["size"])
    gate.ready()
    await asyncio.to_thread(gate.wait)
    took_us: list[float] = []
    for number in range(arguments["warm_up"] + arguments["count"]):
        payload = number.to_bytes(8, "big") + rest
        before = time.perf_counter_ns()
        reply = await connection.request("ask", payload, timeout=10)
        took_us.append((time.perf_counter_ns() - before) / 1000)
        if reply.data != payload:
            raise AssertionError(f"request {number} got another payload back")
    gate.result(took_us=took_us[arguments["warm_up"] :])
    await asyncio.to_thread(gate.stay)
    await connection.close()


async def _respond(arguments: Arguments, gate: Gate) -> None:
    connection = await nats.connect(arguments["url"])

    async def handle(message: Any) -> None:
        await message.respond(message.data)

    await connection.subscribe("ask", cb=handle)
    await connection.flush()
    gate.ready()
    await asyncio.to_thread(gate.stay)
    await connection.close()
