"""KubeEdge's `edgecore.yaml` (v1alpha2) and our `runtime:` in it, checked key by key.

Takes the parsed document, not the text, so that it needs no YAML library. Only the CLI imports it.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import msgspec

from runtime.access import ANY
from runtime.config import (
    EdgeHubSection,
    EventBusSection,
    NodeConfig,
    RuntimeSection,
    Section,
    default_node_name,
)
from runtime.errors import ConfigError
from runtime.names import ADDRESS_PATTERN, NAME_PATTERN

API_VERSION: Final = "edgecore.config.kubeedge.io/v1alpha2"
KIND: Final = "EdgeCore"

_TOP_LEVEL: Final = frozenset({"apiVersion", "kind", "database", "modules", "featureGates", "runtime"})
_KUBEEDGE_MODULES: Final = frozenset(
    {
        "dbTest",
        "deviceTwin",
        "edgeHub",
        "edgeStream",
        "edged",
        "eventBus",
        "metaManager",
        "serviceBus",
        "streamRuleEndpoint",
        "taskManager",
    }
)
_OUR_MODULES: Final = frozenset({"edgeHub", "eventBus"})
_SECRETS: Final = frozenset({"token", "mqttPassword", "proxy"})

# What Kubernetes allows as a node's name (RFC 1123 subdomain), for it is part of the URL and the certificate.
_NODE_NAME: Final = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")


def from_edgecore(document: object, *, directory: Path | None = None) -> tuple[NodeConfig, list[str]]:
    """Check a parsed `edgecore.yaml`: the configuration, and warnings in words.

    Paths in it that are relative are taken from `directory` (the file's own; default: as they are).
    Raises ConfigError for the first thing that is wrong.
    """
    top = _mapping(document, "edgecore.yaml")
    _known(top, _TOP_LEVEL, "")
    _expect(top, "apiVersion", API_VERSION)
    _expect(top, "kind", KIND)
    modules = _mapping(top.get("modules"), "modules")
    for key in modules:
        if key not in _KUBEEDGE_MODULES and (near := _nearest(str(key), _KUBEEDGE_MODULES)):
            raise ConfigError(
                f"modules.{key}", _shown(key, modules[key]), f"a module of KubeEdge (did you mean {near}?)"
            )
    edged = _mapping(modules.get("edged"), "modules.edged")
    config = NodeConfig(
        node_name=_node_name(edged.get("hostnameOverride")),
        edge_hub=_build(EdgeHubSection, modules.get("edgeHub"), "modules.edgeHub"),
        event_bus=_build(EventBusSection, modules.get("eventBus"), "modules.eventBus"),
        runtime=_build(RuntimeSection, top.get("runtime"), "runtime"),
    )
    _check(config)
    if directory is not None:
        config = _with_absolute_paths(config, directory)
    return config, [*_warnings(top, modules, edged), *_mixed(config)]


def _check(config: NodeConfig) -> None:
    """The rules that concern more than one key."""
    hub = config.edge_hub
    if hub.enable and hub.websocket.enable == hub.quic.enable:
        both = "both" if hub.quic.enable else "neither"
        raise ConfigError("modules.edgeHub", f"{both} of websocket.enable and quic.enable", "exactly one of them true")
    for key, server in (("websocket", hub.websocket.server), ("quic", hub.quic.server)):
        _check_address(f"modules.edgeHub.{key}.server", server)
    for index, server in enumerate(config.runtime.edgehub.endpoints):
        _check_address(f"runtime.edgehub.endpoints[{index}]", server)
    config.cloud_proxy()
    if hub.enable and hub.heartbeat * 2 > config.runtime.edgehub.keepalive_limit:
        raise ConfigError(
            "modules.edgeHub.heartbeat",
            hub.heartbeat,
            f"at most half of runtime.edgehub.keepaliveLimit ({config.runtime.edgehub.keepalive_limit:g} s), "
            "or CloudHub drops the link when one keepalive is late",
        )
    broker = config.runtime.broker
    if broker.byte_budget < broker.message_bytes:
        raise ConfigError(
            "runtime.broker.byteBudget", broker.byte_budget, f"at least messageBytes ({broker.message_bytes})"
        )
    endpoint = config.runtime.bus.endpoint
    if endpoint and not endpoint.startswith(("ipc://", "tcp://")):
        raise ConfigError("runtime.bus.endpoint", endpoint, "ipc://PATH or tcp://HOST:PORT")
    _check_policy(config)
    for name, module in config.runtime.modules.items():
        if re.fullmatch(NAME_PATTERN, name) is None or name in ("broker", "watchdog", "cloud"):
            raise ConfigError(
                f"runtime.modules.{name}",
                name,
                "a name of 1 to 64 of A-Z a-z 0-9 . _ -, and not broker, watchdog or cloud",
            )
        if name in ("edgehub", "eventbus") and not module.enable:
            section = {"edgehub": "edgeHub", "eventbus": "eventBus"}[name]
            raise ConfigError(f"runtime.modules.{name}.enable", False, f"modules.{section}.enable to switch it off")


def _check_policy(config: NodeConfig) -> None:
    policy = config.runtime.policy
    for index, endpoint in enumerate(config.runtime.bus.listen):
        if re.fullmatch(r"tcp://(\[[0-9A-Fa-f:.]+\]|[^\[\]:/\s]+):\d{1,5}", endpoint) is None:
            raise ConfigError(f"runtime.bus.listen[{index}]", endpoint, "tcp://HOST:PORT")
        if not policy.enable:
            raise ConfigError(
                f"runtime.bus.listen[{index}]",
                endpoint,
                "runtime.policy.enable: over the network only keys that a rule names are admitted",
            )
    for name, rule in policy.modules.items():
        key = f"runtime.policy.modules.{name}"
        if re.fullmatch(NAME_PATTERN, name) is None:
            raise ConfigError(key, name, "a module's name: 1 to 64 of A-Z a-z 0-9 . _ -")
        if not rule.users and not rule.keys:
            raise ConfigError(key, "neither users nor keys", "at least one who may have the name")
        for destination in rule.to:
            if destination != ANY and re.fullmatch(NAME_PATTERN, destination.removeprefix("@")) is None:
                raise ConfigError(f"{key}.to", destination, "a module's name, @group, or *")
        if rule.cloud and not {"@hub", "edgehub", ANY}.intersection(rule.to):
            raise ConfigError(f"{key}.cloud", "given", "@hub or edgehub in `to`, or nothing of it reaches edgehub")
        if rule.own_socket and not rule.users:
            raise ConfigError(f"{key}.ownSocket", True, "`users`: a socket file is for users of this host")


def _check_address(key: str, server: str) -> None:
    parts = re.fullmatch(ADDRESS_PATTERN, server)
    if parts is None or not 0 < int(parts["port"]) < 65_536:
        raise ConfigError(key, server, "host:port with a port of 1 to 65535")


def _node_name(value: object) -> str:
    if value is None or value == "":
        return default_node_name()
    if not isinstance(value, str) or len(value) > 253 or _NODE_NAME.fullmatch(value) is None:
        raise ConfigError(
            "modules.edged.hostnameOverride", value, "a node name: lower-case letters, digits, `-` and `.` (RFC 1123)"
        )
    return value


def _expect(top: Mapping[str, Any], key: str, wanted: str) -> None:
    value = top.get(key)
    if value is not None and value != wanted:
        raise ConfigError(key, value, wanted)


def _warnings(top: Mapping[str, Any], modules: Mapping[str, Any], edged: Mapping[str, Any]) -> Iterator[str]:
    idle = [f"modules.{key}" for key in modules if key not in _OUR_MODULES and _is_wanted(key, modules[key])]
    idle += [key for key in ("database", "featureGates") if top.get(key)]
    if idle:
        yield f"not run by edgezmq, and ignored: {', '.join(idle)}"
    if not edged.get("hostnameOverride"):
        yield f"modules.edged.hostnameOverride is not set: the node is called {default_node_name()!r}"


def _mixed(config: NodeConfig) -> Iterator[str]:
    """An upload is an operation `response` in 2019, and for a CloudHub of today a `response` is an ACK."""
    version, semantics = config.runtime.edgehub.hub_version, config.runtime.eventbus.semantics
    if config.event_bus.enable and config.edge_hub.enable and (version == "2019") != (semantics == "2019"):
        yield (
            f"runtime.eventbus.semantics is {semantics} and runtime.edgehub.hubVersion is {version}: "
            "uploads of MQTT messages are then lost in the cloud"
        )


def _is_wanted(key: str, section: object) -> bool:
    if not isinstance(section, Mapping):
        return section is not None
    # `edged` with nothing but a name is how a file for us says what the node is called.
    return section.get("enable") is not False and not (
        key == "edged" and set(section) <= {"hostnameOverride", "enable"}
    )


def _with_absolute_paths(config: NodeConfig, directory: Path) -> NodeConfig:
    hub, tls, extra = config.edge_hub, config.event_bus.event_bus_tls, config.runtime.edgehub
    replace = msgspec.structs.replace

    def absolute(path: str) -> str:
        return str(directory / path) if path else ""

    return replace(
        config,
        runtime=replace(
            config.runtime,
            edgehub=replace(
                extra,
                proxy_password_file=absolute(extra.proxy_password_file),
                proxy_ca_file=absolute(extra.proxy_ca_file),
            ),
        ),
        edge_hub=replace(
            hub,
            tls_ca_file=str(directory / hub.tls_ca_file),
            tls_cert_file=str(directory / hub.tls_cert_file),
            tls_private_key_file=str(directory / hub.tls_private_key_file),
        ),
        event_bus=replace(
            config.event_bus,
            event_bus_tls=replace(
                tls,
                tls_mqtt_ca_file=str(directory / tls.tls_mqtt_ca_file),
                tls_mqtt_cert_file=str(directory / tls.tls_mqtt_cert_file),
                tls_mqtt_private_key_file=str(directory / tls.tls_mqtt_private_key_file),
            ),
        ),
    )


# --- from plain values to sections ----------------------------------------------------------------

S = TypeVar("S", bound=Section)


def _build(section: type[S], raw: object, path: str) -> S:
    """`raw` as a `section`; field by field, so that an error names the whole key and the value."""
    given = _mapping(raw, path)
    fields = {known.encode_name: known for known in msgspec.structs.fields(section)}
    _known(given, fields.keys(), path)
    values = {
        fields[key].name: _value(fields[key].type, value, f"{path}.{key}", key)
        for key, value in given.items()
        if value is not None  # `key:` with nothing after it: the default, as Go reads it
    }
    return section(**values)


def _value(wanted: Any, raw: object, path: str, key: str) -> Any:
    if isinstance(wanted, type) and issubclass(wanted, Section):
        return _build(wanted, raw, path)
    if typing.get_origin(wanted) is dict:
        section = typing.get_args(wanted)[1]
        return {str(name): _build(section, value, f"{path}.{name}") for name, value in _mapping(raw, path).items()}
    try:
        return msgspec.convert(raw, wanted)
    except msgspec.ValidationError as fault:
        raise ConfigError(path, _shown(key, raw), _rule(wanted, str(fault))) from fault


def _rule(wanted: Any, fault: str) -> str:
    if typing.get_origin(wanted) is Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(wanted)))
    rule = fault.removeprefix("Expected ").partition(" - at ")[0].partition(", got ")[0]
    return rule.replace("`", "")


def _mapping(raw: object, path: str) -> Mapping[str, Any]:
    if raw is None:
        return types.MappingProxyType({})
    if not isinstance(raw, Mapping):
        raise ConfigError(path, raw, "a mapping of keys to values")
    return raw


def _known(given: Mapping[str, Any], known: typing.AbstractSet[str], path: str) -> None:
    for key in given:
        if key not in known:
            near = _nearest(str(key), known)
            hint = f"did you mean {near}?" if near else "known are " + ", ".join(sorted(known))
            raise ConfigError(f"{path}.{key}".lstrip("."), _shown(str(key), given[key]), f"a known key ({hint})")


def _nearest(key: str, known: typing.AbstractSet[str]) -> str | None:
    lower = {name.lower(): name for name in known}
    near = difflib.get_close_matches(key.lower(), lower, n=1)
    return lower[near[0]] if near else None


def _shown(key: object, value: object) -> object:
    return "(hidden)" if key in _SECRETS else value
