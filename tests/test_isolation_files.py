"""The files of deploy/isolation hang together, and with what they are about (at work: processes/test_isolation.py)."""

from __future__ import annotations

import configparser
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from runtime.cli import settings
from runtime.config import NodeConfig
from runtime.exec import limits_of, parse

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "deploy" / "isolation"
UNITS = [RECIPE / "edgezmq.service", *sorted((RECIPE / "systemd").glob("*.service"))]
SNIPPETS = sorted((RECIPE / "modules.d").glob("*.conf"))
GUIDE = (ROOT / "docs" / "isolation.md").read_text()


def policy() -> NodeConfig:
    config, _ = settings.read(RECIPE / "edgecore.yaml")
    return config


def sections(file: Path) -> dict[str, dict[str, str]]:
    parser = configparser.RawConfigParser(inline_comment_prefixes=(" ;",), strict=False)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_string(file.read_text())
    return {name: dict(parser[name]) for name in parser.sections()}


def test_the_example_policy_is_one_and_denies_by_default() -> None:
    found = policy().runtime.policy
    assert found.enable
    assert set(found.modules) == {file.stem for file in SNIPPETS} == set(policy().runtime.modules)
    for name, rule in found.modules.items():
        assert rule.own_socket, name
        assert "*" not in rule.to
        assert rule.messages_per_second > 0


@pytest.mark.parametrize("file", SNIPPETS, ids=lambda file: file.stem)
def test_a_snippet_starts_its_module_as_the_policys_user_with_limits(file: Path) -> None:
    [(section, program)] = sections(file).items()
    assert section == f"program:{file.stem}"
    words = shlex.split(program["command"].replace("%(ENV_EDGEZMQ_PYTHON)s", "python").replace("%%", "%"))
    assert words[:3] == ["python", "-m", "runtime.exec"]
    call = parse(words[3:])
    limits = limits_of(call.options)
    assert limits is not None
    assert None not in (limits.memory_bytes, limits.cpu, limits.pids)
    assert call.name == file.stem
    assert policy().runtime.policy.modules[file.stem].users == [call.options["user"]]
    assert program["stopasgroup"] == program["killasgroup"] == "true"


def test_the_root_supervisord_differs_from_the_shipped_one_in_users_alone() -> None:
    shipped, ours = sections(ROOT / "supervisord.conf"), sections(RECIPE / "supervisord.conf")
    assert shipped.keys() == ours.keys()
    for name, expected in shipped.items():
        added = dict(ours[name].items() - expected.items())
        if name.startswith("program:"):
            assert added == {"user": "%(ENV_EDGEZMQ_USER)s"}
        elif name == "supervisord":
            assert added == {"user": "root", "pidfile": "%(ENV_EDGEZMQ_HOME)s/log/supervisord.pid"}
        elif name == "unix_http_server":
            assert added == {"chown": "%(ENV_EDGEZMQ_USER)s"}
        else:
            assert not added
        assert expected.keys() <= ours[name].keys()


def test_a_units_user_and_socket_are_the_policys() -> None:
    text = (RECIPE / "systemd" / "edgezmq-thermostat.service").read_text()
    assert f"User={policy().runtime.policy.modules['thermostat'].users[0]}\n" in text
    assert "EDGEZMQ_BUS=ipc:///var/lib/edgezmq/bus/thermostat.sock\n" in text
    for limit in ("MemoryMax", "CPUQuota", "TasksMax"):
        assert f"\n{limit}=" in text


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze on this machine")
def test_systemd_understands_the_units(tmp_path: Path) -> None:
    copies = []
    for unit in UNITS:
        # Verified is also that the commands are there.
        text = re.sub(r"/opt/edgezmq/bin/\w+", sys.executable, unit.read_text())
        copies.append(tmp_path / unit.name)
        copies[-1].write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--generators=no", *copies],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    ours = [line for line in done.stderr.splitlines() if "edgezmq" in line]
    assert not ours, done.stderr
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze on this machine")
def test_systemd_would_tell_of_a_unit_that_it_does_not_understand(tmp_path: Path) -> None:
    unit = tmp_path / "edgezmq-wrong.service"
    unit.write_text(f"[Service]\nExecStart={sys.executable}\nMemoryMaximum=5\n")
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--generators=no", unit], capture_output=True, text=True, check=False
    )
    assert "MemoryMaximum" in done.stderr


def test_a_wheel_has_them_all_where_the_guide_says() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    shipped = {
        f"{directory}/{Path(file).name}": file
        for directory, files in project["tool"]["setuptools"]["data-files"].items()
        for file in files
    }
    ours = {path.relative_to(ROOT).as_posix() for path in RECIPE.rglob("*") if path.is_file()}
    assert {where: file for where, file in shipped.items() if "/isolation" in where} == {
        f"share/edgezmq/{file}": file for file in ours
    }
    texts = [GUIDE, *(unit.read_text() for unit in UNITS)]
    named = {path for text in texts for path in re.findall(r"/opt/edgezmq/(share/[\w./-]+\.(?:sh|conf|service))", text)}
    assert named
    assert named <= shipped.keys()


def test_the_guide_names_every_file_and_no_other() -> None:
    files = {path.relative_to(ROOT).as_posix() for path in RECIPE.rglob("*") if path.is_file()}
    named = set(re.findall(r"\((?:\.\./)?(deploy/isolation/[\w./-]+\.\w+)\)", GUIDE))
    assert named == files
