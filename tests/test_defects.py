"""KubeEdge's defects that a better design does away with: one test for each, named after its id in docs/defects.md.

Those of beehive (D-B) and edgehub (D-E) are here, at the cores; those of eventbus (D-V) beside eventbus's other tests.
"""

from __future__ import annotations

import ast
import random
import re
import ssl
from pathlib import Path

import pytest

from cloudsim.certificates import Authority
from modules.edgehub.config import EdgeHubConfig, Endpoint
from modules.edgehub.dialect import CURRENT
from modules.edgehub.dispatch import destination
from modules.edgehub.governor import Pace, Ramp
from modules.edgehub.link import LinkRefused
from modules.edgehub.liveness import Liveness
from modules.edgehub.outbox import Class, Outbox, OutboxLimits
from modules.edgehub.session import (
    Action,
    Announce,
    Dial,
    DialDue,
    Failed,
    IllegalMove,
    LinkState,
    Lost,
    Opened,
    Proven,
    StopWanted,
)
from modules.edgehub.store import OutboxFile, Row
from modules.edgehub.sync_keeper import LATE, Question, SyncKeeper
from modules.edgehub.tls import client_context
from modules.edgehub.window import TokenBucket
from runtime import emp
from runtime.backoff import Backoff
from runtime.client_core import Members, Replied
from runtime.config import EdgeHubSection, EventBusSection, NodeConfig, QuicSection, WebsocketSection
from runtime.errors import ConfigError, MalformedFrame, MalformedMessage
from runtime.message import Message, decode_batch, encode_message, join_batch
from runtime.names import Group
from tests.modules.edgehub.test_session import dial, serve, session
from tests.modules.edgehub.test_tls import config
from tests.support.bus_pair import DATA, REPLY, REQUEST, BrokerRoom, Pair, RawBroker

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "defects.md"

IDS = (
    *(f"D-B-{number}" for number in range(1, 15)),
    *(f"D-E-{number}" for number in range(1, 21)),
    *(f"D-V-{number}" for number in range(1, 11)),
)


# --- the page ---------------------------------------------------------------------------------------


def rows() -> dict[str, str]:
    """Id to what the page says of it."""
    found = re.findall(r"^\| (D-[BEV]-\d+) \| (.+) \|$", PAGE.read_text(), re.MULTILINE)
    assert len(found) == len(dict(found)), "an id stands twice"
    return dict(found)


def all_tests() -> set[str]:
    """`file::test` of every test there is."""
    names = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                names.add(f"{path.relative_to(ROOT / 'tests')}::{node.name}")
    return names


def test_the_page_has_every_defect_once_and_in_order() -> None:
    assert tuple(rows()) == IDS


def test_every_defect_names_a_test_of_its_id_and_all_named_tests_exist() -> None:
    known = all_tests()
    for defect, said in rows().items():
        named = re.findall(r"`([\w/]+\.py::test_\w+)`", said)
        assert named, f"{defect} names no test"
        assert set(named) <= known, f"{defect}: {set(named) - known}"
        mark = defect.replace("-", "_") + "_"
        assert any(mark in name for name in named), f"{defect} names no test of its id"


# --- beehive --------------------------------------------------------------------------------------


def test_D_B_1_what_is_sent_before_its_receiver_is_there_waits_for_it() -> None:
    pair = Pair(declared={"late": ()}, grace=0.5)
    sender = pair.join("sender")
    declared, unknown = sender.send("late"), sender.send("starting")
    pair.settle()
    assert (declared.outcome, unknown.outcome) == (None, None), "after the start nobody is called unknown too soon"
    late, starting = pair.join("late"), pair.join("starting")
    pair.pass_time(0.6)
    assert (late.finish(), starting.finish()) == (["sender-1"], ["sender-2"])
    pair.settle()
    assert (declared.outcome, unknown.outcome) == ([], [])


