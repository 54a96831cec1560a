"""EdgeHub between a fake bus and a fake link."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from modules.edgehub.config import EdgeHubConfig, Endpoint
from modules.edgehub.hub import LOCAL_GROUP, EdgeHub
from modules.edgehub.link import LinkLost, LinkRefused, Passed, SkippedMessage
from modules.edgehub.outbox import POISON_LOSSES
from modules.edgehub.permission import Grant
from runtime.emp import Priority
from runtime.errors import MessageTooLarge, Refused, UsageError
from runtime.message import Message
from runtime.names import Group
from tests.modules.edgehub.fakes import FakeBus, FakeCloud, hand_over, running, upload
from tests.support.aio import run, until

META = Group("meta")


def config(**changes: Any) -> EdgeHubConfig:
    values: dict[str, Any] = {
        "node_name": "edge-1",
        "endpoints": (Endpoint("cloud", 10000),),
        "message_qps": 0.0,
        "retry_cap_seconds": 0.05,
        "drain_seconds": 0.2,
    }
    return EdgeHubConfig(**values | changes)


def state(hub: EdgeHub) -> str:
    return str(hub.link_status()["state"])


async def until_served(hub: EdgeHub) -> None:
    await until(lambda: state(hub) == "served", "a served link")


def configmap(name: str, *, operation: str = "update", parent: str = "") -> Message:
    return Message.build(
        source="edgecontroller",
        group="resource",
        resource=f"default/configmap/{name}",
        operation=operation,
        content={"name": name},
        parent_id=parent,
        resource_version="7",
    )


def acks(cloud: FakeCloud) -> list[str]:
    return [m.parent_id for m in cloud.written() if m.operation == "response" and m.content == b"OK"]


# --- up ------------------------------------------------------------------------------------------------


def test_a_message_is_settled_by_the_pong_behind_it_and_not_before() -> None:
    async def scenario() -> None:
        cloud = FakeCloud(answers_barriers=False)
        async with running(config(), factory=cloud) as (hub, _):
            await until_served(hub)
            cloud.link.arrive(Passed(cloud.link.barriers[0]))  # the probe that went with the greeting
            deferral = await hand_over(hub, upload(1))
            assert deferral is not None
            await until(lambda: len(cloud.link.barriers) == 2, "the ping behind it")
            assert deferral.outcome is None
            cloud.link.arrive(Passed(cloud.link.barriers[1]))
            await until(lambda: deferral.outcome == "done", "the settlement")

    run(scenario())


def test_at_most_one_ping_is_under_way() -> None:
    async def scenario() -> None:
        cloud = FakeCloud(answers_barriers=False)
        async with running(config(), factory=cloud) as (hub, _):
            await until_served(hub)
            for number in range(20):
                await hand_over(hub, upload(number))
                await asyncio.sleep(0)
            await until(lambda: len(cloud.written()) == 20, "the uploads")
            assert len(cloud.link.barriers) == 1
            cloud.link.arrive(Passed(cloud.link.barriers[0]))
            await until(lambda: len(cloud.link.barriers) == 2, "one more ping for all of them")

    run(scenario())


def test_the_unconfirmed_go_again_over_the_next_link_with_their_ids() -> None:
    async def scenario() -> None:
        cloud = FakeCloud(answers_barriers=False)
        async with running(config(), factory=cloud) as (hub, _):
            await until_served(hub)
            deferrals = [await hand_over(hub, upload(number)) for number in range(5)]
            await until(lambda: len(cloud.written()) == 5, "the uploads")
            cloud.answers_barriers = True
            cloud.link.lose("EOF")
            await until(lambda: all(d and d.outcome == "done" for d in deferrals), "the settlement")
            ids = [d.message.id for d in deferrals if d]
            assert [m.id for m in cloud.written()] == ids + ids

    run(scenario())


def test_what_no_rule_grants_is_denied_by_the_name_the_broker_vouches_for() -> None:
    async def scenario() -> None:
        cloud = FakeCloud()
        grants = (("pump", (Grant(groups=("user",), resources=("default/device/*",)),)),)
        async with running(config(grants=grants), factory=cloud) as (hub, _):
            await until_served(hub)
            forged = Message.build(source="pump", group="resource", operation="response", parent_id="x")
            with pytest.raises(Refused, match="denied"):
                await hand_over(hub, forged, sender="pump")
            assert hub.counters()["refused_up"] == 1
            await hand_over(hub, upload(1), sender="pump")
            await hand_over(hub, forged, sender="of-the-node")
            await until(lambda: len(cloud.written()) == 2, "what is granted")

    run(scenario())


@pytest.mark.parametrize("kind", ["json", "text"])
def test_content_that_cloudhub_could_not_read_is_refused_to_its_sender(kind: Any) -> None:
    async def scenario() -> None:
        cloud = FakeCloud()
        async with running(config(), factory=cloud) as (hub, _):
            await until_served(hub)
            with pytest.raises(Refused, match="invalid"):
                await hand_over(hub, Message(id="m", kind=kind, content=b"\xff{"))
            assert hub.counters()["refused_up"] == 1
            await hand_over(hub, upload(1))
            await until(lambda: len(cloud.written()) == 1, "the next one")

    run(scenario())


def test_a_message_beyond_the_limit_is_refused_as_too_large() -> None:
    async def scenario() -> None:
        async with running(config(max_upload_bytes=65536), factory=FakeCloud()) as (hub, _):
            with pytest.raises(Refused, match="too-large"):
                await hand_over(hub, upload(1, pad="x" * 65536))

    run(scenario())


class SlowCloud(FakeCloud):
    """Passes `bytes_per_second`."""

    def __init__(self, bytes_per_second: float) -> None:
        super().__init__(answers_barriers=False)
        self.bytes_per_second = bytes_per_second
        self.answered = 0

    async def work(self) -> None:
        sent = 0
        while True:
            await asyncio.sleep(0.001)  # the pace of this cloud's work
            while self.links and self.answered < len(self.link.barriers):
                size = sum(map(len, self.link.written)) - sent
                sent += size
                await asyncio.sleep(size / self.bytes_per_second)
                self.link.arrive(Passed(self.link.barriers[self.answered]))
                self.answered += 1


@asynccontextmanager
async def slow_link(bytes_per_second: float) -> AsyncIterator[tuple[EdgeHub, SlowCloud]]:
    """Half the keepalive limit is a second."""
    cloud = SlowCloud(bytes_per_second)
    async with running(config(keepalive_limit_seconds=2.0, heartbeat_seconds=1.0), factory=cloud) as (hub, _):
        work = asyncio.create_task(cloud.work())
        await until_served(hub)
        yield hub, cloud
        work.cancel()


@pytest.mark.alone
def test_a_message_that_would_block_a_slow_link_is_refused_also_when_it_is_the_first() -> None:
    async def scenario() -> None:
        async with slow_link(100_000) as (hub, cloud):
            with pytest.raises(Refused, match="too-large-for-link"):
                await hand_over(hub, upload(1, pad="x" * 1_000_000))
            padding = sum(map(len, cloud.link.written))
            assert padding < 200_000, "what it took to find out"
            with pytest.raises(Refused, match="too-large-for-link"):
                await hand_over(hub, upload(2, pad="x" * 1_000_000))
            assert sum(map(len, cloud.link.written)) < padding + 2000, "known for a while"
            deferral = await hand_over(hub, upload(3, pad="x" * 50_000))
            assert deferral is not None
            await until(lambda: deferral.outcome == "done", "a smaller one")

    run(scenario())


@pytest.mark.alone
def test_a_large_message_passes_a_link_that_is_fast_enough() -> None:
    async def scenario() -> None:
        async with slow_link(10_000_000) as (hub, _):
            deferral = await hand_over(hub, upload(1, pad="x" * 1_000_000))
            assert deferral is not None
            await until(lambda: deferral.outcome == "done", "the upload")

    run(scenario())


def test_a_link_that_is_lost_while_it_is_measured_holds_nobody_up() -> None:
    async def scenario() -> None:
        cloud = FakeCloud(answers_barriers=False)
        async with running(config(), factory=cloud) as (hub, _):
            await until_served(hub)
            task = asyncio.create_task(hand_over(hub, upload(1, pad="x" * 1_000_000)))
            await asyncio.sleep(0)
            cloud.answers_barriers = True
            cloud.link.lose("cut")
            deferral = await task
            assert deferral is not None
            await until(lambda: deferral.outcome == "done", "over the next link")

    run(scenario())


def test_with_the_cloud_away_senders_are_taken_up_to_the_bound_and_then_wait() -> None:
    async def scenario() -> None:
        cloud = FakeCloud()
        cloud.faults = [LinkLost("no route")] * 3
        async with running(config(memory_messages=10), factory=cloud) as (hub, _):
            for number in range(10):
                await hand_over(hub, upload(number))
            waiting = asyncio.create_task(hand_over(hub, upload(10)))
            for _ in range(5):
                await asyncio.sleep(0)
            assert not waiting.done()
            urgent = await hand_over(hub, Message.build(source="twin", group="resource", operation="update"))
            assert urgent is not None, "signals have room of their own"
            await until_served(hub)
            deferral = await waiting
            assert deferral is not None
            await until(lambda: deferral.outcome == "done", "all of it")
            assert [m.json()["number"] for m in cloud.written() if m.operation == "upload"] == list(range(11))

    run(scenario())


def test_signals_go_before_the_data_that_waits() -> None:
    async def scenario() -> None:
        cloud = FakeCloud()
        cloud.faults = [LinkLost("no route")]
        async with running(config(retry_cap_seconds=0.2), factory=cloud) as (hub, _):
            for number in range(5):
                await hand_over(hub, upload(number))
            await hand_over(hub, Message.build(source="twin", group="resource", resource="t", operation="update"))
            await hand_over(hub, Message.upload("urgent"), priority=Priority.SIGNAL)
            await until(lambda: len(cloud.written()) == 7, "everything")
            assert [m.resource for m in cloud.written()][:2] == ["t", "urgent"]

    run(scenario())


def test_message_qps_limits_data_and_not_signals_and_shows_as_the_bottleneck() -> None:
    async def scenario() -> None:
        cloud = FakeCloud()
        async with running(config(message_qps=20.0, message_burst=5), factory=cloud) as (hub, _):
            await until_served(hub)
            for number in range(8):
                await hand_over(hub, upload(number))
            await until(lambda: len(cloud.written()) == 5, "the burst")
            assert hub.link_status()["bottleneck"] == "messageQPS"
            await hand_over(hub, Message.build(source="twin", group="resource", resource="t", operation="update"))
            await until(lambda: any(m.resource == "t" for m in cloud.written()), "the signal")
            await until(lambda: len(cloud.written()) == 9, "the rest at its rate")
            assert hub.link_status()["bottleneck"] is None

    run(scenario())


def test_a_message_that_cuts_every_link_is_given_up_in_the_end() -> None:
    async def scenario() -> None:
        cloud = FakeCloud(answers_barriers=False)
        async with running(config(), factory=cloud) as (hub, _):
            await until_served(hub)
            poison = await hand_over(hub, upload(0))
            good = await hand_over(hub, upload(1))
            assert poison is not None
            assert good is not None
            for cut in range(POISON_LOSSES):
                await until(lambda n=cut + 1: len(cloud.links) == n and cloud.link.written[2:], "the poison again")
                cloud.link.lose("EOF")
            await until(lambda: poison.outcome == "failed", "the refusal")
            cloud.answers_barriers = True
            await until(lambda: len(cloud.links) == POISON_LOSSES + 1, "the next link")
            cloud.link.arrive(*(Passed(b) for b in cloud.link.barriers))
            await until(lambda: good.outcome == "done", "the other one")

    run(scenario())


# --- questions ---------------------------------------------------------------------------------------------


def question(operation: str = "query") -> Message:
    return Message.build(source="edged", group="meta", resource="default/configmap/c", operation=operation)


def test_a_question_is_settled_by_its_answer_and_the_answer_acknowledged() -> None:
    async def scenario() -> None:
        cloud = FakeCloud()
        async with running(config(), factory=cloud) as (hub, bus):
            await until_served(hub)
            asked = question()
            deferral = await hand_over(hub, asked, priority=Priority.REQUEST, expects_reply=True)
            assert deferral is not None
            await until(lambda: asked.id in [m.id for m in cloud.written()], "the question")
            await asyncio.sleep(0.02)  # time for a wrong settlement to show
            assert deferral.outcome is None, "a pong is no answer"
            answer = configmap("c", operation="response", parent=asked.id)
            cloud.link.down(answer)
            await until(lambda: bus.replies, "the reply")
            assert bus.replies[0][0] is asked
            assert bus.replies[0][1].json() == {"name": "c"}
            assert not bus.sent, "to nobody else"
            await until(lambda: deferral.outcome == "done", "the settlement")
            await until(lambda: acks(cloud) == [answer.id], "the ACK")
            cloud.link.down(answer)  # CloudHub repeats what it has no ACK for
            await until(lambda: acks(cloud) == [answer.id] * 2, "the ACK again")
            assert len(bus.replies) == 1

    run(scenario())


def test_an_answer_in_the_same_breath_finds_its_question() -> None:
    async def scenario() -> None:
        cloud = FakeCloud(greets=False)
        async with running(config(), factory=cloud) as (hub, bus):
            asked = question()
            await hand_over(hub, asked, expects_reply=True)
            await until(lambda: cloud.links and cloud.link.written, "the greeting")
            cloud.link.down(configmap("c", operation="response", parent=asked.id))
            await until(lambda: bus.replies, "the reply")

    run(scenario())


def test_a_question_has_its_own_time_and_a_late_answer_is_counted_and_acknowledged() -> None:
    async def scenario() -> None:
        cloud = FakeCloud()
        async with running(config(), factory=cloud) as (hub, bus):
            await until_served(hub)
            asked = question()
            deferral = await hand_over(hub, asked, expects_reply=True, ttl_ms=30)
            assert deferral is not None
            await until(lambda: deferral.outcome == "expired", "its time")
            answer = configmap("c", operation="response", parent=asked.id)
            cloud.link.down(answer)
            await until(lambda: acks(cloud) == [answer.id], "the ACK")
            assert hub.counters()["answers_late"] == 1
            assert not bus.replies
            assert not bus.sent

    run(scenario())


def test_the_answer_to_a_module_that_is_gone_counts_as_late_and_is_acknowledged() -> None:
    async def scenario() -> None:
        cloud = FakeCloud()
        async with running(config(), factory=cloud) as (hub, bus):
            bus.refusing["reply"] = "gone"
            await until_served(hub)
            asked = question()
            await hand_over(hub, asked, expects_reply=True)
            answer = configmap("c", operation="response", parent=asked.id)
            cloud.link.down(answer)
            await until(lambda: acks(cloud) == [answer.id], "the ACK")
            assert hub.counters()["answers_late"] == 1

    run(scenario())


@pytest.mark.parametrize(
    ("fault", "outcome"), [(MessageTooLarge(20, 10), "too-large"), (UsageError("nobody waits"), "gone")]
)
def test_an_answer_that_the_bus_does_not_take_refuses_the_question(fault: Exception, outcome: str) -> None:
    async def scenario() -> None:
        cloud = FakeCloud()
        async with running(config(), factory=cloud) as (hub, bus):
            bus.respond_fault = fault
            await until_served(hub)
            asked = question()
            deferral = await hand_over(hub, asked, expects_reply=True)
            assert deferral is not None
            answer = configmap("c", operation="response", parent=asked.id)
            cloud.link.down(answer)
            await until(lambda: acks(cloud) == [answer.id], "the ACK, or the cloud would repeat it for ever")
            assert deferral.outcome == outcome

    run(scenario())


@pytest.mark.parametrize(("operation", "times"), [("query", 2), ("insert", 1)])
def test_a_question_outlives_the_link_and_is_repeated_if_it_changes_nothing(operation: str, times: int) -> None:
    async def scenario() -> None:
        cloud = FakeCloud()
        async with running(config(), factory=cloud) as (hub, bus):
            await until_served(hub)
            asked = question(operation)
            await hand_over(hub, asked, expects_reply=True)
            await until(lambda: len(cloud.written()) == 1 and not hub.counters()["unconfirmed"], "a pong")
            cloud.link.lose("EOF")
            await until(lambda: len(cloud.links) == 2 and state(hub) == "served", "the second link")
            await until(lambda: not hub.counters()["waiting_signals"], "everything written")
            assert [m.id for m in cloud.written()] == [asked.id] * times
            cloud.link.down(configmap("c", operation="response", parent=asked.id))
            await until(lambda: bus.replies, "the reply")

    run(scenario())


def test_the_same_question_twice_is_refused_the_second_time() -> None:
    async def scenario() -> None:
        async with running(config(), factory=FakeCloud()) as (hub, _):
            asked = question()
            await hand_over(hub, asked, expects_reply=True)
            again = await hand_over(hub, asked, expects_reply=True)
            assert again is not None
            assert again.outcome == "overflow"

    run(scenario())


# --- down ------------------------------------------------------------------------------------------------


def test_the_ack_goes_up_when_the_owner_has_handled_the_object() -> None:
    async def scenario() -> None:
        cloud = FakeCloud()
        async with running(config(), factory=cloud) as (hub, bus):
            bus.slow.add(META)
            await until_served(hub)
            update = configmap("c")
            cloud.link.down(update)
            cloud.link.down(update)
            await until(lambda: hub.counters()["deduped"] == 1, "the repeat")
            assert len(bus.sent_to(META)) == 1, "a repeat of something in hand is dropped"
            assert acks(cloud) == []
            bus.sent[0].receipt.settle()
            await until(lambda: acks(cloud) == [update.id], "the ACK")
            cloud.link.down(update)
            await until(lambda: acks(cloud) == [update.id] * 2, "a repeat of something done is acknowledged")
            assert len(bus.sent_to(META)) == 1

    run(scenario())


def test_what_its_owner_refuses_is_not_acknowledged_and_the_repeat_is_a_new_try() -> None:
    async def scenario() -> None:
        cloud = FakeCloud()
        async with running(config(), factory=cloud) as (hub, bus):
            bus.refusing[META] = "failed"
            await until_served(hub)
            update = configmap("c")
            cloud.link.down(update)
            await until(lambda: hub.counters()["refused_down"] == 1, "the refusal")
            del bus.refusing[META]
            cloud.link.down(update)
            await until(lambda: acks(cloud) == [update.id], "the ACK")
            assert len(bus.sent_to(META)) == 2

    run(scenario())


def test_an_object_outlives_the_link_it_came_over() -> None:
    async def scenario() -> None:
        cloud = FakeCloud()
        async with running(config(), factory=cloud) as (hub, bus):
            bus.slow.add(META)
            await until_served(hub)
            update = configmap("c")
            cloud.link.down(update)
            await until(lambda: bus.sent, "the object")
            cloud.link.lose("EOF")
            bus.sent[0].receipt.settle()
            await until(lambda: acks(cloud) == [update.id], "the ACK over the next link")

    run(scenario())


def test_a_group_nobody_knows_is_counted_and_the_link_lives() -> None:
    async def scenario() -> None:
        cloud = FakeCloud()
        async with running(config(), factory=cloud) as (hub, bus):
            await until_served(hub)
            cloud.link.down(Message.build(source="resource", group="cloudhub", operation="disconnected"))
            await until(lambda: hub.counters()["unknown_group"] == 1, "the count")
            assert not bus.sent
            assert acks(cloud) == []
            assert state(hub) == "served"

    run(scenario())


def test_a_message_that_was_passed_over_is_counted() -> None:
    async def scenario() -> None:
        cloud = FakeCloud(greets=False)
        async with running(config(), factory=cloud) as (hub, _):
            await until(lambda: cloud.links, "a link")
            cloud.link.arrive(SkippedMessage(20 * 2**20))
            await until_served(hub)
            assert hub.counters()["skipped_down"] == 1

    run(scenario())


def test_an_answer_that_nobody_waits_for_is_an_ordinary_message_of_its_group() -> None:
    async def scenario() -> None:
        cloud = FakeCloud()
        async with running(config(), factory=cloud) as (hub, bus):
            await until_served(hub)
            answer = configmap("c", operation="response", parent="somebody-else")
            cloud.link.down(answer)
            await until(lambda: bus.sent_to(META), "the answer")
            await until(lambda: acks(cloud) == [answer.id], "the ACK")

    run(scenario())


# --- the link, the node ---------------------------------------------------------------------------------------


def connection_events(bus: FakeBus, group: str) -> list[str]:
    return [message.text() for to, _, message in bus.retained if to == Group(group)]


def test_the_connection_state_is_retained_for_four_groups_on_every_change() -> None:
    async def scenario() -> None:
        cloud = FakeCloud()
        async with running(config(), factory=cloud) as (hub, bus):
            await until_served(hub)
            cloud.link.lose("EOF")
            await until(lambda: hub.counters()["connects"] == 2 and state(hub) == "served", "the second link")
        for group in ("meta", "twin", "bus", "taskmanager"):
            events = connection_events(bus, group)
            assert events[:4] == ["cloud_disconnected", "cloud_connected", "cloud_disconnected", "cloud_connected"]
        assert {key for _, key, _ in bus.retained} == {"node/connection"}

    run(scenario())


def test_a_refused_dial_is_told_in_the_status() -> None:
    async def scenario() -> None:
        cloud = FakeCloud()
        cloud.faults = [LinkRefused("CloudHub refuses our certificate: expired")] * 100
        async with running(config(retry_cap_seconds=30.0), factory=cloud) as (hub, _):
            await until(lambda: cloud.links and state(hub) == "closed", "the refusal")
            status = hub.link_status()
            assert status["why"] == "CloudHub refuses our certificate: expired"
            assert status["endpoint"] == "cloud:10000"
            assert not hub.counters()["link_up"]
            cloud.faults = []
            hub.dial_now()
            await until_served(hub)

    run(scenario())


def test_a_question_to_edgehub_itself_is_answered_and_never_goes_up() -> None:
    async def scenario() -> None:
        cloud = FakeCloud()
        async with running(config(), factory=cloud) as (hub, bus):
            await until_served(hub)
            status = Message.build(group=LOCAL_GROUP, resource="edgehub/link", operation="status")
            await hand_over(hub, status, expects_reply=True)
            (reply,) = [reply for request, reply in bus.replies if request is status]
            assert reply.json()["state"] == "served"
            assert reply.json()["unproven"] is False
            assert json.dumps(reply.json())
            with pytest.raises(Refused, match="invalid"):
                await hand_over(hub, Message.build(group=LOCAL_GROUP, resource="edgehub/link", operation="explode"))
            with pytest.raises(Refused, match="invalid"):
                await hand_over(hub, status)  # nobody waits for the answer
            assert cloud.written() == []

    run(scenario())


def test_all_counters_are_whole_numbers() -> None:
    async def scenario() -> None:
        async with running(config(), factory=FakeCloud()) as (hub, _):
            await until_served(hub)
            counters = hub.counters()
            assert all(type(value) is int for value in counters.values())
            assert (counters["link_served"], counters["connects"]) == (1, 1)

    run(scenario())


def test_a_silent_link_is_closed_and_another_opened() -> None:
    async def scenario() -> None:
        cloud = FakeCloud(answers_barriers=False)
        async with running(config(silence_seconds=0.1), factory=cloud) as (hub, _):
            await until_served(hub)
            cloud.answers_barriers = True
            await until(lambda: hub.counters()["connects"] == 2, "the second link")
            assert cloud.links[0].closed == [False], "without a goodbye that nobody would hear"

    run(scenario())


def test_stopping_says_goodbye_after_the_last_pong() -> None:
    async def scenario() -> None:
        cloud = FakeCloud()
        async with running(config(), factory=cloud) as (hub, _):
            await until_served(hub)
            deferral = await hand_over(hub, upload(1))
        assert deferral is not None
        assert deferral.outcome == "done"
        assert cloud.link.closed == [True]
        assert state(hub) == "stopped"

    run(scenario())


def test_a_link_lost_while_stopping_ends_the_wait() -> None:
    async def scenario() -> None:
        cloud = FakeCloud(answers_barriers=False)
        async with running(config(drain_seconds=1000.0), factory=cloud) as (hub, _):
            await until_served(hub)
            await hand_over(hub, upload(1))
            asyncio.get_running_loop().call_later(0.05, cloud.link.lose, "EOF")
        assert state(hub) == "stopped"

    run(scenario())


def test_stopping_does_not_wait_for_a_cloud_that_does_not_answer() -> None:
    async def scenario() -> None:
        cloud = FakeCloud(answers_barriers=False)
        async with running(config(drain_seconds=0.05), factory=cloud) as (hub, _):
            await until_served(hub)
            deferral = await hand_over(hub, upload(1))
        assert deferral is not None
        assert deferral.outcome is None, "the broker gives it to the next edgehub"

    run(scenario())
