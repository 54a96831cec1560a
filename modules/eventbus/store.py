"""The file in which eventbus keeps the subscriptions that the cloud asked for."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Final

from modules.eventbus.subscriptions import DamagedStore, Snapshot, decode, encode

FILE_NAME: Final = "eventbus-subscriptions.json"


class SubscriptionStore:
    """One JSON file, replaced as a whole: after a power cut it holds the old intent or the new one."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / FILE_NAME

    def load(self) -> tuple[Snapshot, str]:
        """What is stored, and a warning (or ""). A damaged file is set aside and an empty intent begun."""
        try:
            return decode(self.path.read_bytes()), ""
        except FileNotFoundError:
            return Snapshot(), ""
        except DamagedStore as fault:
            aside = self.path.with_suffix(".damaged")
            with contextlib.suppress(OSError):
                self.path.replace(aside)
            return Snapshot(), f"{self.path} is damaged ({fault}): set aside as {aside.name}, begun anew"

    def save(self, snapshot: Snapshot) -> None:
        """Returns once it is on disk; raises OSError and leaves the old file when it cannot be."""
        self.path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".new")
        with open(temporary, "wb") as file:
            os.fchmod(file.fileno(), 0o600)
            file.write(encode(snapshot))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)
        directory = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)  # the rename, too
        finally:
            os.close(directory)
