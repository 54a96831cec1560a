"""How a process ends that configuration disables: with status 0, and so that supervisord leaves it down."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from typing import Final, NoReturn

from runtime.locks import SUPERVISOR_PID_VARIABLE

_SETTLE_SECONDS: Final = 1.5
"Above `startsecs` of supervisord.conf: who ends sooner counts as failed, whatever its status, and is started again."


def exit_disabled(environ: Mapping[str, str] = os.environ) -> NoReturn:
    """Exit with status 0; under our supervisord only after it has counted the start as a success."""
    if environ.get(SUPERVISOR_PID_VARIABLE):
        time.sleep(_SETTLE_SECONDS)
    sys.exit(0)
