"""Logging of one process: a line per event on stderr, where supervisord collects and rotates it.

2026-08-01T12:00:00.123Z INFO modules.edgehub link lost reason=eof next_try_seconds=1.5
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Mapping
from typing import Final

LEVEL_VARIABLE: Final = "EDGEZMQ_LOG"
LEVELS: Final = ("debug", "info", "warning", "error")


class _LineFormatter(logging.Formatter):
    """Time in UTC with milliseconds; further lines (tracebacks) are indented, so that one event stays one block."""

    converter = staticmethod(time.gmtime)
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).replace("\n", "\n    ")


class _DiskMayBeFull(logging.StreamHandler[object]):  # type: ignore[type-var]  # any text stream will do
    """Drops a line that cannot be written (disk full, closed pipe): a log never ends the process that writes it."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def setup(name: str, level: str = "") -> None:
    """Send this process's log to stderr, and show `name` in ps and top. A later call replaces the first.

    `level` is what configuration says; EDGEZMQ_LOG wins over it. Default: info. An unknown level is
    named in the log and taken as info.
    """
    _show_name(name)
    chosen, known = choose_level(level)
    handler = _DiskMayBeFull(sys.stderr)
    handler.setFormatter(_LineFormatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(chosen)
    # The libraries' own inner life belongs to debugging only.
    for library in ("websockets", "asyncio", "quic", "paho"):
        logging.getLogger(library).setLevel(max(chosen, logging.WARNING) if chosen > logging.DEBUG else chosen)
    # A dropped line must not print a traceback of its own to the same full disk.
    logging.raiseExceptions = __debug__
    if not known:
        logging.getLogger("runtime.logs").warning(
            "unknown log level %r, expected one of %s: using info",
            os.environ.get(LEVEL_VARIABLE) or level,
            ", ".join(LEVELS),
        )


def choose_level(configured: str, environ: Mapping[str, str] = os.environ) -> tuple[int, bool]:
    """The level as a number, and whether its name was known."""
    name = (environ.get(LEVEL_VARIABLE) or configured or "info").strip().lower()
    if name not in LEVELS:
        return logging.INFO, False
    return logging.getLevelNamesMapping()[name.upper()], True


def _show_name(name: str) -> None:
    # proc(5): a process may rename itself by writing here; 15 bytes are kept.
    with contextlib.suppress(OSError), open("/proc/self/comm", "w") as comm:
        comm.write(name[:15])
