"""runtime.logs: one line per event, and a full disk ends nobody."""

import subprocess
import sys

import pytest

from runtime.logs import choose_level


def run_python(code: str, **options: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", code], check=False, text=True, stderr=subprocess.PIPE, timeout=60, **options
    )  # type: ignore[call-overload, no-any-return]


def test_an_event_is_one_line_with_time_level_and_logger() -> None:
    done = run_python(
        "import logging; from runtime import logs; logs.setup('x')\n"
        "logging.getLogger('modules.x').info('link lost reason=%s', 'eof')\n"
        "logging.getLogger('modules.x').debug('never')"
    )
    [line] = done.stderr.splitlines()
    assert line[10] == "T"
    assert line[23:].startswith("Z INFO modules.x link lost reason=eof")


def test_a_traceback_stays_with_its_event() -> None:
    done = run_python(
        "import logging; from runtime import logs; logs.setup('x')\n"
        "try: 1/0\n"
        "except ZeroDivisionError: logging.getLogger('m').exception('failed')"
    )
    first, *others = done.stderr.splitlines()
    assert first.endswith("ERROR m failed")
    assert others
    assert all(line.startswith("    ") for line in others)


@pytest.mark.parametrize(
    ("configured", "environ", "expected"),
    [
        ("", {}, (20, True)),
        ("debug", {}, (10, True)),
        ("debug", {"EDGEZMQ_LOG": "error"}, (40, True)),
        ("", {"EDGEZMQ_LOG": "loud"}, (20, False)),
    ],
)
def test_the_environment_wins_and_an_unknown_level_is_info(
    configured: str, environ: dict[str, str], expected: tuple[int, bool]
) -> None:
    assert choose_level(configured, environ) == expected


def test_a_full_disk_drops_lines_and_nothing_else() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                "import logging; from runtime import logs; logs.setup('x')\n"
                "for _ in range(100): logging.getLogger('m').error('x' * 1000)\n"
                "print('alive')",
            ],
            check=False,
            stdout=subprocess.PIPE,
            stderr=full,
            text=True,
            timeout=60,
        )
    assert done.stdout == "alive\n"
