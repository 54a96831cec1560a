"""`edgezmq new`: a module of one's own, made from the example in its language."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from runtime.errors import EdgezmqError
from runtime.shipped import shipped

_NAME: Final = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
MAX_NAME: Final = 64


class CannotScaffold(EdgezmqError):
    """A name, a language or a place that will not do."""


@dataclass(frozen=True)
class Template:
    """An example: what it is called, the files that belong to it, and how it is built and started."""

    directory: str
    name: str
    files: tuple[str, ...]
    build: str
    command: str
    options: str = ""


TEMPLATES: Final = {
    "c": Template(
        "c",
        "c-example",
        (".gitignore", "Makefile", "README.md", "c-example.conf", "emp.c", "emp.h", "main.c"),
        "make",
        "./c-example",
    ),
    "go": Template(
        "go",
        "go-example",
        (
            ".gitignore",
            "README.md",
            "emp/batch_test.go",
            "emp/emp.go",
            "emp/emp_test.go",
            "go-example.conf",
            "go.mod",
            "go.sum",
            "main.go",
        ),
        "go build -o go-example .",
        "./go-example",
    ),
    "java": Template(
        "java",
        "java-example",
        (
            ".gitignore",
            "README.md",
            "java-example.conf",
            "pom.xml",
            "src/main/java/edgezmq/example/Emp.java",
            "src/main/java/edgezmq/example/Main.java",
        ),
        "mvn --batch-mode --quiet package",
        "java -jar target/java-example.jar",
        "--tcp ",
    ),
    "javascript": Template(
        "javascript",
        "js-example",
        ("README.md", "emp.js", "index.js", "js-example.conf", "package-lock.json", "package.json"),
        "npm ci",
        "node index.js",
    ),
    "python": Template("python", "echo", ("echo.conf", "echo.py", "test_echo.py"), ":", "python3 echo.py"),
    "rust": Template(
        "rust",
        "rust-example",
        (
            ".cargo/config.toml",
            ".gitignore",
            "Cargo.lock",
            "Cargo.toml",
            "README.md",
            "rust-example.conf",
            "rustfmt.toml",
            "src/emp.rs",
            "src/main.rs",
        ),
        "cargo build --release --locked",
        "target/release/rust-example",
    ),
}

_TEST: Final = """#!/bin/sh
# Does it keep the protocol? Build it, and let edgezmq play the broker.
set -e
cd "$(dirname "$0")"
{build}
exec edgezmq conform {options}-- {command}
"""


def renamed(text: str, template: Template, name: str) -> str:
    """`text` of the example as text of the module `name`. Its folder has the module's name too."""
    text = text.replace(f"%(here)s/{template.directory}/", f"%(here)s/{name}/")
    if template.directory == "python":
        text = text.replace("%(here)s/echo.py", f"%(here)s/{name}/echo.py")
    return re.sub(rf"\b{re.escape(template.name)}\b", name, text)


def scaffold(name: str, language: str, directory: Path, examples: Path | None = None) -> list[Path]:
    """Write the module `name` into `directory`, which must not be there; returns its files.

    `examples`: another place for the templates than the one they are shipped in.
    Raises CannotScaffold, and OSError when it cannot be written.
    """
    if len(name) > MAX_NAME or _NAME.fullmatch(name) is None:
        raise CannotScaffold(
            f"{name!r}: expected words of a-z and 0-9 with - between them, at most {MAX_NAME} characters"
        )
    template = TEMPLATES.get(language)
    if template is None:
        raise CannotScaffold(f"{language!r} is no language of ours; there are {', '.join(sorted(TEMPLATES))}")
    try:
        source = shipped(template.directory, [examples or shipped("examples")])
    except FileNotFoundError as fault:
        raise CannotScaffold(f"no template: {fault}") from None
    if directory.exists():
        raise CannotScaffold(f"{directory} is there already")
    texts = {
        renamed(file, template, name): renamed((source / file).read_text(), template, name) for file in template.files
    }
    test = _TEST.format(build=template.build, options=template.options, command=template.command)
    texts["conform.sh"] = renamed(test, template, name)
    if language == "python":
        texts = {
            file.replace("test_echo", f"test_{name}"): text.replace("test_echo.py", f"test_{name}.py")
            for file, text in texts.items()
        }
    written = []
    for file, text in texts.items():
        path = directory / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        written.append(path)
    (directory / "conform.sh").chmod(0o755)
    return sorted(written)


def make(name: str, language: str, directory: Path | None) -> None:
    """Write it and say what comes next."""
    place = directory if directory is not None else Path(name)
    for path in scaffold(name, language, place):
        print(path)
    print(f"\nDoes it keep the protocol?   {place / 'conform.sh'}")
    print(f"Under supervisord:           copy {place} and {place / name}.conf into EDGEZMQ_HOME/modules.d")
    print(
        f"Where a policy is in force:  {name}: {{users: [USER], ownSocket: true, to: [...]}} in runtime.policy.modules,"
    )
    print("                             then edgezmq reload; as that user it runs by")
    print(
        f"                             `-m runtime.exec --name {name} --user USER -- …` in its .conf: docs/isolation.md"
    )
