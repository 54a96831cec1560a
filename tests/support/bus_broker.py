"""A real broker in a thread, and a peer that speaks raw frames to it."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import zmq

from runtime import emp
from runtime.access import Access
from runtime.broker import Broker, Listener
from runtime.routing import BrokerLimits, RoutingCore
from tests.support.deadline import DEADLINE


class ThreadBroker:
    """`with ThreadBroker(tmp_path) as broker:` serves at `broker.endpoint`.

    `stop` ends it without a word to anybody, `start` begins another one (new epoch, nothing remembered).
    """

    def __init__(
        self,
        directory: Path,
        *,
        declared: Mapping[str, Iterable[str]] | None = None,
        access: Access | None = None,
        limits: emp.Limits | None = None,
        listeners: Sequence[Listener] = (),
        admitted: Iterable[str] = (),
        **options: Any,
    ) -> None:
        self.endpoint = f"ipc://{directory}/bus.sock"
        self.declared = declared
        self.access = access
        self.listeners = listeners
        self.admitted = frozenset(admitted)
        self.limits = BrokerLimits(
            limits=limits or emp.Limits(), **{"grace_seconds": 0.1, "heartbeat_seconds": 0.5, **options}
        )
        self.core: RoutingCore | None = None
        self._broker: Broker | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self.core = RoutingCore(
            epoch=secrets.token_bytes(emp.EPOCH_BYTES),
            session_base=secrets.randbits(38) << 24,
            clock_ms=int(time.clock_gettime(time.CLOCK_BOOTTIME) * 1000),
            now=time.monotonic(),
            limits=self.limits,
            declared=self.declared,
            access=self.access,
        )
        self._broker = Broker(
            self.core,
            [Listener(self.endpoint), *self.listeners],
            max_frame_bytes=2 * self.limits.limits.message_bytes + 2**20,
            admitted=self.admitted,
        )
        self._thread = threading.Thread(target=self._broker.run, name="broker")
        self._thread.start()

    def stop(self) -> None:
        broker, self._broker = self._broker, None
        if broker is not None and self._thread is not None:
            broker.stop()
            self._thread.join(DEADLINE)
            assert not self._thread.is_alive()
            broker.close()

    def status(self, name: str) -> dict[str, Any]:
        """The broker's own view of a module; {} when it knows none."""
        assert self.core is not None
        modules = self.core.statistics(time.monotonic())["modules"]
        return next((dict(module) for module in modules if module["name"] == name), {})

    def held(self) -> dict[str, Any]:
        assert self.core is not None
        return dict(self.core.statistics(time.monotonic())["broker"])

    def __enter__(self) -> ThreadBroker:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class RawDealer:
    """A DEALER without an SDK: what it is told to send, it sends. Close it, or use `with`."""

    def __init__(self, endpoint: str) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVTIMEO, int(DEADLINE * 1000))
        self._socket.connect(endpoint)

    def put(self, verb: bytes, header: Any, body: bytes | None = None) -> None:
        self._socket.send_multipart(emp.encode(verb, header, body))

    def raw(self, *frames: bytes) -> None:
        self._socket.send_multipart(list(frames))

    def get(self, verb: bytes) -> Any:
        """The header of the next message with `verb`; others before it are skipped."""
        while True:
            frames = self._socket.recv_multipart()
            if frames[0] == verb:
                return emp.decode(frames)[1]

    def hello(self, name: str, groups: Iterable[str] = ()) -> emp.Welcome:
        self.put(emp.HELLO, emp.Hello(name, list(groups), secrets.token_bytes(16), 0, 15000, "raw"))
        welcome: emp.Welcome = self.get(emp.WELCOME)
        return welcome

    def __enter__(self) -> RawDealer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close(linger=0)
