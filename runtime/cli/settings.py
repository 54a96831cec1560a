"""Find `edgecore.yaml`, read it, and turn it into a checked configuration. The only place that reads YAML."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import yaml

from runtime.config import NodeConfig
from runtime.edgecore import from_edgecore
from runtime.errors import ConfigError, EdgezmqError
from runtime.home import Home
from runtime.shipped import shipped

CONFIG_VARIABLE: Final = "EDGEZMQ_CONFIG"
KUBEEDGE_FILE: Final = Path("/etc/kubeedge/config/edgecore.yaml")
"Where keadm writes it."

MAX_FILE_BYTES: Final = 2**20


class NoConfiguration(EdgezmqError):
    """No configuration file was found."""


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping: the first of the two would be lost unseen.

    And merges (`<<`), with which a few lines can make a mapping of a thousand million keys.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            if key_node.tag == "tag:yaml.org,2002:merge":
                raise ConfigError(f"line {line}", key_node.value, "every key written out: no merge keys")
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str):
                if key in seen:
                    raise ConfigError(f"line {line}, {key}", "a second time", "each key once in its mapping")
                seen.add(key)
        return super().construct_mapping(node, deep)


def find(named: Path | None, home: Home, environ: Mapping[str, str] = os.environ) -> Path:
    """The file to read; raises NoConfiguration, saying what to do."""
    if named is None and environ.get(CONFIG_VARIABLE):
        named = Path(environ[CONFIG_VARIABLE])
    if named is not None:
        if not named.is_file():
            raise NoConfiguration(f"{named}: no such file")
        return named
    for candidate in (home.path / "edgecore.yaml", KUBEEDGE_FILE):
        if candidate.is_file():
            return candidate
    try:
        example = str(shipped("edgecore.example.yaml"))
    except FileNotFoundError:
        example = "edgecore.example.yaml"
    raise NoConfiguration(
        f"no configuration: neither {home.path / 'edgecore.yaml'} nor {KUBEEDGE_FILE} is there. "
        f"Copy {example} to the first and fill in your cloud, or name a file with --config. "
        "To try things out without a cloud: edgezmq demo"
    )


def dump(document: Mapping[str, Any]) -> str:
    """YAML, keys in their order."""
    return yaml.safe_dump(dict(document), sort_keys=False)


def write(path: Path, text: str, *, mode: int = 0o640) -> None:
    """A configuration (not for everybody, for it may hold a token), in one step. Raises OSError."""
    scratch = path.with_name(f".{path.name}.new")
    scratch.unlink(missing_ok=True)
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(descriptor)
    scratch.replace(path)


def read(path: Path) -> tuple[NodeConfig, list[str]]:
    """The checked configuration in `path`, and warnings. Raises ConfigError, OSError."""
    return from_edgecore(parse(path), directory=path.absolute().parent)


def parse(path: Path) -> object:
    """The YAML document in `path`. Raises ConfigError, OSError."""
    data = path.read_bytes()
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(str(path), f"{len(data)} bytes", f"at most {MAX_FILE_BYTES} bytes")
    try:
        return yaml.load(data, _Loader)
    # PyYAML lets through what its conversions raise: a 13th month, `!!int ""`, `!!bool maybe`.
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as fault:
        raise ConfigError(str(path), " ".join(str(fault).split()), "YAML") from fault
