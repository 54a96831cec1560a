"""Run a coroutine of a test under the deadline, and wait for conditions."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from tests.support.deadline import DEADLINE

T = TypeVar("T")


def run(scenario: Coroutine[Any, Any, T]) -> T:
    """asyncio.run(scenario) that fails after DEADLINE seconds."""

    async def bounded() -> T:
        async with asyncio.timeout(DEADLINE):
            return await scenario

    return asyncio.run(bounded())


async def until(condition: Callable[[], object], what: str = "condition") -> None:
    """Wait until `condition()` is true; fails naming `what` after DEADLINE seconds."""
    end = time.monotonic() + DEADLINE
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"waited {DEADLINE} s in vain for {what}")
        await asyncio.sleep(0.005)  # between two looks at the condition


def until_sync(condition: Callable[[], object], what: str = "condition") -> None:
    """The same without a loop."""
    end = time.monotonic() + DEADLINE
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"waited {DEADLINE} s in vain for {what}")
        time.sleep(0.01)  # between two looks at the condition
