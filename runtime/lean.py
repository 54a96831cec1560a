"""Imports without what a process of ours does not need, for memory.

Several libraries import others only if they are there, and do without them otherwise: msgspec and pyzmq
typing_extensions (which brings inspect, ast and tokenize along), asyncio and http.client ssl, hashlib OpenSSL's
hashes. Where a process needs none of it, they are hidden while such a library is imported.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

TYPING: Final = ("typing_extensions",)
"About 1 MiB in a process."
TLS: Final = ("ssl", "_ssl", "_hashlib")
"About 2.5 MiB: OpenSSL. asyncio imported without it cannot do TLS for the life of the process."


@contextmanager
def without(*names: str) -> Iterator[None]:
    """`import` raises ImportError for `names` meanwhile, unless they are imported already."""
    hidden = [name for name in names if name not in sys.modules]
    modules: dict[str, object] = sys.modules  # type: ignore[assignment]  # None hides a module (importlib's rule)
    for name in hidden:
        modules[name] = None
    try:
        yield
    finally:
        for name in hidden:
            if name in modules and modules[name] is None:
                del modules[name]


@contextmanager
def absent(name: str) -> Iterator[None]:
    """`import name` gives an empty module meanwhile, for a library that imports a part it then never uses.

    One that is loaded already stays, and a later import outside is the real one.
    """
    if name in sys.modules:
        yield
        return
    sys.modules[name] = types.ModuleType(name)
    try:
        yield
    finally:
        del sys.modules[name]
