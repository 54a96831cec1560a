"""Finding and reading `edgecore.yaml`."""

from pathlib import Path

import pytest

from runtime.cli import settings
from runtime.cli.settings import NoConfiguration
from runtime.errors import ConfigError
from runtime.home import Home


def test_the_file_is_the_named_one_then_the_environments_then_the_homes(tmp_path: Path) -> None:
    home = Home(tmp_path)
    files = [tmp_path / name for name in ("edgecore.yaml", "named.yaml", "env.yaml")]
    for file in files:
        file.touch()
    environ = {"EDGEZMQ_CONFIG": str(files[2])}
    assert settings.find(files[1], home, environ) == files[1]
    assert settings.find(None, home, environ) == files[2]
    assert settings.find(None, home, {}) == files[0]


def test_without_any_file_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "KUBEEDGE_FILE", tmp_path / "none")
    with pytest.raises(NoConfiguration, match=r"Copy .*edgecore\.example\.yaml .* edgezmq demo"):
        settings.find(None, Home(tmp_path), {})


def test_a_named_file_that_is_not_there_is_not_replaced_by_another(tmp_path: Path) -> None:
    (tmp_path / "edgecore.yaml").touch()
    with pytest.raises(NoConfiguration, match="no such file"):
        settings.find(tmp_path / "typo.yaml", Home(tmp_path), {})


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("a: [1", "YAML"),
        ("a: b: c", "YAML"),
        ("a: !!python/object/apply:os.system [id]", "YAML"),
        ("\x00", "YAML"),
        ("kind: EdgeCore\nkind: EdgeCore\n", "each key once in its mapping"),
        ("modules: &all {a: 1}\nruntime:\n  <<: *all\n", "every key written out: no merge keys"),
    ],
)
def test_what_is_no_yaml_is_a_config_error(tmp_path: Path, text: str, rule: str) -> None:
    file = tmp_path / "f.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as fault:
        settings.read(file)
    assert fault.value.rule == rule


def test_a_file_that_is_not_text_is_a_config_error(tmp_path: Path) -> None:
    file = tmp_path / "f.yaml"
    file.write_bytes(b"\xff\xfe\x00\xd8\x00")
    with pytest.raises(ConfigError):
        settings.read(file)


def test_a_huge_file_is_not_even_parsed(tmp_path: Path) -> None:
    file = tmp_path / "f.yaml"
    file.write_bytes(b"#" * (settings.MAX_FILE_BYTES + 1))
    with pytest.raises(ConfigError, match="at most 1048576 bytes"):
        settings.read(file)


@pytest.mark.parametrize(
    "text", ["d: 2001-00-01", 'a: !!int ""', "a: !!bool maybe", "a: !!float x", "a: !!timestamp x"]
)
def test_a_value_that_yaml_itself_cannot_convert_is_a_fault_of_the_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "edgecore.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"edgecore\.yaml"):
        settings.parse(path)
