"""The `edge.yaml` of 2019: what becomes of each key."""

from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from runtime.edge2019 import convert
from runtime.edgecore import from_edgecore
from runtime.errors import ConfigError

SHIPPED = """
mqtt:
    server: tcp://127.0.0.1:1883
    internal-server: tcp://127.0.0.1:1884
    mode: 0
    qos: 0
    retain: false
    session-queue-size: 100

edgehub:
    websocket:
        url: wss://192.0.2.10:10000/e632aba927ea4ac2b575ec1603d56f10/edge-node/events
        certfile: /etc/kubeedge/certs/edge.crt
        keyfile: /etc/kubeedge/certs/edge.key
        handshake-timeout: 30
        write-deadline: 15
        read-deadline: 15
    quic:
        url: 127.0.0.1:10001
        cafile: /etc/kubeedge/ca/rootCA.crt
        certfile: /etc/kubeedge/certs/quic.crt
        keyfile: /etc/kubeedge/certs/quic.key
        handshake-timeout: 30
        write-deadline: 15
        read-deadline: 15
    controller:
        protocol: websocket
        placement: false
        heartbeat: 15
        refresh-ak-sk-interval: 10
        auth-info-files-path: /var/IEF/secret
        project-id: e632aba927ea4ac2b575ec1603d56f10
        node-id: edge-node

edged:
    register-node-namespace: default
    hostname-override: edge-node
    interface-name: eth0
    docker-address: unix:///var/run/docker.sock

mesh:
    loadbalance:
        strategy-name: RoundRobin
"""


def old(**changes: Any) -> dict[str, Any]:
    """The shipped file with values by dotted key put in; None takes one out."""
    document: dict[str, Any] = yaml.safe_load(SHIPPED)
    for key, value in changes.items():
        section = document
        *path, last = key.split(".")
        for name in path:
            section = section.setdefault(name, {})
        section[last] = value
    return document


def test_the_shipped_file_becomes_a_valid_edgecore_yaml() -> None:
    imported = convert(old())
    config, warnings = from_edgecore(imported.document)
    assert warnings == []
    hub, bus = config.edge_hub, config.event_bus
    assert config.node_name == "edge-node"
    assert (hub.websocket.enable, hub.websocket.server, hub.quic.enable) == (True, "192.0.2.10:10000", False)
    assert (hub.heartbeat, hub.message_qps, hub.websocket.handshake_timeout) == (15, 0, 30)
    assert (hub.tls_ca_file, hub.tls_cert_file, hub.tls_private_key_file) == (
        "/etc/kubeedge/ca/rootCA.crt",
        "/etc/kubeedge/certs/edge.crt",
        "/etc/kubeedge/certs/edge.key",
    )
    assert (bus.mqtt_mode, bus.mqtt_server_external, bus.mqtt_session_queue_size) == (0, "tcp://127.0.0.1:1883", 100)
    own = config.runtime
    assert (own.edgehub.hub_version, own.edgehub.server_name) == ("2019", "kubeedge.io")
    assert (own.eventbus.semantics, own.eventbus.publish_connection_state) == ("2019", True)


def test_each_key_that_has_no_place_is_named_with_the_reason() -> None:
    assert convert(old(**{"edgehub.websocket.colour": "blue"})).left_out == [
        "edgehub.websocket.colour: edgezmq has no such setting",
        "edgehub.controller.placement: KubeEdge did not use it either",
        "edgehub.controller.refresh-ak-sk-interval: KubeEdge did not use it either",
        "edgehub.controller.auth-info-files-path: KubeEdge did not use it either",
        "edged.register-node-namespace: edgezmq runs no containers",
        "edged.interface-name: edgezmq runs no containers",
        "edged.docker-address: edgezmq runs no containers",
        "mesh.loadbalance.strategy-name: edgezmq has no service mesh",
    ]


def test_what_is_missing_has_the_default_of_2019() -> None:
    document = {
        "edgehub": {
            "controller": {"node-id": "edge-node"},
            "websocket": {"url": "wss://[2001:db8::1]:10000/p/edge-node/events"},
        }
    }
    config, _ = from_edgecore(convert(document).document)
    assert config.edge_hub.websocket.server == "[2001:db8::1]:10000"
    assert config.edge_hub.websocket.handshake_timeout == 60
    assert config.event_bus.mqtt_mode == 0


def test_for_a_newer_cloud_nothing_of_2019_is_set() -> None:
    imported = convert(old(), cloud="1.17")
    assert "runtime" not in imported.document
    assert any("made out to system:node:edge-node" in remark for remark in imported.remarks)
    assert convert(old(), cloud="1.16").document["runtime"] == {"edgehub": {"hubVersion": "1.16"}}
    with pytest.raises(ConfigError, match=r"--cloud: got '1\.9', expected one of 2019, 1\.16, 1\.17"):
        convert(old(), cloud="1.9")


def test_quic_takes_its_own_files() -> None:
    imported = convert(old(**{"edgehub.controller.protocol": "quic"}))
    config, _ = from_edgecore(imported.document)
    assert (config.edge_hub.quic.enable, config.edge_hub.quic.server) == (True, "127.0.0.1:10001")
    assert config.edge_hub.tls_cert_file == "/etc/kubeedge/certs/quic.crt"
    assert any("IETF QUIC" in remark for remark in imported.remarks)


