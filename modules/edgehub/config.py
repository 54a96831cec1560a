"""What edgehub is told: the cloud's address, the node, certificates, timings, bounds."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from modules.edgehub.coalescing import Coalescing
from modules.edgehub.dialect import CURRENT, DIALECTS, Dialect
from modules.edgehub.permission import Grant
from runtime.errors import ConfigError
from runtime.names import ADDRESS_PATTERN

if TYPE_CHECKING:
    from runtime.config import NodeConfig
    from runtime.proxy import Proxy

WEBSOCKET: Final = "websocket"
QUIC: Final = "quic"

DEFAULT_PROJECT: Final = "e632aba927ea4ac2b575ec1603d56f10"
"KubeEdge's default projectID; CloudHub does not look at it."

_NODE_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a CloudHub listens."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str, key: str) -> Endpoint:
        """`host:port`, IPv6 in brackets. `key` names the setting in the ConfigError."""
        rule = "host:port with a port from 1 to 65535, IPv6 in brackets"
        parts = re.fullmatch(ADDRESS_PATTERN, text)
        if parts is None or not 1 <= int(parts["port"]) <= 65535:
            raise ConfigError(key, text, rule)
        return cls(parts["literal"] or parts["name"], int(parts["port"]))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeHubConfig:
    """Read once, then a value. Build it with `from_node`; `check` is run in either case."""

    node_name: str
    "Kubernetes' name of this node: `modules.edged.hostnameOverride`."
    endpoints: tuple[Endpoint, ...]
    "Tried in this order; after each stable link the first one is tried first again."
    project_id: str = DEFAULT_PROJECT
    protocol: str = WEBSOCKET
    "The protocol switch: `websocket` or `quic`."
    ca_file: str = "/etc/kubeedge/ca/rootCA.crt"
    cert_file: str = "/etc/kubeedge/certs/server.crt"
    key_file: str = "/etc/kubeedge/certs/server.key"
    certificate_server: str = ""
    "https://host:port where certificates are asked for; empty: nowhere."
    token: str = field(default="", repr=False)
    "To join with when there is no certificate, or none that is still valid."
    rotate_certificates: bool = False
    "Ask for a new certificate in time."
    server_name: str = ""
    "The name that CloudHub's certificate must have; empty: the endpoint's host."
    proxy: Proxy | None = None
    "On the way to every endpoint."
    proxy_password_file: str = ""
    "Read at each dial; in place of the password in `proxy`."
    proxy_ca_file: str = ""
    "Of an https proxy; empty: the machine's."
    quic_alpn: tuple[str, ...] = ()
    "Application protocols offered in QUIC's handshake, of which CloudHub must take one. None: ALPN is not used."
    quic_datagram_bytes: int = 1280
    "The largest UDP payload sent."

    heartbeat_seconds: float = 15.0
    "A keepalive message this often."
    keepalive_limit_seconds: float = 30.0
    "CloudHub's keepaliveInterval: silence after which it cuts the link."
    handshake_seconds: float = 30.0
    "TCP, TLS and the upgrade together."
    silence_seconds: float = 5.0
    "An awaited pong, answer or TCP acknowledgement on an empty link may take this long; scaled by what is queued."
    greeting_seconds: float = 5.0
    "For the answer to the k8s/ca.crt query; CloudHub takes about 1 ms for it."
    retry_cap_seconds: float = 60.0
    "The longest pause between two dials."
    dialect: Dialect = CURRENT
    "What this age of CloudHub knows, and what it calls things."
    failback_seconds: float = 300.0
    "While another endpoint serves, the first one is looked for this often, and returned to; 0: never."
    stable_seconds: float = 10.0
    "A link that lived so long resets the back-off."
    unproven_redial_seconds: float = 600.0
    "A link that never got anything from the cloud is dialled anew after this time; 0: never."
    drain_seconds: float = 5.0
    "At stop: for the cloud to confirm what was handed over."

    message_qps: float = 30.0
    "Data messages per second; 0: no limit."
    message_burst: int = 60
    signal_qps: float = 0.0
    "Signals per second; 0: no limit."
    signal_burst: int = 0
    "0: as many as in a second."
    ramp_after_seconds: float = 5.0
    "After an outage of at least this long the backlog of data goes up on a ramp."
    ramp_start_rate: float = 200.0
    "Messages per second at its beginning; doubles every second."
    ramp_seconds: float = 10.0
    "How long it lasts; 0: no ramp."
    memory_messages: int = 65_536
    "Waiting or unconfirmed, each class."
    memory_bytes: int = 32 * 2**20
    outbox_path: Path | None = None
    "The file of the outbox; None: nothing is stored, and what the cloud has not confirmed is not settled."
    outbox_messages: int = 2_000_000
    "Stored at most, of each class (signals, data). Above it senders wait, or the oldest are dropped."
    outbox_bytes: int = 512 * 2**20
    outbox_max_age_seconds: float | None = None
    "Stored messages that are older are dropped, into the ledger. None: never."
    coalesce: tuple[str, ...] = ()
    "`RESOURCE OPERATION` patterns: of data that matches one only the last message is kept while there is no link."
    grants: tuple[tuple[str, tuple[Grant, ...]], ...] = ()
    "What each sender that has a rule may send to the cloud."
    outbox_drops_oldest: bool = False
    "At the limit drop the oldest data, into the ledger, rather than let senders wait."
    spill_seconds: float = 0.2
    "What the cloud has not confirmed after so long (or four round trips, if longer) is stored."
    window_bytes_max: int = 8 * 2**20
    "Written and without a pong, on the fastest link."
    max_upload_bytes: int = 17 * 2**20
    "One message in its JSON form; a larger one is refused. 12 MiB of bytes are 16 MiB as base64."
    max_content_depth: int = 512
    "Nesting of JSON content; deeper is refused. Go's decoder, which cuts the link, stops at 10000."
    request_seconds: float = 60.0
    "The longest a module's request waits for the cloud (KubeEdge's remoteQueryTimeout)."

    max_frame_bytes: int = 16 * 2**20
    "A larger message from the cloud is skipped and counted."
    downstream_messages: int = 4096
    "Received and not yet settled by their modules; above it the socket is not read."
    downstream_bytes: int = 32 * 2**20
    parked_messages: int = 10_000
    "Objects whose owner no module here has declared, on disk; above it they are not acknowledged."
    parked_bytes: int = 64 * 2**20
    owner_refusals: int = 5
    "An object that its owner refused so often is acknowledged and goes to the ledger."

    def __post_init__(self) -> None:
        if not _NODE_NAME.fullmatch(self.node_name):
            raise ConfigError(
                "modules.edged.hostnameOverride", self.node_name, "letters, digits, '.', '_' and '-', at most 253"
            )
        if self.protocol == QUIC and not self.dialect.answers_greeting:
            raise ConfigError("runtime.edgehub.hubVersion", self.dialect.version, "1.17 with QUIC: no older one has it")
        if not self.endpoints:
            raise ConfigError("modules.edgeHub.websocket.server", "", "at least one host:port")
        for name in (
            "heartbeat_seconds",
            "keepalive_limit_seconds",
            "handshake_seconds",
            "silence_seconds",
            "greeting_seconds",
            "request_seconds",
            "retry_cap_seconds",
        ):
            if not getattr(self, name) > 0:
                raise ConfigError(name, getattr(self, name), "seconds greater than 0")
        Coalescing(self.coalesce)
        if self.heartbeat_seconds > self.keepalive_limit_seconds / 2:
            raise ConfigError(
                "modules.edgeHub.heartbeat",
                self.heartbeat_seconds,
                f"at most half of CloudHub's keepaliveInterval ({self.keepalive_limit_seconds:g} s): it cuts the link",
            )
        if self.message_qps < 0 or self.message_burst < 0:
            raise ConfigError("modules.edgeHub.messageQPS", self.message_qps, "0 (no limit) or more, as messageBurst")
        if not 1 <= self.max_content_depth <= 9000:
            raise ConfigError("max_content_depth", self.max_content_depth, "1 to 9000")
        for name, least in (
            ("memory_messages", 1),
            ("memory_bytes", 65_536),
            ("window_bytes_max", 16_384),
            ("max_frame_bytes", 65_536),
            ("max_upload_bytes", 65_536),
            ("downstream_messages", 1),
            ("downstream_bytes", 65_536),
            ("parked_messages", 1),
            ("parked_bytes", 65_536),
            ("owner_refusals", 1),
        ):
            if getattr(self, name) < least:
                raise ConfigError(name, getattr(self, name), f"at least {least}")

    @classmethod
    def from_node(cls, node: NodeConfig) -> EdgeHubConfig:
        """The settings of `modules.edgeHub` and `runtime.edgehub`. Raises ConfigError."""
        hub = node.edge_hub
        extra = node.runtime.edgehub
        if hub.websocket.enable == hub.quic.enable:
            raise ConfigError(
                "modules.edgeHub.websocket.enable", hub.websocket.enable, "exactly one of websocket and quic enabled"
            )
        section, protocol = (hub.websocket, WEBSOCKET) if hub.websocket.enable else (hub.quic, QUIC)
        key = f"modules.edgeHub.{protocol}.server"
        endpoints = [Endpoint.parse(section.server, key)]
        endpoints += [Endpoint.parse(text, "runtime.edgehub.endpoints") for text in extra.endpoints]
        return cls(
            node_name=node.node_name,
            endpoints=tuple(endpoints),
            project_id=hub.project_id,
            protocol=protocol,
            ca_file=hub.tls_ca_file,
            cert_file=hub.tls_cert_file,
            key_file=hub.tls_private_key_file,
            certificate_server=node.certificate_server(),
            token=hub.token,
            rotate_certificates=hub.rotate_certificates,
            server_name=extra.server_name,
            proxy=node.cloud_proxy(),
            proxy_password_file=extra.proxy_password_file,
            proxy_ca_file=extra.proxy_ca_file,
            quic_alpn=tuple(extra.quic.alpn),
            quic_datagram_bytes=extra.quic.max_datagram,
            heartbeat_seconds=float(hub.heartbeat),
            keepalive_limit_seconds=extra.keepalive_limit,
            handshake_seconds=float(section.handshake_timeout),
            greeting_seconds=extra.greeting_seconds,
            retry_cap_seconds=extra.retry_cap_seconds,
            failback_seconds=extra.failback_seconds,
            dialect=DIALECTS[extra.hub_version],
            message_qps=float(hub.message_qps),
            message_burst=hub.message_burst,
            signal_qps=extra.signal_qps,
            signal_burst=extra.signal_burst,
            ramp_after_seconds=extra.ramp_after,
            ramp_start_rate=extra.ramp_start_rate,
            ramp_seconds=extra.ramp_seconds,
            memory_messages=extra.memory_messages,
            memory_bytes=extra.memory_bytes,
            outbox_messages=extra.outbox_messages,
            outbox_bytes=extra.outbox_bytes,
            outbox_max_age_seconds=extra.outbox_max_age or None,
            outbox_drops_oldest=extra.outbox_when_full == "drop-oldest",
            coalesce=tuple(extra.coalesce),
            grants=_grants(node) if node.runtime.policy.enable else (),
            spill_seconds=extra.spill_after,
            window_bytes_max=extra.window_bytes_max,
            max_content_depth=extra.max_content_depth,
            request_seconds=extra.request_seconds,
            max_frame_bytes=extra.max_frame_bytes,
            downstream_messages=extra.downstream_messages,
            downstream_bytes=extra.downstream_bytes,
            parked_messages=extra.parked_messages,
            parked_bytes=extra.parked_bytes,
            owner_refusals=extra.owner_refusals,
        )


def _grants(node: NodeConfig) -> tuple[tuple[str, tuple[Grant, ...]], ...]:
    return tuple(
        (
            name,
            tuple(Grant(tuple(cloud.groups), tuple(cloud.operations), tuple(cloud.resources)) for cloud in rule.cloud),
        )
        for name, rule in node.runtime.policy.modules.items()
    )
