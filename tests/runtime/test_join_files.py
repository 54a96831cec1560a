"""The files of an identity are replaced as a set: a crash at any step leaves the old one or the new one, whole."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runtime.enrolment import BUSY, FILES
from runtime.enrolment_files import Disk, FileSet
from runtime.errors import NotEnrolled

OLD = {"ca": b"old ca", "cert": b"old certificate", "key": b"old key"}
NEW = {"ca": b"the new ca", "cert": b"the new certificate", "key": b"the new key"}
RENEWED = NEW | {"ca": OLD["ca"]}


class Crash(BaseException):
    """The process ends here."""


class CrashingDisk(Disk):
    """Ends the process at its `at`-th step: before it, after it, or (a write) in the middle of it."""

    def __init__(self, at: int, when: str) -> None:
        self.at = at
        self.when = when
        self.steps = 0

    def _step(self, act: Callable[..., None], *arguments: Any) -> None:
        self.steps += 1
        if self.steps != self.at:
            act(*arguments)
            return
        if self.when == "after":
            act(*arguments)
        if self.when == "half" and act.__name__ == "write":
            arguments[0].write_bytes(arguments[1][: len(arguments[1]) // 2])
        raise Crash

    def write(self, path: Path, data: bytes, owner: os.stat_result | None) -> None:
        self._step(super().write, path, data, owner)

    def rename(self, old: Path, new: Path) -> None:
        self._step(super().rename, old, new)

    def sync(self, directory: Path) -> None:
        self._step(super().sync, directory)

    def remove(self, path: Path) -> None:
        self._step(super().remove, path)


class FullDisk(Disk):
    """A disk that is full at its `at`-th write or rename."""

    def __init__(self, at: int) -> None:
        self.left = at

    def _step(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise OSError(28, "No space left on device", "somewhere")

    def write(self, path: Path, data: bytes, owner: os.stat_result | None) -> None:
        self._step()
        super().write(path, data, owner)

    def rename(self, old: Path, new: Path) -> None:
        self._step()
        super().rename(old, new)


def paths(home: Path) -> tuple[str, str, str]:
    """As KubeEdge has them: the CA in another directory."""
    return str(home / "ca" / "rootCA.crt"), str(home / "certs" / "server.crt"), str(home / "certs" / "server.key")


def lay(home: Path) -> None:
    """The old set, in place."""
    for path, content in zip(paths(home), OLD.values(), strict=True):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(content)


def found(home: Path) -> dict[str, bytes]:
    """What a reader finds, who recovers first."""
    files = FileSet(*paths(home))
    files.recover()
    return {"ca": files.ca.read_bytes(), "cert": files.cert.read_bytes(), "key": files.key.read_bytes()}


def names(home: Path) -> list[str]:
    return sorted(path.name for path in home.rglob("*") if path.is_file())


def steps_of_a_replacement(home: Path) -> int:
    disk = CrashingDisk(0, "")
    lay(home)
    FileSet(*paths(home), disk=disk).replace(**NEW)
    return disk.steps


@pytest.mark.parametrize("when", ["before", "half", "after"])
@pytest.mark.parametrize("what", ["join", "rotation"])
def test_a_crash_at_any_step_of_a_join_or_rotation_leaves_one_whole_set(tmp_path: Path, when: str, what: str) -> None:
    wanted = NEW if what == "join" else {"cert": NEW["cert"], "key": NEW["key"]}
    new = NEW if what == "join" else RENEWED
    seen = set()
    count = steps_of_a_replacement(tmp_path / "count")
    assert count > 10
    for at in range(1, count + 1):
        home = tmp_path / f"{at}"
        lay(home)
        try:
            FileSet(*paths(home), disk=CrashingDisk(at, when)).replace(**wanted)
        except Crash:
            pass
        left = found(home)
        assert left in (OLD, new), f"a mixed set after a crash {when} step {at}"
        seen.add(left == new)
        # Whatever was left lying about does not keep the next one from succeeding.
        FileSet(*paths(home)).replace(**NEW)
        assert found(home) == NEW
        assert names(home) == ["rootCA.crt", "server.crt", "server.key"]
    assert seen == {True, False}


def test_a_crash_while_recovering_is_recovered_from(tmp_path: Path) -> None:
    for at in range(1, 10):
        home = tmp_path / f"{at}"
        lay(home)
        with pytest.raises(Crash):
            FileSet(*paths(home), disk=CrashingDisk(9, "before")).replace(**NEW)
        assert (home / "certs" / ".server.crt.journal").exists()
        try:
            FileSet(*paths(home), disk=CrashingDisk(at, "before")).recover()
        except Crash:
            pass
        assert found(home) == NEW


def test_a_first_join_that_crashes_leaves_nothing_or_everything(tmp_path: Path) -> None:
    for at in range(1, 20):
        home = tmp_path / f"{at}"
        for path in paths(home):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        try:
            FileSet(*paths(home), disk=CrashingDisk(at, "after")).replace(**NEW)
        except Crash:
            pass
        files = FileSet(*paths(home))
        files.recover()
        there = [path.exists() for path in (files.ca, files.cert, files.key)]
        assert all(there) or not any(there)
        assert files.exists is all(there)


def test_a_full_disk_leaves_the_old_files_and_says_what_to_do(tmp_path: Path) -> None:
    for at in range(1, 6):
        home = tmp_path / f"{at}"
        lay(home)
        with pytest.raises(NotEnrolled, match="No space left on device: the new certificate cannot be kept") as caught:
            FileSet(*paths(home), disk=FullDisk(at)).replace(**NEW)
        assert caught.value.code == FILES
        assert found(home) == OLD
        assert names(home) == ["rootCA.crt", "server.crt", "server.key"], "no half-written key stays behind"


def test_what_cannot_be_renamed_after_the_change_is_kept_for_the_next_try(tmp_path: Path) -> None:
    lay(tmp_path)
    with pytest.raises(NotEnrolled, match="is kept, and put in place at the next try"):
        FileSet(*paths(tmp_path), disk=FullDisk(6)).replace(**NEW)
    assert found(tmp_path) == NEW


def test_new_files_are_closed_to_others_and_so_are_new_directories(tmp_path: Path) -> None:
    files = FileSet(*paths(tmp_path))
    with files.lock():
        files.replace(**NEW)
    for path in paths(tmp_path):
        assert Path(path).stat().st_mode & 0o777 == 0o600
        assert Path(path).parent.stat().st_mode & 0o777 == 0o700


def test_what_a_link_points_to_is_replaced_and_not_the_link(tmp_path: Path) -> None:
    lay(tmp_path)
    (tmp_path / "link.crt").symlink_to(tmp_path / "certs" / "server.crt")
    ca, _, key = paths(tmp_path)
    FileSet(ca, str(tmp_path / "link.crt"), key).replace(**NEW)
    assert (tmp_path / "link.crt").is_symlink()
    assert found(tmp_path) == NEW


def test_only_one_process_joins_at_a_time(tmp_path: Path) -> None:
    with FileSet(*paths(tmp_path)).lock(), pytest.raises(NotEnrolled) as caught:
        FileSet(*paths(tmp_path)).lock()
    assert caught.value.code == BUSY
    assert str(os.getpid()) in caught.value.text


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "certs").write_bytes(b"a file in the way")
    with pytest.raises(NotEnrolled, match=r"certs: .*EDGEZMQ_HOME/pki") as caught:
        FileSet(*paths(tmp_path)).lock()
    assert caught.value.code == FILES
