"""Import a library without a part of it that is never used and costs memory in every process."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def absent(name: str) -> Iterator[None]:
    """Inside, an import of `name` gives an empty module. One that is loaded already stays, and a later import of it
    outside is the real one."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = types.ModuleType(name)
    try:
        yield
    finally:
        del sys.modules[name]
