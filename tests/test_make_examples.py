"""`make examples`: versions, verdicts, and what cannot be had. The examples are for that command to build."""

from __future__ import annotations

import importlib.util
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.support.deadline import DEADLINE

ROOT = Path(__file__).parent.parent


def loaded() -> ModuleType:
    """`examples/run.py`, which is a script and in no package."""
    spec = importlib.util.spec_from_file_location("examples_run", ROOT / "examples" / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


examples = loaded()


@pytest.mark.parametrize(
    ("printed", "least", "is_enough"),
    [
        ("v20.20.2\n", (18,), True),
        ("javac 17.0.15", (17,), True),
        ("cargo 1.95.0 (f2d3ce0bd 2026-03-21)", (1, 75), True),
        ("cargo 0.66.0", (1, 75), False),
        ("javac 11.0.2", (17,), False),
        ("", (1,), False),
        (None, (1,), False),
    ],
)
def test_a_version_is_read_from_what_a_program_prints(printed: str, least: tuple[int, ...], is_enough: bool) -> None:
    assert examples.is_new_enough(printed, least) is is_enough


def test_each_example_has_its_language_and_each_language_its_parts() -> None:
    names = {language.name for language in examples.LANGUAGES}
    directories = {found.parent.name for found in (ROOT / "examples").glob("*/README.md")}
    assert names == directories
    table = (ROOT / "examples" / "README.md").read_text()
    for language in examples.LANGUAGES:
        assert len(list(language.directory.glob("*-example.conf"))) == 1
        assert f"| [{language.name}]({language.name}) |" in table


def test_an_example_that_somebody_ends_with_sigterm_is_started_again() -> None:
    # Unlike a module of the Python SDK it ends with 0, which supervisord would take for the wish to stay down.
    for language in examples.LANGUAGES:
        (conf,) = language.directory.glob("*-example.conf")
        assert "\nautorestart=true\n" in conf.read_text(), conf


def language(command: str, is_there: Callable[[], bool] = lambda: True) -> object:
    need = examples.Need("something", is_there, ())
    return examples.Language("c", "nothing", (need,), ("sh", "-c", command), ("c/none",))


def found(**more: object) -> dict[str, object]:
    failed = {"name": "who", "outcome": "fail", "why": "no HELLO", "frames": ["0.0 > WHO"], "log": None}
    return {"passed": 73, "failed": 1, "not_applicable": 7, "seconds": 30.4, "checks": [failed]} | more


def test_the_line_of_a_language_ends_with_its_figures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(examples, "conform", lambda *_: found())
    line, is_well = examples.attend(language("true"), [])
    assert line.startswith("c  ")
    assert line.endswith("  passed=73 failed=1")
    assert not is_well
    assert "who: no HELLO" in capsys.readouterr().err
    monkeypatch.setattr(examples, "conform", lambda *_: found(failed=0, checks=[]))
    line, is_well = examples.attend(language("true"), [])
    assert line.endswith("  passed=73 failed=0")
    assert is_well


@pytest.mark.parametrize(
    ("tried", "why"),
    [
        (language("echo what is wrong; exit 3"), "ended with status 3"),
        (language("true", lambda: False), "there is no something"),
        (language("true"), "the conformance runner"),
    ],
)
def test_a_language_that_could_not_run_says_so_and_has_no_figures(tried: object, why: str) -> None:
    line, is_well = examples.attend(tried, ["--only", "no-such-check"])
    assert not is_well
    assert "not run: " in line
    assert why in line
    assert "passed" not in line


def test_to_build_only_is_not_to_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples, "conform", lambda *_: pytest.fail("tested"))
    assert examples.attend(language("true"), [], only_build=True) == ("c           built", True)
    line, is_well = examples.attend(language("exit 3"), [], only_build=True)
    assert "ended with status 3" in line
    assert not is_well


@pytest.mark.parametrize(("failing", "status"), [(None, 0), ("c", 1), ("java", 1)])
def test_the_lines_stand_in_the_tables_order_and_one_that_failed_decides_the_exit_status(
    failing: str | None, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    everybody_is_here = threading.Barrier(len(examples.LANGUAGES), timeout=DEADLINE)

    def attended(language: Any, **_: object) -> tuple[str, bool]:
        everybody_is_here.wait()  # passes only if they are side by side
        return language.name, language.name != failing

    monkeypatch.setattr(examples, "attend", attended)
    monkeypatch.setattr(sys, "argv", ["run.py"])
    monkeypatch.setenv("PATH", os.environ["PATH"])  # which main() adds to
    assert examples.main() == status
    assert capsys.readouterr().out.split() == [language.name for language in examples.LANGUAGES]


def test_what_is_missing_is_installed_by_one_at_a_time_with_the_first_alternative_that_can_be_had(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[list[str]] = []
    installed: set[str] = set()

    def perform(command: list[str], *_: object) -> None:
        done.append(command)
        installed.update(command)

    monkeypatch.setattr(examples, "perform", perform)
    monkeypatch.setattr(examples.os, "geteuid", lambda: 0)
    monkeypatch.setattr(examples.shutil, "which", lambda name: name)
    monkeypatch.setattr(examples, "has_candidate", lambda package: package != "new-dev")
    examples.refresh_package_lists.cache_clear()
    wide = examples.Need("wide", lambda: "old-dev" in installed, (("new-dev", "extra"), ("old-dev",)))
    other = examples.Need("other", lambda: "other-dev" in installed, (("other-dev",),))
    there = examples.Need("there", lambda: True, (("there-dev",),))
    examples.install([wide, there])
    examples.install([wide, other])
    examples.install([wide, other])
    examples.refresh_package_lists.cache_clear()
    flat = [" ".join(command) for command in done]
    assert [command.partition("apt-get ")[2] for command in flat] == [
        "update -qq",
        "install -y -qq --no-install-recommends old-dev",
        "install -y -qq --no-install-recommends other-dev",
    ]
