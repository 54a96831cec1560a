"""The demo's options, places and interrupts."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from demo.__main__ import _parser, _places
from demo.around import free_port
from demo.children import Child, DemoFailed, Interrupts
from demo.stage import Stage
from demo.telling import Teller
from runtime.home import HOME_VARIABLE
from runtime.locks import hold


@pytest.mark.parametrize(
    "arguments",
    [
        ["--uploads", "0"],
        ["--uploads", "many"],
        ["--commands", "50000"],
        ["--seconds", "nan"],
        ["--kill", "edgehub,supervisord"],
        ["--link", "pigeon"],
        ["--mqtt", "emqx"],
    ],
)
def test_a_wrong_option_is_refused_before_anything_starts(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        _parser().parse_args(arguments)
    assert end.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_the_defaults_are_what_the_readme_says() -> None:
    options = _parser().parse_args([])
    assert (options.uploads, options.commands, options.kill) == (2000, 200, ["edgehub", "broker"])
    assert _parser().parse_args(["--kill", "none"]).kill == []


def test_a_long_path_for_temporary_files_is_not_used_for_sockets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 90)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    directory, home = _places(keep=False, named=None)
    try:
        assert (directory.parent, home) == (Path("/tmp"), directory / "node")
    finally:
        directory.rmdir()
    directory, _ = _places(keep=True, named=long / "home")
    try:
        assert directory.parent == Path("/tmp")
    finally:
        directory.rmdir()


def test_a_kept_node_lives_where_it_is_told_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    monkeypatch.delenv(HOME_VARIABLE, raising=False)
    assert _places(keep=True, named=None)[1] == Path("/.state")
    monkeypatch.setenv(HOME_VARIABLE, "/h")
    assert _places(keep=True, named=None)[1] == Path("/h")
    assert _places(keep=True, named=Path("/n")) == (Path("/n/around"), Path("/n"))


def test_a_home_on_which_a_node_runs_is_left_alone(tmp_path: Path) -> None:
    stage = Stage(tmp_path / "around", tmp_path)
    stage.home.prepare()
    with hold(stage.home.lock("node")), pytest.raises(DemoFailed, match="a node runs on"):
        stage.start_cloud()
    assert not (tmp_path / "around").exists()


def test_a_free_port_is_the_wanted_one_if_it_is_free() -> None:
    port = free_port()
    assert free_port(port) == port


# --- interrupts -----------------------------------------------------------------------------------------


@pytest.fixture
def interrupts() -> Iterator[Interrupts]:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    interrupts = Interrupts()
    interrupts.listen()
    yield interrupts
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def test_an_interrupt_is_heard_once(interrupts: Interrupts) -> None:
    interrupts.begin()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)
    assert not interrupts.hurry
    os.kill(os.getpid(), signal.SIGINT)
    assert interrupts.hurry


def test_an_interrupt_before_the_beginning_is_heard_then(interrupts: Interrupts) -> None:
    os.kill(os.getpid(), signal.SIGHUP)
    with pytest.raises(KeyboardInterrupt):
        interrupts.begin()


def test_an_interrupt_waits_until_a_process_is_started_and_known(interrupts: Interrupts) -> None:
    interrupts.begin()
    done = []
    with pytest.raises(KeyboardInterrupt), interrupts.held():
        os.kill(os.getpid(), signal.SIGINT)
        done.append("started")
    assert done == ["started"]


# --- children and words -----------------------------------------------------------------------------------


def test_a_child_that_ends_is_told_with_its_last_words(tmp_path: Path) -> None:
    child = Child("helper", ["sh", "-c", "echo cannot bind >&2; exit 4"], log=tmp_path / "helper.log")
    child._process.wait()
    with pytest.raises(DemoFailed, match="helper ended with status 4: cannot bind") as failure:
        child.check()
    assert failure.value.log == tmp_path / "helper.log"


def test_a_child_that_ignores_the_request_to_end_is_killed(tmp_path: Path) -> None:
    log = tmp_path / "stubborn.log"
    child = Child("stubborn", ["sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.1; done"], log=log)
    while b"ready" not in log.read_bytes():
        child.check()
    child.end(0.05)
    assert child.status() == -signal.SIGKILL


def test_without_a_terminal_there_are_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with Teller() as teller:
        teller.say("word " * 40)
        teller.step("so it is")
        teller.last_line("uploads sent=1")
    lines = capsys.readouterr().out.splitlines()
    assert all("\x1b" not in line and len(line) <= 100 for line in lines)
    assert lines[-2].endswith(" s  so it is")
    assert lines[-1] == "uploads sent=1"
