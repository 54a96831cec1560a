"""`make examples`: versions, verdicts, and what cannot be had. The examples are for that command to build."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

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
    assert not examples.attend(language("true"), [])
    told = capsys.readouterr()
    assert told.out.startswith("c  ")
    assert told.out.endswith("  passed=73 failed=1\n")
    assert "who: no HELLO" in told.err
    monkeypatch.setattr(examples, "conform", lambda *_: found(failed=0, checks=[]))
    assert examples.attend(language("true"), [])
    assert capsys.readouterr().out.endswith("  passed=73 failed=0\n")


@pytest.mark.parametrize(
    ("tried", "why"),
    [
        (language("echo what is wrong; exit 3"), "ended with status 3"),
        (language("true", lambda: False), "there is no something"),
        (language("true"), "the conformance runner"),
    ],
)
def test_a_language_that_could_not_run_says_so_and_has_no_figures(
    tried: object, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not examples.attend(tried, ["--only", "no-such-check"])
    told = capsys.readouterr().out
    assert "not run: " in told
    assert why in told
    assert "passed" not in told
