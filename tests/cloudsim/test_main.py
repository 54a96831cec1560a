from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from cloudsim.__main__ import main
from tests.support.deadline import DEADLINE

pytestmark = pytest.mark.processes
ROOT = Path(__file__).parents[2]


def start(directory: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "cloudsim", "--dir", str(directory), *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": "error"},
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_process_says_one_ready_line_serves_and_exits_cleanly(tmp_path: Path, number: signal.Signals) -> None:
    process = start(tmp_path / "cloud", "--port", "0", "--control-port", "0", "--node", "edge-a")
    assert process.stdout is not None
    try:
        word, _, facts = process.stdout.readline().partition(" ready ")
        ready = json.loads(facts)
        assert word == "cloudsim"
        assert json.loads((tmp_path / "cloud" / "ports.json").read_text())["port"] == ready["port"]
        with urllib.request.urlopen(f"http://127.0.0.1:{ready['control_port']}/health", timeout=DEADLINE) as answer:
            assert json.load(answer)["ok"] is True
        assert (tmp_path / "cloud" / "edge-a.key").stat().st_mode & 0o777 == 0o600
        process.send_signal(number)
        rest, errors = process.communicate(timeout=DEADLINE)
    finally:
        process.kill()
        process.communicate()
    assert (process.returncode, rest, errors) == (0, "", "")


def test_a_port_in_use_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for words in (["--port", str(port), "--control-port", "0"], ["--port", "0", "--control-port", str(port)]):
            assert main(["--dir", str(tmp_path), *words]) == 1
            error = capsys.readouterr().err
            assert "a port is in use" in error
            assert str(port) in error


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["--dir", str(tmp_path / "file" / "sub"), "--port", "0"]) == 1
    assert "Not a directory" in capsys.readouterr().err


def test_a_broken_ca_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ca.crt").write_text("no certificate")
    (tmp_path / "ca.key").write_text("no key")
    assert main(["--dir", str(tmp_path), "--port", "0"]) == 1
    assert str(tmp_path) in capsys.readouterr().err


def test_a_certificate_is_made_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cert", "edge-z", "--dir", str(tmp_path)]) == 0
    assert "edge-z.crt" in capsys.readouterr().out
    assert (tmp_path / "edge-z.key").exists()


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--dir", "x", "--port", "70000"],
        ["--dir", "x", "--keepalive", "0"],
        ["--dir", "x", "--node", "../x"],
        ["--dir", "x", "--hub-version", "1.0"],
        ["cert", "a/b", "--dir", "x"],
        ["cert", "ca", "--dir", "x"],
    ],
)
def test_wrong_usage_exits_with_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(words)
    assert exit_.value.code == 2
    assert "usage" in capsys.readouterr().err
