"""`python -m runtime.supervise -c CONF …`: supervisord that does not sleep over what happens. It takes its arguments.

supervisord's loop waits up to a second for input of its children; a signal, a child's death among them, is only seen
when that second is over. Here a signal ends the wait (signal.set_wakeup_fd), so a program is started again, and the
next one stopped, at once. Programs of the same priority are stopped together, not one after another.

It listens on a unix socket only, and is nobody's client, so OpenSSL, HTTP's client and with it `email` stay out of its
memory; what its start leaves behind is given back.
"""

from __future__ import annotations

import importlib
import operator
import os
import select
import signal
from typing import Any

from runtime import memory
from runtime.lean import COMPRESSION, TLS, TYPING, absent, without


class EntryPoint:
    """All that supervisord needs of `importlib.metadata`: to load `module:name`, what makes an RPC interface."""

    def __init__(self, name: None, value: str, group: None) -> None:
        self._module, _, self._name = value.partition(":")

    def load(self) -> Any:
        return operator.attrgetter(self._name)(importlib.import_module(self._module))


with (
    without(*TLS, *TYPING, *COMPRESSION, "gettext"),
    absent("http.client", HTTPConnection=object),  # the base of supervisorctl's connection
    absent("html.entities", html5={}),  # for pages of HTML, of which nobody sees any
    absent("importlib.metadata", EntryPoint=EntryPoint),
    absent("importlib.resources", files=None),  # to find its sample configuration
):
    from supervisor import poller, supervisord


class WakingPoller(poller.PollPoller):  # type: ignore[misc]  # supervisor has no types
    """Waits until something can be read or written, or a signal came."""

    def initialize(self) -> None:
        super().initialize()
        self._wake_read = self._wake_write = -1
        self._looks_again = True

    def poll(self, timeout: float) -> tuple[list[int], list[int]]:
        """Descriptors to read and to write. A wait that a signal ended is followed by none at all.

        For supervisord looks at its programs' states before it takes in who has died, so only the turn after that
        acts on it. Nor does it wait before its first turn, in which it starts the programs.
        """
        if self._wake_read < 0:  # here, for after a reload supervisord first closes what is open
            self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
            signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
            self.register_readable(self._wake_read)
        timeout = 0.0 if self._looks_again else timeout
        readable, writable = super().poll(timeout)
        self._looks_again = self._wake_read in readable
        if self._looks_again:
            readable.remove(self._wake_read)
            os.read(self._wake_read, select.PIPE_BUF)
        return readable, writable

    def close(self) -> None:
        if self._wake_read >= 0:
            signal.set_wakeup_fd(-1)
            os.close(self._wake_read)
            os.close(self._wake_write)
            self._wake_read = self._wake_write = -1


class PromptSupervisor(supervisord.Supervisor):  # type: ignore[misc]
    """Stops all programs of one priority at the same time, the highest first."""

    stop_groups: list[Any] | None

    def ordered_stop_groups_phase_1(self) -> None:
        for group in self._last_groups():
            group.stop_all()

    def ordered_stop_groups_phase_2(self) -> None:
        # By identity: supervisord's groups are equal when their priorities are.
        stopped = {id(group) for group in self._last_groups() if not group.get_unstopped_processes()}
        self.stop_groups = [group for group in self.stop_groups or () if id(group) not in stopped]

    def _last_groups(self) -> list[Any]:
        if not self.stop_groups:
            return []
        priority = self.stop_groups[-1].config.priority
        return [group for group in self.stop_groups if group.config.priority == priority]


def main() -> None:
    """Become supervisord."""
    poller.Poller = WakingPoller
    supervisord.Supervisor = PromptSupervisor
    memory.settle()
    supervisord.main()


if __name__ == "__main__":
    main()
