"""SSL contexts from certificate files, with errors that say what to do."""

from __future__ import annotations

import ctypes
import logging
import ssl
import time
from pathlib import Path
from typing import Final

from modules.edgehub.certificate import Certificate, MalformedCertificate, parse
from modules.edgehub.config import EdgeHubConfig
from modules.edgehub.link import LinkRefused
from runtime.enrolment_files import FileSet

log = logging.getLogger("modules.edgehub")

_SSL_CTRL_MODE: Final = 33  # openssl/ssl.h
_SSL_MODE_NO_AUTO_CHAIN: Final = 0x8
_BEGIN: Final = "-----BEGIN CERTIFICATE-----"
_END: Final = "-----END CERTIFICATE-----"


def client_context(config: EdgeHubConfig, *, now: float | None = None) -> ssl.SSLContext:
    """A context that verifies CloudHub against the CA and presents this node's certificate, and only that.

    The files are read anew on each call, so that replaced ones are used at the next dial. `now` in seconds
    since 1970. Raises LinkRefused naming the file and what is wrong.
    """
    check_certificate(config, now=time.time() if now is None else now)
    _read(config.ca_file, "tlsCaFile")
    _read(config.key_file, "tlsPrivateKeyFile")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # verifies the chain and the host name
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # No ALPN: a client that offers h2 gets HTTP/2 from CloudHub and cannot upgrade.
    try:
        context.load_verify_locations(cafile=config.ca_file)
    except ssl.SSLError as fault:
        raise LinkRefused(f"tlsCaFile {config.ca_file}: expected PEM certificates: {fault}") from fault
    try:
        context.load_cert_chain(config.cert_file, config.key_file, password=_no_password)
    except ssl.SSLError as fault:
        reason = fault.reason or str(fault)
        if reason == "KEY_VALUES_MISMATCH":
            reason = f"it is not the key of the certificate {config.cert_file}"
        raise LinkRefused(f"tlsPrivateKeyFile {config.key_file}: {reason}") from fault
    if not send_one_certificate_only(context):
        log.warning("cannot keep OpenSSL from sending the CA along: a CloudHub with authorization on will reject us")
    return context


def finish_replacement(config: EdgeHubConfig) -> None:
    """Where a crash has left a replacement of the files undone, finish it. Raises LinkRefused."""
    files = FileSet(config.ca_file, config.cert_file, config.key_file)
    try:
        if files.recover():
            log.info("finished a replacement of the certificate that was cut short file=%s", files.cert)
    except (OSError, ValueError) as fault:
        raise LinkRefused(
            f"{files.journal}: a replacement was cut short and cannot be finished: {fault}. "
            "Remove that file, and join anew if certificate and key do not fit"
        ) from fault


def check_certificate(config: EdgeHubConfig, *, now: float) -> Certificate:
    """The node's certificate, if it can serve. Raises LinkRefused."""
    finish_replacement(config)
    _, certificate = read_certificate(config)
    why = objection(certificate, config, now=now)
    if why is not None:
        raise LinkRefused(why)
    return certificate


def read_certificate(config: EdgeHubConfig) -> tuple[bytes, Certificate]:
    """What is in tlsCertFile: its DER, and what it says. Raises LinkRefused."""
    text = _read(config.cert_file, "tlsCertFile")
    where = f"tlsCertFile {config.cert_file}"
    if text.count(_BEGIN) > 1:
        raise LinkRefused(f"{where}: holds {text.count(_BEGIN)} certificates, expected the node's alone")
    try:
        start, stop = text.index(_BEGIN), text.index(_END)
        der = ssl.PEM_cert_to_DER_cert(text[start : stop + len(_END)])
        return der, parse(der)
    except (ValueError, MalformedCertificate) as fault:
        raise LinkRefused(f"{where}: expected one PEM certificate: {fault}") from fault


def objection(certificate: Certificate, config: EdgeHubConfig, *, now: float) -> str | None:
    """Why a certificate cannot serve this node now; None: it can."""
    where = f"tlsCertFile {config.cert_file}"
    if now < certificate.not_before:
        return (
            f"{where}: valid only from {_date(certificate.not_before)}, and this node's clock says {_date(now)}: "
            "set the clock, or wait"
        )
    if now > certificate.not_after:
        return f"{where}: expired {_date(certificate.not_after)} (this node's clock says {_date(now)}): get a new one"
    wanted = f"system:node:{config.node_name}"
    if config.dialect.names_nodes and certificate.common_name != wanted:
        return (
            f"{where}: is for CN={certificate.common_name!r}, expected {wanted!r} (hostnameOverride): "
            "CloudHub with authorization on would reject it without a word"
        )
    return None


def send_one_certificate_only(context: ssl.SSLContext) -> bool:
    """Set SSL_MODE_NO_AUTO_CHAIN; False where this Python does not let us.

    OpenSSL completes the client's chain out of the CAs in the context, and CloudHub with authorization enforced
    silently rejects whoever sends more than one certificate. The `ssl` module cannot set modes.
    """
    try:
        import _ssl

        library = ctypes.CDLL(getattr(_ssl, "__file__", None))
        control, options = library.SSL_CTX_ctrl, library.SSL_CTX_get_options
    except (ImportError, OSError, AttributeError):
        return False
    control.restype, control.argtypes = ctypes.c_long, [ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_void_p]
    options.restype, options.argtypes = ctypes.c_uint64, [ctypes.c_void_p]
    # CPython's PySSLContext: the object header, then SSL_CTX *ctx (Modules/_ssl.c).
    pointer = ctypes.c_void_p.from_address(id(context) + object.__basicsize__).value
    if not pointer or options(pointer) & 0xFFFFFFFF != int(context.options) & 0xFFFFFFFF:
        return False
    return bool(control(pointer, _SSL_CTRL_MODE, _SSL_MODE_NO_AUTO_CHAIN, None) & _SSL_MODE_NO_AUTO_CHAIN)


def explain(fault: BaseException) -> str:
    """A TLS failure in words for the operator."""
    if isinstance(fault, ssl.SSLCertVerificationError):
        return f"CloudHub's certificate does not verify: {fault.verify_message}"
    if isinstance(fault, ssl.SSLError):
        reason = (fault.reason or str(fault)).upper()
        for mark, words in _ALERTS:
            if mark in reason:
                return f"CloudHub refuses our certificate: {words}"
        return f"TLS: {fault.reason or fault}"
    return str(fault) or type(fault).__name__


_ALERTS: Final = (
    ("UNKNOWN_CA", "it is not of CloudHub's CA"),
    ("CERTIFICATE_EXPIRED", "it is expired or not yet valid (compare both clocks)"),
    ("BAD_CERTIFICATE", "it is not for client authentication"),
    ("CERTIFICATE_REQUIRED", "none was sent"),
    ("HANDSHAKE_FAILURE", "none was sent, or no cipher suite in common (TLS 1.2: ECDSA only)"),
)


def _read(path: str, key: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii", errors="replace")
    except OSError as fault:
        raise LinkRefused(f"{key} {path}: {fault.strerror or fault}") from fault


def _no_password() -> str:
    raise LinkRefused("tlsPrivateKeyFile: is encrypted, expected a key without a password")


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