def test_D_B_2_a_stop_drains_what_is_in_hand_and_the_rest_waits_for_the_next_process() -> None:
    pair = Pair(declared={"receiver": ()})
    sender, receiver = pair.join("sender"), pair.join("receiver")
    in_hand = sender.send("receiver")
    pair.settle()
    receiver.core.drain(5.0)
    pair.settle()
    behind = sender.send("receiver")
    pair.settle()
    assert receiver.finish() == ["sender-1"], "nothing new comes while it drains"
    pair.settle()
    assert (in_hand.outcome, behind.outcome) == ([], None)
    pair.kill(receiver)
    successor = pair.join("receiver")
    pair.settle()
    assert successor.finish() == ["sender-2"]
    pair.settle()
    assert behind.outcome == []


def test_D_B_3_a_full_queue_says_so_instead_of_blocking_and_one_too_many_is_refused() -> None:
    broker = RawBroker(window=2)
    broker.welcome()
    lane = broker.core.lane("receiver", DATA)
    for _ in range(2):
        assert broker.core.has_room(lane, 10)
        broker.core.put(lane, encode_message(Message()))
    assert not broker.core.has_room(lane, 10)

    room = BrokerRoom(window=2, declared={"receiver": []})
    sender = room.peer("sender")
    for number in range(1, 7):
        sender.send("receiver", number)
    assert [refused[:2] for refused in room_refusals(room, sender.incarnation)] == [(5, "overflow"), (6, "overflow")]


def room_refusals(room: BrokerRoom, incarnation: bytes) -> list[tuple[int, str]]:
    """What the broker has refused of the sender's one lane."""
    (holder,) = (
        module.holder
        for module in room.core._modules.values()
        if module.holder is not None and module.holder.id == incarnation
    )
    (lane,) = holder.lanes.values()
    return [(number, reason) for number, refusals in lane.exceptions.items() for reason, _ in refusals]


def test_D_B_4_an_unknown_target_is_told_to_the_sender() -> None:
    pair = Pair()
    sender = pair.join("sender")
    sent = [sender.send("nobody"), sender.send("@nobody")]
    pair.settle()
    assert [each.outcome for each in sent] == [[("unroutable", None)]] * 2
    assert pair.room.status("sender")["refused"] == {"unroutable": 2}


def test_D_B_5_nothing_is_never_taken_for_a_message() -> None:
    for frames in ([], [b""], [emp.DELIVER], [emp.DELIVER, b""]):
        with pytest.raises(MalformedFrame):
            emp.decode(frames)
    for body in (b"", b"\xc0"):
        with pytest.raises(MalformedMessage):
            decode_batch(body)
    assert decode_batch(b"\x90") == []
    broker = RawBroker()
    broker.welcome()
    before = len(broker.core.events)
    broker.core.disconnected(broker.now)
    assert not any(hasattr(event, "messages") for event in broker.core.events[before:])


def ask(broker: RawBroker, name: str) -> None:
    """A request whose waiter is registered, as the SDK does, before it is put."""
    broker.core.expect(name, f"waiter of {name}")
    broker.core.put_with(
        broker.core.lane("server", REQUEST), encode_message(Message(id=name)), emp.EXPECTS_REPLY, None, None
    )


def answer(broker: RawBroker, name: str, number: int = 1) -> list[Replied]:
    reply = encode_message(Message(id=f"answer-{number}", parent_id=name))
    broker.deliver(
        number,
        sender="server",
        priority=REPLY,
        flags=emp.REPLY,
        body=join_batch([reply]),
        requester=broker.core.incarnation,
    )
    found = [event for event in broker.core.events if isinstance(event, Replied)]
    broker.core.events = [event for event in broker.core.events if not isinstance(event, Replied)]
    return found


def test_D_B_6_a_reply_that_comes_before_the_request_is_known_to_be_sent_finds_its_waiter() -> None:
    broker = RawBroker()
    broker.welcome()
    ask(broker, "q")  # not even flushed
    assert [event.waiter for event in answer(broker, "q")] == ["waiter of q"]


