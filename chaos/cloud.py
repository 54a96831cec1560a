"""cloudsim that writes down what it took over before it confirms it.

`python -m chaos.cloud DIRECTORY PORT CONTROL_PORT RECORD LINK`
CloudHub's promise ends with its memory (docs/cloudlink.md). Here what it took over must be known also when it is
killed itself, so each message is in a file before its pong can go out.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from chaos.places import NODE, TOKEN
from cloudsim import CloudSim, SimConfig
from cloudsim.recorder import Recorder
from cloudsim.wire import CloudMessage
from demo.around import QUIC


class WritingRecorder(Recorder):
    """One line `M seconds id crc token` for each message with a token of ours, `A seconds id` for an ACK.

    `K seconds 0` when a session of the node begins or ends: what is not acknowledged and was on its way may be gone.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(max_events=1000, max_bytes=2**20, max_ids=1000)
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._cut()  # a cloudsim that was killed could not tell of the end

    def message(self, node: str, module: str, message: CloudMessage, payload: bytes, at: float, *how: Any) -> None:
        super().message(node, module, message, payload, at, *how)
        found = TOKEN.search(payload)
        if found is not None:
            content = message.content
            data = content.encode() if isinstance(content, str) else content if isinstance(content, bytes) else b""
            crc = zlib.crc32(data)
            line = f"M {time.monotonic():.4f} {message.header.msg_id} {crc} {found[0].decode()}\n"
            os.write(self._fd, line.encode())

    def happen(self, node: str, what: str, facts: dict[str, Any], at: float) -> None:
        super().happen(node, what, facts, at)
        if what == "acknowledged":
            os.write(self._fd, f"A {time.monotonic():.4f} {facts['id']}\n".encode())
        elif what in ("connected", "disconnected"):
            self._cut()

    def _cut(self) -> None:
        os.write(self._fd, f"K {time.monotonic():.4f} 0\n".encode())


async def serve(directory: Path, port: int, control_port: int, record: Path, link: str) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    config = SimConfig(directory=directory, port=port, control_port=control_port, nodes=(NODE,))
    sim = CloudSim(replace(config, port=0, quic_port=port) if link == QUIC else config)
    sim.recorder = sim.shell.recorder = WritingRecorder(record)
    async with sim:
        await stop.wait()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), sys.argv[5]))
