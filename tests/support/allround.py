"""A module of the Python SDK that does everything the conformance runner has a check for."""

import asyncio

from runtime.client import Receipt
from runtime.errors import NotHandled, Refused
from runtime.message import Message
from runtime.module import Module, run
from runtime.names import Group


class AllRound(Module):
    name, groups = "allround", {"climate"}
    liveness = 5.0
    drain_timeout = 3.0

    async def start(self) -> None:
        for work in (self.upload, self.ask, self.tell):
            self.tasks.create_task(work())

    async def handle(self, message: Message) -> None:
        if not message.delivery.expects_reply:
            raise Refused("no-request")
        content = message.text() if message.kind == "text" else message.json()
        await self.bus.respond(message, message.response(content))

    async def upload(self) -> None:
        refused: list[str] = []

        def settled(receipt: Receipt) -> None:
            if receipt.refusal is not None:
                refused.append(receipt.refusal)

        while True:
            try:
                receipt = await self.bus.send(Group("hub"), Message.upload("hall/1", {"refused": len(refused)}))
                receipt.add_done_callback(settled)
            except NotHandled:
                pass
            await asyncio.sleep(0.1)

    async def ask(self) -> None:
        while True:
            try:
                await self.bus.request("oracle", Message.build(operation="query", content={}), timeout=1.0)
            except NotHandled:
                await asyncio.sleep(0.3)

    async def tell(self) -> None:
        while True:
            await self.bus.retain(Group("state"), "mood", Message.build(operation="state", content={}))
            await asyncio.sleep(0.5)


if __name__ == "__main__":
    run(AllRound)
