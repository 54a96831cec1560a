"""The certificate API against what was measured of the genuine one (vectors: bootstrap_http.json)."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from cryptography.x509.oid import NameOID

from cloudsim.certificate_api import (
    MAX_BODY_BYTES,
    ApiAnswer,
    ApiFault,
    ApiRequest,
    CertificateApi,
    make_token,
    token_refusal,
)
from cloudsim.certificates import Authority, Pair
from cloudsim.config import SimConfig
from cloudsim.sim import CloudSim
from tests.support.aio import run

VECTORS: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "vectors" / "cloudlink" / "bootstrap_http.json").read_text()
)
MEASURED: dict[str, Any] = VECTORS["answers"]
NOW = datetime(2026, 11, 23, 17, 9, 21, tzinfo=UTC)
"When the vectors were recorded."
CUT = 300
"Bodies in the vectors end there."


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("cloud"))


def csr(
    common_name: str | None = "system:node:edge-new",
    organisation: str = "system:nodes",
    *,
    names: tuple[str, ...] = (),
    is_rsa: bool = False,
) -> bytes:
    subject = [(NameOID.COUNTRY_NAME, "CN"), (NameOID.LOCALITY_NAME, "Hangzhou")]
    subject.append((NameOID.ORGANIZATION_NAME, organisation))
    if common_name is not None:
        subject.append((NameOID.COMMON_NAME, common_name))
    builder = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name([x509.NameAttribute(oid, value) for oid, value in subject])
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(n) for n in names]), critical=False)
    key = rsa.generate_private_key(65537, 2048) if is_rsa else ec.generate_private_key(ec.SECP256R1())
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)


def spoilt(request: bytes) -> bytes:
    """The same request with a signature that does not verify."""
    return request[:-1] + bytes([request[-1] ^ 1])


def token(authority: Authority, *, seconds: float | None = 3600.0, algorithm: str = "HS256") -> str:
    expires = None if seconds is None else NOW.timestamp() + seconds
    return make_token(authority, expires_at=expires, algorithm=algorithm).partition(".")[2]


def ask(
    authority: Authority,
    path: str = "/edge.crt",
    *,
    method: str = "GET",
    node: str | None = "edge-new",
    authorization: str | None = None,
    body: bytes | None = b"",
    usages: str | None = None,
    certificate: bytes | None = None,
    signing_seconds: float = 365 * 86400,
) -> ApiAnswer | None:
    headers = [("host", "127.0.0.1:10002")]
    if node is not None:
        headers.append(("nodename", node))
    if authorization is not None:
        headers.append(("authorization", authorization))
    if usages is not None:
        headers.append(("extkeyusages", usages))
    api = CertificateApi(authority, {"edge-a"}.__contains__, signing_seconds=signing_seconds)
    return api.answer(ApiRequest(method, path, headers, body, certificate), now=NOW.timestamp())


def of(pair: Pair) -> bytes:
    return ssl.PEM_cert_to_DER_cert(pair.certificate.read_text())


def with_token(authority: Authority, **changes: Any) -> ApiAnswer | None:
    return ask(authority, **{"authorization": f"Bearer {token(authority)}", "body": csr()} | changes)


def rotating(authority: Authority, **changes: Any) -> ApiAnswer | None:
    own = authority.node("edge-a", not_before=NOW - timedelta(days=1))
    return ask(authority, **{"certificate": of(own), "node": "edge-a", "body": csr("system:node:edge-a")} | changes)


def _answers(authority: Authority, elsewhere: Authority) -> dict[str, Any]:
    """What our API answers to each measured request, by the vectors' names."""
    good = token(authority)
    head, claims, signature = good.split(".")
    whole = make_token(authority, expires_at=NOW.timestamp() + 60)
    expired = authority.node(
        "edge-a",
        file_name="edge-a-expired",
        not_before=datetime(2026, 11, 20, 17, 7, 49, tzinfo=UTC),
        lifetime=timedelta(days=1),
    )
    other = of(elsewhere.node("edge-a", not_before=NOW - timedelta(days=1)))
    server_only = authority.node("edge-a", file_name="edge-a-server", not_before=NOW, server_only=True)
    return {
        "GET /ca.crt": ask(authority, "/ca.crt"),
        "ok": with_token(authority),
        "no_NodeName_header": with_token(authority, node=None),
        "NodeName_differs_from_CN": with_token(authority, node="other"),
        "PEM_csr": with_token(authority, body=b"-----BEGIN CERTIFICATE REQUEST-----\n"),
        "POST": with_token(authority, method="POST"),
        "no_authorization": ask(authority, body=csr()),
        "authorization_without_scheme": ask(authority, authorization=good, body=csr()),
        "scheme_other_word": ask(authority, authorization=f"Token {good}", body=csr()),
        "full_token_with_hash": ask(authority, authorization=f"Bearer {whole}", body=csr()),
        "token_tampered": ask(authority, authorization=f"Bearer {head}.{claims}.{signature[::-1]}", body=csr()),
        "token_garbage": ask(authority, authorization="Bearer garbage", body=csr()),
        "token_expired": ask(authority, authorization=f"Bearer {token(authority, seconds=-60)}", body=csr()),
        "token_alg_none": ask(authority, authorization=f"Bearer {token(authority, algorithm='none')}", body=csr()),
        "token_HS512": ask(authority, authorization=f"Bearer {token(authority, algorithm='HS512')}", body=csr()),
        "token_without_exp": ask(authority, authorization=f"Bearer {token(authority, seconds=None)}", body=csr()),
        "empty_body": with_token(authority, body=b""),
        "garbage_body": with_token(authority, body=b"hello"),
        "csr_no_CN": with_token(authority, body=csr(None)),
        "csr_any_CN_and_org": with_token(authority, body=csr("anything", "system:masters")),
        "csr_with_SAN": with_token(authority, body=csr(names=("a.example",))),
        "csr_rsa_key": with_token(authority, body=csr(is_rsa=True)),
        "csr_bad_signature": with_token(authority, body=spoilt(csr())),
        "body_over_1MiB": with_token(authority, body=None),
        "ExtKeyUsages_[1,2]": with_token(authority, usages="[1,2]"),
        "ExtKeyUsages_[]": with_token(authority, usages="[]"),
        "ExtKeyUsages_bad": with_token(authority, usages="x"),
        "rotate_ok": rotating(authority),
        # CloudCore looks at the first certificate only: what comes with it makes no difference.
        "rotate_ok_with_CA_in_chain": rotating(authority),
        "rotate_wrong_NodeName": rotating(authority, node="edge-b"),
        "rotate_no_NodeName": rotating(authority, node=None),
        "rotate_csr_for_another_CN": rotating(authority, body=csr("system:node:edge-b")),
        "rotate_other_ca": rotating(authority, certificate=other),
        "rotate_other_ca_plus_token": rotating(authority, certificate=other, authorization=f"Bearer {good}"),
        "rotate_expired": rotating(authority, certificate=of(expired)),
        "rotate_server_eku": rotating(authority, certificate=of(server_only)),
        "rotate_old_style_cert_any_NodeName": rotating(
            authority, certificate=_issued(authority, "KubeEdge", "kubeedge.io")
        ),
        "rotate_cert_without_O": rotating(authority, certificate=_issued(authority, None, "system:node:edge-a")),
        "certdays1_hub_lifetime": with_token(authority, signing_seconds=86400),
        "GET /node/edge-a": ask(authority, "/node/edge-a"),
        "GET /node/nope": ask(authority, "/node/nope"),
        "GET /": ask(authority, "/"),
    }


