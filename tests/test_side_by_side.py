"""tests/conftest.py: who runs beside whom under `make test`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import turn
from tests.support.deadline import DEADLINE

ROOT = Path(__file__).parent.parent

TESTS = """
import time
from pathlib import Path

import pytest

ROOM = Path(__file__).parent / "room"
ROOM.mkdir(exist_ok=True)

def stay(name):
    (ROOM / name).touch()
    time.sleep(0.05)  # in which the others are met
    found = {path.name for path in ROOM.iterdir()}
    (ROOM / name).unlink()
    return found

@pytest.mark.parametrize("number", range(12))
def test_among_others(number):
    found = stay(f"other{number}")
    assert not any(name.startswith("alone") for name in found)
    with open(ROOM.parent / "met", "a") as file:
        file.write(f"{len(found)}\\n")

@pytest.mark.alone
@pytest.mark.parametrize("number", range(3))
def test_alone(number):
    assert stay(f"alone{number}") == {f"alone{number}"}
"""


SHARING = """
from pathlib import Path

import pytest

@pytest.fixture(scope="module")
def made():
    with open(Path(__file__).parent / "made", "a") as file:
        file.write("x")

@pytest.mark.parametrize("number", range(12))
def test_that_shares(number, made):
    pass
"""


@pytest.mark.processes
def test_those_marked_alone_meet_nobody_others_do_and_what_a_file_shares_is_made_once(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "test_sharing.py").write_text(SHARING)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n  alone: x\n  processes: x\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "3", "--dist", "loadscope"]
    done = subprocess.run([*command, "."], cwd=tmp_path, capture_output=True, text=True, timeout=4 * DEADLINE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "27 passed" in done.stdout
    assert (tmp_path / "made").read_text() == "x"
    assert max(map(int, (tmp_path / "met").read_text().split())) > 1, "they are side by side"


def test_a_turn_alone_waits_for_the_others_and_keeps_newcomers_out(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from tests.conftest import turn\n"
    code += "with turn(Path(sys.argv[1]), alone=sys.argv[2] == 'alone'): print('in', flush=True); sys.stdin.read()"

    def enter(how: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", code, str(tmp_path), how]
        return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def has_entered(process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        assert process.stdout.readline() == "in\n"

    def leave(process: subprocess.Popen[str]) -> None:
        process.communicate(timeout=DEADLINE)

    with turn(tmp_path, alone=False):
        other = enter("other")
        has_entered(other)
        leave(other)
        alone = enter("alone")
        with pytest.raises(subprocess.TimeoutExpired):
            alone.wait(0.5)
    has_entered(alone)
    newcomer = enter("other")
    with pytest.raises(subprocess.TimeoutExpired):
        newcomer.wait(0.5)
    leave(alone)
    has_entered(newcomer)
    leave(newcomer)
