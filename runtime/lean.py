"""Imports without what a process of ours does not need, for memory.

Several libraries import others only if they are there, and do without them otherwise: msgspec and pyzmq
typing_extensions (which brings inspect, ast and tokenize along), asyncio and http.client ssl, hashlib OpenSSL's
hashes. Where a process needs none of it, they are hidden while such a library is imported.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

TYPING: Final = ("typing_extensions",)
"About 1 MiB in a process."
TLS: Final = ("ssl", "_ssl", "_hashlib")
"About 2.5 MiB: OpenSSL. asyncio imported without it cannot do TLS for the life of the process."
COMPRESSION: Final = ("gzip", "zlib", "bz2", "lzma")
"shutil and xmlrpc.client can do without."


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


class _StandIn(types.ModuleType):
    """In place of a module that nobody is likely to use; who asks for what it has not, gets it of the real one."""

    def __getattr__(self, name: str) -> object:
        if sys.modules.get(self.__name__) is self or name.startswith("__"):
            raise AttributeError(f"{self.__name__} is not loaded, so it has no {name}")
        return getattr(importlib.import_module(self.__name__), name)


@contextmanager
def absent(name: str, **names: object) -> Iterator[None]:
    """`import name` gives a module with nothing but `names` meanwhile, for a library that rarely uses that part.

    The rest is loaded when it is used after all, but for what is used while importing. One that is loaded already
    stays, and a later import outside is the real one.
    """
    if name in sys.modules:
        yield
        return
    module = sys.modules[name] = _StandIn(name)
    vars(module).update(names)
    try:
        yield
    finally:
        if sys.modules.get(name) is module:
            del sys.modules[name]


@contextmanager
def small_libraries() -> Iterator[None]:
    """For importing msgspec and pyzmq: without typing_extensions, and pickle (0.3 MiB) only once somebody pickles."""
    with without(*TYPING), absent("pickle", DEFAULT_PROTOCOL=4):
        yield
