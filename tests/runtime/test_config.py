"""runtime.config and runtime.edgecore: KubeEdge's file as it is, our section, and what is said of mistakes."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.config import EdgeHubSection, NodeConfig, RuntimeSection, load, store
from runtime.edgecore import from_edgecore
from runtime.errors import ConfigError
from runtime.home import Home

EXAMPLE = Path(__file__).parents[2] / "edgecore.example.yaml"

KEADM_FILE = """
apiVersion: edgecore.config.kubeedge.io/v1alpha2
database:
  aliasName: default
  dataSource: /var/lib/kubeedge/edgecore.db
  driverName: sqlite3
kind: EdgeCore
modules:
  dbTest: {enable: false}
  deviceTwin: {dmiSockPath: /etc/kubeedge/dmi.sock, enable: true}
  edgeHub:
    enable: true
    heartbeat: 15
    httpServer: https://192.0.2.10:10002
    messageBurst: 60
    messageQPS: 30
    projectID: e632aba927ea4ac2b575ec1603d56f10
    quic: {enable: false, handshakeTimeout: 30, readDeadline: 15, server: 192.0.2.10:10001, writeDeadline: 15}
    rotateCertificates: true
    tlsCaFile: /etc/kubeedge/ca/rootCA.crt
    tlsCertFile: /etc/kubeedge/certs/server.crt
    tlsPrivateKeyFile: /etc/kubeedge/certs/server.key
    token: ""
    websocket: {enable: true, handshakeTimeout: 30, readDeadline: 15, server: 192.0.2.10:10000, writeDeadline: 15}
  edgeStream: {enable: false, server: 192.0.2.10:10004}
  edged:
    enable: true
    hostnameOverride: edge-7
    tailoredKubeletConfig: {cgroupDriver: systemd, clusterDNS: [169.254.96.16]}
  eventBus:
    enable: true
    eventBusTLS: {enable: false, tlsMqttCAFile: /etc/kubeedge/ca/rootCA.crt}
    mqttMode: 2
    mqttPassword: ""
    mqttPubClientID: ""
    mqttQOS: 0
    mqttRetain: false
    mqttServerExternal: tcp://127.0.0.1:1883
    mqttServerInternal: tcp://127.0.0.1:1884
    mqttSessionQueueSize: 100
    mqttSubClientID: ""
    mqttUsername: ""
  metaManager: {enable: true, contextSendGroup: hub, remoteQueryTimeout: 60}
  serviceBus: {enable: false, port: 9060, server: 127.0.0.1, timeout: 60}
  taskManager: {enable: false}
