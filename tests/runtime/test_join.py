"""Tokens, addresses, answers and refusals of joining, and the schedule of rotation: no socket, no file."""

from __future__ import annotations

import base64
import hashlib
import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime import enrolment
from runtime.enrolment import (
    BAD_CERTIFICATE,
    CA_MISMATCH,
    CLOCK,
    CLOUD_FAILED,
    NODE_NAME,
    NOT_A_CLOUDHUB,
    PASSING,
    TOKEN_EXPIRED,
    TOKEN_MALFORMED,
    TOKEN_REJECTED,
    Facts,
    Job,
    RotationSchedule,
    check_clock,
    http_date,
    judge_ca,
    judge_certificate,
    judge_issued,
    parse_server,
    parse_token,
)
from runtime.errors import ConfigError, NotEnrolled
from runtime.http_answer import Answer

SERVER = "https://cloud:10002"
CA = b"\x30the certificate of the cloud's CA"
NOW = 1_795_453_761.0  # 2026-11-23 17:09:21 UTC
DAY = 86_400.0


def part(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


def token(claims: object = None, ca: bytes = CA) -> str:
    claims = {"exp": int(NOW + DAY)} if claims is None else claims
    return f"{hashlib.sha256(ca).hexdigest()}.{part({'alg': 'HS256'})}.{part(claims)}.c2lnbmF0dXJl"


def answer(status: int = 200, body: bytes = CA, reason: str = "said") -> Answer:
    return Answer(status, reason, {}, body)


def refusal(*arguments: Any, **settings: Any) -> NotEnrolled:
    act, *rest = arguments
    with pytest.raises(NotEnrolled) as caught:
        act(*rest, **settings)
    return caught.value


# --- tokens ---------------------------------------------------------------------------------------------


def test_a_token_of_a_join_is_a_hash_and_a_jwt() -> None:
    parsed = parse_token(f"  {token()}\n")
    assert parsed.ca_sha256 == hashlib.sha256(CA).hexdigest()
    assert parsed.jwt == token().partition(".")[2]
    assert parsed.expires_at == NOW + DAY


def test_a_token_without_expiry_is_one() -> None:
    assert parse_token(token({})).expires_at is None
    for strange in ("soon", 10**400, None, [1]):
        assert parse_token(token({"exp": strange})).expires_at is None


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "it is empty"),
        ("nonsense", "it has 1 parts"),
        (token().partition(".")[2], "the hash of the CA before the first dot is missing"),
        (token() + ".more", "it has 5 parts"),
        ("abc" + token()[64:], "its first part has 3 characters, expected 64 hexadecimal digits"),
        ("z" * 64 + token()[64:], "expected 64 hexadecimal digits"),
        (token().replace(part({"exp": int(NOW + DAY)}), "%%%"), "its third part is not JSON"),
        ("two words." + token(), "holds blanks"),
        (token() * 400, "too long"),
    ],
)
def test_a_malformed_token_is_told_apart_and_never_shown(text: str, what: str) -> None:
    told = refusal(parse_token, text)
    assert told.code == TOKEN_MALFORMED
    assert what in told.text
    assert "keadm gettoken" in told.text
    assert not text or text not in told.text


@given(st.text(max_size=300))
def test_any_text_is_a_token_or_a_refusal(text: str) -> None:
    try:
        parse_token(text)
    except NotEnrolled:
        pass


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
        lambda inner: st.lists(inner),
    )
)
def test_any_claims_are_read(claims: object) -> None:
    assert parse_token(token(claims if claims is not None else [])).jwt


def test_neither_a_token_nor_a_job_shows_its_secret() -> None:
    secret = token().rpartition(".")[2]
    assert secret not in repr(parse_token(token()))
    job = Job(server=SERVER, node_name="edge-1", ca_file="a", cert_file="b", key_file="c", token=token())
    assert secret not in repr(job) + str(job)


