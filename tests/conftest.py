"""Tests side by side (`make test`): which stay together on one worker, and which run while no other does.

Tests of a file that shares a fixture among them go to one worker, which then makes it once. A test marked `alone`
measures how fast something is, or has a pace of its own that a busy machine upsets: it waits until the others have
ended, and they wait for it. It comes early, so that nobody waits long.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest


def urgency(item: pytest.Item) -> int:
    """Alone while nobody is at something long; then what takes long, for no worker to begin it at the very end."""
    if item.get_closest_marker("alone"):
        return 0
    return 1 if item.get_closest_marker("processes") else 2


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=urgency)  # stable: the rest as it was


@cache
def shares_fixtures(file: Path) -> bool:
    """Whether something is made once for the whole file."""
    return 'scope="module"' in file.read_text()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """By one test or one file, in the order of collection. (The mark xdist_group has no effect with pytest 9.2.)"""
    from xdist.scheduler import LoadScopeScheduling

    class BySharing(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if shares_fixtures(config.rootpath / file) else nodeid

    config.option.loadscopereorder = False
    return BySharing(config, log)


@contextmanager
def turn(directory: Path, *, alone: bool) -> Iterator[None]:
    """Be among others, or alone, as all processes see it that use `directory`. Who waits to be alone lets nobody in."""
    with (directory / "door").open("w") as door, (directory / "room").open("w") as room:
        fcntl.flock(door, fcntl.LOCK_EX)
        fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(door, fcntl.LOCK_UN)
        try:
            yield
        finally:
            fcntl.flock(room, fcntl.LOCK_UN)  # also of a copy that a forked process has


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    if not hasattr(item.config, "workerinput"):
        return (yield)
    whole_run = Path(item.config.getoption("basetemp")).parent  # the workers' directories lie in it
    with turn(whole_run, alone=item.get_closest_marker("alone") is not None):
        return (yield)