def _issued(authority: Authority, organisation: str | None, name: str) -> bytes:
    """A client certificate of the CA with a subject that the API would not give."""
    subject = [x509.NameAttribute(NameOID.COMMON_NAME, name)]
    if organisation is not None:
        subject.insert(0, x509.NameAttribute(NameOID.ORGANIZATION_NAME, organisation))
    ca = x509.load_pem_x509_certificate(authority.ca.certificate.read_bytes())
    key = load_pem_private_key(authority.ca.key.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    builder = x509.CertificateBuilder().subject_name(x509.Name(subject)).issuer_name(ca.subject)
    builder = builder.public_key(ec.generate_private_key(ec.SECP256R1()).public_key()).serial_number(7)
    builder = builder.not_valid_before(NOW).not_valid_after(NOW + timedelta(days=1))
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)


@pytest.fixture(scope="module")
def answers(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return _answers(authority, Authority(tmp_path_factory.mktemp("elsewhere")))


def test_every_measured_request_of_the_vectors_is_asked(answers: dict[str, Any]) -> None:
    assert answers.keys() == MEASURED.keys() - {"token_accepted_twice"}


@pytest.mark.parametrize("name", sorted(MEASURED.keys() - {"token_accepted_twice"}))
def test_the_vector_of_an_answer_is_met(answers: dict[str, Any], name: str) -> None:
    answer, measured = answers[name], MEASURED[name]
    if isinstance(measured, str):
        assert answer is None, "the genuine handler crashes and the connection ends"
        return
    headers = {"Content-Length": str(len(answer.body)), "Content-Type": answer.content_type} | dict(answer.headers)
    assert answer.status == measured["status"]
    if "cert" not in measured:
        assert answer.body.decode()[:CUT] == measured["body"]
        assert headers == measured["headers"]
        assert len(answer.body) == measured["len"]
        return
    assert headers.keys() == measured["headers"].keys()
    assert headers["Content-Type"] == measured["headers"]["Content-Type"]
    assert facts(answer.body) | ({"lifetime_s": None} if name == "GET /ca.crt" else {}) == measured["cert"] | (
        {"lifetime_s": None} if name == "GET /ca.crt" else {}
    )


def facts(der: bytes) -> dict[str, Any]:
    certificate = x509.load_der_x509_certificate(der)
    names = {NameOID.COMMON_NAME: "CN", NameOID.ORGANIZATION_NAME: "O"}
    said = [
        ",".join(f"{names[each.oid]}={each.value}" for each in reversed(list(name)))
        for name in (certificate.subject, certificate.issuer)
    ]
    usages = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    try:
        alternatives = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        san = [str(each) for each in alternatives.get_values_for_type(x509.DNSName)]
    except x509.ExtensionNotFound:
        san = None
    lifetime = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    return {
        "subject": said[0],
        "issuer": said[1],
        "lifetime_s": int(lifetime.total_seconds()),
        "eku": [usage._name for usage in usages],
        "san": san,
        "pubkey": "RSAPublicKey" if isinstance(certificate.public_key(), rsa.RSAPublicKey) else "ECPublicKey",
    }


def test_a_certificate_begins_now_to_the_second(authority: Authority) -> None:
    answer = with_token(authority)
    assert answer is not None
    assert x509.load_der_x509_certificate(answer.body).not_valid_before_utc == NOW


def test_the_genuine_request_of_the_vectors_is_signed(authority: Authority) -> None:
    """The bytes that the genuine edge sent."""
    recorded = next(vector for vector in VECTORS["vectors"] if vector["name"] == "bootstrap_2_request")
    answer = with_token(authority, body=bytes.fromhex(recorded["body_hex"]), node="edge-boot")
    assert answer is not None
    assert facts(answer.body)["subject"] == "CN=system:node:edge-boot,O=system:nodes"


def test_a_token_has_the_form_of_the_vectors(authority: Authority) -> None:
    digest, head, claims, _ = make_token(authority, expires_at=1795539317.0).split(".")
    measured = VECTORS["token"]
    assert digest == hashlib.sha256(authority.ca_der).hexdigest()
    assert head == measured["token"].split(".")[1]
    assert base64.urlsafe_b64decode(claims + "==").decode() == measured["jwt_payload"]


# --- over https -----------------------------------------------------------------------------------


async def _get(port: int, context: ssl.SSLContext, *headers: str, body: bytes = b"", path: str = "/edge.crt") -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    lines = [f"GET {path} HTTP/1.1", "Host: x", "Connection: close", *headers, f"Content-Length: {len(body)}", "", ""]
    writer.write("\r\n".join(lines).encode() + body)
    try:
        return await reader.read()
    finally:
        writer.close()


def _context(ca: Pair, own: Pair | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(ca.certificate))
    if own is not None:
        context.load_cert_chain(own.certificate, own.key)
    return context


def test_a_node_gets_its_certificate_over_https_and_rotates_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        config = SimConfig(directory=tmp_path, certificate_port=0, control_port=None, signing_seconds=5)
        async with CloudSim(config) as sim:
            assert sim.certificate_port is not None
            jwt = sim.token().partition(".")[2]
            context = _context(sim.ca)
            said = await _get(sim.certificate_port, context, f"Authorization: Bearer {jwt}", "NodeName: n", body=csr())
            assert said.startswith(b"HTTP/1.1 200 OK\r\n")
            assert facts(said.partition(b"\r\n\r\n")[2])["lifetime_s"] == 5
            own = _context(sim.ca, sim.certificate("edge-a"))
            said = await _get(sim.certificate_port, own, "NodeName: edge-a", body=csr("system:node:edge-a"))
            assert said.startswith(b"HTTP/1.1 200 OK\r\n")
            assert json.loads((tmp_path / "ports.json").read_text())["certificate_port"] == sim.certificate_port

    run(scenario())


def test_any_client_certificate_passes_the_handshake_and_is_judged_then(tmp_path: Path) -> None:
    async def scenario() -> None:
        other = Authority(tmp_path / "other")
        async with CloudSim(SimConfig(directory=tmp_path, certificate_port=0, control_port=None)) as sim:
            assert sim.certificate_port is not None
            stranger = _context(sim.ca, other.node("edge-a"))
            said = await _get(sim.certificate_port, stranger, "NodeName: edge-a", body=csr())
            assert said.startswith(b"HTTP/1.1 401 ")
            assert said.endswith(b"x509: certificate signed by unknown authority")
            large = bytes(MAX_BODY_BYTES + 1)
            said = await _get(
                sim.certificate_port, _context(sim.ca), f"Authorization: B {sim.token()[65:]}", body=large
            )
            assert said.endswith(b"http: request body too large")

    run(scenario())


def test_several_requests_go_over_one_connection(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with CloudSim(SimConfig(directory=tmp_path, certificate_port=0, control_port=None)) as sim:
            assert sim.certificate_port is not None
            reader, writer = await asyncio.open_connection("127.0.0.1", sim.certificate_port, ssl=_context(sim.ca))
            for _ in range(2):
                writer.write(b"GET /node/x HTTP/1.1\r\nHost: x\r\n\r\n")
                assert (await reader.readuntil(b"Node not found")).startswith(b"HTTP/1.1 404 Not Found\r\n")
            writer.close()

    run(scenario())


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (ApiFault(fault="garbage"), b"SSH-2.0"),
        (ApiFault(fault="hang-up"), b""),
        (ApiFault(fault="status", status=503, text="busy"), b"HTTP/1.1 503 Service Unavailable"),
        (ApiFault(fault="slow", seconds=0.01), b"HTTP/1.1 200 OK"),
        (ApiFault(fault="truncated"), b"HTTP/1.1 200 OK"),
    ],
    ids=lambda value: value.fault if isinstance(value, ApiFault) else "",
)
def test_a_fault_meets_the_next_request_and_no_other(tmp_path: Path, fault: ApiFault, said: bytes) -> None:
    async def scenario() -> None:
        async with CloudSim(SimConfig(directory=tmp_path, certificate_port=0, control_port=None)) as sim:
            assert sim.certificates is not None
            await sim.certificates.inject(msgspec.structs.replace(fault, count=1))
            first = await _get(sim.certificates.port, _context(sim.ca), path="/ca.crt")
            assert first.startswith(said)
            second = await _get(sim.certificates.port, _context(sim.ca), path="/ca.crt")
            assert second.endswith(sim.authority.ca_der)
            assert first[-20:] != second[-20:] or fault.fault == "slow"

    run(scenario())


def test_refuse_closes_the_port_until_it_is_cleared(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with CloudSim(SimConfig(directory=tmp_path, certificate_port=0, control_port=None)) as sim:
            assert sim.certificates is not None
            await sim.certificates.inject(ApiFault(fault="refuse"))
            with pytest.raises(ConnectionRefusedError):
                await _get(sim.certificates.port, _context(sim.ca), path="/ca.crt")
            await sim.certificates.inject(ApiFault(fault="clear"))
            assert await _get(sim.certificates.port, _context(sim.ca), path="/ca.crt")

    run(scenario())


@pytest.mark.parametrize(
    ("head", "fault"),
    [
        (b'{"alg":[]}', "signing method (alg) is unspecified"),
        (b"{}", "signing method (alg) is unspecified"),
        (b'{"alg":"HS1"}', "signing method (alg) is unavailable"),
        (b'{"a":' * 5000, "token is malformed"),
        (b"[]", "token is malformed"),
    ],
)
def test_a_token_with_any_header_is_refused(head: bytes, fault: str) -> None:
    words = f"Bearer {base64.urlsafe_b64encode(head).rstrip(b'=').decode()}.e30.AA"
    assert fault in str(token_refusal(words, b"key", NOW))
