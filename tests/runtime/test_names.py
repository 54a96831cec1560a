"""Names of modules and groups."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime import emp
from runtime.errors import InvalidName
from runtime.names import Group, check_destination, check_name, group_name, is_group

GOOD = ("a", "A", "7", "edgehub", "cli-42.x_Y", "x" * 64)
BAD = ("", "-a", ".a", "_a", "@a", "a b", "a/b", "a\n", "\na", "x" * 65, "é", "a\x00")


@pytest.mark.parametrize("name", GOOD)
def test_a_good_name_is_returned(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize("name", [*BAD, None, 7, b"a"])
def test_a_bad_name_is_refused_with_what_is_allowed(name: object) -> None:
    with pytest.raises(InvalidName, match="1 to 64 of"):
        check_name(name)  # type: ignore[arg-type]


def test_a_group_is_its_text_in_frames() -> None:
    group = Group("hub")
    assert (str(group), group.name, repr(group)) == ("@hub", "hub", "Group('hub')")
    assert is_group(group)
    assert group_name(group) == "hub"
    assert not is_group("hub")
    assert group == "@hub"
    assert hash(group) == hash("@hub")


@pytest.mark.parametrize("name", BAD)
def test_a_bad_group_or_destination_is_refused(name: str) -> None:
    with pytest.raises(InvalidName):
        Group(name)
    with pytest.raises(InvalidName):
        check_destination("@" + name)
    if name != "@a":
        with pytest.raises(InvalidName):
            check_destination(name)


@given(st.text(max_size=66))
def test_frames_and_python_agree_on_every_name(name: str) -> None:
    try:
        check_name(name)
        good = True
    except InvalidName:
        good = False
    try:
        emp.decode(emp.encode(emp.HELLO, emp.Hello(name, [], b"i" * 16, 0, 1000, "")))
        decoded = True
    except emp.MalformedFrame:
        decoded = False
    assert good == decoded
