"""The broker process: a ROUTER per endpoint, and RoutingCore behind it. `python -m runtime.broker`.

A plain loop of non-blocking pyzmq calls (zmq.asyncio would cost two to three times as much per frame). The loop
reads a bounded number of frames, lets time pass in the core, sends what came of it, and sleeps in epoll
until a socket, a watched process or a signal wakes it. libzmq's ROUTER takes turns among its peers, so one
peer that floods gets its share of a turn and no more.
"""

from __future__ import annotations

import runtime.libraries  # noqa: F401  (first: see there)

# isort: split

import contextlib
import faulthandler
import gc
import logging
import os
import pwd
import select
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

import zmq

from runtime import emp, locks, logs, memory, zap
from runtime.access import Access, Credentials, Open, Policy, Rule
from runtime.config import NodeConfig, load
from runtime.errors import ConfigError, EdgezmqError
from runtime.exits import stopped_status
from runtime.home import Home, find_home
from runtime.routing import BrokerLimits, Life, Out, RoutingCore
from runtime.routing_state import Peer
from runtime.sockets import is_readable, receive_routed, send_routed

log = logging.getLogger("runtime.broker")

TURN_MESSAGES: Final = 256
"Multipart messages read before what they caused is sent."
STALL_SECONDS: Final = 1.0
"After a longer pause of our own (SIGSTOP, swap) nobody is called silent before all that is pending was read (rule 23)."
AFTER_STALL_SECONDS: Final = 0.25
SEND_HWM: Final = 100_000
"Frames queued for one peer. Windows keep a sane peer far below; one that reaches it is cut off and asked who it is."
SOCKET_MODE: Final = 0o660


class Listener(NamedTuple):
    """One endpoint of the bus."""

    endpoint: str
    "ipc://PATH or tcp://HOST:PORT."
    name: str = ""
    "The one module it is for; empty: all."
    secret_key: str = ""
    "The broker's CURVE secret key (Z85): only who has an admitted key of its own comes in."
    mode: int = SOCKET_MODE
    "Of an ipc socket's file."
    owner: int = -1
    "The user whom that file is given to; -1: it stays ours."


