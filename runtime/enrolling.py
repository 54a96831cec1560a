"""Gets certificates from CloudCore: https, keys and files. `python -m runtime.enrolling` does one job and ends.

A process of its own, for keys and X.509 need a library of 15 MiB that edgehub would keep for life. The job comes as
JSON on standard input, the outcome goes as JSON to standard output: no secret is in arguments or environment.
"""

from __future__ import annotations

from runtime import enrolment  # first: it imports msgspec lean

# isort: split

import asyncio
import contextlib
import socket
import ssl
import sys
import time
from collections.abc import Callable, Sequence
from typing import Final

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from runtime import tunnel
from runtime.enrolment import Facts, Issued, Job, Outcome
from runtime.enrolment_files import FileSet
from runtime.errors import EdgezmqError, NotEnrolled
from runtime.http_answer import Answer, AnswerReader, MalformedAnswer
from runtime.proxy import ProxyRefused

_READ_BYTES: Final = 16 * 1024
MAX_JOB_BYTES: Final = 64 * 1024

# KubeEdge's (edge/pkg/edgehub/certificate): CloudCore takes over only organisation and common name.
_SUBJECT: Final = (
    (NameOID.COUNTRY_NAME, "CN"),
    (NameOID.ORGANIZATION_NAME, enrolment.NODES),
    (NameOID.LOCALITY_NAME, "Hangzhou"),
    (NameOID.STATE_OR_PROVINCE_NAME, "Zhejiang"),
)
_TIME_FAULTS: Final = (9, 10)
"X509_V_ERR_CERT_NOT_YET_VALID, X509_V_ERR_CERT_HAS_EXPIRED."


async def enrol(job: Job, *, clock: Callable[[], float] = time.time) -> Issued:
    """Join (with a token) or renew (without one); the files are replaced when it returns. Raises NotEnrolled.

    When it raises, the files are as they were, but for what NotEnrolled says otherwise.
    """
    host, port = enrolment.parse_server(job.server, "modules.edgeHub.httpServer")
    token = enrolment.parse_token(job.token) if job.token else None
    files = FileSet(job.ca_file, job.cert_file, job.key_file)
    with files.lock():
        _recover(files)
        cloud = _Cloud(host, port, job, clock)
        if token is not None:
            cas = [await _fetch_ca(cloud, token)]
            # Before the token goes out: a certificate that this node takes for invalid would be of no use.
            enrolment.check_clock(cloud.date, clock())
            context = _verifying(cas)
            headers = [("Authorization", f"Bearer {token.jwt}")]
        else:
            cas, context = _own_identity(files)
            headers = []
        key = ec.generate_private_key(ec.SECP256R1())
        answer = await cloud.get(
            "/edge.crt",
            context,
            headers=[*headers, ("NodeName", job.node_name)],
            body=make_request(key, job.node_name),
        )
        enrolment.check_clock(answer.headers.get("date"), clock())
        der = enrolment.judge_certificate(answer, cloud.name, node_name=job.node_name, token=token, now=clock())
        facts = read_facts(der, key, cas, cloud.name)
        issued = enrolment.judge_issued(facts, cloud.name, node_name=job.node_name, now=clock())
        files.replace(
            cert=_pem(der),
            key=key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption()),
            ca=None if token is None else _pem(cas[0]),
        )
        return issued


# --- asking -------------------------------------------------------------------------------------------


