"""Every decoder of outside bytes under Hypothesis: the targets of `make fuzz`, with fewer inputs and no coverage."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz.target import Target, pieces
from fuzz.targets import TARGETS

ROOT = Path(__file__).parents[2]
EXAMPLES = 150
SLOW = {"edgecore_yaml": 30, "outbox_file": 25, "node_json": 50}
"Inputs for targets that read a file or a language written in Python."

Edit = tuple[str, int, bytes]


def inputs(target: Target) -> st.SearchStrategy[bytes]:
    """Any bytes, and seeds with a few changes."""
    words = st.binary(max_size=8)
    if target.tokens:
        words |= st.sampled_from(target.tokens)
    edit = st.tuples(st.sampled_from(("insert", "replace", "cut", "repeat")), st.integers(0, 2**16), words)
    changed = st.builds(edited, st.sampled_from(list(target.seeds())), st.lists(edit, max_size=6))
    return changed | st.binary(max_size=300)


def edited(seed: bytes, edits: list[Edit]) -> bytes:
    data = bytearray(seed)
    for what, at, word in edits:
        at %= len(data) + 1
        match what:
            case "insert":
                data[at:at] = word
            case "replace":
                data[at : at + len(word)] = word
            case "cut":
                del data[at : at + 1 + len(word) ** 2]
            case "repeat":
                data[at:at] = data[at : at + 64]
    return bytes(data)


@pytest.mark.parametrize("name", TARGETS)
def test_a_decoder_takes_any_bytes_or_says_no(name: str) -> None:
    target = TARGETS[name]

    @settings(
        max_examples=SLOW.get(name, EXAMPLES),
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    @given(inputs(target))
    def decode(data: bytes) -> None:
        target.check(data)

    decode()


@pytest.mark.parametrize("name", TARGETS)
def test_a_decoder_reads_its_seeds(name: str) -> None:
    for seed in TARGETS[name].seeds():
        TARGETS[name].check(seed)


@given(st.binary(max_size=500))
def test_pieces_are_the_whole(data: bytes) -> None:
    assert b"".join(pieces(data)) == data
    assert list(pieces(data)) == list(pieces(data))


def test_every_target_is_in_the_document() -> None:
    text = (ROOT / "docs" / "fuzzing.md").read_text()
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) == TARGETS.keys()
    assert all(target.what for target in TARGETS.values())


# --- the command --------------------------------------------------------------------------------------


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fuzz", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_an_input_can_be_fed_again(tmp_path: Path) -> None:
    good = tmp_path / "good"
    good.write_bytes(b"\x90")
    done = command("message_batch", "--replay", good)
    assert (done.returncode, done.stdout) == (0, f"{good}: ok\n")


def test_an_unknown_target_is_refused() -> None:
    done = command("mesage_batch", "--list")
    assert done.returncode == 2
    assert "no such target: mesage_batch" in done.stderr


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed (make fuzz does)")
def test_fuzzing_runs_for_its_time_and_finds_a_fault(tmp_path: Path) -> None:
    program = tmp_path / "broken.py"
    program.write_text(
        "import fuzz.__main__ as main\n"
        f"main.STATE = main.Path({str(tmp_path)!r})\n"
        f"main.ROOT = main.Path({str(tmp_path)!r})\n"
        "from fuzz.target import target\n"
        "def seeds():\n"
        "    yield b'abc'\n"
        "@target(seeds, ValueError, tokens=(b'!',))\n"
        "def broken(data):\n"
        "    '''Breaks at a word.'''\n"
        "    int(data)\n"
        "@target(seeds)\n"
        "def worse(data):\n"
        "    '''Breaks at any.'''\n"
        "    assert b'!' not in data\n"
        "main.load = lambda is_instrumented: None\n"
        "raise SystemExit(main.main(['--seconds', '4', 'broken', 'worse']))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"broken +[\d,]+ runs  ok", done.stdout)
    assert re.search(r"worse +[\d,]+ runs  FAULT", done.stdout)
    assert "again: python -m fuzz worse --replay crashes/worse/crash-" in done.stdout
    assert "assert b'!' not in data" in done.stdout
    (crash,) = (tmp_path / "crashes" / "worse").iterdir()
    assert b"!" in crash.read_bytes()
