"""What eventbus is told: KubeEdge's section `modules.eventBus`, and ours under `runtime.eventbus`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from modules.eventbus.topics import Semantics
from runtime.errors import ConfigError

if TYPE_CHECKING:
    from runtime.config import NodeConfig

SECTION: Final = "modules.eventBus"
OWN_SECTION: Final = "runtime.eventbus"

INTERNAL: Final = "internal"
EXTERNAL: Final = "external"

MODE_INTERNAL: Final = 0
MODE_BOTH: Final = 1
MODE_EXTERNAL: Final = 2

_PLAIN_SCHEMES: Final = ("tcp", "mqtt")
_TLS_SCHEMES: Final = ("ssl", "tls", "mqtts")
_DEFAULT_PORT: Final = 1883
_DEFAULT_TLS_PORT: Final = 8883

CLIENT_ID_PREFIX: Final = "hub-client-sub-"
"KubeEdge's prefix, so that access rules of a broker written for it hold here; then the node's name."


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files for the broker's connection. The server's certificate and name are always verified."""

    ca: str = ""
    "Trusted CA; empty: the system's."
    cert: str = ""
    "Client certificate; empty: none is shown."
    key: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """One MQTT broker and how to reach it."""

    name: str
    "`external` or `internal`, in logs and counters."
    host: str
    port: int
    tls: TlsFiles | None = None
    username: str = ""
    password: str = ""
    protocol: str = "auto"

    def __repr__(self) -> str:
        return f"Server({self.name}, {self.host}:{self.port}{', tls' if self.tls else ''})"


@dataclass(frozen=True, slots=True, kw_only=True)
class EventBusConfig:
    """Everything eventbus needs, checked. Build it with `from_node` or by hand in tests."""

    node_name: str = "edge-node"
    enable: bool = True
    mode: int = MODE_EXTERNAL
    "0 built-in broker, 1 built-in and external, 2 external (KubeEdge's mqttMode)."
    server_external: str = "tcp://127.0.0.1:1883"
    server_internal: str = "tcp://127.0.0.1:1884"
    session_queue_size: int = 100
    "Taken for KubeEdge's sake; the built-in broker has no such limit."
    client_id: str = ""
    "Empty: made of the node's name, and so the same after every start: the broker keeps the session under it."
    username: str = ""
    password: str = ""
    tls: TlsFiles | None = None
    semantics: Semantics = Semantics.HEAD
    protocol: str = "auto"
    "`auto`: MQTT 5, and 3.1.1 for a broker that does not know it; or `5`, or `3.1.1`."
    receive_window: int = 1024
    "Messages in hand, received and not yet settled. MQTT 5 tells it to the broker as Receive Maximum."
    publish_window: int = 256
    "Publishes under way, not yet acknowledged by the broker; never more than the broker allows."
    keepalive_seconds: int = 30
    session_expiry_seconds: int = 0xFFFFFFFF
    "How long the broker keeps our session while we are away (MQTT 5). The default is the protocol's `never`."
    reconnect_max_seconds: float = 30.0
    publish_connection_state: bool = False
    "Publish cloud_connected / cloud_disconnected to the topic node/connection, as KubeEdge of 2019 did."
    broker_python: str = ""
    "Interpreter of the virtual environment with amqtt; empty: found beside ours (modules.eventbus.broker)."

    def __post_init__(self) -> None:
        _check(self.mode in (MODE_INTERNAL, MODE_BOTH, MODE_EXTERNAL), "mqttMode", self.mode, "0, 1 or 2")
        _check(self.protocol in ("auto", "5", "3.1.1"), "protocol", self.protocol, "auto, 5 or 3.1.1", OWN_SECTION)
        for key, value, low, high in (
            ("receiveWindow", self.receive_window, 1, 65535),
            ("publishWindow", self.publish_window, 1, 65535),
            ("keepaliveSeconds", self.keepalive_seconds, 5, 65535),
            ("sessionExpirySeconds", self.session_expiry_seconds, 0, 0xFFFFFFFF),
            ("reconnectMaxSeconds", self.reconnect_max_seconds, 1, 3600),
        ):
            _check(low <= value <= high, key, value, f"a number from {low} to {high}", OWN_SECTION)
        self.servers()  # raises for a bad address

    @property
    def wants_internal(self) -> bool:
        return self.mode <= MODE_BOTH

    @property
    def session_client_id(self) -> str:
        return self.client_id or CLIENT_ID_PREFIX + self.node_name

    def servers(self) -> tuple[Server, ...]:
        """The brokers to connect to, the external one first as in KubeEdge."""
        servers = []
        if self.mode >= MODE_BOTH:
            servers.append(self._external())
        if self.wants_internal:
            host, port, secure = parse_server("mqttServerInternal", self.server_internal)
            _check(not secure, "mqttServerInternal", self.server_internal, "tcp://HOST:PORT: the broker has no TLS")
            # amqtt speaks 3.1.1 alone, and leaves a client that dials with 5 without an answer.
            protocol = "3.1.1" if self.protocol == "auto" else self.protocol
            servers.append(Server(name=INTERNAL, host=host, port=port, protocol=protocol))
        return tuple(servers)

    def _external(self) -> Server:
        host, port, secure = parse_server("mqttServerExternal", self.server_external)
        tls = self.tls
        if tls is not None and not secure:
            # Going on in clear where TLS was asked for would be the worst answer.
            _check(False, "mqttServerExternal", self.server_external, "ssl://HOST:PORT while eventBusTLS.enable is on")
        if secure and tls is None:
            tls = TlsFiles()
        return Server(
            name=EXTERNAL,
            host=host,
            port=port,
            tls=tls,
            username=self.username,
            password=self.password,
            protocol=self.protocol,
        )


