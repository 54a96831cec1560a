"""`edgezmq keys`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from runtime import keys
from runtime.cli import app
from runtime.config import NodeConfig, PolicyRule, PolicySection, RuntimeSection, store
from runtime.home import Home


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setenv("EDGEZMQ_HOME", str(tmp_path))
    return Home(tmp_path)


def call(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["keys", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_a_pair_is_made_with_all_that_the_other_host_needs_and_no_secret_shown(home: Home) -> None:
    said = call("make", "camera")
    pair = keys.load(home.curve / "camera.key_secret")
    broker = keys.load(home.curve / "broker.key_secret")
    assert pair.public in said
    assert f"EDGEZMQ_CURVE_SERVER={broker.public}" in said
    assert pair.secret not in said
    assert broker.secret not in said


def test_the_list_says_which_rule_admits_each_key(home: Home) -> None:
    assert "no keys yet" in call("list")
    call("make", "camera")
    call("make", "stray")
    public = keys.load(home.curve / "camera.key_secret").public
    rule = PolicyRule(keys=[public], to=["*"])
    config = NodeConfig(runtime=RuntimeSection(policy=PolicySection(enable=True, modules={"camera": rule})))
    store(config, home.prepare())
    rows = {row["name"]: row for row in json.loads(call("list", "--json"))}
    assert rows["camera"]["admitted_as"] == "camera"
    assert rows["stray"]["admitted_as"] == ""
    table = call("list")
    assert public in table
    assert "(the broker itself)" in table