def test_D_B_7_a_request_that_fails_is_a_refusal_and_never_an_empty_reply() -> None:
    pair = Pair()
    sender = pair.join("sender")
    sent = sender.send("nobody", priority=REQUEST, flags=emp.EXPECTS_REPLY)
    server = pair.join("server")
    broken = sender.send("server", priority=REQUEST, flags=emp.EXPECTS_REPLY)
    pair.settle()
    server.finish("failed")
    pair.settle()
    assert (sent.outcome, broken.outcome) == ([("unroutable", None)], [("failed", None)])
    assert not any(isinstance(event, Replied) for event in sender.events)


def test_D_B_8_a_reply_waits_for_a_waiter_that_is_busy() -> None:
    broker = RawBroker()
    broker.welcome()
    for name in ("one", "two"):
        ask(broker, name)
    # Nobody looks at the events in between: both replies are there when somebody does.
    first = answer(broker, "two", 1)
    assert [event.waiter for event in (*first, *answer(broker, "one", 2))] == ["waiter of two", "waiter of one"]


def test_D_B_9_a_late_reply_is_acknowledged_and_counted_and_blocks_nobody() -> None:
    broker = RawBroker()
    broker.welcome()
    ask(broker, "q")
    broker.core.forget("q")
    assert answer(broker, "q") == []
    assert broker.core.late_replies == 1
    ask(broker, "next")
    assert [event.waiter for event in answer(broker, "next", 2)] == ["waiter of next"]


def test_D_B_10_group_messages_reach_each_member_in_order_and_are_bounded() -> None:
    pair = Pair(window=8)
    sender = pair.join("sender")
    members = [pair.join(name, groups=["g"]) for name in ("one", "two")]
    expected = [f"sender-{number}" for number in range(1, 9)]
    lane = sender.core.lane("@g", DATA)
    for _ in expected:
        assert sender.core.has_room(lane, 1)
        sender.send("@g")
    assert not sender.core.has_room(lane, 1), "further ones wait at the sender"
    pair.settle()
    for member in members:
        assert member.finish() == expected


def test_D_B_11_a_group_request_says_who_was_asked_and_keeps_every_reply() -> None:
    pair = Pair()
    sender = pair.join("sender")
    for name in ("one", "two"):
        pair.join(name, groups=["g"])
    sent = sender.send("@g", priority=REQUEST, flags=emp.EXPECTS_REPLY)
    pair.settle()
    (told,) = [event for event in sender.events if isinstance(event, Members)]
    assert sorted(told.members) == ["one", "two"]
    pair.parties[1].finish()
    pair.parties[2].finish("denied")
    pair.settle()
    assert sent.outcome == [("denied", "two")], "who does not answer is known by name"


def test_D_B_12_members_may_come_and_go_in_the_middle_of_a_group_message() -> None:
    pair = Pair()
    sender = pair.join("sender")
    staying, leaving = pair.join("staying", groups=["g"]), pair.join("leaving", groups=["g"])
    sent = sender.send("@g")
    pair.settle()
    coming = pair.join("coming", groups=["g"])  # membership was fixed when the message was routed
    pair.kill(leaving)
    staying.finish()
    pair.pass_time(31.0)
    assert coming.waiting == []
    assert sent.outcome == [("gone", "leaving")]


def test_D_B_13_modules_in_other_processes_have_whole_frames_groups_heartbeats_and_their_own_limits() -> None:
    room = BrokerRoom()
    member = room.peer("member", groups=["g", "h"])
    assert room.status("member")["groups"] == ["g", "h"], "its own groups, not its name"
    sender = room.peer("sender")
    sender.send("@h", 1, size=300_000)
    ((_, (message,)),) = member.take_bodies()
    assert len(message.content) == 300_000, "no read cuts a message"
    sender.send("sender2", 1)
    assert sender.settled()[1] == [(1, "unroutable", None)], "an unknown module is an answer"
    room.pass_time(16.0)
    assert room.status("member")["state"] == "silent", "who says nothing is not taken for alive"