class Broker:
    """Binds `listeners` and serves until `stop`. Every frame a peer sends is answered or handled by the core.

    `admitted`: the CURVE public keys (Z85) that may connect over tcp.
    """

    def __init__(
        self,
        core: RoutingCore,
        listeners: Sequence[Listener],
        *,
        max_frame_bytes: int,
        admitted: frozenset[str] = frozenset(),
    ) -> None:
        self._core = core
        self._context = zmq.Context(io_threads=1)
        self._sockets: list[zmq.Socket[bytes]] = []
        self._names = [listener.name for listener in listeners]
        self._admitted = admitted
        self._zap: zmq.Socket[bytes] | None = None
        self._poll = select.epoll()
        self._watched: dict[int, tuple[str, int]] = {}  # pidfd -> name, pid
        self._dead: list[tuple[str, int]] = []
        self._stopping = False
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._poll.register(self._wake_read, select.EPOLLIN)
        try:
            if any(listener.secret_key for listener in listeners):
                self._zap = self._context.socket(zmq.REP)
                self._zap.setsockopt(zmq.LINGER, 0)
                self._zap.bind(zap.ENDPOINT)
                self._poll.register(int(self._zap.getsockopt(zmq.FD)), select.EPOLLIN)
            for listener in listeners:
                self._sockets.append(self._bind(listener, max_frame_bytes))
        except zmq.ZMQError:
            self.close()
            raise

    def _bind(self, listener: Listener, max_frame_bytes: int) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        # A ROUTER drops what it cannot route and says nothing; with this option send raises
        # EHOSTUNREACH instead (zmq_setsockopt(3)) and the core keeps the message.
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, SEND_HWM)
        socket.setsockopt(zmq.BACKLOG, 1024)
        # libzmq cuts the connection of a peer that sends more; well above what we answer with `too-large`.
        socket.setsockopt(zmq.MAXMSGSIZE, max_frame_bytes)
        if listener.secret_key:
            socket.setsockopt(zmq.CURVE_SERVER, 1)
            socket.setsockopt_string(zmq.CURVE_SECRETKEY, listener.secret_key)
            socket.setsockopt_string(zmq.ZAP_DOMAIN, "edgezmq")
            # Where the ZAP handler does not answer, nobody comes in (zmq_setsockopt(3)).
            socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        socket.bind(listener.endpoint)
        if listener.endpoint.startswith("ipc://"):
            path = listener.endpoint.removeprefix("ipc://")
            if listener.owner >= 0:
                os.chown(path, listener.owner, -1)
            os.chmod(path, listener.mode)
        self._poll.register(int(socket.getsockopt(zmq.FD)), select.EPOLLIN)
        return socket

    def stop(self) -> None:
        """End `run` soon. May be called from a signal handler."""
        self._stopping = True
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_write, b"x")

    def close(self) -> None:
        for socket in self._sockets:
            socket.close(linger=0)
        if self._zap is not None:
            self._zap.close(linger=0)
        self._context.term()
        for fd in self._watched:
            os.close(fd)
        self._watched.clear()
        self._poll.close()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def run(self) -> None:
        core = self._core
        clock = time.monotonic
        deadline = wake_due = clock()
        while not self._stopping:
            now = clock()
            if now - wake_due > STALL_SECONDS:
                # We were stopped. What our peers sent meanwhile is still on its way through libzmq.
                deadline = max(deadline, now + AFTER_STALL_SECONDS)
            drained = True
            busy = self._zap is not None and self._admit()
            for index, socket in enumerate(self._sockets):
                messages = self._read(index, socket)
                busy = busy or messages > 0
                drained = drained and messages < TURN_MESSAGES
            now = clock()
            if drained:
                # What the dead had sent before is read by now.
                while self._dead:
                    core.died(*self._dead.pop(), now)
            if now >= deadline:
                core.expire(now)
                deadline = core.next_deadline(now)
            busy |= self._perform(now)
            if core.life:
                self._note()
            wake_due = clock()
            if not busy:
                # Nothing read and nothing sent since the sockets were asked: the descriptors tell what comes.
                timeout = max(0.0, min(deadline, core.paced_until) - wake_due)
                wake_due += timeout
                self._wait(timeout)

    def _admit(self) -> bool:
        """Answer libzmq about the keys of new connections; whether it had asked."""
        assert self._zap is not None
        asked = False
        while is_readable(self._zap):
            asked = True
            answer, refused = zap.answer(self._zap.recv_multipart(), self._admitted)
            if refused:
                log.warning("turned away key=%s", zap.fingerprint(refused))
            self._zap.send_multipart(answer)
        return asked

    def _read(self, index: int, socket: zmq.Socket[bytes]) -> int:
        """Give the core what has come, at most TURN_MESSAGES; how many it was."""
        core = self._core
        clock = time.monotonic
        name = self._names[index]
        count = 0
        while count < TURN_MESSAGES and is_readable(socket):
            routing_id, frames, last = receive_routed(socket)
            peer: Peer = (index, routing_id)
            core.receive(peer, frames, clock(), None if core.is_attached(peer) else _credentials(last, name))
            count += 1
        return count

    def _perform(self, now: float) -> bool:
        """Send what the core wants sent; whether there was anything."""
        outs = self._core.flush(now)
        busy = bool(outs)
        while outs:
            for out in outs:
                self._send(out, now)
            outs = self._core.flush(now)
        return busy

    def _send(self, out: Out, now: float) -> None:
        socket_index, routing_id = out.peer
        try:
            send_routed(self._sockets[socket_index], routing_id, out.frames)
        except zmq.Again:
            log.warning("peer does not read, cut off after frames=%d", SEND_HWM)
            self._core.lost(out.peer, now)
        except zmq.ZMQError as fault:
            if fault.errno != zmq.EHOSTUNREACH:
                raise
            self._core.lost(out.peer, now)

    def _wait(self, seconds: float) -> None:
        for fd, _ in self._poll.poll(seconds):
            dead = self._watched.pop(fd, None)
            if dead is not None:
                self._poll.unregister(fd)
                os.close(fd)
                self._dead.append(dead)
            elif fd == self._wake_read:
                with contextlib.suppress(BlockingIOError):
                    os.read(fd, 4096)

    def _note(self) -> None:
        life, self._core.life = self._core.life, []
        for event in life:
            level = logging.WARNING if event.event in ("silent", "fenced") else logging.INFO
            log.log(level, "%s module=%s pid=%d", event.event, event.name, event.pid)
            if event.event in ("attached", "back"):
                self._watch(event)

    def _watch(self, event: Life) -> None:
        """Know of the death of a process at once. Where its pid is not visible, PING silence has to serve."""
        pid = event.credentials.pid
        if pid <= 0 or (event.name, pid) in self._watched.values():
            return
        try:
            fd = os.pidfd_open(pid)
        except OSError:
            return
        self._watched[fd] = (event.name, pid)
        self._poll.register(fd, select.EPOLLIN)


def _credentials(frame: zmq.Frame, socket_name: str = "") -> Credentials:
    """What libzmq knows of the peer: over ipc `Peer-Address` is `localhost:uid:gid:pid`, over tcp the address.

    With CURVE `User-Id` is the key, as `_admit` has told libzmq.
    """
    try:
        key = frame.get("User-Id")
        if key:
            return Credentials(key=str(key), socket=socket_name)
    except zmq.ZMQError:
        pass  # no ZAP on this socket
    try:
        parts = frame.get("Peer-Address").split(":")  # type: ignore[union-attr]  # a str for this property
        if len(parts) == 4 and not parts[0][:1].isdigit():
            uid, gid, pid = map(int, parts[1:])
            return Credentials(uid, gid, pid, socket=socket_name)
    except (zmq.ZMQError, ValueError):
        pass
    return Credentials(socket=socket_name)


