"""The runner with real processes: our SDK, the page's module, the examples, our broker pass; wrong ones do not."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runtime.conform import broker_checks, module_checks
from runtime.conform.play import FAIL, NOT_APPLICABLE, PASS, Check, Result, Settings
from runtime.conform.referee import RULES
from runtime.conform.shell import BrokerRun, ModuleRun, check_broker, check_module
from tests.support.aio import until_sync
from tests.support.deadline import DEADLINE

ROOT = Path(__file__).parents[3]
SHORT = [check for check in module_checks.ALL if not check.is_long]
"Without those that wait for a liveness time of 15 s."
SETTINGS = Settings().stretched(DEADLINE / 20)
PUPPET = ("-m", "tests.support.puppet")

pytestmark = pytest.mark.processes


def run(*arguments: str, checks: list[Check] | None = None, transport: str = "ipc") -> list[Result]:
    """Test a module that this Python runs."""
    command = ["env", f"PYTHONPATH={ROOT}", sys.executable, *arguments]
    told: list[Result] = []
    module = ModuleRun(command=command, transport=transport, settings=SETTINGS)
    _, results = check_module(module, checks or list(module_checks.ALL), told.append)
    assert sorted(told, key=id) == sorted(results, key=id)
    return results


def failures(results: list[Result]) -> list[tuple[Any, ...]]:
    return [(result.check.name, result.why, *result.frames, result.log) for result in results if result.outcome == FAIL]


def left_out(results: list[Result]) -> dict[str, str]:
    return {result.check.name: result.why for result in results if result.outcome == NOT_APPLICABLE}


def named(*names: str) -> list[Check]:
    return [check for check in module_checks.ALL if check.name in names]


def test_a_module_of_the_sdk_that_does_everything_passes_everything() -> None:
    results = run("tests/support/allround.py")
    assert not failures(results)
    assert not left_out(results)
    assert len(results) == len(module_checks.ALL)


def test_the_example_that_answers_passes() -> None:
    results = run("examples/python/echo.py", checks=SHORT)
    assert not failures(results)
    lacking = {need for check in SHORT if check.name in left_out(results) for need in check.needs}
    assert lacking == {"sends", "groups", "asks", "retains", "answers"}


def test_the_example_that_sends_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPLOADER_SECONDS", "0.2")
    results = run("examples/python/uploader.py", checks=SHORT)
    assert not failures(results)
    assert "resend-restart" not in left_out(results)


def test_the_module_in_the_page_passes(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "emp.md").read_text()
    [code] = re.findall(r"^```python\n(.*?)^```", text[text.index("## 18.") :], re.M | re.S)
    file = tmp_path / "minimal.py"
    file.write_text(code)
    results = run(str(file), checks=SHORT)
    assert not failures(results)
    assert "duplicate" not in left_out(results)


def test_over_tcp_a_module_finds_the_broker_that_comes_after() -> None:
    results = run(*PUPPET, checks=named("restart", "resend-restart", "large", "fenced"), transport="tcp")
    assert not failures(results)
    assert not left_out(results)


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        ("ack-first", "request-order"),
        ("no-bye", "bye"),
        ("not-fresh", "fresh-first"),
        ("resend-skips", "resend-who"),
    ],
)
def test_a_process_that_breaks_a_rule_fails_its_check(fault: str, name: str) -> None:
    [result] = run(*PUPPET, fault, checks=named(name))
    assert result.outcome == FAIL
    assert result.frames


def test_standing_rules_alone_are_watched_in_all_plays(monkeypatch: pytest.MonkeyPatch) -> None:
    plays = tuple(check for check in module_checks.ALL if check.name in ("who", "bye"))
    monkeypatch.setattr(module_checks, "ALL", plays)
    rules = [rule for rule in RULES if rule.name in ("greeting", "nonces")]
    assert [(result.check.name, result.outcome) for result in run(*PUPPET, checks=rules)] == [
        ("greeting", PASS),
        ("nonces", PASS),
    ]


def test_a_command_that_does_not_come_up_fails_the_survey_and_its_output_is_shown() -> None:
    [result] = run("-c", "raise SystemExit('nothing to do')", checks=named("who"))
    assert (result.check.name, result.outcome) == ("survey", FAIL)
    assert "status 1" in result.why
    assert "nothing to do" in result.log


def test_nothing_of_the_module_is_left(tmp_path: Path) -> None:
    """A wrapper that starts the module and waits is ended with it, and no directory stays."""
    script = tmp_path / "wrapper"
    script.write_text(f'#!/bin/sh\necho "$EDGEZMQ_HOME" > {tmp_path}/home\n"$0.py" &\nwait\n')
    script.chmod(0o755)
    module = tmp_path / "wrapper.py"
    module.write_text(
        f"#!{sys.executable}\nimport os, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\nfrom tests.support import puppet\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\nsys.argv[1:] = []\nsys.exit(puppet.main())\n"
    )
    module.chmod(0o755)
    _, results = check_module(ModuleRun(command=[str(script)]), named("hello"), lambda result: None)
    assert not failures(results)
    pid = int((tmp_path / "pid").read_text())
    until_sync(lambda: not Path(f"/proc/{pid}").exists(), "the end of what the wrapper started")
    assert not Path((tmp_path / "home").read_text().strip()).parent.exists()


# --- a broker -----------------------------------------------------------------------------------------------


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[str]:
    environ = {key: value for key, value in os.environ.items() if not key.startswith("EDGEZMQ_")}
    environ["EDGEZMQ_HOME"] = str(tmp_path)
    process = subprocess.Popen([sys.executable, "-m", "runtime.broker"], env=environ, cwd=ROOT)
    socket = tmp_path / "run" / "bus.sock"
    until_sync(socket.exists, "the broker's socket")
    yield f"ipc://{socket}"
    process.terminate()
    process.wait()


def test_our_broker_passes_everything(endpoint: str) -> None:
    results = check_broker(BrokerRun(endpoint=endpoint, settings=SETTINGS), broker_checks.CHECKS, lambda result: None)
    assert not failures(results)
    assert all(result.outcome == PASS for result in results)


def test_the_command_tests_a_broker_and_tells_programs(endpoint: str) -> None:
    done = edgezmq("conform", "--broker", endpoint, "--only", "pong", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["passed"], document["failed"]) == (1, 0)


def test_where_no_broker_is_the_survey_fails(tmp_path: Path) -> None:
    done = edgezmq("conform", "--broker", f"ipc://{tmp_path}/none", "--only", "pong", "--stretch", "0.1")
    assert done.returncode == 1
    assert "FAIL  survey" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("passed=0 failed=1 ")


# --- the command ----------------------------------------------------------------------------------------------


def edgezmq(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "runtime.cli", *arguments]
    return subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)


def test_the_command_fails_when_a_check_does() -> None:
    module = (sys.executable, *PUPPET, "no-bye")
    done = edgezmq("conform", "--only", "bye", "--only", "who", "--", *module)
    assert done.returncode == 1
    assert "FAIL  bye " in done.stdout
    assert "pass  who " in done.stdout
    assert done.stdout.splitlines()[-1].startswith("passed=1 failed=1 not-applicable=0 ")
    assert "module puppet: answers, echoes, sends, asks, retains" in done.stdout


def test_the_command_lists_the_checks() -> None:
    lines = edgezmq("conform", "--list").stdout.splitlines()
    assert len(lines) == len(module_checks.ALL)
    lines = edgezmq("conform", "--list", "--broker", "x").stdout.splitlines()
    assert len(lines) == len(broker_checks.CHECKS)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "expected either a module's command"),
        (("--broker", "ipc:///x", "--", "true"), "expected either a module's command"),
        (("--only", "nothing", "--", "true"), "no check is called nothing"),
        (("--", "no-such-program"), "no-such-program: no such program"),
    ],
)
def test_wrong_use_is_one_line(arguments: tuple[str, ...], said: str) -> None:
    done = edgezmq("conform", *arguments)
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert said in line