# --- addresses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("https://cloud:1234", "cloud", 1234),
        ("https://cloud:1234/", "cloud", 1234),
        ("HTTPS://cloud", "cloud", 10002),
        ("cloud", "cloud", 10002),
        ("192.0.2.1:10002", "192.0.2.1", 10002),
        ("https://[2001:db8::1]:7", "2001:db8::1", 7),
        ("[2001:db8::1]", "2001:db8::1", 10002),
    ],
)
def test_the_address_of_a_join_is_read(text: str, host: str, port: int) -> None:
    assert parse_server(text) == (host, port)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "http://cloud",
        "wss://cloud",
        "cloud:",
        "cloud:0",
        "cloud:65536",
        "cloud:x",
        "2001:db8::1",
        "cloud/path",
        "a b",
    ],
)
def test_what_is_no_address_is_an_error_that_names_the_setting(text: str) -> None:
    with pytest.raises(ConfigError, match="--server"):
        parse_server(text)


# --- the CA ----------------------------------------------------------------------------------------------


def test_the_ca_is_the_tokens_or_nothing_goes_on() -> None:
    wanted = parse_token(token())
    assert judge_ca(answer(), wanted, SERVER) == CA
    told = refusal(judge_ca, answer(body=b"\x30another CA"), wanted, SERVER)
    assert told.code == CA_MISMATCH
    assert wanted.ca_sha256 in told.text
    assert hashlib.sha256(b"\x30another CA").hexdigest() in told.text
    assert "Nothing was sent" in told.text


@pytest.mark.parametrize(
    ("said", "code", "words"),
    [
        (answer(body=b"<html>login</html>"), NOT_A_CLOUDHUB, "<html>"),
        (answer(404, b"404 page not found"), NOT_A_CLOUDHUB, "404"),
        (answer(302, b""), NOT_A_CLOUDHUB, "302"),
        (answer(503, b"busy"), CLOUD_FAILED, "busy"),
    ],
)
def test_an_answer_that_is_no_ca_is_explained(said: Answer, code: str, words: str) -> None:
    told = refusal(judge_ca, said, parse_token(token()), SERVER)
    assert told.code == code
    assert words in told.text
    assert SERVER in told.text


# --- the certificate ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        (b"token validation failure, err: token has invalid claims: token is expired", TOKEN_EXPIRED, "a new one"),
        (b"token validation failure, err: token signature is invalid: signature is invalid", TOKEN_REJECTED, "another"),
        (b"token validation failure, token is empty", TOKEN_REJECTED, "token is empty"),
    ],
)
def test_what_the_cloud_has_against_the_token_of_a_join_is_passed_on(body: bytes, code: str, words: str) -> None:
    told = refusal(
        judge_certificate, answer(401, body), SERVER, node_name="edge-1", token=parse_token(token()), now=NOW
    )
    assert told.code == code
    assert words in told.text
    assert "keadm gettoken" in told.text


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        (
            b"failed to verify the certificate for edgenode: b, err: request node name is not match with the certifi",
            NODE_NAME,
            "hostnameOverride",
        ),
        (
            b"failed for edgenode: "
            + b"n" * 253
            + b", err: x509: certificate has expired or is not yet valid: current",
            BAD_CERTIFICATE,
            "Join anew with a token",
        ),
        (b"... x509: certificate signed by unknown authority", BAD_CERTIFICATE, "Is it of this cloud?"),
    ],
)
def test_what_the_cloud_has_against_the_certificate_of_a_rotation_is_passed_on(
    body: bytes, code: str, words: str
) -> None:
    told = refusal(judge_certificate, answer(401, body), SERVER, node_name="edge-1", token=None, now=NOW)
    assert told.code == code
    assert words in told.text


def test_a_failing_cloud_and_one_that_is_none_are_told_apart() -> None:
    for status, code in ((500, CLOUD_FAILED), (502, CLOUD_FAILED), (403, NOT_A_CLOUDHUB), (204, NOT_A_CLOUDHUB)):
        told = refusal(judge_certificate, answer(status), SERVER, node_name="n", token=parse_token(token()), now=NOW)
        assert told.code == code
    told = refusal(judge_certificate, answer(200, b"PEM?"), SERVER, node_name="n", token=parse_token(token()), now=NOW)
    assert told.code == NOT_A_CLOUDHUB


