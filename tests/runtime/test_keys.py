"""Files of CURVE keys, and the answers to libzmq's questions about them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from zmq.utils.z85 import encode as reference_z85

from runtime import keys, zap
from runtime.errors import InvalidName
from runtime.keys import KeyFault


def test_a_pair_is_made_once_closed_to_others_and_read_back(tmp_path: Path) -> None:
    directory = tmp_path / "curve"
    made = keys.make(directory, "pump")
    assert (len(made.public), len(made.secret)) == (40, 40)
    assert directory.stat().st_mode & 0o777 == 0o700
    assert sorted((file.name, file.stat().st_mode & 0o777) for file in directory.iterdir()) == [
        ("pump.key", 0o644),
        ("pump.key_secret", 0o600),
    ]
    assert keys.load(directory / "pump.key_secret") == made
    assert keys.public_keys(directory) == {"pump": made.public}
    with pytest.raises(KeyFault, match="already"):
        keys.make(directory, "pump")
    assert keys.load_or_make(directory, "pump") == made


def test_a_secret_is_not_shown(tmp_path: Path) -> None:
    made = keys.make(tmp_path, "pump")
    assert made.secret not in repr(made)
    assert zap.fingerprint(made.public) in repr(made)


def test_a_name_is_a_modules_name(tmp_path: Path) -> None:
    with pytest.raises(InvalidName):
        keys.make(tmp_path, "../evil")


def test_a_secret_that_others_may_read_is_refused(tmp_path: Path) -> None:
    keys.make(tmp_path, "pump")
    file = tmp_path / "pump.key_secret"
    file.chmod(0o640)
    with pytest.raises(KeyFault, match="mode 0640, expected 0600"):
        keys.load(file)


@pytest.mark.parametrize("content", ["", 'curve\n    public-key = "short"\n    secret-key = "short"\n', "\x00\xff"])
def test_a_file_that_is_no_key_is_named(tmp_path: Path, content: str) -> None:
    file = tmp_path / "pump.key_secret"
    file.write_text(content)
    file.chmod(0o600)
    with pytest.raises(KeyFault, match=r"pump\.key_secret"):
        keys.load(file)


def test_the_public_file_in_place_of_the_secret_one_is_noticed(tmp_path: Path) -> None:
    keys.make(tmp_path, "pump")
    (tmp_path / "pump.key").chmod(0o600)
    with pytest.raises(KeyFault, match="no secret key in it"):
        keys.load(tmp_path / "pump.key")


# --- ZAP --------------------------------------------------------------------------------------------


@given(st.binary(min_size=32, max_size=32))
def test_z85_is_that_of_zeromq(key: bytes) -> None:
    assert zap.z85(key) == reference_z85(key).decode()


KEY = bytes(range(32))


def request(*, version: bytes = b"1.0", mechanism: bytes = b"CURVE", key: bytes = KEY) -> list[bytes]:
    return [version, b"7", b"edgezmq", b"127.0.0.1", b"", mechanism, key]


def test_an_admitted_key_becomes_the_user_id() -> None:
    answer, refused = zap.answer(request(), {zap.z85(KEY)})
    assert answer == [b"1.0", b"7", b"200", b"OK", zap.z85(KEY).encode(), b""]
    assert refused == ""


def test_another_key_is_turned_away_and_named() -> None:
    answer, refused = zap.answer(request(), {"x" * 40})
    assert answer[2] == b"400"
    assert refused == zap.z85(KEY)


@given(st.lists(st.binary(max_size=64), max_size=9))
def test_whatever_is_asked_is_answered_and_never_with_yes(frames: list[bytes]) -> None:
    answer, _ = zap.answer(frames, {"x" * 40})
    assert len(answer) == 6
    assert answer[2] in (b"400", b"500")


@pytest.mark.parametrize("frames", [request(version=b"2.0"), request(mechanism=b"NULL"), request(key=b"short")])
def test_anything_but_curve_is_turned_away(frames: list[bytes]) -> None:
    answer, _ = zap.answer(frames, {zap.z85(KEY)})
    assert answer[2] in (b"400", b"500")
