"""`edgezmq exec`: a foreign command as a child of supervisord."""

import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.confine import Limits
from runtime.errors import ConfigError, InvalidName
from runtime.exec import User, environment_of, find_user, limits_of, parse
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
    call = parse(arguments)
    assert (call.name, call.command) == expected


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--"],
        ["--nme", "x", "--", "y"],
        ["--name"],
        ["--name", "--", "x"],
        ["-name", "x", "--", "y"],
        ["--memory", "64M", "--", "y"],
        ["--user", "nobody", "--", "y"],
        ["--name", "x", "--group", "nogroup", "--", "y"],
    ],
)
def test_a_wrong_call_is_refused(arguments: list[str]) -> None:
    with pytest.raises(ValueError):
        parse(arguments)


def test_a_wrong_name_is_refused() -> None:
    with pytest.raises(InvalidName):
        parse(["--name", "a b", "--", "x"])


def test_limits_are_read_from_the_options() -> None:
    call = parse(["--name=cam", "--memory", "64M", "--cpu=50%", "--pids", "32", "--cpu-weight", "10", "--", "cam"])
    assert limits_of(call.options) == Limits(memory_bytes=2**26, cpu=0.5, pids=32, cpu_weight=10)
    assert limits_of({"name": "cam", "user": "nobody"}) is None
    with pytest.raises(ConfigError, match="--memory: got '64Q'"):
        limits_of({"memory": "64Q"})


def test_a_user_is_one_of_this_host_or_a_number_and_not_root() -> None:
    nobody = pwd.getpwnam("nobody")
    assert find_user({}) is None
    assert find_user({"user": "nobody"}) == User(nobody.pw_uid, nobody.pw_gid, "nobody", nobody.pw_dir)
    assert find_user({"user": "61234"}) == User(61234, 61234, "", "/")
    assert find_user({"user": "61234", "group": "77"}) == User(61234, 77, "", "/")
    for user in ("no-such-user", "root", "0", "4294967295", "99999999999999999999"):
        with pytest.raises(ConfigError, match="--user"):
            find_user({"user": user})
    with pytest.raises(ConfigError, match="--group"):
        find_user({"user": "nobody", "group": "no-such-group"})


def test_a_module_of_another_user_learns_its_own_home_and_socket_and_nothing_of_the_nodes() -> None:
    environ = {
        "PATH": "/bin",
        "THRESHOLD": "7",
        "HOME": "/root",
        "EDGEZMQ_HOME": "/n",
        "EDGEZMQ_SUPERVISOR_PID": "17",
        "EDGEZMQ_CONFIG": "/n/edgecore.yaml",
        "EDGEZMQ_HELD_LOCK": "1:3:/n/run/cam.lock",
        "SUPERVISOR_SERVER_URL": "unix:///n/run/supervisor.sock",
        "SUDO_USER": "me",
        "SSH_AUTH_SOCK": "/tmp/agent",
        "NOTIFY_SOCKET": "/run/systemd/notify",
    }
    user = User(7, 7, "cam", "/")
    assert environment_of(environ, user, Home(Path("/n")), "camera") == {
        "PATH": "/bin",
        "THRESHOLD": "7",
        "HOME": "/n/homes/camera",
        "USER": "cam",
        "LOGNAME": "cam",
        "SHELL": "/bin/sh",
        "EDGEZMQ_HOME": "/n/homes/camera",
        "EDGEZMQ_BUS": "ipc:///n/bus/camera.sock",
        "EDGEZMQ_SUPERVISOR_PID": "17",
    }
    elsewhere = environment_of({"EDGEZMQ_BUS": "tcp://h:1"}, user._replace(name=""), Home(Path("/n")), "camera")
    assert (elsewhere["EDGEZMQ_BUS"], elsewhere["USER"]) == ("tcp://h:1", "7")


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


@pytest.mark.processes
def test_a_module_that_takes_its_lock_itself_finds_that_it_has_it(tmp_path: Path) -> None:
    home = Home(tmp_path).prepare()
    code = """
import os, subprocess, sys
from runtime.home import find_home
from runtime.locks import hold
with hold(find_home().lock("cam")) as lock:
    print("held", flush=True)
    if sys.argv[1:]:
        # Its children are others: for them the name is taken.
        subprocess.run([sys.executable, "-c", sys.argv[1]])
"""
    done = run_exec(tmp_path, "--name", "cam", "--", sys.executable, "-c", code, code)
    assert done.stdout == "held\n", done.stderr
    assert "AlreadyRunning" in done.stderr
    with hold(home.lock("cam")):
        pass


@pytest.mark.processes
def test_a_wrong_limit_or_user_is_said_in_one_line(tmp_path: Path) -> None:
    Home(tmp_path).prepare()
    done = run_exec(tmp_path, "--name", "cam", "--memory", "1K", "--", "true")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("edgezmq exec: --memory: got '1K', expected 4M or more")
    done = run_exec(tmp_path, "--name", "cam", "--user", "no-such-user", "--", "true")
    assert done.stderr.startswith("edgezmq exec: --user: got 'no-such-user', expected a user of this host")
    assert done.returncode == 2
