"""The https port of the certificate API: TLS, HTTP/1.1, and faults of both, around the core.

TLS is pyOpenSSL's, for this server asks for a client certificate and takes whatever comes: the core judges it, as
CloudCore does. Python's own `ssl` would end the handshake.
"""

from __future__ import annotations

import asyncio
import email.utils
import logging
import time
from collections import deque
from http import HTTPStatus
from typing import Final

import msgspec
from OpenSSL import SSL, crypto

from cloudsim import handshake
from cloudsim.certificate_api import MAX_BODY_BYTES, ApiAnswer, ApiFault, ApiRequest, CertificateApi
from cloudsim.certificates import Authority, Pair

log = logging.getLogger("cloudsim.certificates")

IDLE_SECONDS: Final = 30.0
"For the TLS handshake, and for each request."
_READ_BYTES: Final = 16 * 1024


class CertificateServer:
    """Serves a CertificateApi. `faults` are met by requests from then on."""

    def __init__(self, api: CertificateApi, authority: Authority, server: Pair, host: str, port: int) -> None:
        self.api = api
        self._authority = authority
        self._host = host
        self.port = port
        self.faults: list[ApiFault] = []
        self.requests: deque[ApiRequest] = deque(maxlen=100)
        "The last that came, for tests."
        self._context = _context(server)
        self._server: asyncio.Server | None = None
        self._clients: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Listen. Idempotent; raises OSError when the port is in use."""
        if self._server is None:
            self._server = await asyncio.start_server(self._accept, self._host, self.port)
            self.port = self._server.sockets[0].getsockname()[1]

    async def aclose(self) -> None:
        self._stop_listening()
        for client in list(self._clients):
            client.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)

    def _stop_listening(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    async def inject(self, fault: ApiFault) -> None:
        if fault.fault == "clear":
            self.faults.clear()
            await self.open()
        elif fault.fault == "refuse":
            self._stop_listening()
        else:
            self.faults.append(fault)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None  # start_server runs this in a task
        self._clients.add(task)
        try:
            connection = _Connection(self._context, reader, writer)
            async with asyncio.timeout(IDLE_SECONDS):
                await connection.handshake()
            while await self._serve(connection):
                pass
        except (OSError, SSL.Error, EOFError) as fault:
            log.info("connection ended: %s", fault or type(fault).__name__)
        except asyncio.CancelledError:
            pass  # aclose(); asyncio would log the cancelled task of a stream server
        finally:
            self._clients.discard(task)
            writer.close()

    async def _serve(self, connection: _Connection) -> bool:
        """One request; whether another may follow."""
        async with asyncio.timeout(IDLE_SECONDS):
            try:
                head = handshake.parse_request(await connection.read_head())
            except handshake.BadRequest as error:
                await connection.write(handshake.refuse_broken(str(error)))
                return False
            body = await _read_body(connection, head)
        request = ApiRequest(head.method, head.target, head.headers, body, connection.peer_certificate())
        self.requests.append(request)
        fault = self._next_fault(request.path)
        answer = self._answer(request, fault)
        if answer is None:
            return False
        keep = body is not None and not head.has_token("connection", "close")
        date = time.time() + (fault.seconds if fault is not None and fault.fault == "skew" else 0.0)
        data = _encode(answer, email.utils.formatdate(date, usegmt=True), keep=keep)
        if fault is None:
            await connection.write(data)
            return keep
        return await _suffer(fault, connection, data) and keep

    def _next_fault(self, path: str) -> ApiFault | None:
        for index, fault in enumerate(self.faults):
            if fault.path in ("", path):
                if fault.count == 1:
                    del self.faults[index]
                elif fault.count is not None:
                    self.faults[index] = msgspec.structs.replace(fault, count=fault.count - 1)
                return fault
        return None

    def _answer(self, request: ApiRequest, fault: ApiFault | None) -> ApiAnswer | None:
        now = time.time()
        match fault.fault if fault is not None else "":
            case "status" if fault is not None:
                return ApiAnswer(fault.status, fault.text.encode())
            case "hang-up":
                return None
            case "foreign-ca" if request.path == "/ca.crt":
                return ApiAnswer(200, self._authority.foreign_ca_der(), "application/octet-stream")
            case ("wrong-node" | "wrong-key") as wrong if request.path == "/edge.crt":
                name = f"{request.header('nodename')}-other" if wrong == "wrong-node" else request.header("nodename")
                return ApiAnswer(200, self._authority.foreign_node_der(name), "application/octet-stream")
            case "not-yet-valid" if fault is not None and request.path == "/edge.crt":
                return self.api.answer(request, now=now + fault.seconds)
        return self.api.answer(request, now=now)


class _Connection:
    """TLS over asyncio streams, in memory: what came is fed to OpenSSL, what it has to say is written."""

    def __init__(self, context: SSL.Context, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._tls = SSL.Connection(context, None)
        self._tls.set_accept_state()
        self._buffer = b""

    async def handshake(self) -> None:
        while True:
            try:
                self._tls.do_handshake()
                return
            except SSL.WantReadError:
                await self._flush()
                await self._feed()
            finally:
                await self._flush()  # also the alert that says what was wrong

    async def read_head(self) -> bytes:
        """A request's head without its final empty line. Raises BadRequest, EOFError."""
        while b"\r\n\r\n" not in self._buffer:
            if len(self._buffer) > handshake.MAX_REQUEST_BYTES:
                raise handshake.BadRequest("header above the limit")
            self._buffer += await self._read()
        head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        return head

    async def read_exactly(self, count: int) -> bytes:
        while len(self._buffer) < count:
            self._buffer += await self._read()
        data, self._buffer = self._buffer[:count], self._buffer[count:]
        return data

    async def write(self, data: bytes) -> None:
        for start in range(0, len(data), _READ_BYTES):
            self._tls.sendall(data[start : start + _READ_BYTES])
            await self._flush()

    def peer_certificate(self) -> bytes | None:
        certificate = self._tls.get_peer_certificate()
        return None if certificate is None else crypto.dump_certificate(crypto.FILETYPE_ASN1, certificate)

    async def _read(self) -> bytes:
        while True:
            try:
                return self._tls.recv(_READ_BYTES)
            except SSL.WantReadError:
                await self._flush()
                await self._feed()
            except SSL.ZeroReturnError:
                raise EOFError from None

    async def _feed(self) -> None:
        data = await self._reader.read(_READ_BYTES)
        if not data:
            raise EOFError
        self._tls.bio_write(data)

    async def _flush(self) -> None:
        while True:
            try:
                self._writer.write(self._tls.bio_read(_READ_BYTES))
            except SSL.WantReadError:
                break
        await self._writer.drain()


