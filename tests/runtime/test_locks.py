"""runtime.locks: one process per name, none that outlives its supervisor."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.errors import AlreadyRunning
from runtime.locks import SUPERVISOR_PID_VARIABLE, hold, holder, holders
from tests.support.aio import until_sync


def python(code: str, **environ: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ, **environ}
    )


def test_a_second_holder_is_told_path_and_pid_of_the_first(tmp_path: Path) -> None:
    path = tmp_path / "edgehub.lock"
    with hold(path), pytest.raises(AlreadyRunning) as fault:
        hold(path)
    assert (fault.value.path, fault.value.pid) == (str(path), os.getpid())
    assert str(fault.value) == f"{path} is held by pid {os.getpid()}: it is already running"


def test_a_released_lock_is_free_and_its_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    lock = hold(path)
    assert holder(path) == os.getpid()
    lock.release()
    lock.release()
    assert holder(path) is None
    assert path.exists()
    hold(path).release()


def test_nobody_holds_a_lock_that_was_never_taken(tmp_path: Path) -> None:
    assert holder(tmp_path / "none.lock") is None
    assert list(holders(tmp_path)) == []


def test_holders_names_the_living_ones(tmp_path: Path) -> None:
    with hold(tmp_path / "b.lock"), hold(tmp_path / "a.lock"):
        hold(tmp_path / "left.lock").release()
        assert list(holders(tmp_path)) == [("a", os.getpid()), ("b", os.getpid())]


@pytest.mark.processes
def test_the_kernel_frees_the_lock_of_a_killed_process(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    child = python(
        f"import time; from pathlib import Path; from runtime.locks import hold\n"
        f"lock = hold(Path({str(path)!r})); print('held', flush=True); time.sleep(60)"
    )
    assert child.stdout is not None
    with child, child.stdout:
        assert child.stdout.readline() == "held\n"
        assert holder(path) == child.pid
        child.send_signal(signal.SIGKILL)
        child.wait()
    hold(path).release()


@pytest.mark.processes
def test_a_lock_goes_over_an_exec_only_when_it_was_told_to(tmp_path: Path) -> None:
    kept, dropped = tmp_path / "kept.lock", tmp_path / "dropped.lock"
    child = python(
        f"import os; from pathlib import Path; from runtime.locks import hold\n"
        f"a = hold(Path({str(kept)!r}), inheritable=True); b = hold(Path({str(dropped)!r}))\n"
        f"os.execvp('sleep', ['sleep', '60'])"
    )
    try:
        until_sync(lambda: Path(f"/proc/{child.pid}/comm").read_text() == "sleep\n", "the exec")
        assert holder(kept) == child.pid
        assert holder(dropped) is None
    finally:
        child.kill()
        child.communicate()


PARENT = """
import os, subprocess, sys, time
environ = dict(os.environ)
if {supervised}:
    environ[{variable!r}] = str(os.getpid())
code = "import time; from runtime.locks import die_with_parent; die_with_parent(); "
code += "print('up', flush=True); time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environ)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(60)
"""


def parent_of_a_module(*, supervised: bool) -> "tuple[subprocess.Popen[str], int]":
    parent = python(PARENT.format(supervised=supervised, variable=SUPERVISOR_PID_VARIABLE))
    assert parent.stdout is not None
    return parent, int(parent.stdout.readline())


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.processes
def test_a_supervised_process_dies_with_its_supervisor() -> None:
    parent, child = parent_of_a_module(supervised=True)
    parent.kill()
    parent.communicate()
    until_sync(lambda: is_gone(child), "the death of the child")


@pytest.mark.processes
def test_a_module_started_from_a_shell_outlives_the_shell() -> None:
    parent, child = parent_of_a_module(supervised=False)
    parent.kill()
    parent.communicate()
    try:
        assert not is_gone(child)
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.processes
def test_a_process_whose_supervisor_died_before_it_asked_ends_itself() -> None:
    gone = python("pass")
    gone.communicate()
    child = python(
        "from runtime.locks import die_with_parent; die_with_parent(); print('lives')",
        **{SUPERVISOR_PID_VARIABLE: str(gone.pid)},
    )
    output, _ = child.communicate()
    assert (output, child.returncode) == ("", 1)
