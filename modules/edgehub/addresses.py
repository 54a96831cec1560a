"""Tells when the addresses or routes of this machine change, from the kernel (rtnetlink(7))."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import Final

log = logging.getLogger("modules.edgehub")

_SETTLE_SECONDS: Final = 0.2
"Several changes come together: one call for them."
_GROUPS: Final = 0x10 | 0x40 | 0x100 | 0x400  # RTMGRP_IPV4_IFADDR, IPV4_ROUTE, IPV6_IFADDR, IPV6_ROUTE
_NOTE_BYTES: Final = 65_536


class AddressWatch:
    """Calls `changed` a little after each change, until `stop`.

    Costs nothing while nothing changes. Where the kernel gives no such socket it never calls.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, changed: Callable[[], None]) -> None:
        self._loop = loop
        self._changed = changed
        self._timer: asyncio.TimerHandle | None = None
        self._socket: socket.socket | None = None
        try:
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
            self._socket.setblocking(False)
            self._socket.bind((0, _GROUPS))
        except OSError as fault:
            log.debug("changes of addresses are not told: %s", fault)
            self.stop()
            return
        loop.add_reader(self._socket, self._read)

    def _read(self) -> None:
        assert self._socket is not None
        try:
            while self._socket.recv(_NOTE_BYTES):
                pass
        except OSError:
            pass  # nothing more; or ENOBUFS, too many to be told one by one
        if self._timer is None:
            self._timer = self._loop.call_later(_SETTLE_SECONDS, self._settled)

    def _settled(self) -> None:
        self._timer = None
        self._changed()

    def stop(self) -> None:
        """Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._socket is not None:
            self._loop.remove_reader(self._socket)
            self._socket.close()
            self._socket = None