@pytest.mark.parametrize("disabled", ["edgehub", "eventbus"])
def test_D_B_14_a_module_that_is_switched_off_or_unknown_changes_nothing_for_the_others(disabled: str) -> None:
    node = NodeConfig(
        edge_hub=EdgeHubSection(enable=disabled != "edgehub"), event_bus=EventBusSection(enable=disabled != "eventbus")
    )
    assert set(node.declared_modules()) == {"edgehub", "eventbus"} - {disabled}


# --- edgehub --------------------------------------------------------------------------------------

LIMITS = OutboxLimits(max_messages=100, max_bytes=10_000)


def outbox(*tokens: str, kind: Class = Class.DATA) -> Outbox[str]:
    box: Outbox[str] = Outbox(LIMITS)
    for token in tokens:
        box.put(token.encode(), token, kind)
    return box


def write(box: Outbox[str], most: int = 100) -> list[bytes]:
    return [entry.payload for entry in box.take(10_000, max_messages=most, max_data=None)]


def test_D_E_1_a_message_is_kept_until_the_cloud_has_it() -> None:
    box = outbox("a", "b")
    assert write(box) == [b"a", b"b"]
    box.barrier()
    box.lost()  # the write failed, or nobody knows
    assert write(box) == [b"a", b"b"]
    barrier = box.barrier()
    assert barrier is not None
    assert box.passed(barrier) == ["a", "b"]


def test_D_E_2_a_new_connection_begins_only_when_the_old_one_has_ended() -> None:
    link = session()
    link.start()
    serve(link)
    for event in (Opened(), DialDue()):
        with pytest.raises(IllegalMove):
            link.receive(event, now=100.0)
    link.receive(Lost("x"), now=100.0)
    assert isinstance(dial(link)[0][0], Dial)


def test_D_E_3_a_read_error_ends_the_connection_and_is_told() -> None:
    link = session()
    link.start()
    now = serve(link)
    assert link.receive(Lost("read: connection reset"), now=now + 1) == [Announce(False)]
    assert (link.state, link.why) == (LinkState.CLOSED, "read: connection reset")


def test_D_E_4_a_close_by_the_peer_is_seen_at_once_and_redialled_within_a_second() -> None:
    link = session()
    link.start()
    now = serve(link) + 20.0
    link.receive(Lost("closed by the cloud"), now=now)
    due = link.next_deadline()
    assert due is not None
    assert due - now <= 1.0


def test_D_E_5_what_comes_from_the_cloud_is_never_dropped_for_want_of_room() -> None:
    """Nothing overtakes and nothing is thrown away: whoever is full says so, and reading stops."""
    room = BrokerRoom(declared={"eventbus": []})
    hub = room.peer("edgehub")
    hub.send("eventbus", 1, 100)
    assert hub.settled() == (0, [])
    eventbus = room.peer("eventbus", prefetch=10)
    numbers: list[int] = []
    for header in eventbus.ack_all():
        numbers += range(header.from_, header.first + header.count)
    assert numbers == list(range(1, 101))


def test_D_E_6_a_half_open_link_is_found_by_its_silence() -> None:
    liveness = Liveness(silence_seconds=5.0, limit_seconds=30.0, now=0.0)
    assert liveness.dead_at(is_awaited=True, queued_bytes=0, rate=None, rtt_seconds=0.05, now=0.0) == 5.0
    assert liveness.dead_at(is_awaited=True, queued_bytes=10**9, rate=1000.0, rtt_seconds=0.05, now=0.0) == 30.0, (
        "never longer than the keepalive limit"
    )


