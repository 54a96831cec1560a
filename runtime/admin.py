"""Questions to the broker (ADMIN, docs/emp.md): status, tap, presence. Blocking; for the CLI and the watchdog.

No HELLO is said and no name is taken: who asks is no module. Headers are packed here by hand, because
`runtime.emp` brings msgspec along, which the watchdog has no other use for.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Final

import msgpack

from runtime.errors import EdgezmqError
from runtime.lean import small_libraries

with small_libraries():  # and without `runtime.libraries`: the watchdog has no use for msgspec
    import zmq

_ADMIN: Final = b"ADMIN/1"
_REFUSED: Final = b"REFUSED/1"

_LEASE_SECONDS: Final = 10.0
"The broker ends a stream that was not renewed for so long (docs/emp.md, ADMIN)."

RENEW_SECONDS: Final = 3.0
"Streams are renewed so often: two renewals may be lost."


class BrokerSilent(EdgezmqError):
    """The broker did not answer in time: it is not running, or it hangs."""


class AdminRefused(EdgezmqError):
    """The broker refused the question: `code` and `text`."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(f"{code}: {text}")
        self.code = code
        self.text = text


class AdminClient:
    """One connection to the broker at `endpoint`; made again by itself after a broker's restart."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        # What waits for a broker that is away would be asked too late: a few questions are enough.
        self._socket.setsockopt(zmq.SNDHWM, 16)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 50)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 500)
        self._socket.connect(endpoint)
        self._last_request = 0

    def __enter__(self) -> AdminClient:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Idempotent."""
        self._socket.close()
        self._context.term()

    @property
    def socket(self) -> zmq.Socket[bytes]:
        """For a poller; read it with `receive` only."""
        return self._socket

    def new_request(self) -> int:
        """A request id that this connection has not used."""
        self._last_request += 1
        return self._last_request

    def ask_nowait(self, op: str, body: dict[str, Any], request: int) -> bool:
        """Send one question; False when it cannot even be queued (no broker for a long time)."""
        frames = [_ADMIN, msgpack.packb([request, op, False]), msgpack.packb(body)]
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def receive(self) -> tuple[int, bool, Any] | None:
        """The next answer (request, more, body) that is there; None when there is none. Strange frames are skipped.

        Raises AdminRefused.
        """
        while True:
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return None
            answer = _decode(frames)
            if answer is not None:
                return answer

    def ask(self, op: str, body: dict[str, Any] | None = None, *, timeout_seconds: float = 2.0) -> Any:
        """The answer to one question. Raises BrokerSilent, AdminRefused."""
        request = self.new_request()
        self.ask_nowait(op, body or {}, request)
        end = time.monotonic() + timeout_seconds
        while (left := end - time.monotonic()) > 0:
            if self._socket.poll(max(1, int(left * 1000))):
                answer = self.receive()
                if answer is not None and answer[0] == request:
                    return _checked(answer[2])
        raise self._silence(timeout_seconds)

    def _silence(self, seconds: float) -> BrokerSilent:
        return BrokerSilent(f"no answer from the broker at {self._endpoint} within {seconds:g} s")

    def stream(self, op: str, body: dict[str, Any], *, timeout_seconds: float = 2.0) -> Iterator[Any]:
        """Answers to `op` as they come, until closed; the question is renewed while one waits.

        The first is the broker's own answer; it comes again after a broker's restart. Yields None about
        once a second when nothing comes, so that the caller can look at other things. Raises BrokerSilent
        when there is no first answer in time, and AdminRefused.
        """
        request = self.new_request()
        renew_at = 0.0
        answered = False
        give_up_at = time.monotonic() + timeout_seconds
        while True:
            now = time.monotonic()
            if not answered and now >= give_up_at:
                raise self._silence(timeout_seconds)
            if now >= renew_at:
                self.ask_nowait(op, body, request)
                renew_at = now + RENEW_SECONDS
            if not self._socket.poll(min(1000, max(1, int((renew_at - now) * 1000)))):
                yield None
                continue
            while (answer := self.receive()) is not None:
                answered = True
                if answer[0] == request:
                    yield _checked(answer[2])


def _checked(body: Any) -> Any:
    if isinstance(body, dict) and isinstance(body.get("error"), str):
        raise AdminRefused("error", body["error"])
    return body


def _decode(frames: list[bytes]) -> tuple[int, bool, Any] | None:
    if len(frames) < 2:
        return None
    try:
        header = msgpack.unpackb(frames[1])
        if frames[0] == _REFUSED:
            raise AdminRefused(str(header[0]), str(header[1]))
        if frames[0] != _ADMIN:
            return None
        body = msgpack.unpackb(frames[2], strict_map_key=False) if len(frames) > 2 else {}
        return int(header[0]), bool(header[2]) if len(header) > 2 else False, body
    except (ValueError, IndexError, TypeError, msgpack.UnpackException):
        return None