async def _read_body(connection: _Connection, head: handshake.Request) -> bytes | None:
    """The body; None when it is above the limit: then the rest stays unread, and the connection ends."""
    text = head.header("content-length") or "0"
    if head.header("transfer-encoding") or not text.isascii() or not text.isdigit():
        raise EOFError("a body without a plain Content-Length")  # no edge sends one
    if int(text[:18]) > MAX_BODY_BYTES:
        await connection.read_exactly(MAX_BODY_BYTES)  # as much as Go reads before it answers
        return None
    return await connection.read_exactly(int(text))


def _encode(answer: ApiAnswer, date: str, *, keep: bool) -> bytes:
    try:
        phrase = HTTPStatus(answer.status).phrase
    except ValueError:
        phrase = "status"
    headers = [("Date", date), ("Content-Length", str(len(answer.body))), ("Content-Type", answer.content_type)]
    headers += answer.headers
    if not keep:
        headers.append(("Connection", "close"))
    lines = [f"HTTP/1.1 {answer.status} {phrase}", *(f"{name}: {value}" for name, value in headers), "", ""]
    return "\r\n".join(lines).encode("latin-1") + answer.body


async def _suffer(fault: ApiFault, connection: _Connection, data: bytes) -> bool:
    """Answer as the fault has it; whether the connection goes on."""
    match fault.fault:
        case "slow":
            await asyncio.sleep(fault.seconds)
        case "drip":
            for index in range(len(data)):
                await connection.write(data[index : index + 1])
                await asyncio.sleep(fault.seconds)
            return True
        case "garbage":
            await connection.write(b"SSH-2.0-OpenSSH_9.2\r\n\x00\xff not HTTP\r\n\r\n")
            return False
        case "truncated":
            await connection.write(data[:-10])
            return False
        case "endless":
            head, _, _ = data.partition(b"\r\n")
            await connection.write(head + b"\r\nContent-Type: application/octet-stream\r\n\r\n")
            while True:
                await connection.write(bytes(_READ_BYTES))
    await connection.write(data)
    return True


def _context(server: Pair) -> SSL.Context:
    context = SSL.Context(SSL.TLS_SERVER_METHOD)
    context.set_min_proto_version(SSL.TLS1_2_VERSION)
    context.use_certificate_file(str(server.certificate))
    context.use_privatekey_file(str(server.key))
    # Ask for a certificate, take any or none.
    context.set_verify(SSL.VERIFY_PEER, lambda *_: True)
    # Each connection shows its certificate anew.
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    context.set_options(SSL.OP_NO_TICKET)
    return context
