"""The launcher of the built-in broker, and the recommended mosquitto.conf."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from modules.eventbus.broker import NOT_INSTALLED, broker_config, candidates, find_python, how_to_install
from modules.eventbus.config import EventBusConfig
from runtime.config import EventBusExtras, EventBusSection, NodeConfig, RuntimeSection, store
from runtime.home import Home
from tests.support.mosquitto import Mosquitto, free_port

ROOT = Path(__file__).parents[3]


def test_amqtt_listens_where_the_configuration_says() -> None:
    config = broker_config(EventBusConfig(mode=0, server_internal="tcp://127.0.0.1:1999"))
    assert config["listeners"]["default"]["bind"] == "127.0.0.1:1999"
    config = broker_config(EventBusConfig(mode=0, server_internal="tcp://[::1]:1999"))
    assert config["listeners"]["default"]["bind"] == "[::1]:1999"


def test_amqtt_is_looked_for_beside_our_environment_and_then_in_it() -> None:
    assert candidates(EventBusConfig(), prefix="/x/.venv") == ["/x/.venv-amqtt/bin/python", sys.executable]
    assert candidates(EventBusConfig(broker_python="/other/python")) == ["/other/python"]


def test_an_interpreter_that_is_not_there_or_has_no_amqtt_is_not_taken(tmp_path: Path) -> None:
    assert find_python([str(tmp_path / "none"), "/bin/false"]) is None
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\nexit 0\n")
    fake.chmod(0o755)
    assert find_python(["/bin/false", str(fake)]) == str(fake)


def test_the_hint_names_the_commands() -> None:
    assert "pip install -r requirements-amqtt.txt" in how_to_install(EventBusConfig())
    assert "/other/python" in how_to_install(EventBusConfig(broker_python="/other/python"))


def launch(home: Home) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "EDGEZMQ_HOME": str(home.path)}
    return subprocess.run(
        [sys.executable, "-m", "modules.eventbus.broker"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def prepared(path: Path, **section: object) -> Home:
    home = Home(path).prepare()
    own = EventBusExtras(broker_python=str(path / "no-python"))
    config = NodeConfig(
        node_name="n1", event_bus=EventBusSection(**section), runtime=RuntimeSection(eventbus=own)  # type: ignore[arg-type]
    )  # fmt: skip
    store(config, home)
    return home


@pytest.mark.parametrize("section", [{"mqtt_mode": 2}, {"mqtt_mode": 0, "enable": False}], ids=str)
def test_it_exits_0_where_nobody_asked_for_it(tmp_path: Path, section: dict[str, object]) -> None:
    ended = launch(prepared(tmp_path, **section))
    assert ended.returncode == 0
    assert "not asked for" in ended.stderr


def test_it_says_so_when_amqtt_is_not_installed(tmp_path: Path) -> None:
    ended = launch(prepared(tmp_path, mqtt_mode=0))
    assert ended.returncode == NOT_INSTALLED
    assert "no-python" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.mosquitto
def test_mosquitto_takes_the_recommended_configuration(tmp_path: Path) -> None:
    port = free_port()
    recommended = (ROOT / "deploy" / "mosquitto.conf").read_text()
    lines = recommended.replace("listener 1883", f"listener {port}").replace("/var/lib/mosquitto/", f"{tmp_path}/")
    broker = Mosquitto(tmp_path / "m", port=port)
    broker.config.write_text(lines + ("user root\n" if os.geteuid() == 0 else ""))
    with broker:
        pass
    assert "Error" not in broker.log.read_text()