"""


def read(text: str) -> tuple[NodeConfig, list[str]]:
    return from_edgecore(yaml.safe_load(text))


def refused(text: str) -> str:
    with pytest.raises(ConfigError) as fault:
        read(text)
    return str(fault.value)


# --- KubeEdge's file --------------------------------------------------------------------------------


def test_a_file_that_keadm_wrote_is_read_as_it_is() -> None:
    config, warnings = read(KEADM_FILE)
    assert config.node_name == "edge-7"
    assert config.edge_hub.websocket.server == "192.0.2.10:10000"
    assert (config.edge_hub.message_qps, config.edge_hub.message_burst) == (30, 60)
    assert config.event_bus.mqtt_mode == 2
    assert warnings == [
        "not run by edgezmq, and ignored: modules.deviceTwin, modules.edged, modules.metaManager, database"
    ]


def test_what_is_not_in_the_file_has_the_default_of_kubeedge() -> None:
    config, _ = from_edgecore({"modules": {"edged": {"hostnameOverride": "n"}}})
    assert config == NodeConfig(node_name="n")
    assert config.edge_hub.tls_cert_file == "/etc/kubeedge/certs/server.crt"
    assert config.event_bus.mqtt_server_external == "tcp://127.0.0.1:1883"


def test_a_key_without_a_value_is_the_default_as_go_reads_it() -> None:
    config, _ = read("modules:\n  edgeHub:\n    heartbeat:\n    websocket:\n  eventBus:\n")
    assert config.edge_hub == EdgeHubSection()


def test_an_empty_file_is_a_node_with_the_hosts_name_and_says_so() -> None:
    config, warnings = from_edgecore(None)
    assert warnings == [f"modules.edged.hostnameOverride is not set: the node is called {config.node_name!r}"]


@pytest.mark.parametrize(("version", "semantics"), [("2019", "head"), ("1.17", "2019"), ("1.16", "2019")])
def test_uploads_of_one_age_to_a_cloud_of_another_are_warned_of(version: str, semantics: str) -> None:
    text = f"{{edgehub: {{hubVersion: '{version}'}}, eventbus: {{semantics: '{semantics}'}}}}"
    _, warnings = read(f"{{modules: {{edged: {{hostnameOverride: e}}}}, runtime: {text}}}")
    assert len(warnings) == 1
    assert "uploads of MQTT messages are then lost in the cloud" in warnings[0]
    _, warnings = read(f"modules: {{edged: {{hostnameOverride: e}}, eventBus: {{enable: false}}}}\nruntime: {text}")
    assert warnings == []


def test_relative_paths_are_taken_from_the_files_directory() -> None:
    config, _ = from_edgecore({"modules": {"edgeHub": {"tlsCaFile": "pki/ca.crt"}}}, directory=Path("/etc/node"))
    assert config.edge_hub.tls_ca_file == "/etc/node/pki/ca.crt"
    assert config.edge_hub.tls_cert_file == "/etc/kubeedge/certs/server.crt"
    assert config.runtime.edgehub.proxy_ca_file == "", "what is not given stays so"
    text = "runtime: {edgehub: {proxy: 'http://u@p:1', proxyPasswordFile: secret, proxyCaFile: /ca.crt}}"
    extra = from_edgecore(yaml.safe_load(text), directory=Path("/etc/node"))[0].runtime.edgehub
    assert (extra.proxy_password_file, extra.proxy_ca_file) == ("/etc/node/secret", "/ca.crt")


# --- mistakes: key, value, rule ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind: CloudCore", "kind: got 'CloudCore', expected EdgeCore"),
        (
            "apiVersion: edgecore.config.kubeedge.io/v1alpha1",
            "apiVersion: got 'edgecore.config.kubeedge.io/v1alpha1', expected edgecore.config.kubeedge.io/v1alpha2",
        ),
        ("runtmie: {}", "runtmie: got {}, expected a known key (did you mean runtime?)"),
        ("[1, 2]", "edgecore.yaml: got [1, 2], expected a mapping of keys to values"),
        ("modules: 7", "modules: got 7, expected a mapping of keys to values"),
        ("modules: {edgehub: {}}", "modules.edgehub: got {}, expected a module of KubeEdge (did you mean edgeHub?)"),
        (
            "modules: {edgeHub: {hartbeat: 15}}",
            "modules.edgeHub.hartbeat: got 15, expected a known key (did you mean heartbeat?)",
        ),
        ("modules: {edgeHub: {heartbeat: fast}}", "modules.edgeHub.heartbeat: got 'fast', expected int"),
        ("modules: {edgeHub: {heartbeat: 0}}", "modules.edgeHub.heartbeat: got 0, expected int >= 1"),
        ("modules: {edgeHub: {messageQPS: -1}}", "modules.edgeHub.messageQPS: got -1, expected int >= 0"),
        ("modules: {eventBus: {mqttMode: 3}}", "modules.eventBus.mqttMode: got 3, expected one of 0, 1, 2"),
        ("modules: {eventBus: {mqttRetain: 1}}", "modules.eventBus.mqttRetain: got 1, expected bool"),
        (
            "modules: {edgeHub: {websocket: {server: cloud}}}",
            "modules.edgeHub.websocket.server: got 'cloud', expected host:port with a port of 1 to 65535",
        ),
        (
            "runtime: {edgehub: {endpoints: ['a:1', 'b:70000']}}",
            "runtime.edgehub.endpoints[1]: got 'b:70000', expected host:port with a port of 1 to 65535",
        ),
        (
            "runtime: {edgehub: {endpoints: ['a b:1']}}",
            "runtime.edgehub.endpoints[0]: got 'a b:1', expected host:port with a port of 1 to 65535",
        ),
        (
            "runtime: {edgehub: {proxy: 'http://u:hunter2@proxy'}}",
            "runtime.edgehub.proxy: got 'http://…@proxy', "
            "expected http://[USER[:PASSWORD]@]HOST:PORT, or the same with https",
        ),
        ("runtime: {edgehub: {proxy: [hunter2]}}", "runtime.edgehub.proxy: got '(hidden)', expected str"),
        (
            "{modules: {edgeHub: {websocket: {enable: false}, quic: {enable: true}}}, "
            "runtime: {edgehub: {proxy: 'http://u:hunter2@proxy:1'}}}",
            "runtime.edgehub.proxy: got 'http://proxy:1', expected no proxy with QUIC, which is UDP: use the websocket",
        ),
        (
            "runtime: {edgehub: {proxy: 'http://proxy:1', proxyPasswordFile: /secret}}",
            "runtime.edgehub.proxyPasswordFile: got '/secret', "
            "expected a USER and no PASSWORD in runtime.edgehub.proxy beside it",
        ),
        (
            "runtime: {modules: {cam: {group: [x]}}}",
            "runtime.modules.cam.group: got ['x'], expected a known key (did you mean groups?)",
        ),
        (
            "runtime: {bus: {endpoint: 'udp://1.2.3.4:5'}}",
            "runtime.bus.endpoint: got 'udp://1.2.3.4:5', expected ipc://PATH or tcp://HOST:PORT",
        ),
        (
            "modules: {edged: {hostnameOverride: Edge_1}}",
            "modules.edged.hostnameOverride: got 'Edge_1', "
            "expected a node name: lower-case letters, digits, `-` and `.` (RFC 1123)",
        ),
    ],
)
def test_a_wrong_setting_is_named_with_its_value_and_the_rule(text: str, message: str) -> None:
    assert refused(text) == message


def test_a_far_off_key_gets_the_list_of_known_ones() -> None:
    known = "known are broker, bus, edgehub, eventbus, log, metrics, modules, policy, watchdog"
    assert known in refused("runtime: {zzz: 1}")


@pytest.mark.parametrize(("websocket", "quic", "which"), [(True, True, "both"), (False, False, "neither")])
def test_exactly_one_transport_is_enabled(websocket: bool, quic: bool, which: str) -> None:
    text = f"modules: {{edgeHub: {{websocket: {{enable: {websocket}}}, quic: {{enable: {quic}}}}}}}"
    assert refused(text) == (
        f"modules.edgeHub: got '{which} of websocket.enable and quic.enable', expected exactly one of them true"
    )


def test_with_edgehub_switched_off_its_transports_do_not_matter() -> None:
    config, _ = read("modules: {edgeHub: {enable: false, quic: {enable: true}}}")
    assert "edgehub" not in config.declared_modules()


def test_a_heartbeat_that_leaves_no_room_for_a_late_one_is_refused() -> None:
    assert "at most half of runtime.edgehub.keepaliveLimit (30 s)" in refused("modules: {edgeHub: {heartbeat: 16}}")


def test_a_secret_of_the_wrong_type_is_not_shown() -> None:
    said = refused("modules: {eventBus: {mqttPassword: [hunter2]}}")
    assert "hunter2" not in said
    assert said == "modules.eventBus.mqttPassword: got '(hidden)', expected str"


@pytest.mark.parametrize("name", ["broker", "cloud", "a b", "-x"])
def test_a_declared_module_needs_a_free_and_proper_name(name: str) -> None:
    assert f"runtime.modules.{name}: got {name!r}" in refused(f"runtime: {{modules: {{'{name}': {{}}}}}}")


# --- declared modules -------------------------------------------------------------------------------


def test_enabled_modules_are_declared_with_their_groups() -> None:
    config, _ = read("runtime: {modules: {cam: {groups: [twin, meta]}, eventbus: {groups: [extra]}}}")
    assert config.declared_modules() == {
        "edgehub": frozenset({"hub"}),
        "eventbus": frozenset({"bus", "extra"}),
        "cam": frozenset({"twin", "meta"}),
    }


def test_a_module_that_configuration_disables_is_not_declared() -> None:
    config, _ = read("modules: {eventBus: {enable: false}}\nruntime: {modules: {cam: {enable: false}}}")
    assert config.declared_modules().keys() == {"edgehub"}


# --- node.json --------------------------------------------------------------------------------------


def test_what_is_stored_is_what_is_loaded_and_nobody_else_can_read_it(tmp_path: Path) -> None:
    home = Home(tmp_path).prepare()
    config, _ = read(KEADM_FILE + "runtime: {modules: {cam: {groups: [twin]}}, broker: {graceSeconds: 2}}")
    store(config, home)
    store(config, home)
    assert load(tmp_path) == config
    assert home.node_json.stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in home.run.iterdir()) == ["node.json"]


def test_without_a_stored_configuration_there_are_defaults(tmp_path: Path) -> None:
    assert load(tmp_path) == NodeConfig()


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"node_name": 7}', b"\xff\xfe"])
def test_a_damaged_node_json_is_named_with_what_to_do(tmp_path: Path, data: bytes) -> None:
    home = Home(tmp_path).prepare()
    home.node_json.write_bytes(data)
    with pytest.raises(ConfigError, match="run it again") as fault:
        load(tmp_path)
    assert fault.value.key == str(home.node_json)


# --- the example ------------------------------------------------------------------------------------


def test_the_example_shows_every_key_of_ours_with_its_default() -> None:
    lines = EXAMPLE.read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("# runtime:"))
    section = yaml.safe_load("\n".join(line.removeprefix("# ") for line in lines[start:]))["runtime"]
    assert section.pop("modules") == {"thermostat": {"groups": ["twin"]}}
    defaults = msgspec.to_builtins(RuntimeSection())
    del defaults["modules"]
    assert section == defaults


def test_the_example_is_valid() -> None:
    config, warnings = from_edgecore(yaml.safe_load(EXAMPLE.read_text()))
    assert config.node_name == "edge-1"
    assert warnings == []


# --- anything at all --------------------------------------------------------------------------------

_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["modules", "runtime", "edgeHub", "eventBus", "websocket", "broker", "groups", "enable", "x"]
            )
            | st.integers(),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(_values)
def test_any_document_is_a_configuration_or_one_config_error(document: Any) -> None:
    try:
        config, warnings = from_edgecore(document)
    except ConfigError:
        return
    assert isinstance(config, NodeConfig)
    assert all(isinstance(warning, str) for warning in warnings)


# --- the documentation ------------------------------------------------------------------------------


def test_the_documentation_names_every_key_of_ours() -> None:
    text = (EXAMPLE.parent / "docs" / "configuration.md").read_text()
    missing = [
        f"{section}.{key}"
        for section, keys in msgspec.to_builtins(RuntimeSection()).items()
        for key in keys
        if f"`{key}`" not in text
    ]
    assert missing == []
