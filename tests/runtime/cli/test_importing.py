"""`edgezmq config import` as a command."""

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from runtime.cli import app, settings
from runtime.cli.importing import FileExists
from tests.runtime.test_edge2019 import SHIPPED


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEZMQ_HOME", str(tmp_path / "home"))
    (tmp_path / "edge.yaml").write_text(SHIPPED)
    return tmp_path / "home"


def test_the_file_is_written_where_up_looks_for_it_and_only_its_owner_can_read_it(home: Path) -> None:
    old = home.parent / "edge.yaml"
    (old.parent / "modules.yaml").write_text("modules: {enabled: [websocket]}")
    result = CliRunner().invoke(app, ["config", "import", str(old)], catch_exceptions=False)
    assert result.exit_code == 0
    new = home / "edgecore.yaml"
    assert new.stat().st_mode & 0o777 == 0o600
    config, _ = settings.read(new)
    assert config.node_name == "edge-node"
    assert not config.event_bus.enable, "modules.yaml beside it was read"
    assert "not carried over: mesh.loadbalance.strategy-name: edgezmq has no service mesh" in result.stderr
    assert "note: CloudHub's certificate is verified now" in result.stderr


def test_a_file_that_is_there_is_replaced_only_when_told_to(home: Path) -> None:
    new = home.parent / "new.yaml"
    new.write_text("mine")
    arguments = ["config", "import", str(home.parent / "edge.yaml"), "-o", str(new)]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, FileExists)
    assert "--force replaces it" in str(result.exception)
    assert new.read_text() == "mine"
    assert CliRunner().invoke(app, [*arguments, "--force"]).exit_code == 0
    assert settings.read(new)[0].node_name == "edge-node"


def test_the_new_file_can_be_looked_at_first(home: Path) -> None:
    result = CliRunner().invoke(app, ["config", "import", str(home.parent / "edge.yaml"), "-o", "-", "--cloud", "1.17"])
    assert yaml.safe_load(result.stdout)["modules"]["edged"] == {"hostnameOverride": "edge-node"}
    assert not home.exists()
