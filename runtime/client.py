"""The bus as a module sees it: `Bus` on asyncio, over one DEALER. The rules are in `client_core`.

    async with Bus.connect("sampler") as bus:
        receipt = await bus.send(Group("hub"), Message.upload("default/sensor/1", {"celsius": 21.5}))
        await receipt  # returns once edgehub has made it safe; raises Refused otherwise

Messages that come while the loop is busy go out together in one frame; a lone message leaves as soon as
the loop is idle.
"""

from __future__ import annotations

import runtime.libraries

# isort: split

import asyncio
import contextlib
import logging
import os
import sys
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple

import msgpack
import msgspec
import zmq
from zmq.utils.monitor import parse_monitor_message

import runtime
from runtime import emp
from runtime.client_core import (
    AdminAnswer,
    Arrival,
    Attached,
    ClientCore,
    Complaint,
    Detached,
    Ended,
    InLane,
    Members,
    OutBatch,
    OutLane,
    Replied,
    Room,
    Woken,
)
from runtime.emp import Priority
from runtime.errors import (
    ConfigError,
    Congested,
    Fenced,
    InvalidMessage,
    MessageTooLarge,
    NotHandled,
    Refused,
    RequestTimeout,
    UsageError,
)
from runtime.home import CURVE_KEY_VARIABLE, CURVE_SERVER_VARIABLE, bus_endpoint, find_home
from runtime.message import Deferral, Delivery, Message, current_handling, encode_message, new_id
from runtime.names import Group, check_destination, check_name, is_group
from runtime.sockets import is_readable, receive, send

log = logging.getLogger("runtime.client")

Handler = Callable[[Message], Awaitable[None]]

HANDLER_WAIT_SECONDS: Final = 5.0
"How long a send inside a handler waits for room: two modules that send to each other must not hang (rule 31)."
RETRY_DELAYS_SECONDS: Final = (0.1, 0.5)
"A handler that raises is tried again after these, then its message is refused as `failed` (rule 17)."
READ_AT_ONCE: Final = 32
"Frames read before the loop gets its turn."
ACK_AT_ONCE: Final = 32
"After a batch of so many messages its ACK is not left to the next turn of the loop."
MAX_REQUESTERS: Final = 65536
LINGER_MS: Final = 1000
DRAIN_QUIET_SECONDS: Final = 1.0
"A drain does not wait longer than this for a settlement when none comes: the broker has the messages."
PRESENCE_RENEW_SECONDS: Final = 4.0
"The broker ends a stream that was not renewed for 10 s (docs/emp.md, ADMIN)."
LAZY_ACK_SECONDS: Final = 0.01
"Requests and replies are settled for the books only, nobody waits for it: their ACKs are collected for so long."

_DATA: Final = Priority.DATA
_REPLY: Final = int(Priority.REPLY)
_REQUEST: Final = int(Priority.REQUEST)


def close_context() -> None:
    """At the end of a process: wait until the last frames (BYE) are out, LINGER_MS at the most.

    pyzmq leaves its context to the interpreter's exit, which does not wait for sockets that linger.
    """
    zmq.Context.instance().destroy(linger=LINGER_MS)


class Receipt(msgspec.Struct, eq=False):
    """What became of one message; await it, or look.

    `await receipt` returns None once the receiver (of a group: every member) has handled the message, and
    raises Refused otherwise; NotHandled or Fenced when the bus has ended before it was settled.
    """

    # A Struct for its constructor in C: one is made for each message.
    _batch: OutBatch
    _number: int

    @property
    def settled(self) -> bool:
        return self._batch.settled >= self._number

    @property
    def refusal(self) -> str | None:
        """The reason, when it is settled as refused; None when it is delivered or open."""
        refusals = self._batch.refusals
        if refusals is None or self._batch.settled < self._number:
            return None
        why = refusals.get(self._number)
        return why[0][0] if why else None

    @property
    def refusals(self) -> list[tuple[str, str | None]]:
        """Every refusal: (reason, group member or None)."""
        refusals = self._batch.refusals
        return list(refusals.get(self._number, ())) if refusals is not None and self.settled else []

    def __await__(self) -> Generator[Any, None, None]:
        batch = self._batch
        if batch.settled < self._number:
            if batch.abandoned is not None:
                raise batch.abandoned
            future = asyncio.get_running_loop().create_future()
            if batch.waiters is None:
                batch.waiters = []
            batch.waiters.append((self._number, future))
            yield from future
        if batch.refusals is not None:
            why = batch.refusals.get(self._number)
            if why:
                raise Refused(*why[0])

    def add_done_callback(self, callback: Callable[[Receipt], object]) -> None:
        """Call `callback(receipt)` in the loop once it is settled; at the next turn if it is already."""
        batch = self._batch
        if batch.settled >= self._number:
            asyncio.get_running_loop().call_soon(callback, self)
            return
        if batch.waiters is None:
            batch.waiters = []
        batch.waiters.append((self._number, (callback, self)))


