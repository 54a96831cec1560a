"""The outbox with a disk behind it: what is accepted is on disk or in the cloud, through any loss and restart."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from modules.edgehub.outbox import LOADED_BYTES, Class, Outbox, OutboxLimits, StoredRow

LIMITS = OutboxLimits(max_messages=100, max_bytes=10_000, stored_messages=400, stored_bytes=1 << 20)
EVERYTHING = 1e9


def box_with(*tokens: str, kind: Class = Class.DATA, now: float = 0.0) -> Outbox[str]:
    box: Outbox[str] = Outbox(LIMITS)
    for token in tokens:
        box.put(token.encode(), token, kind, sender="s", now=now)
    return box


def take(box: Outbox[str], most: int = 1000) -> list[str]:
    return [entry.payload.decode() for entry in box.take(10_000, max_messages=most, max_data=None)]


def confirm(box: Outbox[str]) -> list[str]:
    barrier = box.barrier()
    return box.passed(barrier) if barrier is not None else []


def test_nothing_is_spilled_while_the_cloud_confirms_in_time() -> None:
    box = box_with("a", "b", now=5.0)
    take(box)
    assert box.spill(Class.DATA, 5.0) == []
    assert confirm(box) == ["a", "b"]
    assert box.spill(Class.DATA, EVERYTHING) == []
    assert box.deletions() == [], "what never was on disk needs no deletion"


def test_what_is_stored_is_settled_once_and_deleted_when_the_cloud_has_it() -> None:
    box = box_with("a", "b")
    rows = box.spill(Class.DATA, EVERYTHING)
    assert rows == [StoredRow(1, "s", b"a"), StoredRow(2, "s", b"b")]
    assert box.spill(Class.DATA, EVERYTHING) == [], "it is ordered once"
    assert box.stored(Class.DATA, 2) == ["a", "b"]
    assert take(box) == ["a", "b"]
    assert confirm(box) == [], "settled when it was stored"
    assert box.deletions() == [(Class.DATA, 2)]
    assert box.deletions() == []
    assert box.held_messages == box.held_bytes == 0


def test_what_is_confirmed_before_its_commit_is_settled_then_and_deleted_afterwards() -> None:
    box = box_with("a")
    take(box)
    assert [row.row for row in box.spill(Class.DATA, EVERYTHING)] == [1]
    assert confirm(box) == ["a"]
    assert box.deletions() == [(Class.DATA, 1)]
    assert box.stored(Class.DATA, 1) == []
    assert box.held_messages == box.held_bytes == 0


def test_the_unconfirmed_are_stored_before_what_waits() -> None:
    box = box_with("a", "b", "c")
    take(box, most=1)
    assert [row.payload for row in box.spill(Class.DATA, EVERYTHING)] == [b"a", b"b", b"c"]


def test_a_backlog_is_read_in_pieces_and_new_messages_come_behind_it() -> None:
    box: Outbox[str] = Outbox(LIMITS)
    box.restore(Class.DATA, 11, 13, 3, 3)
    box.put(b"new", "new", Class.DATA)
    assert take(box) == [], "what is stored comes first"
    assert box.wanted() == [(Class.DATA, 10)]
    assert box.wanted() == [], "asked once"
    box.loaded(Class.DATA, 10, [StoredRow(11, "s", b"x"), StoredRow(12, "s", b"y")], now=1.0)
    assert take(box) == ["x", "y"]
    assert box.wanted() == [(Class.DATA, 12)]
    box.loaded(Class.DATA, 12, [StoredRow(13, "s", b"z")], now=1.0)
    assert take(box) == ["z", "new"]
    assert confirm(box) == ["new"]
    assert box.deletions() == [(Class.DATA, 13)]


def test_rows_go_on_where_the_file_ended() -> None:
    box: Outbox[str] = Outbox(LIMITS)
    box.restore(Class.DATA, 11, 13, 3, 3)
    box.put(b"new", "new", Class.DATA)
    assert [row.row for row in box.spill(Class.DATA, EVERYTHING)] == [14]


def test_only_a_little_of_a_large_backlog_is_in_memory() -> None:
    box: Outbox[str] = Outbox(OutboxLimits(max_messages=10**6, max_bytes=1 << 30))
    for number in range(2000):
        box.put(b"x" * 1000, str(number), Class.DATA)
    while rows := box.spill(Class.DATA, EVERYTHING):
        box.stored(Class.DATA, rows[-1].row)
    assert sum(len(entry.payload) for entry in box.entries()) <= LOADED_BYTES + 1000
    assert box.stored_messages == 2000
    assert box.memory_messages == 0


def test_requests_and_acks_are_never_stored_and_pass_what_is() -> None:
    box = box_with("stored")
    box.put(b"request", "request", Class.DATA, is_volatile=True)
    assert [row.payload for row in box.spill(Class.DATA, EVERYTHING)] == [b"stored"]
    assert take(box) == ["request", "stored"]


def test_a_full_disk_limit_pushes_back() -> None:
    box: Outbox[str] = Outbox(OutboxLimits(10, 1000, stored_messages=3, stored_bytes=1000))
    box.restore(Class.DATA, 1, 2, 2, 20)
    assert box.has_room(Class.DATA, 10)
    box.put(b"x", "x", Class.DATA)
    assert not box.has_room(Class.DATA, 10)
    assert box.has_room(Class.SIGNAL, 10)


def test_a_message_given_up_after_it_was_accepted_comes_without_a_token() -> None:
    box = box_with("poison")
    box.spill(Class.DATA, EVERYTHING)
    box.stored(Class.DATA, 1)
    poisoned = None
    for _ in range(6):
        take(box)
        poisoned = box.lost(is_cut_by_cloud=True) or poisoned
    assert poisoned is not None
    assert (poisoned.token, poisoned.sender, poisoned.payload) == (None, "s", b"poison")
    assert box.deletions() == [(Class.DATA, 1)]


def test_what_a_damaged_file_held_and_memory_still_has_is_stored_again_in_order() -> None:
    box = box_with("a", "b", "c")
    rows = box.spill(Class.DATA, EVERYTHING)
    box.stored(Class.DATA, rows[-1].row)
    take(box, most=1)
    box.put(b"d", "d", Class.DATA)
    assert box.damaged() == 0
    again = box.spill(Class.DATA, EVERYTHING)
    assert [row.payload for row in again] == [b"a", b"b", b"c", b"d"]
    assert [row.row for row in again] == [4, 5, 6, 7]
    assert box.stored(Class.DATA, 7) == ["d"], "the others were settled before"


def test_rows_that_only_a_damaged_file_held_are_counted_as_gone() -> None:
    box: Outbox[str] = Outbox(LIMITS)
    box.restore(Class.DATA, 1, 50, 50, 500)
    assert box.wanted() == [(Class.DATA, 0)]
    assert box.damaged() == 50
    box.put(b"new", "new", Class.DATA)
    assert take(box) == ["new"]


def test_dropped_rows_are_not_sent_any_more() -> None:
    box: Outbox[str] = Outbox(LIMITS)
    box.restore(Class.DATA, 1, 4, 4, 4)
    box.wanted()
    box.loaded(Class.DATA, 0, [StoredRow(1, "s", b"a"), StoredRow(2, "s", b"b")], now=0.0)
    box.dropped(Class.DATA, 3, 3, 3)
    assert take(box) == []
    assert box.wanted() == [(Class.DATA, 3)]
    box.loaded(Class.DATA, 3, [StoredRow(4, "s", b"d")], now=0.0)
    assert take(box) == ["d"]
    assert box.stored_messages == 1


class DiskMachine(RuleBasedStateMachine):
    """Any order of puts, writes, pongs, link losses, spills, commits, reads, deletions and restarts."""

    def __init__(self) -> None:
        super().__init__()
        self.file: dict[Class, dict[int, bytes]] = {kind: {} for kind in Class}
        self.top: dict[Class, int] = dict.fromkeys(Class, 0)
        self.orders: list[tuple[str, Class, object]] = []
        self.numbers = dict.fromkeys(Class, 0)
        self.accepted: set[bytes] = set()
        self.dropped: set[bytes] = set()
        self.given_away: set[bytes] = set()  # tokens that came back
        self.cloud: list[bytes] = []
        self.begin()

    def begin(self) -> None:
        self.box: Outbox[bytes] = Outbox(LIMITS)
        self.now = 0.0
        self.written: list[bytes] = []
        self.read = 0
        self.barriers: list[tuple[int, int]] = []
        for kind in Class:
            rows = self.file[kind]
            last = max(rows, default=self.top[kind])
            size = sum(map(len, rows.values()))
            self.box.restore(kind, min(rows, default=last + 1), last, len(rows), size)

    def settle(self, tokens: list[bytes]) -> None:
        for token in tokens:
            assert token not in self.given_away, "a token came back twice"
            self.given_away.add(token)
            self.accepted.add(token)

    @rule(kind=st.sampled_from(Class), size=st.integers(0, 3000))
    def put(self, kind: Class, size: int) -> None:
        if not self.box.has_room(kind, size):
            return
        self.numbers[kind] += 1
        payload = f"{kind.name}{self.numbers[kind]:06d}".encode() + b"x" * size
        self.now += 1.0
        self.box.put(payload, payload, kind, sender="s", now=self.now)

    @rule(room=st.integers(1, 5000), most=st.integers(1, 20))
    def write(self, room: int, most: int) -> None:
        self.written += [entry.payload for entry in self.box.take(room, max_messages=most, max_data=None)]

    @rule()
    def ping(self) -> None:
        if (barrier := self.box.barrier()) is not None:
            self.barriers.append((barrier, len(self.written)))

    @precondition(lambda self: self.barriers)
    @rule(which=st.integers(0, 3))
    def pong(self, which: int) -> None:
        barrier, count = self.barriers[min(which, len(self.barriers) - 1)]
        self.cloud_reads(count)
        self.settle(self.box.passed(barrier))
        self.barriers = [pair for pair in self.barriers if pair[0] > barrier]
        self.orders += [("delete", kind, upto) for kind, upto in self.box.deletions()]

    def cloud_reads(self, count: int) -> None:
        self.cloud += self.written[self.read : count]
        self.read = max(self.read, count)

    @rule(read=st.integers(0, 50))
    def lose(self, read: int) -> None:
        self.cloud_reads(min(len(self.written), self.read + read))
        self.box.lost()
        self.written, self.read, self.barriers = [], 0, []

    @rule(kind=st.sampled_from(Class), ago=st.integers(0, 20))
    def spill(self, kind: Class, ago: int) -> None:
        if rows := self.box.spill(kind, self.now - ago + 0.5):
            self.orders.append(("add", kind, rows))

    @rule()
    def ask_for_rows(self) -> None:
        self.orders += [("read", kind, after) for kind, after in self.box.wanted()]

    @precondition(lambda self: self.orders)
    @rule(count=st.integers(1, 4), most=st.integers(1, 10))
    def disk_works(self, count: int, most: int) -> None:
        for what, kind, value in self.orders[:count]:
            rows = self.file[kind]
            if what == "add":
                assert isinstance(value, list)
                for row in value:
                    assert row.row not in rows
                    rows[row.row] = row.payload
                self.settle(self.box.stored(kind, value[-1].row))
            elif what == "delete":
                assert isinstance(value, int)
                self.top[kind] = max(self.top[kind], value)
                for number in [number for number in rows if number <= value]:
                    del rows[number]
            elif what == "drop":
                assert isinstance(value, int)
                gone = {number: rows.pop(number) for number in sorted(rows) if number <= value}
                if gone:
                    self.dropped |= set(gone.values())
                    self.top[kind] = max(self.top[kind], *gone)
                    self.box.dropped(kind, max(gone), len(gone), sum(map(len, gone.values())))
            else:
                assert isinstance(value, int)
                found = [StoredRow(n, "s", rows[n]) for n in sorted(rows) if n > value][:most]
                self.box.loaded(kind, value, found, now=self.now)
        del self.orders[:count]

    @rule(kind=st.sampled_from(Class), count=st.integers(1, 10))
    def drop(self, kind: Class, count: int) -> None:
        """By age or size, from the front."""
        if self.file[kind]:
            self.orders.append(("drop", kind, min(self.file[kind]) + count - 1))

    @rule()
    def restart(self) -> None:
        """The process is killed: memory and orders are gone, the file stays as its last commit left it."""
        self.orders = []
        self.cloud_reads(len(self.written))
        self.begin()

    @invariant()
    def what_is_accepted_is_on_disk_or_in_the_cloud(self) -> None:
        durable = {payload for kind in Class for payload in self.file[kind].values()} | set(self.cloud)
        assert self.accepted <= durable | self.dropped

    @invariant()
    def rows_are_numbered_without_gaps(self) -> None:
        for rows in self.file.values():
            if rows:
                assert max(rows) - min(rows) + 1 == len(rows)

    @invariant()
    def the_cloud_reads_each_class_in_order_but_for_repeats(self) -> None:
        for kind in Class:
            first: list[bytes] = []
            seen: set[bytes] = set()
            for payload in self.cloud:
                if payload.startswith(kind.name.encode()) and payload not in seen:
                    seen.add(payload)
                    first.append(payload)
            assert [p[:14] for p in first] == sorted(p[:14] for p in first)

    @invariant()
    def the_account_adds_up(self) -> None:
        assert self.box.mismatch == 0

    @invariant()
    def memory_is_bounded(self) -> None:
        assert self.box.memory_messages <= 2 * LIMITS.max_messages
        assert self.box.memory_messages >= 0
        assert self.box.stored_messages >= 0

    def teardown(self) -> None:
        """In the end everything that was accepted reaches the cloud, and the file is empty."""
        self.lose(0)
        for _ in range(3000):
            self.write(100_000, 1000)
            self.ping()
            if self.barriers:
                self.pong(3)
            for kind in Class:
                self.spill(kind, 0)
            self.ask_for_rows()
            if self.orders:
                self.disk_works(4, 1000)
            if not self.box.held_messages and not self.orders:
                break
        assert self.box.held_messages == 0, "stuck"
        assert self.accepted <= set(self.cloud) | self.dropped
        assert not any(self.file.values())
        assert self.box.held_bytes == 0


TestOutboxOnDisk = DiskMachine.TestCase
TestOutboxOnDisk.settings = settings(max_examples=120, stateful_step_count=60, deadline=None)


def test_what_waits_is_stored_only_behind_what_was_written_before_it() -> None:
    box = box_with("a", "b", now=1.0)
    box.take(10_000, max_messages=1, max_data=None, now=5.0)
    assert box.spill(Class.DATA, 2.0, 0.5) == [], "neither is due"
    assert [row.payload for row in box.spill(Class.DATA, 2.0, 3.0)] == [b"a", b"b"], "b is, and a comes first"
