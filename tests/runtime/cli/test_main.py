"""The command as an operator meets it: help, and errors in one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtime import __version__
from runtime.home import Home
from runtime.locks import hold


def edgezmq(home: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    environ = {key: value for key, value in os.environ.items() if not key.startswith("EDGEZMQ_")}
    return subprocess.run(
        [sys.executable, "-m", "runtime.cli", *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env={**environ, "EDGEZMQ_HOME": str(home), "COLUMNS": "200"},
    )


def test_help_names_every_command(tmp_path: Path) -> None:
    done = edgezmq(tmp_path, "--help")
    assert done.returncode == 0
    for command in (
        "up",
        "down",
        "join",
        "status",
        "restart",
        "logs",
        "tap",
        "send",
        "check",
        "demo",
        "exec",
        "version",
    ):
        assert f" {command} " in done.stdout


def test_the_version_is_printed(tmp_path: Path) -> None:
    assert edgezmq(tmp_path, "version").stdout == f"edgezmq {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["up", "-c", "/none.yaml"], "edgezmq: /none.yaml: no such file\n"),
        (["restart", "edgehub"], "no node runs on"),
        (["logs", "edgehub"], "no node has run there yet"),
        (["tap"], "no answer from the broker at ipc://"),
        (["send", "a b", "-r", "x"], "edgezmq: 'a b' is no name"),
    ],
)
def test_a_mistake_is_one_line_and_status_1(tmp_path: Path, arguments: list[str], said: str) -> None:
    done = edgezmq(tmp_path, *arguments)
    assert done.returncode == 1
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_wrong_key_stops_up_before_anything_is_started(tmp_path: Path) -> None:
    (tmp_path / "edgecore.yaml").write_text("runtime: {broker: {byteBudgt: 1}}")
    done = edgezmq(tmp_path, "up")
    assert done.returncode == 1
    assert done.stderr == (
        "edgezmq: runtime.broker.byteBudgt: got 1, expected a known key (did you mean byteBudget?)\n"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["edgecore.yaml"]


def test_a_second_node_on_one_home_is_refused_with_what_to_do(tmp_path: Path) -> None:
    home = Home(tmp_path).prepare()
    (tmp_path / "edgecore.yaml").write_text("modules: {edged: {hostnameOverride: edge-1}}")
    with hold(home.lock("node")):
        done = edgezmq(tmp_path, "up")
    assert done.returncode == 1
    assert f"a node runs on {tmp_path} already (supervisord, pid {os.getpid()})" in done.stderr
    assert "set EDGEZMQ_HOME to another directory" in done.stderr


def test_down_and_status_without_a_node_say_so(tmp_path: Path) -> None:
    done = edgezmq(tmp_path, "down")
    assert (done.returncode, done.stderr) == (0, f"edgezmq: no node runs on {tmp_path}\n")
    done = edgezmq(tmp_path, "status", "--json")
    assert done.returncode == 3
    assert '"running": false' in done.stdout
