"""Tests side by side (`make test`): which stay together on one worker, and which run while no other does.

Tests of a file that shares a fixture among them go to one worker, which then makes it once. A test marked `alone`
measures how fast something is, or has a pace of its own that a busy machine upsets: it waits until the others have
ended, and they wait for it. It comes early, so that nobody waits long.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def shares_fixtures(item: pytest.Item) -> bool:
    """Whether something it uses is made once for its file."""
    info = getattr(item, "_fixtureinfo", None)
    found = info.name2fixturedefs.values() if info is not None else ()
    return any(
        definition.scope in ("module", "class") and definition.baseid
        for definitions in found
        for definition in definitions
    )


@pytest.hookimpl(tryfirst=True)  # xdist reads the marks in its own
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("alone"):
            item.add_marker(pytest.mark.xdist_group("alone"))
        elif not item.get_closest_marker("xdist_group") and shares_fixtures(item):
            item.add_marker(pytest.mark.xdist_group(item.location[0]))
    items.sort(key=lambda item: not item.get_closest_marker("alone"))  # stable: the rest as it was


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
