from __future__ import annotations

from pathlib import Path

import pytest

from modules.eventbus.store import FILE_NAME, SubscriptionStore
from modules.eventbus.subscriptions import Snapshot


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    store = SubscriptionStore(tmp_path / "data")
    store.save(Snapshot(wanted=["a/#"], unwanted=["b"]))
    assert SubscriptionStore(tmp_path / "data").load() == (Snapshot(wanted=["a/#"], unwanted=["b"]), "")
    assert (tmp_path / "data" / FILE_NAME).stat().st_mode & 0o777 == 0o600
    assert [each.name for each in (tmp_path / "data").iterdir()] == [FILE_NAME]


def test_no_file_is_an_empty_intent(tmp_path: Path) -> None:
    assert SubscriptionStore(tmp_path).load() == (Snapshot(), "")


def test_a_damaged_file_is_set_aside_and_named(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"{half")
    snapshot, warning = SubscriptionStore(tmp_path).load()
    assert snapshot == Snapshot()
    assert FILE_NAME in warning
    assert (tmp_path / FILE_NAME).with_suffix(".damaged").read_bytes() == b"{half"


def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = SubscriptionStore(tmp_path)
    store.save(Snapshot(wanted=["a"]))

    def full(_fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("modules.eventbus.store.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        store.save(Snapshot(wanted=["b"]))
    assert store.load() == (Snapshot(wanted=["a"]), "")
