"""Who gets in and as whom, over real sockets: users over ipc (two of them when we are root), CURVE keys over tcp."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
from zmq.utils.monitor import recv_monitor_message

from runtime import emp, keys
from runtime.access import ANY, Policy, Rule
from runtime.broker import Listener
from runtime.client import Bus
from runtime.config import NodeConfig, PolicyRule, PolicySection, RuntimeSection
from runtime.emp import Limits
from runtime.errors import ConfigError, HelloRefused, Refused
from runtime.home import Home
from runtime.keys import KeyPair
from runtime.message import Message
from tests.support.aio import run, until
from tests.support.bus_broker import ThreadBroker
from tests.support.deadline import DEADLINE
from tests.support.mosquitto import free_port

ME = os.geteuid()
SECRET = "a secret that must not be seen"


def me(**grants: object) -> Rule:
    return Rule(uids=frozenset({ME}), destinations=frozenset({ANY}), **grants)  # type: ignore[arg-type]


async def take(message: Message) -> None:
    """Handle it, and that is that."""


# --- users over ipc -----------------------------------------------------------------------------------


def test_the_kernel_says_who_asks_and_a_rule_who_may(tmp_path: Path) -> None:
    async def scenario(broker: ThreadBroker) -> None:
        async with Bus.connect("mine", endpoint=broker.endpoint), Bus.connect("unruled", endpoint=broker.endpoint):
            pass
        with pytest.raises(HelloRefused, match=f"uid {ME} may not be 'theirs'"):
            async with Bus.connect("theirs", endpoint=broker.endpoint):
                pass
        with pytest.raises(HelloRefused, match="may not be in hub"):
            async with Bus.connect("mine", groups={"hub"}, endpoint=broker.endpoint):
                pass

    rules = {"mine": me(), "theirs": Rule(uids=frozenset({ME + 1}))}
    with ThreadBroker(tmp_path, access=Policy(rules, own_uid=ME)) as broker:
        run(scenario(broker))


def test_a_socket_of_its_own_is_the_only_way_in_for_its_module(tmp_path: Path) -> None:
    own = f"ipc://{tmp_path}/pump.sock"

    async def scenario(broker: ThreadBroker) -> None:
        async with (
            Bus.connect("pump", endpoint=own) as pump,
            Bus.connect("fan", handler=take, endpoint=broker.endpoint),
        ):
            await (await pump.send("fan", Message.build(content="x")))
        with pytest.raises(HelloRefused, match="through its own socket only"):
            async with Bus.connect("pump", endpoint=broker.endpoint):
                pass
        with pytest.raises(HelloRefused, match="this socket is 'pump''s alone"):
            async with Bus.connect("fan", endpoint=own):
                pass

    access = Policy({"pump": me(has_own_socket=True)}, own_uid=ME)
    with ThreadBroker(tmp_path, access=access, listeners=[Listener(own, "pump", mode=0o600)]) as broker:
        assert (tmp_path / "pump.sock").stat().st_mode & 0o777 == 0o600
        run(scenario(broker))


@pytest.mark.skipif(ME != 0, reason="needs root, to be two users")
def test_another_user_gets_its_own_name_through_its_own_socket_and_nothing_else(tmp_path: Path) -> None:
    from runtime.broker import listeners
    from runtime.policy import make_access

    nobody = pwd.getpwnam("nobody").pw_uid
    # pytest's own directories are closed to other users.
    directory = Path(tempfile.mkdtemp(prefix="edgezmq-uid-"))
    directory.chmod(0o755)
    home = Home(directory / "home")
    home.prepare()
    rule = PolicyRule(users=["nobody"], to=["sink"], own_socket=True)
    config = NodeConfig(runtime=RuntimeSection(policy=PolicySection(enable=True, modules={"pump": rule})))
    found = listeners(config, home, f"ipc://{home.bus_socket}")
    own = found[1].endpoint
    try:
        with ThreadBroker(home.run, access=make_access(config), listeners=found[1:]) as broker:
            assert home.own_socket("pump").stat().st_uid == nobody
            assert home.own_socket("pump").stat().st_mode & 0o777 == 0o600
            assert as_user(nobody, own, "pump", "sink") == "settled"
            assert as_user(nobody, own, "pump", "edgehub") == "refused denied"
            assert as_user(nobody, own, "sink", "sink") == "hello refused"
            assert as_user(nobody, broker.endpoint, "pump", "sink") == "cannot connect"  # its directory is closed
    finally:
        shutil.rmtree(directory)


def as_user(uid: int, endpoint: str, name: str, to: str) -> str:
    """What becomes of one message that a process of `uid` sends as `name`; somebody of ours is `sink`."""
    # All is imported as root: the other user may not be able to read where Python lives.
    code = f"""
