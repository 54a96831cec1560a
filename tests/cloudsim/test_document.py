"""docs/cloudsim.md: its table of what the double shows names files, tests and vectors that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import get_args

import pytest

from cloudsim.__main__ import _serve_parser
from cloudsim.faults import Kind, Wrong
from tests.support.vectors import every

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "cloudsim.md").read_text()
ROWS = [
    line.strip("| \n").split(" | ")
    for line in TEXT.partition("## What the double shows")[2].splitlines()
    if line.startswith("| ") and not line.startswith("| a CloudHub")
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:60])
def test_a_row_names_what_exists(row: list[str]) -> None:
    _, where, tests = row
    for file in re.findall(r"`([^`]+)`", where):
        assert (ROOT / "cloudsim" / file).exists(), file
    for words in tests.split(";"):
        for name in re.findall(r"`([^`]+)`", words):
            if "::" in name:
                file, test = name.split("::")
                tree = ast.parse((ROOT / "tests" / "cloudsim" / file).read_text())
                assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, name
            else:
                assert any(part.startswith(name) for vector in every() for part in str(vector).split("/")), name


def test_the_table_is_not_short() -> None:
    assert len(ROWS) > 45


def test_every_fault_and_every_option_is_described() -> None:
    faults = TEXT.partition("## Faults")[2].partition("## Objects")[0]
    for kind in (*get_args(Kind), *get_args(Wrong)):
        assert f"`{kind}`" in faults, kind
    for action in _serve_parser()._actions:
        for option in action.option_strings:
            assert option in ("-h", "--help") or f"`{option}" in TEXT, option
