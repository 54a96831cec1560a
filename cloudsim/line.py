"""What a fault of the line does to a connection, whatever it is made of: the state that both transports look at."""

from __future__ import annotations

import abc
import asyncio
from typing import Any, Generic, TypeVar

from cloudsim.faults import Fault
from cloudsim.impairment import DatagramPipe, Pipe

P = TypeVar("P", bound=Pipe | DatagramPipe[Any])


class Line(abc.ABC, Generic[P]):
    """Suffers the faults of `shell.Wire.afflict`, in both directions alike."""

    def __init__(self, upward: P, downward: P) -> None:
        self._ignored = False
        self._stalled = False
        self._half_open = False
        self._cut_next = False
        self._answer_delay = 0.0
        "Seconds that an answer to the node's signs of life waits."
        self._upward = upward
        self._downward = downward

    def afflict(self, fault: Fault) -> None:
        seconds = fault.seconds
        match fault.fault:
            case "stall":
                self._stalled = True
                self._heal_later(seconds)
            case "half-open":
                self._half_open = True
                self._heal_later(seconds)
            case "throttle":
                self._upward.bytes_per_second = self._downward.bytes_per_second = fault.bytes_per_second
            case "delay":
                self._upward.latency_seconds = self._downward.latency_seconds = (seconds or 0.0) / 2
            case "loss":
                self._lose(fault.rate or 0.0)
            case "slow-pong":
                self._answer_delay = seconds or 0.0
            case "close-mid-frame":
                self._cut_next = True
            case "clear":
                self._heal()
            case _:
                pass  # not a fault of the line

    def _lose(self, rate: float) -> None:
        """Lose this share of what is sent; a stream loses nothing."""

    def _heal_later(self, seconds: float | None) -> None:
        if seconds is not None:
            asyncio.get_running_loop().call_later(seconds, self._heal)

    @abc.abstractmethod
    def _heal(self) -> None:
        """The faults are over."""

    def _clear_faults(self, now: float) -> None:
        self._stalled = self._half_open = self._cut_next = False
        self._answer_delay = 0.0
        self._upward.clear_rules(now)
        self._downward.clear_rules(now)
