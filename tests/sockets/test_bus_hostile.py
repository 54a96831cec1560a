"""What a hostile module tries, over real sockets: as another user (where we are root) and over tcp with a key."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgpack
import pytest
import zmq

from runtime import emp, keys, zap
from runtime.access import ANY, Policy, Rule
from runtime.admin import AdminClient
from runtime.broker import Listener, listeners
from runtime.client import Bus
from runtime.config import NodeConfig, PolicyRule, PolicySection, RuntimeSection
from runtime.exposition import OTHER, Facts, render
from runtime.home import Home
from runtime.ledger import compose
from runtime.message import Message
from runtime.policy import make_access
from tests.support.aio import run, until
from tests.support.bus_broker import RawDealer, ThreadBroker
from tests.support.deadline import DEADLINE
from tests.support.mosquitto import free_port

ME = os.geteuid()
as_root = pytest.mark.skipif(ME != 0, reason="needs root, to be two users")


def as_nobody(code: str) -> dict[str, str]:
    """What `code` puts into `found`, run by the user nobody. `attempt(name, function)` notes how a call ends."""
    # All is imported as root: the other user may not be able to read where Python lives.
    before = """
import asyncio, encodings.idna, json, os, secrets, socket, sys, zmq, msgpack
from runtime import emp
from runtime.admin import AdminClient, AdminRefused, BrokerSilent
from tests.support.bus_broker import RawDealer
found = {}
def attempt(name, function):
    try:
        found[name] = str(function())
    except Exception as fault:
        found[name] = type(fault).__name__
os.setgroups([]); os.setgid(65534); os.setuid(65534)
"""
    done = subprocess.run(
        [sys.executable, "-c", before + code + "\nprint(json.dumps(found))"],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


class Fort:
    """A home with a broker: `pump` is nobody's, `fan` is another user's, each through a socket of its own."""

    def __init__(self, home: Home) -> None:
        self.home = home
        rules = {
            "pump": PolicyRule(users=["nobody"], to=["sink"], own_socket=True),
            "fan": PolicyRule(users=[12345], to=["sink"], own_socket=True),
        }
        config = NodeConfig(runtime=RuntimeSection(policy=PolicySection(enable=True, modules=rules)))
        found = listeners(config, home, f"ipc://{home.bus_socket}")
        self.pump, self.fan = found[1].endpoint, found[2].endpoint
        self.broker = ThreadBroker(home.run, access=make_access(config), listeners=found[1:])


@pytest.fixture
def fort() -> Iterator[Fort]:
    # pytest's own directories are closed to other users.
    directory = Path(tempfile.mkdtemp(prefix="edgezmq-uid-"))
    directory.chmod(0o755)
    try:
        found = Fort(Home(directory / "home").prepare())
        with found.broker:
            yield found
    finally:
        shutil.rmtree(directory)


@as_root
def test_the_files_of_the_bus_are_closed_to_other_users(fort: Fort) -> None:
    home, pump, fan = fort.home, fort.home.own_socket("pump"), fort.home.own_socket("fan")
    (home.run / "node.json").write_text("{}")
    os.chmod(home.run / "node.json", 0o600)
    keys.make(home.curve, keys.BROKER)
    before = {path: path.lstat().st_ino for path in (pump, fan)}
    outcome = as_nobody(f"""
pump, fan, bus, home = {str(pump)!r}, {str(fan)!r}, {str(pump.parent)!r}, {str(home.path)!r}
def connect(path): socket.socket(socket.AF_UNIX).connect(path)
attempt("own socket", lambda: connect(pump))
attempt("another's", lambda: connect(fan))
attempt("the shared one", lambda: connect(home + "/run/bus.sock"))
attempt("list", lambda: os.listdir(bus))
attempt("make", lambda: open(bus + "/x", "w"))
attempt("unlink", lambda: os.unlink(fan))
attempt("unlink own", lambda: os.unlink(pump))
attempt("replace", lambda: os.rename(pump, fan))
attempt("symlink", lambda: os.symlink("/etc/passwd", bus + "/new.sock"))
attempt("link", lambda: os.link(pump, bus + "/new.sock"))
attempt("chmod", lambda: os.chmod(fan, 0o666))
attempt("chmod bus", lambda: os.chmod(bus, 0o777))
attempt("bind", lambda: socket.socket(socket.AF_UNIX).bind(bus + "/new.sock"))
attempt("home", lambda: os.listdir(home))
attempt("node.json", lambda: open(home + "/run/node.json"))
attempt("secret key", lambda: open(home + "/pki/curve/broker.key_secret"))
""")
    assert outcome.pop("own socket") == "None"
    assert set(outcome.values()) == {"PermissionError"}, outcome
    assert {path: path.lstat().st_ino for path in (pump, fan)} == before


@as_root
def test_another_user_gets_no_other_name_and_no_question_answered(fort: Fort) -> None:
    outcome = as_nobody(f"""
