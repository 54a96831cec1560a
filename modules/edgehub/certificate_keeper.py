"""Keeps the node's certificate: joins when there is none, renews it in time, notices files that somebody else laid.

What is asked of the cloud is done by a process of its own (runtime/enrolling.py), which ends with its memory.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, Final, NoReturn

import msgspec

from modules.edgehub import tls
from modules.edgehub.certificate_plan import CertificatePlan, Seen, Standing, Step
from modules.edgehub.config import EdgeHubConfig
from modules.edgehub.link import LinkRefused
from runtime import enrolment
from runtime.enrolment import Job, Outcome

log = logging.getLogger("modules.edgehub")

_REQUEST_SECONDS: Final = 30.0
_JOB_SECONDS: Final = 90.0
"Two requests, and what a slow board takes to start a process."


class CertificateKeeper:
    """`run` it for life. `on_change` is called when there is another certificate to dial with, or one at last."""

    def __init__(
        self,
        config: EdgeHubConfig,
        chance: random.Random,
        on_change: Callable[[], None],
        *,
        enrol: Callable[[Job], Awaitable[Outcome]] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._config = config
        self._on_change = on_change
        self._enrol = enrol or do_in_a_process
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        can_ask = bool(config.certificate_server) and config.dialect.issues_certificates
        self._plan = CertificatePlan(
            chance,
            has_token=can_ask and bool(config.token),
            may_renew=can_ask and config.rotate_certificates,
        )
        self._fingerprint = b""
        self._counts: Counter[str] = Counter()
        self._said = ""
        self._look()  # before the first dial, so that a crash in the middle of a replacement is mended by then

    @property
    def joining(self) -> str | None:
        """In words, while the node has no certificate and tries to get one."""
        return self._plan.joining()

    async def run(self) -> NoReturn:
        while True:
            step = self._plan.step(now=self._loop.time(), wall=self._clock())
            is_issued = False
            if step is None:
                self._complain()
                await asyncio.sleep(self._plan.next_look(now=self._loop.time(), wall=self._clock()))
            else:
                is_issued = await self._do(step)
            if self._look():
                self._on_change()
            if is_issued:
                self._plan.issued(now=self._loop.time(), wall=self._clock())

    async def _do(self, step: Step) -> bool:
        """Whether a certificate came of it."""
        config = self._config
        job = Job(
            server=config.certificate_server,
            node_name=config.node_name,
            ca_file=config.ca_file,
            cert_file=config.cert_file,
            key_file=config.key_file,
            token=config.token if step is Step.JOIN else "",
            seconds=_REQUEST_SECONDS,
            server_name=config.server_name,
            proxy=config.proxy,
            proxy_password_file=config.proxy_password_file,
            proxy_ca_file=config.proxy_ca_file,
        )
        outcome = await self._enrol(job)
        if outcome.issued is not None:
            self._counts["joins" if step is Step.JOIN else "rotations"] += 1
            until = enrolment.show_time(outcome.issued.not_after)
            log.info("certificate %s name=%s until=%s", _DONE[step], outcome.issued.common_name, until)
            return True
        self._counts["refusals"] += 1
        self._plan.refused(outcome.code, outcome.text, now=self._loop.time(), wall=self._clock())
        log.warning("certificate not %s code=%s why=%s", _DONE[step], outcome.code, outcome.text)
        return False

    def _look(self) -> bool:
        """Read the files; True when a link dialled now would come about otherwise than one at the last look."""
        was_valid = self._plan.seen.standing is Standing.VALID
        try:
            seen, fingerprint = self._read()
        except LinkRefused as fault:
            seen, fingerprint = Seen(Standing.BROKEN, str(fault)), b""
        self._plan.saw(seen)
        is_other = fingerprint != self._fingerprint
        self._fingerprint = fingerprint or self._fingerprint
        return seen.standing is Standing.VALID and (is_other or not was_valid)

    def _read(self) -> tuple[Seen, bytes]:
        config, wall = self._config, self._clock()
        tls.finish_replacement(config)
        for key, path in (
            ("tlsCaFile", config.ca_file),
            ("tlsCertFile", config.cert_file),
            ("tlsPrivateKeyFile", config.key_file),
        ):
            if not os.path.exists(path):  # unlike Path.exists it raises nothing
                return Seen(Standing.MISSING, f"{key} {path}: no such file"), b""
        der, certificate = tls.read_certificate(config)
        span = certificate.not_before, certificate.not_after
        fingerprint = hashlib.sha256(der).digest()
        why = tls.objection(certificate, config, now=wall)
        if why is None:
            return Seen(Standing.VALID, "", *span), fingerprint
        if wall < certificate.not_before:
            standing = Standing.NOT_YET_VALID
        elif wall > certificate.not_after:
            standing = Standing.EXPIRED
        else:
            standing = Standing.OTHER_NODE
        return Seen(standing, why, *span), fingerprint

    def _complain(self) -> None:
        """Into the log, once for each thing to complain about."""
        warning = self._plan.warning(wall=self._clock())
        standing = f"{self._plan.seen.standing} {self._plan.refusal.code if self._plan.refusal else ''}"
        if warning is not None and standing != self._said:
            log.warning("certificate: %s", warning)
        self._said = standing if warning is not None else "-"

    # --- what others may know ----------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """For the CLI: JSON values only."""
        plan, wall = self._plan, self._clock()
        seen, refusal = plan.seen, plan.refusal
        return {
            "standing": seen.standing.value,
            "why": seen.why or None,
            "not_after": seen.not_after or None,
            "expires_in_seconds": round(seen.not_after - wall) if seen.not_after else None,
            "rotation_due": plan.rotation_due,
            "joining": plan.joining(),
            "warning": plan.warning(wall=wall),
            "last_refusal": None
            if refusal is None
            else {"code": refusal.code, "text": refusal.text, "at": refusal.wall},
        }

    def counters(self) -> dict[str, int]:
        return {
            "certificate_not_after": int(self._plan.seen.not_after),
            "certificate_usable": int(self._plan.seen.standing is Standing.VALID),
            "certificate_joins": self._counts["joins"],
            "certificate_rotations": self._counts["rotations"],
            "certificate_refusals": self._counts["refusals"],
        }


_DONE: Final = {Step.JOIN: "issued", Step.RENEW: "renewed"}


async def do_in_a_process(job: Job) -> Outcome:
    """The job in a short-lived process; secrets go through its standard input. Raises nothing but cancellation."""
    try:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "runtime.enrolling"), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
    except OSError as fault:
        return Outcome(code=enrolment.INTERNAL, text=f"no process can be started: {fault.strerror or fault}")
    try:
        async with asyncio.timeout(_JOB_SECONDS):
            said, _ = await process.communicate(msgspec.json.encode(job))
        return msgspec.json.decode(said, type=Outcome)
    except TimeoutError:
        return Outcome(code=enrolment.UNREACHABLE, text=f"{job.server}: no certificate within {_JOB_SECONDS:g} s")
    except msgspec.DecodeError:
        return Outcome(
            code=enrolment.INTERNAL,
            text=f"python -m runtime.enrolling ended with status {process.returncode}; see above",
        )
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
