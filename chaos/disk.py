"""The shim (shim.c) from Python: building it, its pages of control, and the files as a power loss leaves them."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

_PAGE_BYTES: Final = 4096
_CLOCK, _FULL, _REFUSED = 0, 8, 16
"Offsets of struct control in shim.c."


def build_shim(directory: Path) -> Path:
    """Compile the shim into `directory`. Raises OSError or CalledProcessError where there is no C compiler."""
    target = directory / "shim.so"
    source = Path(__file__).with_name("shim.c")
    command = [os.environ.get("CC", "cc"), "-O2", "-shared", "-fPIC", "-o", str(target), str(source)]
    subprocess.run([*command, "-ldl", "-lpthread"], check=True, capture_output=True)
    return target


class Control:
    """The pages by which chaos tells each shimmed process what its disk and its clock do."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def set_clock(self, process: str, offset_seconds: float) -> None:
        """Shift the wall clock of `process`, and of what is started under its name later."""
        self._write(process, _CLOCK, int(offset_seconds * 1e9))

    def set_full(self, process: str, is_full: bool) -> None:
        self._write(process, _FULL, int(is_full))

    def refused(self, process: str) -> int:
        """Writes that met a full disk so far."""
        try:
            with (self.directory / process).open("rb") as page:
                page.seek(_REFUSED)
                return int(struct.unpack("=q", page.read(8))[0])
        except (OSError, struct.error):
            return 0

    def is_shimmed(self, process: str) -> bool:
        return (self.directory / process).exists()

    def _write(self, process: str, at: int, value: int) -> None:
        fd = os.open(self.directory / process, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if os.fstat(fd).st_size < _PAGE_BYTES:
                os.ftruncate(fd, _PAGE_BYTES)
            os.pwrite(fd, struct.pack("=q", value), at)
        finally:
            os.close(fd)


@dataclass
class _Entry:
    key: str
    kind: str
    "f: file, d: directory, x: something else (a socket), which a power loss does not bring back."


@dataclass
class Disk:
    """The directory whose files may lose power, and its shadow.

    `checkpoint` says that all there is now has reached the disk; only while no process writes. After `lose_power`
    the directory holds what a strict reading of POSIX promises: each file as of its last fsync since then (or as
    of the checkpoint), under the names that its directory had at the directory's last fsync (or the checkpoint).
    """

    root: Path
    shadow: Path
    _base: dict[str, dict[str, _Entry]] = field(default_factory=dict)
    "Directory, relative to the root, to names at the checkpoint."
    losses: int = 0

    def checkpoint(self) -> None:
        shutil.rmtree(self.shadow, ignore_errors=True)
        for name in ("files", "names", "base"):
            (self.shadow / name).mkdir(mode=0o700, parents=True)
        self._base = {}
        for directory, _, _ in os.walk(self.root):
            names: dict[str, _Entry] = {}
            for entry in os.scandir(directory):
                key, kind = _key(entry), _kind(entry)
                names[entry.name] = _Entry(key, kind)
                if kind == "f":
                    shutil.copyfile(entry.path, self.shadow / "base" / key)
            self._base[os.path.relpath(directory, self.root)] = names

    def lose_power(self) -> None:
        """Put the files together as the disk has them. Only when every process that wrote here is dead."""
        self.losses += 1
        lost = self.root.with_name(f"{self.root.name}.before-loss")
        shutil.rmtree(lost, ignore_errors=True)  # the last one is kept, to look at
        self.root.rename(lost)
        self._restore(".", lost)
        self.checkpoint()

    def _restore(self, directory: str, lost: Path) -> None:
        target = self.root / directory
        target.mkdir()
        shutil.copymode(lost / directory, target) if (lost / directory).is_dir() else target.chmod(0o700)
        for name, entry in self._names(directory).items():
            path = target / name
            if entry.kind == "d":
                self._restore(os.path.normpath(os.path.join(directory, name)), lost)
            elif entry.kind == "f":
                for held in ("files", "base"):
                    if (self.shadow / held / entry.key).exists():
                        shutil.copyfile(self.shadow / held / entry.key, path)
                        break
                else:
                    path.touch()  # a name without content: as after a delayed allocation
                path.chmod(0o600)

    def _names(self, directory: str) -> dict[str, _Entry]:
        synced = self.shadow / "names" / ("@" + directory.replace("/", "\1"))
        if not synced.exists():
            return self._base.get(directory, {})
        names = {}
        for line in synced.read_text().splitlines():
            key, kind, name = line.split(" ", 2)
            names[name] = _Entry(key, kind)
        return names


def _kind(entry: os.DirEntry[str]) -> str:
    if entry.is_file(follow_symlinks=False):
        return "f"
    return "d" if entry.is_dir(follow_symlinks=False) else "x"


def _key(entry: os.DirEntry[str]) -> str:
    # Python has no statx: coreutils' stat tells the birth, to the nanosecond.
    text = subprocess.run(["stat", "-c", "%i %W %w", entry.path], check=True, capture_output=True, text=True).stdout
    inode, seconds, words = text.split(" ", 2)
    fraction = words.split()[1].partition(".")[2] or "0"
    return f"{inode}-{seconds}.{fraction[:9].ljust(9, '0')}"
