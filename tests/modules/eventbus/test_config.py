"""Settings of eventbus: KubeEdge's section read as it is, ours checked."""

from __future__ import annotations

import pytest

from modules.eventbus.config import EventBusConfig, Server, TlsFiles, from_node, parse_server
from modules.eventbus.topics import Semantics
from runtime.config import EventBusExtras, EventBusSection, EventBusTlsSection, NodeConfig, RuntimeSection
from runtime.errors import ConfigError


def test_the_defaults_are_kubeedges() -> None:
    config = from_node(NodeConfig(node_name="n1"))
    assert config.mode == 2
    assert config.semantics is Semantics.HEAD
    assert config.servers() == (Server(name="external", host="127.0.0.1", port=1883),)
    assert not config.wants_internal


def test_every_key_of_the_section_arrives() -> None:
    section = EventBusSection(
        mqtt_mode=1,
        mqtt_server_external="ssl://mqtt.example:8884",
        mqtt_server_internal="tcp://127.0.0.1:1999",
        mqtt_session_queue_size=7,
        mqtt_sub_client_id="my-id",
        mqtt_username="u",
        mqtt_password="p",
        event_bus_tls=EventBusTlsSection(
            enable=True, tls_mqtt_ca_file="ca", tls_mqtt_cert_file="crt", tls_mqtt_private_key_file="key"
        ),
    )
    own = EventBusExtras(semantics="2019", protocol="3.1.1", receive_window=5, publish_window=6, broker_python="py")
    config = from_node(NodeConfig(node_name="n1", event_bus=section, runtime=RuntimeSection(eventbus=own)))
    external, internal = config.servers()
    assert external == Server(
        name="external",
        host="mqtt.example",
        port=8884,
        tls=TlsFiles("ca", "crt", "key"),
        username="u",
        password="p",
        protocol="3.1.1",
    )
    assert internal == Server(name="internal", host="127.0.0.1", port=1999, protocol="3.1.1")
    assert config.wants_internal
    assert config.session_client_id == "my-id"
    assert (config.semantics, config.protocol) == (Semantics.Y2019, "3.1.1")
    assert (config.receive_window, config.publish_window, config.broker_python) == (5, 6, "py")


def test_D_V_5_the_client_id_is_made_of_the_nodes_name_and_so_is_the_same_after_every_start() -> None:
    assert EventBusConfig(node_name="n1").session_client_id == "hub-client-sub-n1"
    assert EventBusConfig(node_name="n1").session_client_id == EventBusConfig(node_name="n1").session_client_id


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("tcp://127.0.0.1:1883", ("127.0.0.1", 1883, False)),
        ("tcp://broker", ("broker", 1883, False)),
        ("mqtt://broker:99", ("broker", 99, False)),
        ("ssl://broker", ("broker", 8883, True)),
        ("tls://[::1]:1", ("::1", 1, True)),
        ("mqtts://broker/", ("broker", 8883, True)),
    ],
)
def test_addresses(url: str, expected: tuple[str, int, bool]) -> None:
    assert parse_server("mqttServerExternal", url) == expected


@pytest.mark.parametrize(
    "url", ["", "127.0.0.1:1883", "ws://x:1", "tcp://", "tcp://x:0", "tcp://x:99999", "tcp://x:y", "tcp://x/path"]
)
def test_a_wrong_address_names_key_value_and_rule(url: str) -> None:
    with pytest.raises(ConfigError) as fault:
        EventBusConfig(server_external=url)
    assert fault.value.key == "modules.eventBus.mqttServerExternal"
    assert fault.value.value == url
    assert "HOST" in fault.value.rule


def test_a_password_in_the_address_is_not_shown() -> None:
    with pytest.raises(ConfigError) as fault:
        EventBusConfig(server_external="tcp://user:geheim@host:1")
    assert "geheim" not in str(fault.value)
    assert "mqttUsername" in str(fault.value)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"mode": 3}, "modules.eventBus.mqttMode"),
        ({"protocol": "4"}, "runtime.eventbus.protocol"),
        ({"receive_window": 0}, "runtime.eventbus.receiveWindow"),
        ({"publish_window": 65536}, "runtime.eventbus.publishWindow"),
        ({"keepalive_seconds": 1}, "runtime.eventbus.keepaliveSeconds"),
        ({"session_expiry_seconds": -1}, "runtime.eventbus.sessionExpirySeconds"),
        ({"reconnect_max_seconds": 0.1}, "runtime.eventbus.reconnectMaxSeconds"),
        ({"mode": 0, "server_internal": "ssl://127.0.0.1:1884"}, "modules.eventBus.mqttServerInternal"),
    ],
)
def test_values_out_of_range_are_named(values: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError) as fault:
        EventBusConfig(**values)  # type: ignore[arg-type]
    assert fault.value.key == key


def test_D_V_9_tls_asked_for_and_an_address_in_clear_is_an_error() -> None:
    with pytest.raises(ConfigError, match="ssl://"):
        EventBusConfig(server_external="tcp://broker:1883", tls=TlsFiles())


def test_D_V_9_an_ssl_address_without_files_is_verified_against_the_systems_certificates() -> None:
    (server,) = EventBusConfig(server_external="ssl://broker:8883").servers()
    assert server.tls == TlsFiles()


def test_only_the_servers_of_the_mode_are_checked_and_used() -> None:
    assert [s.name for s in EventBusConfig(mode=0, server_external="nonsense").servers()] == ["internal"]
    assert [s.name for s in EventBusConfig(mode=1).servers()] == ["external", "internal"]
    assert [s.name for s in EventBusConfig(mode=2, server_internal="nonsense").servers()] == ["external"]


def test_the_built_in_broker_is_dialled_with_the_one_version_it_speaks() -> None:
    assert [server.protocol for server in EventBusConfig(mode=1).servers()] == ["auto", "3.1.1"]
    assert [server.protocol for server in EventBusConfig(mode=1, protocol="5").servers()] == ["5", "5"]


def test_a_server_does_not_show_its_password() -> None:
    assert "geheim" not in repr(Server(name="external", host="h", port=1, username="u", password="geheim"))
