"""Our QUIC link against a stranger: a CloudHub and an edge node in Go, on quic-go, written from the contract."""

import json
import subprocess
from pathlib import Path

import pytest

from cloudsim.certificates import Authority
from tests.peers.quicgo_program import SOURCE, GoEdge, GoHub, build, find_go
from tests.support.aio import run, until

ALPN = "edgezmq"
NODE = "edge-1"

OBJECT = {
    "source": "edgecontroller",
    "group": "resource",
    "operation": "update",
    "resource": "default/configmap/settings",
    "content": '{"data":{"n":"{n}"}}',
    "ack": True,
}
"Needs an ack."
COMMAND = {
    "source": "router_eventbus",
    "group": "user",
    "operation": "publish",
    "resource": "commands/lamp",
    "content": '{"n":{n}}',
}
"Needs none."


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("quicgo") / "quicgo")


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "pki")


# --- the peer itself ----------------------------------------------------------------------------------


def test_the_peer_is_written_as_go_people_write_and_meets_the_vectors(program: Path) -> None:
    go = find_go()
    assert go is not None  # the program has been built with it
    unformatted = subprocess.run([Path(go).with_name("gofmt"), "-l", "."], cwd=SOURCE, capture_output=True, check=True)
    assert unformatted.stdout == b""
    for arguments in (["vet", "./..."], ["test", "./..."]):
        done = subprocess.run([go, *arguments], cwd=SOURCE, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("rotate", [False, True])
def test_the_peers_hub_and_edge_understand_each_other(
    program: Path, tmp_path: Path, authority: Authority, rotate: bool
) -> None:
    async def scenario() -> None:
        flags = {"alpn": ALPN, "authorization": True, "rotate": rotate, "validate_address": True}
        async with (
            GoHub(program, tmp_path, authority, **flags) as hub,
            GoEdge(program, authority, NODE, hub.port, alpn=ALPN, uploads="1000", expect="20") as edge,
        ):
            await until(lambda: edge.saw("uploaded"), "the uploads")
            objects = await hub.send(NODE, **OBJECT, count=10)
            commands = await hub.send(NODE, **COMMAND, count=10)
            assert await edge.finish() == ""
            assert [each["id"] for each in edge.saw("received") if each["group"] == "resource"] == objects
            assert [each["id"] for each in edge.saw("received") if each["group"] == "user"] == commands
            uploads = [each for each in await hub.received() if each["operation"] == "upload"]
            assert [json.loads(each["content"])["n"] for each in uploads] == list(range(1000))
            assert all([(await hub.delivery(each))["acked"] for each in objects])
            assert await hub.faults() == []

    run(scenario())
