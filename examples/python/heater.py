"""A slow device behind a module: acknowledges late, answers late, and tells its state to who joins later.

    edgezmq send heater -r heater/1 -o set --content '{"celsius": 21}' --request    set it; answers when it is set
    edgezmq send heater -r heater/1 -o get --request                                ask it; answers meanwhile

The device works on one job after the other, the bus goes on. Seconds for a job: HEATER_SECONDS (default 2).
"""

import asyncio
import os

from runtime.errors import Refused
from runtime.message import Deferral, Message
from runtime.module import Module, run
from runtime.names import Group


class Heater(Module):
    name = "heater"

    def __init__(self) -> None:
        self.seconds = float(os.environ.get("HEATER_SECONDS", "2"))
        self.celsius = 5.0
        self.jobs: asyncio.Queue[tuple[Message, Deferral, float]] = asyncio.Queue(10)

    async def start(self) -> None:
        self.tasks.create_task(self.work())

    async def handle(self, message: Message) -> None:
        if message.operation == "get":
            await self.bus.respond(message, message.response({"celsius": self.celsius}))
        elif message.operation == "set":
            celsius = message.json()["celsius"]  # raises for nonsense: tried again, then refused as `failed`
            if not 5 <= celsius <= 30:
                raise Refused("out-of-range")
            if self.jobs.full():
                raise Refused("busy")
            # From here on `work` acknowledges, when it is done. If this process dies before, the broker gives
            # the message to the next one, marked as redelivered: setting twice does no harm.
            self.jobs.put_nowait((message, message.defer(), celsius))
        else:
            raise Refused("unknown-operation")

    async def work(self) -> None:
        while True:
            message, deferral, celsius = await self.jobs.get()
            await asyncio.sleep(self.seconds)  # the device
            self.celsius = celsius
            if self.bus.expects_reply(message):
                await self.bus.respond(message, message.response({"celsius": celsius}))
            deferral.done()
            # Members of the group `climate` get the last state, also those that start later.
            state = Message.build(resource="heater/1", operation="state", content={"celsius": celsius})
            await self.bus.retain(Group("climate"), "heater/1", state)
            self.jobs.task_done()

    async def stop(self) -> None:
        await self.jobs.join()  # at most `drain_timeout`; what is not done by then waits for the next process


if __name__ == "__main__":
    run(Heater)
