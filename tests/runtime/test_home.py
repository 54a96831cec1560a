"""runtime.home: where files lie, and who may read them."""

from pathlib import Path

import pytest

from runtime.home import Home, bus_endpoint, find_home


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"EDGEZMQ_HOME": "/var/lib/edgezmq"}, Path("/var/lib/edgezmq")),
        ({"XDG_STATE_HOME": "/state"}, Path("/state/edgezmq")),
        ({"XDG_STATE_HOME": "relative"}, Path.home() / ".local/state/edgezmq"),
        ({}, Path.home() / ".local/state/edgezmq"),
    ],
)
def test_the_home_is_what_the_environment_names_else_the_users_state_directory(
    environ: dict[str, str], expected: Path
) -> None:
    assert find_home(environ) == Home(expected)


def test_directories_are_closed_to_others_and_those_with_secrets_to_the_group(tmp_path: Path) -> None:
    home = Home(tmp_path / "deep" / "home").prepare().prepare()
    modes = {path.name: path.stat().st_mode & 0o777 for path in home.path.iterdir()}
    assert modes == {"run": 0o750, "log": 0o750, "modules.d": 0o750, "data": 0o700, "pki": 0o700}


def test_the_bus_is_in_the_home_unless_configuration_or_environment_say_otherwise() -> None:
    home = Home(Path("/h"))
    assert bus_endpoint(home, "", {}) == "ipc:///h/run/bus.sock"
    assert bus_endpoint(home, "tcp://10.0.0.1:9", {}) == "tcp://10.0.0.1:9"
    assert bus_endpoint(home, "tcp://10.0.0.1:9", {"EDGEZMQ_BUS": "ipc:///x"}) == "ipc:///x"
