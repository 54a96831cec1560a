"""The configuration of KubeEdge's edge of 2019 (`edge.yaml`, and `modules.yaml` beside it) as an `edgecore.yaml`.

Takes and gives parsed documents. Everything that is not carried over is named, with the reason. Only the CLI imports
it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from runtime.edgecore import API_VERSION, KIND, from_edgecore
from runtime.errors import ConfigError
from runtime.names import ADDRESS_PATTERN

OLD_CLOUD: Final = "2019"
CLOUDS: Final = (OLD_CLOUD, "1.16", "1.17")

_CA_FILE: Final = "/etc/kubeedge/ca/rootCA.crt"
_OLD_SERVER_NAME: Final = "kubeedge.io"
"What the scripts of 2019 made CloudHub's certificate out to."
_HANDSHAKE_SECONDS: Final = 60
"The default of 2019; today's is 30."

_WHY_NOT: Final[tuple[tuple[str, str], ...]] = (
    ("edged.", "edgezmq runs no containers"),
    ("mesh.", "edgezmq has no service mesh"),
    ("edgehub.controller.", "KubeEdge did not use it either"),
    ("", "edgezmq has no such setting"),
)
_MAX_LEVELS: Final = 10
"The deepest keys of 2019 have four."
_MODULE_KEYS: Final = {"eventbus": "eventBus", "websocket": "edgeHub"}


@dataclass(frozen=True, slots=True)
class Imported:
    document: dict[str, Any]
    "An `edgecore.yaml` that passes the check."
    left_out: list[str]
    "`KEY: why` for each key of the old file that is not in it."
    remarks: list[str]
    "What to look at: guesses, and what behaves otherwise."


def convert(document: object, *, cloud: str = OLD_CLOUD) -> Imported:
    """`cloud`: how old the CloudHub is that the node will talk to, one of CLOUDS.

    Raises ConfigError naming the key of the old file (or of the new one, where it comes of no old key).
    """
    if cloud not in CLOUDS:
        raise ConfigError("--cloud", cloud, f"one of {', '.join(CLOUDS)}")
    source = _Source(document)
    remarks: list[str] = []
    edge_hub, node_name = _edge_hub(source, remarks)
    modules: dict[str, Any] = {
        "edged": {"hostnameOverride": node_name},
        "edgeHub": edge_hub,
        "eventBus": _event_bus(source),
    }
    enabled = source.take("modules.enabled")
    if enabled is not None:
        if not isinstance(enabled, list) or not all(isinstance(name, str) for name in enabled):
            raise ConfigError("modules.enabled", enabled, "a list of module names")
        for name, key in _MODULE_KEYS.items():
            if name not in enabled:
                modules[key]["enable"] = False
        others = [name for name in enabled if name not in _MODULE_KEYS]
        if others:
            remarks.append(f"modules that edgezmq does not run: {', '.join(others)}")
    if edge_hub["quic"]["enable"]:
        remarks.append("QUIC is IETF QUIC v1 here, which no CloudHub of KubeEdge's releases speaks: see the README")
    made: dict[str, Any] = {"apiVersion": API_VERSION, "kind": KIND, "modules": modules}
    if runtime := _runtime(cloud, node_name, remarks):
        made["runtime"] = runtime
    try:
        from_edgecore(made)
    except ConfigError as fault:
        raise ConfigError(source.origin(fault.key), fault.value, fault.rule) from fault
    return Imported(made, list(source.left()), remarks)


def _runtime(cloud: str, node_name: object, remarks: list[str]) -> dict[str, Any]:
    """`runtime`: how the cloud is to be spoken to."""
    if cloud == OLD_CLOUD:
        remarks.append(
            "CloudHub's certificate is verified now, and in 2019 it was not: runtime.edgehub.serverName is set to "
            f"{_OLD_SERVER_NAME}, the name in those that the scripts of 2019 made"
        )
        return {
            "edgehub": {"hubVersion": cloud, "serverName": _OLD_SERVER_NAME},
            "eventbus": {"semantics": "2019", "publishConnectionState": True},
        }
    remarks.append(
        f"the node's certificate must be made out to system:node:{node_name}, which those of 2019 are not: "
        "get a new one (edgezmq join)"
    )
    return {} if cloud == "1.17" else {"edgehub": {"hubVersion": cloud}}


def _edge_hub(source: _Source, remarks: list[str]) -> tuple[dict[str, Any], str]:
    """`modules.edgeHub`, and the node's name."""
    protocol = source.take("edgehub.controller.protocol", "websocket")
    if protocol not in ("websocket", "quic"):
        raise ConfigError("edgehub.controller.protocol", protocol, "websocket or quic")
    hub: dict[str, Any] = {"messageQPS": 0}  # 2019 knew no limit
    source.carry("edgehub.controller.heartbeat", hub, "heartbeat", "modules.edgeHub.heartbeat")
    node_name = source.take("edgehub.controller.node-id", origin="modules.edged.hostnameOverride")
    other_name = source.take("edged.hostname-override")
    for key, name in (("edgehub.controller.node-id", node_name), ("edged.hostname-override", other_name)):
        if name is not None and not isinstance(name, str):
            raise ConfigError(key, name, "a name")
    if node_name is None:
        node_name = other_name
    if node_name is None:
        raise ConfigError("edgehub.controller.node-id", None, "the node's name: KubeEdge ended without it")
    if other_name not in (None, node_name):
        remarks.append(f"edged.hostname-override is {other_name!r}; for the cloud the node is {node_name!r} (node-id)")
    source.carry("edgehub.controller.project-id", hub, "projectID", "modules.edgeHub.projectID")
    for name in ("websocket", "quic"):
        section = _transport(source, name, hub, remarks, is_chosen=name == protocol, node_name=node_name)
        hub[name] = {"enable": name == protocol, **section}
    if "tlsCaFile" not in hub:
        hub["tlsCaFile"] = _CA_FILE
        remarks.append(f"tlsCaFile is set to {_CA_FILE}: the websocket of 2019 had no setting for it")
    return hub, node_name