import asyncio, encodings.idna, os, socket, sys, zmq
from runtime.client import Bus
from runtime.errors import HelloRefused, Refused
from runtime.message import Message

async def main():
    try:
        async with Bus.connect({name!r}, endpoint={endpoint!r}) as bus:
            await (await bus.send({to!r}, Message.build(content="x")))
            print("settled")
    except Refused as refused:
        print("settled" if refused.reason == "unroutable" else f"refused {{refused.reason}}")
    except HelloRefused:
        print("hello refused")

os.setgroups([])
os.setgid({uid})
os.setuid({uid})
try:
    socket.socket(socket.AF_UNIX).connect({endpoint.removeprefix("ipc://")!r})
except PermissionError:
    sys.exit("cannot connect")
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=DEADLINE, check=False)
    return done.stdout.strip() or done.stderr.strip()


# --- keys over tcp ------------------------------------------------------------------------------------


class Tcp:
    """A broker on tcp with CURVE, and keys of `pump` (which a rule names) and of a stranger."""

    def __init__(self, directory: Path) -> None:
        self.broker_keys = keys.make(directory, keys.BROKER)
        self.pump = keys.make(directory, "pump")
        self.stranger = keys.make(directory, "stranger")
        self.port = free_port()
        self.endpoint = f"tcp://127.0.0.1:{self.port}"
        rules = {
            "pump": Rule(keys=frozenset({self.pump.public}), destinations=frozenset({"sink"})),
            "fan": Rule(keys=frozenset({"f" * 40}), destinations=frozenset({ANY})),
        }
        self.broker = ThreadBroker(
            directory,
            access=Policy(rules, own_uid=ME),
            listeners=[Listener(self.endpoint, secret_key=self.broker_keys.secret)],
            admitted=[self.pump.public],
        )


@pytest.fixture
def tcp(tmp_path: Path) -> Iterator[Tcp]:
    found = Tcp(tmp_path)
    with found.broker:
        yield found


