"""runtime.watchdog: the shell around `Watching`; what it decides is tested there, what it does in tests/processes."""

import subprocess
import sys

import msgspec
import pytest

from runtime.config import NodeConfig, RuntimeSection, WatchdogSection
from runtime.watchdog import log, settings_of
from runtime.watching import WatchSettings


def test_its_defaults_are_those_of_the_configuration() -> None:
    node = msgspec.to_builtins(NodeConfig())
    assert settings_of(node) == settings_of({}) == (True, WatchSettings())


def test_it_reads_what_the_configuration_says() -> None:
    section = WatchdogSection(
        enable=False,
        poll_seconds=1.0,
        hang_grace_seconds=2.5,
        broker_silence_seconds=3.0,
        revive_first_seconds=4.0,
        revive_cap_seconds=5.0,
        storm_restarts=6,
        storm_seconds=7.0,
    )
    node = msgspec.to_builtins(NodeConfig(runtime=RuntimeSection(watchdog=section)))
    assert settings_of(node) == (
        False,
        WatchSettings(
            poll_seconds=1.0,
            hang_grace_seconds=2.5,
            broker_silence_seconds=3.0,
            broker_question_seconds=1.0,
            revive_first_seconds=4.0,
            revive_cap_seconds=5.0,
            storm_restarts=6,
            storm_seconds=7.0,
        ),
    )


def test_its_log_lines_look_like_everybodys(capsys: pytest.CaptureFixture[str]) -> None:
    log("WARNING", "hung module=x")
    line = capsys.readouterr().err
    assert line[10] == "T"
    assert line[23:] == "Z WARNING runtime.watchdog hung module=x\n"


def test_it_stays_lean() -> None:
    heavy = "{'asyncio', 'logging', 'msgspec', 'http.client', 'xmlrpc.client', 'yaml', 'typer', 'ssl'}"
    code = f"import sys, runtime.watchdog; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n"
