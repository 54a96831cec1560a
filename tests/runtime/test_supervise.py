"""Our supervisord: woken by signals, and prompt when it stops what it runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from runtime.supervise import PromptSupervisor, WakingPoller
from tests.support.deadline import DEADLINE


@pytest.fixture
def poller() -> Iterator[WakingPoller]:
    before = signal.signal(signal.SIGCHLD, lambda *_: None)
    poller = WakingPoller(None)
    poller.poll(DEADLINE)  # the first one never waits
    yield poller
    poller.close()
    signal.signal(signal.SIGCHLD, before)


def test_the_first_turn_does_not_wait() -> None:
    poller = WakingPoller(None)
    begun = time.monotonic()
    assert poller.poll(DEADLINE) == ([], [])
    assert time.monotonic() - begun < DEADLINE / 2
    poller.close()


def test_the_death_of_a_child_ends_the_wait_and_the_next_one(poller: WakingPoller) -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    begun = time.monotonic()
    assert poller.poll(DEADLINE) == ([], [])
    assert poller.poll(DEADLINE) == ([], []), "supervisord acts on a death in the turn after it took it in"
    assert time.monotonic() - begun < DEADLINE / 2
    child.wait()


def test_without_a_signal_it_waits_as_long_as_it_was_told(poller: WakingPoller) -> None:
    begun = time.monotonic()
    assert poller.poll(0.05) == ([], [])
    assert time.monotonic() - begun >= 0.05


def test_what_can_be_read_is_told_and_the_signal_is_not(poller: WakingPoller) -> None:
    read, write = os.pipe()
    poller.register_readable(read)
    os.write(write, b"x")
    os.kill(os.getpid(), signal.SIGCHLD)
    assert poller.poll(DEADLINE) == ([read], [])
    os.close(read)
    os.close(write)


def test_after_a_close_it_can_be_used_again(poller: WakingPoller) -> None:
    poller.close()
    again = WakingPoller(None)
    again.poll(DEADLINE)
    os.kill(os.getpid(), signal.SIGCHLD)
    assert again.poll(DEADLINE) == ([], [])
    again.close()


class Group:
    """Stands for supervisord's ProcessGroup, whose equality is that of priorities."""

    def __init__(self, name: str, priority: int) -> None:
        self.name = name
        self.config = SimpleNamespace(priority=priority)
        self.was_asked = False
        self.has_stopped = False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Group) and other.config.priority == self.config.priority

    def __hash__(self) -> int:
        return hash(self.config.priority)

    def stop_all(self) -> None:
        self.was_asked = True

    def get_unstopped_processes(self) -> list[Any]:
        return [] if self.has_stopped else [self]


def test_programs_of_one_priority_are_stopped_together_and_the_broker_last() -> None:
    broker, edgehub, one, two = groups = [Group("broker", 1), Group("edgehub", 3), Group("one", 9), Group("two", 9)]
    supervisor = PromptSupervisor(None)
    supervisor.stop_groups = list(groups)

    def turn() -> list[str]:
        supervisor.ordered_stop_groups_phase_1()
        supervisor.ordered_stop_groups_phase_2()
        return [group.name for group in groups if group.was_asked]

    assert turn() == ["one", "two"]
    one.has_stopped = True
    assert turn() == ["one", "two"], "edgehub stays while one that may talk to it drains"
    two.has_stopped = True
    turn()
    assert turn() == ["edgehub", "one", "two"]
    edgehub.has_stopped = True
    turn()
    assert turn() == ["broker", "edgehub", "one", "two"]
    broker.has_stopped = True
    turn()
    assert turn() == ["broker", "edgehub", "one", "two"]
    assert supervisor.stop_groups == []
