"""The node's configuration: KubeEdge's `edgecore.yaml` (v1alpha2) plus our section `runtime:`, as checked values.

The CLI reads the YAML, `runtime.edgecore` checks it, and `store` writes it to `run/node.json`, where every
process `load`s it. No process but the CLI needs a YAML library, and a wrong key stops the node before
anything is started. Keys and defaults are those of KubeEdge (docs/configuration.md says where not).
"""

from __future__ import annotations

import runtime.libraries  # noqa: F401  (first: see there)

# isort: split

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
from msgspec import Meta, field

from runtime.emp import MAX_BATCH_MESSAGES, MAX_MESSAGE_BYTES
from runtime.errors import ConfigError
from runtime.home import Home, bus_endpoint, find_home
from runtime.names import NAME_PATTERN

if TYPE_CHECKING:
    from runtime.proxy import Proxy

_CA_FILE = "/etc/kubeedge/ca/rootCA.crt"
_CERT_FILE = "/etc/kubeedge/certs/server.crt"
_KEY_FILE = "/etc/kubeedge/certs/server.key"

CURVE_KEY_PATTERN = r"^[0-9A-Za-z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}\Z"
"32 bytes in Z85 (ZeroMQ RFC 32)."

Name = Annotated[str, Meta(pattern=NAME_PATTERN)]
Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
CountOrNone = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Seconds = Annotated[float, Meta(gt=0, le=31_536_000)]
WholeSeconds = Annotated[int, Meta(ge=1, le=86_400)]
Bytes = Annotated[int, Meta(ge=1, le=2**40)]


def default_node_name() -> str:
    """The host's name in the form Kubernetes wants a node's name in (KubeEdge: util.GetHostname)."""
    return os.uname().nodename.strip().lower() or "edge-node"


# --- KubeEdge's sections ------------------------------------------------------------------------


