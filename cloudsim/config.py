"""The settings of a cloudsim."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cloudsim.hub import Authorization, HubRules
from cloudsim.rules import HubVersion

SERVER_NAMES: Final = ("localhost", "127.0.0.1", "::1", "cloudcore")


@dataclass(frozen=True, slots=True, kw_only=True)
class SimConfig:
    """Everything that `CloudSim` needs to know. The defaults are CloudCore's where it has the setting."""

    directory: Path
    "Certificates, keys and ports.json."
    host: str = "127.0.0.1"
    "Where the websocket listens."
    port: int = 0
    "0: a free one. CloudHub's is 10000."
    quic_port: int | None = None
    "None: no QUIC. 0: a free UDP port. CloudHub's is 10001, and off unless it is configured."
    quic_client_certificates: bool = True
    "Demanded and verified, as on the websocket. False: not looked at, as over Google's QUIC."
    quic_alpn: tuple[str, ...] = ()
    "Protocols (ALPN) that the QUIC port takes. None named: ALPN is not used."
    control_host: str = "127.0.0.1"
    "The control API has no authentication: keep it on loopback."
    control_port: int | None = 0
    "0: a free one. None: no control API."
    certificate_port: int | None = None
    "The certificate API, on `host`. 0: a free one. None: no certificate API. CloudCore's is 10002."
    signing_seconds: float = 365 * 86400.0
    "For how long the certificates are valid that nodes get there (CloudCore's edgeCertSigningDuration)."
    names: tuple[str, ...] = SERVER_NAMES
    "Names and addresses in the server's certificate, besides `host`."
    nodes: tuple[str, ...] = ()
    "Nodes whose certificates are made at start."
    edgecontroller: bool = False
    "Answer queries and status updates of nodes out of a small object store. Off: nobody answers."
    keepalive_seconds: float = 30.0
    node_limit: int | None = None
    "None: 500, or 10 for the hub of 2019."
    enforce_authorization: bool = False
    "Check certificates against node names, and messages."
    debug_authorization: bool = False
    "Check them, tell of it, and admit everything."
    has_cluster_ca: bool = True
    "False: the cloud cannot read the cluster's CA; a query of k8s/ca.crt is answered with nothing in it."
    hub_version: HubVersion = HubVersion.CURRENT
    replacement_race: float = 0.04
    "See HubRules."
    upstream_inversion: float = 0.046
    "Probability that a message for edgecontroller or devicecontroller is overtaken by the next (measured: 92 of 2000)."
    seed: int | None = None
    "Of the hub's chances; None: a random one."
    max_message_bytes: int = 128 * 2**20
    "A larger message from a node ends its connection. CloudHub has no limit; 64 MiB was measured to pass."
    max_events: int = 50_000
    "Held for the event stream; the oldest are let go and counted."
    max_event_bytes: int = 96 * 2**20
    "Of payload. One event is held however large it is."
    max_ids: int = 500_000
    "Message ids remembered to tell the repeated from the new."
    receive_buffer_bytes: int | None = None
    "SO_RCVBUF of node connections; a throttled line wants a small one. None: the kernel's own."

    def rules(self) -> HubRules:
        old = self.hub_version is HubVersion.TREE_2019
        authorization = Authorization.OFF
        if self.debug_authorization:
            authorization = Authorization.DEBUG
        elif self.enforce_authorization:
            authorization = Authorization.ENFORCED
        return HubRules(
            keepalive_seconds=self.keepalive_seconds,
            node_limit=self.node_limit if self.node_limit is not None else 10 if old else 500,
            authorization=authorization,
            version=self.hub_version,
            replacement_race=self.replacement_race,
        )
