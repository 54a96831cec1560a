"""No golden vector of a real CloudHub is forgotten: each is checked against cloudsim, or our side, or both."""

from __future__ import annotations

import ast
from pathlib import Path
from types import ModuleType

import pytest

from tests.cloudsim import test_vectors as hub_side
from tests.modules.edgehub import test_vectors as edge_side
from tests.support.vectors import DIRECTORY, every, matching

ROOT = Path(__file__).parents[1]
BELOW_THE_STREAMS = {vector for vector in map(str, every()) if vector.startswith("quic_version/")}
"What concerns Google's QUIC itself. No maintained library speaks it, so neither side does (README)."
SIDES = pytest.mark.parametrize("side", [hub_side, edge_side], ids=["cloudsim", "edge"])


def checked(side: ModuleType) -> set[str]:
    return {str(vector) for vector in side.HERE}


def test_every_vector_is_checked_on_some_side_or_is_googles_quic() -> None:
    everything = set(map(str, every()))
    assert len(everything) > 390
    elsewhere = {
        str(vector)
        for vector in every()
        if any(".py::" in (matching(vector, side.NOT_HERE) or "") for side in (hub_side, edge_side))
    }
    assert everything - checked(hub_side) - checked(edge_side) - elsewhere <= BELOW_THE_STREAMS


@SIDES
def test_a_vector_that_a_side_leaves_out_has_a_reason(side: ModuleType) -> None:
    for vector in every():
        if str(vector) not in checked(side):
            assert matching(vector, side.NOT_HERE), vector


@SIDES
def test_a_reason_is_for_a_vector_that_exists_and_a_test_that_it_names_does_too(side: ModuleType) -> None:
    names = list(every())
    for pattern, reason in side.NOT_HERE.items():
        assert any(matching(vector, {pattern: reason}) for vector in names), pattern
        if ".py::" not in reason:
            continue
        file, test = reason.split(": ")[-1].split("::")
        defined = {node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)}
        assert test in defined, reason


@SIDES
def test_every_file_of_vectors_has_a_check(side: ModuleType) -> None:
    files = {path.stem for path in DIRECTORY.glob("*.json")}
    assert files >= {vector.file for vector in side.HERE}
    assert {vector.file for vector in side.HERE} - {"measured_behaviour"} <= side.CHECKS.keys()
