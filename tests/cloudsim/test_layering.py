"""The cores of cloudsim stay without I/O, and the package stays without the node's modules."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import cloudsim

PACKAGE = Path(cloudsim.__file__).parent
CORES = ["frames", "wire", "handshake", "rules", "queues", "hub", "impairment", "faults", "edgecontroller"]
CORES += ["certificate_api", "lanes", "viaduct"]
IO = {"asyncio", "socket", "ssl", "time", "os", "subprocess", "threading", "logging", "zmq"}


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("core", CORES)
def test_a_core_imports_no_io(core: str) -> None:
    names = imports(PACKAGE / f"{core}.py")
    assert {name.split(".")[0] for name in names}.isdisjoint(IO)
    own = {name for name in names if name.startswith("cloudsim.")}
    assert own <= {f"cloudsim.{name}" for name in CORES}


def test_only_one_file_needs_cryptography_and_none_the_nodes_modules() -> None:
    for path in PACKAGE.glob("*.py"):
        roots = {name.split(".")[0] for name in imports(path)}
        assert "modules" not in roots
        assert ("cryptography" in roots) is (path.stem == "certificates")
