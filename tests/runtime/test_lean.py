"""Imports without what a process does not need; and that it still works once it does."""

from __future__ import annotations

import subprocess
import sys

import pytest


def run(code: str) -> str:
    """What a new interpreter prints that runs `code`: what was imported before decides here."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("imports", "heavy"),
    [
        ("runtime.supervise", ("ssl", "email", "gettext", "gzip", "html.entities", "importlib.metadata")),
        ("runtime.watchdog", ("asyncio", "msgspec", "pickle", "ssl", "typing_extensions")),
        ("runtime.broker", ("asyncio", "inspect", "pickle", "ssl", "typing_extensions")),
        ("runtime.client", ("http.client", "pickle", "typing_extensions")),
        ("modules.edgehub.websocket", ("email", "importlib.metadata", "pickle", "_strptime", "zipfile")),
    ],
)
def test_a_process_does_not_load_what_it_does_not_use(imports: str, heavy: tuple[str, ...]) -> None:
    assert run(f"import sys, {imports}; print([name for name in {heavy!r} if name in sys.modules])") == "[]"


def test_what_was_absent_is_loaded_by_whoever_uses_it_after_all() -> None:
    assert (
        run("import runtime.libraries, sys, zmq.sugar.socket as s; print(s.pickle.loads(s.pickle.dumps([1])))") == "[1]"
    )


def test_what_was_absent_can_be_imported_later() -> None:
    assert run("import runtime.supervise, http.client; print(http.client.HTTPConnection.__name__)") == "HTTPConnection"


def test_what_was_loaded_before_is_not_hidden() -> None:
    code = (
        "import pickle, sys\nfrom runtime.lean import absent\n"
        "with absent('pickle'):\n    import pickle as again\n"
        "print(again is pickle is sys.modules['pickle'])"
    )
    assert run(code) == "True"


def test_a_name_asked_for_while_importing_is_missing_rather_than_loaded() -> None:
    code = (
        "from runtime.lean import absent\n"
        "try:\n    with absent('tabnanny'):\n        from tabnanny import check\n"
        "except ImportError:\n    import tabnanny\n    print(tabnanny.check.__name__)"
    )
    assert run(code) == "check"


def test_supervisord_loads_its_rpc_interface_by_name() -> None:
    code = (
        "import runtime.supervise\n"
        "from supervisor.compat import import_spec\n"
        "print(import_spec('supervisor.rpcinterface:make_main_rpcinterface').__name__)"
    )
    assert run(code) == "make_main_rpcinterface"