def hello(name, groups=()):
    with RawDealer({fort.pump!r}) as dealer:
        dealer.put(emp.HELLO, emp.Hello(name, list(groups), secrets.token_bytes(16), 0, 15000, "raw"))
        while True:
            frames = dealer._socket.recv_multipart()
            if frames[0] != emp.WHO:
                return frames[0].decode() + " " + (emp.decode(frames)[1].code if frames[0] == emp.REFUSED else "")
for name in ("edgehub", "eventbus", "fan", "sink", "Pump", "broker"):
    attempt(name, lambda: hello(name))
attempt("group", lambda: hello("pump", ["hub"]))
attempt("huge", lambda: hello("x" * 1_000_000))
def ask(op):
    with AdminClient({fort.pump!r}) as admin:
        return admin.ask(op)
for op in ("status", "tap", "presence", "reload", "policy.reload", "drain", "ledger"):
    attempt(op, lambda: ask(op))
def twice():
    with RawDealer({fort.pump!r}) as dealer:
        dealer.hello("pump")
        dealer.put(emp.HELLO, emp.Hello("edgehub", ["hub"], secrets.token_bytes(16), 0, 15000, "raw"))
        code = dealer.get(emp.REFUSED).code
        dealer.put(emp.SEND, emp.Send("sink", 3, 1, 1, 1), b"\\x91\\x90")
        return code + " " + dealer.get(emp.WHO).__class__.__name__
def myself():
    with RawDealer({fort.pump!r}) as dealer:
        session = dealer.hello("pump").session
        dealer.put(emp.BYE, emp.Bye(True))
        return session > 0
attempt("myself", myself)
attempt("twice", twice)
""")
    assert outcome.pop("myself") == "True"
    assert outcome.pop("twice") == "denied Who"
    assert outcome.pop("huge") == "REFUSED/1 bad-header"
    for op in ("status", "tap", "presence", "reload", "policy.reload", "drain", "ledger"):
        assert outcome.pop(op) == "AdminRefused"
    assert set(outcome.values()) == {"REFUSED/1 denied"}, outcome
    assert fort.broker.status("edgehub") == {}


@as_root
def test_a_denial_is_in_the_ledger_and_in_the_metrics(fort: Fort) -> None:
    outcome = as_nobody(f"""
from runtime.client import Bus
from runtime.errors import Refused
from runtime.message import Message
async def main():
    refused = []
    async with Bus.connect("pump", endpoint={fort.pump!r}) as bus:
        for to in ("edgehub", "@hub", "fan"):
            try:
                await (await bus.send(to, Message.build(source="edgehub", content="x")))
            except Refused as fault:
                refused.append(fault.reason)
        with AdminClient({fort.pump!r}) as admin:
            attempt("tap", lambda: admin.ask("tap"))
    return refused
