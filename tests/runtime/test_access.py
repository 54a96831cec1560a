"""Who may be whom, who may send to whom, and at what pace; the rules alone, and in the broker's core."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime import emp
from runtime.access import ANY, Credentials, Pace, Policy, Rule
from tests.support.bus_pair import DATA, REPLY, REQUEST, BrokerRoom

OWN = 100
KEY = "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7"


def policy(own_uid: int = OWN, **rules: Rule) -> Policy:
    return Policy(rules, own_uid=own_uid)


# --- who may be whom --------------------------------------------------------------------------------


def test_a_name_with_a_rule_belongs_to_its_users_and_keys() -> None:
    access = policy(pump=Rule(uids=frozenset({1001}), keys=frozenset({KEY})))
    assert access.refuse_hello("pump", (), Credentials(uid=1001)) is None
    assert access.refuse_hello("pump", (), Credentials(key=KEY)) is None
    assert access.refuse_hello("pump", (), Credentials(uid=1002)) == "uid 1002 may not be 'pump'"
    assert access.refuse_hello("pump", (), Credentials(key="x" * 40)) == "the owner of this CURVE key may not be 'pump'"
    assert access.refuse_hello("pump", (), Credentials()) == "a peer that nothing is known of may not be 'pump'"
    assert access.refuse_hello("pump", (), Credentials(uid=OWN)) == f"uid {OWN} may not be 'pump'"


def test_a_name_without_a_rule_belongs_to_the_brokers_own_user() -> None:
    access = policy(pump=Rule(uids=frozenset({1001})))
    assert access.refuse_hello("edgehub", ("hub",), Credentials(uid=OWN)) is None
    why = access.refuse_hello("edgehub", ("hub",), Credentials(uid=1001))
    assert why == "no rule of runtime.policy says who may be 'edgehub'; uid 1001 may not"
    assert access.refuse_hello("edgehub", ("hub",), Credentials(key=KEY)) is not None


def test_an_empty_key_is_never_a_key() -> None:
    access = policy(pump=Rule(keys=frozenset({""})))
    assert access.refuse_hello("pump", (), Credentials()) is not None


def test_a_module_joins_only_its_own_groups() -> None:
    access = policy(pump=Rule(uids=frozenset({1001}), groups=frozenset({"twin"})))
    assert access.refuse_hello("pump", ("twin",), Credentials(uid=1001)) is None
    why = access.refuse_hello("pump", ("twin", "hub"), Credentials(uid=1001))
    assert why == "'pump' may not be in hub: runtime.modules.pump.groups has twin"


def test_an_own_socket_is_for_its_name_and_its_name_for_it() -> None:
    mine = frozenset({1001, 1002})
    access = policy(pump=Rule(uids=mine, has_own_socket=True), fan=Rule(uids=mine))
    assert access.refuse_hello("pump", (), Credentials(uid=1001, socket="pump")) is None
    assert access.refuse_hello("pump", (), Credentials(uid=1001)) == "'pump' is reached through its own socket only"
    why = access.refuse_hello("fan", (), Credentials(uid=1001, socket="pump"))
    assert why == "this socket is 'pump''s alone, not 'fan''s"
    assert access.refuse_hello("edgehub", (), Credentials(uid=OWN, socket="pump")) is not None


# --- who may send where -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sender", "destination", "may"),
    [
        ("pump", "@hub", True),
        ("pump", "fan", True),
        ("pump", "edgehub", False),
        ("pump", "@twin", False),
        ("boss", "anything", True),
        ("mute", "@hub", False),
        ("edgehub", "pump", True),  # no rule: the node's own
    ],
)
def test_destinations_that_no_rule_grants_are_denied(sender: str, destination: str, may: bool) -> None:
    access = policy(
        pump=Rule(destinations=frozenset({"@hub", "fan"})), boss=Rule(destinations=frozenset({ANY})), mute=Rule()
    )
    assert access.may_send(sender, destination, int(emp.Priority.DATA)) is may


def test_a_reply_may_go_to_whoever_may_ask() -> None:
    access = policy(
        pump=Rule(groups=frozenset({"twin"})),
        asks_pump=Rule(destinations=frozenset({"pump"})),
        asks_twin=Rule(destinations=frozenset({"@twin"})),
        asks_any=Rule(destinations=frozenset({ANY})),
        asks_fan=Rule(destinations=frozenset({"fan"})),
    )
    reply, data = int(emp.Priority.REPLY), int(emp.Priority.DATA)
    allowed = {
        name for name in ("asks_pump", "asks_twin", "asks_any", "asks_fan") if access.may_send("pump", name, reply)
    }
    assert allowed == {"asks_pump", "asks_twin", "asks_any"}
    assert access.may_send("pump", "edgehub", reply)  # has no rule, so it may ask
    assert not access.may_send("pump", "asks_pump", data)
    assert not access.may_send("pump", "@asks_pump", reply)


def test_admin_is_for_the_brokers_own_user() -> None:
    access = policy(pump=Rule(uids=frozenset({1001})))
    assert access.may_ask(Credentials(uid=OWN))
    assert not access.may_ask(Credentials(uid=1001))
    assert not access.may_ask(Credentials(key=KEY))
    assert not access.may_ask(Credentials(uid=OWN, socket="pump"))


# --- pace -------------------------------------------------------------------------------------------


@given(
    messages=st.sampled_from([0, 1, 7, 1000]),
    size=st.sampled_from([0, 100, 5000]),
    batches=st.lists(st.tuples(st.integers(1, 50), st.integers(1, 2000), st.floats(0, 3)), min_size=1, max_size=80),
)
def test_a_pace_is_kept_on_average_and_never_stops_for_ever(
    messages: int, size: int, batches: list[tuple[int, int, float]]
) -> None:
    pace = Pace(messages, size)
    now, sent, sent_bytes = 0.0, 0, 0
    for count, weight, pause in batches:
        now += pause
        due = pace.due_at(now)
        assert due >= now
        assert due == now or messages or size
        now = due
        assert pace.due_at(now) <= now + 1e-6
        # One second's worth at first and one batch's debt at the most, beyond what the time allows.
        assert not messages or sent <= messages * (now + 1) + 50 + 1e-3
        assert not size or sent_bytes <= size * (now + 1) + 2000 + 1e-3
        pace.take(count, weight)
        sent += count
        sent_bytes += weight


def test_a_module_beyond_its_pace_is_delayed_and_nothing_of_it_is_lost_or_reordered() -> None:
    room = BrokerRoom(
        access=policy(0, sender=Rule(uids=frozenset({0}), destinations=frozenset({ANY}), messages_per_second=10))
    )
    receiver, sender = room.peer("receiver"), room.peer("sender")
    for number in range(1, 41):
        sender.send("receiver", number)
    at_once = [header.first for header in receiver.ack_all()]
    assert at_once == list(range(1, 12))  # one second's worth, and the one that overdraws it
    assert room.status("sender")["paced"] == 29
    came = at_once
    for _ in range(200):
        room.pass_time(0.05)
        came += [header.first for header in receiver.ack_all()]
    assert came == list(range(1, 41))
    assert room.status("sender")["paced"] == 0
    assert sender.settled()[0] == 40


def test_a_paced_module_does_not_delay_another() -> None:
    rule = Rule(uids=frozenset({0}), destinations=frozenset({ANY}), bytes_per_second=10)
    room = BrokerRoom(access=policy(0, slow=rule, quick=Rule(uids=frozenset({0}), destinations=frozenset({ANY}))))
    receiver, slow, quick = room.peer("receiver"), room.peer("slow"), room.peer("quick")
    for number in range(1, 11):
        slow.send("receiver", number, size=100)
        quick.send("receiver", number, size=100)
    assert [header.sender for header in receiver.take(emp.DELIVER)].count("quick") == 10


def test_a_denied_module_is_told_each_time_and_counted() -> None:
    room = BrokerRoom(access=policy(0, guest=Rule(uids=frozenset({0}), destinations=frozenset({"hub"}))))
    room.peer("hub"), room.peer("secret")
    guest = room.peer("guest")
    guest.send("hub", 1)
    guest.send("secret", 1, 3)
    assert {header.destination: header.exceptions for header in guest.take(emp.SETTLED)} == {
        "secret": [(1, "denied", None), (2, "denied", None), (3, "denied", None)]
    }
    assert room.status("guest")["refused"] == {"denied": 3}


def test_admin_of_a_stranger_is_refused() -> None:
    room = BrokerRoom(access=policy(7, guest=Rule(uids=frozenset({0}))))
    guest = room.peer("guest")
    guest.put(emp.ADMIN, emp.Admin(1, "status"))
    assert [refused.code for refused in guest.take(emp.REFUSED)] == [emp.DENIED]


def test_a_requests_answer_passes_the_policy_and_nothing_else_does() -> None:
    room = BrokerRoom(
        access=policy(
            0, asker=Rule(uids=frozenset({0}), destinations=frozenset({"answerer"})), answerer=Rule(uids=frozenset({0}))
        )
    )
    asker, answerer = room.peer("asker"), room.peer("answerer")
    asker.send("answerer", 1, priority=REQUEST, flags=emp.EXPECTS_REPLY)
    (delivered,) = answerer.take(emp.DELIVER)
    answerer.send("asker", 1, priority=REPLY, flags=emp.REPLY, requester=delivered.incarnation)
    answerer.send("asker", 1, priority=DATA)
    assert [header.priority for header in asker.take(emp.DELIVER)] == [REPLY]
    assert [header.exceptions for header in answerer.take(emp.SETTLED)] == [[(1, "denied", None)]]
