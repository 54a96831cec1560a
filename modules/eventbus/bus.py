"""EventBus: joins the bus, the cores of the bridge and the connections to one or two MQTT brokers."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from functools import partial
from pathlib import Path
from random import Random
from typing import Final

from modules.eventbus.bridge import (
    ConnectionState,
    Downlink,
    EchoFilter,
    Held,
    Outgoing,
    Publish,
    Reject,
    Subscribe,
    Unsubscribe,
    Uplink,
    read_command,
    refusal_of,
)
from modules.eventbus.config import EventBusConfig, Server
from modules.eventbus.mqtt import Connected, ConnectionSettings, MqttConnection, tls_context
from modules.eventbus.store import SubscriptionStore
from modules.eventbus.subscriptions import Subscriptions
from modules.eventbus.topics import FIXED_FILTERS, is_topic, matches
from runtime.client import Bus, Receipt
from runtime.emp import INVALID, TOO_LARGE
from runtime.errors import Congested, MessageTooLarge, NotHandled, Refused, UsageError
from runtime.message import Deferral, Message
from runtime.module import Module

log = logging.getLogger("modules.eventbus")

WINDOW_BYTES: Final = 32 * 2**20
"Payload in hand per MQTT broker, not yet settled."
DRAIN_SECONDS: Final = 6.0
"For what is in hand when the process is asked to end; below Module.drain_timeout."
BROKER_DROPPED_TOPIC: Final = "$SYS/broker/publish/messages/dropped"
"Where mosquitto says how many messages it has dropped since its start (mosquitto(8), BROKER STATUS)."
LOG_EVERY_SECONDS: Final = 10.0
"Refusals of one reason are logged this often, with their number."


class EventBus(Module):
    """The module `eventbus`, group `bus`: KubeEdge's name and place."""

    name = "eventbus"
    groups = {"bus"}

    def __init__(self, config: EventBusConfig, data: Path, *, random: Random | None = None) -> None:
        """`data` is the directory of the subscription store. Raises ConfigError for TLS files that cannot be used."""
        super().__init__()
        self._config = config
        random = random or Random()
        servers = config.servers()
        for server in servers:
            tls_context(server.tls)
        self._store = SubscriptionStore(data)
        self._saved, warning = self._store.load()
        if warning:
            log.error("subscriptions lost: %s", warning)
        self._saving = asyncio.Lock()
        fixed = FIXED_FILTERS[config.semantics]
        self._subscriptions = Subscriptions(
            fixed=fixed,
            links=[server.name for server in servers],
            stored=self._saved,
            obsolete={each for table in FIXED_FILTERS.values() for each in table} - set(fixed),
            random=random,
        )
        self._sides = [_Side(self, server, config, self._subscriptions, random) for server in servers]
        self._rejected = 0
        self._cloud_connected: bool | None = None
        self.is_draining = False

    async def start(self) -> None:
        for side in self._sides:
            self.tasks.create_task(side.connection.run(), name=f"mqtt {side.name}")

    async def handle(self, message: Message) -> None:
        """Do what a message from the bus asks for. A publish is settled once every broker has acknowledged it."""
        config = self._config
        command = read_command(
            message,
            node=config.node_name,
            semantics=config.semantics,
            publish_connection_state=config.publish_connection_state,
        )
        match command:
            case Publish():
                self._publish(command, _Result(self.bus, message, message.defer(), len(self._sides)))
                return
            case Subscribe(topic_filter):
                self._subscriptions.want(topic_filter)
                await self._save_intent()
                self._synchronise()
            case Unsubscribe(topic_filter):
                self._subscriptions.unwant(topic_filter)
                await self._save_intent()
                self._synchronise()
            case ConnectionState(is_connected, publish):
                self._cloud_connected = is_connected
                log.info("cloud %s", "connected" if is_connected else "disconnected")
                if publish is not None:
                    self._publish(publish, None)
            case Reject(text):
                self._rejected += 1
                log.warning("message refused id=%s sender=%s reason=%s", message.id, message.delivery.sender, text)
                if message.delivery.expects_reply:
                    await self.bus.respond(message, message.error(text, source=self.name))
                raise Refused(INVALID)
        if message.delivery.expects_reply:
            await self.bus.respond(message, message.response())

    def _publish(self, publish: Publish, result: _Result | None) -> None:
        for side in self._sides:
            side.publish(Outgoing(publish.topic, publish.payload, result))

    async def _save_intent(self) -> None:
        """Returns once the present intent is on disk. Raises OSError: the message is tried again by the SDK."""
        async with self._saving:
            snapshot = self._subscriptions.snapshot()
            if snapshot != self._saved:
                await asyncio.to_thread(self._store.save, snapshot)
                self._saved = snapshot

    def save_intent_soon(self) -> None:
        """After something settled that is no news to anybody: losing this write costs one more UNSUBSCRIBE."""
        self.tasks.create_task(self._save_quietly(), name="save subscriptions")

    async def _save_quietly(self) -> None:
        try:
            await self._save_intent()
        except OSError as fault:
            log.warning("subscriptions cannot be stored path=%s fault=%s", self._store.path, fault)

    def _synchronise(self) -> None:
        for side in self._sides:
            side.synchronise()

    async def stop(self) -> None:
        """Take no more from MQTT (what is not acknowledged comes again), let what is in hand settle, disconnect."""
        self.is_draining = True
        end = asyncio.get_running_loop().time() + DRAIN_SECONDS
        while not all(side.is_idle for side in self._sides) and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.02)  # between two looks at what is in hand
        await asyncio.gather(*(side.connection.stop() for side in self._sides))

    def counters(self) -> dict[str, int]:
        counters = {
            "rejected": self._rejected,
            "subscriptions_stored": self._subscriptions.stored,
            "subscriptions_failed": self._subscriptions.failed,
        }
        if self._cloud_connected is not None:
            counters["cloud_connected"] = int(self._cloud_connected)
        for side in self._sides:
            prefix = f"{side.name}_" if len(self._sides) > 1 else ""
            counters.update({prefix + name: value for name, value in side.counters().items()})
        return counters


