"""Measures every few seconds and uploads to the cloud, without losing a reading to a restart of anything but itself.

Reads the machine's load, so it runs anywhere. Seconds between two readings: UPLOADER_SECONDS (default 5). Where it
uploads to: UPLOADER_TO (default @hub, which is edgehub).
"""

import asyncio
import logging
import os

from runtime.client import Receipt
from runtime.message import Message
from runtime.module import Module, run
from runtime.names import Group

log = logging.getLogger("uploader")


class Uploader(Module):
    name = "uploader"

    def __init__(self) -> None:
        self.seconds = float(os.environ.get("UPLOADER_SECONDS", "5"))
        to = os.environ.get("UPLOADER_TO", "@hub")
        self.to = Group(to[1:]) if to.startswith("@") else to
        self.uploaded = 0
        self.refused = 0

    async def start(self) -> None:
        self.tasks.create_task(self.measure())

    async def measure(self) -> None:
        while True:
            reading = {"load": os.getloadavg()[0]}
            # Waits while the window is full (the cloud is away for long): then there are fewer readings, not lost ones.
            # After an hour in a mailbox a reading is of no use to anybody.
            message = Message.upload("default/load/1", reading, source=self.name)
            receipt = await self.bus.send(self.to, message, ttl=3600)
            receipt.add_done_callback(self.settled)
            await asyncio.sleep(self.seconds)

    def settled(self, receipt: Receipt) -> None:
        """One reading is safe with edgehub, or refused."""
        if receipt.refusal is None:
            self.uploaded += 1
        else:
            self.refused += 1
            log.warning("upload refused reason=%s", receipt.refusal)

    def counters(self) -> dict[str, int]:
        return {"uploaded": self.uploaded, "refused": self.refused}


if __name__ == "__main__":
    run(Uploader)
