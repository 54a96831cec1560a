"""`edgezmq join` as an operator meets it: where the token comes from, where the files go, what is refused."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.cli import joining, settings
from runtime.cli.joining import find_place, read_token, without_token
from runtime.enrolment import NODE_NAME
from runtime.errors import ConfigError, NotEnrolled
from runtime.home import Home
from tests.runtime.cli.test_main import edgezmq
from tests.support.deadline import DEADLINE
from tests.support.joined import Cloud, cloud_in_a_thread

CONFIG = """
modules:
  edged: {hostnameOverride: edge-9}
  edgeHub: {httpServer: "https://old:10002", tlsCaFile: a/ca.crt, tlsCertFile: a/n.crt, tlsPrivateKeyFile: a/n.key}
"""


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Cloud]:
    with cloud_in_a_thread(tmp_path / "cloud") as made:
        yield made


# --- the token ------------------------------------------------------------------------------------------


def test_the_token_of_a_join_comes_from_an_argument_a_file_stdin_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text(" from a file\n")
    assert read_token("given", "", {}) == "given"
    assert read_token("", str(tmp_path / "token"), {"EDGEZMQ_TOKEN": "other"}) == "from a file"
    assert read_token("", "", {"EDGEZMQ_TOKEN": "from the environment\n"}) == "from the environment"
    assert read_token("", "", {}) == ""
    monkeypatch.setattr(sys, "stdin", io.StringIO("from stdin\n"))
    assert read_token("", "-", {}) == "from stdin"
    with pytest.raises(ConfigError, match="one of --token and --token-file"):
        read_token("a", "b", {})


@pytest.mark.parametrize("words", [["--token", "SECRET"], ["--token=SECRET"]])
def test_a_token_among_the_arguments_is_taken_out_of_them(words: list[str]) -> None:
    hidden, secret = without_token(["edgezmq", "join", *words, "--server", "x"], "/dev/fd/5")
    assert hidden == ["edgezmq", "join", "--token-file", "/dev/fd/5", "--server", "x"]
    assert secret == "SECRET"


def test_without_a_token_there_is_nothing_to_hide() -> None:
    for words in (["join", "--token-file", "f"], ["join", "--token"]):
        assert without_token(words, "x") == (words, "")


# --- where it goes ----------------------------------------------------------------------------------------


def test_a_node_without_configuration_that_joins_gets_one_that_is_valid(tmp_path: Path) -> None:
    place = find_place(Home(tmp_path), None, server="cloud.example", cloudhub="", node_name="edge-1")
    place.path.write_text(place.new_text)
    config, _ = settings.read(place.path)
    assert config == place.config
    assert config.edge_hub.http_server == "https://cloud.example:10002"
    assert config.edge_hub.websocket.server == "cloud.example:10000"
    assert config.edge_hub.tls_private_key_file == str(tmp_path / "pki" / "server.key")


def test_the_cloudhub_of_a_join_may_be_elsewhere_and_have_an_ipv6_address(tmp_path: Path) -> None:
    place = find_place(Home(tmp_path), None, server="[2001:db8::1]", cloudhub="", node_name="edge-1")
    assert place.config.edge_hub.websocket.server == "[2001:db8::1]:10000"
    place = find_place(Home(tmp_path), None, server="a", cloudhub="hub.example:443", node_name="edge-1")
    assert place.config.edge_hub.websocket.server == "hub.example:443"


def test_a_configuration_that_is_there_decides_and_a_join_under_another_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "edgecore.yaml").write_text(CONFIG)
    place = find_place(Home(tmp_path), None, server="", cloudhub="", node_name="edge-9")
    assert (place.config.node_name, place.new_text) == ("edge-9", "")
    with pytest.raises(NotEnrolled, match="says that this node is 'edge-9'") as caught:
        find_place(Home(tmp_path), None, server="", cloudhub="", node_name="other")
    assert caught.value.code == NODE_NAME


def test_a_name_that_is_none_is_refused_before_anything_is_asked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="hostnameOverride"):
        find_place(Home(tmp_path), None, server="cloud", cloudhub="", node_name="Not A Name")


# --- the command --------------------------------------------------------------------------------------------


@pytest.mark.processes
def test_a_node_joins_from_nothing_but_a_token_and_an_address(tmp_path: Path, cloud: Cloud) -> None:
    home = tmp_path / "home"
    done = edgezmq(home, "join", "--token", cloud.token(), "--server", cloud.server, "--node-name", "edge-1")
    assert (done.returncode, done.stderr) == (0, "")
    assert "as system:node:edge-1" in done.stdout
    assert cloud.token() not in done.stdout
    for name in ("rootCA.crt", "server.crt", "server.key"):
        assert (home / "pki" / name).stat().st_mode & 0o777 == 0o600
    assert settings.read(home / "edgecore.yaml")[0].edge_hub.http_server == cloud.server


@pytest.mark.processes
def test_a_join_tries_again_while_the_cloud_is_away_and_no_longer_than_told(tmp_path: Path, cloud: Cloud) -> None:
    cloud.fault("refuse")
    words = ("join", "--token", cloud.token(), "--server", cloud.server, "--node-name", "edge-1")
    with subprocess.Popen(
        [sys.executable, "-m", "runtime.cli", *words],
        env=os.environ | {"EDGEZMQ_HOME": str(tmp_path / "home")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        said = process.stderr.readline()
        cloud.fault("clear")
        process.communicate(timeout=DEADLINE)
    assert process.returncode == 0
    assert said.startswith("edgezmq: not yet (unreachable): ")
    assert "nothing listens there" in said
    cloud.fault("refuse")
    done = edgezmq(tmp_path / "other", *words, "--timeout", "0")
    assert done.returncode == 1
    assert done.stderr.startswith("edgezmq: not joined (unreachable): ")
    assert not (tmp_path / "other" / "edgecore.yaml").exists()


@pytest.mark.processes
def test_a_refused_join_is_one_line_status_1_and_leaves_everything_as_it_was(tmp_path: Path, cloud: Cloud) -> None:
    (tmp_path / "edgecore.yaml").write_text(CONFIG)
    (tmp_path / "a").mkdir()
    for name in ("ca.crt", "n.crt", "n.key"):
        (tmp_path / "a" / name).write_text("old")
    expired = cloud.token(expires_in=-60)
    done = edgezmq(tmp_path, "join", "--token", expired, "--server", cloud.server)
    assert done.returncode == 1
    assert done.stderr.startswith("edgezmq: not joined (token-expired): ")
    assert len(done.stderr.splitlines()) == 1
    assert expired.rpartition(".")[2] not in done.stderr
    assert {path.read_text() for path in (tmp_path / "a").glob("[a-z]*")} == {"old"}


@pytest.mark.processes
def test_a_join_without_a_token_says_how_to_give_one(tmp_path: Path) -> None:
    done = edgezmq(tmp_path, "join", "--server", "127.0.0.1:1")
    assert done.returncode == 1
    assert "--token-file FILE, - for stdin; or EDGEZMQ_TOKEN" in done.stderr


def test_the_command_shows_no_token_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It begins anew with the token in a file of its own memory."""
    begun: list[list[str]] = []

    def execv(path: str, words: list[str]) -> None:
        begun.append(words)
        assert Path(words[-1]).read_text() == "SECRET"

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(sys, "orig_argv", ["python", "edgezmq", "join", "--token", "SECRET"])
    joining.hide_token()
    assert begun[0][:-1] == [sys.executable, "edgezmq", "join", "--token-file"]
    assert "SECRET" not in begun[0]
    os.close(int(begun[0][-1].rpartition("/")[2]))