class GroupReplies(NamedTuple):
    """What `request_group` returns."""

    replies: dict[str, Message]
    "By member."
    missing: dict[str, str]
    "Members that did not answer, with the reason: a refusal's, or `timeout`."


class Presence(NamedTuple):
    """A module came or went."""

    name: str
    event: str
    "attached, back, silent, gone or fenced; at first one `attached` for each that is there."
    pid: int


class _GroupRequest:
    """Who waits for the replies of a group."""

    __slots__ = ("done", "members", "refused", "replies")

    def __init__(self, done: asyncio.Future[None]) -> None:
        self.done = done
        self.members: list[str] | None = None
        self.replies: dict[str, Message] = {}
        self.refused: dict[str, str] = {}

    def look(self) -> None:
        if self.members is None or self.done.done():
            return
        if all(member in self.replies or member in self.refused for member in self.members):
            self.done.set_result(None)


class _Handling:
    """One running handler: what `message.delivery` and `message.defer` look at."""

    __slots__ = ("bus", "deferred", "delivery", "header", "lane", "message", "number", "started", "task", "timed_out")

    def __init__(self, bus: Bus, lane: InLane, header: emp.Deliver) -> None:
        self.bus = bus
        self.lane = lane
        self.header = header
        self.delivery: Delivery | None = None  # of `header`, once it was asked for
        self.message: Message | None = None
        self.number = 0
        self.deferred = False
        self.started = 0.0
        self.task: asyncio.Task[None] | None = None
        self.timed_out = False

    def _check(self, message: Message) -> None:
        if message is not self.message:
            raise UsageError(
                "delivery and defer() belong to the message that is being handled, before handle() returns"
            )

    def delivery_of(self, message: Message) -> Delivery:
        self._check(message)
        if self.delivery is None:
            self.delivery = _delivery(self.header)
        return self.delivery

    def defer(self, message: Message) -> Deferral:
        self._check(message)
        self.deferred = True
        return _Deferral(self.bus, self.lane, self.number, self.header)


class _Deferral:
    """Settles one message later."""

    __slots__ = ("_bus", "_header", "_lane", "_number")

    def __init__(self, bus: Bus, lane: InLane, number: int, header: emp.Deliver) -> None:
        self._bus = bus
        self._lane = lane
        self._number = number
        self._header = header

    @property
    def delivery(self) -> Delivery:
        return _delivery(self._header)

    def done(self) -> None:
        self._bus._core.finish(self._lane, self._number)
        self._bus._flush_soon()

    def refuse(self, reason: str) -> None:
        self._bus._core.finish(self._lane, self._number, reason)
        self._bus._flush_soon()


def _delivery(header: emp.Deliver) -> Delivery:
    return Delivery(
        header.sender,
        header.destination,
        header.priority,
        bool(header.flags & emp.REDELIVERED),
        bool(header.flags & emp.FROM_STORE),
        bool(header.flags & emp.EXPECTS_REPLY),
        header.ttl_ms,
    )


class _Worker(_Handling):
    """Handles one lane's messages one after another."""

    __slots__ = ("queue",)

    def __init__(self, bus: Bus, lane: InLane, header: emp.Deliver) -> None:
        super().__init__(bus, lane, header)
        self.queue: deque[Arrival] = deque()