def _transport(
    source: _Source, name: str, hub: dict[str, Any], remarks: list[str], *, is_chosen: bool, node_name: object
) -> dict[str, Any]:
    """`modules.edgeHub.websocket` or `.quic`; files of the chosen one go into `hub`."""
    old, new = f"edgehub.{name}", f"modules.edgeHub.{name}"
    section: dict[str, Any] = {}
    url = source.take(f"{old}.url", origin=f"{new}.server")
    if url is not None:
        section["server"] = _server(f"{old}.url", url, hub, node_name, remarks if is_chosen else [])
    elif is_chosen:
        raise ConfigError(f"{old}.url", None, "the address of CloudHub")
    section["handshakeTimeout"] = source.take(
        f"{old}.handshake-timeout", _HANDSHAKE_SECONDS, origin=f"{new}.handshakeTimeout"
    )
    source.carry(f"{old}.read-deadline", section, "readDeadline", f"{new}.readDeadline")
    source.carry(f"{old}.write-deadline", section, "writeDeadline", f"{new}.writeDeadline")
    for key, target in (("cafile", "tlsCaFile"), ("certfile", "tlsCertFile"), ("keyfile", "tlsPrivateKeyFile")):
        path = source.take(f"{old}.{key}", origin=f"modules.edgeHub.{target}")
        if path is not None and (is_chosen or key == "cafile"):
            hub[target] = path
    return section


def _server(key: str, url: object, hub: Mapping[str, Any], node_name: object, remarks: list[str]) -> str:
    """host:port of `wss://HOST:PORT/PROJECT/NODE/events`, or of QUIC's plain address."""
    rule = "wss://HOST:PORT/PROJECT/NODE/events, or HOST:PORT for quic"
    if not isinstance(url, str):
        raise ConfigError(key, url, rule)
    scheme, separator, rest = url.partition("://")
    address, _, path = rest.partition("/") if separator else (url, "", "")
    if (separator and scheme not in ("wss", "https")) or re.fullmatch(ADDRESS_PATTERN, address) is None:
        raise ConfigError(key, url, rule)
    if address.startswith("0.0.0.0:"):
        remarks.append(f"{key} has the address 0.0.0.0, which is no cloud: put CloudHub's into the new file")
    parts = path.split("/")
    if len(parts) == 3:
        for said, meant in ((parts[0], hub.get("projectID", parts[0])), (parts[1], node_name)):
            if isinstance(meant, str) and said != meant:  # else it is refused anyway
                remarks.append(f"{key} says {said!r} where another key says {meant!r}: the other key is taken")
    return address


def _event_bus(source: _Source) -> dict[str, Any]:
    bus: dict[str, Any] = {}
    for old, new in (
        ("mode", "mqttMode"),
        ("server", "mqttServerExternal"),
        ("internal-server", "mqttServerInternal"),
        ("qos", "mqttQOS"),
        ("retain", "mqttRetain"),
        ("session-queue-size", "mqttSessionQueueSize"),
    ):
        source.carry(f"mqtt.{old}", bus, new, f"modules.eventBus.{new}")
    bus.setdefault("mqttMode", 0)  # of 2019; today's default is 2
    server = bus.get("mqttServerExternal")
    if isinstance(server, str) and "@" in server:
        try:
            parts = urlsplit(server)
            bus["mqttUsername"], bus["mqttPassword"] = unquote(parts.username or ""), unquote(parts.password or "")
        except ValueError:
            raise ConfigError("mqtt.server", "(hidden)", "tcp://[USER:PASSWORD@]HOST:PORT") from None
        bus["mqttServerExternal"] = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    return bus


class _Source:
    """The old file by dotted keys; knows what was taken, and where it went."""

    def __init__(self, document: object) -> None:
        if not isinstance(document, Mapping):
            raise ConfigError("edge.yaml", document, "a mapping of keys to values")
        self._left = dict(_flat(document, ""))
        self._origins: dict[str, str] = {}

    def take(self, key: str, default: Any = None, *, origin: str = "") -> Any:
        """The value of `key`, once; `origin` is the new key it goes to. A key without a value is not there."""
        value = self._left.pop(key, None)
        if value is not None and origin:
            self._origins[origin] = key
        return default if value is None else value

    def carry(self, key: str, section: dict[str, Any], name: str, origin: str) -> None:
        """The value as it is into `section`, if there is one."""
        value = self.take(key, origin=origin)
        if value is not None:
            section[name] = value

    def origin(self, new_key: str) -> str:
        """The old key that a new one comes of, or the new one."""
        return self._origins.get(new_key, new_key)

    def left(self) -> Iterator[str]:
        for key in self._left:
            yield f"{key}: {next(why for prefix, why in _WHY_NOT if key.startswith(prefix))}"


def _flat(document: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    if prefix.count(".") > _MAX_LEVELS:  # in YAML a mapping may be within itself
        raise ConfigError(prefix, document, f"at most {_MAX_LEVELS} levels of keys")
    for key, value in document.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
