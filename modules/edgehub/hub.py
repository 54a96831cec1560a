"""EdgeHub: joins the bus and the link to CloudHub.

Up: what a module sends to group `hub` is checked, deferred, put into the outbox, and settled once CloudHub has
provably taken it over (or, for a request, once the answer came). Down: the message's group decides whose it is;
CloudHub's ACK goes up once that module has handled it. docs/edgehub.md tells the whole story.
"""

from __future__ import annotations

import asyncio
import logging
import random
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from modules.edgehub import cloud
from modules.edgehub.certificate_keeper import CertificateKeeper
from modules.edgehub.coalescing import Coalescing
from modules.edgehub.config import QUIC, EdgeHubConfig, Endpoint
from modules.edgehub.connection import Connection, Settles
from modules.edgehub.dispatch import Received, Seen, destination
from modules.edgehub.governor import Pace, Ramp
from modules.edgehub.lanes import Lanes
from modules.edgehub.link import Link, make_encoder, make_link, probe
from modules.edgehub.outbox import Class, Outbox, OutboxLimits, Poisoned, StoredRow
from modules.edgehub.parking import NOBODY, NOT_THE_OWNER, REFUSED_BY_OWNER, Parking, ParkingLimits
from modules.edgehub.permission import Permission
from modules.edgehub.session import (
    Action,
    Announce,
    AwaitQuiet,
    Dial,
    DialDue,
    Drain,
    Drained,
    Finished,
    Greet,
    Hangup,
    Keepalive,
    LinkSession,
    LinkState,
    MoveWanted,
    Probe,
    Probed,
    Proven,
    Quiet,
    StopWanted,
)
from modules.edgehub.store import Dropped, Row, Store
from modules.edgehub.sync_keeper import Late, Question, SyncKeeper
from modules.edgehub.window import FLOOR_BYTES, TokenBucket
from runtime import memory, policy
from runtime.backoff import Backoff
from runtime.config import load
from runtime.emp import DENIED, EXPIRED, FAILED, GONE, INVALID, OVERFLOW, TOO_LARGE, UNROUTABLE, Priority
from runtime.enrolment import Job, Outcome
from runtime.errors import (
    EdgezmqError,
    InvalidMessage,
    MalformedMessage,
    MessageTooLarge,
    NotHandled,
    Refused,
    UsageError,
)
from runtime.message import OPERATION_ERROR, Deferral, Message, from_cloud_json
from runtime.module import Module
from runtime.names import Group

log = logging.getLogger("modules.edgehub")

LOCAL_GROUP: Final = "edgezmq"
"Message group of questions to edgehub itself; never sent to the cloud."
STATUS_RESOURCE: Final = "edgehub/link"
STATUS_OPERATION: Final = "status"
TOO_LARGE_FOR_LINK: Final = "too-large-for-link"
"Refusal: the message alone would hold the link for more than half the keepalive limit."

COALESCED: Final = "coalesced"
"In the ledger: a later message took its place while the cloud was away."

OUTBOX_FILE: Final = "outbox.db"
_SPILL_TOGETHER_SECONDS: Final = 0.005
_OPEN_AGAIN_SECONDS: Final = 1.0
_STORE_REST_SECONDS: Final = 3.0
_PATIENCE_SECONDS: Final = 10.0
_SETTLE_SECONDS: Final = 2.0
_WARN_SECONDS: Final = 10.0
"A warning of one kind at most so often; the counters have the rest."
_EXCERPT_BYTES: Final = 200
_QUIET_LOOK_SECONDS: Final = 0.05
_QUIET_PATIENCE_SECONDS: Final = 30.0
"For a moment without traffic, before the writer is held back."
_HOLD_SECONDS: Final = 5.0
"For the cloud to confirm what is under way then."


class _Own:
    """The token of edgehub's own messages: nobody waits for them."""

    def done(self) -> None:
        pass

    def refuse(self, reason: str) -> None:
        pass


_OWN: Final = _Own()


class _Both:
    """The token of two messages of which the second took the first one's place."""

    def __init__(self, first: Settles, second: Settles) -> None:
        self._tokens: list[Settles] = [*first._tokens, second] if isinstance(first, _Both) else [first, second]

    def done(self) -> None:
        for token in self._tokens:
            token.done()

    def refuse(self, reason: str) -> None:
        for token in self._tokens:
            token.refuse(reason)


class _Replacement(NamedTuple):
    """A row's new payload, ordered and not committed."""

    kind: Class
    row: int
    sender: str
    payload: bytes
    token: Settles


class _Asked:
    """A module's request on its way up. The pong only tells that the cloud has it; the answer settles it."""

    def __init__(self, request: Message, deferral: Deferral) -> None:
        self.request = request
        self.deferral = deferral
        self.is_confirmed = False

    def done(self) -> None:
        self.is_confirmed = True

    def refuse(self, reason: str) -> None:
        self.deferral.refuse(reason)