def make_core(config: NodeConfig, now: float) -> RoutingCore:
    """The core for a node's configuration, with a fresh epoch."""
    section = config.runtime.broker
    return RoutingCore(
        epoch=os.urandom(emp.EPOCH_BYTES),
        session_base=int.from_bytes(os.urandom(4), "big") << 24,
        clock_ms=int(time.clock_gettime(time.CLOCK_BOOTTIME) * 1000),
        now=now,
        limits=BrokerLimits(
            limits=emp.Limits(
                section.message_bytes,
                section.window_messages,
                section.window_bytes,
                section.batch_messages,
                section.batch_bytes,
            ),
            byte_budget=section.byte_budget,
            heartbeat_seconds=section.heartbeat_seconds,
            grace_seconds=section.grace_seconds,
            absent_limit_seconds=section.absent_limit_seconds,
            poison_after_deaths=section.poison_deaths,
        ),
        declared=config.declared_modules(),
        access=make_access(config),
    )


def make_access(config: NodeConfig) -> Access:
    """Who may do what, as `runtime.policy` says. Raises ConfigError for a user that this host does not know."""
    policy = config.runtime.policy
    if not policy.enable:
        return Open()
    declared = config.declared_modules()
    return Policy(
        {
            name: Rule(
                uids=frozenset(_uid(name, user) for user in rule.users),
                keys=frozenset(rule.keys),
                groups=frozenset(declared.get(name, ())),
                destinations=frozenset(rule.to),
                has_own_socket=rule.own_socket,
                messages_per_second=rule.messages_per_second,
                bytes_per_second=rule.bytes_per_second,
            )
            for name, rule in policy.modules.items()
        },
        own_uid=os.geteuid(),
    )


def _uid(name: str, user: str | int) -> int:
    if isinstance(user, int):
        return user
    try:
        return pwd.getpwnam(user).pw_uid
    except KeyError as fault:
        raise ConfigError(f"runtime.policy.modules.{name}.users", user, "a user of this host, or a uid") from fault


def listeners(config: NodeConfig, home: Home, endpoint: str) -> list[Listener]:
    """The endpoints of the bus: `endpoint`, those of the network, and the sockets that are one module's own.

    Makes the broker's CURVE keys at the first need. Raises ConfigError, KeyFault, OSError.
    """
    found = [Listener(endpoint)]
    policy = config.runtime.policy
    if config.runtime.bus.listen:
        from runtime import keys

        pair = keys.load_or_make(home.curve, keys.BROKER)
        log.info("keys public=%s fingerprint=%s", pair.public, zap.fingerprint(pair.public))
        found += [Listener(address, secret_key=pair.secret) for address in config.runtime.bus.listen]
    own = [(name, rule) for name, rule in policy.modules.items() if policy.enable and rule.own_socket]
    if own:
        home.open_own_sockets()
    for name, rule in own:
        uids = {_uid(name, user) for user in rule.users}
        # Without root the file cannot be given away: anybody may open it then, and HELLO tells who it is.
        is_given = os.geteuid() == 0 and len(uids) == 1
        found.append(
            Listener(
                f"ipc://{home.own_socket(name)}",
                name,
                mode=0o600 if is_given or uids == {os.geteuid()} else 0o666,
                owner=uids.pop() if is_given else -1,
            )
        )
    return found


def serve(config: NodeConfig, home: Home, *, endpoint: str | None = None) -> None:
    """Hold the lock, bind, and run until SIGTERM or SIGINT. Raises AlreadyRunning, zmq.ZMQError."""
    endpoint = endpoint or config.endpoint(home)
    # Before the bind: a second bind on the same ipc path would silently take the first one's place (rule 23).
    with locks.hold(home.lock("broker")):
        if endpoint.startswith("ipc://"):
            Path(endpoint.removeprefix("ipc://")).parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        core = make_core(config, time.monotonic())
        admitted = frozenset(key for rule in config.runtime.policy.modules.values() for key in rule.keys)
        broker = Broker(
            core,
            listeners(config, home, endpoint),
            max_frame_bytes=2 * config.runtime.broker.message_bytes + 2**20,
            admitted=admitted,
        )
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: broker.stop())
        log.info("serving endpoint=%s epoch=%s", endpoint, core.epoch.hex())
        memory.settle()
        gc.set_threshold(20_000, 20, 50)
        try:
            broker.run()
        finally:
            broker.close()
        log.info("stopped")


def main() -> int:
    """Entry point of `python -m runtime.broker`."""
    locks.die_with_parent()
    faulthandler.enable()
    home = find_home()
    try:
        home.prepare()
        config = load()
        logs.setup("runtime.broker", config.runtime.log.level)
        serve(config, home)
    except EdgezmqError as fault:
        print(f"broker: {fault}", file=sys.stderr)  # noqa: T201  (logging may not be set up)
        return 2
    except zmq.ZMQError as fault:
        print(f"broker: cannot bind the bus: {fault}", file=sys.stderr)  # noqa: T201
        return 2
    return stopped_status()


if __name__ == "__main__":
    sys.exit(main())
