"""One connection to CloudHub, from the dial to the clean-up.

Tasks in one task group, joined before `run` returns, so that nothing of one connection lives into the next:
`route_to_edge` reads, `route_to_cloud` writes, `keep_alive` minds the clock. A failure of any of them ends the
connection at once. Where the link keeps signals and data apart there are two writers, each with its own barrier
and window, and neither waits for the other.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import Final, NoReturn, Protocol

from modules.edgehub import cloud
from modules.edgehub.config import EdgeHubConfig, Endpoint
from modules.edgehub.governor import Pace
from modules.edgehub.lanes import Lanes
from modules.edgehub.link import Decoded, Link, LinkLost, LinkRefused, Passed, Received, make_encoder
from modules.edgehub.liveness import Liveness
from modules.edgehub.outbox import Class, Outbox, Poisoned
from modules.edgehub.session import Action, Failed, LinkSession, LinkState, Lost, Opened
from modules.edgehub.window import ByteWindow, RateProbe
from runtime.message import Message

log = logging.getLogger("modules.edgehub")

_BATCH_BYTES: Final = 256 * 1024
"One write; several TLS records, far below what the loop takes 1 ms for."
_BATCH_MESSAGES: Final = 2048
_MEASURED_BYTES: Final = 128 * 1024
"From this size on it is measured whether a message is too large for the link."
_SLOW_SECONDS: Final = 30.0
"So long a link that was measured counts as slow without another measurement."
_LOOK_SECONDS: Final = 0.5
"How often progress is looked at while the cloud owes us something; never on an idle link."


class Settles(Protocol):
    """Who is told when the cloud has a message."""

    def done(self) -> None: ...

    def refuse(self, reason: str) -> None: ...


class Host(Protocol):
    """What a connection wants of the process it belongs to."""

    def perform(self, actions: Iterable[Action]) -> None: ...

    def receive(self, payload: bytes) -> None:
        """A message came from the cloud, as JSON."""

    def take(self, message: Message, size_bytes: int) -> None:
        """A message came from the cloud."""

    def skipped(self, size_bytes: int) -> None:
        """A message from the cloud was too large."""

    def confirmed(self, count: int) -> None:
        """The cloud has so many messages more."""

    def given_up(self, poisoned: Poisoned[Settles]) -> None:
        """The cloud cuts every link on which this message comes."""

    def load(self) -> None:
        """The outbox may want stored messages read."""


class _Lane:
    """What goes up in one order: everything, or one kind where the link keeps them apart."""

    def __init__(self, kind: Class | None, window: ByteWindow) -> None:
        self.kind = kind  # None: both
        self.window = window
        self.barrier: int | None = None  # the last one written
        self.work = asyncio.Event()

    @property
    def kinds(self) -> tuple[Class, ...]:
        return tuple(Class) if self.kind is None else (self.kind,)

    @property
    def last(self) -> Class:
        """The kind whose place in the outbox and on the link is this lane's."""
        return Class.DATA if self.kind is None else self.kind