def test_modules_that_did_not_run_stay_off_and_others_are_named() -> None:
    imported = convert(old(**{"modules.enabled": ["websocket", "edged", "dbTest"]}))
    config, _ = from_edgecore(imported.document)
    assert (config.edge_hub.enable, config.event_bus.enable) == (True, False)
    assert "modules that edgezmq does not run: edged, dbTest" in imported.remarks
    with pytest.raises(ConfigError, match=r"modules\.enabled"):
        convert(old(**{"modules.enabled": "all"}))


def test_a_password_in_the_brokers_address_gets_keys_of_its_own() -> None:
    imported = convert(old(**{"mqtt.server": "tcp://me:s%40cret@mq.local:1883", "mqtt.mode": 2}))
    config, _ = from_edgecore(imported.document)
    assert config.event_bus.mqtt_server_external == "tcp://mq.local:1883"
    assert (config.event_bus.mqtt_username, config.event_bus.mqtt_password) == ("me", "s@cret")


@pytest.mark.parametrize(
    ("changes", "remark"),
    [
        ({"edgehub.websocket.url": "wss://0.0.0.0:10000/p/edge-node/events"}, "0.0.0.0, which is no cloud"),
        (
            {"edgehub.websocket.url": "wss://c:1/e632aba927ea4ac2b575ec1603d56f10/other/events"},
            "edgehub.websocket.url says 'other' where another key says 'edge-node'",
        ),
        ({"edged.hostname-override": "other"}, "edged.hostname-override is 'other'; for the cloud the node is 'edge-"),
        ({"edgehub.quic.cafile": None}, "tlsCaFile is set to /etc/kubeedge/ca/rootCA.crt"),
    ],
)
def test_what_needs_a_look_is_remarked(changes: dict[str, Any], remark: str) -> None:
    assert any(remark in said for said in convert(old(**changes)).remarks)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"edgehub.controller.node-id": None, "edged.hostname-override": None}, r"^edgehub\.controller\.node-id: "),
        ({"edgehub.controller.node-id": "Edge_1"}, r"^edgehub\.controller\.node-id: got 'Edge_1'"),
        ({"edgehub.controller.protocol": "pigeon"}, r"^edgehub\.controller\.protocol: got 'pigeon'"),
        ({"edgehub.controller.heartbeat": "fast"}, r"^edgehub\.controller\.heartbeat: got 'fast', expected int"),
        ({"edgehub.websocket.url": None}, r"^edgehub\.websocket\.url: .*address of CloudHub"),
        ({"edgehub.websocket.url": "http://c:1/"}, r"^edgehub\.websocket\.url: got 'http://c:1/', expected wss://"),
        ({"edgehub.websocket.url": 7}, r"^edgehub\.websocket\.url: got 7"),
        ({"edgehub.websocket.handshake-timeout": 0}, r"^edgehub\.websocket\.handshake-timeout: got 0"),
        ({"mqtt.mode": 3}, r"^mqtt\.mode: got 3, expected one of 0, 1, 2"),
        ({"mqtt.qos": "high"}, r"^mqtt\.qos: got 'high'"),
    ],
)
def test_a_wrong_value_is_named_by_its_key_in_the_old_file(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        convert(old(**changes))


_LEAVES = st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.lists(st.integers(), max_size=2)
_KEYS = st.sampled_from(
    ["edgehub", "controller", "websocket", "quic", "url", "node-id", "mqtt", "server", "mode", "modules", "enabled"]
)


@given(st.recursive(_LEAVES, lambda inner: st.dictionaries(_KEYS | st.text(max_size=5), inner, max_size=5)))
def test_any_document_is_imported_or_one_config_error(document: Any) -> None:
    try:
        imported = convert(document)
    except ConfigError:
        return
    from_edgecore(imported.document)


@given(st.dictionaries(_KEYS, st.dictionaries(_KEYS, _LEAVES | st.dictionaries(_KEYS, _LEAVES, max_size=4))))
def test_any_values_in_the_known_places_are_imported_or_one_config_error(document: dict[str, Any]) -> None:
    try:
        convert(old() | document)
    except ConfigError:
        pass


def test_a_mapping_within_itself_is_a_config_error() -> None:
    document: dict[str, Any] = {"mqtt": {}}
    document["mqtt"]["mqtt"] = document
    with pytest.raises(ConfigError, match="at most 10 levels"):
        convert(document)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("modules", {"enabled": [{"eventbus": True}]}),
        ("modules", {"enabled": ["eventbus", ["websocket"]]}),
        ("edged", {"hostname-override": [["node"]]}),
        ("edgehub", {"controller": {"node-id": ["node"]}}),
    ],
)
def test_a_name_that_is_none_is_a_config_error(key: str, value: Any) -> None:
    document = {"edgehub": {"controller": {"node-id": "node"}, "websocket": {"url": "wss://c:1/p/n/events"}}}
    with pytest.raises(ConfigError) as fault:
        convert(document | {key: value}, cloud="1.16")
    assert fault.value.key in ("modules.enabled", "edged.hostname-override", "edgehub.controller.node-id")