class _Result:
    """Settles a message from the bus when all brokers have answered: done, or refused with the first reason."""

    __slots__ = ("_bus", "_deferral", "_message", "_pending", "_reason", "_wants_reply")

    def __init__(self, bus: Bus, message: Message, deferral: Deferral, pending: int) -> None:
        self._bus = bus
        self._deferral = deferral
        self._message = message
        self._pending = pending
        self._reason: str | None = None
        self._wants_reply = deferral.delivery.expects_reply

    def add(self, reason: str | None, tasks: asyncio.TaskGroup) -> None:
        """One broker's answer; None: it has the message."""
        self._pending -= 1
        self._reason = self._reason or reason
        if self._pending:
            return
        if self._wants_reply:
            tasks.create_task(self._respond(), name="respond")
        if self._reason is None:
            self._deferral.done()
        else:
            self._deferral.refuse(self._reason)

    async def _respond(self) -> None:
        message = self._message
        reply = message.response() if self._reason is None else message.error(f"not published: {self._reason}")
        try:
            await self._bus.respond(message, reply)
        except NotHandled as fault:  # the requester has gone
            log.debug("reply not sent id=%s reason=%s", message.id, fault)


class _Side:
    """One MQTT broker: its connection, and the cores that decide about it (`mqtt.Events`)."""

    def __init__(
        self,
        owner: EventBus,
        server: Server,
        config: EventBusConfig,
        subscriptions: Subscriptions,
        random: Random,
    ) -> None:
        self.name = server.name
        self._owner = owner
        self._subscriptions = subscriptions
        settings = ConnectionSettings(
            client_id=config.session_client_id,
            protocol=server.protocol,
            receive_window=config.receive_window,
            keepalive_seconds=config.keepalive_seconds,
            session_expiry_seconds=config.session_expiry_seconds,
            reconnect_max_seconds=config.reconnect_max_seconds,
        )
        self.connection = MqttConnection(server, settings, self, random)
        self.uplink = Uplink(
            window=config.receive_window, window_bytes=WINDOW_BYTES, semantics=config.semantics, random=random
        )
        self.downlink = Downlink(window=config.publish_window)
        self._echoes = EchoFilter()
        self._watches_echoes = False
        self._to_bus: deque[Held] = deque()
        self._waits_for_room = False
        self._retry_timer: asyncio.TimerHandle | None = None
        self._subscription_timer: asyncio.TimerHandle | None = None
        self._told: dict[str, tuple[float, int]] = {}
        self._was_complete = False
        self._broker_dropped: int | None = None
        self.disconnects = 0

    @property
    def is_idle(self) -> bool:
        """Nothing in hand that this process can still bring to an end."""
        publishes = self.downlink.in_flight + self.downlink.waiting if self.connection.is_connected else 0
        return not publishes and not self._to_bus and self.uplink.in_hand <= self.uplink.retrying

    # --- mqtt.Events ---

    def accepted(self, facts: Connected) -> bool:
        return self.downlink.connected(
            receive_maximum=facts.receive_maximum, max_packet_bytes=facts.max_packet_bytes, repeats=facts.repeats
        )

    def connected(self, facts: Connected) -> None:
        self._watches_echoes = not facts.no_local
        self._was_complete = False
        self.uplink.connected(session_present=facts.session_present)
        if self._subscriptions.connected(self.name, session_present=facts.session_present):
            self._owner.save_intent_soon()
        if not self._is_subscribed(BROKER_DROPPED_TOPIC):
            self.connection.watch(BROKER_DROPPED_TOPIC)
        self.synchronise()
        self._pump_to_mqtt()

    def disconnected(self, reason: str) -> None:
        self.disconnects += 1
        self.uplink.disconnected()
        self._subscriptions.disconnected(self.name)
        suspect = self.downlink.disconnected()
        if suspect is not None:
            log.warning("publish given up topic=%s: it ended every connection that carried it", suspect.topic)
            self._finish(suspect, "failed")

    def message(self, mid: int, qos: int, dup: bool, topic: str | None, payload: bytes | None, size: int) -> None:
        if self._owner.is_draining:
            return
        uplink = self.uplink
        if topic == BROKER_DROPPED_TOPIC and payload is not None:
            self._broker_dropped = int(payload) if payload.isdigit() and len(payload) < 19 else self._broker_dropped
            if not self._is_subscribed(topic):
                self._acknowledge(uplink.skip(mid, qos))
                return
        if payload is None:
            self._tell(f"skipped for its {size} bytes", topic or "?")
            self._acknowledge(uplink.skip(mid, qos, reason=TOO_LARGE))
            return
        if topic is None or not is_topic(topic):
            uplink.malformed += 1
            self._tell("topic is not UTF-8 or has wildcards", "?")
            self._acknowledge(uplink.skip(mid, qos))
            return
        if self._watches_echoes and self._echoes.is_echo(topic, payload, now=_now()):
            self._acknowledge(uplink.skip(mid, qos))
            return
        held = uplink.received_message(mid, qos, dup, topic, payload, timestamp_ms=time.time_ns() // 1_000_000)
        if held is None:
            self._acknowledge(uplink.take_acknowledgements())
            return
        self._to_bus.append(held)
        if uplink.is_full:
            self.connection.pause_reading()

    def turn_ended(self) -> None:
        if self._to_bus and not self._waits_for_room:
            self._pump_to_bus()

    def published(self, mid: int, reason_code: int) -> None:
        outgoing = self.downlink.acknowledged(mid)
        if outgoing is not None:
            self._finish(outgoing, refusal_of(reason_code))
            self._pump_to_mqtt()

    def answered(self, mid: int, accepted: bool) -> None:
        ask, store = self._subscriptions.answered(self.name, mid, accepted=accepted, now=_now())
        if ask is not None and not accepted:
            verb = "subscribe" if ask.subscribe else "unsubscribe"
            log.warning("mqtt broker refused to %s filter=%s server=%s", verb, ask.topic_filter, self.name)
        if store:
            self._owner.save_intent_soon()
        self.synchronise()

    # --- from MQTT to the bus ---

    def _pump_to_bus(self) -> None:
        """Hand what has been read to the bus; what finds no room is waited for, and all behind it with it."""
        bus, waiting = self._owner.bus, self._to_bus
        while waiting:
            held = waiting[0]
            try:
                receipt = bus.send_nowait(held.destination, held.message)
            except Congested:
                self._waits_for_room = True
                self._owner.tasks.create_task(self._send_when_there_is_room(), name=f"to bus {self.name}")
                return
            except UsageError as fault:
                waiting.popleft()
                self._refuse(held, _usage_reason(fault))
                continue
            waiting.popleft()
            receipt.add_done_callback(partial(self._settled, held))

    async def _send_when_there_is_room(self) -> None:
        try:
            held = self._to_bus[0]
            try:
                receipt = await self._owner.bus.send(held.destination, held.message)
            except Congested:
                await asyncio.sleep(0.05)  # before the next attempt; `send` itself waits
            except UsageError as fault:
                self._to_bus.popleft()
                self._refuse(held, _usage_reason(fault))
            else:
                self._to_bus.popleft()
                receipt.add_done_callback(partial(self._settled, held))
        finally:
            self._waits_for_room = False
        self._pump_to_bus()

    def _settled(self, held: Held, receipt: Receipt) -> None:
        reason = receipt.refusal
        if reason is not None:
            self._refuse(held, reason)
            return
        mids = self.uplink.settled(held)
        if mids:
            self._acknowledge(mids)
        if self.uplink.has_drained:
            self.connection.resume_reading()

    def _refuse(self, held: Held, reason: str) -> None:
        refusal = self.uplink.refused(held, reason, now=_now())
        if refusal.retry_in is None:
            self._tell(f"given up: {reason}", held.topic)
            self._acknowledge(self.uplink.take_acknowledgements())
            if self.uplink.has_drained:
                self.connection.resume_reading()
        else:
            self._tell(f"refused, tried again: {reason}", held.topic)
            self._arm_retries()

    def _arm_retries(self) -> None:
        if self._retry_timer is not None:
            self._retry_timer.cancel()
            self._retry_timer = None
        due = self.uplink.next_retry()
        if due is not None:
            self._retry_timer = asyncio.get_running_loop().call_at(due, self._retry)

    def _retry(self) -> None:
        self._to_bus.extend(self.uplink.take_retries(now=_now() + 0.001))
        self._retry_timer = None
        self._arm_retries()
        if not self._waits_for_room:
            self._pump_to_bus()

    def _acknowledge(self, mids: list[int]) -> None:
        if mids and self.connection.is_connected:
            self.connection.acknowledge(mids)

    def _tell(self, what: str, topic: str) -> None:
        """Log refusals: the first of a kind at once, then their number from time to time."""
        now = _now()
        since, count = self._told.get(what, (-LOG_EVERY_SECONDS, 0))
        if now - since < LOG_EVERY_SECONDS:
            self._told[what] = (since, count + 1)
            return
        log.warning("mqtt message %s server=%s topic=%r others=%d", what, self.name, topic[:200], count)
        self._told[what] = (now, 0)

    # --- from the bus to MQTT ---

    def publish(self, outgoing: Outgoing) -> None:
        self.downlink.submit(outgoing)
        self._pump_to_mqtt()

    def _pump_to_mqtt(self) -> None:
        downlink = self.downlink
        while (outgoing := downlink.take()) is not None:
            if not downlink.fits(outgoing):
                self._finish(outgoing, TOO_LARGE)
                continue
            mid = self.connection.publish(outgoing.topic, outgoing.payload)
            if mid is None:
                downlink.put_back(outgoing)
                return
            downlink.sent(mid, outgoing)
            # The packet leaves at the end of this turn of the loop, so the echo cannot be faster than this.
            if self._watches_echoes and self._is_subscribed(outgoing.topic):
                self._echoes.published(outgoing.topic, outgoing.payload, now=_now())

    def _is_subscribed(self, topic: str) -> bool:
        return any(matches(topic_filter, topic) for topic_filter in self._subscriptions.filters)

    def _finish(self, outgoing: Outgoing, reason: str | None) -> None:
        self.downlink.count(reason)
        if isinstance(outgoing.ticket, _Result):
            outgoing.ticket.add(reason, self._owner.tasks)

    # --- subscriptions ---

    def synchronise(self) -> None:
        """Ask the broker for what it has not confirmed yet, and again when it is time."""
        if self._subscription_timer is not None:
            self._subscription_timer.cancel()
            self._subscription_timer = None
        if not self.connection.is_connected:
            return
        now = _now()
        for ask in self._subscriptions.asks(self.name, now=now):
            send = self.connection.subscribe if ask.subscribe else self.connection.unsubscribe
            self._subscriptions.sent(self.name, send(ask.topic_filter), ask, now=now)
        due = self._subscriptions.next_deadline(self.name)
        if due is not None:
            self._subscription_timer = asyncio.get_running_loop().call_at(due + 0.001, self.synchronise)
        complete = self._subscriptions.is_complete(self.name)
        if complete and not self._was_complete:
            log.info("mqtt subscribed server=%s filters=%d", self.name, len(self._subscriptions.filters))
        self._was_complete = complete

    def counters(self) -> dict[str, int]:
        uplink, downlink = self.uplink, self.downlink
        counters = {
            "mqtt_connected": int(self.connection.is_connected),
            "mqtt_reconnects": max(self.connection.connects - 1, 0),
            "mqtt_dials": self.connection.dials,
            "subscriptions_missing": self._subscriptions.missing(self.name),
            "received": uplink.received,
            "received_again": uplink.redelivered,
            "delivered": uplink.delivered,
            "in_hand": uplink.in_hand,
            "in_hand_bytes": uplink.in_hand_bytes,
            "retried": uplink.retried,
            "malformed_topics": uplink.malformed,
            "echoes_skipped": self._echoes.skipped,
            "published": downlink.published,
            "publishes_waiting": downlink.waiting,
            "publishes_in_flight": downlink.in_flight,
        }
        if self._broker_dropped is not None:
            counters["mqtt_broker_dropped"] = self._broker_dropped
        for reason, count in uplink.given_up.items():
            counters[f"given_up_{reason}"] = count
        for reason, count in downlink.refused.items():
            counters[f"publish_refused_{reason}"] = count
        return counters


def _usage_reason(fault: UsageError) -> str:
    return TOO_LARGE if isinstance(fault, MessageTooLarge) else INVALID


def _now() -> float:
    return asyncio.get_running_loop().time()
