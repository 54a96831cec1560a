"""Answers every request with what it was asked, in the words of the asker.

python echo.py                                                 alone, from a shell
edgezmq send echo -r anything --content '{"x": 1}' --request   ask it
"""

from runtime.errors import Refused
from runtime.message import Message
from runtime.module import Module, run


class Echo(Module):
    name = "echo"

    async def handle(self, message: Message) -> None:
        if not message.delivery.expects_reply:
            raise Refused("no-request")  # the sender is told; raising anything else would be tried again
        await self.bus.respond(message, message.response(message.json() if message.kind == "json" else message.text()))


if __name__ == "__main__":
    run(Echo)
