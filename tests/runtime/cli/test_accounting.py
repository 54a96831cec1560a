"""`edgezmq ledger`: what people and programs are shown."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from runtime.cli import accounting as command
from runtime.home import HOME_VARIABLE, Home
from runtime.ledger import OutboxLedger, compose
from tests.runtime.test_ledger import COUNTERS, lane, outbox_file


def shown(document: dict[str, Any]) -> str:
    out = io.StringIO()
    command.render({"problems": [], **document}, Console(file=out, width=200, color_system=None))
    return out.getvalue()


def test_a_node_that_is_down_shows_what_its_file_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path))
    with outbox_file(Home(tmp_path).prepare().data / "outbox.db"):
        pass
    assert command.show(as_json=True) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["dropped_messages"] == 2
    assert document["problems"][0].startswith("only the outbox file is shown")
    assert command.show(as_json=False) == 0
    text = capsys.readouterr().out
    assert "2  too-old, data, 14 B" in text
    assert 'from eventbus: {"n":1}' in text
    assert "stored, waiting for the cloud: 3 data" in text


def test_a_file_that_cannot_be_read_is_a_problem_and_no_traceback(tmp_path: Path) -> None:
    home = Home(tmp_path).prepare()
    (home.data / "outbox.db").write_bytes(b"no database " * 1000)
    assert any("cannot be read" in problem for problem in command.collect(home)["problems"])


def test_the_table_shows_each_lane_and_the_verdict() -> None:
    bus = {"modules": [{"name": "edgehub", "counters": COUNTERS}], "accounts": [lane()]}
    text = shown(compose(bus, None))
    assert "eventbus → @hub" in text
    assert "edgehub → cloud" in text
    assert "the accounts close" in text
    assert "dropped by the MQTT broker (since its start): unknown" in text


def test_missing_messages_are_marked_and_change_the_verdict() -> None:
    bus = {"modules": [{"name": "edgehub", "counters": {**COUNTERS, "held": 1}}], "accounts": []}
    text = shown(compose(bus, None))
    assert "≠ 3 missing" in text
    assert "THE ACCOUNTS DO NOT CLOSE" in text


def test_an_example_cannot_move_the_cursor() -> None:
    example = {"at_ms": 0, "reason": "too-old", "class": "data", "sender": "x", "head": "\x1b[2J"}
    assert "\x1b" not in shown(compose(None, OutboxLedger(examples=[example])))
