"""Where files are that are no code: beside the packages, or in an environment's share/edgezmq."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from runtime.cli.scaffolding import TEMPLATES
from runtime.shipped import places, shipped

ROOT = Path(__file__).parents[2]


def data_files() -> dict[str, list[str]]:
    described = tomllib.loads((ROOT / "pyproject.toml").read_text())
    found: dict[str, list[str]] = described["tool"]["setuptools"]["data-files"]
    return found


def test_a_checkout_comes_before_what_is_installed() -> None:
    assert places()[0] == ROOT
    assert shipped("supervisord.conf") == ROOT / "supervisord.conf"


def test_the_first_place_that_has_it_is_taken_and_none_is_an_error_that_names_them(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    second.mkdir()
    (second / "a.conf").write_text("")
    assert shipped("a.conf", [first, second]) == second / "a.conf"
    with pytest.raises(FileNotFoundError, match=f"b.conf.*{first}/b.conf, {second}/b.conf"):
        shipped("b.conf", [first, second])


def test_a_wheel_takes_along_every_file_of_every_template_in_its_place() -> None:
    packed = {file for files in data_files().values() for file in files}
    assert {f"examples/{each.directory}/{file}" for each in TEMPLATES.values() for file in each.files} <= packed
    assert {"supervisord.conf", "edgecore.example.yaml"} <= packed


def test_each_file_of_a_wheel_is_there_and_has_the_same_name_in_it() -> None:
    for directory, files in data_files().items():
        for file in files:
            assert (ROOT / file).is_file(), file
            assert f"{directory}/{Path(file).name}" == f"share/edgezmq/{file}"
