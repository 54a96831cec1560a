"""`edgezmq exec`: a foreign command as a child of supervisord."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.errors import InvalidName
from runtime.exec import parse
from runtime.home import Home
from runtime.locks import hold


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--", "sleep", "1"], (None, ["sleep", "1"])),
        (["sleep", "1"], (None, ["sleep", "1"])),
        (["--name", "cam", "--", "cam", "--", "x"], ("cam", ["cam", "--", "x"])),
        (["--name=cam", "cam"], ("cam", ["cam"])),
    ],
)
def test_name_and_command_are_told_apart(arguments: list[str], expected: tuple[str | None, list[str]]) -> None:
    assert parse(arguments) == expected


@pytest.mark.parametrize("arguments", [[], ["--"], ["--nme", "x", "--", "y"], ["--name"]])
def test_a_wrong_call_is_refused(arguments: list[str]) -> None:
    with pytest.raises(ValueError):
        parse(arguments)


def test_a_wrong_name_is_refused() -> None:
    with pytest.raises(InvalidName):
        parse(["--name", "a b", "--", "x"])


def run_exec(home: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "runtime.exec", *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "EDGEZMQ_HOME": str(home)},
    )


@pytest.mark.processes
def test_it_becomes_the_command_and_gives_its_exit_status(tmp_path: Path) -> None:
    done = run_exec(tmp_path, "--", "sh", "-c", "echo hello; exit 7")
    assert (done.stdout, done.returncode) == ("hello\n", 7)


@pytest.mark.processes
def test_a_missing_command_and_a_taken_name_are_said_in_one_line(tmp_path: Path) -> None:
    home = Home(tmp_path).prepare()
    done = run_exec(tmp_path, "--", "no-such-command")
    assert (done.returncode, done.stderr) == (127, "edgezmq exec: no-such-command: No such file or directory\n")
    with hold(home.lock("cam")):
        done = run_exec(tmp_path, "--name", "cam", "--", "true")
    assert done.returncode == 1
    assert done.stderr == f"edgezmq exec: {home.lock('cam')} is held by pid {os.getpid()}: it is already running\n"
