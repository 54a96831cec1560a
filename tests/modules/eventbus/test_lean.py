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


def test_paho_without_ssl_still_reads_more_than_one_packet() -> None:
    code = """
from runtime.lean import TLS, without
with without(*TLS):
    from modules.eventbus import mqtt

class Socket:
    def recv(self, size):
        raise BlockingIOError
    send = recv

client = mqtt.paho.Client(mqtt.CallbackAPIVersion.VERSION2)
client._sock = Socket()
for call in (lambda: client._sock_recv(1), lambda: client._sock_send(b"x")):
    try:
        call()
    except BlockingIOError:
        print("would block")
client._sock = None
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "would block\n" * 2, done.stderr
