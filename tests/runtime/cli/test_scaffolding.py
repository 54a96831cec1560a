"""`edgezmq new`: a module from an example, whose name is nowhere left in it."""

from __future__ import annotations

import configparser
import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.cli.scaffolding import TEMPLATES, CannotScaffold, make, scaffold
from runtime.shipped import shipped
from tests.support.deadline import DEADLINE

LANGUAGES = sorted(TEMPLATES)


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_new_module_is_called_by_its_own_name_throughout(language: str, tmp_path: Path) -> None:
    old = TEMPLATES[language].name
    place = tmp_path / "hall-lamp"
    files = scaffold("hall-lamp", language, place)
    texts = {file: file.read_text() for file in files}
    if language != "python":  # where it is a word as well
        assert not [file for file, text in texts.items() if old in text]
    assert not [file for file in files if old in file.name]
    assert any('"hall-lamp"' in text for file, text in texts.items() if file.suffix != ".sh")


@pytest.mark.parametrize("language", LANGUAGES)
def test_its_part_of_supervisord_starts_what_is_in_its_folder(language: str, tmp_path: Path) -> None:
    scaffold("hall-lamp", language, tmp_path / "hall-lamp")
    parser = configparser.RawConfigParser()
    parser.read(tmp_path / "hall-lamp" / "hall-lamp.conf")
    section = parser["program:hall-lamp"]
    assert "%(here)s/hall-lamp/" in section["command"]
    assert section["stdout_logfile"].endswith("/log/hall-lamp.log")


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_template_has_every_file_that_is_in_version_control(language: str) -> None:
    template = TEMPLATES[language]
    if language == "python":
        return  # of its three modules one is the template
    listed = subprocess.run(
        ["git", "ls-files"], cwd=shipped("examples") / template.directory, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not in a checkout")
    assert sorted(template.files) == sorted(listed.stdout.split())


def test_a_new_module_in_python_keeps_the_protocol_by_its_own_test(tmp_path: Path) -> None:
    scaffold("hall-lamp", "python", tmp_path / "hall-lamp")
    environ = dict(os.environ, PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    script = tmp_path / "hall-lamp" / "conform.sh"
    script.write_text(script.read_text().replace("conform --", "conform --only request --"))
    done = subprocess.run([script], env=environ, capture_output=True, text=True, timeout=3 * DEADLINE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "module hall-lamp" in done.stdout


@pytest.mark.parametrize("name", ["", "Lamp", "hall_lamp", "hall.lamp", "-x", "x-", "../x", "1x", "x" * 65])
def test_names_that_some_language_cannot_take_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(CannotScaffold, match="expected words"):
        scaffold(name, "go", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_nothing_is_written_over_and_no_template_is_made_up(tmp_path: Path) -> None:
    with pytest.raises(CannotScaffold, match="is there already"):
        scaffold("lamp", "go", tmp_path)
    with pytest.raises(CannotScaffold, match="c, go, java, javascript, python, rust"):
        scaffold("lamp", "cobol", tmp_path / "new")
    with pytest.raises(CannotScaffold, match="none/go"):
        scaffold("lamp", "go", tmp_path / "new", examples=tmp_path / "none")


def test_it_says_what_a_policy_wants_of_the_new_module(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make("pump", "python", tmp_path / "pump")
    said = capsys.readouterr().out
    assert "pump: {users: [USER], ownSocket: true" in said
    assert "edgezmq reload" in said
    assert "--name pump --user USER" in said
