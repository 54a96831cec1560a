"""The kill matrix in a short form: the cells that hurt most, and the instruments that they are measured with."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from chaos.build import missing
from chaos.mixed import FLOWS, MODULES
from demo.around import find_mosquitto
from tests.support.deadline import DEADLINE

pytestmark = pytest.mark.processes

needs_cc = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler: the shim cannot be built")
needs_mosquitto = pytest.mark.skipif(find_mosquitto() is None, reason="no mosquitto on this machine")

CELLS = (
    "broker:SIGKILL",
    "edgehub:SIGKILL offline",
    "keeper:SIGSTOP replaced",
    "link:dropped",
    "eventbus:SIGKILL",
    "go-module:SIGSTOP replaced",
    "c-module:SIGKILL",
)


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    target = tmp_path_factory.mktemp("chaos") / "chaos.json"
    words = [word for name in CELLS for word in ("--only", name)]
    command = [sys.executable, "-m", "chaos", "--quick", "--seed", "1", "--json", str(target), *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        output, _ = process.communicate(timeout=DEADLINE * 10)
    finally:
        process.terminate()  # it ends all that it started
        process.wait()
    assert target.exists(), output
    return json.loads(target.read_text())


@needs_cc
@needs_mosquitto
@pytest.mark.mosquitto
@pytest.mark.parametrize("name", CELLS)
def test_nothing_is_lost_and_nothing_comes_twice_without_a_reason(document: dict[str, Any], name: str) -> None:
    (cell,) = [cell for cell in document["cells"] if f"{cell['victim']}:{cell['harm']}" == name]
    if cell["victim"] in MODULES and missing():
        pytest.skip(f"not here: {', '.join(missing())}")
    assert cell["ran"], cell
    assert cell["lost"] == 0, cell
    assert cell["duplicated_unexplained"] == 0, cell
    assert cell["settled"], cell
    assert cell["ledger_balanced"], cell
    assert cell["dropped"] == 0, cell
    assert cell["misses"] == [], cell
    assert cell["recovery_s"] is not None, cell
    assert min(cell["flows"][flow]["arrived"] for flow in ("uploads", "commands")) >= 100, cell
    assert cell["mixed"] is not bool(missing()), cell
    if cell["mixed"]:
        assert min(cell["flows"][flow]["arrived"] for flow in FLOWS.values()) > 10, cell


# --- the shim ------------------------------------------------------------------------------------------


class Shimmed:
    """Runs Python code below the shim, in a root of its own."""

    def __init__(self, directory: Path) -> None:
        from chaos.disk import Control, Disk, build_shim

        self.disk = Disk(directory / "root", directory / "shadow")
        self.disk.root.mkdir()
        self.control = Control(directory / "control")
        self._shim = build_shim(directory)

    def run(self, code: str) -> str:
        environment = {
            "LD_PRELOAD": str(self._shim),
            "CHAOS_PROCESS": "test",
            "CHAOS_CONTROL": str(self.control.directory),
            "CHAOS_ROOT": str(self.disk.root),
            "CHAOS_SHADOW": str(self.disk.shadow),
        }
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=self.disk.root,
            env=environment,
            capture_output=True,
            text=True,
            timeout=DEADLINE,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def read(self, name: str) -> str | None:
        path = self.disk.root / name
        return path.read_text() if path.exists() else None


@pytest.fixture
def shimmed(tmp_path: Path) -> Shimmed:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    return Shimmed(tmp_path)


WRITE = """
import os
def write(name, text, mode="w", sync=True):
    with open(name, mode) as file:
        file.write(text)
        file.flush()
        if sync:
            os.fsync(file.fileno())
def sync_directory(name="."):
    fd = os.open(name, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
"""


def test_a_power_loss_leaves_what_was_synced_and_no_more(shimmed: Shimmed) -> None:
    (shimmed.disk.root / "old").write_text("before")
    shimmed.disk.checkpoint()
    shimmed.run(
        WRITE
        + """
write("old", " and synced", "a")
write("old", " and not synced", "a", sync=False)
write("named", "1")
sync_directory()
write("unnamed", "its directory was not synced")
"""
    )
    shimmed.disk.lose_power()
    assert shimmed.read("old") == "before and synced"
    assert shimmed.read("named") == "1"
    assert shimmed.read("unnamed") is None


def test_a_rename_or_removal_holds_only_once_the_directory_is_synced(shimmed: Shimmed) -> None:
    for name in ("a", "b", "c"):
        (shimmed.disk.root / name).write_text("old")
    shimmed.disk.checkpoint()
    shimmed.run(
        WRITE
        + """
write("new", "new")
os.rename("new", "a")
sync_directory()
write("new", "new")
os.rename("new", "b")
os.unlink("c")
"""
    )
    shimmed.disk.lose_power()
    assert [shimmed.read(name) for name in ("a", "b", "c")] == ["new", "old", "old"]


def test_sqlite_keeps_what_it_committed_through_a_power_loss(shimmed: Shimmed) -> None:
    shimmed.disk.checkpoint()
    shimmed.run(
        """
import os, sqlite3
db = sqlite3.connect("x.db", isolation_level=None)
db.execute("PRAGMA journal_mode=WAL")
db.execute("PRAGMA synchronous=FULL")
db.execute("CREATE TABLE t (n)")
for n in range(500):
    db.execute("INSERT INTO t VALUES (?)", (n,))
os._exit(0)
"""
    )
    shimmed.disk.lose_power()
    count = 'import sqlite3; print(sqlite3.connect("x.db").execute("SELECT count(*) FROM t").fetchone()[0])'
    assert shimmed.run(count) == "500"


def test_a_full_disk_refuses_writes_below_the_root_and_nothing_else(shimmed: Shimmed) -> None:
    shimmed.disk.checkpoint()
    shimmed.control.set_full("test", True)
    code = WRITE + 'try:\n    write("x", "1")\nexcept OSError as fault:\n    print(fault.errno == 28)\n'
    assert shimmed.run(code) == "True"
    assert shimmed.control.refused("test") > 0
    assert shimmed.run('open("/dev/null", "w").write("1"); print("passed")') == "passed"
    shimmed.control.set_full("test", False)
    assert shimmed.run(WRITE + 'write("x", "1"); print("passed")') == "passed"


def test_a_clock_jumps_for_one_process_and_its_monotonic_clock_goes_on(shimmed: Shimmed) -> None:
    shimmed.control.set_clock("test", 86_400.0)
    code = "import time; print(int(time.time()), time.monotonic())"
    (there, monotonic), (here, before) = (
        shimmed.run(code).split(),
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split(),
    )
    assert abs(int(there) - int(here) - 86_400) < DEADLINE
    assert abs(float(monotonic) - float(before)) < DEADLINE
