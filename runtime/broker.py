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
import math
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import zmq

from runtime import emp, locks, logs, memory, zap
from runtime.access import Access, Credentials, Pace
from runtime.config import NodeConfig, load
from runtime.errors import EdgezmqError
from runtime.exits import stopped_status
from runtime.home import Home, find_home
from runtime.policy import admitted_keys, make_access, mark_of, tell, uids_of
from runtime.routing import BrokerLimits, Life, Out, RoutingCore
from runtime.routing_state import Peer
from runtime.sockets import is_readable, receive_routed, send_routed

log = logging.getLogger("runtime.broker")

TURN_MESSAGES: Final = 256
"Multipart messages read before what they caused is sent."
OWN_TURN_MESSAGES: Final = 32
"Likewise, of a socket that is one module's own: who floods it is not to fill the turns in which others are served."
STRANGERS_PER_SECOND: Final = 500.0
"Frames of peers that have not said HELLO, on a module's own socket: after a second's worth it is read at this rate."
TURN_KEYS: Final = 64
"Connections over tcp whose key is looked at in one turn."
MAX_TOLD_KEYS: Final = 256
STALL_SECONDS: Final = 1.0
"After a longer pause of our own (SIGSTOP, swap) nobody is called silent before all that is pending was read (rule 23)."
AFTER_STALL_SECONDS: Final = 0.25
SEND_HWM: Final = 100_000
"Frames queued for one peer. Windows keep a sane peer far below; one that reaches it is cut off and asked who it is."
_TELL_UNREAD_SECONDS: Final = 10.0
SOCKET_MODE: Final = 0o660
HANDSHAKE_MS: Final = 5000
"Who comes over tcp and does not prove a key by then holds a descriptor of ours no longer."
LEAVE_SECONDS: Final = 2.0
"For modules to learn why, before an endpoint that configuration has given up is closed."


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


class NewPolicy(NamedTuple):
    """What a running broker may be given in place of what it began with."""

    access: Access
    declared: Mapping[str, Iterable[str]]
    listeners: Sequence[Listener]
    admitted: frozenset[str]


