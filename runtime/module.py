"""A module as its author writes it, and the process around it.

    class Thermostat(Module):
        name, groups = "thermostat", {"twin"}

        async def handle(self, message: Message) -> None:
            await self.bus.send(Group("hub"), Message.upload("default/thermostat/1", message.json()))

    run(Thermostat)

Runs under supervisord or alone from a shell; the bus is found by EDGEZMQ_BUS or EDGEZMQ_HOME.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import logging
import signal
import sys
from collections.abc import Set as AbstractSet
from typing import ClassVar, Final, NoReturn

from runtime import locks, logs, memory
from runtime.client import Bus, close_context
from runtime.config import NodeConfig, load
from runtime.errors import ConfigError, EdgezmqError, Fenced, HelloRefused, NameTaken
from runtime.exits import stopped_status
from runtime.home import Home, find_home
from runtime.message import Message
from runtime.names import check_name

log = logging.getLogger("runtime.module")

EXIT_ERROR: Final = 1
EXIT_CONFIG: Final = 2
"A setting, a lock or a refusal by the broker: starting again changes nothing by itself."
EXIT_FENCED: Final = 3
"A newer process of this name has taken over."


class Module:
    """Base of a module. Override `handle`, and what else is wanted."""

    name: ClassVar[str]
    "Its name on the bus: 1 to 64 of A-Z a-z 0-9 . _ -."
    groups: ClassVar[AbstractSet[str]] = frozenset()
    "Groups whose messages it gets."
    handler_timeout: ClassVar[float | None] = 60.0
    "Seconds one `handle` may take; then it is cancelled, which counts as raising. None: no limit."
    liveness: ClassVar[float] = 15.0
    "Seconds of silence (a handler that blocks) after which the broker takes the process for hung."
    prefetch_messages: ClassVar[int] = 2048
    prefetch_bytes: ClassVar[int] = 8 * 2**20
    drain_timeout: ClassVar[float] = 8.0
    "Seconds that SIGTERM leaves for what is in hand; below supervisord's stopwaitsecs."

    bus: Bus
    "There from before `start` on."
    tasks: asyncio.TaskGroup
    "For the module's own tasks; they are cancelled after `stop`. One that raises ends the process."
    node: NodeConfig
    home: Home

    async def start(self) -> None:
        """Before the first message is handled. The bus may not be attached yet: sends wait."""

    async def handle(self, message: Message) -> None:
        """Handle one message: return to acknowledge, raise to have it tried again and then refused.

        `message.defer()` takes the acknowledgement over; `raise Refused(reason)` refuses at once.
        """
        raise NotImplementedError(f"{type(self).__name__} gets messages and has no handle()")

    async def stop(self) -> None:
        """While draining: nothing new arrives, replies and settlements still do. At most `drain_timeout`."""

    def counters(self) -> dict[str, int]:
        """The module's own numbers, for status and metrics; asked with every PING."""
        return {}


def run(module: type[Module] | Module) -> NoReturn:
    """Run the module until SIGTERM or SIGINT, then drain and exit.

    Exit status: 0 stopped (143 under supervisord: runtime.exits), 1 the module failed (its traceback is in the log),
    2 a setting or the broker says no, 3 a newer process of this name has taken over.
    """
    sys.exit(serve(module))


def serve(module: type[Module] | Module) -> int:
    """`run` that returns the exit status."""
    locks.die_with_parent()
    # SIGABRT, which the watchdog sends to a process that hangs, leaves a traceback of every thread in the log.
    faulthandler.enable()
    name = getattr(module, "name", "")
    try:
        check_name(name)
        home = find_home()
        home.prepare()
        node = load()
        logs.setup(name, node.runtime.log.level)
        with locks.hold(home.lock(name)):
            return _serve(module() if isinstance(module, type) else module, node, home)
    except ConfigError as fault:
        print(f"{name}: {fault}", file=sys.stderr)  # noqa: T201  (logging may not be set up)
        return EXIT_CONFIG
    except EdgezmqError as fault:
        print(f"{name or module!r}: {fault}", file=sys.stderr)  # noqa: T201
        return EXIT_CONFIG


def _serve(module: Module, node: NodeConfig, home: Home) -> int:
    module.node = node
    module.home = home
    status = stopped_status()
    try:
        asyncio.run(_main(module, node.endpoint(home)))
    except* Fenced as fenced:
        log.error("%s", fenced.exceptions[0])
        status = EXIT_FENCED
    except* (NameTaken, HelloRefused, ConfigError) as refused:
        log.error("%s", refused.exceptions[0])
        status = EXIT_CONFIG
    except* Exception as faults:
        # The edge of the process: what nobody expected is logged, and supervisord starts a fresh one.
        log.error("module failed", exc_info=faults)
        status = EXIT_ERROR
    close_context()
    return status


async def _main(module: Module, endpoint: str) -> None:
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    module.bus = bus = Bus(
        module.name,
        handler=module.handle,
        groups=module.groups,
        endpoint=endpoint,
        liveness=module.liveness,
        handler_timeout=module.handler_timeout,
        prefetch_messages=module.prefetch_messages,
        prefetch_bytes=module.prefetch_bytes,
        counters=module.counters,
    )
    try:
        async with asyncio.TaskGroup() as tasks:
            module.tasks = asyncio.TaskGroup()
            inner = tasks.create_task(_live(module, bus, stopping), name=f"{module.name} life")
            watch = tasks.create_task(bus.wait_ended(), name="bus")
            await asyncio.wait({inner, watch}, return_when=asyncio.FIRST_COMPLETED)
            if inner.done():
                watch.cancel()
    finally:
        await bus.aclose(leaving=False)


async def _live(module: Module, bus: Bus, stopping: asyncio.Event) -> None:
    async with contextlib.AsyncExitStack() as stack:
        own = await stack.enter_async_context(module.tasks)
        if not await _has_started(module, stopping):
            _cancel(own)
            return
        bus.open()
        memory.settle()
        await stopping.wait()
        log.info("draining name=%s seconds=%s", module.name, module.drain_timeout)
        loop = asyncio.get_running_loop()
        end = loop.time() + module.drain_timeout
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(end):
                drain = asyncio.ensure_future(bus.drain(module.drain_timeout))
                try:
                    await module.stop()
                    await drain
                finally:
                    drain.cancel()
        _cancel(own)


async def _has_started(module: Module, stopping: asyncio.Event) -> bool:
    """Start it; False when the end was asked for meanwhile. Raises what `start` raises."""
    start, stop = asyncio.ensure_future(module.start()), asyncio.ensure_future(stopping.wait())
    try:
        await asyncio.wait({start, stop}, return_when=asyncio.FIRST_COMPLETED)
        if start.done():
            await start
        return start.done()
    finally:
        start.cancel()
        stop.cancel()


def _cancel(group: asyncio.TaskGroup) -> None:
    """End the module's own tasks; a TaskGroup has no public way to."""
    for task in list(group._tasks):
        task.cancel()