def test_D_E_7_a_late_word_of_an_old_connection_does_not_end_the_new_one() -> None:
    box = outbox("a")
    write(box)
    old = box.barrier()
    box.lost()
    write(box)
    new = box.barrier()
    assert old is not None
    assert new is not None
    assert box.passed(old) == []
    assert box.passed(new) == ["a"]
    # And the session takes one `Lost` for each connection: a second one is the shell's fault, never acted upon.
    link = session()
    link.start()
    now = serve(link)
    link.receive(Lost("x"), now=now)
    with pytest.raises(IllegalMove):
        link.receive(Lost("x"), now=now)


def test_D_E_8_without_a_connection_messages_wait_and_nothing_breaks() -> None:
    box = outbox("a")
    assert box.lost() is None
    assert box.passed(1) == []
    assert box.has_data
    assert write(box) == [b"a"]


def test_D_E_9_acks_and_leases_pass_uploads_and_nothing_is_dropped_by_the_rate() -> None:
    pace = Pace(TokenBucket(0, 0), TokenBucket(30, 1), Ramp(random.Random(1), start_rate=1.0, seconds=0.0))
    assert pace.available(Class.SIGNAL, now=0.0) is None
    assert pace.available(Class.DATA, now=0.0) == 1
    pace.take(0, 1)
    assert pace.available(Class.DATA, now=0.0) == 0, "messageQPS holds for uploads"
    box = outbox(*(f"upload {number}" for number in range(50)))
    box.put(b"ack", "ack", Class.SIGNAL)
    taken = box.take(10_000, max_messages=10, max_data=0)
    assert [entry.payload for entry in taken] == [b"ack"]
    assert box.waiting(Class.DATA) == 50


def test_D_E_10_pauses_grow_from_a_fast_first_try_to_a_cap_and_differ_between_nodes() -> None:
    pauses = {seed: [Backoff(random.Random(seed), cap_seconds=60.0).delay(n) for n in range(12)] for seed in (1, 2)}
    assert pauses[1] != pauses[2]
    for each in pauses.values():
        assert each[0] <= 1.0
        assert max(each) <= 60.0


def test_D_E_11_the_pause_before_a_dial_can_be_cut_short() -> None:
    link = session()
    link.start()
    link.expire(now=0.0)
    link.receive(Failed("refused"), now=0.1)
    assert [type(action) for action in link.receive(DialDue(), now=0.11)] == [Dial]
    link.receive(Failed("refused"), now=0.2)
    link.receive(StopWanted(), now=0.21)
    assert link.state is LinkState.STOPPED


def test_D_E_12_one_checked_value_says_where_the_cloud_is() -> None:
    section = EdgeHubSection(websocket=WebsocketSection(server="cloud.example:10000"))
    made = EdgeHubConfig.from_node(NodeConfig(node_name="edge-1", edge_hub=section))
    assert (made.endpoints, made.node_name) == ((Endpoint("cloud.example", 10000),), "edge-1")
    with pytest.raises(ConfigError, match=r"server"):
        EdgeHubConfig.from_node(NodeConfig(edge_hub=EdgeHubSection(websocket=WebsocketSection(server="cloud"))))
    with pytest.raises(ConfigError, match="exactly one"):
        EdgeHubConfig.from_node(NodeConfig(edge_hub=EdgeHubSection(quic=QuicSection(enable=True))))


def test_D_E_13_the_server_is_always_verified(tmp_path: Path) -> None:
    context = client_context(config(Authority(tmp_path)))
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname


def test_D_E_14_the_connection_state_is_retained_and_a_late_module_gets_the_last_one() -> None:
    room = BrokerRoom()
    hub = room.peer("edgehub")
    for number, counter in ((1, 1), (2, 2)):
        hub.send("@bus", number, retain=("node/connection", counter))
    late = room.peer("eventbus", groups=["bus"])
    ((header, (message,)),) = late.take_bodies()
    assert message.id == "m2"
    assert header.destination == "@bus"
    link = session()
    assert link.start() == [Announce(False)], "it is told from the start on, and only when it changes"
    now = serve(link)
    assert link.receive(Proven(), now=now) == []