class Broker:
    """Binds `listeners` and serves until `stop`. Every frame a peer sends is answered or handled by the core.

    `admitted`: the CURVE public keys (Z85) that may connect over tcp. `renew` is called in a turn of its own after
    `ask_renewal`, and gives the policy to `adopt`.
    """

    def __init__(
        self,
        core: RoutingCore,
        listeners: Sequence[Listener],
        *,
        max_frame_bytes: int,
        admitted: frozenset[str] = frozenset(),
        renew: Callable[[Broker], None] | None = None,
    ) -> None:
        self._core = core
        self._max_frame_bytes = max_frame_bytes
        self._renew = renew
        self._renewal_asked = False
        self._context = zmq.Context(io_threads=1)
        self._listeners: list[Listener] = []
        self._sockets: list[zmq.Socket[bytes] | None] = []  # by a peer's number; None: given up and closed
        self._ending: dict[int, float] = {}  # given up, and closed at that time
        self._admitted = admitted
        self._zap: zmq.Socket[bytes] | None = None
        self._turned_away: set[str] = set()
        self._poll = select.epoll()
        self._watched: dict[int, tuple[str, int]] = {}  # pidfd -> name, pid
        self._dead: list[tuple[str, int]] = []
        self._stopping = False
        self._strangers: dict[int, Pace] = {}  # by index, of sockets that are one module's own
        self._resume_at = math.inf
        self._unread = 0
        self._tell_unread_at = 0.0
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._poll.register(self._wake_read, select.EPOLLIN)
        try:
            for listener in listeners:
                self._sockets.append(self._bind(listener))
                self._listeners.append(listener)
        except (zmq.ZMQError, OSError):
            self.close()
            raise

    def _open_zap(self) -> None:
        """Before the first socket with CURVE is bound: libzmq asks from then on."""
        if self._zap is None:
            self._zap = self._context.socket(zmq.REP)
            self._zap.setsockopt(zmq.LINGER, 0)
            self._zap.bind(zap.ENDPOINT)
            self._poll.register(int(self._zap.getsockopt(zmq.FD)), select.EPOLLIN)

    def _bind(self, listener: Listener) -> zmq.Socket[bytes]:
        if listener.secret_key:
            self._open_zap()
        socket: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        # A ROUTER drops what it cannot route and says nothing; with this option send raises
        # EHOSTUNREACH instead (zmq_setsockopt(3)) and the core keeps the message.
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, SEND_HWM)
        socket.setsockopt(zmq.BACKLOG, 1024)
        # libzmq cuts the connection of a peer that sends more; well above what we answer with `too-large`.
        socket.setsockopt(zmq.MAXMSGSIZE, self._max_frame_bytes)
        if listener.secret_key:
            socket.setsockopt(zmq.CURVE_SERVER, 1)
            socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
            socket.setsockopt_string(zmq.CURVE_SECRETKEY, listener.secret_key)
            socket.setsockopt_string(zmq.ZAP_DOMAIN, "edgezmq")
            # Where the ZAP handler does not answer, nobody comes in (zmq_setsockopt(3)).
            socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        try:
            socket.bind(listener.endpoint)
            _give(listener)
        except (zmq.ZMQError, OSError):
            socket.close(linger=0)
            raise
        self._poll.register(int(socket.getsockopt(zmq.FD)), select.EPOLLIN)
        return socket

    def stop(self) -> None:
        """End `run` soon. May be called from a signal handler."""
        self._stopping = True
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_write, b"x")

    def ask_renewal(self) -> None:
        """Have `renew` called soon. May be called from a signal handler."""
        self._renewal_asked = True
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_write, b"x")

    def adopt(self, policy: NewPolicy) -> None:
        """Take a policy over as a whole. Raises zmq.ZMQError, OSError: then all is as it was.

        Who comes through an endpoint that it gives up is told, and cut off after LEAVE_SECONDS.
        """
        present = {
            _place(listener): index
            for index, listener in enumerate(self._listeners)
            if self._sockets[index] is not None and index not in self._ending
        }
        wanted = {_place(listener): listener for listener in policy.listeners}
        for index in list(self._ending):
            if _place(self._listeners[index]) in wanted:
                self._close(index)  # its address is needed again
        changed = [
            index
            for place, index in present.items()
            if wanted.get(place, self._listeners[index]) != self._listeners[index]
        ]
        bound = len(self._sockets)
        try:
            for place, listener in wanted.items():
                if place not in present:
                    self._sockets.append(self._bind(listener))
                    self._listeners.append(listener)
            for index in changed:
                _give(wanted[_place(self._listeners[index])])
        except (zmq.ZMQError, OSError):
            for index in range(bound, len(self._sockets)):
                _remove(self._listeners[index])
                self._close(index)
            for index in changed:
                with contextlib.suppress(OSError):
                    _give(self._listeners[index])
            raise
        for index in changed:
            self._listeners[index] = wanted[_place(self._listeners[index])]
        given_up = [index for place, index in present.items() if place not in wanted]
        now = time.monotonic()
        for index in given_up:
            _remove(self._listeners[index])
            self._ending[index] = now + LEAVE_SECONDS
        self._admitted = policy.admitted
        self._core.adopt(policy.access, policy.declared, now, given_up)

    def _close(self, index: int) -> None:
        socket, self._sockets[index] = self._sockets[index], None
        self._strangers.pop(index, None)
        self._ending.pop(index, None)
        if socket is not None:
            self._poll.unregister(int(socket.getsockopt(zmq.FD)))
            socket.close(linger=0)

    def close(self) -> None:
        for socket in self._sockets:
            if socket is not None:
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
            if self._renewal_asked:
                self._renewal_asked = False
                if self._renew is not None:
                    self._renew(self)
            if self._ending:
                for index in [index for index, due in self._ending.items() if due <= now]:
                    self._close(index)
            busy = self._zap is not None and self._admit()
            self._resume_at = math.inf
            for index, socket in enumerate(self._sockets):
                if socket is None:
                    continue
                messages = self._read(index, socket)
                busy = busy or messages > 0
                drained = drained and messages < self._turn(index)
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
                timeout = max(0.0, min(deadline, core.paced_until, self._resume_at) - wake_due)
                wake_due += timeout
                self._wait(timeout)

    def _admit(self) -> bool:
        """Answer libzmq about the keys of new connections; whether it had asked."""
        assert self._zap is not None
        asked = False
        for _ in range(TURN_KEYS):  # those who are in get their turn, however many knock
            if not is_readable(self._zap):
                break
            asked = True
            answer, refused = zap.answer(self._zap.recv_multipart(), self._admitted)
            self._zap.send_multipart(answer)
            if answer[2] != b"200":
                self._core.turned_away()
            if refused and refused not in self._turned_away:
                if len(self._turned_away) >= MAX_TOLD_KEYS:
                    self._turned_away.clear()
                self._turned_away.add(refused)  # told once: it tries again many times a second
                log.warning("turned away key=%s", zap.fingerprint(refused))
        return asked

    def _read(self, index: int, socket: zmq.Socket[bytes]) -> int:
        """Give the core what has come, at most one turn's worth; how many it was."""
        core = self._core
        clock = time.monotonic
        name = self._listeners[index].name
        count, turn = 0, self._turn(index)
        pace = self._strangers.setdefault(index, Pace(STRANGERS_PER_SECOND, 0)) if name else None
        # Asked in any case, for it also takes back libzmq's signal, which would wake us again at once.
        if is_readable(socket) and pace is not None:
            now = clock()
            due = pace.due_at(now)
            if due > now:
                self._resume_at = min(self._resume_at, due)
                return 0
        while count < turn and is_readable(socket):
            routing_id, frames, last = receive_routed(socket)
            peer: Peer = (index, routing_id)
            if core.is_attached(peer):
                core.receive(peer, frames, clock())
            else:
                core.receive(peer, frames, clock(), _credentials(last, name))
                if pace is not None:
                    pace.take(1, 0)
            count += 1
        return count

    def _turn(self, index: int) -> int:
        return OWN_TURN_MESSAGES if self._listeners[index].name else TURN_MESSAGES

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
        socket = self._sockets[socket_index]
        if socket is None:
            self._core.lost(out.peer, now)
            return
        try:
            send_routed(socket, routing_id, out.frames)
        except zmq.Again:
            self._tell_unread(now)
            self._core.lost(out.peer, now)
        except zmq.ZMQError as fault:
            if fault.errno != zmq.EHOSTUNREACH:
                raise
            self._core.lost(out.peer, now)

    def _tell_unread(self, now: float) -> None:
        """Of a peer that sends on and never reads, this is true of each answer: the log is to have it now and then."""
        self._unread += 1
        if now >= self._tell_unread_at:
            log.warning("peer does not read, cut off after frames=%d times=%d", SEND_HWM, self._unread)
            self._unread = 0
            self._tell_unread_at = now + _TELL_UNREAD_SECONDS

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
            level = logging.WARNING if event.event in ("silent", "fenced", "denied") else logging.INFO
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