@pytest.fixture
def as_pump(tcp: Tcp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEZMQ_CURVE_KEY", str(tmp_path / "pump.key_secret"))
    monkeypatch.setenv("EDGEZMQ_CURVE_SERVER", tcp.broker_keys.public)


@pytest.mark.usefixtures("as_pump")
def test_a_module_on_another_host_comes_in_with_its_key_and_does_what_its_rule_grants(tcp: Tcp) -> None:
    async def scenario() -> None:
        got: list[tuple[str, str]] = []

        async def handler(message: Message) -> None:
            got.append((message.delivery.sender, message.resource))

        async with (
            Bus.connect("sink", handler=handler, endpoint=tcp.broker.endpoint),
            Bus.connect("other", handler=handler, endpoint=tcp.broker.endpoint),
            Bus.connect("pump", endpoint=tcp.endpoint) as pump,
        ):
            for number in range(500):
                await pump.send("sink", Message.build(resource=str(number)))
            await (await pump.send("sink", Message.build(resource="500")))
            assert got == [("pump", str(number)) for number in range(501)]
            with pytest.raises(Refused, match="denied"):
                await (await pump.send("other", Message.build()))

    run(scenario())


@pytest.mark.usefixtures("as_pump")
def test_a_stolen_key_is_worth_its_own_name_only(tcp: Tcp) -> None:
    async def scenario() -> None:
        for name in ("fan", "edgehub", "sink"):
            with pytest.raises(HelloRefused):
                async with Bus.connect(name, endpoint=tcp.endpoint):
                    pass

    run(scenario())


def outcome(tcp: Tcp, pair: KeyPair | None, server: str | None) -> int:
    """What becomes of a connection's handshake."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.setsockopt(zmq.RECONNECT_IVL, -1)
        if pair is not None and server is not None:
            dealer.setsockopt_string(zmq.CURVE_PUBLICKEY, pair.public)
            dealer.setsockopt_string(zmq.CURVE_SECRETKEY, pair.secret)
            dealer.setsockopt_string(zmq.CURVE_SERVERKEY, server)
        with dealer.get_monitor_socket() as monitor:
            monitor.setsockopt(zmq.RCVTIMEO, int(DEADLINE * 1000))
            dealer.connect(tcp.endpoint)
            dealer.send_multipart([emp.HELLO, b"\x90"])
            while True:
                event = int(recv_monitor_message(monitor)["event"])
                if event in ENDS:
                    dealer.disable_monitor()
                    return event


ENDS = {
    zmq.EVENT_HANDSHAKE_SUCCEEDED,
    zmq.EVENT_HANDSHAKE_FAILED_AUTH,
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL,
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL,
    zmq.EVENT_DISCONNECTED,
}


def test_keys_that_no_rule_names_wrong_ones_and_none_do_not_come_in(tcp: Tcp) -> None:
    right, server = tcp.pump, tcp.broker_keys.public
    assert outcome(tcp, right, server) == zmq.EVENT_HANDSHAKE_SUCCEEDED
    assert outcome(tcp, tcp.stranger, server) == zmq.EVENT_HANDSHAKE_FAILED_AUTH
    assert outcome(tcp, KeyPair(right.public, tcp.stranger.secret), server) != zmq.EVENT_HANDSHAKE_SUCCEEDED
    assert outcome(tcp, right, tcp.stranger.public) != zmq.EVENT_HANDSHAKE_SUCCEEDED
    assert outcome(tcp, None, None) != zmq.EVENT_HANDSHAKE_SUCCEEDED


class Eavesdropper:
    """A TCP relay that keeps every byte."""

    def __init__(self, target: int) -> None:
        self.seen = bytearray()
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._sockets: list[socket.socket] = [self._listener]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self._target))
            self._sockets += [near, far]
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._pass, args=(source, sink), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                self.seen += data
                sink.sendall(data)
        except OSError:
            pass

    def close(self) -> None:
        for each in self._sockets:
            each.close()


def heard(endpoint_of: Tcp | ThreadBroker, port: int, name: str) -> bytes:
    """What an eavesdropper on the line sees of one message from `name` to `sink`."""
    ear = Eavesdropper(port)
    broker = endpoint_of.broker if isinstance(endpoint_of, Tcp) else endpoint_of

    async def scenario() -> None:
        got: list[Message] = []

        async def handler(message: Message) -> None:
            got.append(message)

        async with (
            Bus.connect("sink", handler=handler, endpoint=broker.endpoint),
            Bus.connect(name, endpoint=f"tcp://127.0.0.1:{ear.port}") as sender,
        ):
            await (await sender.send("sink", Message.build(content=SECRET)))
            await until(lambda: got, "the message")
            assert got[0].text() == SECRET

    try:
        run(scenario())
        return bytes(ear.seen)
    finally:
        ear.close()


@pytest.mark.usefixtures("as_pump")
def test_an_eavesdropper_on_tcp_learns_nothing(tcp: Tcp) -> None:
    seen = heard(tcp, tcp.port, "pump")
    assert len(seen) > len(SECRET)
    assert SECRET.encode() not in seen
    assert b"sink" not in seen
    assert tcp.pump.secret.encode() not in seen


def test_the_eavesdropper_does_hear_what_is_not_encrypted(tmp_path: Path) -> None:
    port = free_port()
    plain = [Listener(f"tcp://127.0.0.1:{port}")]
    with ThreadBroker(tmp_path, listeners=plain, limits=Limits()) as broker:
        assert SECRET.encode() in heard(broker, port, "pump")


def test_half_a_setting_for_curve_is_an_error(tcp: Tcp, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Bus.connect("pump", endpoint=tcp.endpoint):
            pass

    monkeypatch.setenv("EDGEZMQ_CURVE_KEY", str(tmp_path / "pump.key_secret"))
    with pytest.raises(ConfigError, match="EDGEZMQ_CURVE_SERVER"):
        run(scenario())
    monkeypatch.setenv("EDGEZMQ_CURVE_SERVER", "short")
    with pytest.raises(ConfigError, match="40 characters"):
        run(scenario())
