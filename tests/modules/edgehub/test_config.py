from typing import Any

import pytest

from modules.edgehub.config import EdgeHubConfig, Endpoint
from modules.edgehub.dialect import TREE_2019
from modules.edgehub.link import make_link
from runtime.config import (
    EdgeHubExtras,
    EdgeHubSection,
    NodeConfig,
    QuicSection,
    RuntimeSection,
    WebsocketSection,
)
from runtime.errors import ConfigError
from runtime.proxy import Proxy


def config(**values: Any) -> EdgeHubConfig:
    given: dict[str, Any] = {"node_name": "edge-1", "endpoints": (Endpoint("cloud", 10000),)}
    return EdgeHubConfig(**given | values)


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [("1.2.3.4:10000", "1.2.3.4", 10000), ("cloud.example:1", "cloud.example", 1), ("[::1]:65535", "::1", 65535)],
)
def test_an_endpoint_is_host_and_port(text: str, host: str, port: int) -> None:
    endpoint = Endpoint.parse(text, "key")
    assert endpoint == Endpoint(host, port)
    assert str(endpoint) == text


@pytest.mark.parametrize(
    "text",
    ["", "cloud", ":10000", "cloud:", "cloud:0", "cloud:65536", "cloud:x", "::1:10000", "wss://c:1", "c:-1", "a b:1"],
)
def test_anything_else_names_key_value_and_rule(text: str) -> None:
    with pytest.raises(ConfigError, match=r"some\.key.*host:port") as fault:
        Endpoint.parse(text, "some.key")
    assert fault.value.value == text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("node_name", ""),
        ("node_name", "a/b"),
        ("node_name", "a b"),
        ("node_name", "x" * 254),
        ("endpoints", ()),
        ("heartbeat_seconds", 16.0),
        ("heartbeat_seconds", 0.0),
        ("greeting_seconds", -1.0),
        ("message_qps", -1.0),
        ("message_burst", -1),
        ("max_content_depth", 10_000),
        ("memory_messages", 0),
        ("window_bytes_max", 1000),
    ],
)
def test_a_wrong_setting_is_refused(key: str, value: Any) -> None:
    with pytest.raises(ConfigError):
        config(**{key: value})


def test_the_sections_of_edgecore_yaml_become_one_value() -> None:
    node = NodeConfig(
        node_name="edge-1",
        edge_hub=EdgeHubSection(heartbeat=10, message_qps=7, websocket=WebsocketSection(server="cloud:10000")),
        runtime=RuntimeSection(
            edgehub=EdgeHubExtras(
                endpoints=["other:10000"], memory_bytes=2**20, proxy="http://me@proxy:3128", proxy_password_file="/p"
            )
        ),
    )
    made = EdgeHubConfig.from_node(node)
    assert made.endpoints == (Endpoint("cloud", 10000), Endpoint("other", 10000))
    assert (made.protocol, made.heartbeat_seconds, made.message_qps) == ("websocket", 10.0, 7.0)
    assert made.memory_bytes == 2**20
    assert made.proxy == Proxy("proxy", 3128, user="me")
    assert made.proxy_password_file == "/p"


def test_the_protocol_switch() -> None:
    quic = NodeConfig(
        node_name="e",
        edge_hub=EdgeHubSection(
            websocket=WebsocketSection(enable=False), quic=QuicSection(enable=True, server="cloud:10001")
        ),
    )
    made = EdgeHubConfig.from_node(quic)
    assert (made.protocol, made.endpoints) == ("quic", (Endpoint("cloud", 10001),))


@pytest.mark.parametrize("enabled", [True, False])
def test_both_or_neither_protocol_is_refused(enabled: bool) -> None:
    node = NodeConfig(
        node_name="e",
        edge_hub=EdgeHubSection(websocket=WebsocketSection(enable=enabled), quic=QuicSection(enable=enabled)),
    )
    with pytest.raises(ConfigError, match="exactly one"):
        EdgeHubConfig.from_node(node)


def test_no_older_cloud_has_our_quic() -> None:
    with pytest.raises(ConfigError, match=r"hubVersion: got '2019', expected 1.17 with QUIC"):
        config(protocol="quic", dialect=TREE_2019)


def test_the_factory_makes_the_adapter_and_refuses_a_wrong_type() -> None:
    assert type(make_link(config())).__name__ == "WebSocketLink"
    assert type(make_link(config(protocol="quic"))).__name__ == "QuicLink"
    with pytest.raises(ConfigError, match=r"protocol: got 'carrier pigeon', expected 'websocket' or 'quic'"):
        make_link(config(protocol="carrier pigeon"))
