"""runtime.exits: what supervisord is to think of an end."""

import os
import subprocess
import sys
import time

from runtime.exits import stopped_status


def test_a_stop_is_0_in_a_shell_and_unexpected_under_supervisord() -> None:
    assert stopped_status({}) == 0
    assert stopped_status({"EDGEZMQ_SUPERVISOR_PID": "1"}) == 143


def test_a_disabled_process_ends_with_0_and_under_supervisord_after_it_counts_as_started() -> None:
    code = "from runtime.exits import exit_disabled; exit_disabled()"
    environ = {key: value for key, value in os.environ.items() if key != "EDGEZMQ_SUPERVISOR_PID"}
    for more, at_least in (({}, 0.0), ({"EDGEZMQ_SUPERVISOR_PID": "1"}, 1.0)):
        started = time.monotonic()
        done = subprocess.run([sys.executable, "-c", code], check=False, env={**environ, **more}, timeout=60)
        assert done.returncode == 0
        assert time.monotonic() - started >= at_least
