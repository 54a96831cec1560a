"""What a node needs around it: configuration, an MQTT broker, ports. For the demo, the kill matrix, the benchmarks."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
from pathlib import Path
from typing import Final

WSS: Final = "wss"
QUIC: Final = "quic"
LINKS: Final = (WSS, QUIC)
"Transports to the cloud."

_EDGECORE: Final = """\
# Written anew at each start. KubeEdge's own format; edgecore.example.yaml explains it.
apiVersion: edgecore.config.kubeedge.io/v1alpha2
kind: EdgeCore
modules:
  edged:
    hostnameOverride: {node}
  edgeHub:
    messageQPS: 0 # no limit; KubeEdge's default of 30 uploads a second would be all that is seen
    tlsCaFile: {certificates}/ca.crt
    tlsCertFile: {certificates}/{node}.crt
    tlsPrivateKeyFile: {certificates}/{node}.key
    websocket:
      enable: {is_wss}
      server: 127.0.0.1:{cloud_port}
    quic:
      enable: {is_quic}
      server: 127.0.0.1:{cloud_port}
  eventBus:
    mqttMode: {mqtt_mode}
    mqttServerExternal: tcp://127.0.0.1:{mqtt_port}
    mqttServerInternal: tcp://127.0.0.1:{mqtt_port}
"""

_MOSQUITTO: Final = """\
listener {port} 127.0.0.1
allow_anonymous true
# What deploy/mosquitto.conf recommends: keep more than 20 messages under way, drop none because a queue is full.
max_inflight_messages 1000
max_queued_messages 0
persistence true
persistence_location {directory}/
"""


def edgecore(
    node: str,
    certificates: Path,
    *,
    cloud_port: int,
    mqtt_port: int,
    link: str = WSS,
    mqtt_mode: int = 2,
    more: str = "",
) -> str:
    """An edgecore.yaml for a node whose cloud and MQTT broker are on this machine. `more`: a section `runtime`."""
    text = _EDGECORE.format(
        node=node,
        certificates=certificates,
        is_wss=str(link == WSS).lower(),
        is_quic=str(link == QUIC).lower(),
        cloud_port=cloud_port,
        mqtt_mode=mqtt_mode,
        mqtt_port=mqtt_port,
    )
    return text + more


def mosquitto_conf(port: int, directory: Path, more: str = "") -> str:
    """A mosquitto.conf for one that keeps its database in `directory`; `more`: further lines."""
    text = _MOSQUITTO.format(port=port, directory=directory) + more
    if os.geteuid() == 0:
        text += "user root\n"  # else it becomes user mosquitto, who may not read this directory
    return text


def find_mosquitto() -> str | None:
    """An installed mosquitto. Debian keeps it in sbin, which is not in everybody's PATH."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin", "/opt/homebrew/sbin"])
    return shutil.which("mosquitto", path=path)


def free_port(*wanted: int) -> int:
    """The first of `wanted` that is free on loopback, else any that is. Raises OSError when none is."""
    for port in (*wanted, 0):
        with socket.socket() as probe, contextlib.suppress(OSError):
            # As servers do, so that a port that was in use a moment ago counts as free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return int(probe.getsockname()[1])
    raise OSError("no free TCP port on 127.0.0.1")


def is_free_udp(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.bind(("127.0.0.1", port))
        return True
    return False


def listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1.0):
        return True
    return False