class Bus:
    """One module's place on the bus. Make it inside a running loop; `open` and `aclose`, or `async with`.

    `handler` is called for each message that arrives: one after another within a lane (sender, destination,
    priority), lanes side by side, requests each in a task of their own. Returning acknowledges; raising is
    tried again twice, then refused as `failed`; raising Refused(reason) refuses at once. A handler that takes
    longer than `handler_timeout` seconds is cancelled, which counts as raising. A handler that blocks the
    loop stops PINGs: after `liveness` seconds the broker takes the module for hung.
    """

    def __init__(
        self,
        name: str,
        *,
        handler: Handler | None = None,
        groups: Iterable[str] = (),
        endpoint: str | None = None,
        liveness: float = 15.0,
        handler_timeout: float | None = 60.0,
        prefetch_messages: int = 2048,
        prefetch_bytes: int = 8 * 2**20,
        counters: Callable[[], Mapping[str, int]] | None = None,
    ) -> None:
        self.name = check_name(name)
        self._loop = asyncio.get_running_loop()
        self._handler = handler
        self._endpoint = endpoint or bus_endpoint(find_home(), "")
        self._handler_timeout = handler_timeout
        self._counters = counters
        self._core = ClientCore(
            name,
            incarnation=os.urandom(emp.INCARNATION_BYTES),
            groups=tuple(check_name(group) for group in groups),
            liveness_seconds=liveness,
            sdk=f"edgezmq-python/{runtime.__version__}",
            prefetch_messages=prefetch_messages,
            prefetch_bytes=prefetch_bytes,
            pid=os.getpid(),
        )
        self._lanes = self._core.lanes
        self._socket: zmq.Socket[bytes] | None = None
        self._monitor: zmq.Socket[bytes] | None = None
        self._fd = -1
        self._monitor_fd = -1
        self._flushing = False
        self._reading = False
        self._timer: asyncio.TimerHandle | None = None
        self._lazy: asyncio.TimerHandle | None = None
        self._due = 0.0  # when the timer goes off
        self._attached = asyncio.Event()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._fresh: asyncio.Future[None] | None = None
        self._running: set[_Handling] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._requesters: dict[str, tuple[str, bytes]] = {}
        self._streams: dict[int, asyncio.Queue[dict[str, Any] | None]] = {}
        self._stream_number = 0
        self._draining = False
        self._group_waits: dict[tuple[str, int], dict[int, _GroupRequest]] = {}
        self.late = False
        "Whether the last attachment came too late to be sure of all group messages (rule 24)."

    @classmethod
    def connect(
        cls, name: str, *, handler: Handler | None = None, groups: Iterable[str] = (), **options: Any
    ) -> _Connecting:
        """`async with Bus.connect(name, handler=…) as bus:` attached at entry, gone at exit. Options as of Bus."""
        return _Connecting(name, handler, groups, options)

    # --- life --------------------------------------------------------------------------------------

    def open(self) -> None:
        """Begin to connect. Returns at once; `wait_attached` waits. Reconnects by itself, for ever."""
        context: zmq.Context[Any] = zmq.Context.instance()
        socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, LINGER_MS)
        # The windows bound what is queued; a high-water mark would only add a second, silent one.
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.RCVHWM, 0)
        # Without a connection a send fails at once, instead of waiting in a queue for a broker that may be another.
        socket.setsockopt(zmq.IMMEDIATE, 1)
        socket.setsockopt(zmq.RECONNECT_IVL, 20)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 500)
        if self._endpoint.startswith("tcp://"):
            try:
                self._secure(socket)
            except BaseException:
                socket.close()
                raise
        self._socket = socket
        self._monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        self._fd = int(socket.getsockopt(zmq.FD))
        self._monitor_fd = int(self._monitor.getsockopt(zmq.FD))
        self._loop.add_reader(self._fd, self._read)
        self._loop.add_reader(self._monitor_fd, self._read_monitor)
        socket.connect(self._endpoint)
        self._read_monitor()

    def _secure(self, socket: zmq.Socket[bytes]) -> None:
        """CURVE, where the environment names our secret key's file and the broker's public key."""
        secret_file, server = os.environ.get(CURVE_KEY_VARIABLE), os.environ.get(CURVE_SERVER_VARIABLE)
        if not secret_file and not server:
            return
        from runtime import keys

        if not secret_file or not server:
            missing = CURVE_SERVER_VARIABLE if secret_file else CURVE_KEY_VARIABLE
            raise ConfigError(missing, "", "both variables for the bus over tcp, or neither")
        pair = keys.load(Path(secret_file))
        socket.setsockopt_string(zmq.CURVE_PUBLICKEY, pair.public)
        socket.setsockopt_string(zmq.CURVE_SECRETKEY, pair.secret)
        try:
            socket.setsockopt_string(zmq.CURVE_SERVERKEY, server)
        except zmq.ZMQError as fault:
            raise ConfigError(CURVE_SERVER_VARIABLE, server, "a CURVE public key: 40 characters of Z85") from fault

    @property
    def is_attached(self) -> bool:
        return self._attached.is_set()

    @property
    def generation(self) -> int:
        return self._core.generation

    @property
    def incarnation(self) -> bytes:
        return self._core.incarnation

    @property
    def limits(self) -> emp.Limits:
        """What the broker allows; the defaults before the first attachment."""
        return self._core.limits

    async def wait_attached(self) -> None:
        """Until the broker has let us in. Raises NameTaken, HelloRefused or Fenced when it does not."""
        attached = asyncio.ensure_future(self._attached.wait())
        either: set[asyncio.Future[Any]] = {attached, self._ended}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            attached.cancel()
        if self._ended.done():
            self._ended.result()

    async def wait_ended(self) -> None:
        """Until this bus is of no more use. Raises Fenced, NameTaken or HelloRefused; returns after `aclose`."""
        await asyncio.shield(self._ended)

    async def drain(self, timeout: float) -> None:
        """Finish what is in hand, for `timeout` seconds: running handlers and sends may end, none begins.

        What nobody settles for DRAIN_QUIET_SECONDS is not waited for: the broker has it, and whoever should handle it
        is away. A node that ends as a whole would wait so for each other's receivers.
        """
        self._draining = True
        end = self._loop.time() + timeout
        self._core.drain(timeout)
        self._flush()
        goals: dict[OutLane, int] = {}
        left, quiet_at = -1, end
        while (now := self._loop.time()) < end:
            if self._running or not goals:  # what tasks of the module's own send later is not waited for
                goals = {lane: lane.next for lane in self._lanes.values()}
            before, left = left, sum(_unsettled(lane, goal) for lane, goal in goals.items())
            if left != before or not self._attached.is_set():
                quiet_at = now + DRAIN_QUIET_SECONDS
            if not self._running and (not left or now >= quiet_at):
                return
            await asyncio.sleep(0.01)  # between two looks; ends with the deadline

    async def aclose(self, *, leaving: bool = True) -> None:
        """Say BYE and close. `leaving`: forget me, my mailbox too; False keeps it for the next start. Idempotent."""
        socket, self._socket = self._socket, None
        if socket is None:
            return
        self._draining = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self._core.bye(leaving=leaving, now=self._loop.time())
        self._transmit(socket)
        for timer in (self._timer, self._lazy):
            if timer is not None:
                timer.cancel()
        self._loop.remove_reader(self._fd)
        self._loop.remove_reader(self._monitor_fd)
        if self._monitor is not None:
            socket.disable_monitor()
            self._monitor.close(linger=0)
            self._monitor = None
        socket.close()
        self._attached.clear()
        if not self._ended.done():
            self._ended.set_result(None)
        self._abandon(NotHandled("the bus was closed before the message was settled"))

    # --- sending -----------------------------------------------------------------------------------

    async def send(
        self, to: str | Group, message: Message, *, priority: Priority = _DATA, ttl: float | None = None
    ) -> Receipt:
        """Give `message` to the bus, for a module's name or a Group; returns its receipt.

        Waits while the lane's window is full; inside a handler at most HANDLER_WAIT_SECONDS, then raises
        Congested. `ttl`: seconds after which a message that still waits in a mailbox is refused as
        `expired`. Raises MessageTooLarge, InvalidName, Fenced. A cancelled send was not sent.
        """
        lane = self._lanes.get((to, priority))
        if lane is None:
            lane = self._new_lane(to, priority)
        data = encode_message(message if message.id else _with_id(message))
        core = self._core
        limits = core.limits
        size = len(data)
        if lane.waiters or lane.messages >= limits.window_messages or lane.size + size > limits.window_bytes:
            if size > limits.message_bytes:
                raise MessageTooLarge(size, limits.message_bytes)
            await self._wait_room(lane, size)
        elif size > limits.message_bytes:
            raise MessageTooLarge(size, limits.message_bytes)
        batch = core.put(lane, data) if ttl is None else core.put_with(lane, data, 0, self._loop.time() + ttl, None)
        if lane.open is None:
            self._flush_lane(lane)
        elif not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)
        return Receipt(batch, lane.next - 1)

    def send_nowait(
        self, to: str | Group, message: Message, *, priority: Priority = _DATA, ttl: float | None = None
    ) -> Receipt:
        """`send` that raises Congested instead of waiting for room."""
        lane = self._lanes.get((to, priority)) or self._new_lane(to, priority)
        data = self._encode(message)
        if lane.waiters or not self._core.has_room(lane, len(data)):
            raise Congested(f"the window to {to} is full: {lane.messages} messages, {lane.size} bytes unsettled")
        batch = self._core.put_with(lane, data, 0, None if ttl is None else self._loop.time() + ttl, None)
        receipt = Receipt(batch, lane.next - 1)
        if lane.open is None:
            self._flush_lane(lane)
        else:
            self._flush_soon()
        return receipt

    async def request(
        self, to: str | Group, message: Message, *, timeout: float, priority: Priority = Priority.REQUEST
    ) -> Message:
        """Send and wait for the reply, at most `timeout` seconds; from a group, the first reply.

        Raises RequestTimeout, Refused, MessageTooLarge. The reply may carry operation `error`.
        """
        message = message if message.id else _with_id(message)
        data = self._encode(message)
        loop = self._loop
        future: asyncio.Future[Message] = loop.create_future()
        deadline = loop.time() + timeout
        timer = loop.call_later(timeout, _time_out, future, to, timeout)
        of = "" if is_group(to) else to
        self._core.expect(message.id, future, of)  # before it is sent: the reply may be fast
        try:
            lane = self._lanes.get((to, priority)) or self._new_lane(to, priority)
            if lane.waiters or not self._core.has_room(lane, len(data)):
                async with asyncio.timeout_at(deadline):
                    await self._wait_room(lane, len(data))
            batch = self._core.put_with(lane, data, emp.EXPECTS_REPLY, deadline, None)
            lane.open = None
            batch.waiters = [(batch.first, (_refuse_request, (future, batch)))]
            self._flush()
            return await future
        except TimeoutError as late:
            raise RequestTimeout(f"no room towards {to} within {timeout} s") from late
        finally:
            timer.cancel()
            self._core.forget(message.id)

    async def request_group(self, group: Group, message: Message, *, timeout: float) -> GroupReplies:
        """Ask every member of `group` and collect what comes within `timeout` seconds.

        Raises Refused (`unroutable`) when the group has no member, RequestTimeout when the broker did not even take it.
        """
        if not is_group(group):
            raise UsageError(f"{group!r} is no Group")
        message = message if message.id else _with_id(message)
        data = self._encode(message)
        loop = self._loop
        waiter = _GroupRequest(loop.create_future())
        deadline = loop.time() + timeout
        self._core.expect(message.id, waiter)
        lane = self._lanes.get((group, _REQUEST)) or self._new_lane(group, Priority.REQUEST)
        waits = self._group_waits.setdefault((group, _REQUEST), {})
        number = 0
        try:
            async with asyncio.timeout_at(deadline):
                if lane.waiters or not self._core.has_room(lane, len(data)):
                    await self._wait_room(lane, len(data))
                batch = self._core.put_with(lane, data, emp.EXPECTS_REPLY, deadline, None)
                lane.open = None
                number = batch.first
                waits[number] = waiter
                batch.waiters = [(number, (_refuse_group_request, (waiter, batch)))]
                self._flush()
                await waiter.done
        except TimeoutError:
            if waiter.members is None:
                raise RequestTimeout(f"no answer of the broker for {group} within {timeout} s") from None
        finally:
            waits.pop(number, None)
            self._core.forget(message.id)
        members = waiter.members or []
        replies = {sender: reply for sender, reply in waiter.replies.items() if sender in members}
        missing = {member: waiter.refused.get(member, "timeout") for member in members if member not in waiter.replies}
        return GroupReplies(replies, missing)

    async def respond(self, request: Message, reply: Message) -> Receipt:
        """Answer `request`, whose handler may have returned already (deferred); once.

        Replies need no room. The receipt is refused as `gone` when the requester is no more.
        Raises UsageError when `request` asked for no reply or has been answered.
        """
        requester = self._requesters.pop(request.id, None)
        if requester is None:
            raise UsageError(f"message {request.id} waits for no reply of ours")
        sender, incarnation = requester
        if reply.parent_id != request.id:
            reply = msgspec.structs.replace(reply, parent_id=request.id)
        data = self._encode(reply)
        lane = self._lanes.get((sender, _REPLY)) or self._new_lane(sender, Priority.REPLY)
        batch = self._core.put_with(lane, data, emp.REPLY, None, incarnation)
        receipt = Receipt(batch, lane.next - 1)
        if len(self._running) > 1:
            self._flush_soon()
        else:
            self._flush()  # nobody else is at work whose messages could go along
        return receipt

    def expects_reply(self, request: Message) -> bool:
        """Whether somebody waits for our answer to `request`, and it has not been given."""
        return request.id in self._requesters

    async def retain(
        self, group: Group, key: str, message: Message, *, priority: Priority = Priority.SIGNAL
    ) -> Receipt:
        """Send to a group and keep it there under `key`: members get the last version, also those that come later
        and after the broker restarted. One module's keys are its own. Waits for room as `send` does."""
        if not is_group(group):
            raise UsageError(f"{group!r} is no Group")
        data = self._encode(message)
        lane = self._lanes.get((group, priority)) or self._new_lane(group, priority)
        if lane.waiters or not self._core.has_room(lane, len(data)):
            await self._wait_room(lane, len(data))
        lane, batch = self._core.put_retained(str(group), int(priority), key, data)
        self._flush_soon()
        return Receipt(batch, lane.next - 1)

    async def presence(self) -> AsyncIterator[Presence]:
        """Who is there, then who comes and goes. Ends never; events of a time without broker are not seen."""
        while True:
            await self.wait_attached()
            self._stream_number += 1
            number = self._stream_number
            queue = self._streams[number] = asyncio.Queue(10_000)
            try:
                while self.is_attached:
                    self._admin(number, "presence")
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(PRESENCE_RENEW_SECONDS):
                            while (answer := await queue.get()) is not None:
                                for module in answer.get("modules", ()):
                                    if module["state"] in ("attached", "draining"):
                                        yield Presence(module["name"], "attached", module["pid"])
                                if "event" in answer:
                                    yield Presence(answer["name"], answer["event"], answer["pid"])
            finally:
                self._streams.pop(number, None)

    def _renew_streams(self) -> None:
        """Another broker knows nothing of them."""
        for queue in self._streams.values():
            with contextlib.suppress(asyncio.QueueFull):
                queue.put_nowait(None)

    def _admin(self, number: int, op: str) -> None:
        self._core.out.append(emp.encode(emp.ADMIN, emp.Admin(number, op), msgpack.packb({})))
        self._flush_soon()

    def _new_lane(self, to: str, priority: int) -> OutLane:
        check_destination(to)
        if self._ended.done():
            self._ended.result()
            raise UsageError("the bus is closed")
        return self._core.lane(str(to), int(priority))

    def _encode(self, message: Message) -> bytes:
        data = encode_message(message if message.id else _with_id(message))
        if len(data) > self._core.limits.message_bytes:
            raise MessageTooLarge(len(data), self._core.limits.message_bytes)
        return data

    async def _wait_room(self, lane: OutLane, size: int) -> None:
        """Until the window admits `size` bytes, in the order of asking."""
        core = self._core
        if not lane.waiters and core.has_room(lane, size):
            return
        self._flush()
        end = self._loop.time() + HANDLER_WAIT_SECONDS if current_handling.get() is not None else None
        first = True
        while True:
            if self._ended.done():
                self._ended.result()
                raise UsageError("the bus is closed")
            if core.has_room(lane, size) and (not first or not lane.waiters):
                # Another one may still fit behind us.
                if lane.waiters:
                    self._loop.call_soon(self._make_room, lane)
                return
            future = self._loop.create_future()
            if first:
                lane.waiters.append(future)
            else:
                lane.waiters.appendleft(future)
            first = False
            try:
                async with asyncio.timeout_at(end):
                    await future
            except TimeoutError:
                raise Congested(
                    f"no room towards {lane.destination} for {HANDLER_WAIT_SECONDS} s: "
                    f"{lane.messages} messages, {lane.size} bytes unsettled"
                ) from None
            finally:
                with contextlib.suppress(ValueError):
                    lane.waiters.remove(future)
                if future.done() and sys.exc_info()[0] is not None:
                    self._make_room(lane)  # our turn came but we leave: the next one's

    def _make_room(self, lane: OutLane) -> None:
        while lane.waiters:
            future = lane.waiters[0]
            if future.done():
                lane.waiters.popleft()
                continue
            if self._core.has_room(lane, 1):
                lane.waiters.popleft()
                future.set_result(None)
            return

    # --- reading, writing, time -----------------------------------------------------------------------

    def _flush_soon(self) -> None:
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        """Send what is ready: batches, then ACKs."""
        self._flushing = False
        socket = self._socket
        if socket is None:
            return
        core = self._core
        core.flush(self._loop.time())
        if core.out:
            self._transmit(socket)
            # Sending may have taken the edge off the descriptor: what has come meanwhile would not wake us.
            if not self._reading and is_readable(socket):
                self._reading = True
                self._loop.call_soon(self._read)

    def _flush_lazy(self) -> None:
        self._lazy = None
        self._core.flush_lazy()
        self._flush()

    def _flush_lane(self, lane: OutLane) -> None:
        socket = self._socket
        if socket is None:
            return
        core = self._core
        core.flush_lane(lane, self._loop.time())
        if core.out:
            self._transmit(socket)
            if not self._reading and is_readable(socket):
                self._reading = True
                self._loop.call_soon(self._read)

    def _transmit(self, socket: zmq.Socket[bytes]) -> None:
        core = self._core
        out, core.out = core.out, []
        for frames in out:
            try:
                send(socket, frames)
            except zmq.Again:
                # No connection: what matters is sent again after the next WELCOME.
                core.disconnected(self._loop.time())
                self._dispatch()
                return

    def _read(self) -> None:
        """Take what has come, let the core decide, do what it says."""
        self._reading = False
        socket = self._socket
        if socket is None:
            return
        core = self._core
        now = self._loop.time()
        for _ in range(READ_AT_ONCE):
            if not is_readable(socket):
                break
            core.receive(receive(socket), now)
        else:
            self._reading = True
            self._loop.call_soon(self._read)
        if core.events:
            self._dispatch()
        if self._fresh is not None and core.is_fresh(now) and not self._fresh.done():
            self._fresh.set_result(None)
        if core.out or core.has_acks:
            self._flush_soon()
        elif core.has_lazy_acks and self._lazy is None:
            self._lazy = self._loop.call_later(LAZY_ACK_SECONDS, self._flush_lazy)

    def _read_monitor(self) -> None:
        if self._monitor is None:
            return
        while int(self._monitor.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            event = parse_monitor_message(self._monitor.recv_multipart(zmq.NOBLOCK))["event"]
            now = self._loop.time()
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._core.connected(now)
            elif event == zmq.EVENT_DISCONNECTED:
                self._core.disconnected(now)
        self._dispatch()
        self._flush()
        self._arm()

    def _arm(self) -> None:
        """One timer, for the core's next deadline and the handlers' time limit."""
        if self._timer is not None:
            self._timer.cancel()
        now = self._loop.time()
        due = self._core.next_deadline(now)
        if self._running and self._handler_timeout is not None:
            due = min(due, now + self._handler_timeout / 4)
        self._due = due
        self._timer = self._loop.call_at(max(due, now + 0.001), self._tick)

    def _tick(self) -> None:
        now = self._loop.time()
        if self._counters is not None:
            self._core.counters = self._counters()
        self._core.expire(now)
        if self._handler_timeout is not None:
            for handling in list(self._running):
                if handling.started and now - handling.started > self._handler_timeout and not handling.timed_out:
                    handling.timed_out = True
                    if handling.task is not None:
                        handling.task.cancel()
        self._dispatch()
        self._flush()
        self._arm()

    # --- events ---------------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        core = self._core
        while core.events:
            events, core.events = core.events, []
            for event in events:
                match event:
                    case Arrival():
                        self._arrive(event)
                    case Woken(waiters):
                        for waiter in waiters:
                            _wake(waiter)
                    case Room(lane):
                        self._make_room(lane)
                    case Replied(waiter, reply, sender):
                        if isinstance(waiter, _GroupRequest):
                            waiter.replies[sender] = reply
                            waiter.look()
                        elif not waiter.done():
                            waiter.set_result(reply)
                    case Members(lane, first, _, members):
                        waiter = self._group_waits.get((lane.destination, lane.priority), {}).get(first)
                        if waiter is not None:
                            waiter.members = members
                            waiter.look()
                    case Attached(late, anew):
                        self.late = late
                        self._attached.set()
                        log.info(
                            "attached name=%s generation=%d late=%s new_broker=%s",
                            self.name,
                            self.generation,
                            late,
                            anew,
                        )
                        if anew:
                            self._renew_streams()
                        self._arm()
                    case Detached(why):
                        self._attached.clear()
                        self._renew_streams()
                        log.info("detached name=%s reason=%s", self.name, why)
                        self._arm()
                    case Ended(error, fenced):
                        self._attached.clear()
                        self._end(error or Fenced(f"generation {fenced} of {self.name!r} has taken over"))
                    case AdminAnswer(header, body):
                        self._answer(header, body)
                    case Complaint(code, text):
                        log.warning("protocol code=%s text=%s", code, text)

    def _end(self, error: Exception) -> None:
        if not self._ended.done():
            self._ended.set_exception(error)
            self._ended.exception()  # read: whoever waits gets it, and nobody has to
        self._abandon(error)

    def _abandon(self, error: Exception) -> None:
        """Nothing will be settled any more: whoever waits hears it, and who sends on."""
        waiters = list(self._core.open_waiters())
        for lane in self._lanes.values():
            for future in lane.waiters:
                if not future.done():
                    future.set_result(None)
            for batch in lane.batches:
                batch.abandoned = error
                waiters.extend(waiter for _, waiter in batch.waiters or ())
                batch.waiters = None
        for waiter in waiters:
            future = waiter.done if isinstance(waiter, _GroupRequest) else waiter
            if isinstance(future, asyncio.Future) and not future.done():
                future.set_exception(error)
                future.exception()  # read: nobody has to
        self._lanes.clear()

    def _answer(self, header: emp.Admin, body: bytes) -> None:
        queue = self._streams.get(header.request)
        if queue is None:
            return
        try:
            answer = msgpack.unpackb(body)
        except (ValueError, msgpack.exceptions.UnpackException):
            return
        if isinstance(answer, dict) and not queue.full():
            queue.put_nowait(answer)

    # --- handling ---------------------------------------------------------------------------------------

    def _arrive(self, arrival: Arrival) -> None:
        if self._handler is None:
            for number in range(arrival.first, arrival.first + len(arrival.messages)):
                self._core.finish(arrival.lane, number, emp.UNROUTABLE)
            return
        header = arrival.header
        if header.flags & emp.EXPECTS_REPLY:
            for number, message in enumerate(arrival.messages, arrival.first):
                if len(self._requesters) >= MAX_REQUESTERS:
                    self._requesters.pop(next(iter(self._requesters)))
                self._requesters[message.id] = (header.sender, header.incarnation)
                handling = _Handling(self, arrival.lane, header)
                handling.number = number
                handling.message = message
                self._start(handling, self._handle_request(handling, message))
            return
        worker: _Worker | None = arrival.lane.work
        if worker is None:
            worker = arrival.lane.work = _Worker(self, arrival.lane, header)
            worker.queue.append(arrival)
            self._start(worker, self._work(worker))
        else:
            worker.queue.append(arrival)

    def _start(self, handling: _Handling, coroutine: Any) -> None:
        task = self._loop.create_task(coroutine)
        handling.task = task
        self._running.add(handling)
        if self._handler_timeout is not None and self._due > self._loop.time() + self._handler_timeout / 2:
            self._arm()
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _work(self, worker: _Worker) -> None:
        """Handle a lane's messages, in order, until none is left."""
        lane = worker.lane
        core = self._core
        handler = self._handler
        assert handler is not None
        clock = self._loop.time
        current_handling.set(worker)
        liveness = core.liveness_seconds
        try:
            while worker.queue:
                arrival = worker.queue.popleft()
                worker.header = arrival.header
                worker.delivery = None
                number = arrival.first
                for message in arrival.messages:
                    now = clock()
                    if now - core.last_ok > liveness:  # rule 21
                        await self._wait_fresh()
                        now = clock()
                    if self._draining:
                        return  # not begun: it goes back to the mailbox
                    worker.message = message
                    worker.number = number
                    worker.deferred = False
                    worker.started = now
                    reason = None
                    try:
                        await handler(message)
                    except (Exception, asyncio.CancelledError) as fault:
                        reason = await self._retry(worker, message, fault)
                    if not worker.deferred or reason is not None:
                        if reason is None and number == lane.done + 1 and not lane.late:
                            lane.done = number
                            if not lane.dirty:
                                lane.dirty = True
                                core.dirty_lanes.append(lane)
                        else:
                            core.finish(lane, number, reason)
                    number += 1
                worker.message = None
                if len(arrival.messages) >= ACK_AT_ONCE:
                    self._flush()
                elif not self._flushing:
                    self._flushing = True
                    self._loop.call_soon(self._flush)
        finally:
            lane.work = None
            self._running.discard(worker)

    async def _handle_request(self, handling: _Handling, message: Message) -> None:
        current_handling.set(handling)
        try:
            now = self._loop.time()
            if not self._core.is_fresh(now):
                await self._wait_fresh()
            if self._draining:
                return
            handling.started = now
            reason = None
            try:
                assert self._handler is not None
                await self._handler(message)
            except (Exception, asyncio.CancelledError) as fault:
                reason = await self._retry(handling, message, fault)
            handling.message = None
            if not handling.deferred or reason is not None:
                if reason is not None:
                    self._requesters.pop(message.id, None)
                self._core.finish(handling.lane, handling.number, reason)
        finally:
            self._running.discard(handling)
            if self._core.has_acks:
                self._flush_soon()
            elif self._core.has_lazy_acks and self._lazy is None:
                self._lazy = self._loop.call_later(LAZY_ACK_SECONDS, self._flush_lazy)

    async def _retry(self, handling: _Handling, message: Message, fault: BaseException) -> str | None:
        """The handler has raised: try again, then give the reason to refuse with. A real cancellation goes on."""
        handler = self._handler
        assert handler is not None
        for delay in (*RETRY_DELAYS_SECONDS, None):
            if isinstance(fault, asyncio.CancelledError):
                if not handling.timed_out:
                    raise fault
                handling.timed_out = False
                assert handling.task is not None
                handling.task.uncancel()
                log.error(
                    "handler took longer than seconds=%s, cancelled message=%s sender=%s",
                    self._handler_timeout,
                    message.id,
                    handling.header.sender,
                )
            elif isinstance(fault, Refused):
                return fault.reason
            else:
                log.error(
                    "handler raised message=%s sender=%s resource=%s again_in_seconds=%s",
                    message.id,
                    handling.header.sender,
                    message.resource[:200],
                    delay,
                    exc_info=fault,
                )
            if delay is None:
                return emp.FAILED
            handling.started = 0.0
            await asyncio.sleep(delay)
            if self._draining:
                raise asyncio.CancelledError
            handling.started = self._loop.time()
            handling.deferred = False
            try:
                await handler(message)
            except (Exception, asyncio.CancelledError) as again:
                fault = again
            else:
                return None
        return emp.FAILED

    async def _wait_fresh(self) -> None:
        """We were stopped, or cut off: work on only after the broker has answered a new PING (rule 21)."""
        while not self._core.is_fresh(self._loop.time()):
            if self._fresh is None or self._fresh.done():
                self._fresh = self._loop.create_future()
            self._core.ask_fresh(self._loop.time())
            self._flush()
            self._arm()
            await asyncio.wait({self._fresh}, timeout=1.0)


class _Connecting:
    """`async with Bus.connect(…)`."""

    def __init__(self, name: str, handler: Handler | None, groups: Iterable[str], options: dict[str, Any]) -> None:
        self._arguments = (name, handler, groups, options)
        self._bus: Bus | None = None

    async def __aenter__(self) -> Bus:
        name, handler, groups, options = self._arguments
        self._bus = bus = Bus(name, handler=handler, groups=groups, **options)
        bus.open()
        try:
            await bus.wait_attached()
        except BaseException:
            await bus.aclose()
            raise
        return bus

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bus is not None:
            await self._bus.aclose()


def _unsettled(lane: OutLane, goal: int) -> int:
    """Messages before number `goal` that a drain should wait for. Not retained ones: the broker has them for later."""
    return sum(
        max(0, min(batch.last + 1, goal) - max(batch.first, batch.settled + 1))
        for batch in lane.batches
        if batch.retain_key is None
    )


def _with_id(message: Message) -> Message:
    return msgspec.structs.replace(message, id=new_id())


def _wake(waiter: Any) -> None:
    """Wake who waits for a settlement: a future, or (callback, argument)."""
    if isinstance(waiter, asyncio.Future):
        if not waiter.done():
            waiter.set_result(None)
        return
    callback, argument = waiter
    try:
        callback(argument)
    except Exception:
        # A user's callback must not stop the settlements of others; it is logged and its message stands as it is.
        log.exception("a receipt's callback raised")


def _time_out(future: asyncio.Future[Message], to: str, timeout: float) -> None:
    if not future.done():
        future.set_exception(RequestTimeout(f"no reply from {to} within {timeout} s"))


def _refuse_request(argument: tuple[asyncio.Future[Message], OutBatch]) -> None:
    """The request is settled: a refusal ends the waiting, `delivered` does not (the reply is on its way)."""
    future, batch = argument
    if batch.refusals and not future.done():
        future.set_exception(Refused(*batch.refusals[batch.first][0]))


def _refuse_group_request(argument: tuple[_GroupRequest, OutBatch]) -> None:
    waiter, batch = argument
    if batch.refusals:
        for reason, member in batch.refusals.get(batch.first, ()):
            if member is None:
                if not waiter.done.done():
                    waiter.done.set_exception(Refused(reason))
                return
            waiter.refused[member] = reason
        waiter.look()


__all__ = [
    "Bus",
    "Congested",
    "Fenced",
    "GroupReplies",
    "InvalidMessage",
    "MessageTooLarge",
    "NotHandled",
    "Presence",
    "Receipt",
    "Refused",
    "RequestTimeout",
]
