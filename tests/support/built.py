"""The examples in other languages, which `make examples` builds: tests of one that is not built are skipped.

Under env CI they fail instead.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
BUILT = {
    "c": "c-example",
    "go": "go-example",
    "rust": "target/release/rust-example",
    "javascript": "node_modules",
    "java": "target/java-example.jar",
}
"Language → what building it leaves in its directory."


def require_example(language: str) -> Path:
    """What was built of it, or skip the test; under env CI fail it."""
    built = EXAMPLES / language / BUILT[language]
    if built.exists():
        return built
    message = f"examples/{language} is not built: make examples ARGS={language}"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)