attempt("send", lambda: asyncio.run(main()))
""")
    assert outcome["send"] == "['denied', 'denied', 'denied']"
    with AdminClient(fort.broker.endpoint) as admin:
        status = admin.ask("status")
    ledger = compose(status, None)
    assert {"module": "pump", "reason": "denied", "messages": 3} in ledger["refused"]
    assert ledger["balanced"]
    text = exposed(status)
    assert f'edgezmq_module_refused_messages_total{{module="{OTHER}",reason="denied"}} 3' in text  # it has left
    assert 'edgezmq_broker_refused_frames_total{code="denied"} 1' in text


# --- over tcp -----------------------------------------------------------------------------------------


class Harbour:
    """A broker on tcp that admits the key of `pump`."""

    def __init__(self, directory: Path) -> None:
        self.server = keys.make(directory, keys.BROKER)
        self.pump = keys.make(directory, "pump")
        self.port = free_port()
        self.endpoint = f"tcp://127.0.0.1:{self.port}"
        rules = {
            "pump": Rule(keys=frozenset({self.pump.public}), destinations=frozenset({"sink"})),
            "sink": Rule(uids=frozenset({ME}), destinations=frozenset({ANY})),
        }
        self.broker = ThreadBroker(
            directory,
            access=Policy(rules, own_uid=ME),
            listeners=[Listener(self.endpoint, secret_key=self.server.secret)],
            admitted=[self.pump.public],
        )

    def dealer(self, public: bytes | None, secret: bytes = b"") -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RECONNECT_IVL, 5)
        if public is not None:
            socket.curve_publickey, socket.curve_secretkey = public, secret
            socket.curve_serverkey = self.server.public.encode()
        socket.connect(self.endpoint)
        return socket


@pytest.fixture
def harbour(tmp_path: Path) -> Iterator[Harbour]:
    found = Harbour(tmp_path)
    with found.broker:
        yield found


def test_over_tcp_nobody_asks_and_nobody_is_somebody_elses_name(harbour: Harbour) -> None:
    with harbour.dealer(harbour.pump.public.encode(), harbour.pump.secret.encode()) as dealer:
        dealer.setsockopt(zmq.RCVTIMEO, int(DEADLINE * 1000))
        for op in ("status", "tap", "reload"):
            dealer.send_multipart([emp.ADMIN, msgpack.packb([1, op, False]), msgpack.packb({})])
            assert emp.decode(dealer.recv_multipart())[1].code == emp.DENIED
        for name in ("sink", "edgehub"):
            dealer.send_multipart(emp.encode(emp.HELLO, emp.Hello(name, [], os.urandom(16), 0, 15000, "raw")))
            assert emp.decode(dealer.recv_multipart())[1].code == emp.HELLO_DENIED


def test_a_flood_of_wrong_keys_is_turned_away_and_counted_and_holds_nobody_up(
    harbour: Harbour, caplog: pytest.LogCaptureFixture
) -> None:
    public, secret = zmq.curve_keypair()
    flood = [harbour.dealer(public, secret) for _ in range(50)]  # each tries again every few ms
    plain = [harbour.dealer(None) for _ in range(5)]  # mechanism NULL
    try:

        async def scenario() -> None:
            async def take(message: Message) -> None:
                pass

            async with (
                Bus.connect("sink", handler=take, endpoint=harbour.broker.endpoint),
                Bus.connect("other", handler=take, endpoint=harbour.broker.endpoint) as other,
            ):
                end = time.monotonic() + DEADLINE
                while harbour.broker.held()["refused_frames"].get("turned-away", 0) < 50:
                    assert time.monotonic() < end
                    await (await other.send("sink", Message.build(content="x")))

        run(scenario())
        told = [record for record in caplog.records if "turned away" in record.message]
        assert len(told) == 1  # not a line for each of its tries
        assert zap.fingerprint(public.decode()) in told[0].message
        assert not [module for module in harbour.broker.core.statistics(0.0)["modules"] if module["uid"] != ME]  # type: ignore[union-attr]
    finally:
        for socket in (*flood, *plain):
            socket.close(linger=0)


def test_another_domain_or_mechanism_is_no_way_past_zap() -> None:
    key = b"k" * 32
    admitted = {zap.z85(key)}
    good = [b"1.0", b"1", b"edgezmq", b"127.0.0.1", b"", b"CURVE", key]
    assert zap.answer(good, admitted)[0][2] == b"200"
    for place, value in ((0, b"2.0"), (5, b"NULL"), (5, b"PLAIN"), (5, b"curve"), (6, b""), (6, key + b"k")):
        bad = [*good]
        bad[place] = value
        assert zap.answer(bad, admitted)[0][2] in (b"400", b"500")
    assert zap.answer([*good, key], admitted)[0][2] == b"500"
    assert zap.answer([], admitted)[0][2] == b"500"


# --- quotas -------------------------------------------------------------------------------------------


def test_reconnecting_gives_no_fresh_quota(tmp_path: Path) -> None:
    rules = {
        "pump": Rule(uids=frozenset({ME}), destinations=frozenset({ANY}), messages_per_second=50),
        "sink": Rule(uids=frozenset({ME}), destinations=frozenset({ANY})),
    }
    came = 0

    async def take(message: Message) -> None:
        nonlocal came
        came += message.delivery.sender == "pump"

    async def scenario() -> None:
        stop = threading.Event()

        def hostile() -> None:
            body = msgpack.packb([["", "", 0, False, "", "", "", "", "", "text", b"x"]])
            while not stop.is_set():
                with RawDealer(broker.endpoint) as dealer:
                    dealer.hello("pump")
                    for number in range(1, 41):
                        dealer.put(emp.SEND, emp.Send("sink", 3, number, 1, 1), body)
                    dealer.put(emp.BYE, emp.Bye(True))
                    dealer.put(emp.ADMIN, emp.Admin(1, "status"))
                    dealer.get(emp.ADMIN)  # all of it is read

        async with Bus.connect("sink", handler=take, endpoint=broker.endpoint):
            thread = threading.Thread(target=hostile)
            began = time.monotonic()
            thread.start()
            try:
                await until(lambda: came >= 100, "what the quota allows")
                # A second's worth at first, and one batch's debt.
                assert came <= 50 * (time.monotonic() - began + 1) + 1
            finally:
                stop.set()
                await asyncio.to_thread(thread.join, DEADLINE)

    with ThreadBroker(tmp_path, access=Policy(rules, own_uid=ME)) as broker:
        run(scenario())


def test_a_module_cannot_send_more_than_it_says(tmp_path: Path) -> None:
    """A batch that says it is one message and holds many: the receiver refuses it."""
    refused: list[str] = []

    async def take(message: Message) -> None:
        refused.append("handled")

    async def scenario() -> None:
        async with Bus.connect("sink", handler=take, endpoint=broker.endpoint):
            with RawDealer(broker.endpoint) as dealer:
                dealer.hello("pump")
                one = ["", "", 0, False, "", "", "", "", "", "text", b"x"]
                dealer.put(emp.SEND, emp.Send("sink", 3, 1, 1, 1), msgpack.packb([one] * 100))
                settled = await asyncio.to_thread(dealer.get, emp.SETTLED)
                assert settled.exceptions == [(1, "invalid", None)]
        assert refused == []

    with ThreadBroker(tmp_path) as broker:
        run(scenario())


def exposed(status: dict[str, object]) -> str:
    return render(Facts(version="1", python="3", node="node-1", bus=status))
