"""A CloudHub in this process: `async with CloudSim(SimConfig(directory=...)) as sim`."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import ssl
import time
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import asdict, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

from cloudsim import tls
from cloudsim.certificate_api import TOKEN_SECONDS, CertificateApi, make_token
from cloudsim.certificates import Authority, Pair
from cloudsim.config import SimConfig
from cloudsim.control import ControlServer
from cloudsim.edgecontroller import EdgeController
from cloudsim.faults import Fault, Wrong
from cloudsim.hub import Authorization, Hub
from cloudsim.recorder import Received, Recorder
from cloudsim.rules import HubVersion
from cloudsim.shell import HubShell
from cloudsim.websocket import Listener
from cloudsim.wire import CloudMessage, Header, Route
from runtime.message import new_id

if TYPE_CHECKING:
    from cloudsim import quic
    from cloudsim.certificate_server import CertificateServer

log = logging.getLogger("cloudsim")


class CloudSim:
    """The double with its listeners; its methods are what the control API offers over HTTP.

    Use it as an async context manager. Raises OSError from `__aenter__` when a port is taken.
    """

    def __init__(self, config: SimConfig) -> None:
        self.config = config
        self.authority = Authority(config.directory)
        self._hosts = [config.host, *config.names]
        server = self.authority.server(self._hosts)
        for node in config.nodes:
            self.authority.node(node)
        self.recorder = Recorder(config.max_events, config.max_event_bytes, config.max_ids)
        self.hub = Hub(
            rules=config.rules(),
            new_id=new_id,
            chance=random.Random(config.seed),
            epoch=time.time() - time.monotonic(),
            cluster_ca=self.authority.ca.certificate.read_text() if config.has_cluster_ca else "",
        )
        self.edgecontroller = EdgeController() if config.edgecontroller else None
        self.shell = HubShell(
            self.hub,
            self.recorder,
            self.edgecontroller,
            inversion=config.upstream_inversion,
            chance=random.Random(config.seed),
        )
        self._listener = Listener(
            self.shell,
            self._tls_context(),
            config.host,
            config.port,
            max_message_bytes=config.max_message_bytes,
            receive_buffer_bytes=config.receive_buffer_bytes,
        )
        self._quic = self._quic_listener(server)
        self._control = (
            ControlServer(self, config.control_host, config.control_port) if config.control_port is not None else None
        )
        self.certificates = self._certificate_server(server)
        "The certificate API; None without `certificate_port`."
        self._reopen: asyncio.Task[None] | None = None

    # --- life --------------------------------------------------------------------------------------

    async def __aenter__(self) -> CloudSim:
        await self._listener.open()
        try:
            if self._quic is not None:
                await self._quic.open()
            if self.certificates is not None:
                await self.certificates.open()
            if self._control is not None:
                await self._control.open()
            self._write_ports()
        except BaseException:
            await self.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Drop the nodes, close all ports. Idempotent."""
        self._cancel_reopen()
        if self._control is not None:
            await self._control.aclose()
        if self.certificates is not None:
            await self.certificates.aclose()
        self.shell.close()
        await self._listener.aclose()
        if self._quic is not None:
            await self._quic.aclose()

    def _write_ports(self) -> None:
        path = self.config.directory / "ports.json"
        temporary = path.with_name(".ports.json")
        temporary.write_text(json.dumps(self.ports()) + "\n")
        temporary.replace(path)

    def ports(self) -> dict[str, int | None]:
        """What `ports.json` and the ready line tell."""
        ports = {"port": self.port, "control_port": self.control_port}
        for name, port in (("quic_port", self.quic_port), ("certificate_port", self.certificate_port)):
            if port is not None:
                ports[name] = port
        return ports

    @property
    def quic_port(self) -> int | None:
        return self._quic.port if self._quic else None

    @property
    def port(self) -> int:
        """The websocket's port."""
        return self._listener.port

    @property
    def control_port(self) -> int | None:
        return self._control.port if self._control else None

    @property
    def certificate_port(self) -> int | None:
        return self.certificates.port if self.certificates else None

    @property
    def url(self) -> str:
        """The server part of the URL nodes connect to."""
        host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
        return f"wss://{host}:{self.port}"

    @property
    def ca(self) -> Pair:
        return self.authority.ca

    def certificate(self, node: str) -> Pair:
        """The files of a node's certificate, made when they are not there."""
        return self.authority.node(node)

    def token(self, *, expires_in: float | None = TOKEN_SECONDS) -> str:
        """A token to join with, as `keadm gettoken` shows it; `expires_in` seconds, None: never."""
        return make_token(self.authority, expires_at=None if expires_in is None else time.time() + expires_in)

    def _tls_context(self, wrong: Wrong | None = None) -> ssl.SSLContext:
        authority, hosts = self.authority, self._hosts
        match wrong:
            case None if self.config.hub_version is HubVersion.TREE_2019:
                return tls.server_context_2019(authority.rsa_server(hosts))
            case None:
                return tls.server_context(authority.server(hosts), authority.ca)
            case "old-version":
                return tls.outdated_server_context(authority.server(hosts), authority.ca)
            case _:
                return tls.server_context(authority.odd_server(wrong, hosts), authority.ca)

    def _present(self, wrong: Wrong | None = None) -> None:
        """How the server looks in TLS from now on."""
        self._listener.context = self._tls_context(wrong)
        if self._quic is not None and wrong != "old-version":
            authority = self.authority
            self._quic.present(authority.odd_server(wrong, self._hosts) if wrong else authority.server(self._hosts))

    def _quic_listener(self, server: Pair) -> quic.Listener | None:
        config = self.config
        if config.quic_port is None:
            return None
        from cloudsim import quic  # aioquic and protobuf: only where they are wanted

        return quic.Listener(
            self.shell,
            self.authority,
            server,
            config.host,
            config.quic_port,
            sees_client_certificates=config.quic_client_certificates,
            alpn=config.quic_alpn,
            max_message_bytes=config.max_message_bytes,
            chance=random.Random(config.seed),
        )

    def _certificate_server(self, server: Pair) -> CertificateServer | None:
        if self.config.certificate_port is None:
            return None
        from cloudsim.certificate_server import CertificateServer  # pyOpenSSL: only where it is wanted

        return CertificateServer(
            CertificateApi(self.authority, self._is_node, signing_seconds=self.config.signing_seconds),
            self.authority,
            server,
            self.config.host,
            self.config.certificate_port,
        )

    def _is_node(self, name: str) -> bool:
        return name in self.config.nodes or self.hub.is_served(name)

    # --- the hub -----------------------------------------------------------------------------------

    def send(self, node: str, message: CloudMessage) -> dict[str, str | None]:
        """A cloud module has a message for a node: `{"id":…, "queue":…, "dropped": reason or None}`."""
        return self.shell.send(node, message)

    def send_many(self, node: str, messages: Sequence[CloudMessage]) -> list[dict[str, str | None]]:
        return [self.shell.send(node, message) for message in messages]

    def put_object(self, namespace: str, kind: str, name: str, content: dict[str, Any], *, node: str = "") -> None:
        """Create or change a cluster object and send it to `node`, or to all that are served.

        `kind` is the type in a resource, as `configmap`. Raises ValueError without `edgecontroller`.
        """
        message = self._controller().put(namespace, kind, name, content)
        self._send_to_all(message, node)

    def remove_object(self, namespace: str, kind: str, name: str, *, node: str = "") -> bool:
        """Delete a cluster object and tell the nodes; False: there is none. Raises ValueError as above."""
        message = self._controller().remove(namespace, kind, name)
        if message is None:
            return False
        self._send_to_all(message, node)
        return True

    def _controller(self) -> EdgeController:
        if self.edgecontroller is None:
            raise ValueError("there is no edgecontroller: start with --edgecontroller (SimConfig.edgecontroller)")
        return self.edgecontroller

    def _send_to_all(self, message: CloudMessage, node: str) -> None:
        for name in [node] if node else self.hub.served_nodes():
            self.shell.send(name, CloudMessage(copy(message.header), copy(message.route), message.content))

    def sessions(self) -> list[dict[str, Any]]:
        """All connections with state served, rejected or waiting."""
        return [asdict(view) for view in self.hub.sessions(now=time.monotonic())]

    def is_served(self, node: str) -> bool:
        """Whether the node has a session. Rejected connections have none."""
        return self.hub.is_served(node)

    def set_rules(
        self,
        *,
        node_limit: int | None = None,
        authorization: Authorization | None = None,
        keepalive_seconds: float | None = None,
        replacement_race: float | None = None,
    ) -> None:
        """Change what an operator could change by restarting CloudCore; None: as it is.

        It counts for what happens from now on: sessions stay.
        """
        given: dict[str, Any] = {
            "node_limit": node_limit,
            "authorization": authorization,
            "keepalive_seconds": keepalive_seconds,
            "replacement_race": replacement_race,
        }
        self.hub.rules = replace(self.hub.rules, **{name: value for name, value in given.items() if value is not None})

    def kick(self, node: str) -> None:
        """Drop the node's connections."""
        self.shell.kick(node)

    def delete_node(self, node: str) -> None:
        """Drop the node's connections and forget what it acknowledged."""
        self.shell.delete_node(node)

    async def inject(self, fault: Fault | str, node: str = "", **settings: Any) -> None:
        """A fault, as a value or by name: `await sim.inject("throttle", "edge-a", bytes_per_second=10_000)`."""
        if isinstance(fault, str):
            fault = Fault(fault=fault, node=node, **settings)  # type: ignore[arg-type]  # checked by Fault
        if fault.fault in ("refuse", "restart"):
            self._cancel_reopen()
            self._listener.close()
            if self._quic is not None:
                self._quic.close()
            if fault.fault == "restart":
                self.shell.reset()
            seconds = fault.seconds if fault.fault == "refuse" else fault.seconds or 0.0
            if seconds is not None:
                self._reopen = asyncio.create_task(self._open_again(seconds), name="cloudsim open again")
            return
        if fault.fault == "tls":
            self._present(fault.wrong)
        if fault.fault == "clear" and not fault.node:
            self._cancel_reopen()
            self._present()
            await self._open()
        self.shell.afflict(fault)

    async def _open_again(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        try:
            await self._open()
        except OSError as error:
            log.error("the port could not be opened again: %s", error)

    async def _open(self) -> None:
        await self._listener.open()
        if self._quic is not None:
            await self._quic.open()

    def _cancel_reopen(self) -> None:
        if self._reopen is not None:
            self._reopen.cancel()
            self._reopen = None

    # --- a cloud application, for tests and demos ------------------------------------------------------

    def uploads(self, node: str | None = None) -> list[Received]:
        """What reached the module router: operation upload, group user."""
        return list(self.recorder.received(module="router", node=node))

    def messages(self, module: str | None = None, node: str | None = None) -> list[Received]:
        return list(self.recorder.received(module=module, node=node))

    async def wait_for(self, condition: Callable[[], object]) -> None:
        """Wait until `condition()` is true; looked at after each batch of events. Put a timeout around it."""
        while not condition():
            await self.shell.change()

    async def wait_for_uploads(self, count: int, node: str | None = None) -> list[Received]:
        """Wait until `count` uploads have come, repeated ones counted. Put a timeout around it.

        Returns the uploads that are held (`SimConfig.max_events`). Without a node it is cheap at any
        rate; with one the held messages are counted each time.
        """
        if node is None:
            await self.wait_for(lambda: self.recorder.by_module["router"] >= count)
        else:
            await self.wait_for(lambda: sum(1 for _ in self.recorder.received(module="router", node=node)) >= count)
        return self.uploads(node)

    async def wait_served(self, node: str) -> None:
        """Wait until the node has a session."""
        await self.wait_for(lambda: self.hub.is_served(node))

    def send_command(self, node: str, topic: str, payload: Any, *, message_id: str = "") -> dict[str, str | None]:
        """Publish to a topic of the node's MQTT broker, as the module router does it. No acknowledgement."""
        return self.send(node, _router_message("publish", topic, payload, message_id))

    def subscribe(self, node: str, topic: str) -> dict[str, str | None]:
        """Ask the node's eventbus to subscribe to a topic, as a rule with an eventbus source does."""
        return self.send(node, _router_message("subscribe", topic, None, ""))

    def unsubscribe(self, node: str, topic: str) -> dict[str, str | None]:
        return self.send(node, _router_message("unsubscribe", topic, None, ""))


def _router_message(operation: str, topic: str, payload: Any, message_id: str) -> CloudMessage:
    return CloudMessage(
        Header(msg_id=message_id),
        Route(source="router_eventbus", group="user", operation=operation, resource=topic),
        payload,
    )
