"""The built-in MQTT broker's process: amqtt, in the virtual environment it has for itself.

`modules.eventbus.broker` starts this file by its path with that environment's interpreter, so it imports nothing of
this project. Argument: the configuration as one JSON text (amqtt's own keys).
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
from typing import Any

from amqtt.broker import Broker
from amqtt.mqtt.protocol.handler import ProtocolHandler
from amqtt.session import OUTGOING

log = logging.getLogger("modules.eventbus.broker")


def make_patient() -> None:
    """Let amqtt wait for a PUBACK for as long as it takes, and keep the message when the client goes.

    As it comes, amqtt 0.12 drops a message that has not been acknowledged after 5 s or when the connection ends.
    """
    impatient = ProtocolHandler._handle_qos1_message_flow

    async def flow(self: Any, message: Any) -> None:
        if message.direction != OUTGOING or message.puback_packet or self.session is None:
            await impatient(self, message)
            return
        identifier, session = message.packet_id, self.session
        session.inflight_out[identifier] = message
        waiter = self._puback_waiters[identifier] = asyncio.get_running_loop().create_future()
        try:
            packet = message.build_publish_packet(dup=message.publish_packet is not None)
            await self._send_packet(packet)
            message.publish_packet = packet
            message.puback_packet = await waiter
        finally:
            self._puback_waiters.pop(identifier, None)
        del session.inflight_out[identifier]  # only now: what is left is sent again at the next connect

    ProtocolHandler._handle_qos1_message_flow = flow


async def serve(config: dict[str, Any]) -> None:
    """Run the broker until SIGTERM or SIGINT."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    broker = Broker(config)
    await broker.start()
    log.info("serving bind=%s", config["listeners"]["default"]["bind"])
    await stopping.wait()
    await broker.shutdown()


def main() -> None:
    # amqtt logs every connection several times at INFO.
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    log.setLevel(logging.INFO)
    make_patient()
    asyncio.run(serve(json.loads(sys.argv[1])))
    # As runtime.exits.stopped_status, which cannot be imported in this environment.
    sys.exit(128 + signal.SIGTERM if os.environ.get("EDGEZMQ_SUPERVISOR_PID") else 0)


if __name__ == "__main__":
    main()
