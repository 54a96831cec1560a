"""The outbox: nothing lost, order kept per class, bounds kept, duplicates only of what was unconfirmed."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from modules.edgehub.outbox import POISON_LOSSES, SUSPECT_LOSSES, Class, Outbox, OutboxLimits

LIMITS = OutboxLimits(max_messages=100, max_bytes=10_000)


def outbox(*tokens: str, kind: Class = Class.DATA) -> Outbox[str]:
    box: Outbox[str] = Outbox(LIMITS)
    for token in tokens:
        box.put(token.encode(), token, kind)
    return box


def take(box: Outbox[str], room: int = 10_000, most: int = 1000, data: int | None = None) -> list[str]:
    return [entry.token for entry in box.take(room, max_messages=most, max_data=data)]


def test_a_barrier_settles_what_was_written_before_it_in_order() -> None:
    box = outbox("a", "b", "c")
    assert take(box, most=2) == ["a", "b"]
    first = box.barrier()
    assert first is not None
    assert take(box) == ["c"]
    second = box.barrier()
    assert second is not None
    assert box.passed(first) == ["a", "b"]
    assert box.passed(first) == []
    assert box.passed(second) == ["c"]
    assert box.held_messages == box.held_bytes == box.unconfirmed == box.unconfirmed_bytes == 0


def test_a_later_barrier_settles_the_earlier_ones_too() -> None:
    box = outbox("a", "b")
    take(box, most=1)
    box.barrier()
    take(box, most=1)
    second = box.barrier()
    assert second is not None
    assert box.passed(second) == ["a", "b"]


def test_a_barrier_that_was_never_sent_settles_nothing() -> None:
    box = outbox("a")
    take(box)
    barrier = box.barrier()
    assert barrier is not None
    assert box.passed(barrier + 1) == []
    assert box.passed(barrier - 1) == []
    assert box.passed(barrier) == ["a"]


def test_there_is_no_barrier_behind_nothing_unless_as_a_probe() -> None:
    box = outbox()
    assert box.barrier() is None
    probe = box.barrier(is_probe=True)
    assert probe is not None
    assert box.passed(probe) == []


def test_a_barrier_of_an_earlier_link_settles_nothing() -> None:
    box = outbox("a")
    take(box)
    old = box.barrier()
    assert old is not None
    box.lost()
    assert box.passed(old) == []
    assert take(box) == ["a"]
    assert box.passed(old) == []


def test_after_a_loss_the_unconfirmed_go_again_first_and_in_order() -> None:
    box = outbox("a", "b", "c", "d")
    take(box, most=1)
    barrier = box.barrier()
    assert barrier is not None
    box.passed(barrier)
    take(box, most=2)
    box.put(b"e", "e", Class.DATA)
    box.lost()
    assert take(box) == ["b", "c", "d", "e"]


def test_signals_go_before_data() -> None:
    box = outbox("d1", "d2")
    box.put(b"s1", "s1", Class.SIGNAL)
    assert take(box, most=2) == ["s1", "d1"]
    box.put(b"s2", "s2", Class.SIGNAL)
    box.lost()
    assert take(box) == ["s1", "s2", "d1", "d2"]


def test_data_does_not_pass_a_signal_that_waits_for_room() -> None:
    box = outbox("d")
    box.put(b"first", "first", Class.SIGNAL)
    assert take(box, most=1) == ["first"]
    box.put(b"x" * 50, "large", Class.SIGNAL)
    assert take(box, room=10) == []


def test_the_data_allowance_bounds_data_only() -> None:
    box = outbox("d1", "d2", "d3")
    box.put(b"s", "s", Class.SIGNAL)
    assert take(box, data=2) == ["s", "d1", "d2"]
    assert take(box, data=0) == []
    assert take(box, data=None) == ["d3"]


def test_a_message_larger_than_the_window_goes_alone() -> None:
    box = outbox("x" * 500, "y")
    assert take(box, room=100) == ["x" * 500]
    assert take(box, room=-400) == []


def test_a_class_is_full_in_messages_or_bytes_and_says_so() -> None:
    box: Outbox[str] = Outbox(OutboxLimits(max_messages=2, max_bytes=100))
    assert box.has_room(Class.DATA, 10**6), "an empty class takes one message of any size"
    box.put(b"x" * 60, "a", Class.DATA)
    assert box.has_room(Class.DATA, 40)
    assert not box.has_room(Class.DATA, 41)
    box.put(b"", "b", Class.DATA)
    assert not box.has_room(Class.DATA, 0)
    assert box.has_room(Class.SIGNAL, 10), "data never takes the room of signals"


def test_what_is_unconfirmed_still_takes_room() -> None:
    box: Outbox[str] = Outbox(OutboxLimits(max_messages=1, max_bytes=100))
    box.put(b"a", "a", Class.DATA)
    take(box)
    assert not box.has_room(Class.DATA, 1)
    barrier = box.barrier()
    assert barrier is not None
    box.passed(barrier)
    assert box.has_room(Class.DATA, 1)


def cut(box: Outbox[str]) -> str | None:
    take(box)
    poisoned = box.lost(is_cut_by_cloud=True)
    return None if poisoned is None else poisoned.token


def test_the_first_of_three_cuts_goes_alone_and_after_three_more_is_given_up() -> None:
    box = outbox("poison", "good")
    for _ in range(SUSPECT_LOSSES):
        assert cut(box) is None
    for _ in range(POISON_LOSSES - SUSPECT_LOSSES - 1):
        assert take(box) == ["poison"]
        assert take(box) == [], "nothing else while it is suspected"
        assert box.lost(is_cut_by_cloud=True) is None
    assert cut(box) == "poison"
    assert take(box) == ["good"]
    assert box.held_messages == 1


def test_a_suspect_that_gets_through_is_none() -> None:
    box = outbox("big", "next")
    for _ in range(SUSPECT_LOSSES):
        cut(box)
    assert take(box) == ["big"]
    barrier = box.barrier()
    assert barrier is not None
    assert box.passed(barrier) == ["big"]
    assert take(box) == ["next"]


def test_a_dead_path_makes_no_suspects() -> None:
    box = outbox("a", "b")
    for _ in range(20):
        assert take(box) == ["a", "b"]
        assert box.lost(is_cut_by_cloud=False) is None


class OutboxMachine(RuleBasedStateMachine):
    """Any order of puts, writes, pongs and link losses; the cloud is a list of what it read."""

    def __init__(self) -> None:
        super().__init__()
        self.box: Outbox[tuple[Class, int]] = Outbox(LIMITS)
        self.numbers = Counter[Class]()
        self.put: dict[Class, list[int]] = {Class.SIGNAL: [], Class.DATA: []}
        self.settled: dict[Class, list[int]] = {Class.SIGNAL: [], Class.DATA: []}
        self.cloud: list[tuple[Class, int]] = []
        self.written: list[tuple[Class, int]] = []  # on this link
        self.barriers: list[tuple[int, int]] = []  # number, how many were written before it
        self.unconfirmed_at_loss: set[tuple[Class, int]] = set()

    @rule(kind=st.sampled_from(Class), size=st.integers(0, 3000))
    def hand_over(self, kind: Class, size: int) -> None:
        if not self.box.has_room(kind, size):
            return
        self.numbers[kind] += 1
        self.put[kind].append(self.numbers[kind])
        self.box.put(b"x" * size, (kind, self.numbers[kind]), kind)

    @rule(room=st.integers(1, 5000), most=st.integers(1, 20), data=st.none() | st.integers(0, 5))
    def write(self, room: int, most: int, data: int | None) -> None:
        was_empty = self.box.unconfirmed == 0
        entries = self.box.take(room, max_messages=most, max_data=data)
        assert len(entries) <= most
        assert sum(len(e.payload) for e in entries) <= room or (was_empty and len(entries) == 1)
        assert data is None or sum(e.kind is Class.DATA for e in entries) <= data
        self.written += [e.token for e in entries]

    @rule()
    def ping(self) -> None:
        barrier = self.box.barrier()
        if barrier is not None:
            self.barriers.append((barrier, len(self.written)))

    @precondition(lambda self: self.barriers)
    @rule(which=st.integers(0, 3))
    def pong(self, which: int) -> None:
        barrier, count = self.barriers[min(which, len(self.barriers) - 1)]
        self.cloud_reads(count)
        for kind, number in self.box.passed(barrier):
            self.settled[kind].append(number)
        self.barriers = [pair for pair in self.barriers if pair[0] > barrier]

    def cloud_reads(self, count: int) -> None:
        for token in self.written[len(self.read_here()) : count]:
            if token in self.cloud:
                assert token in self.unconfirmed_at_loss, "a duplicate of something confirmed"
            self.cloud.append(token)
            self.here.append(token)

    def read_here(self) -> list[tuple[Class, int]]:
        if not hasattr(self, "here"):
            self.here: list[tuple[Class, int]] = []
        return self.here

    @rule(read=st.integers(0, 50))
    def lose(self, read: int) -> None:
        self.cloud_reads(min(len(self.written), len(self.read_here()) + read))
        self.unconfirmed_at_loss |= {e.token for e in self.box.entries()}
        self.box.lost()
        self.written, self.here, self.barriers = [], [], []

    @invariant()
    def everything_is_settled_in_order_or_held(self) -> None:
        held = {kind: [n for k, n in (e.token for e in self.box.entries()) if k is kind] for kind in Class}
        for kind in Class:
            assert self.settled[kind] == sorted(self.settled[kind])
            assert self.settled[kind] + held[kind] == self.put[kind], "nothing lost, nothing twice, order kept"
            assert len(held[kind]) <= LIMITS.max_messages

    @invariant()
    def what_is_settled_was_read_by_the_cloud(self) -> None:
        for kind in Class:
            assert {(kind, number) for number in self.settled[kind]} <= set(self.cloud)

    @invariant()
    def the_sums_are_right(self) -> None:
        entries = list(self.box.entries())
        assert self.box.held_messages == len(entries)
        assert self.box.held_bytes == sum(len(e.payload) for e in entries)
        assert self.box.unconfirmed_bytes == sum(len(e.payload) for e in entries[: self.box.unconfirmed])


TestOutbox = OutboxMachine.TestCase
TestOutbox.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("kind", Class)
def test_edgehubs_own_acks_need_no_room(kind: Class) -> None:
    box: Outbox[str] = Outbox(OutboxLimits(max_messages=1, max_bytes=1))
    box.put(b"aa", "a", kind)
    box.put(b"bb", "b", kind)
    assert take(box) == ["a", "b"]


# --- classes that go up independently of each other --------------------------------------------------


def both(*, is_apart: bool) -> Outbox[str]:
    """Signals s1, s2 and data d1, d2, all written."""
    box: Outbox[str] = Outbox(LIMITS)
    box.keep_apart(is_apart)
    for number in (1, 2):
        box.put(b"x", f"d{number}", Class.DATA)
        box.put(b"x", f"s{number}", Class.SIGNAL)
    if is_apart:
        for kind in Class:
            box.take(10_000, max_messages=100, max_data=None, only=kind)
    else:
        take(box)
    return box


def test_kept_apart_a_barrier_settles_its_own_class_alone_whichever_passes_first() -> None:
    box = both(is_apart=True)
    signals, data = box.barrier(Class.SIGNAL), box.barrier(Class.DATA)
    assert signals is not None
    assert data is not None
    assert box.unconfirmed_of(Class.SIGNAL) == box.unconfirmed_of(Class.DATA) == (2, 2)
    assert box.passed(data) == ["d1", "d2"]
    assert (box.unconfirmed, box.unconfirmed_bytes) == (2, 2)
    assert box.passed(signals) == ["s1", "s2"]
    assert box.unconfirmed == 0


def test_together_a_barrier_of_either_class_settles_both() -> None:
    box = both(is_apart=False)
    barrier = box.barrier(Class.SIGNAL)
    assert barrier is not None
    assert box.unconfirmed_of(Class.SIGNAL) == box.unconfirmed_of(Class.DATA) == (4, 4)
    assert box.passed(barrier) == ["s1", "s2", "d1", "d2"]


def test_kept_apart_the_first_of_a_class_goes_whatever_the_other_has_under_way() -> None:
    box = both(is_apart=True)
    assert box.passed(box.barrier(Class.SIGNAL) or 0) == ["s1", "s2"]
    box.put(b"x" * 5000, "large", Class.SIGNAL)
    box.put(b"x" * 5000, "data", Class.DATA)
    taken = box.take(10, max_messages=100, max_data=None, only=Class.SIGNAL)
    assert [entry.token for entry in taken] == ["large"]
    assert box.take(10, max_messages=100, max_data=None, only=Class.DATA) == [], "data is under way: no room"


def test_kept_apart_a_lost_link_gives_each_class_back_in_order() -> None:
    box = both(is_apart=True)
    box.barrier(Class.SIGNAL)
    box.lost()
    assert take(box) == ["s1", "s2", "d1", "d2"]
    assert box.mismatch == 0


def test_kept_apart_what_is_under_way_is_stored_per_class() -> None:
    box = both(is_apart=True)
    assert [row.row for row in box.spill(Class.DATA, float("inf"))] == [1, 2]
    assert box.stored(Class.DATA, 2) == ["d1", "d2"]
    assert box.oldest_unstored()[0] is not None, "the signals are not"
    assert [row.row for row in box.spill(Class.SIGNAL, float("inf"))] == [1, 2]
    assert box.stored(Class.SIGNAL, 2) == ["s1", "s2"]
    assert box.oldest_unstored() == (None, None)
    assert box.passed(box.barrier(Class.DATA) or 0) == [], "they were settled when they were stored"
    assert box.stored_of(Class.DATA) == (0, 0)
    assert box.mismatch == 0
