"""A node from a wheel, in an environment without the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.cli.scaffolding import TEMPLATES, scaffold
from tests.support.aio import until_sync
from tests.support.deadline import DEADLINE

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[2]
CONFIGURATION = """
modules:
  edged: {hostnameOverride: edge-1}
  edgeHub: {enable: false}
  eventBus: {enable: false}
runtime: {metrics: {enable: false}}
"""


def run(*command: object, **more: object) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=6 * DEADLINE, **more)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The environment's directory. What edgezmq depends on it shares with the tests."""
    place = tmp_path_factory.mktemp("installed")
    source = place / "source"
    run("git", "clone", "--quiet", ROOT, source)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", place, source)
    environment = place / "env"
    run(sys.executable, "-m", "venv", "--without-pip", environment)
    (wheel,) = place.glob("edgezmq-*.whl")
    run(*pip, "--python", environment / "bin" / "python", "install", "--no-deps", wheel)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(environment)}))
    # A path in a .pth file is searched last, and the .pth files there (the checkout's own) are not read.
    (packages / "shared.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    return environment


@pytest.fixture
def environ(installed: Path, tmp_path: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("EDGEZMQ_", "PYTHON"))}
    return kept | {"EDGEZMQ_HOME": str(tmp_path / "node"), "PATH": f"{installed}/bin:{os.environ['PATH']}"}


@pytest.fixture
def node(environ: dict[str, str], tmp_path: Path) -> Iterator[Path]:
    home = tmp_path / "node"
    home.mkdir()
    (home / "edgecore.yaml").write_text(CONFIGURATION)
    yield home
    subprocess.run(["edgezmq", "down"], env=environ, cwd=tmp_path, capture_output=True, timeout=3 * DEADLINE)


def test_a_node_from_a_wheel_comes_up_and_passes_a_message(
    installed: Path, node: Path, environ: dict[str, str], tmp_path: Path
) -> None:
    where = run(
        installed / "bin" / "python", "-c", "import runtime; print(runtime.__file__)", cwd=tmp_path, env=environ
    )
    assert where.startswith(str(installed))
    run(installed / "bin" / "edgezmq", "up", "-d", cwd=tmp_path, env=environ)

    def is_up() -> bool:
        shown = subprocess.run(["edgezmq", "status"], env=environ, cwd=tmp_path, capture_output=True, text=True)
        return shown.returncode == 0 and "broker" in shown.stdout

    until_sync(is_up, "the node to be up")
    refused = subprocess.run(
        [installed / "bin" / "edgezmq", "send", "nobody", "-r", "a/b", "--content", "1"],
        env=environ,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=3 * DEADLINE,
    )
    assert "unroutable" in refused.stdout + refused.stderr


@pytest.mark.parametrize("language", sorted(TEMPLATES))
def test_a_new_module_from_a_wheel_is_the_same_as_from_a_checkout(
    language: str, installed: Path, environ: dict[str, str], tmp_path: Path
) -> None:
    run(installed / "bin" / "edgezmq", "new", "hall-lamp", "--lang", language, cwd=tmp_path, env=environ)
    made, expected = tmp_path / "hall-lamp", tmp_path / "checkout"
    files = scaffold("hall-lamp", language, expected)
    assert sorted(path for path in made.rglob("*") if path.is_file()) == sorted(
        made / file.relative_to(expected) for file in files
    )
    for file in files:
        assert (made / file.relative_to(expected)).read_bytes() == file.read_bytes()
