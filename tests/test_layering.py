"""The arrows of the architecture, read from the imports (cloudsim's own: tests/cloudsim/test_layering.py)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

IO_LIBRARIES = {
    "aioquic",
    "aiomqtt",
    "amqtt",
    "asyncio",
    "ctypes",
    "fcntl",
    "logging",
    "multiprocessing",
    "os",
    "paho",
    "pathlib",
    "select",
    "signal",
    "socket",
    "sqlite3",
    "ssl",
    "subprocess",
    "threading",
    "time",
    "websockets",
    "zmq",
}

RUNTIME_CORES = (
    "access",
    "backoff",
    "client_core",
    "confine",
    "emp",
    "enrolment",
    "errors",
    "exposition",
    "http_answer",
    "inspection",
    "names",
    "proxy",
    "routing",
    "routing_state",
    "viaduct",
    "watching",
    "zap",
)
EDGEHUB_CORES = (
    "certificate",
    "certificate_plan",
    "cloud",
    "coalescing",
    "config",
    "dialect",
    "dispatch",
    "frames",
    "governor",
    "liveness",
    "outbox",
    "permission",
    "session",
    "sync_keeper",
    "window",
)
EVENTBUS_CORES = ("bridge", "config", "packets", "subscriptions", "topics")
CONFORM_CORES = (
    "broker_checks",
    "broker_stage",
    "module_attaching",
    "module_checks",
    "module_receiving",
    "module_sending",
    "module_stage",
    "play",
    "referee",
    "report",
    "wire",
)
CORES = [
    *(ROOT / "runtime" / "conform" / f"{name}.py" for name in CONFORM_CORES),
    *(ROOT / "runtime" / f"{name}.py" for name in RUNTIME_CORES),
    *(ROOT / "modules" / "edgehub" / f"{name}.py" for name in EDGEHUB_CORES),
    *(ROOT / "modules" / "eventbus" / f"{name}.py" for name in EVENTBUS_CORES),
]

RUNTIME_FOR_MODULE_CORES = {"backoff", "errors", "names", "emp", "message", "config", "enrolment", "proxy"}
LIBRARIES = "runtime.libraries"
"Sees to it that msgspec comes lean, whoever imports it first; a core gets nothing from it."
MESSAGE = "runtime.message"
"A value with two encodings; it reads the clock and os.urandom for new ids, and is used by cores as a value."

ONE_HOME = {
    "websockets": {"modules/edgehub/websocket.py"},
    "aioquic": {"modules/edgehub/quic.py", "modules/edgehub/tls.py"},
    "google": {"runtime/viaduct.py"},
    "paho": {"modules/eventbus/mqtt.py"},
    "yaml": {"runtime/cli/settings.py"},
    "rich": {"runtime/cli"},
    "typer": {"runtime/cli"},
}
"Which files may import a library that costs memory or ties us to a transport."


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(what `path` imports, whether only for the type checker). `from runtime import emp` is `runtime.emp`."""
    tree = ast.parse(path.read_text())
    checking = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node in checking
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            module = node.module or ""
            if module in ("runtime", "modules", "modules.edgehub", "modules.eventbus", "cloudsim"):
                for alias in node.names:
                    yield f"{module}.{alias.name}", node in checking
            else:
                yield module, node in checking


def imported(path: Path) -> set[str]:
    return {name for name, _ in imports(path)}


def sources(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found, folder
    return found


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("core", CORES, ids=relative)
def test_a_core_imports_no_io(core: Path) -> None:
    roots = {name.split(".")[0] for name, checking in imports(core) if not checking}
    # A configuration is a value that may name a path; whoever opens it is a shell.
    forbidden = IO_LIBRARIES - {"pathlib"} if core.stem == "config" else IO_LIBRARIES
    assert roots.isdisjoint(forbidden), roots & forbidden


@pytest.mark.parametrize("core", CORES, ids=relative)
def test_a_core_draws_no_chance_of_its_own(core: Path) -> None:
    """`random.Random` is an argument; the module's global functions are not called."""
    called = {
        node.attr
        for node in ast.walk(ast.parse(core.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "random"
    }
    assert called <= {"Random"}


def test_cores_of_the_runtime_know_only_cores() -> None:
    cores = {f"runtime.{name}" for name in RUNTIME_CORES} | {MESSAGE}
    for name in RUNTIME_CORES:
        ours = {found for found in imported(ROOT / "runtime" / f"{name}.py") if found.split(".")[0] == "runtime"}
        assert ours <= cores | {LIBRARIES}, name


def test_the_conformance_runner_shares_the_codec_with_the_runtime_and_nothing_else() -> None:
    """Else it would compare our broker and our SDK with themselves."""
    for name in CONFORM_CORES:
        ours = {
            found for found in imported(ROOT / "runtime" / "conform" / f"{name}.py") if found.startswith("runtime.")
        }
        own = {found for found in ours if found.startswith("runtime.conform")}
        assert ours - own <= {"runtime.emp", "runtime.errors"}, name


@pytest.mark.parametrize(("module", "cores"), [("edgehub", EDGEHUB_CORES), ("eventbus", EVENTBUS_CORES)])
def test_cores_of_a_module_know_its_cores_and_the_runtimes_values(module: str, cores: tuple[str, ...]) -> None:
    allowed = {f"runtime.{name}" for name in RUNTIME_FOR_MODULE_CORES} | {f"modules.{module}.{name}" for name in cores}
    for name in cores:
        found = imported(ROOT / "modules" / module / f"{name}.py")
        ours = {each for each in found if each.split(".")[0] in ("runtime", "modules", "cloudsim")}
        assert ours <= allowed, (name, ours - allowed)


def test_the_runtime_knows_neither_modules_nor_cloudsim() -> None:
    for path in sources("runtime"):
        roots = {name.split(".")[0] for name in imported(path)}
        assert roots.isdisjoint({"modules", "cloudsim", "bench", "tests"}), relative(path)


def test_no_module_imports_another() -> None:
    """They talk through the broker."""
    for path in sources("modules"):
        parts = path.relative_to(ROOT / "modules").parts
        if len(parts) == 1:
            continue
        for name in imported(path):
            pieces = name.split(".")
            assert pieces[0] not in ("cloudsim", "bench", "tests"), relative(path)
            if pieces[0] == "modules":
                assert pieces[1] == parts[0], f"{relative(path)} imports {name}"


def test_nothing_imports_tests_and_nobody_the_brokers_process() -> None:
    for folder in ("runtime", "modules", "cloudsim"):
        for path in sources(folder):
            found = imported(path)
            assert not any(name.split(".")[0] == "tests" for name in found), relative(path)
            assert "runtime.broker" not in found, relative(path)


@pytest.mark.parametrize("library", sorted(ONE_HOME))
def test_a_library_that_costs_stays_where_it_belongs(library: str) -> None:
    places = ONE_HOME[library]
    for folder in ("runtime", "modules"):
        for path in sources(folder):
            if any(name.split(".")[0] == library for name in imported(path)):
                where = relative(path)
                assert where in places or str(Path(where).parent) in places, f"{where} imports {library}"


def test_only_shells_of_the_runtime_import_zmq() -> None:
    for path in sources("modules"):
        assert not any(name.split(".")[0] == "zmq" for name in imported(path)), relative(path)
