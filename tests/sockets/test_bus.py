"""The bus over real ZeroMQ: a broker in a thread, modules on one loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from runtime import client, emp
from runtime.access import Open
from runtime.client import Bus, Presence, Receipt
from runtime.emp import Priority
from runtime.errors import (
    Congested,
    Fenced,
    HelloRefused,
    InvalidName,
    MessageTooLarge,
    NameTaken,
    NotHandled,
    Refused,
    RequestTimeout,
    UsageError,
)
from runtime.message import Deferral, Message, join_batch
from runtime.names import Group
from tests.support.aio import run, until
from tests.support.bus_broker import RawDealer, ThreadBroker

pytestmark = pytest.mark.filterwarnings("error")

SMALL = emp.Limits(1 << 20, 4, 1 << 20, 4, 4096)
"Windows of four messages."


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[ThreadBroker]:
    with ThreadBroker(tmp_path, declared={"declared": ["kept"]}) as running:
        yield running


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "RETRY_DELAYS_SECONDS", (0.01, 0.02))
    monkeypatch.setattr(client, "HANDLER_WAIT_SECONDS", 0.3)


class Inbox:
    """A handler that keeps what it is given."""

    def __init__(self) -> None:
        self.messages: list[Message] = []

    async def __call__(self, message: Message) -> None:
        self.messages.append(message)

    @property
    def resources(self) -> list[str]:
        return [message.resource for message in self.messages]


def said(resource: object = "", content: Any = None) -> Message:
    return Message.build(resource=str(resource), content=content)


async def refusal(receipt: Awaitable[None]) -> str:
    with pytest.raises(Refused) as refused:
        await receipt
    return refused.value.reason


# --- send and receipt -----------------------------------------------------------------------------


def test_a_message_arrives_and_its_receipt_says_so(broker: ThreadBroker) -> None:
    async def scenario() -> None:
        seen: list[Any] = []

        async def handler(message: Message) -> None:
            seen.append((message.json(), message.delivery))

        async with (
            Bus.connect("receiver", handler=handler, endpoint=broker.endpoint),
            Bus.connect("sender", endpoint=broker.endpoint) as sender,
        ):
            receipt = await sender.send("receiver", said(content={"celsius": 21.5}), ttl=30.0)
            called: list[Receipt] = []
            receipt.add_done_callback(called.append)
            await receipt
            assert receipt.settled
            assert receipt.refusal is None
            await until(lambda: called, "the callback")
            ((content, delivery),) = seen
            assert content == {"celsius": 21.5}
            assert (delivery.sender, delivery.destination, delivery.priority) == ("sender", "receiver", Priority.DATA)
            assert not delivery.redelivered
            assert not delivery.expects_reply
            assert 0 < delivery.ttl_ms <= 30_000

    run(scenario())


def test_ten_thousand_messages_arrive_in_order_each_once(broker: ThreadBroker) -> None:
    async def scenario() -> None:
        inbox = Inbox()
        async with (
            Bus.connect("receiver", handler=inbox, endpoint=broker.endpoint),
            Bus.connect("sender", endpoint=broker.endpoint) as sender,
        ):
            receipts = [await sender.send("receiver", said(number)) for number in range(10_000)]
            for receipt in receipts:
                await receipt
            assert inbox.resources == [str(number) for number in range(10_000)]

    run(scenario())


def test_a_group_message_reaches_every_member(broker: ThreadBroker) -> None:
    async def scenario() -> None:
        one, two, none = Inbox(), Inbox(), Inbox()
        async with (
            Bus.connect("one", handler=one, groups={"g"}, endpoint=broker.endpoint),
            Bus.connect("two", handler=two, groups={"g", "h"}, endpoint=broker.endpoint),
            Bus.connect("none", handler=none, groups={"h"}, endpoint=broker.endpoint) as sender,
        ):
            await (await sender.send(Group("g"), said("a")))
            assert (one.resources, two.resources, none.resources) == (["a"], ["a"], [])

    run(scenario())


# --- refusals -------------------------------------------------------------------------------------


class Denying(Open):
    def refuse_hello(self, name: str, groups: tuple[str, ...], credentials: object) -> str | None:
        return "not here" if name == "unwanted" else None

    def may_send(self, sender: str, destination: str, priority: int) -> bool:
        return destination != "secret"


def test_every_refusal_that_a_sender_can_meet_is_told(tmp_path: Path) -> None:
    async def scenario(broker: ThreadBroker) -> None:
        async def handler(message: Message) -> None:
            if message.resource == "raise":
                raise ValueError("on purpose")
            raise Refused(message.resource)

        async with Bus.connect("sender", endpoint=broker.endpoint) as sender:
            async with Bus.connect("receiver", handler=handler, groups={"g"}, endpoint=broker.endpoint):
                assert await refusal(await sender.send("nobody", said())) == emp.UNROUTABLE
                assert await refusal(await sender.send(Group("empty"), said())) == emp.UNROUTABLE
                assert await refusal(await sender.send("secret", said())) == emp.DENIED
                assert await refusal(await sender.send("receiver", said("raise"))) == emp.FAILED
                assert await refusal(await sender.send("receiver", said("my-own-reason"))) == "my-own-reason"
                assert await refusal(await sender.send("declared", said(), ttl=0.05)) == emp.EXPIRED
                grouped = await sender.send(Group("g"), said("denied"))
                with pytest.raises(Refused) as refused:
                    await grouped
                assert (refused.value.reason, refused.value.member) == ("denied", "receiver")
                assert grouped.refusals == [("denied", "receiver")]
            async with Bus.connect("silent", endpoint=broker.endpoint):
                assert await refusal(await sender.send("silent", said())) == emp.UNROUTABLE  # it has no handler

    with ThreadBroker(tmp_path, access=Denying(), declared={"declared": ()}) as broker:
        run(scenario(broker))


def test_what_waits_for_an_undeclared_module_that_leaves_is_gone(broker: ThreadBroker) -> None:
    async def scenario() -> None:
        deferrals: list[Deferral] = []

        async def handler(message: Message) -> None:
            deferrals.append(message.defer())

        async with Bus.connect("sender", endpoint=broker.endpoint) as sender:
            async with Bus.connect("receiver", handler=handler, endpoint=broker.endpoint):
                receipt = await sender.send("receiver", said())
                await until(lambda: deferrals, "the message")
            assert await refusal(receipt) == emp.GONE

    run(scenario())


def test_a_batch_that_is_none_is_refused_as_invalid_and_an_overflow_as_such(tmp_path: Path) -> None:
    async def invalid(broker: ThreadBroker) -> None:
        async with Bus.connect("receiver", handler=Inbox(), endpoint=broker.endpoint):
            with RawDealer(broker.endpoint) as raw:
                raw.hello("raw")
                raw.put(emp.SEND, emp.Send("receiver", 3, 1, 2, 1), b"\xc1 no batch")
                settled = await asyncio.to_thread(raw.get, emp.SETTLED)
                assert settled.exceptions == [(1, "invalid", None), (2, "invalid", None)]
                raw.put(emp.BYE, emp.Bye(True))

    async def fill(broker: ThreadBroker) -> None:
        with RawDealer(broker.endpoint) as raw:
            raw.hello("raw")
            raw.put(emp.SEND, emp.Send("declared", 3, 1, 8, 1), join_batch([b"\x90"] * 8))
            raw.put(emp.SEND, emp.Send("declared", 3, 9, 2, 1), join_batch([b"\x90"] * 2))
            inbox = Inbox()
            async with Bus.connect("declared", handler=inbox, endpoint=broker.endpoint):
                while (settled := await asyncio.to_thread(raw.get, emp.SETTLED)).cumulative < 10:
                    pass
            assert [number for number, why, _ in settled.exceptions if why == "overflow"] == [9, 10]

    with ThreadBroker(tmp_path, declared={"declared": ()}, limits=SMALL) as broker:
        run(invalid(broker))
        run(fill(broker))


def test_a_message_too_large_is_refused_before_it_is_sent_and_a_large_one_passes(tmp_path: Path) -> None:
    async def scenario(broker: ThreadBroker) -> None:
        inbox = Inbox()
        async with (
            Bus.connect("receiver", handler=inbox, endpoint=broker.endpoint),
            Bus.connect("sender", endpoint=broker.endpoint) as sender,
        ):
            for to in ("receiver", Group("g")):
                with pytest.raises(MessageTooLarge) as large:
                    await sender.send(to, said(content=b"x" * (9 << 20)))
                assert large.value.limit_bytes == 9 << 20
            with pytest.raises(MessageTooLarge):
                await sender.request("receiver", said(content=b"x" * (9 << 20)), timeout=1.0)
            payload = b"y" * (8 << 20)
            receipts = [await sender.send("receiver", said(content=payload)) for _ in range(3)]
            for receipt in receipts:
                await receipt
            assert [message.content == payload for message in inbox.messages] == [True] * 3

    limits = emp.Limits(message_bytes=9 << 20)
    with ThreadBroker(tmp_path, limits=limits) as broker:
        run(scenario(broker))


def test_a_module_without_an_sdk_that_sends_too_much_is_told_too_large(broker: ThreadBroker) -> None:
    with RawDealer(broker.endpoint) as raw:
        welcome = raw.hello("raw")
        raw.put(emp.SEND, emp.Send("nobody", 3, 1, 1, 1), b"x" * (welcome.limits.message_bytes + 100))
        assert raw.get(emp.SETTLED).exceptions == [(1, "too-large", None)]
        raw.put(emp.PING, emp.Ping(1))
        assert raw.get(emp.PONG).nonce == 1


def test_frames_that_are_none_are_answered_and_the_peer_is_served_on(broker: ThreadBroker) -> None:
    with RawDealer(broker.endpoint) as raw:
        for frames, code in (
            ([b"SHOUT/1", b"\x90"], emp.UNKNOWN_VERB),
            ([b"HELLO/2", b"\x90"], emp.BAD_VERSION),
            ([b"only one frame"], emp.BAD_HEADER),
            ([emp.HELLO, b"\xc1"], emp.BAD_HEADER),
            ([emp.HELLO, b"\xdd\xff\xff\xff\xff"], emp.BAD_HEADER),
            ([emp.PING, b"\x91\x01", b"body"], emp.BAD_HEADER),
            ([b"1", b"2", b"3", b"4", b"5"], emp.BAD_HEADER),
            ([b"", b""], emp.UNKNOWN_VERB),
        ):
            raw.raw(*frames)
            assert raw.get(emp.REFUSED).code == code
        raw.put(emp.PING, emp.Ping(1))
        assert raw.get(emp.WHO) is not None
        raw.hello("raw")
        raw.put(emp.PING, emp.Ping(2))
        assert raw.get(emp.PONG).nonce == 2


def test_bad_names_and_a_closed_bus_are_the_callers_fault(broker: ThreadBroker) -> None:
    async def scenario() -> None:
        with pytest.raises(InvalidName):
            Bus("no name!", endpoint=broker.endpoint)
        async with Bus.connect("sender", endpoint=broker.endpoint) as sender:
            with pytest.raises(InvalidName):
                await sender.send("no name!", said())
            with pytest.raises(UsageError):
                await sender.retain("not a group", "k", said())  # type: ignore[arg-type]
            with pytest.raises(UsageError):
                await sender.respond(said(), said())
        await sender.aclose()
        with pytest.raises(UsageError):
            await sender.send("somebody else", said())

    run(scenario())


# --- handlers -------------------------------------------------------------------------------------


def test_a_handler_that_raises_is_tried_three_times_in_its_place(broker: ThreadBroker) -> None:
    async def scenario() -> None:
        tried: list[str] = []

        async def handler(message: Message) -> None:
            tried.append(message.resource)
            if message.resource == "never" or (message.resource == "second" and tried.count("second") < 2):
                raise ValueError("on purpose")

        async with (
            Bus.connect("receiver", handler=handler, endpoint=broker.endpoint),
            Bus.connect("sender", endpoint=broker.endpoint) as sender,
        ):
            receipts = [await sender.send("receiver", said(name)) for name in ("second", "never", "fine")]
            await receipts[2]
            await receipts[0]
            assert await refusal(receipts[1]) == emp.FAILED
            assert tried == ["second", "second", "never", "never", "never", "fine"]

    run(scenario())


def test_a_refusal_by_the_handler_is_not_tried_again(broker: ThreadBroker) -> None:
    async def scenario() -> None:
        calls = 0

        async def handler(message: Message) -> None:
            nonlocal calls
            calls += 1
            raise Refused("denied")

        async with (
            Bus.connect("receiver", handler=handler, endpoint=broker.endpoint),
            Bus.connect("sender", endpoint=broker.endpoint) as sender,
        ):
            assert await refusal(await sender.send("receiver", said())) == "denied"
            assert calls == 1

    run(scenario())


def test_a_handler_that_never_returns_is_cancelled_and_the_lane_goes_on(broker: ThreadBroker) -> None:
    async def scenario() -> None:
        ended: list[str] = []

        async def handler(message: Message) -> None:
            try:
                await (asyncio.sleep(3600) if message.resource == "hang" else asyncio.sleep(0))
            finally:
                ended.append(message.resource)

        async with (
            Bus.connect("receiver", handler=handler, handler_timeout=0.1, endpoint=broker.endpoint),
            Bus.connect("sender", endpoint=broker.endpoint) as sender,
        ):
            hanging = await sender.send("receiver", said("hang"))
            after = await sender.send("receiver", said("after"))
            assert await refusal(hanging) == emp.FAILED
            await after
            assert ended == ["hang", "hang", "hang", "after"]

    run(scenario())


def test_a_handler_that_blocks_the_loop_is_taken_for_hung_and_repeats_nothing(tmp_path: Path) -> None:
    handled: list[str] = []
    stop = threading.Event()
    ready = threading.Event()

    def module(endpoint: str) -> None:
        async def main() -> None:
            async def handler(message: Message) -> None:
                handled.append(message.resource)
                if message.resource == "block":
                    time.sleep(1.2)  # noqa: ASYNC251  (that is what is tested)

            async with Bus.connect("blocker", handler=handler, liveness=0.4, endpoint=endpoint):
                ready.set()
                while not stop.is_set():
                    await asyncio.sleep(0.01)  # until the test is over

        asyncio.run(main())

    async def scenario(broker: ThreadBroker) -> None:
        async with Bus.connect("sender", endpoint=broker.endpoint) as sender:
            await until(ready.is_set, "the module")
            events: list[Presence] = []

            async def listen() -> None:
                async for event in sender.presence():
                    events.append(event)

            listening = asyncio.create_task(listen())
            await until(lambda: events, "presence")
            receipts = [await sender.send("blocker", said(name)) for name in ("before", "block", "after")]
            for receipt in receipts:
                await receipt
            await until(lambda: any(event.event == "back" for event in events), "its return")
            assert [event.event for event in events if event.name == "blocker"] == ["attached", "silent", "back"]
            assert handled == ["before", "block", "after"]
            listening.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await listening

    with ThreadBroker(tmp_path, declared={"blocker": ()}) as broker:
        thread = threading.Thread(target=module, args=(broker.endpoint,))
        thread.start()
        try:
            run(scenario(broker))
        finally:
            stop.set()
            thread.join()


def test_deferred_messages_settle_in_any_order(broker: ThreadBroker) -> None:
    async def scenario() -> None:
        deferrals: list[Deferral] = []

        async def handler(message: Message) -> None:
            deferrals.append(message.defer())

        async with (
            Bus.connect("receiver", handler=handler, endpoint=broker.endpoint),
            Bus.connect("sender", endpoint=broker.endpoint) as sender,
        ):
            receipts = [await sender.send("receiver", said(number)) for number in range(5)]
            await until(lambda: len(deferrals) == 5, "all messages")
            assert deferrals[0].delivery.sender == "sender"
            for index in (4, 2, 3, 1):
                deferrals[index].refuse("denied") if index == 3 else deferrals[index].done()
            deferrals[3].done()  # the first word counts
            await asyncio.sleep(0.05)  # nothing may be settled yet: the first one is open
            assert not any(receipt.settled for receipt in receipts)
            deferrals[0].done()
            for index in (0, 1, 2, 4):
                await receipts[index]
            assert await refusal(receipts[3]) == "denied"

    run(scenario())


def test_a_deferral_is_settled_after_the_broker_was_restarted(broker: ThreadBroker) -> None:
    async def scenario() -> None:
        deferrals: list[Deferral] = []

        async def handler(message: Message) -> None:
            deferrals.append(message.defer())

        async with (
            Bus.connect("receiver", handler=handler, endpoint=broker.endpoint) as receiver,
            Bus.connect("sender", endpoint=broker.endpoint) as sender,
        ):
            receipt = await sender.send("receiver", said())
            await until(lambda: deferrals, "the message")
            await asyncio.to_thread(broker.stop)
            broker.start()
            await until(lambda: not receiver.is_attached or broker.status("receiver"), "the loss")
            await receiver.wait_attached()
            await until(lambda: broker.status("receiver").get("in_flight"), "the redelivery")
            deferrals[0].done()
            await receipt
            assert len(deferrals) == 1

    run(scenario())


def test_deferred_requests_do_not_wait_for_a_heartbeat_at_a_full_prefetch(broker: ThreadBroker) -> None:
    async def scenario() -> None:
        async def handler(message: Message) -> None:
            deferral = message.defer()
            asyncio.get_running_loop().call_soon(deferral.done)
            await receiver.respond(message, message.response())

        receiver = Bus("receiver", handler=handler, prefetch_messages=1, liveness=60.0, endpoint=broker.endpoint)
        receiver.open()
        async with Bus.connect("sender", endpoint=broker.endpoint) as sender:
            await receiver.wait_attached()
            begin = time.monotonic()
            await asyncio.gather(*(sender.request("receiver", said(), timeout=10.0) for _ in range(20)))
            assert time.monotonic() - begin < 3.0  # each would have waited up to half a second for the next PONG
        await receiver.aclose()

    run(scenario())


# --- requests -------------------------------------------------------------------------------------


def test_a_request_gets_its_reply_also_an_error_and_a_late_answer_to_a_deferred_one(broker: ThreadBroker) -> None:
    async def scenario() -> None:
        kept: list[Message] = []

        async def handler(message: Message) -> None:
            if message.resource == "later":
                kept.append(message)
            elif message.resource == "error":
                await receiver.respond(message, message.error("no such thing"))
            else:
                assert message.delivery.expects_reply
                assert receiver.expects_reply(message)
                await receiver.respond(message, message.response({"echo": message.json()}))
                with pytest.raises(UsageError):
                    await receiver.respond(message, message.response())

        async with (
            Bus.connect("receiver", handler=handler, endpoint=broker.endpoint) as receiver,
            Bus.connect("sender", endpoint=broker.endpoint) as sender,
        ):
            reply = await sender.request("receiver", said(content=[1]), timeout=5.0)
            assert reply.json() == {"echo": [1]}
            error = await sender.request("receiver", said("error"), timeout=5.0)
            assert (error.operation, error.text()) == ("error", "no such thing")
            later = asyncio.create_task(sender.request("receiver", said("later"), timeout=5.0))
            await until(lambda: kept, "the request")
            receipt = await receiver.respond(kept[0], kept[0].response("now"))
            assert (await later).text() == "now"
            await receipt

    run(scenario())


def test_a_request_times_out_is_refused_or_meets_nobody(broker: ThreadBroker) -> None:
    async def scenario() -> None:
        kept: list[Message] = []

        async def handler(message: Message) -> None:
            if message.resource == "refuse":
                raise Refused("denied")
            kept.append(message)

        async with (
            Bus.connect("receiver", handler=handler, endpoint=broker.endpoint) as receiver,
            Bus.connect("sender", endpoint=broker.endpoint) as sender,
        ):
            with pytest.raises(RequestTimeout):
                await sender.request("receiver", said(), timeout=0.05)
            with pytest.raises(Refused, match="denied"):
                await sender.request("receiver", said("refuse"), timeout=5.0)
            with pytest.raises(Refused, match="unroutable"):
                await sender.request("nobody", said(), timeout=5.0)
            await (await receiver.respond(kept[0], kept[0].response()))  # delivered, acknowledged, and too late
            await until(lambda: sender._core.late_replies == 1, "the late reply to be counted")
            assert sender._core.open_requests == 0

    run(scenario())


def test_a_group_request_says_who_is_missing_and_why(broker: ThreadBroker) -> None:
    async def scenario() -> None:
        async def answers(message: Message) -> None:
            await one.respond(message, message.response("one"))

        async def refuses(message: Message) -> None:
            raise Refused("denied")

        async def sleeps(message: Message) -> None:
            pass

        endpoint = broker.endpoint
        async with (
            Bus.connect("one", handler=answers, groups={"g"}, endpoint=endpoint) as one,
            Bus.connect("two", handler=refuses, groups={"g"}, endpoint=endpoint),
            Bus.connect("three", handler=sleeps, groups={"g"}, endpoint=endpoint),
            Bus.connect("sender", endpoint=endpoint) as sender,
        ):
            result = await sender.request_group(Group("g"), said(), timeout=0.4)
            assert {name: reply.text() for name, reply in result.replies.items()} == {"one": "one"}
            assert result.missing == {"two": "denied", "three": "timeout"}
            with pytest.raises(Refused, match="unroutable"):
                await sender.request_group(Group("empty"), said(), timeout=5.0)
            with pytest.raises(UsageError):
                await sender.request_group("one", said(), timeout=5.0)  # type: ignore[arg-type]

    run(scenario())


def test_a_group_request_ends_as_soon_as_all_have_answered(broker: ThreadBroker) -> None:
    async def scenario() -> None:
        def responder(name: str) -> Callable[[Message], Awaitable[None]]:
            async def handler(message: Message) -> None:
                await buses[name].respond(message, message.response(name))

            return handler

        buses: dict[str, Bus] = {}
        async with contextlib.AsyncExitStack() as stack:
            for name in ("one", "two", "three"):
                buses[name] = await stack.enter_async_context(
                    Bus.connect(name, handler=responder(name), groups={"g"}, endpoint=broker.endpoint)
                )
            sender = await stack.enter_async_context(Bus.connect("sender", endpoint=broker.endpoint))
            result = await sender.request_group(Group("g"), said(), timeout=3600.0)
            assert (set(result.replies), result.missing) == ({"one", "two", "three"}, {})

    run(scenario())


def test_a_reply_to_a_requester_that_is_gone_is_refused_as_gone(broker: ThreadBroker) -> None:
    async def scenario() -> None:
        kept: list[Message] = []

        async def handler(message: Message) -> None:
            kept.append(message)

        async with Bus.connect("receiver", handler=handler, endpoint=broker.endpoint) as receiver:
            async with Bus.connect("asker", endpoint=broker.endpoint) as asker:
                asking = asyncio.create_task(asker.request("receiver", said(), timeout=3600.0))
                await until(lambda: kept, "the request")
                asking.cancel()
            assert await refusal(await receiver.respond(kept[0], kept[0].response())) == emp.GONE
            async with Bus.connect("asker", endpoint=broker.endpoint):
                pass

    run(scenario())


# --- retained, presence ---------------------------------------------------------------------------


def test_a_retained_message_reaches_members_that_come_later_also_after_a_restart(broker: ThreadBroker) -> None:
    async def scenario() -> None:
        async with Bus.connect("source", endpoint=broker.endpoint) as source:
            for text in ("cloud_connected", "cloud_disconnected"):
                await (await source.retain(Group("meta"), "node/connection", said(content=text)))
            first, second, third = Inbox(), Inbox(), Inbox()
            async with Bus.connect("first", handler=first, groups={"meta"}, endpoint=broker.endpoint) as early:
                await until(lambda: first.messages, "the retained message")
                await asyncio.to_thread(broker.stop)
                broker.start()
                async with Bus.connect("second", handler=second, groups={"meta"}, endpoint=broker.endpoint):
                    await until(lambda: second.messages, "the retained message after the restart")
                    await early.wait_attached()
                    await source.wait_attached()
                    await (await source.retain(Group("meta"), "node/connection", said(content="cloud_connected")))
                async with Bus.connect("third", handler=third, groups={"meta"}, endpoint=broker.endpoint):
                    await until(lambda: third.messages, "the last version")
                assert [message.text() for message in first.messages] == ["cloud_disconnected", "cloud_connected"]
                assert [message.text() for message in second.messages] == ["cloud_disconnected", "cloud_connected"]
                assert [message.text() for message in third.messages] == ["cloud_connected"]

    run(scenario())


def test_presence_tells_who_is_there_and_who_comes_and_goes(
    broker: ThreadBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        events: list[tuple[str, str]] = []
        monkeypatch.setattr("runtime.client.PRESENCE_RENEW_SECONDS", 3600.0)  # a restart is not to wait for it

        async with Bus.connect("watcher", endpoint=broker.endpoint) as watcher:

            async def listen() -> None:
                async for event in watcher.presence():
                    events.append((event.name, event.event))

            listening = asyncio.create_task(listen())
            await until(lambda: ("watcher", "attached") in events, "who is there")
            async with Bus.connect("visitor", endpoint=broker.endpoint):
                await until(lambda: ("visitor", "attached") in events, "the visitor")
            await until(lambda: ("visitor", "gone") in events, "its end")
            await asyncio.to_thread(broker.stop)
            broker.start()
            events.clear()
            await until(lambda: ("watcher", "attached") in events, "who is there after the restart")
            listening.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await listening

    run(scenario())


# --- windows --------------------------------------------------------------------------------------


def test_send_waits_while_the_window_is_full_and_in_a_handler_not_for_ever(tmp_path: Path) -> None:
    async def scenario(broker: ThreadBroker) -> None:
        outcome: list[BaseException | Receipt] = []
        inbox = Inbox()

        async def handler(message: Message) -> None:
            try:
                outcome.append(await module.send("declared", said("in a handler")))
            except Congested as congested:
                outcome.append(congested)

        async with (
            Bus.connect("module", handler=handler, endpoint=broker.endpoint) as module,
            Bus.connect("sender", endpoint=broker.endpoint) as sender,
        ):
            receipts = [await module.send("declared", said(number)) for number in range(4)]
            with pytest.raises(Congested):
                module.send_nowait("declared", said("at once"))
            waiting = asyncio.create_task(module.send("declared", said("waits")))
            cancelled = asyncio.create_task(module.send("declared", said("cancelled")))
            await (await sender.send("module", said()))
            assert isinstance(outcome[0], Congested)
            assert not waiting.done()
            cancelled.cancel()
            async with Bus.connect("declared", handler=inbox, endpoint=broker.endpoint):
                await (await waiting)
                for receipt in receipts:
                    await receipt
                await (await module.send("declared", said("last")))
            assert inbox.resources == ["0", "1", "2", "3", "waits", "last"]
            with pytest.raises(asyncio.CancelledError):
                await cancelled

    with ThreadBroker(tmp_path, declared={"declared": ()}, limits=SMALL) as broker:
        run(scenario(broker))


@pytest.mark.parametrize("size", [2, 3])
def test_modules_in_a_ring_that_send_and_ask_in_their_handlers_do_not_hang(tmp_path: Path, size: int) -> None:
    """Windows of four, prefetch of one, and every handler sends and asks the next one (rules 27, 31)."""

    async def scenario(broker: ThreadBroker) -> None:
        names = [f"m{index}" for index in range(size)]
        buses: dict[str, Bus] = {}
        ended = congested = 0

        def make(name: str, following: str) -> Callable[[Message], Awaitable[None]]:
            async def handler(message: Message) -> None:
                nonlocal ended, congested
                bus = buses[name]
                depth = message.json()
                if depth:
                    try:
                        await bus.send(following, said(content=depth - 1))
                        reply = await bus.request(following, said(content=0), timeout=5.0)
                        assert reply.text() == "OK"
                    except Congested:
                        congested += 1
                if message.delivery.expects_reply:
                    await bus.respond(message, message.response())
                ended += 1

            return handler

        async with contextlib.AsyncExitStack() as stack:
            for index, name in enumerate(names):
                handler = make(name, names[(index + 1) % size])
                buses[name] = await stack.enter_async_context(
                    Bus.connect(name, handler=handler, prefetch_messages=1, endpoint=broker.endpoint)
                )
            sends = [
                asyncio.create_task(buses[name].send(names[(index + 1) % size], said(content=3)))
                for index, name in enumerate(names)
                for _ in range(8)
            ]
            for receipt in await asyncio.gather(*sends):
                await receipt
            await until(lambda: not any(lane.messages for bus in buses.values() for lane in bus._lanes.values()))
            assert ended >= 8 * size

    with ThreadBroker(tmp_path, limits=SMALL) as broker:
        run(scenario(broker))


def test_the_byte_budget_pushes_back_and_nothing_is_lost(tmp_path: Path) -> None:
    async def scenario(broker: ThreadBroker) -> None:
        inbox, other = Inbox(), Inbox()
        async with (
            Bus.connect("other", handler=other, endpoint=broker.endpoint),
            Bus.connect("one", endpoint=broker.endpoint) as one,
            Bus.connect("two", endpoint=broker.endpoint) as two,
        ):
            receipts = [
                await sender.send("declared", said(f"{sender.name}/{number}", b"x" * 1000))
                for number in range(300)
                for sender in (one, two)
            ]
            for number in range(300):  # one mailbox fills the budget, another one is served all the same
                await (await one.send("other", said(number, b"x" * 1000)))
            assert len(other.messages) == 300
            assert broker.held()["bytes_held"] <= 200_000
            async with Bus.connect("declared", handler=inbox, endpoint=broker.endpoint):
                for receipt in receipts:
                    await receipt
            for name in ("one", "two"):
                assert [r for r in inbox.resources if r.startswith(name)] == [f"{name}/{n}" for n in range(300)]
            assert broker.held()["bytes_held"] == 0

    small = emp.Limits(batch_messages=32, batch_bytes=8192)  # the budget is kept to a batch
    with ThreadBroker(
        tmp_path, declared={"declared": ()}, limits=small, byte_budget=200_000, reserve_bytes=10_000
    ) as broker:
        run(scenario(broker))


# --- names, restarts, drain -----------------------------------------------------------------------


def test_a_name_that_is_taken_is_told_after_one_liveness_period(broker: ThreadBroker) -> None:
    async def scenario() -> None:
        async with Bus.connect("name", endpoint=broker.endpoint):
            with pytest.raises(NameTaken, match="is held by pid"):
                async with Bus.connect("name", liveness=0.3, endpoint=broker.endpoint):
                    pass

    run(scenario())


def test_a_name_that_policy_denies_is_told_at_once(tmp_path: Path) -> None:
    async def scenario(broker: ThreadBroker) -> None:
        with pytest.raises(HelloRefused, match="not here"):
            async with Bus.connect("unwanted", endpoint=broker.endpoint):
                pass

    with ThreadBroker(tmp_path, access=Denying()) as broker:
        run(scenario(broker))


def test_who_is_replaced_is_fenced(tmp_path: Path) -> None:
    async def scenario(broker: ThreadBroker) -> None:
        with RawDealer(broker.endpoint) as silent:
            silent.put(emp.HELLO, emp.Hello("name", [], b"z" * 16, 0, 100, "raw"))
            first: emp.Welcome = await asyncio.to_thread(silent.get, emp.WELCOME)
            async with Bus.connect("name", endpoint=broker.endpoint) as bus:
                assert bus.generation > first.generation
                silent.put(emp.HELLO, emp.Hello("name", [], b"z" * 16, first.generation, 100, "raw"))
                fenced = await asyncio.to_thread(silent.get, emp.FENCED)
                assert fenced.generation == bus.generation
                bus._core.receive(emp.encode(emp.FENCED, emp.Fenced(bus.generation + 1)), 0.0)
                bus._dispatch()
                with pytest.raises(Fenced):
                    await bus.wait_ended()
                with pytest.raises(Fenced):
                    await bus.send("anybody", said())

    with ThreadBroker(tmp_path) as broker:
        run(scenario(broker))


def test_restarts_of_the_broker_under_load_lose_and_reorder_nothing(broker: ThreadBroker) -> None:
    async def scenario() -> None:
        inbox = Inbox()
        async with (
            Bus.connect("receiver", handler=inbox, endpoint=broker.endpoint),
            Bus.connect("sender", endpoint=broker.endpoint) as sender,
        ):
            receipts: list[Receipt] = []

            async def load() -> None:
                for number in range(6000):
                    receipts.append(await sender.send("receiver", said(number)))
                    if number % 50 == 0:
                        await asyncio.sleep(0.002)  # spread over the restarts

            loading = asyncio.create_task(load())
            for restart in range(1, 4):
                await until(lambda restart=restart: len(receipts) > restart * 1000, "load")
                await asyncio.to_thread(broker.stop)
                broker.start()
            await loading
            for receipt in receipts:
                await receipt
            assert inbox.resources == [str(number) for number in range(6000)]

    run(scenario())


def test_a_broker_that_comes_later_is_found(tmp_path: Path) -> None:
    async def scenario(broker: ThreadBroker) -> None:
        inbox = Inbox()
        bus = Bus("receiver", handler=inbox, endpoint=broker.endpoint)
        bus.open()
        receipt = await bus.send("receiver", said("to myself"))
        assert not bus.is_attached
        broker.start()
        await receipt
        assert inbox.resources == ["to myself"]
        await bus.aclose()

    broker = ThreadBroker(tmp_path)
    try:
        run(scenario(broker))
    finally:
        broker.stop()


def test_a_drain_ends_what_runs_and_leaves_the_rest_to_the_successor(broker: ThreadBroker) -> None:
    async def scenario() -> None:
        begun: list[str] = []
        release = asyncio.Event()

        async def handler(message: Message) -> None:
            begun.append(message.resource)
            await release.wait()
            await (await old.send("sender", said("from a draining module")))

        old = Bus("declared", handler=handler, endpoint=broker.endpoint)
        old.open()
        replies = Inbox()
        async with Bus.connect("sender", handler=replies, endpoint=broker.endpoint) as sender:
            receipts = [await sender.send("declared", said(number)) for number in range(3)]
            await until(lambda: begun, "the first message")
            draining = asyncio.create_task(old.drain(5.0))
            await asyncio.sleep(0)
            release.set()
            await draining
            await old.aclose(leaving=False)
            await receipts[0]
            assert (begun, replies.resources) == (["0"], ["from a draining module"])
            assert not receipts[1].settled
            inbox = Inbox()
            async with Bus.connect("declared", handler=inbox, endpoint=broker.endpoint):
                for receipt in receipts:
                    await receipt
            assert inbox.resources == ["1", "2"]

    run(scenario())


def test_a_drain_does_not_wait_for_a_receiver_that_is_away_and_the_message_is_not_lost(broker: ThreadBroker) -> None:
    async def scenario() -> None:
        async with Bus.connect("declared", endpoint=broker.endpoint):
            pass  # away from now on
        sender = Bus("sender", endpoint=broker.endpoint)
        sender.open()
        await sender.wait_attached()
        receipt = await sender.send("declared", said("for later"))
        await sender.drain(3600.0)  # far beyond the time that a test has
        assert not receipt.settled
        await sender.aclose(leaving=False)
        inbox = Inbox()
        async with Bus.connect("declared", handler=inbox, endpoint=broker.endpoint):
            await until(lambda: inbox.resources == ["for later"], "the message")

    run(scenario())


def test_who_waits_for_a_receipt_or_a_reply_hears_that_the_bus_has_ended(broker: ThreadBroker) -> None:
    async def scenario() -> None:
        async def handler(message: Message) -> None:
            message.defer()

        async with Bus.connect("receiver", handler=handler, groups={"g"}, endpoint=broker.endpoint):
            async with Bus.connect("sender", endpoint=broker.endpoint) as sender:
                receipt = await sender.send("receiver", said())
                other = await sender.send("declared", said())
                waiting = [
                    asyncio.ensure_future(receipt),
                    asyncio.ensure_future(sender.request("receiver", said(), timeout=3600.0)),
                    asyncio.ensure_future(sender.request_group(Group("g"), said(), timeout=3600.0)),
                ]
                await until(lambda: broker.status("receiver").get("in_flight") == 3, "all to be delivered")
            for each in waiting:
                with pytest.raises(NotHandled, match="closed"):
                    await each
            with pytest.raises(NotHandled, match="closed"):
                await other
            with pytest.raises(UsageError):
                await sender.send("receiver", said())

    run(scenario())


def test_a_callback_that_raises_stops_nobody_elses_settlement(broker: ThreadBroker) -> None:
    async def scenario() -> None:
        inbox = Inbox()
        async with (
            Bus.connect("receiver", handler=inbox, endpoint=broker.endpoint),
            Bus.connect("sender", endpoint=broker.endpoint) as sender,
        ):

            def explode(_: Receipt) -> None:
                raise ValueError("on purpose")

            receipts = [await sender.send("receiver", said(number)) for number in range(3)]
            receipts[0].add_done_callback(explode)
            for receipt in receipts:
                await receipt

    run(scenario())
