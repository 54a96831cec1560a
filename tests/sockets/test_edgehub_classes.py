"""Two classes on a narrow line: signals pass a backlog of data that would need a quarter of an hour."""

import asyncio
import json
import random
import time
from pathlib import Path
from typing import Any

import pytest

from cloudsim import CloudMessage
from modules.edgehub.config import Endpoint
from modules.edgehub.outbox import Class
from modules.edgehub.store import OutboxFile, Row
from modules.edgehub.window import START_BYTES
from runtime.emp import Priority
from runtime.errors import Refused
from runtime.message import Message, to_cloud_json
from tests.modules.edgehub.fakes import hand_over, running, upload
from tests.modules.edgehub.simulated import cloud, settings, state
from tests.support.aio import run, until
from tests.support.deadline import DEADLINE
from tests.support.narrow import NarrowLine

RATE = 100_000
BACKLOG = 120_000
"Messages of at most 1 KiB, 100 MB together."
SIGNALS = 100
FRAME_BYTES = 1024 + 64
"One message with its frame and TLS record."
BOUND_SECONDS = (START_BYTES + FRAME_BYTES) / RATE + 0.05 * DEADLINE / 20


def fill(path: Path, chance: random.Random) -> int:
    """An outbox as a long outage leaves it. Returns its size in bytes."""
    rows = [
        Row(number, "device", to_cloud_json(upload(number, pad="x" * chance.randrange(480, 780))))
        for number in range(1, BACKLOG + 1)
    ]
    assert max(len(row.payload) for row in rows) <= 1024
    file = OutboxFile(path, boot_id="", now=1.0)
    with file.transaction():
        file.add(Class.DATA, rows, 1.0)
    file.close()
    return sum(len(row.payload) for row in rows)


def signal(number: int) -> Message:
    return Message.upload("default/signal", {"signal": number}, source="twin")


def test_signals_pass_a_backlog_on_a_narrow_line_and_no_keepalive_is_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox, chance = tmp_path / "outbox.db", random.Random(1)
    assert fill(outbox, chance) > 100e6
    sent: dict[int, float] = {}
    arrived: dict[int, float] = {}

    async def scenario() -> None:
        async with cloud(tmp_path / "cloud", keepalive_seconds=3.0) as sim:
            record = sim.recorder.message

            def watch(node: str, module: str, message: CloudMessage, payload: bytes, *more: Any) -> None:
                if b'"signal":' in payload:
                    arrived[json.loads(payload)["content"]["signal"]] = time.monotonic()
                record(node, module, message, payload, *more)

            monkeypatch.setattr(sim.recorder, "message", watch)
            with NarrowLine(sim.port, RATE) as line:
                config = settings(
                    sim,
                    endpoints=(Endpoint("127.0.0.1", line.port),),
                    outbox_path=outbox,
                    outbox_bytes=1 << 30,
                    heartbeat_seconds=1.0,
                    keepalive_limit_seconds=3.0,
                    ramp_seconds=0.0,
                )
                async with running(config) as (hub, _):
                    await until(lambda: state(hub) == "served", "a served link")
                    await until(lambda: hub.counters()["confirmed"] > 50, "the backlog to flow")
                    widest = 0
                    for number in range(SIGNALS):
                        sent[number] = time.monotonic()
                        await hand_over(hub, signal(number), priority=Priority.SIGNAL)
                        await asyncio.sleep(chance.uniform(0.02, 0.14))
                        widest = max(widest, hub.counters()["window_bytes"])
                    with pytest.raises(Refused, match="too-large-for-link"):
                        await hand_over(hub, upload(0, pad="x" * 8 * 2**20))
                    await until(lambda: len(arrived) == SIGNALS, "all signals")
                    counters = hub.counters()
                    assert counters["connects"] == 1, "no keepalive was missed"
                    assert counters["stored"] > BACKLOG * 0.9
                    took = sorted(arrived[n] - sent[n] for n in range(SIGNALS))
                    assert widest == START_BYTES
                    assert counters["rate_bytes_per_second"] == pytest.approx(RATE, rel=0.2)
                    facts = {"median": took[SIGNALS // 2], "p99": took[-2], "max": took[-1]}
                    assert took[-2] < BOUND_SECONDS, facts

    run(scenario())