class Connection:
    """`run` it once. While it runs, `wake` tells it that the outbox has something."""

    def __init__(
        self,
        config: EdgeHubConfig,
        link: Link,
        host: Host,
        session: LinkSession,
        outbox: Outbox[Settles],
        pace: Pace,
        lanes: Lanes,
    ) -> None:
        self._config = config
        self._encode = make_encoder(config)
        self._link = link
        self._host = host
        self._session = session
        self._outbox = outbox
        self._pace = pace
        self._lanes = lanes
        self._clock: Callable[[], float] = asyncio.get_running_loop().time
        kinds = tuple(Class) if link.keeps_kinds_apart else (None,)
        self._uplinks = [_Lane(kind, ByteWindow(config.window_bytes_max)) for kind in kinds]
        outbox.keep_apart(link.keeps_kinds_apart)
        self._liveness = Liveness(
            silence_seconds=config.silence_seconds, limit_seconds=config.keepalive_limit_seconds, now=self._clock()
        )
        self._look = asyncio.Event()
        self._is_watching = False
        self._is_reading_stopped = False
        self._hang_up: str | None = None
        self._is_held = False
        self._measuring = asyncio.Lock()
        self._pong: asyncio.Future[None] | None = None  # of who measures
        self._slow_at = float("-inf")
        self._slow_rate = 0.0  # more than the link carried then
        self._is_over = False

    @property
    def window(self) -> ByteWindow:
        """Of data."""
        return self._uplinks[-1].window

    async def is_too_large(self, size_bytes: int, limit_seconds: float) -> bool:
        """Whether a message would hold up all others for longer than `limit_seconds`.

        For a large one the link is measured, unless its traffic has shown that it is fast enough.
        """
        if self._link.keeps_kinds_apart or not self._session.is_open:
            return False
        if size_bytes < _MEASURED_BYTES:
            return self.window.is_too_slow_for(size_bytes, limit_seconds)
        needed = size_bytes / limit_seconds
        async with self._measuring:
            if (self.window.rate_bytes_per_second or 0.0) >= needed:
                return False
            if self._clock() - self._slow_at < _SLOW_SECONDS and needed >= self._slow_rate:
                return True
            probe = RateProbe(needed)
            while probe.is_fast is None:
                sample = await self._measure(probe.size_bytes)
                if sample is None:
                    return False  # the link is gone: as if there had been none
                probe.measured(*sample)
            if not probe.is_fast:
                self._slow_at, self._slow_rate = self._clock(), needed
        return not probe.is_fast

    async def _measure(self, size_bytes: int) -> tuple[int, float] | None:
        """Send so much padding; the bytes that went and the seconds they took. None: the link was lost."""
        lane = self._uplinks[0]
        await self._wait_passed(lane)
        if not self._is_over:
            self.send([cloud.keepalive(padding_bytes=size_bytes)])
            await self._wait_passed(lane)
        return None if self._is_over else lane.window.last_sample

    async def _wait_passed(self, lane: _Lane) -> None:
        """Until no barrier is under way, or the link is lost."""
        while lane.window.is_barrier_under_way and not self._is_over:
            self._pong = asyncio.get_running_loop().create_future()
            await self._pong

    def _tell_passed(self) -> None:
        if self._pong is not None and not self._pong.done():
            self._pong.set_result(None)

    @property
    def is_reading_stopped(self) -> bool:
        """Modules hold up what comes down, so nothing is read: the pongs behind it neither."""
        return self._is_reading_stopped

    def wake(self) -> None:
        """There may be something to write."""
        for lane in self._uplinks:
            lane.work.set()

    def hold(self) -> None:
        """Write nothing more out of the outbox: what is under way is confirmed, then the link is at rest."""
        self._is_held = True

    def look(self) -> None:
        """The session's next deadline may have changed."""
        self._look.set()

    def hang_up(self, why: str) -> None:
        """End the connection; `run` reports it as lost. Nothing is written any more: it would have to go up again."""
        self.hold()
        self._hang_up = why
        self._look.set()

    # --- life ----------------------------------------------------------------------------------

    async def run(self, endpoint: Endpoint) -> None:
        """Dial, serve, clean up. The session is told of everything; raises nothing but cancellation."""
        try:
            await self._link.open(endpoint)
        except (LinkLost, LinkRefused) as fault:
            log.info("dial failed endpoint=%s why=%s", endpoint, fault)
            self._host.perform(self._session.receive(Failed(str(fault)), now=self._clock()))
            return
        lost = LinkLost("stopped")
        try:
            self._host.perform(self._session.receive(Opened(), now=self._clock()))
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._route_to_edge(), name="cloud to bus")
                for lane in self._uplinks:
                    name = "signals to cloud" if lane.kind is Class.SIGNAL else "bus to cloud"
                    tasks.create_task(self._route_to_cloud(lane), name=name)
                tasks.create_task(self._keep_alive(), name="keepalive")
        except* LinkLost as group:
            lost = next(fault for fault in _leaves(group) if isinstance(fault, LinkLost))
        finally:
            self._is_over = True
            self._tell_passed()
            # Polite only where the link still works: goodbyes to a dead one cost a second.
            await self._link.close(is_polite=self._hang_up is not None or lost.why == "stopped")
            poisoned = self._outbox.lost(is_cut_by_cloud=lost.is_cut_by_cloud)
        if poisoned is not None:
            self._host.given_up(poisoned)
        log.info("link lost endpoint=%s why=%s", endpoint, lost.why)
        self._host.perform(self._session.receive(Lost(lost.why), now=self._clock()))

    # --- down ----------------------------------------------------------------------------------

    async def _route_to_edge(self) -> NoReturn:
        while True:
            events = await self._link.receive()
            now = self._clock()
            self._liveness.progress(now=now)
            for event in events:
                if isinstance(event, Received):
                    self._host.receive(event.payload)
                elif isinstance(event, Decoded):
                    self._host.take(event.message, event.size_bytes)
                elif isinstance(event, Passed):
                    self._passed(event.barrier, now)
                else:
                    self._host.skipped(event.size_bytes)
            if self._lanes.is_full:
                # Not reading is what pushes back on the cloud; pongs wait behind its messages meanwhile.
                self._is_reading_stopped = True
                await self._lanes.wait_room()
                self._is_reading_stopped = False

    def _passed(self, barrier: int, now: float) -> None:
        lane = next((lane for lane in self._uplinks if lane.barrier == barrier), None)
        if lane is not None:
            size = lane.window.size_bytes
            lane.window.barrier_passed(now=now)
            self._tell_passed()
            if lane.window.size_bytes > size:
                self._link.fit_send_buffer(lane.window.size_bytes)
        before = self._outbox.confirmed
        for token in self._outbox.passed(barrier):
            token.done()
        if self._outbox.confirmed > before:
            self._host.confirmed(self._outbox.confirmed - before)
        self.wake()

    # --- up ------------------------------------------------------------------------------------

    def send(self, messages: Iterable[Message]) -> None:
        """Past the outbox, before everything that waits: keepalives and the greeting. A ping goes behind them."""
        lane = self._uplinks[0]
        barrier = None
        if not lane.window.is_barrier_under_way:
            barrier = self._outbox.barrier(lane.last, is_probe=True)
        payloads = [self._encode(message) for message in messages]
        self._write(lane, payloads, barrier, self._clock(), more_bytes=sum(map(len, payloads)))

    async def _route_to_cloud(self, lane: _Lane) -> NoReturn:
        while True:
            await lane.work.wait()
            lane.work.clear()
            while self._session.is_open and self._write_batch(lane):
                if not self._link.is_writable(lane.last):
                    await self._link.wait_writable(lane.last)
                else:
                    await asyncio.sleep(0)  # lets the reader take pongs, and senders add to the next batch
            pause = self._pause_for_token(lane)
            if pause is not None:
                await self._wait_work(lane, pause)

    def _write_batch(self, lane: _Lane) -> bool:
        """Write what may go now, with a barrier behind it where none is under way. False: nothing went."""
        outbox, window = self._outbox, lane.window
        now = self._clock()
        payloads: list[bytes] = []
        signals: list[bytes] = []
        max_signals: int | None = 0
        max_data: int | None = 0
        if lane.kind is not Class.DATA and outbox.has_signals:
            max_signals = self._pace.available(Class.SIGNAL, now=now)
        if lane.kind is not Class.SIGNAL and outbox.has_data:
            max_data = self._pace.available(Class.DATA, now=now)
        if (max_signals != 0 or max_data != 0) and not self._is_held:
            unconfirmed, unconfirmed_bytes = outbox.unconfirmed_of(lane.last)
            room = window.room(unconfirmed_bytes)
            # Signals need not wait for the pong of what is under way: behind it they are on the wire already. So they
            # may be a window ahead of it.
            ahead = window.size_bytes if lane.kind is None else 0
            if room > 0 or not unconfirmed or (max_signals != 0 and room + ahead > 0):
                entries = outbox.take(
                    min(room, _BATCH_BYTES),
                    max_messages=_BATCH_MESSAGES,
                    max_data=max_data,
                    max_signals=max_signals,
                    signal_bytes=ahead,
                    now=now,
                    only=lane.kind,
                )
                if entries:
                    if entries[0].kind is Class.SIGNAL:
                        signals = [entry.payload for entry in entries if entry.kind is Class.SIGNAL]
                    payloads = [entry.payload for entry in entries[len(signals) :]]  # signals come first
                    self._host.load()
                    self._pace.take(len(signals), len(payloads))
                elif room < _BATCH_BYTES:
                    window.filled()
        barrier = None if window.is_barrier_under_way else outbox.barrier(lane.last)
        if not payloads and not signals and barrier is None:
            return False
        if signals and payloads:
            # Alone in their TLS record: the receiver can read nothing of a record before it has all of it.
            self._write(lane, signals, None, now)
            self._write(lane, payloads, barrier, now)
        else:
            self._write(lane, signals or payloads, barrier, now)
        return bool(signals or payloads)

    def _write(
        self, lane: _Lane, payloads: list[bytes], barrier: int | None, now: float, *, more_bytes: int = 0
    ) -> None:
        """`more_bytes`: of what is not of the outbox."""
        self._link.write(payloads, barrier, kind=lane.last)
        lane.window.wrote(sum(map(len, payloads)), now=now)
        if barrier is not None:
            lane.barrier = barrier
            lane.window.barrier_sent(now=now)
            self._liveness.barrier_sent(
                acknowledged_bytes=self._link.acknowledged_bytes(),
                unconfirmed_bytes=self._outbox.unconfirmed_bytes + more_bytes,
            )
            if not self._is_watching:
                self._look.set()

    def _pause_for_token(self, lane: _Lane) -> float | None:
        """Seconds until the pace lets the next message go; None when it is not what holds them."""
        if not self._session.is_open:
            return None
        now = self._clock()
        dues = []
        for kind in lane.kinds:
            is_waiting = self._outbox.has_signals if kind is Class.SIGNAL else self._outbox.has_data
            if is_waiting and self._pace.available(kind, now=now) == 0:
                due = self._pace.next_at(kind)
                if due is not None:
                    dues.append(due)
        return max(min(dues) - now, 0.001) if dues else None

    @staticmethod
    async def _wait_work(lane: _Lane, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await lane.work.wait()
        except TimeoutError:
            lane.work.set()

    # --- the clock -------------------------------------------------------------------------------

    async def _keep_alive(self) -> NoReturn:
        wanted_at: float | None = None
        while True:
            if self._hang_up is not None:
                raise LinkLost(self._hang_up)
            now = self._clock()
            if wanted_at is not None and now > wanted_at + _LOOK_SECONDS:
                # We were stopped or starved ourselves: what came meanwhile has not been read yet.
                self._liveness.progress(now=now)
            self._host.perform(self._session.expire(now=now))
            due = self._session.next_deadline()
            self._is_watching = any(lane.window.is_barrier_under_way for lane in self._uplinks)
            dead_at = self._dead_at(now)
            if dead_at is not None:
                if now >= dead_at:
                    raise LinkLost("CloudHub is silent: no pong, no data and no acknowledgement")
                due = min(now + _LOOK_SECONDS, dead_at, due or dead_at)
            wanted_at = due
            if self._hang_up is None:
                await self._wait_look(None if due is None else max(due - self._clock(), 0.0))

    def _dead_at(self, now: float) -> float | None:
        if self._is_watching:
            self._liveness.acknowledged(self._link.acknowledged_bytes(), now=now)
        if self._is_reading_stopped or self._session.state is LinkState.GREETING:
            # Nothing can be heard, or the greeting's own time is running.
            self._liveness.progress(now=now)
        return self._liveness.dead_at(
            is_awaited=self._is_watching,
            queued_bytes=self._outbox.unconfirmed_bytes,
            rate=self.window.rate_bytes_per_second,
            rtt_seconds=max((lane.window.rtt_seconds or 0.0 for lane in self._uplinks), default=0.0),
            now=now,
        )

    async def _wait_look(self, seconds: float | None) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._look.wait()
        except TimeoutError:
            pass
        self._look.clear()


def _leaves(group: BaseExceptionGroup[LinkLost]) -> Iterable[BaseException]:
    for fault in group.exceptions:
        if isinstance(fault, BaseExceptionGroup):
            yield from _leaves(fault)
        else:
            yield fault