def test_hostile_bytes_reach_the_operator_as_one_short_line() -> None:
    body = b"\x1b[2J\r\n\x00" + b"x" * 5000
    told = refusal(judge_certificate, answer(500, body), SERVER, node_name="n", token=parse_token(token()), now=NOW)
    assert told.text.isprintable()
    assert len(told.text) < 500


def facts(**changes: Any) -> Facts:
    values: dict[str, Any] = {
        "common_name": "system:node:edge-1",
        "organisations": ("system:nodes",),
        "not_before": NOW,
        "not_after": NOW + 365 * DAY,
        "has_our_key": True,
        "is_of_ca": True,
        "is_for_clients": True,
    }
    return Facts(**values | changes)


def test_an_issued_certificate_that_is_right_is_taken() -> None:
    issued = judge_issued(facts(not_before=NOW + 200), SERVER, node_name="edge-1", now=NOW)
    assert (issued.common_name, issued.not_after) == ("system:node:edge-1", NOW + 365 * DAY)


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"common_name": "system:node:other"}, NODE_NAME, "expected 'system:node:edge-1'"),
        ({"has_our_key": False}, BAD_CERTIFICATE, "its key"),
        ({"is_of_ca": False}, BAD_CERTIFICATE, "not signed by the cloud's CA"),
        ({"organisations": ()}, BAD_CERTIFICATE, "organisation"),
        ({"is_for_clients": False}, BAD_CERTIFICATE, "client authentication"),
        ({"not_before": NOW + 301}, CLOCK, "Set the clock"),
        ({"not_after": NOW}, CLOCK, "Set the clock"),
    ],
)
def test_an_issued_certificate_that_is_of_no_use_is_refused(changes: dict[str, Any], code: str, words: str) -> None:
    told = refusal(judge_issued, facts(**changes), SERVER, node_name="edge-1", now=NOW)
    assert told.code == code
    assert words in told.text


# --- clocks ----------------------------------------------------------------------------------------------


def test_a_clock_that_differs_by_minutes_is_refused_and_both_times_are_named() -> None:
    date = "Mon, 23 Nov 2026 17:09:21 GMT"
    assert http_date(date) == NOW
    for now in (NOW, NOW - 299, NOW + 299):
        check_clock(date, now)
    for now in (0.0, NOW - 301, NOW + 301):
        told = refusal(check_clock, date, now)
        assert told.code == CLOCK
        assert "2026-11-23 17:09:21 UTC" in told.text
        assert enrolment.show_time(now) in told.text


@pytest.mark.parametrize("date", [None, "", "yesterday", "Mon, 99 Nov 2026 17:09:21 GMT"])
def test_a_missing_or_strange_date_says_nothing(date: str | None) -> None:
    check_clock(date, NOW)


# --- when to renew -----------------------------------------------------------------------------------------


@given(st.integers(), st.floats(1, 1e9))
def test_a_rotation_is_due_between_seventy_and_ninety_percent_of_the_lifetime(seed: int, lifetime: float) -> None:
    due = RotationSchedule(random.Random(seed), not_before=NOW, not_after=NOW + lifetime).due
    assert NOW + 0.699 * lifetime <= due <= NOW + 0.901 * lifetime


def test_a_fleet_does_not_rotate_at_once() -> None:
    dues = [RotationSchedule(random.Random(n), not_before=0.0, not_after=365 * DAY).due for n in range(100)]
    assert max(dues) - min(dues) > 60 * DAY


def test_a_failed_rotation_is_tried_again_at_growing_intervals() -> None:
    schedule = RotationSchedule(random.Random(1), not_before=NOW, not_after=NOW + 365 * DAY)
    pauses = [schedule.failed() for _ in range(12)]
    assert 1 <= pauses[0] <= 2
    assert all(pause <= 300 for pause in pauses)
    assert min(pauses[8:]) >= 150


def test_a_rotation_of_a_short_life_is_tried_again_while_it_lasts() -> None:
    schedule = RotationSchedule(random.Random(1), not_before=NOW, not_after=NOW + 10)
    assert all(schedule.failed() <= 0.2 for _ in range(20))


def test_only_what_may_pass_by_itself_is_passing() -> None:
    assert frozenset({"unreachable", "cloud-failed", "busy"}) == PASSING
