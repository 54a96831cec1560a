"""A cloudsim with its certificate API in a thread of its own, for tests that join from another process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cloudsim import CloudSim, SimConfig
from cloudsim.certificate_api import TOKEN_SECONDS, ApiFault
from tests.support.deadline import DEADLINE


class Cloud:
    """What a test may ask of it, from any thread."""

    def __init__(self, sim: CloudSim, loop: asyncio.AbstractEventLoop) -> None:
        self.sim = sim
        self._loop = loop
        self.server = f"https://127.0.0.1:{sim.certificate_port}"

    def token(self, *, expires_in: float | None = TOKEN_SECONDS) -> str:
        return self.sim.token(expires_in=expires_in)

    def fault(self, kind: str, **settings: Any) -> None:
        assert self.sim.certificates is not None
        fault = ApiFault(fault=kind, **settings)  # type: ignore[arg-type]  # checked by ApiFault
        asyncio.run_coroutine_threadsafe(self.sim.certificates.inject(fault), self._loop).result(DEADLINE)


@contextmanager
def cloud_in_a_thread(directory: Path, **settings: Any) -> Iterator[Cloud]:
    ready: list[Cloud] = []
    is_ready, is_over = threading.Event(), asyncio.Event()

    async def serve() -> None:
        config = SimConfig(directory=directory, certificate_port=0, control_port=None, **settings)
        async with CloudSim(config) as sim:
            ready.append(Cloud(sim, asyncio.get_running_loop()))
            is_ready.set()
            await is_over.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), name="cloudsim")
    thread.start()
    try:
        assert is_ready.wait(DEADLINE)
        yield ready[0]
    finally:
        if ready:
            ready[0]._loop.call_soon_threadsafe(is_over.set)
        thread.join(DEADLINE)
