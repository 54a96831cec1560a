"""The node's own arithmetic: accepted = confirmed + held + dropped, in memory and in the file, over restarts."""

import asyncio
import sqlite3
from pathlib import Path

import pytest

from modules.edgehub.hub import OUTBOX_FILE, EdgeHub
from modules.edgehub.link import LinkLost
from modules.edgehub.outbox import Class
from modules.edgehub.store import Account, OutboxFile, Row
from tests.modules.edgehub.fakes import FakeCloud, hand_over, running, upload
from tests.modules.edgehub.test_hub import config, until_served
from tests.support.aio import run, until

DATA = Class.DATA


def rows(first: int, count: int) -> list[Row]:
    return [Row(number, "sender", b"x" * 10) for number in range(first, first + count)]


def open_file(path: Path) -> OutboxFile:
    return OutboxFile(path, boot_id="boot", now=100.0)


def test_the_file_keeps_account_of_every_row_over_restarts(tmp_path: Path) -> None:
    path = tmp_path / "outbox.db"
    file = open_file(path)
    with file.transaction():
        file.add(DATA, rows(1, 10), 100.0)
    with file.transaction():
        file.delete(DATA, 4)
        file.drop(DATA, 6, "outbox-full", 1)
    assert file.account(DATA) == Account(stored=10, confirmed=4, dropped=2, present=4)
    file.close()
    file = open_file(path)
    with file.transaction():
        file.delete(DATA, 10)
    assert file.account(DATA) == Account(stored=10, confirmed=8, dropped=2, present=0)
    assert file.account(DATA).mismatch == 0
    assert file.account(Class.SIGNAL) == Account(0, 0, 0, 0)
    file.close()


def test_a_file_that_begins_with_a_later_number_adds_up_too(tmp_path: Path) -> None:
    file = open_file(tmp_path / "outbox.db")
    with file.transaction():
        file.add(DATA, rows(501, 10), 100.0)
        file.delete(DATA, 503)
    assert file.account(DATA) == Account(stored=10, confirmed=3, dropped=0, present=7)
    file.close()


def test_a_file_of_the_first_schema_begins_its_account_with_what_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "outbox.db"
    file = open_file(path)
    with file.transaction():
        file.add(DATA, rows(1, 10), 100.0)
        file.delete(DATA, 4)
    file.close()
    db = sqlite3.connect(path)
    db.executescript("DELETE FROM meta WHERE key LIKE 'base.%' OR key LIKE 'confirmed.%'; PRAGMA user_version=1")
    db.close()
    file = open_file(path)
    assert file.account(DATA) == Account(stored=6, confirmed=0, dropped=0, present=6)
    file.close()


def test_a_row_that_vanished_is_noticed_at_the_next_start(tmp_path: Path) -> None:
    path = tmp_path / OUTBOX_FILE
    file = open_file(path)
    with file.transaction():
        file.add(DATA, rows(1, 10), 100.0)
    file.close()
    db = sqlite3.connect(path)
    db.execute("DELETE FROM data WHERE row = 1")
    db.commit()
    db.close()

    async def scenario() -> None:
        async with running(config(outbox_path=path), factory=FakeCloud()) as (hub, _):
            assert hub.counters()["ledger_mismatch"] == 1

    run(scenario())


def adds_up(hub: EdgeHub) -> bool:
    counts = hub.counters()
    have = counts["accepted"] + counts["restored"]
    return (
        counts["ledger_mismatch"] == 0
        and have == counts["confirmed"] + counts["held"] + counts["dropped"] + counts["given_up"]
    )


def test_the_hub_checks_itself_over_outages_and_restarts(tmp_path: Path) -> None:
    async def scenario() -> None:
        settings = config(outbox_path=tmp_path / OUTBOX_FILE, spill_seconds=0.02)
        number = 0
        for life in range(4):
            cloud = FakeCloud()
            if life % 2 == 0:
                cloud.faults = [LinkLost("refused")] * 1000
            async with running(settings, factory=cloud, seed=life) as (hub, _):
                assert hub.counters()["restored"] == (number if life % 2 else 0)
                deferrals = []
                for _ in range(50):
                    deferrals.append(await hand_over(hub, upload(number)))
                    number += 1
                    assert adds_up(hub)
                await until(lambda d=deferrals: all(each and each.outcome == "done" for each in d), "acceptance")
                assert adds_up(hub)
                if life % 2:
                    await until_served(hub)
                    cloud.link.lose("EOF")
                    await until(lambda h=hub: h.counters()["held"] == 0, "the confirmation")
                    number = 0
                assert adds_up(hub)
        file = open_file(tmp_path / OUTBOX_FILE)
        account = file.account(DATA)
        assert account.mismatch == 0
        assert account.present == 0
        assert account.stored == account.confirmed >= 100
        file.close()

    run(scenario())


def test_what_is_dropped_while_it_is_under_way_is_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modules.edgehub.hub._PATIENCE_SECONDS", 0.05)

    async def scenario() -> None:
        cloud = FakeCloud(answers_barriers=False)
        settings = config(
            outbox_path=tmp_path / OUTBOX_FILE,
            spill_seconds=0.02,
            outbox_messages=40,
            outbox_drops_oldest=True,
            window_bytes_max=16_384,
        )
        async with running(settings, factory=cloud) as (hub, _):
            await until_served(hub)
            sends = [
                asyncio.create_task(hand_over(hub, upload(number, pad="x" * 1000)), name=f"upload {number}")
                for number in range(100)
            ]
            await until(lambda: hub._outbox.dropped_messages > 0, "the policy")
            assert hub.counters()["ledger_mismatch"] == 0
            cloud.answers_barriers = True
            cloud.link.lose("dead", is_cut_by_cloud=False)
            await asyncio.gather(*sends)
            await until(lambda: hub.counters()["held"] == 0, "the rest")
            assert hub.counters()["ledger_mismatch"] == 0

    run(scenario())