def _check(holds: bool, key: str, value: object, rule: str, section: str = SECTION) -> None:
    if not holds:
        raise ConfigError(f"{section}.{key}", value, rule)


def parse_server(key: str, url: str) -> tuple[str, int, bool]:
    """Host, port and whether TLS is wanted, out of an address such as `tcp://127.0.0.1:1883`; or ConfigError."""
    rule = "tcp://HOST[:PORT] or ssl://HOST[:PORT]"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as fault:
        raise ConfigError(f"{SECTION}.{key}", url, rule) from fault
    secure = parts.scheme in _TLS_SCHEMES
    known = secure or parts.scheme in _PLAIN_SCHEMES
    _check(known and bool(parts.hostname) and parts.path in ("", "/") and not parts.query and port != 0, key, url, rule)
    _check(parts.username is None, key, _without_password(url), "no user in the address: use mqttUsername")
    assert parts.hostname is not None
    return parts.hostname, port or (_DEFAULT_TLS_PORT if secure else _DEFAULT_PORT), secure


def _without_password(url: str) -> str:
    scheme, _, rest = url.partition("://")
    return f"{scheme}://***@{rest.rpartition('@')[2]}"


def from_node(node: NodeConfig) -> EventBusConfig:
    """The part of the node's configuration that is eventbus's; raises ConfigError."""
    section, own = node.event_bus, node.runtime.eventbus
    tls = section.event_bus_tls
    try:
        semantics = Semantics(own.semantics)
    except ValueError as fault:
        raise ConfigError(f"{OWN_SECTION}.semantics", own.semantics, "head or 2019") from fault
    return EventBusConfig(
        node_name=node.node_name,
        enable=section.enable,
        mode=section.mqtt_mode,
        server_external=section.mqtt_server_external,
        server_internal=section.mqtt_server_internal,
        session_queue_size=section.mqtt_session_queue_size,
        client_id=section.mqtt_sub_client_id,
        username=section.mqtt_username,
        password=section.mqtt_password,
        tls=TlsFiles(tls.tls_mqtt_ca_file, tls.tls_mqtt_cert_file, tls.tls_mqtt_private_key_file)
        if tls.enable
        else None,
        semantics=semantics,
        protocol=own.protocol,
        receive_window=own.receive_window,
        publish_window=own.publish_window,
        keepalive_seconds=own.keepalive_seconds,
        session_expiry_seconds=own.session_expiry_seconds,
        reconnect_max_seconds=own.reconnect_max_seconds,
        publish_connection_state=own.publish_connection_state,
        broker_python=own.broker_python,
    )