def test_D_E_15_certificates_that_do_not_fit_are_an_answer_and_a_later_dial_takes_the_new_ones(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pair, other = authority.node("edge-1"), authority.node("edge-2")
    settings = config(authority)
    whole = pair.key.read_bytes()
    pair.key.write_bytes(other.key.read_bytes())  # half of a new pair
    with pytest.raises(LinkRefused):
        client_context(settings)
    link = session()
    link.start()
    link.expire(now=0.0)
    assert link.receive(Failed("the key belongs to another certificate"), now=0.1) == []
    assert isinstance(dial(link)[0][0], Dial), "tried again, the process lives on"
    pair.key.write_bytes(whole)
    client_context(settings)


def test_D_E_16_a_restart_of_edgehub_goes_on_where_the_file_ends(tmp_path: Path) -> None:
    for start in range(2):
        file = OutboxFile(tmp_path / "outbox.db", boot_id="boot", now=float(start))
        extent = file.extent(Class.DATA)
        assert extent.messages == start
        with file.transaction():
            file.add(Class.DATA, [Row(extent.last + 1, "s", b"{}")], float(start))
        file.close()
    link = session()
    link.start()
    actions: list[Action] = link.receive(StopWanted(), now=0.0)
    assert actions
    assert session().start() == [Announce(False)]


def test_D_E_17_an_answer_that_nobody_waits_for_is_an_ordinary_message_of_its_group() -> None:
    keeper: SyncKeeper[str] = SyncKeeper()
    assert keeper.answer("never asked") is None
    answer = Message(id="a", parent_id="never asked", source="edgecontroller", group="resource", operation="response")
    assert destination(answer, CURRENT) == Group("meta")
    keeper.register("q", "asker", b"", operation="query", resource="r", seconds=1.0, now=0.0)
    keeper.expire(now=2.0)
    assert keeper.answer("q") is LATE, "counted, and acknowledged"


def test_D_E_18_downstream_keeps_its_order_and_a_full_module_holds_up_no_other() -> None:
    room = BrokerRoom(declared={"eventbus": [], "meta-manager": ["meta"]}, byte_budget=1 << 20)
    hub = room.peer("edgehub")
    meta = room.peer("meta-manager", groups=["meta"])
    hub.send("eventbus", 1, 50, size=1000)  # stands still
    hub.send("@meta", 1, 2)
    hub.send("@meta", 3, 1)
    delivered = [message.id for _, messages in meta.take_bodies() for message in messages]
    assert delivered == ["m1", "m2", "m3"]


def test_D_E_19_a_question_is_registered_first_and_has_its_own_time() -> None:
    keeper: SyncKeeper[str] = SyncKeeper()
    assert keeper.register("q", "asker", b"payload", operation="query", resource="r", seconds=42.0, now=0.0)
    assert keeper.next_deadline() == 42.0
    question = keeper.answer("q")  # before anything was written
    assert isinstance(question, Question)
    assert question.token == "asker"


def test_D_E_20_offline_uploads_go_to_the_disk_and_are_settled_then_up_to_a_limit_that_pushes_back() -> None:
    box: Outbox[str] = Outbox(OutboxLimits(max_messages=2, max_bytes=10_000, stored_messages=3))
    for token in ("a", "b"):
        box.put(token.encode(), token, Class.DATA, now=0.0)
    assert not box.has_room(Class.DATA, 1)
    stored = box.spill(Class.DATA, 1.0, 1.0)
    assert box.stored(Class.DATA, stored[-1].row) == ["a", "b"], "settled once it is committed"
    box.put(b"c", "c", Class.DATA, now=1.0)
    assert not box.has_room(Class.DATA, 1), "the senders wait; nothing is dropped"
    assert [entry.payload for entry in box.take(10_000, max_messages=9, max_data=None)] == [b"a", b"b", b"c"]
