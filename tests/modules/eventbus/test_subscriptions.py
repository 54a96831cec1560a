"""Intent, and how it becomes true at each broker."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modules.eventbus.subscriptions import (
    ANSWER_SECONDS,
    RETRY_CAP_SECONDS,
    Ask,
    DamagedStore,
    Snapshot,
    Subscriptions,
    decode,
    encode,
)
from modules.eventbus.topics import FIXED_FILTERS, Semantics

FIXED = ("f/1", "f/2", "f/3")


def table(*, links: tuple[str, ...] = ("ext",), stored: Snapshot | None = None, **more: object) -> Subscriptions:
    return Subscriptions(fixed=FIXED, links=links, stored=stored, random=Random(1), **more)  # type: ignore[arg-type]


class Broker:
    """Answers what is asked, for one link; `refuses` are filters it says no to."""

    def __init__(self, subscriptions: Subscriptions, name: str = "ext") -> None:
        self.subscriptions = subscriptions
        self.name = name
        self.filters: set[str] = set()
        self.refuses: set[str] = set()
        self.asked: list[Ask] = []
        self._mid = 0

    def connect(self, *, session_present: bool = False, now: float = 0.0) -> None:
        if not session_present:
            self.filters.clear()
        self.subscriptions.connected(self.name, session_present=session_present)
        self.turn(now=now)

    def turn(self, *, now: float = 0.0, answering: bool = True) -> list[Ask]:
        asks = self.subscriptions.asks(self.name, now=now)
        for ask in asks:
            self._mid += 1
            self.asked.append(ask)
            self.subscriptions.sent(self.name, self._mid, ask, now=now)
            if not answering:
                continue
            accepted = ask.topic_filter not in self.refuses
            if accepted:
                (self.filters.add if ask.subscribe else self.filters.discard)(ask.topic_filter)
            self.subscriptions.answered(self.name, self._mid, accepted=accepted, now=now)
        return asks


def test_fixed_filters_are_subscribed_first_then_the_stored_ones() -> None:
    subscriptions = table(stored=Snapshot(wanted=["s/1"]))
    subscriptions.connected("ext", session_present=False)
    assert subscriptions.asks("ext", now=0.0) == [Ask(each, True) for each in (*FIXED, "s/1")]


def test_nothing_is_asked_of_a_broker_that_is_away() -> None:
    assert table().asks("ext", now=0.0) == []


def test_D_V_4_one_failing_suback_does_not_stop_the_rest_and_is_tried_again() -> None:
    subscriptions = table()
    broker = Broker(subscriptions)
    broker.refuses = {"f/1"}
    broker.connect()
    assert broker.filters == {"f/2", "f/3"}
    assert subscriptions.missing("ext") == 1
    assert broker.turn(now=0.4) == []
    due = subscriptions.next_deadline("ext")
    assert due is not None
    assert due <= 1.0
    broker.refuses.clear()
    assert broker.turn(now=due) == [Ask("f/1", True)]
    assert subscriptions.is_complete("ext")
    assert subscriptions.next_deadline("ext") is None


def test_a_filter_that_is_refused_for_ever_is_asked_ever_more_seldom() -> None:
    subscriptions = table()
    broker = Broker(subscriptions)
    broker.refuses = {"f/1"}
    broker.connect()
    gaps = []
    now = 0.0
    for _ in range(12):
        due = subscriptions.next_deadline("ext")
        assert due is not None
        gaps.append(due - now)
        now = due
        broker.turn(now=now)
    assert gaps[-1] <= RETRY_CAP_SECONDS
    assert gaps[-1] >= RETRY_CAP_SECONDS / 2
    assert subscriptions.failed == 13


def test_an_answer_that_does_not_come_is_asked_for_again() -> None:
    subscriptions = table()
    broker = Broker(subscriptions)
    subscriptions.connected("ext", session_present=False)
    broker.turn(answering=False)
    assert broker.turn(now=1.0) == []
    assert subscriptions.next_deadline("ext") == ANSWER_SECONDS
    broker.turn(now=ANSWER_SECONDS)
    assert {ask.topic_filter for ask in broker.turn(now=ANSWER_SECONDS + 1.0)} == set(FIXED)


def test_a_session_that_survived_is_not_subscribed_again() -> None:
    subscriptions = table()
    broker = Broker(subscriptions)
    broker.connect()
    subscriptions.disconnected("ext")
    broker.asked.clear()
    broker.connect(session_present=True)
    assert broker.asked == []


def test_a_broker_that_lost_its_state_gets_everything_again() -> None:
    subscriptions = table(stored=Snapshot(wanted=["s/1"]))
    broker = Broker(subscriptions)
    broker.connect()
    subscriptions.disconnected("ext")
    broker.connect(session_present=False)
    assert broker.filters == {*FIXED, "s/1"}


def test_a_new_process_asks_for_everything_even_where_the_session_survived() -> None:
    broker = Broker(table())
    broker.connect(session_present=True)
    assert broker.filters == set(FIXED)


def test_D_V_10_the_intent_stands_before_any_broker_has_heard_of_it() -> None:
    subscriptions = table()
    assert subscriptions.want("s/1") is True
    assert subscriptions.snapshot() == Snapshot(wanted=["s/1"])
    assert subscriptions.unwant("s/1") is True
    assert subscriptions.snapshot() == Snapshot(unwanted=["s/1"])


def test_D_V_10_no_stored_filters_is_no_error() -> None:
    broker = Broker(table(stored=Snapshot()))
    broker.connect()
    assert broker.filters == set(FIXED)


def test_asking_twice_changes_the_intent_once() -> None:
    subscriptions = table()
    assert subscriptions.want("s/1") is True
    assert subscriptions.want("s/1") is False


def test_an_unwanted_filter_is_unsubscribed_once_and_then_forgotten() -> None:
    subscriptions = table(stored=Snapshot(wanted=["s/1"]))
    broker = Broker(subscriptions)
    broker.connect()
    subscriptions.unwant("s/1")
    assert broker.turn() == [Ask("s/1", False)]
    assert broker.filters == set(FIXED)
    assert subscriptions.snapshot() == Snapshot()
    assert broker.turn() == []


def test_D_V_6_a_filter_restored_from_the_store_can_be_removed() -> None:
    subscriptions = table(stored=decode(encode(Snapshot(wanted=["s/1"]))))
    broker = Broker(subscriptions)
    broker.connect(session_present=True)
    subscriptions.unwant("s/1")
    broker.turn()
    assert "s/1" not in broker.filters
    assert subscriptions.snapshot() == Snapshot()


def test_unsubscribing_while_the_broker_is_away_happens_at_the_next_connect() -> None:
    subscriptions = table(stored=Snapshot(wanted=["s/1"]))
    broker = Broker(subscriptions)
    broker.connect()
    subscriptions.disconnected("ext")
    subscriptions.unwant("s/1")
    broker.connect(session_present=True)
    assert broker.filters == set(FIXED)


def test_a_lost_session_settles_an_unsubscribe() -> None:
    subscriptions = table(stored=Snapshot(unwanted=["s/1"]))
    assert subscriptions.connected("ext", session_present=False) is True
    assert subscriptions.snapshot() == Snapshot()


def test_a_fixed_filter_is_never_unsubscribed() -> None:
    subscriptions = table()
    broker = Broker(subscriptions)
    broker.connect()
    subscriptions.unwant("f/1")
    assert broker.turn() == []
    assert "f/1" in subscriptions.filters


def test_filters_of_the_other_kubeedge_version_are_unsubscribed_from_a_session() -> None:
    subscriptions = table(obsolete=["old/#", "f/1"])
    broker = Broker(subscriptions)
    broker.filters = {"old/#"}
    broker.connect(session_present=True)
    assert broker.filters == set(FIXED)


def test_two_brokers_both_have_to_confirm_before_an_unwanted_filter_is_forgotten() -> None:
    subscriptions = table(links=("ext", "int"), stored=Snapshot(wanted=["s/1"]))
    first, second = Broker(subscriptions, "ext"), Broker(subscriptions, "int")
    first.connect()
    second.connect()
    subscriptions.unwant("s/1")
    first.turn()
    assert subscriptions.snapshot() == Snapshot(unwanted=["s/1"])
    second.turn()
    assert subscriptions.snapshot() == Snapshot()


def test_an_answer_of_an_earlier_connection_is_ignored() -> None:
    subscriptions = table()
    broker = Broker(subscriptions)
    subscriptions.connected("ext", session_present=False)
    broker.turn(answering=False)
    subscriptions.disconnected("ext")
    subscriptions.connected("ext", session_present=False)
    assert subscriptions.answered("ext", 1, accepted=True, now=0.0) == (None, False)


steps = st.lists(
    st.tuples(
        st.sampled_from(["want", "unwant", "turn", "silent", "lose", "lose session", "later"]),
        st.sampled_from(["s/1", "s/2", "f/1"]),
    ),
    max_size=40,
)


@given(steps)
def test_whatever_happens_the_broker_ends_with_what_is_wanted(script: list[tuple[str, str]]) -> None:
    subscriptions = table()
    broker = Broker(subscriptions)
    now = 0.0
    broker.connect()
    wanted: set[str] = set()
    for step, topic_filter in script:
        match step:
            case "want":
                subscriptions.want(topic_filter)
                wanted.add(topic_filter)
            case "unwant":
                subscriptions.unwant(topic_filter)
                wanted.discard(topic_filter)
            case "turn":
                broker.turn(now=now)
            case "silent":
                broker.turn(now=now, answering=False)
            case "later":
                now += 10.0
            case _:
                subscriptions.disconnected("ext")
                broker.connect(session_present=step == "lose", now=now)
    for _ in range(8):  # answers time out, then everything is asked again
        now += ANSWER_SECONDS
        broker.turn(now=now)
    assert broker.filters == {*FIXED, *wanted}
    assert subscriptions.is_complete("ext")
    assert set(subscriptions.snapshot().wanted) == wanted
    assert subscriptions.snapshot().unwanted == []
    assert subscriptions.next_deadline("ext") is None


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b'{"version": 2}', b'{"wanted": [1]}', b'{"wanted": ["a/#/b"]}', b'{"unwanted": [""]}', b"\xff"],
)
def test_a_damaged_store_says_so(data: bytes) -> None:
    with pytest.raises(DamagedStore):
        decode(data)


@given(st.lists(st.sampled_from(FIXED_FILTERS[Semantics.HEAD])), st.lists(st.just("ünï/+")))
def test_a_snapshot_survives_the_store(wanted: list[str], unwanted: list[str]) -> None:
    snapshot = Snapshot(wanted=wanted, unwanted=unwanted)
    assert decode(encode(snapshot)) == snapshot