def _place(listener: Listener) -> tuple[str, str, str]:
    """What a socket is bound for; mode and owner of its file can change while it is."""
    return listener.endpoint, listener.name, listener.secret_key


def _give(listener: Listener) -> None:
    """Open an ipc socket's file to those whom it is for."""
    if listener.endpoint.startswith("ipc://"):
        path = listener.endpoint.removeprefix("ipc://")
        if listener.owner >= 0 or os.geteuid() == 0:
            os.chown(path, listener.owner if listener.owner >= 0 else os.geteuid(), -1, follow_symlinks=False)
        os.chmod(path, listener.mode)


def _remove(listener: Listener) -> None:
    """Nobody is to come that way any more."""
    if listener.endpoint.startswith("ipc://"):
        Path(listener.endpoint.removeprefix("ipc://")).unlink(missing_ok=True)


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
    own = [name for name, rule in policy.modules.items() if policy.enable and rule.own_socket]
    if own:
        home.open_own_sockets()
    for name in own:
        uids = uids_of(config, name)
        # Without root the file cannot be given away: anybody may open it then, and HELLO tells who it is.
        is_given = os.geteuid() == 0 and len(uids) == 1
        found.append(
            Listener(
                f"ipc://{home.own_socket(name)}",
                name,
                mode=0o600 if is_given or uids == {os.geteuid()} else 0o666,
                owner=next(iter(uids)) if is_given else -1,
            )
        )
    return found


class Renewal:
    """Reads run/node.json again and gives the broker its policy, unless it is the one in force or a faulty one."""

    def __init__(self, config: NodeConfig, home: Home, endpoint: str) -> None:
        self._mark = mark_of(config)
        self._home = home
        self._endpoint = endpoint

    def __call__(self, broker: Broker) -> None:
        fault = ""
        try:
            config = load(self._home.path)
            mark = mark_of(config)
            if mark != self._mark:
                broker.adopt(
                    NewPolicy(
                        make_access(config),
                        config.declared_modules(),
                        listeners(config, self._home, self._endpoint),
                        admitted_keys(config),
                    )
                )
                self._mark = mark
                log.info("policy taken over mark=%s rules=%d", mark, len(config.runtime.policy.modules))
        except (EdgezmqError, zmq.ZMQError, OSError) as why:
            fault = str(why)
            log.error("policy not taken over, the one before stays: %s", fault)
        tell(self._home, "broker", self._mark, fault)


def serve(config: NodeConfig, home: Home, *, endpoint: str | None = None) -> None:
    """Hold the lock, bind, and run until SIGTERM or SIGINT. Raises AlreadyRunning, zmq.ZMQError."""
    endpoint = endpoint or config.endpoint(home)
    # Before the bind: a second bind on the same ipc path would silently take the first one's place (rule 23).
    with locks.hold(home.lock("broker")):
        if endpoint.startswith("ipc://"):
            Path(endpoint.removeprefix("ipc://")).parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        core = make_core(config, time.monotonic())
        broker = Broker(
            core,
            listeners(config, home, endpoint),
            max_frame_bytes=2 * config.runtime.broker.message_bytes + 2**20,
            admitted=admitted_keys(config),
            renew=Renewal(config, home, endpoint),
        )
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: broker.stop())
        signal.signal(signal.SIGHUP, lambda *_: broker.ask_renewal())
        # A policy that was written between our reading and the signal's handler would be missed.
        broker.ask_renewal()
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