class _Cloud:
    """One certificate API; every request over a connection of its own, bounded in time and bytes."""

    def __init__(self, host: str, port: int, job: Job, clock: Callable[[], float]) -> None:
        self._host = host
        self._port = port
        self._job = job
        self._seconds = job.seconds
        self._clock = clock
        self.name = enrolment.show_server(host, port)
        self.date: str | None = None
        "The last Date header."

    async def get(
        self, path: str, context: ssl.SSLContext, *, headers: Sequence[tuple[str, str]] = (), body: bytes = b""
    ) -> Answer:
        """Raises NotEnrolled for whatever is no answer."""
        head = enrolment.request_head(self._host, self._port, path, headers=headers, length=len(body))
        try:
            async with asyncio.timeout(self._seconds):
                answer = await self._exchange(context, head + body)
        except MalformedAnswer as fault:
            raise enrolment.malformed(self.name, fault) from fault
        except ProxyRefused as fault:
            raise NotEnrolled(enrolment.UNREACHABLE, f"{self.name}: {fault}") from fault
        except (OSError, EOFError) as fault:
            raise self._explain(fault) from fault
        self.date = answer.headers.get("date")
        return answer

    async def _exchange(self, context: ssl.SSLContext, request: bytes) -> Answer:
        reader, writer = await self._connect(context)
        try:
            writer.write(request)
            answers = AnswerReader()
            has_begun = False
            while data := await reader.read(_READ_BYTES):
                has_begun = True
                answer = answers.feed(data)
                if answer is not None:
                    return answer
            if not has_begun:
                raise EOFError
            return answers.end()
        finally:
            writer.transport.abort()  # one answer was all: no goodbyes that a broken peer might not give
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _connect(self, context: ssl.SSLContext) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        name, proxy = self._job.server_name or self._host, self._job.proxy
        if proxy is None:
            return await asyncio.open_connection(
                self._host, self._port, ssl=context, server_hostname=name, limit=_READ_BYTES
            )
        return await tunnel.open_streams(
            tunnel.with_password(proxy, self._job.proxy_password_file),
            self._host,
            self._port,
            context,
            server_name=name,
            proxy_ca_file=self._job.proxy_ca_file,
        )

    def _explain(self, fault: Exception) -> NotEnrolled:
        where = self.name
        match fault:
            case ssl.SSLCertVerificationError() if fault.verify_code in _TIME_FAULTS:
                enrolment.check_clock(self.date, self._clock())
                return NotEnrolled(
                    enrolment.CLOCK,
                    f"{where}: its certificate is not valid at {enrolment.show_time(self._clock())}, which is what "
                    f"this node's clock says ({fault.verify_message}). Set the clock, or renew the cloud's certificate",
                )
            case ssl.SSLCertVerificationError():
                return NotEnrolled(
                    enrolment.TLS_FAILED,
                    f"{where}: its certificate does not verify: {fault.verify_message}. Expected one of the token's CA "
                    "(of tlsCaFile, when renewing) that names this address (CloudCore: advertiseAddress, dnsNames)",
                )
            case ssl.SSLError():
                return NotEnrolled(
                    enrolment.NOT_A_CLOUDHUB,
                    f"{where} does not speak TLS as CloudCore does: {fault.reason or fault}. Is that the port of the "
                    f"certificate API ({enrolment.DEFAULT_PORT})?",
                )
            case socket.gaierror():
                what = f"its name cannot be resolved ({fault.strerror}). Correct the address, or this node's DNS"
            case ConnectionRefusedError():
                what = "nothing listens there. Is CloudCore running, and is the port right?"
            case TimeoutError():
                what = f"no answer within {self._seconds:g} s. Look at firewall and route"
            case ConnectionError() | EOFError():
                what = "it closed the connection without an answer. Look at CloudCore's log"
            case _:
                what = str(fault)
        return NotEnrolled(enrolment.UNREACHABLE, f"{where}: {what}")


async def _fetch_ca(cloud: _Cloud, token: enrolment.Token) -> bytes:
    """The CA's certificate (DER), which is the token's, however it came."""
    unverified = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    unverified.check_hostname = False
    unverified.verify_mode = ssl.CERT_NONE
    unverified.minimum_version = ssl.TLSVersion.TLSv1_2
    return enrolment.judge_ca(await cloud.get("/ca.crt", unverified), token, cloud.name)


def _verifying(cas: Sequence[bytes]) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # verifies chain and host name
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_verify_locations(cadata=b"".join(cas))
    except ssl.SSLError as fault:
        raise NotEnrolled(
            enrolment.BAD_CERTIFICATE, f"the CA is no certificate that TLS can use: {fault.reason or fault}"
        ) from fault
    return context