class Section(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """One mapping of `edgecore.yaml`; a field `tls_ca_file` is its key `tlsCaFile`."""


class WebsocketSection(Section, frozen=True):
    """`modules.edgeHub.websocket`"""

    enable: bool = True
    server: str = "127.0.0.1:10000"
    "host:port of CloudHub."
    handshake_timeout: WholeSeconds = 30
    read_deadline: WholeSeconds = 15
    "Read, not used: an idle link is judged by its progress."
    write_deadline: WholeSeconds = 15


class QuicSection(Section, frozen=True):
    """`modules.edgeHub.quic`"""

    enable: bool = False
    server: str = "127.0.0.1:10001"
    handshake_timeout: WholeSeconds = 30
    read_deadline: WholeSeconds = 15
    "Read, not used (as in KubeEdge)."
    write_deadline: WholeSeconds = 15
    "Read, not used (as in KubeEdge)."


class EdgeHubSection(Section, frozen=True):
    """`modules.edgeHub`: the link to the cloud."""

    enable: bool = True
    heartbeat: Annotated[int, Meta(ge=1, le=3600)] = 15
    "Seconds between two keepalive messages."
    message_qps: CountOrNone = field(default=30, name="messageQPS")
    "Uploads per second, on average; 0 = no limit. Every file that keadm makes has 30."
    message_burst: CountOrNone = 60
    "Uploads that may go at once."
    project_id: Annotated[str, Meta(min_length=1)] = field(default="e632aba927ea4ac2b575ec1603d56f10", name="projectID")
    tls_ca_file: str = _CA_FILE
    tls_cert_file: str = _CERT_FILE
    tls_private_key_file: str = _KEY_FILE
    websocket: WebsocketSection = WebsocketSection()
    quic: QuicSection = QuicSection()
    http_server: str = ""
    "https://host:port where certificates are asked for; empty: the host of CloudHub, port 10002."
    token: str = ""
    "To join with, as `keadm gettoken` prints it, while there are no certificate files, or expired ones."
    rotate_certificates: bool = True
    "Ask for a new certificate when 70 to 90 % of the present one's lifetime are over."


class EventBusTlsSection(Section, frozen=True):
    """`modules.eventBus.eventBusTLS`: TLS towards the external MQTT broker."""

    enable: bool = False
    tls_mqtt_ca_file: str = field(default=_CA_FILE, name="tlsMqttCAFile")
    tls_mqtt_cert_file: str = _CERT_FILE
    tls_mqtt_private_key_file: str = _KEY_FILE


class EventBusSection(Section, frozen=True):
    """`modules.eventBus`: MQTT on the node."""

    enable: bool = True
    mqtt_mode: Literal[0, 1, 2] = 2
    "0 = built-in broker only, 1 = both, 2 = external broker only."
    mqtt_server_external: str = "tcp://127.0.0.1:1883"
    mqtt_server_internal: str = "tcp://127.0.0.1:1884"
    mqtt_qos: Literal[0, 1, 2] = field(default=0, name="mqttQOS")
    "Of the built-in broker. Towards an external one QoS 1 is always used."
    mqtt_retain: bool = False
    "Of the built-in broker."
    mqtt_session_queue_size: Count = 100
    "Messages the built-in broker keeps per session."
    mqtt_sub_client_id: str = field(default="", name="mqttSubClientID")
    mqtt_pub_client_id: str = field(default="", name="mqttPubClientID")
    mqtt_username: str = ""
    mqtt_password: str = ""
    event_bus_tls: EventBusTlsSection = field(default=EventBusTlsSection(), name="eventBusTLS")


# --- ours: `runtime:` -----------------------------------------------------------------------------


class ModuleSection(Section, frozen=True):
    """`runtime.modules.<name>`: a declared module. While it is away, its messages wait for it."""

    groups: list[Name] = []
    "Groups it is a member of even while it is away."
    enable: bool = True
    "False: not declared after all."


class BusSection(Section, frozen=True):
    """`runtime.bus`"""

    endpoint: str = ""
    "ipc://PATH or tcp://HOST:PORT; empty: ipc://$EDGEZMQ_HOME/run/bus.sock. EDGEZMQ_BUS wins over it."
    listen: list[str] = []
    "tcp://HOST:PORT endpoints for modules on other hosts, always with CURVE; the keys are those of `runtime.policy`."


class CloudGrant(Section, frozen=True):
    """One entry of `runtime.policy.modules.<name>.cloud`: messages that match all three may go to the cloud."""

    groups: list[str] = field(default_factory=lambda: ["*"])
    "`route.group`; in all three * and ? stand for anything."
    operations: list[str] = field(default_factory=lambda: ["*"])
    resources: list[str] = field(default_factory=lambda: ["*"])


class PolicyRule(Section, frozen=True):
    """`runtime.policy.modules.<name>`: who may have the name, and what it may do. What is not granted is denied."""

    users: list[str | Annotated[int, Meta(ge=0, le=2**32 - 2)]] = []
    "Users of this host, by name or uid, that may be this module over ipc; the kernel says who asks."
    keys: list[Annotated[str, Meta(pattern=CURVE_KEY_PATTERN)]] = []
    "CURVE public keys (Z85, `edgezmq keys list`) that may be it over tcp."
    to: list[str] = []
    "Destinations: names of modules, `@group`, or `*`. Replies need no entry."
    cloud: list[CloudGrant] = []
    "What of it edgehub may send to the cloud; `to` must have `@hub` or `edgehub` as well."
    messages_per_second: Annotated[float, Meta(ge=0)] = 0.0
    "Beyond it the broker delays. 0: no limit."
    bytes_per_second: Annotated[float, Meta(ge=0)] = 0.0
    "Likewise, of bodies on the bus."
    own_socket: bool = False
    "The module is reached through EDGEZMQ_HOME/bus/<name>.sock, and only through that."


class PolicySection(Section, frozen=True):
    """`runtime.policy`: who may be whom on the bus, and what each may do."""

    enable: bool = False
    "True: names without a rule are only for the user whom the broker runs as."
    modules: dict[str, PolicyRule] = {}


class BrokerSection(Section, frozen=True):
    """`runtime.broker`: the limits the broker keeps and tells every module (docs/emp.md, Limits)."""

    byte_budget: Annotated[int, Meta(ge=2**20, le=2**40)] = 64 * 2**20
    "Held for all modules together, in bytes; above it the broker reads no more from senders."
    message_bytes: Annotated[int, Meta(ge=1024, le=256 * 2**20)] = MAX_MESSAGE_BYTES
    "The largest message, in its MessagePack form."
    window_messages: Count = 4096
    "Unsettled messages per lane."
    window_bytes: Bytes = 8 * 2**20
    "Unsettled bytes per lane. An empty lane always admits one message."
    batch_messages: Annotated[int, Meta(ge=1, le=MAX_BATCH_MESSAGES)] = 512
    batch_bytes: Bytes = 256 * 1024
    heartbeat_seconds: Seconds = 5.0
    "A module PINGs at least this often."
    absent_limit_seconds: Seconds = 60.0
    "An undeclared module that is gone for so long is forgotten, its messages are settled as `gone`."
    grace_seconds: Seconds = 0.5
    "After the broker's start: how long messages wait for receivers it has not yet heard of."
    poison_deaths: Count = 5
    "A message that was in its receiver's hands at so many deaths is refused as `failed`."


class QuicExtras(Section, frozen=True):
    """`runtime.edgehub.quic`: what `modules.edgeHub.quic` has no key for."""

    alpn: list[Annotated[str, Meta(min_length=1, max_length=255)]] = []
    "Application protocols (ALPN) of which CloudHub must take one. Empty: not used, as in KubeEdge's viaduct."
    max_datagram: Annotated[int, Meta(ge=1200, le=65_527)] = 1280
    "The largest UDP payload in bytes; every path must carry it, larger ones cost less per byte."


class EdgeHubExtras(Section, frozen=True):
    """`runtime.edgehub`: what KubeEdge's section has no key for."""

    endpoints: list[str] = []
    "Further CloudHub addresses, host:port, tried in turn after `websocket.server`."
    keepalive_limit: Seconds = 30.0
    "CloudHub's keepaliveInterval in seconds; `heartbeat` must be at most half of it."
    memory_messages: Count = 65_536
    "Messages held in memory, waiting or unconfirmed."
    memory_bytes: Annotated[int, Meta(ge=65_536, le=2**40)] = 32 * 2**20
    outbox_messages: Count = 2_000_000
    "Messages on disk at the most, of each class (signals, data)."
    outbox_bytes: Annotated[int, Meta(ge=2**20, le=2**50)] = 512 * 2**20
    "Bytes on disk at the most, of each class."
    outbox_max_age: Annotated[float, Meta(ge=0)] = 0.0
    "Seconds after which a stored message is dropped, into the ledger. 0: never."
    outbox_when_full: Literal["wait", "drop-oldest"] = "wait"
    "At the limit senders wait, or the oldest uploads are dropped, into the ledger. Signals always wait."
    coalesce: list[str] = []
    "`RESOURCE OPERATION` patterns: of uploads that match one, only the last is kept while the cloud is away."
    spill_after: Annotated[float, Meta(ge=0.01, le=3600)] = 0.2
    "Seconds without the cloud's confirmation after which a message is stored (four round trips, if that is longer)."
    window_bytes_max: Annotated[int, Meta(ge=16_384, le=2**40)] = 8 * 2**20
    "At most so many bytes are written and not yet confirmed by a pong."
    signal_qps: Annotated[float, Meta(ge=0)] = 0.0
    "Signals per second (answers, ACKs, twin and node traffic); 0: no limit. `messageQPS` holds for data only."
    signal_burst: Annotated[int, Meta(ge=0)] = 0
    "Signals at once; 0: as many as in a second."
    ramp_after: Annotated[float, Meta(ge=0)] = 5.0
    "After an outage of so many seconds the backlog of uploads goes up slowly at first."
    ramp_start_rate: Annotated[float, Meta(ge=1)] = 200.0
    "Uploads per second at the beginning of that ramp; doubles every second."
    ramp_seconds: Annotated[float, Meta(ge=0, le=3600)] = 10.0
    "How long the ramp limits; 0: no ramp."
    greeting_seconds: Seconds = 5.0
    "Time for CloudHub's first answer."
    request_seconds: Seconds = 60.0
    "The longest wait for the cloud's answer to a module's request."
    max_frame_bytes: Annotated[int, Meta(ge=65_536, le=2**31)] = 16 * 2**20
    "A larger message from the cloud is skipped and counted."
    downstream_messages: Count = 4096
    "Received and not yet handled; above it reading stops."
    downstream_bytes: Annotated[int, Meta(ge=65_536, le=2**40)] = 32 * 2**20
    parked_messages: Count = 10_000
    "Objects from the cloud, on disk, whose owning group no module has declared; above it no ACK goes up."
    parked_bytes: Annotated[int, Meta(ge=65_536, le=2**40)] = 64 * 2**20
    owner_refusals: Annotated[int, Meta(ge=1, le=1000)] = 5
    "An object that its owner refused so often is acknowledged and written into the ledger."
    max_content_depth: Annotated[int, Meta(ge=1, le=9000)] = 512
    "Deeper JSON is refused as `invalid`. Go's decoder stops at 10,000."
    retry_cap_seconds: Annotated[float, Meta(ge=1, le=86_400)] = 60.0
    "The longest pause between two dials."
    failback_seconds: Annotated[float, Meta(ge=0, le=86_400)] = 300.0
    "While another endpoint serves, the first is looked for this often, and returned to in a quiet moment. 0: never."
    hub_version: Literal["1.17", "1.16", "2019"] = "1.17"
    "How old CloudHub is: 1.17 and later, before it, or the tree of 2019."
    server_name: str = ""
    "The name that CloudHub's certificate must have; empty: the host of the address."
    proxy: str = ""
    "http://[USER[:PASSWORD]@]HOST:PORT of an HTTP proxy on the way to CloudHub, or https://…; websocket only."
    proxy_password_file: str = ""
    "A file with the password, in place of one in `proxy`; read at each dial."
    proxy_ca_file: str = ""
    "The CA of an https:// proxy; empty: the machine's."
    quic: QuicExtras = QuicExtras()


class EventBusExtras(Section, frozen=True):
    """`runtime.eventbus`: what KubeEdge's section has no key for."""

    semantics: Literal["head", "2019"] = "head"
    "Whose topics and operations: KubeEdge of today or of 2019."
    protocol: Literal["auto", "5", "3.1.1"] = "auto"
    "MQTT version; auto = 5, and 3.1.1 where the broker refuses 5."
    receive_window: Annotated[int, Meta(ge=1, le=65_535)] = 1024
    "Messages in hand and not yet settled (MQTT 5 Receive Maximum)."
    publish_window: Annotated[int, Meta(ge=1, le=65_535)] = 256
    "Publishes the MQTT broker has not yet acknowledged."
    keepalive_seconds: Annotated[int, Meta(ge=5, le=65_535)] = 30
    session_expiry_seconds: Annotated[int, Meta(ge=0, le=4_294_967_295)] = 4_294_967_295
    "MQTT 5 session expiry; the default means never."
    reconnect_max_seconds: Annotated[float, Meta(ge=1, le=3600)] = 30.0
    "The longest pause between two connects."
    publish_connection_state: bool = False
    "Publish the state of the cloud link as an MQTT topic, as KubeEdge of 2019 did."
    broker_python: str = ""
    "Python of the virtual environment that has amqtt; empty: the one beside ours, named `…-amqtt`."


class WatchdogSection(Section, frozen=True):
    """`runtime.watchdog`"""

    enable: bool = True
    poll_seconds: Annotated[float, Meta(ge=0.5, le=300)] = 5.0
    "How often supervisord is asked for all programs; a death is noticed at once without it."
    hang_grace_seconds: Annotated[float, Meta(ge=0.1, le=300)] = 2.0
    "Between SIGABRT (the traceback goes to the log) and SIGKILL for a process that hangs."
    broker_silence_seconds: Annotated[float, Meta(ge=1, le=600)] = 10.0
    "A living broker that answers nothing for so long is taken for hung."
    revive_first_seconds: Seconds = 5.0
    "Back-off before a program that supervisord gave up (FATAL) is started again: first, doubling, with full jitter."
    revive_cap_seconds: Seconds = 300.0
    storm_restarts: Count = 5
    "So many restarts of one program …"
    storm_seconds: Seconds = 60.0
    "… within so many seconds are a restart storm: a warning in the log and in `edgezmq status`."


class MetricsSection(Section, frozen=True):
    """`runtime.metrics`: Prometheus text on http://ADDRESS:PORT/metrics, served by the watchdog."""

    enable: bool = True
    address: str = "127.0.0.1"
    "Loopback: who may open the port sees names and counts, and no content."
    port: Annotated[int, Meta(ge=0, le=65_535)] = 9477
    "0: any free one; run/metrics.json and log/watchdog.log say which."


class LogSection(Section, frozen=True):
    """`runtime.log`"""

    level: Literal["debug", "info", "warning", "error"] = "info"
    "EDGEZMQ_LOG wins over it."


class RuntimeSection(Section, frozen=True):
    """`runtime`: everything that is ours and not KubeEdge's."""

    modules: dict[str, ModuleSection] = {}
    "The user's own declared modules. edgehub and eventbus are declared by being enabled."
    bus: BusSection = BusSection()
    broker: BrokerSection = BrokerSection()
    policy: PolicySection = PolicySection()
    edgehub: EdgeHubExtras = EdgeHubExtras()
    eventbus: EventBusExtras = EventBusExtras()
    watchdog: WatchdogSection = WatchdogSection()
    metrics: MetricsSection = MetricsSection()
    log: LogSection = LogSection()


class NodeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """All of a node's configuration, checked. What `run/node.json` holds."""

    node_name: str = field(default_factory=default_node_name)
    "`modules.edged.hostnameOverride`, else the host's name."
    edge_hub: EdgeHubSection = EdgeHubSection()
    event_bus: EventBusSection = EventBusSection()
    runtime: RuntimeSection = RuntimeSection()

    def declared_modules(self) -> dict[str, frozenset[str]]:
        """Name to groups of every module whose messages wait while it is away.

        A module that configuration disables is not among them: nobody would ever fetch its messages.
        """
        declared: dict[str, frozenset[str]] = {}
        if self.edge_hub.enable:
            declared["edgehub"] = frozenset({"hub"})
        if self.event_bus.enable:
            declared["eventbus"] = frozenset({"bus"})
        for name, module in self.runtime.modules.items():
            if module.enable:
                declared[name] = declared.get(name, frozenset()) | frozenset(module.groups)
        return declared

    def certificate_server(self) -> str:
        """https://host:port of CloudCore's certificate API. Raises ConfigError."""
        from runtime import enrolment

        hub = self.edge_hub
        if hub.http_server:
            return enrolment.show_server(*enrolment.parse_server(hub.http_server, "modules.edgeHub.httpServer"))
        server = hub.websocket.server if hub.websocket.enable else hub.quic.server
        return enrolment.show_server(server.rpartition(":")[0].strip("[]"), enrolment.DEFAULT_PORT)

    def cloud_proxy(self) -> Proxy | None:
        """The proxy on the way to CloudHub; its password may be in `proxy_password_file`. Raises ConfigError."""
        from runtime.proxy import Proxy

        extra, key = self.runtime.edgehub, "runtime.edgehub.proxy"
        proxy = Proxy.parse(extra.proxy, key) if extra.proxy else None
        if proxy is not None and self.edge_hub.quic.enable:
            raise ConfigError(key, str(proxy), "no proxy with QUIC, which is UDP: use the websocket")
        if extra.proxy_password_file and (proxy is None or not proxy.user or proxy.password):
            raise ConfigError(
                "runtime.edgehub.proxyPasswordFile",
                extra.proxy_password_file,
                f"a USER and no PASSWORD in {key} beside it",
            )
        return proxy

    def endpoint(self, home: Home | None = None) -> str:
        """The bus endpoint for processes on this node; the environment may override it."""
        return bus_endpoint(home or find_home(), self.runtime.bus.endpoint)


# --- node.json ------------------------------------------------------------------------------------


def load(home: Path | None = None) -> NodeConfig:
    """The configuration that `edgezmq up` checked and stored; defaults when there is none.

    Raises ConfigError for a file that cannot be read or is not of our making.
    """
    path = (Home(home) if home is not None else find_home()).node_json
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return NodeConfig()
    except OSError as fault:
        raise ConfigError(str(path), fault.strerror, "a readable file (`edgezmq up` writes it)") from fault
    try:
        return msgspec.json.decode(data, type=NodeConfig)
    except (msgspec.DecodeError, UnicodeDecodeError) as fault:
        raise ConfigError(str(path), str(fault), "what this version's `edgezmq up` writes; run it again") from fault


def store(config: NodeConfig, home: Home) -> None:
    """Write `run/node.json` (closed to others, for it may hold a password) in one step. Raises OSError."""
    path = home.node_json
    scratch = path.with_suffix(".tmp")
    scratch.unlink(missing_ok=True)
    fd = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(config), indent=2))
        file.flush()
        os.fsync(file.fileno())
        # Root writes it for a node that runs as the user or the group to whom `run` belongs (docs/isolation.md).
        if os.geteuid() == 0:
            owner = home.run.stat()
            os.fchown(file.fileno(), owner.st_uid, owner.st_gid)
            os.fchmod(file.fileno(), 0o640 if owner.st_gid else 0o600)
    scratch.replace(path)
