from __future__ import annotations

import subprocess
import sys


def test_eventbus_does_not_load_what_it_never_uses() -> None:
    code = (
        "import sys, modules.eventbus.bus\n"
        "print([name for name in ('urllib.request', 'http.client', 'email', 'yaml', 'cryptography', 'amqtt')"
        " if name in sys.modules])\n"
        "import urllib.request\n"
        "assert urllib.request.getproxies"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