def _own_identity(files: FileSet) -> tuple[list[bytes], ssl.SSLContext]:
    """The CAs (DER) and a context that shows the present certificate."""
    try:
        cas = [each.public_bytes(Encoding.DER) for each in x509.load_pem_x509_certificates(files.ca.read_bytes())]
        context = _verifying(cas)
        context.load_cert_chain(files.cert, files.key, password=_no_password)
    except (OSError, ValueError) as fault:  # ssl.SSLError is an OSError
        raise NotEnrolled(
            enrolment.FILES,
            f"the present certificate cannot be used to get a new one ({files.ca}, {files.cert}, {files.key}): "
            f"{fault}. Join anew with a token (edgezmq join)",
        ) from fault
    return cas, context


def _no_password() -> str:
    raise ValueError("the private key is encrypted, expected one without a password")


def _recover(files: FileSet) -> None:
    try:
        files.recover()
    except (OSError, ValueError) as fault:
        raise NotEnrolled(
            enrolment.FILES, f"{files.journal}: a replacement was cut short and cannot be finished: {fault}"
        ) from fault


# --- keys and certificates ------------------------------------------------------------------------------


def make_request(key: ec.EllipticCurvePrivateKey, node_name: str) -> bytes:
    """A PKCS#10 request (DER) as KubeEdge's edge makes it."""
    subject = [*_SUBJECT, (NameOID.COMMON_NAME, f"system:node:{node_name}")]
    name = x509.Name([x509.NameAttribute(oid, value) for oid, value in subject])
    return (
        x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256()).public_bytes(Encoding.DER)
    )


def read_facts(der: bytes, key: ec.EllipticCurvePrivateKey, cas: Sequence[bytes], server: str) -> Facts:
    """What the issued certificate says. Raises NotEnrolled for bytes that are none."""
    try:
        certificate = x509.load_der_x509_certificate(der)
        names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        organisations = certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
        return Facts(
            common_name=str(names[0].value) if names else "",
            organisations=tuple(str(each.value) for each in organisations),
            not_before=certificate.not_valid_before_utc.timestamp(),
            not_after=certificate.not_valid_after_utc.timestamp(),
            has_our_key=_public(certificate.public_key()) == _public(key.public_key()),
            is_of_ca=any(_is_issued_by(certificate, x509.load_der_x509_certificate(ca)) for ca in cas),
            is_for_clients=_is_for_clients(certificate),
        )
    except Exception as fault:  # cryptography raises many kinds for hostile bytes
        raise enrolment.malformed(server, f"its answer is no X.509 certificate: {fault}") from fault


def _public(key: object) -> bytes:
    encode = getattr(key, "public_bytes", None)
    return encode(Encoding.DER, PublicFormat.SubjectPublicKeyInfo) if encode is not None else b""


def _is_issued_by(certificate: x509.Certificate, ca: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _is_for_clients(certificate: x509.Certificate) -> bool:
    try:
        usages = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        return True  # CloudHub accepts it (docs/cloudlink.md)
    return ExtendedKeyUsageOID.CLIENT_AUTH in usages or ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE in usages


def _pem(der: bytes) -> bytes:
    return ssl.DER_cert_to_PEM_cert(der).encode()


# --- the process ------------------------------------------------------------------------------------------


async def work(job: Job) -> Outcome:
    """Do it; never raises for what the cloud, the files or the settings do."""
    try:
        return Outcome(issued=await enrol(job))
    except NotEnrolled as refusal:
        return Outcome(code=refusal.code, text=refusal.text)
    except EdgezmqError as fault:
        return Outcome(code=enrolment.INTERNAL, text=str(fault))


def main() -> None:
    job = msgspec.json.decode(sys.stdin.buffer.read(MAX_JOB_BYTES), type=Job)
    sys.stdout.buffer.write(msgspec.json.encode(asyncio.run(work(job))))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
