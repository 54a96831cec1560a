"""The control API: HTTP/1.1 on loopback. docs/cloudsim.md lists the requests."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Annotated, Any, Final
from urllib.parse import parse_qsl, unquote, urlsplit

import msgspec

from cloudsim.certificate_api import TOKEN_SECONDS, ApiFault
from cloudsim.faults import Fault
from cloudsim.hub import Authorization
from cloudsim.wire import Undecodable, decode_as_go

if TYPE_CHECKING:
    from cloudsim.certificate_server import CertificateServer
    from cloudsim.sim import CloudSim

log = logging.getLogger("cloudsim.control")

MAX_HEAD_BYTES: Final = 32 * 1024
MAX_BODY_BYTES: Final = 80 * 2**20
"Above the largest message worth sending (64 MiB was measured down a real hub)."
IDLE_SECONDS: Final = 60.0
"A connection that sends no request for so long is closed."
MAX_BATCH: Final = 10_000


class Problem(Exception):
    """The request is answered with this status and text."""

    def __init__(self, status: HTTPStatus, text: str) -> None:
        super().__init__(text)
        self.status = status


@dataclass(frozen=True, slots=True)
class Call:
    """One request."""

    method: str
    path: str
    query: dict[str, str]
    body: bytes
    keep_alive: bool

    def number(self, name: str, default: int) -> int:
        text = self.query.get(name)
        if text is None:
            return default
        if not text.isascii() or not text.isdigit():
            raise Problem(HTTPStatus.BAD_REQUEST, f"{name}={text!r}: expected a whole number from 0 on")
        return int(text[:18])

    def flag(self, name: str, default: bool) -> bool:
        text = self.query.get(name, "1" if default else "0")
        if text not in ("0", "1"):
            raise Problem(HTTPStatus.BAD_REQUEST, f"{name}={text!r}: expected 0 or 1")
        return text == "1"


_Answer = tuple[HTTPStatus, Any]
_Handler = Callable[[Call, tuple[str, ...]], Awaitable[_Answer]]


class _Rules(msgspec.Struct, forbid_unknown_fields=True):
    """What `POST /rules` takes (`CloudSim.set_rules`)."""

    node_limit: Annotated[int, msgspec.Meta(ge=0)] | None = None
    authorization: Authorization | None = None
    keepalive_seconds: Annotated[float, msgspec.Meta(gt=0)] | None = None
    replacement_race: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None


class ControlServer:
    """Serves the control API of a `CloudSim`."""

    def __init__(self, sim: CloudSim, host: str, port: int) -> None:
        self._sim = sim
        self._host = host
        self.port = port
        self._server: asyncio.Server | None = None
        self._clients: set[asyncio.Task[None]] = set()
        self._routes: list[tuple[str, re.Pattern[str], _Handler]] = [
            ("GET", re.compile(r"/health"), self._health),
            ("GET", re.compile(r"/sessions"), self._sessions),
            ("POST", re.compile(r"/sessions/([^/]+)/kick"), self._kick),
            ("POST", re.compile(r"/nodes/([^/]+)/messages"), self._message),
            ("POST", re.compile(r"/nodes/([^/]+)/messages/batch"), self._batch),
            ("POST", re.compile(r"/nodes/([^/]+)/certificate"), self._certificate),
            ("DELETE", re.compile(r"/nodes/([^/]+)"), self._delete_node),
            ("PUT", re.compile(r"/objects/([^/]+)/([^/]+)/([^/]+)"), self._put_object),
            ("DELETE", re.compile(r"/objects/([^/]+)/([^/]+)/([^/]+)"), self._remove_object),
            ("POST", re.compile(r"/rules"), self._rules),
            ("GET", re.compile(r"/faults"), self._list_faults),
            ("POST", re.compile(r"/faults"), self._fault),
            ("POST", re.compile(r"/tokens"), self._token),
            ("POST", re.compile(r"/certificate-api/faults"), self._certificate_fault),
            ("PUT", re.compile(r"/certificate-api/signing-seconds"), self._signing_seconds),
            ("GET", re.compile(r"/received"), self._received),
            ("DELETE", re.compile(r"/received"), self._forget),
        ]

    async def open(self) -> None:
        """Listen. Raises OSError when the port is in use."""
        self._server = await asyncio.start_server(self._accept, self._host, self.port, limit=MAX_HEAD_BYTES)
        self.port = self._server.sockets[0].getsockname()[1]

    async def aclose(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for client in list(self._clients):
            client.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None  # start_server runs this in a task
        self._clients.add(task)
        try:
            while await self._serve(reader, writer):
                pass
        except (OSError, asyncio.IncompleteReadError):
            pass  # the client went away or sent nothing more
        except asyncio.CancelledError:
            pass  # aclose(); asyncio would log the cancelled task of a stream server
        finally:
            self._clients.discard(task)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request; whether another may follow."""
        call: Call | None = None
        try:
            async with asyncio.timeout(IDLE_SECONDS):
                call = await _read_call(reader, writer)
            if call.method == "GET" and call.path == "/events":
                await self._events(call, writer)
                return False
            status, value = await self._dispatch(call)
        except Problem as problem:
            status, value = problem.status, {"error": str(problem)}
        except (OSError, asyncio.IncompleteReadError):
            raise  # the client went, or took too long (TimeoutError is an OSError)
        except Exception as fault:
            # A bug in one request must not end the double that others use.
            log.exception("control request failed")
            status, value = HTTPStatus.INTERNAL_SERVER_ERROR, {"error": repr(fault)}
        keep_alive = call is not None and call.keep_alive
        body = msgspec.json.encode(value) + b"\n"
        writer.write(
            f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: {'keep-alive' if keep_alive else 'close'}\r\n\r\n".encode()
            + body
        )
        await writer.drain()
        return keep_alive

    async def _dispatch(self, call: Call) -> _Answer:
        allowed = []
        for method, pattern, handler in self._routes:
            match = pattern.fullmatch(call.path)
            if match is None:
                continue
            if method == call.method:
                return await handler(call, tuple(unquote(part) for part in match.groups()))
            allowed.append(method)
        if allowed:
            raise Problem(HTTPStatus.METHOD_NOT_ALLOWED, f"{call.path} takes {', '.join(allowed)}")
        raise Problem(HTTPStatus.NOT_FOUND, f"nothing at {call.path}; see docs/cloudsim.md")

    # --- the requests ----------------------------------------------------------------------------

    async def _health(self, call: Call, _: tuple[str, ...]) -> _Answer:
        sim = self._sim
        return HTTPStatus.OK, {
            "ok": True,
            "url": sim.url,
            **sim.ports(),
            "directory": str(sim.config.directory),
            "hub_version": sim.config.hub_version.value,
            "served": sum(session["state"] == "served" for session in sim.sessions()),
        }

    async def _sessions(self, call: Call, _: tuple[str, ...]) -> _Answer:
        return HTTPStatus.OK, {"sessions": self._sim.sessions()}

    async def _kick(self, call: Call, names: tuple[str, ...]) -> _Answer:
        self._sim.kick(names[0])
        return HTTPStatus.OK, {}

    async def _delete_node(self, call: Call, names: tuple[str, ...]) -> _Answer:
        self._sim.delete_node(names[0])
        return HTTPStatus.OK, {}

    async def _certificate(self, call: Call, names: tuple[str, ...]) -> _Answer:
        try:
            pair = self._sim.certificate(names[0])
        except ValueError as fault:
            raise Problem(HTTPStatus.BAD_REQUEST, str(fault)) from fault
        return HTTPStatus.OK, {
            "ca": str(self._sim.ca.certificate),
            "certificate": str(pair.certificate),
            "key": str(pair.key),
        }

    async def _message(self, call: Call, names: tuple[str, ...]) -> _Answer:
        result = self._send(names[0], call.body)
        return (HTTPStatus.ACCEPTED if result["dropped"] is None else HTTPStatus.CONFLICT), result

    async def _batch(self, call: Call, names: tuple[str, ...]) -> _Answer:
        try:
            items = msgspec.json.decode(call.body, type=list[msgspec.Raw])
        except (ValueError, RecursionError) as fault:
            raise Problem(HTTPStatus.BAD_REQUEST, f"expected a JSON array of messages: {fault}") from fault
        if len(items) > MAX_BATCH:
            raise Problem(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"{len(items)} messages, at most {MAX_BATCH}")
        return HTTPStatus.ACCEPTED, {"results": [self._send(names[0], bytes(item)) for item in items]}

    def _send(self, node: str, body: bytes) -> dict[str, str | None]:
        try:
            return self._sim.send(node, decode_as_go(body))
        except (Undecodable, ValueError, TypeError) as fault:
            raise Problem(HTTPStatus.BAD_REQUEST, f"not a message: {fault}") from fault

    async def _put_object(self, call: Call, names: tuple[str, ...]) -> _Answer:
        try:
            content = msgspec.json.decode(call.body, type=dict[str, Any])
            namespace, kind, name = names
            self._sim.put_object(namespace, kind, name, content, node=call.query.get("node", ""))
        except (ValueError, RecursionError) as fault:
            raise Problem(HTTPStatus.BAD_REQUEST, str(fault)) from fault
        return HTTPStatus.OK, {}

    async def _remove_object(self, call: Call, names: tuple[str, ...]) -> _Answer:
        try:
            namespace, kind, name = names
            found = self._sim.remove_object(namespace, kind, name, node=call.query.get("node", ""))
        except ValueError as fault:
            raise Problem(HTTPStatus.BAD_REQUEST, str(fault)) from fault
        if not found:
            raise Problem(HTTPStatus.NOT_FOUND, f"no object {'/'.join(names)}")
        return HTTPStatus.OK, {}

    async def _rules(self, call: Call, _: tuple[str, ...]) -> _Answer:
        try:
            wanted = msgspec.json.decode(call.body, type=_Rules)
        except (ValueError, RecursionError) as error:
            raise Problem(HTTPStatus.BAD_REQUEST, f"not rules: {error}") from error
        self._sim.set_rules(**msgspec.structs.asdict(wanted))
        return HTTPStatus.OK, {}

    async def _list_faults(self, call: Call, _: tuple[str, ...]) -> _Answer:
        return HTTPStatus.OK, {"lasting": self._sim.shell.lasting}

    async def _fault(self, call: Call, _: tuple[str, ...]) -> _Answer:
        try:
            fault = msgspec.json.decode(call.body, type=Fault)
        except (ValueError, RecursionError) as error:
            raise Problem(HTTPStatus.BAD_REQUEST, f"not a fault: {error}") from error
        try:
            await self._sim.inject(fault)
        except OSError as error:
            raise Problem(HTTPStatus.CONFLICT, str(error)) from error
        return HTTPStatus.OK, {}

    async def _token(self, call: Call, _: tuple[str, ...]) -> _Answer:
        try:
            wanted = msgspec.json.decode(call.body or b"{}", type=dict[str, float | None])
        except ValueError as fault:
            raise Problem(HTTPStatus.BAD_REQUEST, str(fault)) from fault
        return HTTPStatus.OK, {"token": self._sim.token(expires_in=wanted.get("expires_in", TOKEN_SECONDS))}

    async def _certificate_fault(self, call: Call, _: tuple[str, ...]) -> _Answer:
        server = self._certificate_server()
        try:
            await server.inject(msgspec.json.decode(call.body, type=ApiFault))
        except ValueError as error:
            raise Problem(HTTPStatus.BAD_REQUEST, f"not a fault: {error}") from error
        except OSError as error:
            raise Problem(HTTPStatus.CONFLICT, str(error)) from error
        return HTTPStatus.OK, {}

    async def _signing_seconds(self, call: Call, _: tuple[str, ...]) -> _Answer:
        try:
            seconds = msgspec.json.decode(call.body, type=Annotated[float, msgspec.Meta(ge=1, le=3_153_600_000)])
        except ValueError as error:
            raise Problem(HTTPStatus.BAD_REQUEST, f"expected seconds: {error}") from error
        self._certificate_server().api.signing_seconds = seconds
        return HTTPStatus.OK, {}

    def _certificate_server(self) -> CertificateServer:
        if self._sim.certificates is None:
            raise Problem(HTTPStatus.CONFLICT, "there is no certificate API: start with --certificate-port")
        return self._sim.certificates

    async def _received(self, call: Call, _: tuple[str, ...]) -> _Answer:
        counts = self._sim.recorder.counts()
        if call.flag("ids", False):
            counts["ids"] = self._sim.recorder.ids()
        return HTTPStatus.OK, counts

    async def _forget(self, call: Call, _: tuple[str, ...]) -> _Answer:
        self._sim.recorder.clear()
        return HTTPStatus.OK, {}

    async def _events(self, call: Call, writer: asyncio.StreamWriter) -> None:
        """JSON lines after `since`, then (unless follow=0) what comes, until the client goes."""
        seq = call.number("since", 0)
        follow = call.flag("follow", True)
        limit = call.number("limit", 0)
        recorder = self._sim.recorder
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/jsonl\r\nConnection: close\r\n\r\n")
        sent = 0
        while True:
            missed, events = recorder.since(seq)
            if missed:
                writer.write(msgspec.json.encode({"event": "missed", "count": missed}) + b"\n")
            for start in range(0, len(events), 500):
                for event in events[start : start + 500]:
                    writer.write(event.line())
                    seq = event.seq
                    sent += 1
                    if limit and sent >= limit:
                        await writer.drain()
                        return
                await writer.drain()
            if not events:
                if not follow:
                    return
                await self._sim.shell.change()
                if writer.is_closing():
                    return


async def _read_call(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Call:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.LimitOverrunError as fault:
        raise Problem(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"above {MAX_HEAD_BYTES} bytes") from fault
    lines = head.decode("latin-1").split("\r\n")
    try:
        method, target, version = lines[0].split(" ")
    except ValueError as fault:
        raise Problem(HTTPStatus.BAD_REQUEST, f"request line {lines[0][:80]!r}") from fault
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    if "transfer-encoding" in headers:
        raise Problem(HTTPStatus.LENGTH_REQUIRED, "send Content-Length, not Transfer-Encoding")
    text = headers.get("content-length", "0")
    if not text.isascii() or not text.isdigit():
        raise Problem(HTTPStatus.BAD_REQUEST, f"Content-Length {text!r}")
    if int(text[:18]) > MAX_BODY_BYTES:
        raise Problem(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"body of {text} bytes, at most {MAX_BODY_BYTES}")
    if headers.get("expect", "").lower() == "100-continue":
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    body = await reader.readexactly(int(text))
    url = urlsplit(target)
    return Call(
        method=method,
        path=url.path,
        query=dict(parse_qsl(url.query, keep_blank_values=True)),
        body=body,
        keep_alive=version == "HTTP/1.1" and headers.get("connection", "").lower() != "close",
    )
