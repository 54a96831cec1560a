"""The Java example with a CURVE key of its own, against a broker on tcp; not run where it is not built."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from pathlib import Path

from runtime import keys
from runtime.access import ANY, Policy, Rule
from runtime.broker import Listener
from runtime.client import Bus
from runtime.message import Message
from tests.support.aio import run
from tests.support.built import require_example
from tests.support.bus_broker import ThreadBroker
from tests.support.deadline import DEADLINE
from tests.support.mosquitto import free_port

NAME = "java-example"


def test_the_java_example_comes_in_with_its_key_answers_uploads_and_leaves(tmp_path: Path) -> None:
    jar = require_example("java")
    broker_keys, own = keys.make(tmp_path, keys.BROKER), keys.make(tmp_path, NAME)
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    me = os.geteuid()
    rules = {
        NAME: Rule(keys=frozenset({own.public}), destinations=frozenset({"@hub"})),
        "asker": Rule(uids=frozenset({me}), groups=frozenset({"hub"}), destinations=frozenset({ANY})),
    }

    async def scenario(broker: ThreadBroker) -> None:
        uploads: asyncio.Queue[str] = asyncio.Queue()

        async def take(message: Message) -> None:
            uploads.put_nowait(f"{message.delivery.sender} {message.text()}")

        async with Bus.connect("asker", groups={"hub"}, handler=take, endpoint=broker.endpoint) as asker:
            assert [await uploads.get() for _ in range(3)] == [f'{NAME} {{"number": {n}}}' for n in (1, 2, 3)]
            question = Message.build(resource="x", operation="get", content={"x": 2**60})
            answer = await asker.request(NAME, question, timeout=DEADLINE)
            assert answer.json() == {"x": 2**60}

    environ = {key: value for key, value in os.environ.items() if not key.startswith("EDGEZMQ_")}
    environ |= {
        "EDGEZMQ_BUS": endpoint,
        "EDGEZMQ_CURVE_KEY": str(tmp_path / f"{NAME}.key_secret"),
        "EDGEZMQ_CURVE_SERVER": broker_keys.public,
        "UPLOAD_SECONDS": "0.1",
    }
    listener = Listener(endpoint, secret_key=broker_keys.secret)
    access = Policy(rules, own_uid=me)
    with ThreadBroker(tmp_path, access=access, listeners=[listener], admitted=[own.public]) as broker:
        module = subprocess.Popen(["java", "-jar", jar], env=environ)
        try:
            run(scenario(broker))
            module.terminate()
            assert module.wait(DEADLINE) == 128 + signal.SIGTERM  # what the Java machine makes of SIGTERM
        finally:
            module.kill()
            module.wait()
