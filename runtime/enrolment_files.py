"""CA, certificate and key replaced as a set: after a crash at any point it is the old one or the new one.

The new files are written beside the old ones and made durable. Then a journal, itself renamed into place, says that
they are the set from now on: that is the moment of the change. Renaming them follows, and whoever reads the files
finishes it first where a crash left it undone (`recover`). A crash before the journal leaves the old set.
"""

from __future__ import annotations

from runtime.enrolment import BUSY, FILES  # first: it imports msgspec lean

# isort: split

import contextlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

import msgspec

from runtime.errors import AlreadyRunning, NotEnrolled
from runtime.locks import Lock, hold

_MODE: Final = 0o600
_DIRECTORY_MODE: Final = 0o700


class Disk:
    """The steps that a crash may come between."""

    def write(self, path: Path, data: bytes, owner: os.stat_result | None) -> None:
        """A file of mode 0600 from its first byte on, durable when this returns."""
        path.unlink(missing_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, _MODE)
        with os.fdopen(descriptor, "wb") as file:
            if owner is not None:
                os.fchown(descriptor, owner.st_uid, owner.st_gid)
            file.write(data)
            file.flush()
            os.fsync(descriptor)

    def rename(self, old: Path, new: Path) -> None:
        old.rename(new)

    def sync(self, directory: Path) -> None:
        """Make the names in a directory durable."""
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def remove(self, path: Path) -> None:
        path.unlink(missing_ok=True)


class FileSet:
    """The files of one node's identity; `cert_file` says where journal and lock are."""

    def __init__(self, ca_file: str, cert_file: str, key_file: str, *, disk: Disk | None = None) -> None:
        # What a link points to is replaced, not the link.
        self.ca, self.cert, self.key = (Path(os.path.realpath(path)) for path in (ca_file, cert_file, key_file))
        self._disk = disk or Disk()

    @property
    def journal(self) -> Path:
        return self.cert.with_name(f".{self.cert.name}.journal")

    @property
    def exists(self) -> bool:
        """Whether all three are there; call `recover` before."""
        return all(os.path.exists(path) for path in (self.ca, self.cert, self.key))  # Path.exists raises

    def lock(self) -> Lock:
        """For whoever is about to replace the set. Makes the directories. Raises NotEnrolled."""
        try:
            for path in (self.ca, self.cert, self.key):
                path.parent.mkdir(mode=_DIRECTORY_MODE, parents=True, exist_ok=True)
            lock = hold(self.cert.with_name(f".{self.cert.name}.lock"))
            if (owner := _owner(self.cert)) is not None:
                os.fchown(lock.fileno(), owner.st_uid, owner.st_gid)
            return lock
        except AlreadyRunning as taken:
            who = f"process {taken.pid}" if taken.pid else "another process"
            raise NotEnrolled(BUSY, f"{who} is getting a certificate into {self.cert} already") from taken
        except OSError as fault:
            raise _unwritable(fault) from fault

    def replace(self, *, cert: bytes, key: bytes, ca: bytes | None = None) -> None:
        """Replace the set (without `ca`: certificate and key). Hold the lock. Raises NotEnrolled (files).

        When it raises, the files are as they were.
        """
        wanted = [(self.key, key), (self.cert, cert)] + ([] if ca is None else [(self.ca, ca)])
        fresh = [(_fresh(path), path) for path, _ in wanted]
        directories = {path.parent for path, _ in wanted}
        try:
            self.recover()
            for path, data in wanted:
                self._disk.write(_fresh(path), data, _owner(path))
            for directory in directories:
                self._disk.sync(directory)
            scratch = _fresh(self.journal)
            names = [(str(new), str(path)) for new, path in fresh]
            self._disk.write(scratch, msgspec.json.encode(names), _owner(self.cert))
            self._disk.rename(scratch, self.journal)
        except OSError as fault:
            for new in (*(new for new, _ in fresh), _fresh(self.journal)):
                with contextlib.suppress(OSError):
                    new.unlink(missing_ok=True)
            raise _unwritable(fault) from fault
        # From here on the new set is the set, whatever happens.
        try:
            self._disk.sync(self.journal.parent)
            self._finish(fresh)
        except OSError as fault:
            raise _unwritable(fault, is_committed=True) from fault

    def recover(self) -> bool:
        """Finish a replacement that was cut short; True when there was one. Cheap when not.

        Several processes may do it at once, also while the one that began it goes on. Raises OSError.
        """
        try:
            names = msgspec.json.decode(self.journal.read_bytes(), type=list[tuple[str, str]])
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            return False  # who may not look here may not read the files either, and that will be told
        self._finish([(Path(new), Path(path)) for new, path in names])
        return True

    def _finish(self, renames: Sequence[tuple[Path, Path]]) -> None:
        for new, path in renames:
            with contextlib.suppress(FileNotFoundError):  # done already
                self._disk.rename(new, path)
        _sync_all(self._disk, (path.parent for _, path in renames))
        self._disk.remove(self.journal)
        self._disk.sync(self.journal.parent)


def _sync_all(disk: Disk, directories: Iterable[Path]) -> None:
    for directory in dict.fromkeys(directories):
        disk.sync(directory)


def _fresh(path: Path) -> Path:
    return path.with_name(f".{path.name}.new")


def _owner(path: Path) -> os.stat_result | None:
    """Whose the new file is to be when root makes it: whoever has the old one, or the directory."""
    if os.geteuid() != 0:
        return None
    return (path if path.exists() else path.parent).stat()


def _unwritable(fault: OSError, *, is_committed: bool = False) -> NotEnrolled:
    where = f"{fault.filename}: " if fault.filename else ""
    what = f"{where}{fault.strerror or fault}"
    if is_committed:
        return NotEnrolled(FILES, f"{what}: the new certificate is kept, and put in place at the next try")
    return NotEnrolled(
        FILES,
        f"{what}: the new certificate cannot be kept. Make the directory writable for this user, or let tlsCaFile, "
        "tlsCertFile and tlsPrivateKeyFile of modules.edgeHub name another, as EDGEZMQ_HOME/pki",
    )
