"""How a process ends, so that supervisord draws the right conclusion from its exit status.

supervisord.conf says `autorestart=unexpected` and `exitcodes=0`: status 0 means "I have nothing to do here" and the
program stays down. Whoever ends for another reason has another status.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping
from typing import Final, NoReturn

from runtime.locks import SUPERVISOR_PID_VARIABLE

TERMINATED: Final = 128 + signal.SIGTERM

_SETTLE_SECONDS: Final = 1.5
"Above `startsecs` of supervisord.conf: who ends sooner counts as failed, whatever its status, and is started again."


def exit_disabled(environ: Mapping[str, str] = os.environ) -> NoReturn:
    """Exit with status 0; under our supervisord only after it has counted the start as a success."""
    if environ.get(SUPERVISOR_PID_VARIABLE):
        time.sleep(_SETTLE_SECONDS)
    sys.exit(0)


def stopped_status(environ: Mapping[str, str] = os.environ) -> int:
    """The status of a process that was asked to end and did: 0 in a shell, 143 under our supervisord.

    supervisord does not look at it when it was supervisord that asked; when somebody else sent the SIGTERM, the
    program is to come back.
    """
    return TERMINATED if environ.get(SUPERVISOR_PID_VARIABLE) else 0