class EdgeHub(Module):
    """The module `edgehub`, group `hub`."""

    name = "edgehub"
    groups = {"hub"}
    handler_timeout = None  # a full outbox holds handlers for as long as the cloud is away
    prefetch_messages = 16_384
    prefetch_bytes = 16 * 2**20

    def __init__(
        self,
        config: EdgeHubConfig | None = None,
        *,
        chance: random.Random | None = None,
        factory: Callable[[EdgeHubConfig], Link] = make_link,
        prober: Callable[[EdgeHubConfig, Endpoint], Awaitable[str | None]] = probe,
        enrol: Callable[[Job], Awaitable[Outcome]] | None = None,
    ) -> None:
        """Without `config` it comes from the node's configuration (`start` then raises ConfigError)."""
        self._enrol = enrol
        self._prober = prober
        self._given_config = config
        self._chance = chance or random.Random()
        self._factory = factory
        self._keeper: SyncKeeper[_Asked] = SyncKeeper()
        self._received = Received()
        self._counts: Counter[str] = Counter()
        self._connection: Connection | None = None
        self._greeting_id = ""
        self._dial: Dial | None = None
        self._warned: dict[str, float] = {}
        self._room_waiters: list[asyncio.Future[None]] = []
        self._keeper_timer: asyncio.TimerHandle | None = None
        self._is_settled = False
        self._store: Store | None = None
        self._parking: Parking | None = None
        self._file_mismatch = 0
        self._spill_timer: asyncio.TimerHandle | None = None
        self._stored: asyncio.Event = asyncio.Event()

    # --- life ----------------------------------------------------------------------------------

    async def start(self) -> None:
        """KubeEdge's initial: tell everybody that the cloud is not there yet, begin to dial."""
        config = self._given_config or replace(
            EdgeHubConfig.from_node(self.node), outbox_path=self.home.data / OUTBOX_FILE
        )
        self._factory(config)  # a wrong protocol is an error now, not at the first dial
        self._config = config
        self._encode = make_encoder(config)
        self._loop = asyncio.get_running_loop()
        self._outbox: Outbox[Settles] = Outbox(
            OutboxLimits(config.memory_messages, config.memory_bytes, config.outbox_messages, config.outbox_bytes)
        )
        self._down_since = self._loop.time()
        self._coalescing = Coalescing(config.coalesce)
        self._permission = Permission(dict(config.grants))
        if self._given_config is None:
            self._loop.add_signal_handler(signal.SIGHUP, self._adopt_policy)
            self._adopt_policy()  # one that was written between our reading and the handler would be missed
        self._replacements: dict[int, _Replacement] = {}
        self._replacement_number = 0
        await self._open_store_when_possible()
        self._bucket = TokenBucket(config.message_qps, config.message_burst)
        self._pace = Pace(
            TokenBucket(config.signal_qps, config.signal_burst),
            self._bucket,
            Ramp(self._chance, start_rate=config.ramp_start_rate, seconds=config.ramp_seconds),
        )
        self._wake = asyncio.Event()
        self._drained = asyncio.Event()
        self._announcements: asyncio.Queue[bool] = asyncio.Queue()
        self._session = LinkSession(
            config.endpoints,
            Backoff(self._chance, cap_seconds=config.retry_cap_seconds),
            heartbeat_seconds=config.heartbeat_seconds,
            greeting_seconds=config.greeting_seconds,
            stable_seconds=config.stable_seconds,
            unproven_redial_seconds=config.unproven_redial_seconds,
            failback_seconds=config.failback_seconds,
            is_answered=config.dialect.answers_greeting,
            keeps_unproven=config.protocol != QUIC,  # over it the same query is the barrier
            now=self._loop.time(),
        )
        self._lanes = Lanes(
            self.bus,
            self.tasks,
            self._settled_down,
            max_messages=config.downstream_messages,
            max_bytes=config.downstream_bytes,
        )
        self._certificates = CertificateKeeper(config, self._chance, self._use_new_certificate, enrol=self._enrol)
        self._certifier = self.tasks.create_task(self._certificates.run(), name="certificate")
        self._announcer = self.tasks.create_task(self._pub_connect_info(), name="connection state")
        self._runner = self.tasks.create_task(self._run(), name="link")

    def _adopt_policy(self) -> None:
        """Take the grants of run/node.json over, or leave those in force and say why (`edgezmq reload`)."""
        fault = ""
        try:
            node = load(self.home.path)
            if policy.mark_of(node) != policy.mark_of(self.node):
                is_in_force = node.runtime.policy.enable
                self._permission.adopt(dict(EdgeHubConfig.from_node(node).grants) if is_in_force else None)
                self.node = policy.with_policy_of(self.node, node)
                log.info(
                    "policy taken over mark=%s rules=%d", policy.mark_of(self.node), len(node.runtime.policy.modules)
                )
        except EdgezmqError as why:
            fault = str(why)
            log.error("policy not taken over, the one before stays: %s", fault)
        policy.tell(self.home, self.name, policy.mark_of(self.node), fault)

    async def _run(self) -> None:
        """Connection after connection, each joined before the next begins."""
        session = self._session
        self.perform(session.start())
        while session.state is not LinkState.STOPPED:
            self.perform(session.expire(now=self._loop.time()))
            if self._dial is not None:
                endpoint, self._dial = self._dial.endpoint, None
                link = self._factory(self._config)
                self._connection = Connection(self._config, link, self, session, self._outbox, self._pace, self._lanes)
                try:
                    await self._connection.run(endpoint)
                finally:
                    self._connection = None
                self._ask_again()
                continue
            await self._sleep_until(session.next_deadline())

    async def _sleep_until(self, due: float | None) -> None:
        try:
            async with asyncio.timeout_at(due):
                await self._wake.wait()
        except TimeoutError:
            pass
        self._wake.clear()

    def dial_now(self) -> None:
        """Cut the pause before the next dial short."""
        if self._session.state is LinkState.CLOSED:
            self.perform(self._session.receive(DialDue(), now=self._loop.time()))
            self._wake.set()

    def _use_new_certificate(self) -> None:
        """The link that is there goes on under the old one until a quiet moment."""
        if self._session.state is LinkState.CLOSED:
            self.dial_now()
        else:
            self.reconnect_quietly("a new certificate")

    async def stop(self) -> None:
        """Let the cloud confirm what it was given, say goodbye, end every task."""
        self.perform(self._session.receive(StopWanted(), now=self._loop.time()))
        if self._session.state is LinkState.DRAINING:
            self._check_drained()
            try:
                async with asyncio.timeout(self._config.drain_seconds):
                    await self._drained.wait()
            except TimeoutError:
                log.info("stopped with messages unconfirmed count=%d", self._outbox.held_messages)
            if self._session.state is LinkState.DRAINING:
                self.perform(self._session.receive(Drained(), now=self._loop.time()))
        await self._store_the_rest()
        if self._keeper_timer is not None:
            self._keeper_timer.cancel()
        self._wake.set()
        self._runner.cancel()
        await asyncio.wait([self._runner])
        self._announcer.cancel()
        self._certifier.cancel()
        self._lanes.stop()
        if self._parking is not None:
            self._parking.stop()
        if self._store is not None:
            store, self._store = self._store, None
            await asyncio.to_thread(store.stop)

    # --- what the session wants --------------------------------------------------------------------

    def perform(self, actions: Iterable[Action]) -> None:
        for action in actions:
            match action:
                case Dial():
                    self._dial = action
                case Greet(is_asking):
                    self._init(is_asking=is_asking)
                case Keepalive():
                    if self._connection is not None:
                        self._connection.send([cloud.keepalive()])
                        self._counts["keepalives"] += 1
                case Announce(is_connected):
                    self._announce(is_connected)
                case Hangup(why):
                    if self._connection is not None:
                        self._connection.hang_up(why)
                case Probe(endpoint):
                    self.tasks.create_task(self._probe(endpoint), name="probe")
                case AwaitQuiet():
                    self.tasks.create_task(self._await_quiet(), name="quiet moment")
                case Drain():
                    pass  # `stop` waits; the writer goes on
                case Finished():
                    self._drained.set()

    def _init(self, *, is_asking: bool) -> None:
        """The first words on a new link."""
        greeting = cloud.greeting()
        self._greeting_id = greeting.id
        self._counts["connects"] += 1
        if self._connection is not None:
            self._connection.send([cloud.keepalive(), greeting] if is_asking else [cloud.keepalive()])

    # --- moves on purpose ------------------------------------------------------------------------------

    def reconnect_quietly(self, why: str) -> None:
        """Replace the link by a new one when that disturbs nobody. Nothing to do without a link."""
        self.perform(self._session.receive(MoveWanted(why), now=self._loop.time()))

    async def _probe(self, endpoint: Endpoint) -> None:
        fault = await self._prober(self._config, endpoint)
        log.debug("probed endpoint=%s fault=%s", endpoint, fault)
        self._counts["probes"] += 1
        self.perform(self._session.receive(Probed(fault is None), now=self._loop.time()))
        self._look()

    async def _await_quiet(self) -> None:
        """On a link that is never quiet by itself the writer is held back for a moment, in the end."""
        connection = self._connection
        patience_over = self._loop.time() + _QUIET_PATIENCE_SECONDS
        hold_over = patience_over + _HOLD_SECONDS
        while connection is not None and connection is self._connection:
            now = self._loop.time()
            if now >= patience_over:
                connection.hold()
            if self._is_quiet(is_held=now >= patience_over) or now >= hold_over:
                self._counts["moves"] += 1
                self.perform(self._session.receive(Quiet(), now=now))
                return
            await asyncio.sleep(_QUIET_LOOK_SECONDS)

    def _is_quiet(self, *, is_held: bool) -> bool:
        """Whether a new link would make nobody wait or see anything twice."""
        outbox = self._outbox
        if outbox.unconfirmed:
            return False
        return is_held or not (outbox.has_signals or outbox.has_data or len(self._keeper) or self._lanes.held_messages)

    def _look(self) -> None:
        """The session may have a new deadline."""
        if self._connection is not None:
            self._connection.look()

    def _announce(self, is_connected: bool) -> None:
        if not is_connected:
            self._down_since = self._loop.time()
        self._announcements.put_nowait(is_connected)
        if is_connected:
            is_odd = self._session.state is LinkState.UNPROVEN and self._config.dialect.answers_greeting
            level = logging.WARNING if is_odd else logging.INFO
            self._outbox.settle_places()
            self._ramp_up()
            log.log(level, "link up state=%s why=%s", self._session.state.value, self._session.why)
            if not self._is_settled:
                self._is_settled = True  # the first handshake has left garbage of OpenSSL's and asyncio's
                self._loop.call_later(_SETTLE_SECONDS, memory.settle)
            if self._connection is not None:
                self._connection.wake()

    def _ramp_up(self) -> None:
        """After an outage the backlog goes up slowly at first: other nodes have theirs too."""
        now = self._loop.time()
        if now - self._down_since >= self._config.ramp_after_seconds and self._outbox.waiting(Class.DATA):
            self._pace.ramp.begin(now=now)

    async def _pub_connect_info(self) -> None:
        """KubeEdge's pubConnectInfo(true/false): retained, so that late and restarted modules know it too."""
        while True:
            is_connected = await self._announcements.get()
            dialect = self._config.dialect
            for group in dialect.connection_groups:
                event = cloud.connection_event(dialect, group, is_connected=is_connected)
                await self.bus.retain(Group(group), cloud.CONNECTION_RESOURCE, event, priority=Priority.SIGNAL)

    # --- up: routeToCloud ------------------------------------------------------------------------------

    async def handle(self, message: Message) -> None:
        """Take a module's message for the cloud, or refuse it saying why. Waits while the outbox is full."""
        if message.group == LOCAL_GROUP:
            await self._answer_locally(message)
            return
        delivery = message.delivery
        if self._permission and not self._permission.allows(delivery.sender, message):
            what = f"{message.operation} {message.resource} of group {message.group}"
            self._refuse_up(
                message, DENIED, f"{what}: runtime.policy.modules.{delivery.sender}.cloud does not grant it"
            )
        try:
            payload = self._encode(message)
        except InvalidMessage as fault:
            self._refuse_up(message, INVALID, str(fault))
        size = len(payload)
        if size > self._config.max_upload_bytes:
            self._refuse_up(message, TOO_LARGE, f"{size} bytes, the limit is {self._config.max_upload_bytes}")
        connection = self._connection
        if connection is not None and size > FLOOR_BYTES:  # less never blocks a link
            limit = self._config.keepalive_limit_seconds / 2
            if await connection.is_too_large(size, limit):
                self._refuse_up(message, TOO_LARGE_FOR_LINK, f"{size} bytes would hold the link for over {limit:g} s")
        kind = Class.SIGNAL if cloud.is_signal(message, delivery.priority) else Class.DATA
        outbox = self._outbox
        key = ""
        if self._coalescing and kind is Class.DATA and not delivery.expects_reply and self._may_coalesce():
            key = self._coalescing.key(message) or ""
            if key and self._outbox.has_place(key, kind):
                self._coalesce(key, payload, message, kind)
                return
        while not outbox.has_room(kind, size):
            await self._wait_room()
        if delivery.expects_reply:
            self._ask(message, payload, kind, delivery.ttl_ms)
        else:
            outbox.put(payload, message.defer(), kind, sender=delivery.sender, now=self._loop.time(), key=key)
            if self._spill_timer is None and self._store is not None:
                self._arm_spill()
        if self._connection is not None:
            self._connection.wake()

    def _may_coalesce(self) -> bool:
        """Without a link, and with nothing in doubt that was written to the last one."""
        return self._store is not None and not self._session.is_open and not self._outbox.unconfirmed

    def _coalesce(self, key: str, payload: bytes, message: Message, kind: Class) -> None:
        """Let the message take the place of the last one like it."""
        store = self._store
        assert store is not None, "asked by _may_coalesce"
        sender = message.delivery.sender
        deferral = message.defer()
        row = self._outbox.coalesce(key, payload, deferral, kind, sender=sender, merge=_Both)
        if row == 0:
            store.do(lambda file: file.note(kind, COALESCED, 1, 0), lambda _: None)
            return
        self._replacement_number += 1
        number = self._replacement_number
        self._replacements[number] = _Replacement(kind, row, sender, payload, deferral)
        store.do(lambda file: file.replace(kind, row, sender, payload, COALESCED), partial(self._on_replaced, number))

    def _on_replaced(self, number: int, was_there: bool) -> None:
        replacement = self._replacements.pop(number, None)
        if replacement is None:
            return  # the file was damaged meanwhile: it has been put anew
        self._outbox.replaced(replacement.kind, replacement.row, replacement.payload)
        if was_there:
            replacement.token.done()
        else:
            self._put_anew(replacement)

    def _put_anew(self, replacement: _Replacement) -> None:
        """Its row was dropped or lost before the commit."""
        kind, _, sender, payload, token = replacement
        self._outbox.put(payload, token, kind, sender=sender, now=self._loop.time())
        if self._spill_timer is None:
            self._arm_spill()

    def _refuse_up(self, message: Message, reason: str, text: str) -> None:
        self._counts["refused_up"] += 1
        self._warn(reason, "refused sender=%s id=%s reason=%s: %s", message.delivery.sender, message.id, reason, text)
        raise Refused(reason)

    async def _wait_room(self) -> None:
        waiter = self._loop.create_future()
        self._room_waiters.append(waiter)
        await waiter

    def confirmed(self, count: int) -> None:
        self._counts["confirmed"] += count
        if self._store is not None:
            for kind, upto in self._outbox.deletions():
                self._store.delete(kind, upto)
        self.load()
        self._make_room()
        self._check_drained()

    def _make_room(self) -> None:
        if self._room_waiters:
            waiters, self._room_waiters = self._room_waiters, []
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)

    def _check_drained(self) -> None:
        if self._session.state is LinkState.DRAINING and self._outbox.memory_messages == 0:
            self._drained.set()

    # --- the outbox on disk ------------------------------------------------------------------------------

    async def _open_store_when_possible(self) -> None:
        """On a full disk not even reading is possible: wait for room, rather than to end and be given up."""
        while True:
            try:
                self._open_store()
                return
            except (OSError, sqlite3.OperationalError) as fault:
                self._store = None
                self._warn(
                    "open", "the outbox cannot be opened, trying again every %g s: %s", _OPEN_AGAIN_SECONDS, fault
                )
            await asyncio.sleep(_OPEN_AGAIN_SECONDS)

    def _open_store(self) -> None:
        """Open the file and take up what it holds. Without a path (tests) everything stays in memory."""
        config = self._config
        if config.outbox_path is None:
            return
        self._store = store = Store(
            config.outbox_path,
            boot_id=_boot_id(),
            clock=lambda: time.clock_gettime(time.CLOCK_BOOTTIME),
            wall_ms=lambda: time.time_ns() // 1_000_000,
            call_back=self._call_back,
            on_damage=self._on_damage,
        )
        for kind, extent in zip(Class, store.extents(), strict=True):
            self._outbox.restore(kind, extent.first, extent.last, extent.messages, extent.bytes)
        for kind, account in zip(Class, store.accounts(), strict=True):
            if account.mismatch:
                log.error("the outbox file's account does not add up class=%s %s", kind.name.lower(), account)
                self._file_mismatch += abs(account.mismatch)
        self._parking = Parking(
            store,
            self.tasks,
            ParkingLimits(config.parked_messages, config.parked_bytes, config.owner_refusals),
            deliver=self._deliver_parked,
            presence=self.bus.presence,
            parked=self._on_parked,
            is_full=self._on_parking_full,
            wall_ms=lambda: time.time_ns() // 1_000_000,
        )
        store.start()
        self._parking.start()
        if self._outbox.stored_messages:
            log.info("outbox taken up messages=%d bytes=%d", self._outbox.stored_messages, self._outbox.stored_bytes)
        self.load()
        if config.outbox_max_age_seconds is not None:
            self.tasks.create_task(self._expire_stored(config.outbox_max_age_seconds), name="outbox age")

    def _call_back(self, answer: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(answer)
        except RuntimeError:
            pass  # the loop has ended; what was committed is in the file

    def _spill_after(self) -> float:
        """Seconds that the cloud has to confirm a message before it is stored."""
        window = self._connection.window if self._connection is not None else None
        rtt = window.rtt_seconds if window is not None else None
        return max(self._config.spill_seconds, 4 * (rtt or 0.0))

    def _is_offline(self) -> bool:
        """No link, and not only for the moment of a reconnect: storing at once then spares the senders a wait."""
        return not self._session.is_open and self._loop.time() - self._down_since > self._config.spill_seconds

    def _arm_spill(self) -> None:
        written, put = self._outbox.oldest_unstored()
        dues = [] if written is None else [written + self._spill_after()]
        if put is not None:
            dues.append(put if self._is_offline() else put + self._patience())
        if not dues:
            self._spill_timer = None
            return
        now = self._loop.time()
        # What waits may be written, or the link lost, meanwhile: then it is due earlier than it looks now.
        due = min(*dues, now + self._config.spill_seconds)
        # Without a link what comes in one turn of the loop, and a little longer, is stored in one commit.
        self._spill_timer = self._loop.call_at(max(due, now + _SPILL_TOGETHER_SECONDS), self._spill)

    def _spill(self) -> None:
        """Store what the cloud has not confirmed in time; without a link everything."""
        now = self._loop.time()
        if self._is_offline():
            self._store_older_than(now + 1.0, now + 1.0)
        else:
            self._store_older_than(now - self._spill_after(), now - self._patience())
        self._arm_spill()

    def _patience(self) -> float:
        """Seconds that a message may wait in memory to be written.

        On a link that works it is better to wait than to wear the flash; not so much that a reboot of the sender's
        machine becomes likely. Without a link there is nothing to wait for but a quick reconnect, and where modules
        hold up what comes down no pong is read.
        """
        connection = self._connection
        if not self._session.is_open or (connection is not None and connection.is_reading_stopped):
            return self._config.spill_seconds
        return _PATIENCE_SECONDS

    def _store_older_than(self, written_before: float, put_before: float) -> None:
        store = self._store
        if store is None:
            return
        for kind in Class:
            while rows := self._outbox.spill(kind, written_before, put_before):
                store.add(kind, [Row(*row) for row in rows], partial(self._on_stored, kind, rows[-1].row))
                self._counts["spilled"] += len(rows)

    def _on_stored(self, kind: Class, upto: int) -> None:
        for token in self._outbox.stored(kind, upto):
            token.done()
        self._stored.set()
        self._make_room()
        self.load()
        self._keep_within_bytes(kind)
        if self._connection is not None:
            self._connection.wake()

    def _keep_within_bytes(self, kind: Class) -> None:
        """By policy: rather the newest than to push back on the senders."""
        config, store = self._config, self._store
        if config.outbox_drops_oldest and kind is Class.DATA and store is not None:
            messages, size = self._outbox.stored_of(kind)
            if size > config.outbox_bytes * 0.95 or messages > config.outbox_messages * 0.95:
                excess = max(size // 20, size - int(config.outbox_bytes * 0.9))
                store.drop_bytes(kind, excess, "outbox-full", partial(self._on_dropped, kind))

    async def _expire_stored(self, seconds: float) -> None:
        while True:
            await asyncio.sleep(min(60.0, max(1.0, seconds / 10)))
            if self._store is not None and not self._outbox.unconfirmed:
                for kind in Class:
                    self._store.drop_older(kind, seconds, "too-old", partial(self._on_dropped, kind))

    def _on_dropped(self, kind: Class, what: Dropped, upto: int) -> None:
        if not what.messages:
            return
        self._outbox.dropped(kind, upto, what.messages, what.bytes)
        self._count_dropped(what.reason, what.messages)
        self._make_room()
        self._warn(
            "dropped",
            "dropped after acceptance reason=%s class=%s messages=%d bytes=%d (edgezmq ledger tells more)",
            what.reason,
            kind.name.lower(),
            what.messages,
            what.bytes,
        )

    def _on_damage(self, where: str) -> None:
        """The store has set a damaged file aside and begun a new one: store again what is still in memory."""
        gone = self._outbox.damaged()
        self._counts["outbox_damaged"] += 1
        log.error("the outbox file was damaged and is kept as %s; messages that only it held: %d", where, gone)
        if gone and self._store is not None:
            self._count_dropped("outbox-damaged", gone)
            self._store.note_many(Class.DATA, "outbox-damaged", gone)
        replacements, self._replacements = list(self._replacements.values()), {}
        for replacement in replacements:
            self._put_anew(replacement)
        if self._parking is not None:
            objects, not_parked = self._parking.damaged()
            self._counts["objects_dropped"] += objects
            if objects:
                log.error("parked objects that only the damaged file held: %d", objects)
            for message in not_parked:
                self._received.refused(message.id)  # the cloud's next repeat is a new try
        self._spill()

    def _count_dropped(self, reason: str, messages: int) -> None:
        self._counts["dropped"] += messages
        self._counts[f"dropped_{reason}"] += messages

    def load(self) -> None:
        """Have stored messages read that will be written next."""
        store = self._store
        if store is None:
            return
        for kind, after in self._outbox.wanted():
            store.read(kind, after, partial(self._on_loaded, kind, after))

    def _on_loaded(self, kind: Class, after: int, rows: list[Row]) -> None:
        self._outbox.loaded(kind, after, [StoredRow(*row) for row in rows], now=self._loop.time())
        if self._connection is not None:
            self._connection.wake()

    def given_up(self, poisoned: Poisoned[Settles]) -> None:
        """Quarantine: refused to its sender, or, when it was accepted before, into the ledger."""
        log.warning(
            "gave up a message: the cloud cut every link on which it came first sender=%s bytes=%d",
            poisoned.sender,
            len(poisoned.payload),
        )
        if poisoned.token is not None:
            poisoned.token.refuse(FAILED)
        elif self._store is not None:
            self._count_dropped("cut-by-cloud", 1)
            self._store.note(poisoned.kind, "cut-by-cloud", poisoned.sender, poisoned.payload)
        self.confirmed(0)

    async def _store_the_rest(self) -> None:
        """Before the end: what the cloud has not confirmed is stored, and so settled to its senders."""
        if self._spill_timer is not None:
            self._spill_timer.cancel()
            self._spill_timer = None
        if self._store is None:
            return
        end = self._loop.time() + _STORE_REST_SECONDS
        while self._outbox.oldest_unstored() != (None, None) or self._outbox.is_storing:
            self._stored.clear()
            self._store_older_than(self._loop.time() + 1.0, self._loop.time() + 1.0)
            try:
                async with asyncio.timeout_at(end):
                    await self._stored.wait()
            except TimeoutError:
                log.warning("stopped before everything was stored messages=%d", self._outbox.memory_messages)
                return

    # --- requests: syncKeeper ----------------------------------------------------------------------------

    def _ask(self, message: Message, payload: bytes, kind: Class, ttl_ms: int | None) -> None:
        seconds = self._config.request_seconds
        if ttl_ms is not None:
            seconds = min(seconds, ttl_ms / 1000)
        asked = _Asked(message, message.defer())
        # Registered before it is written: no answer can be too fast.
        is_registered = self._keeper.register(
            message.id,
            asked,
            payload,
            operation=message.operation,
            resource=message.resource,
            seconds=seconds,
            now=self._loop.time(),
        )
        if not is_registered:
            asked.refuse(OVERFLOW)
            return
        self._counts["requests"] += 1
        self._outbox.put(payload, asked, kind, is_volatile=True)
        self._arm_keeper()

    def _arm_keeper(self) -> None:
        if self._keeper_timer is not None:
            self._keeper_timer.cancel()
        due = self._keeper.next_deadline()
        self._keeper_timer = None if due is None else self._loop.call_at(due, self._expire_requests)

    def _expire_requests(self) -> None:
        for question in self._keeper.expire(now=self._loop.time()):
            self._counts["requests_expired"] += 1
            question.token.refuse(EXPIRED)
        self._arm_keeper()

    def _ask_again(self) -> None:
        """After a link loss: a query that the cloud had got may have lost its answer with the link."""
        for question in self._keeper.to_ask_again():
            if question.token.is_confirmed:
                question.token.is_confirmed = False
                self._outbox.put(question.payload, question.token, Class.SIGNAL, is_volatile=True)

    async def _give_answer(self, question: Question[_Asked], answer: Message) -> None:
        """The cloud's answer goes to the module that asked; then the cloud gets its ACK."""
        asked = question.token
        try:
            receipt = await self.bus.respond(asked.request, answer)
        except UsageError as fault:  # too large for the bus, or nobody waits any more
            self._counts["answers_late"] += 1
            asked.refuse(TOO_LARGE if isinstance(fault, MessageTooLarge) else GONE)
        else:
            asked.deferral.done()
            try:
                await receipt
            except NotHandled:
                self._counts["answers_late"] += 1  # whoever asked is gone: as good as late
        self._finish_down(answer)

    # --- down: routeToEdge ---------------------------------------------------------------------------------

    def receive(self, payload: bytes) -> None:
        try:
            message = from_cloud_json(payload)
        except MalformedMessage as fault:
            self._counts["invalid_down"] += 1
            self._warn("invalid", "no message came from the cloud: %s: %r", fault, payload[:_EXCERPT_BYTES])
            return
        self.take(message, len(payload))

    def take(self, message: Message, size_bytes: int) -> None:
        self._counts["received"] += 1
        if cloud.proves_session(message):
            self._prove()
        if message.parent_id == self._greeting_id:
            return
        if cloud.wants_ack(message):
            seen = self._received.receive(message.id)
            if seen is not Seen.NEW:
                self._counts["deduped"] += 1
                if seen is Seen.DONE:
                    self._acknowledge(message)
                return
        if message.parent_id:
            question = self._keeper.answer(message.parent_id)
            if isinstance(question, Question):
                self.tasks.create_task(self._give_answer(question, message), name="answer")
                return
            if isinstance(question, Late):
                self._counts["answers_late"] += 1
                self._finish_down(message)
                return
        if message.operation == OPERATION_ERROR and not self._config.dialect.errors_name_the_question:
            question = self._keeper.answer_about(message.resource)
            if question is not None:
                answer = msgspec.structs.replace(message, parent_id=question.id)
                self.tasks.create_task(self._give_answer(question, answer), name="answer")
                return
        owner = destination(message, self._config.dialect)
        if owner is None:
            # CloudHub waits only for ACKs of group `resource`, which has an owner: nothing to acknowledge here.
            self._counts["unknown_group"] += 1
            self._warn(
                "unknown group",
                "no module is known for a message of the cloud group=%s source=%s operation=%s resource=%s",
                message.group,
                message.source,
                message.operation,
                message.resource,
            )
            return
        if self._parking is not None and cloud.wants_ack(message) and self._parking.holds(owner):
            self._parking.put(owner, message)  # behind those that came before it
            return
        self._lanes.put(owner, message, size_bytes)

    def _prove(self) -> None:
        """The link has a session: something came over it that no rejected connection gets."""
        if self._session.state in (LinkState.GREETING, LinkState.UNPROVEN):
            was_unproven = self._session.state is LinkState.UNPROVEN
            self.perform(self._session.receive(Proven(), now=self._loop.time()))
            self._look()
            if was_unproven:
                log.info("link proven why=%s", self._session.why)

    def skipped(self, size_bytes: int) -> None:
        self._counts["skipped_down"] += 1
        self._prove()
        self._warn(
            "skipped",
            "passed over a message of the cloud size_bytes=%d max_bytes=%d",
            size_bytes,
            self._config.max_frame_bytes,
        )

    def _settled_down(self, message: Message, refusal: str | None) -> None:
        owner, parking = destination(message, self._config.dialect), self._parking
        is_object = owner is not None and cloud.wants_ack(message)
        if refusal is None:
            self._counts["delivered"] += 1
            if is_object and owner is not None and parking is not None:
                parking.known(owner)
            self._finish_down(message)
            return
        if is_object and owner is not None and parking is not None and refusal in NOBODY:
            parking.put(owner, message)
            return
        self._counts["refused_down"] += 1
        refusals = self._received.refused(message.id, by_owner=is_object and refusal not in NOT_THE_OWNER)
        if refusals >= self._config.owner_refusals and owner is not None and parking is not None:
            self._received.in_hand(message.id)
            parking.give_up(owner, message, partial(self._finish_down, message))
            self._warn(
                REFUSED_BY_OWNER,
                "gave up an object that its owner refused times=%d reason=%s resource=%s id=%s",
                refusals,
                refusal,
                message.resource,
                message.id,
            )
            return
        self._warn(
            "refused down",
            "a message of the cloud was not handled, no ACK goes up reason=%s group=%s resource=%s id=%s",
            "no module on this node has its group" if refusal == UNROUTABLE else refusal,
            message.group,
            message.resource,
            message.id,
        )

    async def _deliver_parked(self, owner: str, message: Message) -> str | None:
        """Hand a parked object to its owner; the refusal, None when it was handled."""
        try:
            receipt = await self.bus.send(owner, message, priority=Priority.SIGNAL)
            await receipt
        except MessageTooLarge:
            return TOO_LARGE
        except Refused as refused:
            return refused.reason
        except UsageError:
            return INVALID
        except NotHandled:
            return GONE
        self._counts["delivered"] += 1
        return None

    def _on_parked(self, message: Message) -> None:
        log.info("parked: no module on this node has its group group=%s resource=%s", message.group, message.resource)
        self._finish_down(message)

    def _on_parking_full(self, message: Message) -> None:
        self._counts["parking_full"] += 1
        self._received.refused(message.id)
        self._warn(
            "parking full",
            "no room to park an object, no ACK goes up resource=%s (runtime.edgehub.parkedMessages, parkedBytes)",
            message.resource,
        )

    def _finish_down(self, message: Message) -> None:
        if cloud.wants_ack(message):
            self._received.handled(message.id)
            self._acknowledge(message)

    def _acknowledge(self, message: Message) -> None:
        payload = self._encode(cloud.ack(message))
        self._outbox.put(payload, _OWN, Class.SIGNAL, is_volatile=True)
        self._counts["acks"] += 1
        if self._connection is not None:
            self._connection.wake()

    # --- what others may know ------------------------------------------------------------------------------

    async def _answer_locally(self, message: Message) -> None:
        if message.operation != STATUS_OPERATION or message.resource != STATUS_RESOURCE:
            self._refuse_up(message, INVALID, f"{message.operation} {message.resource}: edgehub answers only status")
        if not message.delivery.expects_reply:
            self._refuse_up(message, INVALID, "a question to edgehub that waits for no answer")
        await self.bus.respond(message, message.response(self.link_status()))

    def link_status(self) -> dict[str, Any]:
        """The link in words, for the CLI: JSON values only."""
        session, now = self._session, self._loop.time()
        window = self._connection.window if self._connection is not None else None
        is_limited = self._bucket.is_limited and self._outbox.has_data and self._bucket.available(now=now) == 0
        return {
            "state": session.state.value,
            "why": (not session.is_open and self._certificates.joining) or session.why,
            "certificate": self._certificates.status(),
            "endpoint": str(session.endpoint),
            "endpoints": [str(endpoint) for endpoint in self._config.endpoints],
            "move_wanted": session.move_wanted,
            "protocol": self._config.protocol,
            "hub_version": self._config.dialect.version,
            "proxy": str(self._config.proxy) if self._config.proxy is not None else None,
            "since": time.time() - (now - session.since),
            "unproven": session.state is LinkState.UNPROVEN,
            "next_dial_seconds": None if session.dial_at is None else round(max(0.0, session.dial_at - now), 1),
            "bottleneck": "messageQPS" if is_limited else None,
            "message_qps": self._config.message_qps,
            "is_ramping": self._pace.ramp.is_active(now=now),
            "unconfirmed": self._outbox.unconfirmed,
            "waiting": self._outbox.waiting(Class.SIGNAL) + self._outbox.waiting(Class.DATA),
            "stored": self._outbox.stored_messages,
            "stored_bytes": self._outbox.stored_bytes,
            "store_failing": self._store.failing if self._store is not None else None,
            "dropped": self._outbox.dropped_messages - self._outbox.dropped_in_vain,
            "parked": self._parking.by_owner() if self._parking is not None else {},
            "rtt_ms": None if window is None or window.rtt_seconds is None else round(window.rtt_seconds * 1000, 3),
            "window_bytes": None if window is None else window.size_bytes,
        }

    def counters(self) -> dict[str, int]:
        """Whole numbers for status and metrics; `link_state` is the index of its state in LinkState."""
        window = self._connection.window if self._connection is not None else None
        counts = {name: self._counts[name] for name in _COUNTERS}
        counts |= {name: count for name, count in self._counts.items() if name.startswith("dropped_")}
        counts["reconnects"] = max(0, counts["connects"] - 1)
        counts["link_state"] = list(LinkState).index(self._session.state)
        counts["link_up"] = int(self._session.is_open)
        counts["link_served"] = int(self._session.state is LinkState.SERVED)
        counts |= self._certificates.counters()
        counts["accepted"] = self._outbox.accepted
        counts["restored"] = self._outbox.restored
        counts["held"] = self._outbox.held_messages
        counts["given_up"] = self._outbox.given_up
        counts["coalesced"] = self._outbox.coalesced
        counts["dropped"] = self._outbox.dropped_messages - self._outbox.dropped_in_vain
        counts["ledger_mismatch"] = abs(self._outbox.mismatch) + self._file_mismatch
        counts["unconfirmed"] = self._outbox.unconfirmed
        counts["waiting_signals"] = self._outbox.waiting(Class.SIGNAL)
        counts["waiting_data"] = self._outbox.waiting(Class.DATA)
        counts["held_bytes"] = self._outbox.held_bytes
        counts["stored"] = self._outbox.stored_messages
        counts["stored_bytes"] = self._outbox.stored_bytes
        counts["store_bytes_written"] = self._store.bytes_written if self._store is not None else 0
        counts["store_failing"] = int(self._store is not None and self._store.failing is not None)
        counts["parked"] = self._parking.messages if self._parking is not None else 0
        counts["parked_bytes"] = self._parking.bytes if self._parking is not None else 0
        counts["unparked"] = self._parking.handed_over if self._parking is not None else 0
        counts["refused_by_owner"] = self._parking.given_up if self._parking is not None else 0
        counts["requests_open"] = len(self._keeper)
        counts["downstream_held"] = self._lanes.held_messages
        counts["rtt_us"] = int((window.rtt_seconds or 0.0) * 1e6) if window is not None else 0
        counts["window_bytes"] = window.size_bytes if window is not None else 0
        counts["rate_bytes_per_second"] = int(window.rate_bytes_per_second or 0) if window is not None else 0
        return counts

    def _warn(self, kind: str, text: str, *facts: object) -> None:
        now = self._loop.time()
        if now - self._warned.get(kind, float("-inf")) >= _WARN_SECONDS:
            self._warned[kind] = now
            log.warning(text, *facts)


_COUNTERS: Final = (
    "connects",
    "moves",
    "probes",
    "keepalives",
    "confirmed",
    "refused_up",
    "requests",
    "requests_expired",
    "answers_late",
    "received",
    "delivered",
    "refused_down",
    "acks",
    "deduped",
    "invalid_down",
    "skipped_down",
    "unknown_group",
    "spilled",
    "dropped",
    "outbox_damaged",
    "parking_full",
    "objects_dropped",
)


def _boot_id() -> str:
    """Which boot of the machine this is (random(4)); empty where the kernel does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
